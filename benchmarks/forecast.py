#!/usr/bin/env python3
"""
Compare what `icefall-kd forecast` predicts with what training gave, and fit the numbers
of its model (SITUATIONS in icefall_kd/forecast/model.py) to these runs.

RUNS is a JSON list. A run is a dictionary with a "name", the WERs in percent that
training gave, "without" and "with" distillation, each by head as {"ctc": 14.9,
"transducer": 16.2}, and what was known before:

  "measures": FILE        what `icefall-kd forecast --json FILE` wrote, by a path from
                          the folder of RUNS; or
  "teacher": {"ctc": ..}  the teacher's WERs, and the "situation", one of falling,
                          converged, slices and untranscribed; the gap is then that of
                          the final student without distillation.

A prediction is right if the measured ratio lies in its range. It is made twice: with
the numbers in the code, and with numbers fitted to the other runs alone (leave one out;
those in the code for a situation of fewer than three points). An advice is right if a
student with "yes" became better, or one with "no" did not; runs without measures have
none.

Usage:

  benchmarks/forecast.py benchmarks/forecast_digits.json
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple
from unittest import mock

from icefall_kd import KDError, one_sentence
from icefall_kd.errors import require
from icefall_kd.forecast import model as forecast_model
from icefall_kd.forecast.measures import HEADS, Interval, measures_of
from icefall_kd.forecast.model import SITUATIONS, WITH_COST, Situation, expected_ratio
from icefall_kd.forecast.verdict import decide, situation_of


@dataclass
class Run:
    """A training and what was known before.

    Args:
      name: For the table.
      situation: One of SITUATIONS.
      gaps: By head.
      ratios: By head, the WER with distillation / that without.
      answer: The forecast's advice; "" where there are no measures.
    """

    name: str
    situation: str
    gaps: Dict[str, Interval]
    ratios: Dict[str, float]
    answer: str = ""

    def points(self) -> List[Tuple[float, float]]:
        """The gap and the log ratio of each head."""
        return [(self.gaps[h].value, math.log(r)) for h, r in self.ratios.items()]


def read_runs(path: Path) -> List[Run]:
    """Read the list of runs; ``path`` is its file."""
    try:
        values = json.loads(path.read_text("utf8"))
    except (OSError, ValueError) as e:
        raise KDError(
            f"{path} is no JSON ({type(e).__name__}): give a list of runs"
        ) from None
    require(
        isinstance(values, list) and values, f"{path} is no list of runs: see --help"
    )
    runs = []
    for i, value in enumerate(values):
        try:
            runs.append(_run(value, path.parent))
        except (KeyError, TypeError, ValueError, OSError, ZeroDivisionError) as e:
            raise KDError(
                f"run {i} of {path} can't be used ({type(e).__name__}: {e}): see --help"
            ) from None
    return runs


def _run(value: Dict[str, Any], folder: Path) -> Run:
    before, after = value["without"], value["with"]
    ratios = {head: after[head] / before[head] for head in HEADS if head in after}
    if "measures" in value:
        text = (folder / value["measures"]).read_text("utf8")
        measures = measures_of(json.loads(text)["measures"])
        gaps, situation = measures.gaps, situation_of(measures)
        answer = decide(measures).answer
    else:
        logs = {h: math.log(before[h] / value["teacher"][h]) for h in ratios}
        gaps = {head: Interval(x, x, x) for head, x in logs.items()}
        situation, answer = value["situation"], ""
    require(
        situation in SITUATIONS,
        f"the situation of {value['name']} is {situation!r}, and must be one of "
        f"{', '.join(SITUATIONS)}",
    )
    shared = {head: ratio for head, ratio in ratios.items() if head in gaps}
    return Run(str(value["name"]), situation, gaps, shared, answer)


def fit_situations(runs: Sequence[Run]) -> Dict[str, Situation]:
    """Fit the model's numbers to runs; those in the code where there are too few."""
    fitted = {}
    for name, in_code in SITUATIONS.items():
        points = [p for run in runs if run.situation == name for p in run.points()]
        fitted[name] = forecast_model.fit(points, name in WITH_COST) or in_code
    return fitted


def predict(run: Run, situations: Dict[str, Situation]) -> Dict[str, Interval]:
    """Predict the ratio of each head of a run by the numbers of ``situations``."""
    with mock.patch.dict(forecast_model.SITUATIONS, situations):
        return {
            head: expected_ratio(run.gaps[head], run.situation) for head in run.ratios
        }


def compare(runs: Sequence[Run]) -> List[Dict[str, Any]]:
    """Return a row for each head of each run: predicted and measured ratio."""
    rows = []
    for i, run in enumerate(runs):
        others = fit_situations([*runs[:i], *runs[i + 1 :]])
        predictions = (predict(run, {}), predict(run, others))
        for head, measured in run.ratios.items():
            row = {"run": run.name, "situation": run.situation, "head": head}
            row.update(gap=run.gaps[head].value, measured=measured)
            for name, predicted in zip(("in code", "leave one out"), predictions):
                ratio = predicted[head]
                is_right = ratio.low <= measured <= ratio.high
                row[name] = {**vars(ratio), "right": is_right}
            rows.append(row)
    return rows


def advice_is_right(run: Run) -> Optional[bool]:
    """Whether ``run`` became better, in the mean of its heads, as advised."""
    if run.answer not in ("yes", "no"):
        return None
    change = sum(math.log(ratio) for ratio in run.ratios.values())
    return (change < 0) == (run.answer == "yes")


def report(runs: Sequence[Run], rows: Sequence[Dict[str, Any]]) -> str:
    """Return the tables; ``rows`` are those of :func:`compare`."""
    lines = ["| run | head | gap | measured | predicted | | leave one out | |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['run']} ({row['situation']})", row["head"]]
        cells += [f"{math.exp(row['gap']):.2f}", f"{row['measured']:.2f}"]
        for name in ("in code", "leave one out"):
            x = row[name]
            cells.append(f"{x['value']:.2f} ({x['low']:.2f} to {x['high']:.2f})")
            cells.append("right" if x["right"] else "wrong")
        lines.append(f"| {' | '.join(cells)} |")
    for name in ("in code", "leave one out"):
        right = sum(row[name]["right"] for row in rows)
        errors = [abs(math.log(row["measured"] / row[name]["value"])) for row in rows]
        mean = 100 * (math.exp(sum(errors) / len(errors)) - 1)
        lines.append(
            f"\nNumbers {name}: {right} of {len(rows)} in the range; off by {mean:.0f} "
            "% in the mean."
        )
    advised = [(run, advice_is_right(run)) for run in runs]
    advised = [(run, right) for run, right in advised if right is not None]
    if advised:
        wrong = [f"{run.name} ({run.answer})" for run, right in advised if not right]
        lines.append(
            f"\nAdvice: right in {len(advised) - len(wrong)} of {len(advised)} runs"
            + (f"; wrong: {', '.join(wrong)}." if wrong else ".")
        )
    lines.append("\nFitted to all of them, for icefall_kd/forecast/model.py:\n")
    for name, numbers in fit_situations(runs).items():
        lines.append(
            f'    "{name}": Situation({numbers.slope:.2f}, {numbers.cost:.2f}, '
            f"{numbers.spread:.2f}, {numbers.points}),"
        )
    return "\n".join(lines)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", type=Path, metavar="RUNS", help="The JSON list of runs."
    )
    parser.add_argument("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    with one_sentence():
        runs = read_runs(args.runs)
        rows = compare(runs)
    print(report(runs, rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()

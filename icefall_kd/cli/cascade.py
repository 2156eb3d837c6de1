"""Chooses the utterances that a student leaves to its teacher."""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click

from icefall_kd.cli.options import Number, Place, command
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import need_kaldialign, require
from icefall_kd.files import check_new_folder, replacing
from icefall_kd.report.plots import draw_costs, need_matplotlib
from icefall_kd.transcripts.cascade import (
    MEASURES,
    Cascade,
    Decoded,
    Pair,
    Point,
    choose,
    identity,
    mean_rate,
)

WITHIN = 0.2  # percentage points of the teacher's error rate, where nothing is wished
SHARES = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # costs of the table
Curves = Dict[str, List[Point]]  # by measure


EXAMPLE = """
icefall-kd cascade dev-cascade --max-cost 0.5 \\
  --student exp/student/greedy_search/utterances-dev-epoch-30_avg-9.jsonl \\
  --teacher exp/teacher/greedy_search/utterances-dev-epoch-30_avg-9.jsonl
"""


@command(example=EXAMPLE)
@click.argument("out_dir", type=Place())
@click.option(
    "--student",
    type=Place(),
    required=True,
    metavar="FILE",
    help="The student's utterances-*.jsonl of `icefall-kd decode`, of dev cuts.",
)
@click.option(
    "--teacher",
    type=Place(),
    required=True,
    metavar="FILE",
    help="The teacher's of the same cuts.",
)
@click.option(
    "--cost",
    "kind",
    type=click.Choice(("seconds", "multiply-adds")),
    default="seconds",
    help="What a decoding costs: measured seconds of encoder and search, or the "
    "multiply-adds of greedy search.",
)
@click.option(
    "--measure",
    type=click.Choice(("best", *MEASURES)),
    default="best",
    help="How sure the student is of an utterance: one of the measures of the table, "
    "or the one whose curve has the lowest mean.",
)
@click.option(
    "--max-rate",
    type=Number(-1e-9, 1000),
    default=None,
    metavar="PERCENT",
    help="The highest error rate; the cheapest such threshold is chosen. Default: "
    f"{WITHIN} points above the teacher's.",
)
@click.option(
    "--max-cost",
    type=Number(0, 100),
    default=None,
    metavar="SHARE",
    help="The highest cost as a share of the teacher's, such as 0.5; the best such "
    "threshold is chosen.",
)
def cascade(
    out_dir: str,
    student: str,
    teacher: str,
    kind: str,
    measure: str,
    max_rate: Optional[float],
    max_cost: Optional[float],
) -> None:
    """Choose on dev cuts which utterances a student leaves to its teacher.

    The student decodes all utterances, and the teacher those alone of which the student
    is unsure. OUT_DIR gets the error rate at each cost as table, curve and plot, and
    cascade.json, with which `icefall-kd decode --cascade` decodes other cuts. Choose on
    cuts that neither model was trained on, and measure on others.
    """
    require(
        max_rate is None or max_cost is None,
        "--max-rate and --max-cost are both given: give one of them",
    )
    need_kaldialign()
    need_matplotlib()
    check_new_folder(out_dir, "OUT_DIR")
    of_student, of_teacher = (Decoded.read(Path(p)) for p in (student, teacher))
    pair = Pair.of(of_student, of_teacher)
    require(
        kind in pair.costs,
        f"--cost is {kind}, and the multiply-adds of one of the models are not known: "
        "give --cost seconds",
    )
    require(
        measure == "best" or measure in pair.confidence,
        f"--measure is {measure}, and the student's decoding has what it takes for "
        f"{', '.join(pair.confidence)} alone: give one of these, or best",
    )
    curves = {name: pair.curve(name, kind) for name in pair.confidence}
    if measure == "best":
        measure = min(curves, key=lambda name: mean_rate(curves[name]))
    point = _chosen(curves[measure], max_rate, max_cost)
    chosen = Cascade(
        measure,
        point.threshold,
        identity(of_student.header),
        identity(of_teacher.header),
    )
    text = _table(curves, pair, kind, measure, point)
    _write(Path(out_dir), chosen, curves, pair, kind, measure, point, text)
    click.echo(text)
    click.echo(f"\nThreshold, table, curve and plot: {out_dir}/cascade.*")
    click.echo(
        "Next: decode test cuts by the teacher, icefall-kd decode --cascade "
        f"{out_dir}/cascade.json --answers UTTERANCES"
    )


def _teacher_alone(pair: Pair) -> float:
    return 100 * sum(pair.errors[1]) / sum(pair.words)


def _chosen(
    points: List[Point], max_rate: Optional[float], max_cost: Optional[float]
) -> Point:
    if max_cost is None and max_rate is None:
        max_rate = points[-1].rate + WITHIN  # where all are asked, it is the teacher's
    return choose(points, max_rate, max_cost)


def _table(curves: Curves, pair: Pair, kind: str, measure: str, point: Point) -> str:
    """Error rates of each measure at some costs, and what was chosen."""
    any_curve = curves[measure]
    shares = [c for c in SHARES if c >= any_curve[0].cost]
    target = _teacher_alone(pair) + WITHIN
    head = ["measure", "mean", *(f"at {c:g}" for c in shares), "cost of the teacher's"]
    rows = [head]
    for name, points in sorted(curves.items(), key=lambda item: mean_rate(item[1])):
        at_shares = [choose(points, max_cost=c) for c in shares]
        within = choose(points, max_rate=target)
        rows.append(
            [
                name + (" *" if name == measure else ""),
                f"{mean_rate(points):.2f}",
                *(f"{p.rate:.2f}" for p in at_shares),
                f"{within.cost:.3f}",
            ]
        )
    count = len(pair.words)
    lines = [
        f"{count:,} utterances of {sum(pair.words):,} words. Error rates in percent by "
        f"cost, {kind};",
        "1 is the teacher's for all utterances. mean: over all costs. cost of the "
        "teacher's: of",
        f"its error rate within {WITHIN} points. *: the measure that is taken.",
        "",
        f"student alone  {any_curve[0].rate:.2f} % at {any_curve[0].cost:.3f}",
        f"teacher alone  {_teacher_alone(pair):.2f} % at 1",
        "",
        text_table(rows),
        "",
        *(f"{name}: {MEASURES[name][0]}" for name in curves),
        "",
        f"Chosen: {measure} below {point.threshold:.5g} goes to the teacher, "
        f"{point.asked:,} of {count:,} utterances:",
        f"{point.rate:.2f} % at {point.cost:.3f} of the teacher's cost.",
    ]
    return "\n".join(lines)


def _write(
    folder: Path,
    chosen: Cascade,
    curves: Curves,
    pair: Pair,
    kind: str,
    measure: str,
    point: Point,
    table: str,
) -> None:
    """Write the files of the command."""
    marks: List[Tuple[str, Any]] = [
        ("student", (curves[measure][0].cost, curves[measure][0].rate)),
        ("teacher", (1.0, _teacher_alone(pair))),
        ("chosen", (point.cost, point.rate)),
    ]
    lines = [(name, [(p.cost, p.rate) for p in c]) for name, c in curves.items()]
    unit = "cost, as a share of the teacher's " + kind
    values = {**chosen.as_dict(), "cost": kind, "expected": point._asdict()}
    csv = "measure,threshold,asked,percent,cost\n" + "".join(
        f"{name},{p.threshold:.6g},{p.asked},{p.rate:.4f},{p.cost:.5f}\n"
        for name, points in curves.items()
        for p in points
    )
    files = {
        "cascade.txt": table + "\n",
        "cascade.csv": csv,
        "cascade.svg": draw_costs(lines, marks, unit, "error rate (%)"),
        "cascade.json": json.dumps(values, indent=1) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with replacing(folder / name, shared=True) as temporary:
            temporary.write_text(text, "utf8")

#!/usr/bin/env python3
"""
Means over seeds, and each seed, from the summaries that run_fsdd.sh made.

Usage:
  ./local/results_table.py --work-dir work/fsdd --seeds "1 2 3"
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Tuple

from script_utils import read_rows, run_script, words_of

from icefall_kd import KDError

EXPERIMENTS = {
    "": "students that start from the teacher's layers",
    "-random": "students that start from random parameters",
    "-half": "half of the speakers without transcripts, from random parameters",
}
HEADS = ("ctc_wer", "transducer_wer")
Key = Tuple[str, int]  # model, and which of its rows: 0 the shorter training


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work/fsdd"))
    parser.add_argument("--seeds", type=str, default="1 2 3")
    return parser.parse_args()


def read(work_dir: Path, seed: str, suffix: str) -> Dict[Key, Dict[str, Any]]:
    path = work_dir / f"seed-{seed}{suffix}" / "exp" / "summary.json"
    if not path.is_file():
        raise KDError(f"{path} does not exist, let run_fsdd.sh finish seed {seed}")
    rows: Dict[Key, Dict[str, Any]] = {}
    for row in read_rows(path, ("model", "params", "steps", *HEADS)):
        n = sum(model == row["model"] for model, _ in rows)
        rows[row["model"], n] = row
    return rows


def closed(gap: List[float]) -> str:
    teacher, student, distilled = gap
    if student <= teacher:
        return "no gap"
    return f"{100 * (student - distilled) / (student - teacher):.0f} %"


def main() -> None:
    args = get_args()
    seeds = words_of(args.seeds, "--seeds")
    for suffix, title in EXPERIMENTS.items():
        runs = [read(args.work_dir, seed, suffix) for seed in seeds]
        print(f"\n### {title[0].upper()}{title[1:]}\n")
        print(
            "| model | parameters | steps | WER % CTC: mean (seeds) | "
            "WER % transducer: mean (seeds) |"
        )
        print("|---|---|---|---|---|")
        means: Dict[Key, Dict[str, float]] = {}
        for key in sorted(runs[0], key=lambda k: (k[0] != "teacher", k[1], k[0])):
            rows = [run[key] for run in runs]
            means[key] = {h: mean(r[h] for r in rows) for h in HEADS}
            cells = [
                f"**{means[key][h]:.2f}** ({', '.join(f'{r[h]:.2f}' for r in rows)})"
                for h in HEADS
            ]
            steps = "/".join(str(s) for s in sorted({r["steps"] for r in rows}))
            print(
                f"| {key[0]} | {rows[0]['params']:,} | {steps} | {' | '.join(cells)} |"
            )
        print()
        for n in sorted({n for name, n in means if name == "student"}):
            three = [means["teacher", 0], means["student", n], means["student-kd", n]]
            for head in HEADS:
                values = [m[head] for m in three]
                steps = runs[0]["student", n]["steps"]
                print(
                    f"- {head.replace('_wer', '')}, {steps} steps: KD closes "
                    f"{closed(values)} of the gap between student and teacher; its "
                    f"WER is {values[2] / values[1]:.2f} times the student's."
                )


if __name__ == "__main__":
    run_script(main)

#!/usr/bin/env python3
"""
What run_slices.sh found: the steps that students need for the WER that a student from
random parameters has at the end, and their curves.

Usage:
  ./local/curves_table.py --dir work/fsdd/slices
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Dict, List, Optional, Tuple

from results_table import HEADS
from script_utils import read_rows, run_script, words_of

from icefall_kd import KDError

LOSSES = {"none": "without KD", "mix": "with KD"}
STARTS = {
    "random": "random parameters",
    "first": "slices: first channels, even layers",
    "important": "slices: by importance",
}
NAMES = {"ctc_wer": "CTC", "transducer_wer": "transducer"}
Curve = List[Dict[str, float]]
Curves = Dict[Tuple[str, str], List[Curve]]


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dir", type=Path, default=Path("work/fsdd/slices"))
    add("--seeds", type=str, default="1 2 3")
    add("--starts", type=str, default="random first important")
    add("--losses", type=str, default="none mix")
    return parser.parse_args()


def read(args: argparse.Namespace) -> Curves:
    curves: Curves = {}
    for option, names in (("--losses", LOSSES), ("--starts", STARTS)):
        for name in words_of(getattr(args, option[2:]), option):
            if name not in names:
                raise KDError(f"{option} has {name!r}, give {', '.join(names)}")
    for loss in args.losses.split():
        for start in args.starts.split():
            for seed in words_of(args.seeds, "--seeds"):
                path = args.dir / f"seed-{seed}" / f"exp-{start}-{loss}" / "curve.json"
                if not path.is_file():
                    raise KDError(f"{path} does not exist, let run_slices.sh finish")
                curve = read_rows(path, ("step", *HEADS))
                curves.setdefault((start, loss), []).append(curve)
    return curves


def steps_to(curve: Curve, head: str, wer: float) -> Optional[int]:
    """Return the first step where the ``head`` of ``curve`` has at most ``wer``."""
    return next((int(p["step"]) for p in curve if p[head] <= wer), None)


def print_steps(curves: Curves) -> None:
    print("| KD | start | head | WER % to reach | steps | share of random's |")
    print("|---|---|---|---|---|---|")
    for (start, loss), seed_curves in curves.items():
        base = curves.get(("random", loss))
        for head in HEADS if base else ():
            goals = [curve[-1][head] for curve in base]
            steps = [steps_to(c, head, g) for c, g in zip(seed_curves, goals)]
            random = [steps_to(c, head, g) for c, g in zip(base, goals)]
            shown = ", ".join("-" if s is None else str(s) for s in steps)
            goal = ", ".join(f"{g:.2f}" for g in goals)
            ratio = "not reached"
            if None not in steps:
                ratio = f"{sum(steps) / sum(random):.2f}"
            title = f"| {LOSSES[loss]} | {STARTS[start]} | {NAMES[head]} |"
            print(f"{title} {goal} | {shown} | {ratio} |")


def print_curves(curves: Curves) -> None:
    steps = [int(p["step"]) for p in next(iter(curves.values()))[0]]
    shown = [s for s in steps if s <= 100 or s % 100 == 0]
    print("\nMean WER %, CTC / transducer, after so many steps:\n")
    print(f"| KD | start | {' | '.join(map(str, shown))} |")
    print("|---|---" + "|---" * len(shown) + "|")
    for (start, loss), seed_curves in curves.items():
        cells = []
        for step in shown:
            points = [
                next(p for p in curve if p["step"] == step) for curve in seed_curves
            ]
            cells.append(" / ".join(f"{mean(p[h] for p in points):.1f}" for h in HEADS))
        print(f"| {LOSSES[loss]} | {STARTS[start]} | {' | '.join(cells)} |")


def main() -> None:
    args = get_args()
    curves = read(args)
    print_steps(curves)
    print_curves(curves)


if __name__ == "__main__":
    run_script(main)

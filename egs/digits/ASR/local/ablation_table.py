#!/usr/bin/env python3
"""
WERs of each loss alone and of the default mix, from what run_ablation.sh decoded: means
over seeds, each seed, the share of the gap to the teacher that is closed, and the WERs
of the checkpoint near half of the steps.

Usage:
  ./local/ablation_table.py --work-dir work/fsdd --seeds "1 2 3" --variants "ctc mix"
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Dict, List

from results_table import HEADS, closed, read
from script_utils import check_range, run_script, words_of

from icefall_kd import KDError

METHODS = {"ctc_wer": "ctc-greedy-search", "transducer_wer": "greedy_search"}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("work/fsdd"))
    add("--seeds", type=str, default="1 2 3")
    add("--variants", type=str, required=True)
    add("--half-step", type=int, default=312)
    return parser.parse_args()


def wer(exp: Path, head: str, checkpoint: str) -> float:
    method = METHODS[head]
    name = f"wer-summary-test-{checkpoint}-avg-1-use-averaged-model.txt"
    path = exp / method / name
    if not path.is_file():
        raise KDError(f"{path} does not exist, let run_ablation.sh finish")
    try:
        return float(path.read_text("utf8").splitlines()[1].split()[-1])
    except (ValueError, IndexError):
        raise KDError(f"{path} holds no error rate, decode again") from None


def cell(values: List[float]) -> str:
    return f"**{mean(values):.2f}** ({', '.join(f'{v:.2f}' for v in values)})"


def main() -> None:
    args = get_args()
    seeds = words_of(args.seeds, "--seeds")
    check_range(args.half_step, 1, "--half-step", 10**9)
    runs = [read(args.work_dir, seed, "-random") for seed in seeds]
    known: Dict[str, Dict[str, List[float]]] = {
        name: {h: [run[name, 0][h] for run in runs] for h in HEADS}
        for name in ("teacher", "student")
    }
    print(
        "| loss | WER % CTC: mean (seeds) | gap closed | WER % transducer: mean "
        "(seeds) | gap closed | CTC, transducer at half of the steps |"
    )
    print("|---|---|---|---|---|---|")
    for name, rows in known.items():
        print(f"| {name} | {cell(rows[HEADS[0]])} | | {cell(rows[HEADS[1]])} | | |")
    for variant in args.variants.split():
        cells, halves = [], []
        for head in HEADS:
            exps = [args.work_dir / f"ablation/seed-{s}/exp-{variant}" for s in seeds]
            values = [wer(exp, head, "epoch-4") for exp in exps]
            half = [wer(exp, head, f"iter-{args.half_step}") for exp in exps]
            gap = [mean(known["teacher"][head]), mean(known["student"][head])]
            cells += [cell(values), closed([*gap, mean(values)])]
            halves.append(f"{mean(half):.2f}")
        print(f"| {variant} | {' | '.join(cells)} | {', '.join(halves)} |")


if __name__ == "__main__":
    run_script(main)

#!/usr/bin/env python3
"""
Losses and WERs of both heads over the steps of a training: of its start, epoch-1.pt,
and of each checkpoint-N.pt as it is, without averaging.

Usage:
  ./local/learning_curve.py --exp-dir exp/student-kd --json curve.json \
    --bpe-model data/lang_bpe_54/bpe.model --cuts data/fbank/cuts_test.jsonl.gz
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import List, Tuple

import torch
from script_utils import MOST_THREADS, check_range, run_script
from teacher_utils import RECIPE
from tqdm.auto import tqdm

from icefall_kd import KDError, load_model, load_tokenizer, one_sentence, score_heads
from icefall_kd.student.cuts import read_batches


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True)
    add("--bpe-model", type=str, required=True)
    add("--cuts", type=str, required=True)
    add("--num-cuts", type=int, default=100_000, help="The first so many.")
    add("--last-step", type=int, default=100_000, help="The last checkpoint to take.")
    add("--num-threads", type=int, default=1)
    add("--json", type=Path, required=True, help="The curve goes here.")
    return parser.parse_args()


def points(exp_dir: Path, last: int) -> List[Tuple[int, int, int]]:
    """Return the step, ``--epoch`` and ``--iter`` of each checkpoint in ``exp_dir``.

    Those after the step ``last`` are left out.
    """
    names = [p.name for p in exp_dir.iterdir()] if exp_dir.is_dir() else []
    matches = [re.fullmatch(r"checkpoint-([0-9]+)\.pt", name) for name in names]
    steps = [int(match[1]) for match in matches if match]
    if not steps or not (exp_dir / "epoch-1.pt").is_file():
        raise KDError(
            f"{exp_dir} holds no epoch-1.pt and checkpoint-*.pt, give the folder of a "
            "student's training"
        )
    return [(0, 1, 0), *((n, 0, n) for n in sorted(steps) if n <= last)]


def main() -> None:
    args = get_args()
    check_range(args.num_cuts, 1, "--num-cuts")
    check_range(args.last_step, 0, "--last-step", 10**9)
    check_range(args.num_threads, 1, "--num-threads", MOST_THREADS)
    torch.set_num_threads(args.num_threads)
    curve, batches = [], []
    bar = tqdm(points(args.exp_dir, args.last_step), desc=args.exp_dir.name)
    with one_sentence():
        for step, epoch, iteration in bar:
            model, settings = load_model(
                RECIPE, args.exp_dir, epoch, iteration, use_averaged_model=False
            )
            if not batches:
                sp = load_tokenizer(args.bpe_model, settings["vocab_size"])
                batches = read_batches(args.cuts, args.num_cuts, settings, sp)
            scores = score_heads(model, batches, sp, settings.get("blank_id", 0))
            curve.append({"step": step, **dataclasses.asdict(scores)})
            bar.set_postfix_str(f"step {step}: {scores.ctc_wer:.2f} %")
    args.json.write_text(json.dumps(curve, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    run_script(main)

#!/usr/bin/env python3
"""
How well students of several sizes do before any training, by what they keep of their
teacher: evenly spaced layers and first channels, or what is important. WER % of both
heads and the CTC loss a token, on other cuts than importance is measured on.

Usage:

  benchmarks/slices.py --exp-dir egs/digits/ASR/exp/teacher --epoch 10 \
    --bpe-model egs/digits/ASR/data/lang_bpe_54/bpe.model \
    --cuts egs/digits/ASR/data/fbank/cuts_train.jsonl.gz \
    --test-cuts egs/digits/ASR/data/fbank/cuts_test.jsonl.gz
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, List

import torch
from tqdm.auto import tqdm

from icefall_kd import (
    build_student,
    count_parameters,
    import_train,
    load_model,
    load_tokenizer,
    one_sentence,
    score_heads,
    select_important,
)
from icefall_kd.student.build import check_slices
from icefall_kd.student.cuts import read_batches
from icefall_kd.student.search import nearest

ROOT = Path(__file__).resolve().parents[1]
CHOICES = {
    "even layers, first channels": dict(layers=False, channels=False),
    "important layers": dict(layers=True, channels=False),
    "important channels": dict(layers=False, channels=True),
    "both important": dict(layers=True, channels=True),
}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", type=Path, default=ROOT / "egs/digits/ASR/zipformer")
    add("--exp-dir", type=Path, required=True, help="The teacher's.")
    add("--epoch", type=int, default=10)
    add("--bpe-model", required=True)
    add("--cuts", required=True, help="What importance is measured on.")
    add("--test-cuts", required=True)
    add("--num-cuts", type=int, default=64, help="Of both, the first.")
    add("--shares", default="0.75,0.5,0.3", help="Of the teacher's parameters.")
    add("--num-threads", type=int, default=1)
    add("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


def run(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Return a row of scores for each student; ``args`` are the script's."""
    train = import_train(args.recipe)
    teacher, settings = load_model(args.recipe, args.exp_dir, args.epoch)
    sp = load_tokenizer(args.bpe_model, settings["vocab_size"])
    params = train.get_params()
    params.update(settings)
    batches = read_batches(args.cuts, args.num_cuts, settings, sp)
    test = read_batches(args.test_cuts, args.num_cuts, settings, sp)
    size = count_parameters(params)["all"]
    goals = [round(size * float(share)) for share in args.shares.split(",")]
    rows = []

    def note(name: str, model, number: int) -> None:
        scores = dataclasses.asdict(score_heads(model, test, sp, settings["blank_id"]))
        rows.append({"kept": name, "parameters": number, **scores})

    note("teacher", teacher, size)
    with tqdm(desc="Students", total=len(goals) * len(CHOICES)) as bar:
        for goal in goals:
            changes = nearest(goal, params, params)
            new = check_slices(teacher, params, changes)
            for name, parts in CHOICES.items():
                chosen = select_important(teacher, params, new, batches, **parts)
                student, _ = build_student(
                    teacher, params, changes, train.get_model, selection=chosen
                )
                number = sum(p.numel() for p in student.parameters())
                note(name, student.eval(), number)
                rows[-1].update(layers=chosen.layers, settings=changes)
                bar.update()
    return rows


def main() -> None:
    args = get_args()
    torch.set_num_threads(args.num_threads)
    with one_sentence():
        rows = run(args)
    print("| kept | parameters | layers | CTC loss | WER % CTC | WER % transducer |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["kept"], f"{row['parameters']:,}", str(row.get("layers", ""))]
        for name in ("ctc_loss", "ctc_wer", "transducer_wer"):
            cells.append("-" if row[name] is None else f"{row[name]:.2f}")
        print(f"| {' | '.join(cells)} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""
Give untranscribed cuts the teacher's greedy transcript.

Usage:
  ./local/label_cuts.py --exp-dir exp/teacher --epoch 4 \
    --bpe-model data/lang_bpe_54/bpe.model IN_CUTS OUT_CUTS

A cut for which the teacher hears nothing, or more tokens than its frames can hold,
is left out; the last line says how many.
"""

import argparse
import os
from pathlib import Path

import sentencepiece as spm
import torch
from lhotse import CutSet
from lhotse.dataset.collation import collate_features
from lhotse.dataset.sampling import SimpleCutSampler
from script_utils import UserError, run_script, staged_dir
from tqdm import tqdm
from zipformer.decode.search import greedy_search

from icefall_kd.errors import KDError
from icefall_kd.recipe.loader import load_recipe_model

RECIPE = Path(__file__).resolve().parent.parent / "zipformer"


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("in_cuts", type=Path)
    parser.add_argument("out_cuts", type=Path)
    parser.add_argument("--exp-dir", type=Path, required=True)
    parser.add_argument("--epoch", type=int, required=True)
    parser.add_argument("--avg", type=int, default=1)
    parser.add_argument("--bpe-model", type=str, required=True)
    parser.add_argument("--num-threads", type=int, default=0, help="0: all cores")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = get_args()
    if not args.in_cuts.is_file():
        raise UserError(
            f"the manifest {args.in_cuts} does not exist, make the features"
        )
    torch.set_num_threads(args.num_threads or os.cpu_count() or 1)
    try:
        model, _ = load_recipe_model(
            RECIPE, args.exp_dir, args.epoch, avg=args.avg, use_averaged_model=True
        )
    except KDError as e:
        raise UserError(str(e)) from None
    sp = spm.SentencePieceProcessor()
    sp.load(args.bpe_model)
    cuts = CutSet.from_file(args.in_cuts).to_eager()
    labelled, dropped = [], 0
    bar = tqdm(total=len(cuts), desc="Labelling", unit=" cuts")
    for batch in SimpleCutSampler(cuts, max_duration=200.0, shuffle=False):
        out, lens = model.forward_encoder(*collate_features(batch))
        hyps = greedy_search(model, out, lens)
        for cut, tokens, frames in zip(batch, hyps, lens.tolist()):
            text = sp.decode(tokens).strip()
            if not text or frames - 2 < len(sp.encode(text)):
                dropped += 1
                continue
            cut.supervisions[0].text = text
            labelled.append(cut)
        bar.update(len(batch))
    bar.close()
    with staged_dir(args.out_cuts.parent) as scratch:
        CutSet.from_cuts(labelled).to_file(scratch / args.out_cuts.name)
        (scratch / args.out_cuts.name).replace(args.out_cuts)
    print(f"{args.out_cuts}: {len(labelled)} cuts labelled, {dropped} left out")


if __name__ == "__main__":
    run_script(main)

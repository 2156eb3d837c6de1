#!/usr/bin/env python3
"""
Give untranscribed cuts the teacher's greedy transcript.

Usage:
  ./local/label_cuts.py --exp-dir exp/teacher --epoch 4 \
    --bpe-model data/lang_bpe_54/bpe.model IN_CUTS OUT_CUTS

A cut for which the teacher hears nothing, or more tokens than its frames can hold,
is left out; the last line says how many.
"""

import torch
from lhotse import CutSet
from lhotse.dataset.collation import collate_features
from lhotse.dataset.sampling import SimpleCutSampler
from script_utils import run_script, staged_dir
from teacher_utils import load_teacher, teacher_parser
from tqdm import tqdm
from zipformer.decode.search import greedy_search


@torch.no_grad()
def main() -> None:
    args = teacher_parser(__doc__).parse_args()
    model, sp, cuts = load_teacher(args)
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

#!/usr/bin/env python3
"""
Give untranscribed cuts the teacher's greedy transcript.

Usage:
  ./local/label_cuts.py --exp-dir exp/teacher --epoch 4 \
    --bpe-model data/lang_bpe_54/bpe.model IN_CUTS OUT_CUTS

A cut is left out that the teacher can't run on, for which it outputs no token, or more
tokens than the cut's frames can hold; the last line has their number.
"""

import torch
from lhotse import CutSet
from script_utils import run_script, staged_dir
from teacher_utils import batches, load_teacher, memory_words, teacher_parser

from icefall_kd import GreedySearch, KDError
from icefall_kd.memory import enough_memory


@torch.no_grad()
def main() -> None:
    args = teacher_parser(__doc__).parse_args()
    model, sp, cuts, usable = load_teacher(args)
    labelled, search = [], GreedySearch(model)
    for batch, x, x_lens in batches(usable, "Labelling"):
        with enough_memory(*memory_words(batch)):
            out, lens = model.forward_encoder(x, x_lens)
            hyps = search(out, lens).hypotheses
        for cut, found, frames in zip(batch, hyps, lens.tolist()):
            text = sp.decode(found.tokens).strip()
            if text and frames - 2 >= len(sp.encode(text)):
                cut.supervisions[0].text = text
                labelled.append(cut)
    if not labelled:
        raise KDError(
            f"the teacher in {args.exp_dir} has a transcript for 0 of the {len(cuts)} "
            f"cuts in {args.in_cuts}, train it further or name another"
        )
    with staged_dir(args.out_cuts.parent) as scratch:
        CutSet.from_cuts(labelled).to_file(scratch / args.out_cuts.name)
        (scratch / args.out_cuts.name).replace(args.out_cuts)
    dropped = len(cuts) - len(labelled)
    print(f"{args.out_cuts}: {len(labelled)} cuts labelled, {dropped} left out")


if __name__ == "__main__":
    run_script(main)

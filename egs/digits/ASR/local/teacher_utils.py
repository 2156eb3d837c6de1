"""What the scripts share that let a teacher transcribe cuts."""

import argparse
import os
from pathlib import Path
from typing import Tuple

import sentencepiece as spm
import torch
from lhotse import CutSet
from script_utils import MOST_THREADS, UserError, check_range

from icefall_kd.cli.cuts import open_cuts, readable
from icefall_kd.recipe.loader import load_recipe_model
from icefall_kd.targets.fingerprint import check_vocabulary

RECIPE = Path(__file__).resolve().parent.parent / "zipformer"


def teacher_parser(doc: str) -> argparse.ArgumentParser:
    """The options of a script with this docstring."""
    parser = argparse.ArgumentParser(
        description=doc.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("in_cuts", type=Path)
    parser.add_argument("out_cuts", type=Path)
    parser.add_argument("--exp-dir", type=Path, required=True)
    parser.add_argument("--epoch", type=int, required=True)
    parser.add_argument("--avg", type=int, default=1)
    parser.add_argument("--bpe-model", type=str, required=True)
    parser.add_argument("--num-threads", type=int, default=0, help="0: all cores")
    return parser


def load_teacher(
    args: argparse.Namespace,
) -> Tuple[torch.nn.Module, spm.SentencePieceProcessor, CutSet]:
    """The teacher, its BPE model and the cuts that it is to hear."""
    if not args.in_cuts.is_file():
        raise UserError(
            f"the manifest {args.in_cuts} does not exist, make the features"
        )
    check_range(args.epoch, 1, "--epoch")
    check_range(args.avg, 1, "--avg")
    check_range(args.num_threads, 0, "--num-threads", MOST_THREADS)
    path = str(args.in_cuts)
    cuts = CutSet.from_cuts(readable(open_cuts(path), path)).to_eager()
    torch.set_num_threads(args.num_threads or os.cpu_count() or 1)
    model, settings = load_recipe_model(
        RECIPE, args.exp_dir, args.epoch, avg=args.avg, use_averaged_model=True
    )
    return model, check_vocabulary(args.bpe_model, settings), cuts

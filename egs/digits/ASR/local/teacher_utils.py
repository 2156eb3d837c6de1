"""What the scripts share that let a teacher transcribe cuts."""

import argparse
import os
from pathlib import Path
from typing import Iterator, Tuple

import sentencepiece as spm
import torch
from lhotse import CutSet
from lhotse.dataset.sampling import SimpleCutSampler
from script_utils import MOST_THREADS, check_range
from tqdm import tqdm

from icefall_kd import KDError, load_model, load_tokenizer
from icefall_kd.files import MANIFEST, check_new_file
from icefall_kd.targets.cuts import ManifestCuts, Survey, checked
from icefall_kd.targets.model_input import check_supervision, collate_input

RECIPE = Path(__file__).resolve().parent.parent / "zipformer"


def teacher_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the options of a script that has the docstring ``doc``."""
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
) -> Tuple[torch.nn.Module, spm.SentencePieceProcessor, CutSet, CutSet]:
    """The teacher, its BPE model, all cuts, and those that it can run on.

    Raises:
      KDError: a number of threads out of bounds, or a manifest that does not exist.
      KDError: an output that can't be written, a checkpoint or BPE model that can't be
        read, or a cut that no recipe can train on.
    """
    if not args.in_cuts.is_file():
        raise KDError(f"the manifest {args.in_cuts} does not exist, make the features")
    check_new_file(str(args.out_cuts), "OUT_CUTS", MANIFEST)
    if args.in_cuts.resolve() == args.out_cuts.resolve():
        raise KDError(
            f"{args.in_cuts} is both read and written, give OUT_CUTS another name"
        )
    check_range(args.epoch, 1, "--epoch")
    check_range(args.avg, 1, "--avg")
    check_range(args.num_threads, 0, "--num-threads", MOST_THREADS)
    torch.set_num_threads(args.num_threads or os.cpu_count() or 1)
    model, settings = load_model(
        RECIPE, args.exp_dir, args.epoch, avg=args.avg, use_averaged_model=True
    )
    sp = load_tokenizer(args.bpe_model, settings["vocab_size"])
    survey = Survey(str(args.in_cuts))
    num_features = int(settings["feature_dim"])
    # Not survey.check(): these scripts print at the end how many cuts they left out.
    usable = list(checked(survey, num_features, [check_supervision]))
    survey.warn()
    cuts = CutSet.from_cuts(ManifestCuts(str(args.in_cuts))).to_eager()
    return model, sp, cuts, CutSet.from_cuts(usable)


def batches(
    cuts: CutSet, description: str
) -> Iterator[Tuple[CutSet, torch.Tensor, torch.Tensor]]:
    """Yield batches of ``cuts``, their features and the frames of each.

    ``description`` is that of the progress bar.
    """
    bar = tqdm(total=len(cuts), desc=description, unit=" cuts")
    for batch in SimpleCutSampler(cuts, max_duration=200.0, shuffle=False):
        yield batch, *collate_input(list(batch))
        bar.update(len(batch))
    bar.close()


def memory_words(batch: CutSet) -> Tuple[str, str]:
    """The arguments of :func:`icefall_kd.memory.enough_memory` for a batch."""
    longest = max(batch, key=lambda cut: cut.duration)
    seconds = longest.duration * len(batch)
    return (
        f"the teacher's pass over {len(batch)} cuts, {seconds:.1f} s with padding",
        f"free memory, or leave {longest.id}, the longest, out",
    )

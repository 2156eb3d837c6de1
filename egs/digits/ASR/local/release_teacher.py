#!/usr/bin/env python3
"""
Make the files of pretrained/ from a trained teacher: the averaged model in half
precision with the settings that it is built by, its tokens, and their checksums.

Usage:
  ./run.sh --train-teacher true --stop-stage 4
  ./local/release_teacher.py --exp-dir exp/teacher --epoch 10 --avg 1 \
    --lang-dir data/lang_bpe_54 --output-dir pretrained

As in icefall's released models, pretrained.pt is used as a checkpoint by a link or a
copy named epoch-99.pt, with --epoch 99 --avg 1 --use-averaged-model 0.
"""

import argparse
import hashlib
import shutil
from pathlib import Path
from typing import Any, Dict

import torch
from script_utils import check_range, run_script, staged_dir

from icefall_kd import KDError, load_checkpoint, load_model

RECIPE = Path(__file__).resolve().parent.parent / "zipformer"
FILES = ("bpe.model", "tokens.txt", "pretrained.pt")
MOST = 5_000_000  # bytes of all files: they lie in the repository


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--exp-dir", type=Path, required=True, help="Of the teacher")
    parser.add_argument("--epoch", type=int, default=10)
    parser.add_argument("--avg", type=int, default=1, help="Epochs to average")
    parser.add_argument("--lang-dir", type=Path, required=True, help="Has bpe.model")
    parser.add_argument("--output-dir", type=Path, required=True)
    return parser.parse_args()


def settings_of(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """What the model is built by, and how it was trained: neither states nor paths."""
    return {
        name: value
        for name, value in checkpoint.items()
        if isinstance(value, (bool, int, float, str))
        and not name.startswith("kd_")
        and "/" not in str(value)
    }


def halved(model: torch.nn.Module) -> Dict[str, torch.Tensor]:
    """The parameters of ``model`` in half precision, all of them still finite."""
    states = {}
    for name, value in model.state_dict().items():
        half = value.half() if value.is_floating_point() else value
        if not torch.isfinite(half.float()).all():
            raise KDError(
                f"{name} has a value of {value.abs().max():.3g}, and half precision "
                "ends at 65504: release another epoch"
            )
        states[name] = half.clone()
    return states


def main() -> None:
    args = get_args()
    check_range(args.epoch, 2, "--epoch")
    check_range(args.avg, 1, "--avg")
    for name in FILES[:2]:
        if not (args.lang_dir / name).is_file():
            raise KDError(f"--lang-dir {args.lang_dir} has no {name}: run stage 3")
    model, _ = load_model(
        RECIPE, args.exp_dir, args.epoch, avg=args.avg, use_averaged_model=True
    )
    checkpoint = load_checkpoint(args.exp_dir / f"epoch-{args.epoch}.pt")
    with staged_dir(args.output_dir.parent) as scratch:
        for name in FILES[:2]:
            shutil.copyfile(args.lang_dir / name, scratch / name)
        states = {"model": halved(model), **settings_of(checkpoint)}
        torch.save(states, scratch / FILES[2])
        size = sum((scratch / name).stat().st_size for name in FILES)
        if size > MOST:
            raise KDError(
                f"the files have {size:,} bytes and may have {MOST:,}: release a "
                "smaller teacher"
            )
        sums = [
            f"{hashlib.sha256((scratch / name).read_bytes()).hexdigest()}  {name}\n"
            for name in FILES
        ]
        (scratch / "SHA256SUMS").write_text("".join(sums), "utf8")
        args.output_dir.mkdir(exist_ok=True)
        for name in (*FILES, "SHA256SUMS"):
            (scratch / name).replace(args.output_dir / name)
    print(f"{args.output_dir} has {size:,} bytes")


if __name__ == "__main__":
    run_script(main)

#!/usr/bin/env python3
"""
Say how long the recipe will take on this machine: a few steps of the student's
training are timed, and each stage takes as many of them as it took where all stages
were measured.

Usage:
  ./local/how_long.py --student-set "encoder-dim=32,32,32" --num-utterances 1600 \
    --student-epochs 3
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Dict

import torch
from script_utils import MOST_THREADS, check_range, run_script, words_of

from icefall_kd import KDError
from icefall_kd.errors import first_line

# Before the recipe's own modules: they are not in a package.
RECIPE = Path(__file__).resolve().parent.parent / "zipformer"
sys.path.insert(0, str(RECIPE))

from model import get_model, prepare_package  # noqa: E402
from train import AsrDataModule, get_params, get_parser  # noqa: E402

STEPS = 6
UTTERANCES, FRAMES, WORDS = 8, 250, 4  # of a step: 20 s of audio
SYMBOLS = 54

# What each stage took on two cores, in steps of a default student: seconds of the stage
# by seconds of a step, with 1,600 utterances, 10 epochs of the teacher and 3 of the
# students.
STEPS_OF = {
    "data": 60,
    "teacher": 1900,
    "targets": 200,
    "students": 600,
    "decoding": 215,
    "export": 100,
}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--student-set", type=str, required=True, help="NAME=VALUE ...")
    parser.add_argument("--num-utterances", type=int, required=True)
    parser.add_argument("--student-epochs", type=int, required=True)
    parser.add_argument("--teacher-epochs", type=int, default=0, help="0: not trained")
    parser.add_argument("--num-threads", type=int, default=0, help="0: all cores")
    return parser.parse_args()


def seconds_of_a_step(student_set: str) -> float:
    """The median seconds of a training step of the student, with made features."""
    parser = get_parser()
    AsrDataModule.add_arguments(parser)
    params = get_params()
    params.update(vars(parser.parse_args([])))
    for setting in words_of(student_set, "--student-set"):
        name, equals, value = setting.partition("=")
        key = name.replace("-", "_")
        if not equals or key not in params:
            raise KDError(
                f"--student-set has {setting!r}, and each word must be NAME=VALUE "
                "with an option of zipformer/train.py, such as encoder-dim=32,32,32"
            )
        params[key] = value
        if isinstance(parser.get_default(key), int) and value.isdecimal():
            params[key] = int(value)
    params.update(blank_id=0, sos_id=1, eos_id=1, vocab_size=SYMBOLS)
    prepare_package()
    torch.manual_seed(0)
    try:
        model = get_model(params)
    except Exception as e:  # the package refuses by assertions
        raise KDError(
            f"--student-set {student_set!r} makes no model ({first_line(e)}): mend it"
        ) from None
    x = torch.randn(UTTERANCES, FRAMES, params.feature_dim)
    lens = torch.full((UTTERANCES,), FRAMES)
    y = torch.randint(2, SYMBOLS, (UTTERANCES, WORDS)).tolist()
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        losses = model(x=x, x_lens=lens, y=y, prune_range=params.prune_range)
        sum(loss.sum() for loss in losses if loss is not None).backward()
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def main() -> None:
    args = get_args()
    for option in ("num_utterances", "student_epochs"):
        check_range(getattr(args, option), 1, "--" + option.replace("_", "-"))
    check_range(args.num_threads, 0, "--num-threads", MOST_THREADS)
    torch.set_num_threads(args.num_threads or max(1, (os.cpu_count() or 1) // 2))
    step = seconds_of_a_step(args.student_set)
    minutes: Dict[str, float] = {}
    share = args.num_utterances / 1600
    shares = {
        "data": share,
        "teacher": share * args.teacher_epochs / 10,
        "targets": share,
        "students": share * args.student_epochs / 3,
    }
    for stage, steps in STEPS_OF.items():
        minutes[stage] = step * steps * shares.get(stage, 1.0) / 60
    parts = [f"{stage} {m:.0f}" for stage, m in minutes.items() if m >= 0.5]
    print(
        f"A step of the student's training takes {step:.2f} s here, so all stages take "
        f"about {sum(minutes.values()):.0f} minutes ({', '.join(parts)})"
    )


if __name__ == "__main__":
    run_script(main)

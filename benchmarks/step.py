#!/usr/bin/env python3
"""
What a training step of the digits recipe costs with distillation and without, and with
other options of distillation: the parts of each, on the same batches, in turn, in one
run; medians, and the median of each batch's own ratio to the step without.

Reading a batch happens in the dataset's workers beside training; it is told apart.

Usage, on targets that were dumped with --keep-lattice and --keep-simple:

  benchmarks/step.py --work-dir egs/digits/ASR --kd-dir data/kd --json step.json \\
    --flags "--kd-ctc-weight 1" --flags "--kd-ctc-weight 1 --kd-simple-weight 1"
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, Dict, List

import torch
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from tqdm.auto import tqdm

from icefall_kd import get_engine, import_train
from icefall_kd.training import session

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("read", "forward and losses", "backward", "optimizer")
OFF = "without KD"
DEFAULT = "--kd-ctc-weight 1 --kd-rnnt-weight 1"


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work-dir", type=Path, default=ROOT / "egs/digits/ASR")
    add("--recipe", type=Path, default=ROOT / "egs/digits/ASR/zipformer")
    add("--kd-dir", type=Path, help="Of the cuts with targets [work-dir/data/kd].")
    add("--student-dir", type=Path, help="[work-dir/exp/student].")
    add("--bpe-model", type=Path, help="[work-dir/data/lang_bpe_54/bpe.model].")
    add("--flags", action="append", help=f"Of KD; may be repeated [{DEFAULT}].")
    add("--batches", type=int, default=60)
    add("--max-duration", type=float, default=20.0, help="Seconds in a batch.")
    add("--num-threads", type=int, default=1)
    add("--json", type=Path, help="Write the figures to this file.")
    args = parser.parse_args()
    args.flags = args.flags or [DEFAULT]
    args.kd_dir = args.kd_dir or args.work_dir / "data/kd"
    args.student_dir = args.student_dir or args.work_dir / "exp/student"
    args.bpe_model = args.bpe_model or args.work_dir / "data/lang_bpe_54/bpe.model"
    return args


class Side:
    """A student with its optimizer, and the dataset that feeds it."""

    def __init__(self, train, args: argparse.Namespace, flags: List[str]) -> None:
        parser = train.get_parser()
        train.AsrDataModule.add_arguments(parser)
        flags = [
            *(args.student_dir / "student_flags").read_text("utf8").split(),
            *flags,
        ]
        flags += ["--bpe-model", str(args.bpe_model), "--exp-dir", ""]
        self.params = train.get_params()
        self.params.update(vars(parser.parse_args(flags)))
        self.sp = train.load_bpe_model(str(args.bpe_model))
        self.params.blank_id = self.sp.piece_to_id("<blk>")
        self.params.sos_id = self.params.eos_id = self.sp.piece_to_id("<sos/eos>")
        self.params.vocab_size = self.sp.get_piece_size()
        self.params.enable_spec_aug = False  # as on both sides
        self.params.batch_idx_train = 10**4  # after the warm-up
        torch.manual_seed(0)
        self.train = train
        self.model = train.get_model(self.params).train()
        groups = train.get_parameter_groups_with_lrs(
            self.model, lr=self.params.base_lr, include_names=True
        )
        self.optimizer = train.ScaledAdam(groups, lr=0.045, clipping_scale=2.0)
        session.resume(None)  # attach() would close the session of another side
        session.attach(self.params, self.model)
        self.session = session.current()
        self.dataset: Any = K2SpeechRecognitionDataset(return_cuts=True)

    def open(self, cuts) -> None:
        """Let the dataset give the targets of ``cuts``."""
        session.resume(self.session)
        self.dataset = session.wrap_dataset(self.dataset, cuts)

    def step(self, cuts) -> Dict[str, float]:
        """Train on a batch of ``cuts``; return the seconds of each part."""
        session.resume(self.session)
        times = [time.perf_counter()]
        batch = self.dataset[cuts]
        times.append(time.perf_counter())
        loss, _ = self.train.compute_loss(
            self.params, self.model, self.sp, batch, is_training=True
        )
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        return dict(zip(PARTS, (b - a for a, b in zip(times, times[1:]))))


def main() -> None:
    args = get_args()
    torch.set_num_threads(args.num_threads)
    train = import_train(args.recipe)
    train.zipformer_model.k2 = get_engine()
    from lhotse import CutSet

    cuts = CutSet.from_file(args.kd_dir / "cuts_train.jsonl.gz").to_eager()
    sides = {OFF: Side(train, args, [])}
    for flags in args.flags:
        sides[flags] = Side(train, args, flags.split())
        sides[flags].open(cuts)
    sampler = SimpleCutSampler(cuts, max_duration=args.max_duration)
    seconds: Dict[str, List[Dict[str, float]]] = {name: [] for name in sides}
    for i, batch in zip(tqdm(range(args.batches), desc="Steps"), sampler):
        for name in list(sides) if i % 2 else reversed(list(sides)):
            seconds[name].append(sides[name].step(batch))
    figures = report(seconds, args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf8")


def report(seconds, args: argparse.Namespace) -> List[Dict[str, Any]]:
    # The first five batches warm up; of fewer, the last one counts.
    warm = {name: rows[5:] or rows[-1:] for name, rows in seconds.items()}
    print(f"\nbatches of {args.max_duration} s, {args.num_threads} thread")
    figures = []
    for flags in args.flags:
        print(f"\n{flags}\n")
        print(f"| part | {OFF}, ms | with KD, ms | ratio |\n|---|---|---|---|")
        for part in (*PARTS, "step without read"):
            parts = PARTS[1:] if part not in PARTS else (part,)
            off, on = (
                [sum(row[p] for p in parts) for row in warm[name]]
                for name in (OFF, flags)
            )
            ratio = median(b / a for a, b in zip(off, on))
            off, on = median(off), median(on)
            print(f"| {part} | {1e3 * off:.1f} | {1e3 * on:.1f} | {ratio:.3f} |")
            figures.append({"flags": flags, "part": part, OFF: off, "with KD": on})
            figures[-1]["ratio"] = ratio
    return figures


if __name__ == "__main__":
    main()

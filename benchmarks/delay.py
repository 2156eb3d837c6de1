#!/usr/bin/env python3
"""
Time of the CTC loss with a delay, forward and backward, beside that without; dense and
sparse targets, of a student that is one frame late. All delays of a case run in turn,
in one process; medians.

Usage:

  benchmarks/delay.py --json delay.json
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Dict, List

import torch
from tqdm.auto import tqdm

from icefall_kd import Codec, SparseDistribution, ctc_kd_loss

# Utterances, frames of 40 ms, symbols.
CASES = {
    "16 x 10 s, 500": (16, 250, 500),
    "16 x 40 s, 500": (16, 1000, 500),
    "16 x 10 s, 5000": (16, 250, 5000),
}
DELAYS = (0, 1, 2, 4)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--repeats", type=int, default=9)
    add("--num-threads", type=int, default=os.cpu_count())
    add("--keep", default="adaptive:0.999:16", help="Form of the sparse targets.")
    add("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


def batch(n: int, t: int, v: int, device: str):
    """Return logits of a student and a teacher, (n, t, v), and lengths, on ``device``.

    The teacher is peaky, and the student one frame late.
    """
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(n, t, v, generator=g)
    teacher[..., 0] += 6
    spikes = torch.rand(n, t, generator=g) < 0.25
    teacher[spikes] = 6 * torch.randn(int(spikes.sum()), v, generator=g)
    student = teacher.roll(1, 1) + torch.randn(n, t, v, generator=g)
    lengths = torch.full((n,), t)
    lengths[1::2] -= t // 4
    return student.to(device), teacher.to(device), lengths.to(device)


def sparse_of(teacher: torch.Tensor, keep: str) -> SparseDistribution:
    """Return a ``teacher``'s logits, (N, T, V), as targets of the form ``keep``."""
    n, t, v = teacher.shape
    codec = Codec.parse(keep)
    stored = [codec.encode(rows.cpu()) for rows in teacher]
    rows = codec.decode(stored, [t] * n, v)
    parts = (rows.indices, rows.log_probs, rows.log_tail)
    split = [x.view(n, t, *x.shape[1:]) for x in parts]
    return SparseDistribution(*split).to(teacher.device)


def seconds(student, teacher, lengths, delay: int) -> float:
    """Return the seconds of the loss and its gradient.

    Args:
      student: Logits (N, T, V).
      teacher: Logits of the same shape, or what a store has of them.
      lengths: Valid frames (N,).
      delay: Frames by which the student may be late.
    """
    synchronize = torch.cuda.synchronize if student.is_cuda else lambda: None
    synchronize()
    begun = time.perf_counter()
    loss = ctc_kd_loss(student, teacher, lengths, delay=delay)
    torch.autograd.grad(loss, student)
    synchronize()
    return time.perf_counter() - begun


def main() -> None:
    args = get_args()
    torch.set_num_threads(args.num_threads)
    figures = []
    print("| batch, symbols | targets | ms without | times that at delays 1, 2, 4 |")
    print("|---|---|---|---|")
    for name, (n, t, v) in CASES.items():
        student, teacher, lengths = batch(n, t, v, args.device)
        student.requires_grad_()
        for kind in ("dense", "sparse"):
            targets = teacher if kind == "dense" else sparse_of(teacher, args.keep)
            times: Dict[int, List[float]] = {d: [] for d in DELAYS}
            bar = tqdm(range(args.repeats + 1), desc=f"{name}, {kind}", leave=False)
            for repeat in bar:
                for delay in DELAYS:
                    elapsed = seconds(student, targets, lengths, delay)
                    if repeat:  # the first warms up
                        times[delay].append(elapsed)
            medians = {d: median(x) for d, x in times.items()}
            ratios = [medians[d] / medians[0] for d in DELAYS[1:]]
            figures.append(
                {"case": name, "targets": kind, "seconds": medians, "ratios": ratios}
            )
            each = ", ".join(f"{r:.2f}" for r in ratios)
            print(f"| {name} | {kind} | {1e3 * medians[0]:.1f} | {each} |")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2), "utf8")


if __name__ == "__main__":
    main()

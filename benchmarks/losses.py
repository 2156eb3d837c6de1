#!/usr/bin/env python3
"""
Time and peak memory of the KL losses, forward and backward, against the naive way
(`F.kl_div` on log-softmax and softmax, as recipes write it), torchtune's chunked
forward KL and Liger-Kernel's fused layer, where these are installed.

Each way of a case runs in turn, in one process, medians; peak memory beyond inputs is
taken in a process of its own, in units of the gradient's size. On a GPU the last column
is the share of the bandwidth of a plain copy that the bytes which must move (both
inputs in, the gradient out) are moved at.

Usage:

  benchmarks/losses.py --json losses.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from icefall_kd import Codec, SparseDistribution
from icefall_kd.losses.factorised import factorised_kl
from icefall_kd.losses.kl import linear_kl, row_kl

CASES = {
    "(16000, 500)": (16000, 500),
    "(16000, 5000)": (16000, 5000),
    "lattice (16, 200, 5, 500)": (16 * 200 * 5, 500),
}
TEMPERATURE = 2.0
WIDTH = 512  # of the joiner, in the fused case


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--repeats", type=int, default=7)
    add("--num-threads", type=int, default=os.cpu_count())
    add("--entries", type=int, default=16, help="That a sparse target keeps.")
    add("--json", type=Path, help="Write the figures to this file.")
    add("--memory-of", nargs=2, help=argparse.SUPPRESS)  # case and way
    return parser.parse_args()


def naive(student, teacher):
    """Return the KL of ``student`` and ``teacher`` logits as recipes compute it."""
    t = TEMPERATURE
    p, log_q = (teacher / t).softmax(-1), (student / t).log_softmax(-1)
    return F.kl_div(log_q, p, reduction="sum") * t**2


def torchtune_loss() -> Callable:
    """Its forward KL wants chunks of logits, labels and no temperature."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    loss = ForwardKLWithChunkedOutputLoss(num_output_chunks=8)

    def run(student, teacher):
        labels = torch.zeros(1, len(student), dtype=torch.long, device=student.device)
        parts = [
            [part.unsqueeze(0) for part in (x / TEMPERATURE).chunk(8)]
            for x in (student, teacher)
        ]
        return loss(*parts, labels) * len(student) * TEMPERATURE**2

    return run


def ways(case: str, args: argparse.Namespace) -> Dict[str, Callable[[], None]]:
    """Each way's forward and backward pass."""
    m, v = CASES[case]
    generator = torch.Generator().manual_seed(0)
    device = torch.device(args.device)
    teacher = 3 * torch.randn(m, v, generator=generator)
    student = 3 * torch.randn(m, v, generator=generator)
    sparse_teacher = Codec("top", args.entries, 1.0, TEMPERATURE).reduce(teacher)
    sparse_teacher = sparse_teacher.to(device)
    student, teacher = student.to(device).requires_grad_(), teacher.to(device)

    def step(function: Callable, *inputs) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            function(student, *inputs).backward()

        return run

    runs = {
        "naive": step(naive, teacher),
        "dense": step(lambda s, t: row_kl(s, t, temperature=TEMPERATURE), teacher),
        f"sparse, {args.entries} entries": step(
            lambda s, t: row_kl(s, t, temperature=TEMPERATURE), sparse_teacher
        ),
    }
    factorised = partial(factorised_kl, symbol_weight=2.0, blank_id=0)
    for name, target in (("dense", teacher), ("sparse", sparse_teacher)):
        runs[f"factorised, {name}"] = step(
            lambda s, t: row_kl(s, t, temperature=TEMPERATURE, chunk_kl=factorised),
            target,
        )
    try:
        runs["torchtune, 8 chunks"] = step(torchtune_loss(), teacher)
    except ImportError:
        pass
    if "lattice" in case:
        runs.update(fused_ways(m, v, teacher, sparse_teacher, generator, device))
    return runs


def liger_loss(layer: torch.nn.Linear) -> Callable:
    """Its fused divergence at beta 0, forward KL, wants the teacher's own layer."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=torch.cuda.is_available(),
    )

    def run(x, teacher):
        m, v = teacher.shape
        eye = torch.eye(v, device=x.device)  # makes logits of logits
        labels = torch.zeros(m, dtype=torch.long, device=x.device)
        mean = loss(x, layer.weight, teacher, eye, labels, student_bias=layer.bias)
        return mean * m * TEMPERATURE**2

    return run


def fused_ways(
    m: int,
    v: int,
    teacher: torch.Tensor,
    sparse_teacher: SparseDistribution,
    generator: torch.Generator,
    device: torch.device,
) -> Dict[str, Callable[[], None]]:
    """The joiner's output layer in the loss, and before it."""
    x = torch.randn(m, WIDTH, generator=generator).to(device).requires_grad_()
    layer = torch.nn.Linear(WIDTH, v).to(device)

    def run(function: Callable) -> Callable[[], None]:
        def step() -> None:
            x.grad = None
            layer.zero_grad()
            function().backward()

        return step

    runs = {
        "layer, then naive": run(lambda: naive(layer(x), teacher)),
        "layer, then sparse": run(
            lambda: row_kl(layer(x), sparse_teacher, temperature=TEMPERATURE)
        ),
        "layer fused, dense": run(
            lambda: linear_kl(x, layer, teacher, temperature=TEMPERATURE)
        ),
        "layer fused, sparse": run(
            lambda: linear_kl(x, layer, sparse_teacher, temperature=TEMPERATURE)
        ),
    }
    try:
        liger = liger_loss(layer)
    except ImportError:
        return runs
    our_kl = float(linear_kl(x[:99], layer, teacher[:99], temperature=TEMPERATURE))
    liger_kl = float(liger(x[:99], teacher[:99]))
    if abs(liger_kl / our_kl - 1) > 0.01:
        print(f"Liger's divergence is {liger_kl} where ours is {our_kl}: left out")
        return runs
    return {**runs, "Liger, fused layers": run(lambda: liger(x, teacher))}


def seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak_memory(case: str, way: str, args: argparse.Namespace) -> int:
    """Bytes beyond what was held before, the gradient included."""
    run = ways(case, args)[way]
    if args.device == "cuda":
        run()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - CASES[case][0] * CASES[case][1] * 4
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - held
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak begins anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text("utf8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def memory_in_a_process(case: str, way: str, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--memory-of", case, way]
    command += ["--device", args.device, "--entries", str(args.entries)]
    command += ["--num-threads", str(args.num_threads)]
    # Freed memory goes back at once, so that the process's size is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, check=True, capture_output=True, encoding="utf8", env=env
    )
    return int(done.stdout.split()[-1])


def bandwidth(device: str) -> float:
    """Return the bytes a second of a plain copy on ``device``, read and written."""
    a = torch.zeros(2**28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    taken = median(seconds(lambda: b.copy_(a), device) for _ in range(9))
    return 2 * a.numel() / taken


def main() -> None:
    args = get_args()
    torch.set_num_threads(args.num_threads)
    if args.memory_of:
        print(peak_memory(*args.memory_of, args))
        return
    speed = bandwidth(args.device) if args.device == "cuda" else 0.0
    figures: List[Dict[str, Any]] = []
    for case, (m, v) in CASES.items():
        runs = ways(case, args)
        taken: Dict[str, List[float]] = {way: [] for way in runs}
        for _ in tqdm(range(args.repeats), desc=case, unit=" rounds"):
            for way, run in runs.items():
                taken[way].append(seconds(run, args.device))
        first = median(taken["naive"])
        print(f"\n### {case}, {args.device}, {args.num_threads} threads\n")
        print("| way | ms | times naive's speed | peak memory / gradient | bandwidth |")
        print("|---|---|---|---|---|")
        for way, values in taken.items():
            t = median(values)
            memory = memory_in_a_process(case, way, args) / (m * v * 4)
            share = 3 * m * v * 4 / t / speed if speed else None
            figures.append(
                {"case": case, "way": way, "seconds": t, "speedup": first / t}
            )
            figures[-1].update(memory=memory, bandwidth_share=share)
            print(
                f"| {way} | {1e3 * t:.1f} | {first / t:.1f} | {memory:.2f} | "
                f"{f'{100 * share:.0f} %' if share else '-'} |"
            )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf8")


if __name__ == "__main__":
    main()

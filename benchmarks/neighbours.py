#!/usr/bin/env python3
"""
What busy neighbours cost a training step: the digits recipe's teacher on a batch as in
its training, alone and beside one and two processes that never rest, with OpenMP's
threads waiting in several ways.

Each way is a process of its own, as OpenMP reads its environment at the start; they
take turns, step by step, so that all meet the same weather. Medians, in one run.

Usage, on a machine that does nothing else:

  benchmarks/neighbours.py --json neighbours.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

from tqdm.auto import tqdm

RECIPE = Path(__file__).resolve().parents[1] / "egs/digits/ASR/zipformer"
# Name: threads (0: --num-threads), and what the environment says of OpenMP.
WAYS: Dict[str, Tuple[int, Dict[str, str]]] = {
    "default": (0, {}),
    "passive": (0, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "spin 1,000": (0, {"GOMP_SPINCOUNT": "1000"}),
    "spin 5,000": (0, {"GOMP_SPINCOUNT": "5000"}),
    "spin 20,000": (0, {"GOMP_SPINCOUNT": "20000"}),
    "one thread": (1, {}),
}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=7, help="Of each way beside so many neighbours.")
    add(
        "--seconds",
        type=float,
        default=16.0,
        help="A way that has taken as long beside so many neighbours is asked no more.",
    )
    add("--num-threads", type=int, default=2)
    add("--max-duration", type=float, default=20.0, help="Seconds in a batch.")
    add("--json", type=Path, help="Write the figures to this file.")
    add("--answer", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def answer(args: argparse.Namespace) -> None:
    """Do a step for each line of stdin, as ``args`` have it, and print its seconds."""
    import torch

    sys.path.insert(0, str(RECIPE.parents[3]))
    from icefall_kd import get_engine, import_train

    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    train = import_train(RECIPE)
    train.zipformer_model.k2 = get_engine()
    params = train.get_params()
    params.update(vars(train.get_parser().parse_args([])))
    params.update(blank_id=0, sos_id=1, eos_id=1, vocab_size=54, batch_idx_train=10**4)
    model = train.get_model(params).train()
    groups = train.get_parameter_groups_with_lrs(
        model, lr=params.base_lr, include_names=True
    )
    optimizer = train.ScaledAdam(groups, lr=params.base_lr, clipping_scale=2.0)

    lens = [160 + 20 * i for i in range(20)]  # frames: 1.6 s and more, as in training
    while len(lens) * max(lens) > 100 * args.max_duration:
        lens.pop()
    texts = ["x" * (2 + i % 5) for i in range(len(lens))]
    labels = SimpleNamespace(  # in place of a BPE model
        encode=lambda words, out_type: [[3 + i for i in range(len(w))] for w in words]
    )
    batch = {
        "inputs": torch.randn(len(lens), max(lens), int(params.feature_dim)),
        "supervisions": {"num_frames": torch.tensor(lens), "text": texts},
    }
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss, _ = train.compute_loss(params, model, labels, batch, is_training=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(time.perf_counter() - begun, flush=True)


def start(threads: int, settings: Dict[str, str], duration: float) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    env = {"TORCHDYNAMO_DISABLE": "1", **env, **settings}
    words = ["--answer", "--num-threads", str(threads), "--max-duration", str(duration)]
    return subprocess.Popen(
        [sys.executable, __file__, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf8",
        env=env,
    )


def step(process: subprocess.Popen) -> float:
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measure(args: argparse.Namespace) -> Dict[str, Dict[int, List[float]]]:
    """Seconds of the steps of each way, by the number of neighbours."""
    ways = {
        name: start(threads or args.num_threads, settings, args.max_duration)
        for name, (threads, settings) in WAYS.items()
    }
    seconds: Dict[str, Dict[int, List[float]]] = {
        name: {n: [] for n in args.neighbours} for name in ways
    }
    busy: List[subprocess.Popen] = []
    try:
        for process in ways.values():
            if process.stdout.readline() != "ready\n":
                raise SystemExit("neighbours.py: error: a process failed, see above")
            step(process)  # the first one allocates
        for n in args.neighbours:
            while len(busy) < n:
                busy.append(
                    subprocess.Popen([sys.executable, "-c", "while True: pass"])
                )
            for _ in tqdm(range(args.steps), desc=f"{n} neighbours", unit=" rounds"):
                for name, process in ways.items():
                    times = seconds[name][n]
                    if sum(times) < args.seconds:
                        times.append(step(process))
    finally:
        for process in (*ways.values(), *busy):
            process.kill()
    return seconds


def main() -> None:
    args = get_args()
    if args.answer:
        answer(args)
        return
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"neighbours.py: the load is {load:.1f}: other work runs beside this")
    figures: Dict[str, Any] = {
        "cores": os.cpu_count(),
        "load_before": load,
        "threads": args.num_threads,
        "max_duration": args.max_duration,
        "seconds": measure(args),
    }
    heads = [f"{n} busy" if n else "alone" for n in args.neighbours]
    print(
        f"\nSeconds of a step, medians; {args.num_threads} threads, batches of", end=""
    )
    print(f" {args.max_duration:g} s, {os.cpu_count()} cores\n")
    print(f"| threads wait | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    figures["medians"] = {
        name: {n: median(times) for n, times in by_number.items()}
        for name, by_number in figures["seconds"].items()
    }
    for name, medians in figures["medians"].items():
        cells = [f"{value:.2f}" for value in medians.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf8")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""
What writing targets costs beside the teacher's forward pass, and what reading them
costs beside the features of the same cuts: ratios of medians, measured in turn in one
run. And the peak memory of `icefall-kd dump` on so many cuts and on ten times as many.

Usage, when egs/digits/ASR/run.sh has run:

  benchmarks/dump.py --work-dir egs/digits/ASR --json dump.json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable, Dict, List

import torch
from lhotse import CutSet
from lhotse.dataset import K2SpeechRecognitionDataset
from lhotse.features.io import LilcomChunkyWriter
from tqdm.auto import tqdm

from icefall_kd import (
    Fingerprint,
    TargetWriter,
    Teacher,
    collate_targets,
    dump_targets,
    load_model,
    load_tokenizer,
)
from icefall_kd.targets.batches import DumpPlan, FeatureReader, batches
from icefall_kd.targets.transcript_checks import labels_of

ROOT = Path(__file__).resolve().parents[1]


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work-dir", type=Path, default=ROOT / "egs/digits/ASR")
    add("--recipe", type=Path, default=ROOT / "egs/digits/ASR/zipformer")
    add("--teacher-epoch", type=int, default=10)
    add("--num-cuts", type=int, default=400, help="Of the training cuts.")
    add("--max-duration", type=float, default=60.0, help="Seconds in a batch.")
    add("--repeats", type=int, default=3)
    add("--num-threads", type=int, default=1)
    add("--json", type=Path, help="Write the figures to this file.")
    return parser.parse_args()


def timed(functions: Dict[str, Callable[[], None]], repeats: int) -> Dict[str, float]:
    """Return median seconds of each of ``functions``, run ``repeats`` times in turn."""
    seconds: Dict[str, List[float]] = {name: [] for name in functions}
    with tqdm(total=repeats * len(functions), desc="Runs") as bar:
        for _ in range(repeats):
            for name, function in functions.items():
                begun = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - begun)
                bar.update()
    return {name: median(values) for name, values in seconds.items()}


def memory(args: argparse.Namespace, cuts: CutSet, folder: Path) -> Dict[str, float]:
    """Return the peak memory in MB of a dump of ``cuts``, and of ten copies of them.

    ``args`` are the script's, and ``folder`` is where the dumps go.
    """
    peaks = {}
    for n in (1, 10):
        manifest = folder / f"{n}.jsonl.gz"
        with CutSet.open_writer(manifest) as writer:
            for i in range(n):
                for cut in cuts:
                    writer.write(cut.with_id(f"{cut.id}-{i}"))
        command = [sys.executable, "-c", "from icefall_kd.cli import main; main()"]
        command += ["dump", manifest, folder / f"kd-{n}.jsonl.gz"]
        command += ["--recipe", args.recipe, "--exp-dir", "exp/teacher"]
        command += ["--epoch", args.teacher_epoch, "--num-threads", args.num_threads]
        command += ["--num-workers", 0, "--max-duration", args.max_duration]
        subprocess.run([str(c) for c in command], check=True)
        peaks[f"{n} x {len(cuts)} cuts"] = (
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        )
    a, b = peaks.values()
    print("\n| cuts | peak memory, MB |\n|---|---|")
    for name, peak in peaks.items():
        print(f"| {name} | {peak:.0f} |")
    print(f"| ratio | {b / a:.3f} |")
    return {**peaks, "ratio": b / a}


def each(function: Callable, items: List) -> None:
    """Call ``function`` with each of ``items``."""
    for item in items:
        function(item)


def main() -> None:
    args = get_args()
    torch.set_num_threads(args.num_threads)
    args.recipe = args.recipe.resolve()
    args.json = args.json and args.json.resolve()
    os.chdir(args.work_dir)  # what a recipe's paths are relative to
    exp, data = Path("exp"), Path("data")
    model, settings = load_model(
        args.recipe, exp / "teacher", args.teacher_epoch, 0, 1, True
    )
    cuts = CutSet.from_file(data / "fbank/cuts_train.jsonl.gz")
    cuts = cuts.subset(first=args.num_cuts).to_eager()
    sp = load_tokenizer(settings["bpe_model"])
    figures = {}
    with tempfile.TemporaryDirectory() as folder:

        def forward(keep: str, lattice: str, write: bool) -> None:
            fingerprint = Fingerprint.of(
                "teacher",
                settings,
                cuts[0].features,
                ctc=keep,
                lattice=lattice,
                s_range=5 if lattice else 0,
            )
            teacher = Teacher([model], with_ctc=bool(keep))
            with TargetWriter(
                f"{folder}/{keep}{lattice}.jsonl.gz",
                f"{folder}/{keep}{lattice}",
                fingerprint,
                overwrite=True,
            ) as writer:
                options = {"max_duration": args.max_duration, "num_workers": 0}
                if write:
                    dump_targets(cuts, teacher, writer, tokenizer=sp, **options)
                else:
                    compute(teacher, fingerprint)
            teacher.close()

        def compute(teacher: Teacher, fingerprint: Fingerprint) -> None:
            plan = DumpPlan(cuts, args.max_duration)
            loader = torch.utils.data.DataLoader(
                FeatureReader(), sampler=plan, batch_size=None
            )
            for batch, x, x_lens in loader:
                y = labels_of(batch.cuts, sp) if fingerprint.lattice else None
                out = teacher.outputs_to_store(x, x_lens, batch.cuts, y)
                for kind in fingerprint.kinds.values():
                    kind.take(out)

        sparse = "adaptive:0.999:16"
        forms = [("dense", ""), (sparse, ""), (sparse, "collapsed"), (sparse, sparse)]
        print("| kept | forward, s | forward and writing, s | ratio |")
        rows = ["|---|---|---|---|"]
        for keep, lattice in forms:
            medians = timed(
                {
                    "forward": partial(forward, keep, lattice, False),
                    "writing": partial(forward, keep, lattice, True),
                },
                args.repeats,
            )
            name = f"{keep} {lattice}".strip()
            ratio = medians["writing"] / medians["forward"]
            figures[f"write {name}"] = {**medians, "ratio": ratio}
            rows.append(
                f"| {name} | {medians['forward']:.2f} | {medians['writing']:.2f} | "
                f"{ratio:.3f} |"
            )
        print("\n".join(rows))

        print(
            "\n| kept | features as | features, ms a cut | targets, ms a cut | ratio |"
        )
        print("|---|---|---|---|---|")
        dataset = K2SpeechRecognitionDataset(return_cuts=True)
        for keep, lattice in forms[:2]:
            stored = CutSet.from_file(f"{folder}/{keep}{lattice}.jsonl.gz").to_eager()
            lilcom = stored.copy_feats(LilcomChunkyWriter(f"{folder}/lilcom"))
            for kind, manifest in (("numpy_files", stored), ("lilcom_chunky", lilcom)):
                lists = list(batches(list(manifest), args.max_duration))
                parts = [CutSet.from_cuts(cuts) for cuts in lists]
                medians = timed(
                    {
                        "features": partial(each, dataset.__getitem__, parts),
                        "targets": partial(each, collate_targets, lists),
                    },
                    args.repeats,
                )
                ratio = medians["targets"] / medians["features"]
                figures[f"read {keep}, {kind}"] = {**medians, "ratio": ratio}
                ms = {k: 1e3 * v / len(stored) for k, v in medians.items()}
                print(
                    f"| {keep} | {kind} | {ms['features']:.3f} | {ms['targets']:.3f} | "
                    f"{ratio:.2f} |"
                )
        figures["memory"] = memory(args, cuts, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf8")


if __name__ == "__main__":
    main()

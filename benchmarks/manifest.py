#!/usr/bin/env python3
"""
What a large manifest costs: seconds and memory of the steps that read it.

A manifest of made cuts is written and read, each about as long as one of LibriSpeech in
speech and in bytes, with a supervision, features and targets. Cuts of the same duration
share features and a record, so that batches are really read, and no disk is filled. No
model runs.

Each step is a process of its own, which has one thread:

  open      the first cut
  lhotse    all cuts, by Lhotse alone: what any reader of the manifest takes
  check     the checks of all cuts that `icefall-kd dump` makes before it starts
  dump      the batches of one of 8 jobs of a dump, without its checks; features are
            read for the first batch alone
  resume    a job of a dump that goes on where all of its cuts are done
  hash      the hash that `icefall-kd label` and `decode` keep of a manifest
  label     the checks of all cuts that `icefall-kd label` makes
  train     what a training with stored targets looks at before its first batch
  sampler   icefall's sampler and dataset alone: what an online teacher's training reads
  report    the sizes of targets, as `icefall-kd report` adds them up

Columns: seconds until the first cut or batch; of the whole; of the CPU; the
peak of resident memory (VmHWM) in MB, and how much of it was there before the step.

Usage:

  benchmarks/manifest.py --work-dir /tmp/manifest --num-cuts 100000 --json manifest.json
"""

import argparse
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List

SHAPES = 32  # of cuts
# The checksums of targets are right in the first block of cuts alone: no step reads the
# records of others.
BLOCK = 100000
NUM_JOBS = 8
FEATURES = 80
MAX_DURATION = 600.0


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, help="For the manifest; stays there.")
    add("--num-cuts", type=int, default=100000, help="Of a manifest to be made.")
    add("--steps", default=" ".join(STEPS), help="Those to run, with spaces.")
    add("--json", type=Path, help="Write the figures to this file.")
    add("--step", help=argparse.SUPPRESS)  # this process does one step
    return parser.parse_args()


# The manifest


def make_manifest(path: Path, num_cuts: int) -> None:
    """Write a manifest of made cuts, with their features and targets beside it."""
    import numpy as np
    import torch
    from lhotse import (
        CutSet,
        Features,
        MonoCut,
        NumpyFilesWriter,
        Recording,
        SupervisionSegment,
    )
    from lhotse.audio import AudioSource
    from tqdm import tqdm

    from icefall_kd import Fingerprint, TargetWriter, encoder_frames

    fingerprint = Fingerprint(
        teacher="a" * 64,
        tokens="",
        vocab_size=500,
        blank_id=0,
        subsampling_factor=4,
        frame_shift=0.04,
        sampling_rate=16000,
        num_features=FEATURES,
        feature_type="kaldi-fbank",
        feature_shift=0.01,
        ctc="adaptive:0.999:16",
    )
    generator = np.random.default_rng(0)
    folder = path.parent
    cuts = []
    words = "THE OLD MILL BY THE RIVER WAS SILENT THAT NIGHT AND NO ONE CAME".split()
    for i in range(SHAPES):
        seconds = 2.0 + 0.5 * i + 0.01 * i
        name, frames = f"1034-121119-{i:07d}", round(100 * seconds)
        features = Features(
            type="kaldi-fbank",
            num_frames=frames,
            num_features=FEATURES,
            frame_shift=0.01,
            sampling_rate=16000,
            start=0.0,
            duration=seconds,
            storage_type="numpy_files",
            storage_path=str(folder / "feats"),
            storage_key="",
            recording_id=name,
            channels=0,
        )
        with NumpyFilesWriter(folder / "feats") as storage:
            values = generator.standard_normal((frames, FEATURES), dtype=np.float32)
            features.storage_key = storage.write(name, values)
        source = f"/corpora/LibriSpeech/train-clean-360/1034/121119/{name}.flac"
        recording = Recording(
            name,
            [AudioSource("file", [0], source)],
            16000,
            round(16000 * seconds),
            seconds,
        )
        text = " ".join(words[j % len(words)] for j in range(round(2.7 * seconds)))
        supervision = SupervisionSegment(
            name, name, 0.0, seconds, 0, text, "English", "1034"
        )
        cuts.append(MonoCut(name, 0.0, seconds, 0, [supervision], features, recording))
    store = folder / "cuts_kd"
    with TargetWriter(folder / "shapes.jsonl", store, fingerprint, True) as writer:
        for cut in cuts:
            logits = 4 * torch.from_numpy(
                generator.standard_normal(
                    (encoder_frames(cut.num_frames), 500), dtype=np.float32
                )
            )
            writer.write(cut, ctc=logits)
    shapes = [_Shape(cut) for cut in CutSet.from_file(folder / "shapes.jsonl")]
    temporary = path.with_name(path.name + ".tmp")
    lines = [
        shapes[(i * 7 + i // SHAPES) % SHAPES].line(f"{i:06d}")
        for i in range(min(num_cuts, BLOCK))
    ]
    block = b"".join(lines)
    with gzip.open(temporary, "wb", compresslevel=1) as out:
        for start in tqdm(range(0, num_cuts, BLOCK), desc="Writing the manifest"):
            if num_cuts - start < BLOCK:
                block = b"".join(lines[: num_cuts - start])
            out.write(block.replace(b"@@@@", f"{start // BLOCK:04d}".encode()))
    temporary.rename(path)


class _Shape:
    """Lines of cuts that differ in their numbers alone."""

    def __init__(self, cut: Any) -> None:
        from icefall_kd import Pointer

        self.pointer, self.number = Pointer.of_cut(cut), cut.id[-7:]
        self.record = b"".join(self.pointer.read().values())
        self.id = cut.id[:-7]
        values = cut.to_dict()
        key = values["features"].pop("storage_key")
        values["custom"]["kd_targets"]["crc32"] = "CRC"
        line = json.dumps(values, ensure_ascii=False) + "\n"
        line = line.replace('"CRC"', "CRC").replace(self.number, "NUMBER")
        # All cuts of the shape have the same features.
        line = line.replace('"storage_type"', f'"storage_key": "{key}", "storage_type"')
        self.parts = line.split("CRC")

    def line(self, number: str) -> bytes:
        self.pointer.cut = f"{self.id}0000{number}"
        crc = str(self.pointer.checksum(self.record))
        line = crc.join(p.replace("NUMBER", "@@@@" + number) for p in self.parts)
        return line.encode()


# The steps. Each calls `first` when its first cut or batch is there, and returns how
# many cuts it read.

First = Callable[[], None]


def counted(cuts: Iterable[Any], first: First) -> int:
    n = 0
    for n, _ in enumerate(cuts, 1):
        if n == 1:
            first()
    return n


def open_manifest(path: Path, first: First) -> int:
    from icefall_kd.targets.cuts import ManifestCuts

    next(iter(ManifestCuts(str(path))))
    return 1


def lhotse(path: Path, first: First) -> int:
    from lhotse import CutSet

    return counted(CutSet.from_file(path), first)


def check(path: Path, first: First) -> int:
    from icefall_kd.targets.cuts import survey
    from icefall_kd.targets.model_input import check_supervision

    return survey(str(path), FEATURES, [check_supervision]).total


def dump(path: Path, first: First) -> int:
    from icefall_kd.targets.batches import DumpPlan, FeatureReader
    from icefall_kd.targets.cuts import ManifestCuts

    plan = DumpPlan(ManifestCuts(str(path)), MAX_DURATION, 0, NUM_JOBS)
    reader, n = FeatureReader(), 0
    for batch in plan:
        if not n:
            reader[batch]
            first()
        n += len(batch.cuts)
    return n


def resume(path: Path, first: First) -> int:
    from icefall_kd import Fingerprint, TargetWriter
    from icefall_kd.targets.manifest import job_manifest, open_manifest

    store = path.parent / "cuts_kd"
    own = job_manifest(path.with_name("resumed.jsonl.gz"), 0, NUM_JOBS)
    with open_manifest(path, "rb") as f, open_manifest(own, "wb") as out:
        for i, line in enumerate(f):
            if i % NUM_JOBS == 0:
                out.write(line)
    start = time.perf_counter()
    all_of_them = path.with_name("resumed.jsonl.gz")
    writer = TargetWriter(
        all_of_them, store, Fingerprint.read(store), job=0, num_jobs=NUM_JOBS
    )
    n = len(writer)
    writer.finish()
    first.start = start  # the making of the job's manifest is no part of the step
    own.unlink()
    return n


def hash_(path: Path, first: First) -> int:
    from icefall_kd.transcripts.cuts import hash_of_manifest

    hash_of_manifest(str(path))
    return 0


def label(path: Path, first: First) -> int:
    from icefall_kd.labels.labelling import survey

    class Teacher:
        def problem(self, cut):
            return ""

    return survey(str(path), Teacher()).cuts


def train(path: Path, first: First) -> int:
    from lhotse import CutSet

    from icefall_kd import TargetDataset
    from icefall_kd.targets.dataset import store_fingerprint
    from icefall_kd.targets.first_look import FirstLook

    cuts = CutSet.from_file(path)
    look = FirstLook(cuts, silent=True)
    store_fingerprint(look)
    next(_batches(cuts, TargetDataset))
    first()
    return look.total


def sampler(path: Path, first: First) -> int:
    from lhotse import CutSet

    next(_batches(CutSet.from_file(path), lambda dataset: dataset))
    first()
    return 0


def _batches(cuts: Any, wrap: Callable[[Any], Any]) -> Any:
    from lhotse.dataset import DynamicBucketingSampler, K2SpeechRecognitionDataset
    from torch.utils.data import DataLoader

    batches = DynamicBucketingSampler(
        cuts, max_duration=MAX_DURATION, shuffle=True, num_buckets=30, drop_last=True
    )
    dataset = wrap(K2SpeechRecognitionDataset(return_cuts=True))
    return iter(DataLoader(dataset, sampler=batches, batch_size=None))


def report(path: Path, first: First) -> int:
    from lhotse import CutSet

    from icefall_kd.report.manifests import measure_targets

    return measure_targets(CutSet.from_file(path)).all_cuts


STEPS: Dict[str, Callable[[Path, First], int]] = {
    "open": open_manifest,
    "lhotse": lhotse,
    "check": check,
    "dump": dump,
    "resume": resume,
    "hash": hash_,
    "label": label,
    "train": train,
    "sampler": sampler,
    "report": report,
}


# The figures


def memory(name: str) -> float:
    """MB of this process, by a name of /proc/self/status."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def do_step(name: str, path: Path) -> Dict[str, Any]:
    """Run a step in this process; return its figures."""
    import lhotse  # noqa: F401
    import torch

    import icefall_kd.targets.dataset  # noqa: F401

    torch.set_num_threads(1)
    before = memory("VmHWM")
    start, cpu = time.perf_counter(), time.process_time()
    seconds_to_first: List[float] = []

    def first() -> None:
        seconds_to_first.append(time.perf_counter() - start)

    cuts = STEPS[name](path, first)
    seconds = time.perf_counter() - getattr(first, "start", start)
    return {
        "step": name,
        "first": seconds_to_first[0] if seconds_to_first else None,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "cuts": cuts,
        "peak_mb": memory("VmHWM"),
        "before_mb": before,
    }


def table(rows: List[Dict[str, Any]]) -> Iterable[str]:
    yield "| step | first, s | whole, s | CPU, s | peak, MB | before it, MB |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in rows:
        first = "" if row["first"] is None else f"{row['first']:.1f}"
        yield (
            f"| {row['step']} | {first} | {row['seconds']:,.1f} "
            f"| {row['cpu_seconds']:,.1f} "
            f"| {row['peak_mb']:,.0f} | {row['before_mb']:,.0f} |"
        )


def main() -> None:
    args = get_args()
    path = args.work_dir / "cuts.jsonl.gz"
    if args.step:
        print(json.dumps(do_step(args.step, path)))
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        make_manifest(path, args.num_cuts)
    rows = []
    for name in args.steps.split():
        command = [sys.executable, __file__, "--work-dir", str(args.work_dir)]
        done = subprocess.run(
            [*command, "--step", name],
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf8",
            check=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    size = path.stat().st_size
    print(f"{path}: {size / 1e6:,.1f} MB")
    print("\n".join(table(rows)))
    if args.json:
        args.json.write_text(
            json.dumps({"bytes": size, "rows": rows}, indent=1), "utf8"
        )


if __name__ == "__main__":
    main()

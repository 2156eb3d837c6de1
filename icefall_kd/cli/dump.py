"""Stores what a teacher says on cuts."""

import logging
import os
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Deque, Dict, Iterator, List, Optional, Tuple, Union

import click
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.collation import collate_features
from tqdm.auto import tqdm

from icefall_kd.cli.cuts import (
    fits,
    is_unknown,
    labels_of,
    name_unreadable,
    open_cuts,
    readable,
    survey,
)
from icefall_kd.cli.heap import Heap
from icefall_kd.cli.teachers import (
    Said,
    Teacher,
    chooser,
    joined,
    load_teachers,
    numbers,
)
from icefall_kd.cli.torchrun import number_of
from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.hidden import from_command_line
from icefall_kd.targets.fingerprint import (
    Fingerprint,
    check_vocabulary,
    hash_tokens,
    pieces,
    write_symbols,
)
from icefall_kd.targets.manifest import combine, job_manifest
from icefall_kd.targets.writer import LogitWriter, Record

# Seconds of a stretch of the manifest, which one job hears as a whole and an
# interruption does again. No option changes it: jobs that go on under another
# --max-duration still share the stretches as they did.
WINDOW = 1000.0
WARM_UP = 5  # batches


def _windows(cuts: Iterator[Cut], seconds: float) -> Iterator[List[Cut]]:
    """Stretches of at most so many seconds, in file order."""
    window: List[Cut] = []
    total = 0.0
    for cut in cuts:
        if window and total + cut.duration > seconds:
            yield window
            window, total = [], 0.0
        window.append(cut)
        total += cut.duration
    if window:
        yield window


def _batches(window: List[Cut], max_duration: float) -> Iterator[List[Cut]]:
    """Batches of at most ``max_duration`` seconds, padding counted, longest first."""
    batch: List[Cut] = []
    for cut in sorted(window, key=lambda c: (-c.duration, c.id)):
        if batch and batch[0].duration * (len(batch) + 1) > max_duration:
            yield batch
            batch = []
        batch.append(cut)
    if batch:
        yield batch


@dataclass
class _Batch:
    cuts: List[Cut]
    window: Optional[List[Cut]]  # the whole stretch, with its last batch


class _Plan:
    """The batches of one job, in their order.

    They are the same whatever was done before and whichever job does them, so each
    cut's targets are the same to the last bit: a stretch of cuts goes to one job.
    """

    def __init__(self, cuts, max_duration, job, num_jobs, done) -> None:
        self.cuts, self.max_duration = cuts, max_duration
        self.job, self.num_jobs, self.done = job, num_jobs, done

    def __iter__(self) -> Iterator[_Batch]:
        windows = _windows(self.cuts, WINDOW)
        for i, window in enumerate(windows):
            if i % self.num_jobs != self.job or all(c.id in self.done for c in window):
                continue
            batches = list(_batches(window, self.max_duration))
            for j, batch in enumerate(batches):
                yield _Batch(batch, window if j == len(batches) - 1 else None)


class _Reader(torch.utils.data.Dataset):
    def __getitem__(self, batch: _Batch):
        try:
            x, x_lens = collate_features(CutSet.from_cuts(batch.cuts))
        except Exception:  # the storage behind lhotse raises what it likes
            name_unreadable(batch.cuts)
            raise
        return batch, x, x_lens


class _Sink:
    """Encodes and writes behind the teacher's back, in the order of the manifest."""

    def __init__(self, writer: LogitWriter) -> None:
        self.writer = writer
        self.records: Dict[str, Record] = {}
        self.pool = ThreadPoolExecutor(1)
        self.pending: Deque[Future] = deque()

    def put(self, batch: _Batch, said: Said) -> None:
        while len(self.pending) > 2:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._do, batch, said))

    def _do(self, batch: _Batch, said: Said) -> None:
        for i, cut in enumerate(batch.cuts):
            if cut.id not in self.writer:
                self.records[cut.id] = self.writer.encode(cut, *said.of(i))
        for cut in batch.window or []:
            if cut.id in self.records:
                self.writer.append(cut, self.records.pop(cut.id))

    def close(self, failed: bool) -> None:
        if failed:
            self.pool.shutdown(wait=True, cancel_futures=True)
            return
        while self.pending:
            self.pending.popleft().result()
        self.pool.shutdown()


class _Long:
    """Counts the cuts that have more labels than frames, or labels that say nothing."""

    def __init__(self, sp) -> None:
        self.sp, self.count, self.first, self.unknown = sp, 0, "", 0

    def __call__(self, cut) -> None:
        (labels,) = labels_of([cut], self.sp)
        self.unknown += is_unknown(labels, self.sp)
        if not fits(cut, labels):
            self.count += 1
            self.first = self.first or cut.id


def job_of(num_jobs: int, job: int) -> Tuple[int, int]:
    """This process's job and the number of jobs: as told, or as torchrun says."""
    size = number_of("WORLD_SIZE") or 1
    if num_jobs == 1 and size > 1:
        rank = number_of("RANK")
        if rank is None or rank >= size:
            raise KDError(
                f"the environment has WORLD_SIZE {size} and RANK {rank}, and torchrun "
                f"sets RANK to 0 to {size - 1}: unset WORLD_SIZE, or run this under "
                "torchrun"
            )
        return rank, size
    if not 0 <= job < num_jobs:
        raise KDError(
            f"--job is {job} and --num-jobs {num_jobs}: give --job 0 to {num_jobs - 1}"
        )
    return job, num_jobs


def dump(
    in_cuts: str,
    out_cuts: str,
    recipe: str,
    exp_dir: str,
    epoch: int,
    iteration: int,
    avg: int,
    use_averaged_model: bool,
    flags: Tuple[str, ...],
    bpe_model: str,
    storage_dir: str,
    keep: str,
    keep_lattice: str,
    keep_hidden: str,
    s_range: int,
    weights: str,
    teacher_field: str,
    max_duration: float,
    num_jobs: int,
    job: int,
    num_workers: int,
    num_threads: int,
    overwrite: bool,
    stats: bool,
) -> None:
    if Path(in_cuts).resolve() == Path(out_cuts).resolve():
        raise KDError(f"{in_cuts} is both read and written: give OUT_CUTS another name")
    if keep_lattice and not bpe_model:
        raise KDError(
            "--keep-lattice needs the labels of the transcripts: give --bpe-model"
        )
    if weights and teacher_field:
        raise KDError("--weights and --teacher-field are both given: give one of them")
    job, num_jobs = job_of(num_jobs, job)
    cuts = open_cuts(in_cuts)
    shares = numbers(weights)
    codecs, quantizers = from_command_line(keep_hidden)
    which = (epoch, iteration, avg, use_averaged_model, flags, bpe_model)
    models, settings, names = load_teachers(recipe, exp_dir.split(","), *which)
    sp = check_vocabulary(bpe_model, settings) if bpe_model else None
    asked = [chooser(teacher_field)] if teacher_field else []
    choose = asked[0] if asked else None
    if keep_lattice:
        long = _Long(sp)
        asked.append(long)
    features, total = survey(in_cuts, int(settings["feature_dim"]), asked)
    if keep_lattice and 2 * long.unknown > total:
        raise KDError(
            f"the tokens know nothing of {long.unknown} of the {total} transcripts in "
            f"{in_cuts}: give the tokens that the recipe trains with, which byte-level "
            "BPE can't be here, or dump without --keep-lattice"
        )
    if keep_lattice and long.count:
        logging.warning(
            f"{long.count} of {total} cuts have more labels than frames, {long.first} "
            "the first: they go without lattices, as icefall trains without them"
        )
    torch.set_num_threads(num_threads or os.cpu_count() or 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", number_of("LOCAL_RANK") or 0)
    fingerprint = Fingerprint.of(
        joined(names, shares, teacher_field),
        settings,
        features,
        hash_tokens(pieces(sp)) if sp is not None else None,
        ctc="" if keep == "none" else keep,
        lattice=keep_lattice,
        s_range=s_range if keep_lattice else 0,
        hidden=",".join(map(str, codecs)),
    )
    teacher = Teacher(fingerprint, models, shares, choose, sp)
    teacher.group.to(device)
    out = Path(out_cuts)
    storage_dir = storage_dir or str(out.with_name(out.name.split(".jsonl")[0] + "_kd"))
    with ExitStack() as stack:
        stack.callback(teacher.group.close)
        writer = stack.enter_context(
            LogitWriter(out, storage_dir, fingerprint, overwrite, job, num_jobs)
        )
        if sp is not None:
            write_symbols(storage_dir, pieces(sp))
        for codec in codecs:
            if codec.layer in quantizers:
                target = codec.quantizer_file(storage_dir)
                with replacing(target, shared=True) as temporary:
                    shutil.copyfile(quantizers[codec.layer], temporary)
        if len(writer):
            logging.warning("%d cuts have their targets already", len(writer))
        plan = _Plan(readable(cuts, in_cuts), max_duration, job, num_jobs, writer)
        bar = stack.enter_context(
            tqdm(desc="Teacher's targets", unit=" cuts", total=-(-total // num_jobs))
        )
        bar.update(len(writer))
        _ask(teacher, plan, writer, bar, device, num_workers)
    size = f"{writer.bytes_written / 1e6:.1f} MB"
    told = f"{len(writer)} cuts with targets, {size} written, records in {storage_dir}"
    _tell(in_cuts, out, told, num_jobs, overwrite)
    if stats and out.is_file():
        from icefall_kd.targets.stats import print_stats

        print_stats(CutSet.from_file(out))


def _ask(
    teacher: Teacher,
    plan: _Plan,
    writer: LogitWriter,
    bar: tqdm,
    device: torch.device,
    num_workers: int,
) -> None:
    loader = torch.utils.data.DataLoader(
        _Reader(), sampler=plan, batch_size=None, num_workers=num_workers
    )
    sink, heap = _Sink(writer), Heap(WARM_UP)
    frames, begun = 0, time.perf_counter()
    with ExitStack() as stack:
        stack.push(lambda kind, *exc: sink.close(failed=kind is not None))
        for batch, x, x_lens in loader:
            said = teacher(x.to(device), x_lens.to(device), batch.cuts)
            sink.put(batch, said)
            heap.after_batch()
            frames += sum(said.lens)
            bar.update(len(said.lens))
            rate = frames / (time.perf_counter() - begun)
            bar.set_postfix_str(
                f"{rate:.0f} frames/s, {writer.bytes_written / 1e6:.1f} MB"
            )


def _tell(in_cuts, out, told: str, num_jobs: int, overwrite: bool) -> None:
    if num_jobs == 1:
        click.echo(f"{out}: {told}")
        return
    click.echo(f"this job: {told}")
    jobs = [job_manifest(out, j, num_jobs) for j in range(num_jobs)]
    if not overwrite and all(path.is_file() for path in jobs):
        combine_jobs(in_cuts, out, num_jobs)
    else:
        click.echo(
            "when all jobs are done: icefall-kd combine --num-jobs "
            f"{num_jobs} {in_cuts} {out}"
        )


def combine_jobs(in_cuts: str, out_cuts: Union[str, Path], num_jobs: int) -> None:
    """Join the manifests of all jobs, in the order of ``in_cuts``."""
    counts = combine(
        out_cuts, num_jobs, (c.id for c in readable(open_cuts(in_cuts, True), in_cuts))
    )
    click.echo(
        f"{out_cuts}: {sum(counts.values())} cuts with targets of {num_jobs} jobs"
    )

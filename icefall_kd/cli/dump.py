"""Stores what a teacher says on cuts."""

import logging
import os
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, Sequence, Tuple, Union

import click
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from tqdm.auto import tqdm

from icefall_kd.cli.batches import Batch, Plan, Reader, is_heard, read_features
from icefall_kd.cli.cuts import (
    Seconds,
    Survey,
    fits,
    is_unknown,
    labels_of,
    open_cuts,
    parse_seconds,
    readable,
    survey,
)
from icefall_kd.cli.heap import Heap
from icefall_kd.cli.memory import enough_memory
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
from icefall_kd.files import MANIFEST, check_new_file, check_new_folder, replacing
from icefall_kd.kinds.hidden import (
    HiddenCodec,
    Layer,
    from_command_line,
    load_quantizer,
)
from icefall_kd.lattice import check_s_range
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.heard import check_supervision
from icefall_kd.targets.manifest import combine, job_manifest
from icefall_kd.targets.record import Encoder, Record
from icefall_kd.targets.writer import LogitWriter
from icefall_kd.teacher.loader import teacher_folders
from icefall_kd.tokens import (
    hash_tokens,
    load_tokenizer,
    token_names,
    write_token_names,
)

# Seconds of a stretch of the manifest, which one job hears as a whole and an
# interruption does again. No option changes it: jobs that go on under another
# --max-duration still share the stretches as they did.
WINDOW = 1000.0
WARM_UP = 5  # batches


class _Sink:
    """Encodes and writes behind the teacher's back, in the order of the manifest."""

    def __init__(self, writer: LogitWriter) -> None:
        self.writer = writer
        self.records: Dict[str, Record] = {}
        self.pool = ThreadPoolExecutor(1)
        self.pending: Deque[Future] = deque()

    def put(self, batch: Batch, said: Said) -> None:
        while len(self.pending) > 2:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._do, batch, said))

    def _do(self, batch: Batch, said: Said) -> None:
        for i, cut in enumerate(batch.cuts):
            if cut.id not in self.writer:
                self.records[cut.id] = self.writer.encode(cut, **said.of(i))
        for cut in batch.window or []:
            if cut.id in self.records:
                self.writer.append(cut, self.records.pop(cut.id))
            elif cut.id not in self.writer:
                self.writer.leave_out(cut)

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

    def check(self, surveyed: Survey) -> None:
        """Refuse tokens that know nothing of the transcripts; tell of long ones."""
        total = surveyed.total
        if 2 * self.unknown > total:
            raise KDError(
                f"the tokens know nothing of {self.unknown} of the {total} transcripts "
                f"in {surveyed.path}: give the tokens that the recipe trains with, "
                "which byte-level BPE can't be here, or dump without --keep-lattice"
            )
        if self.count:
            logging.warning(
                f"{self.count} of {total} cuts have more labels than frames, "
                f"{self.first} the first: they go without lattices, as icefall trains "
                "without them"
            )


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
    cut_seconds: str,
    max_duration: float,
    num_jobs: int,
    job: int,
    num_workers: int,
    num_threads: int,
    overwrite: bool,
    stats: bool,
) -> None:
    cuts = open_cuts(in_cuts)
    storage_dir = storage_dir or _default_store(out_cuts)
    _check_places(in_cuts, out_cuts, storage_dir)
    check_s_range(s_range, "--s-range")
    seconds = parse_seconds(cut_seconds)
    if keep_lattice and not bpe_model:
        raise KDError(
            "--keep-lattice needs the labels of the transcripts: give --bpe-model"
        )
    if weights and teacher_field:
        raise KDError("--weights and --teacher-field are both given: give one of them")
    job, num_jobs = job_of(num_jobs, job)
    shares = numbers(weights)
    codecs, quantizers = from_command_line(keep_hidden)
    which = (epoch, iteration, avg, use_averaged_model, flags, bpe_model)
    models, settings, names = load_teachers(recipe, teacher_folders(exp_dir), *which)
    sp = load_tokenizer(bpe_model, settings["vocab_size"]) if bpe_model else None
    choose = chooser(teacher_field) if teacher_field else None
    asked = [check_supervision, *([choose] if choose else [])]
    if keep_lattice:
        long = _Long(sp)
        asked.append(long)
    surveyed = survey(in_cuts, int(settings["feature_dim"]), asked, seconds)
    if keep_lattice:
        long.check(surveyed)
    torch.set_num_threads(num_threads or os.cpu_count() or 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", number_of("LOCAL_RANK") or 0)
    fingerprint = Fingerprint.of(
        joined(names, shares, teacher_field),
        settings,
        surveyed.features,
        hash_tokens(token_names(sp)) if sp is not None else None,
        ctc="" if keep == "none" else keep,
        lattice=keep_lattice,
        s_range=s_range if keep_lattice else 0,
        hidden=",".join(map(str, codecs)),
    )
    teacher = Teacher(fingerprint, models, shares, choose, sp)
    teacher.group.to(device)
    out = Path(out_cuts)
    remedy = (
        f"give --max-duration less than {max_duration:g}, or if one cut is too long "
        "for it --cut-seconds; the same command then goes on where this one stopped"
    )
    with ExitStack() as stack:
        stack.callback(teacher.group.close)
        _rehearse(teacher, fingerprint, quantizers, cuts, seconds, device)
        surveyed.warn()
        writer = stack.enter_context(
            LogitWriter(out, storage_dir, fingerprint, overwrite, job, num_jobs)
        )
        _write_small_files(storage_dir, sp, codecs, quantizers)
        if len(writer):
            logging.warning("%d cuts have their targets already", len(writer))
        _check_left_out(readable(cuts, in_cuts), seconds, writer)
        plan = Plan(
            readable(cuts, in_cuts),
            max_duration,
            job,
            num_jobs,
            WINDOW,
            seconds,
            done=writer,
        )
        bar = stack.enter_context(
            tqdm(
                desc="Teacher's targets",
                unit=" cuts",
                total=-(-surveyed.total // num_jobs),
            )
        )
        bar.update(len(writer))
        _ask(teacher, plan, writer, bar, device, num_workers, remedy)
    size = f"{writer.bytes_written / 1e6:.1f} MB"
    told = f"{len(writer)} cuts with targets, "
    if writer.left_out:
        told += f"{len(writer.left_out)} without, "
    told += f"{size} written, records in {storage_dir}"
    _tell(in_cuts, out, told, num_jobs, overwrite)
    if stats and out.is_file():
        from icefall_kd.cli.stats import print_stats

        print_stats(CutSet.from_file(out))


def _default_store(out_cuts: str) -> str:
    out = Path(out_cuts)
    return str(out.parent / (out.name.split(".jsonl")[0] + "_kd"))


def _check_places(in_cuts: str, out_cuts: str, storage_dir: str) -> None:
    """Refuse an output that can't be written, or that would be written over."""
    check_new_file(out_cuts, "OUT_CUTS", MANIFEST)
    check_new_folder(storage_dir, "the folder of the targets")
    if Path(in_cuts).resolve() == Path(out_cuts).resolve():
        raise KDError(f"{in_cuts} is both read and written: give OUT_CUTS another name")
    if Path(storage_dir).resolve() == Path(out_cuts).resolve():
        raise KDError(
            f"--storage-dir and OUT_CUTS are both {out_cuts}: give --storage-dir the "
            "name of a folder"
        )


def _write_small_files(
    storage_dir: str,
    sp: Any,
    codecs: Sequence[HiddenCodec],
    quantizers: Dict[Layer, Path],
) -> None:
    """Put the teacher's symbols and quantizers beside the records."""
    if sp is not None:
        write_token_names(storage_dir, token_names(sp))
    for codec in codecs:
        if codec.layer in quantizers:
            target = codec.quantizer_file(storage_dir)
            with replacing(target, shared=True) as temporary:
                shutil.copyfile(quantizers[codec.layer], temporary)


def _check_left_out(cuts: Iterator[Cut], seconds: Seconds, writer: LogitWriter) -> None:
    """Refuse to go on with a store whose --cut-seconds were narrower."""
    if not writer.left_out:
        return
    for cut in cuts:
        if cut.id in writer.left_out and is_heard(cut, seconds):
            raise KDError(
                f"the cut {cut.id} of {cut.duration:g} s was left without targets by a "
                "run with another --cut-seconds: give the same, or --overwrite"
            )


def _rehearse(
    teacher: Teacher,
    fingerprint: Fingerprint,
    quantizers: Dict[Layer, Path],
    cuts: CutSet,
    seconds: Seconds,
    device: torch.device,
) -> None:
    """Ask the teacher for one cut's targets, and store nothing.

    What it can't give, or what can't be kept as it is to be kept, is refused so before
    there is a store.
    """
    cut = next(cut for cut in cuts if is_heard(cut, seconds))
    encoder = Encoder(
        fingerprint,
        lambda codec: load_quantizer(quantizers[codec.layer]) if codec.codes else None,
    )
    remedy = (
        f"it is the first cut, of {cut.duration:g} s, alone; free memory, or give "
        "--cut-seconds if it is too long"
    )
    with enough_memory(f"the teacher's pass over the cut {cut.id}", remedy):
        x, x_lens = read_features([cut])
        said = teacher(x.to(device), x_lens.to(device), [cut])
        encoder.encode(cut, **said.of(0))


def _ask(
    teacher: Teacher,
    plan: Plan,
    writer: LogitWriter,
    bar: tqdm,
    device: torch.device,
    num_workers: int,
    remedy: str,
) -> None:
    """Store what the teacher says on the batches of ``plan``.

    Args:
      remedy: What helps where memory runs out.
    """
    loader = torch.utils.data.DataLoader(
        Reader(remedy), sampler=plan, batch_size=None, num_workers=num_workers
    )
    sink, heap = _Sink(writer), Heap(WARM_UP)
    frames, begun = 0, time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(enough_memory("reading features or storing", remedy))
        stack.push(lambda kind, *exc: sink.close(failed=kind is not None))
        for batch, x, x_lens in loader:
            said = Said([])
            if batch.cuts:
                with enough_memory(f"the teacher's pass over {batch}", remedy):
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
    check_new_file(str(out_cuts), "OUT_CUTS", MANIFEST)
    if Path(in_cuts).resolve() == Path(out_cuts).resolve():
        raise KDError(f"{in_cuts} is both read and written: give OUT_CUTS another name")
    counts = combine(
        out_cuts, num_jobs, (c.id for c in readable(open_cuts(in_cuts, True), in_cuts))
    )
    click.echo(
        f"{out_cuts}: {sum(counts.values())} cuts with targets of {num_jobs} jobs"
    )

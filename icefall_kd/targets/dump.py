"""Runs a teacher over cuts and stores its targets."""

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, Deque, Dict, Iterable, List, Optional

import torch
from lhotse.cut import Cut
from tqdm.auto import tqdm

from icefall_kd.errors import KDError
from icefall_kd.memory import Heap, enough_memory
from icefall_kd.targets.batches import DumpBatch, DumpPlan, FeatureReader, read_features
from icefall_kd.targets.cuts import ANY_SECONDS, Seconds, gets_targets
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.record import Record, RecordEncoder
from icefall_kd.targets.transcript_checks import labels_of
from icefall_kd.targets.writer import TargetWriter
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.zipformer import encoder_frames

WARM_UP = 5  # batches
CPU = torch.device("cpu")


def dump_targets(
    cuts: Iterable[Cut],
    teacher: Teacher,
    writer: TargetWriter,
    *,
    tokenizer: Optional[Any] = None,
    max_duration: float = 200.0,
    cut_seconds: Seconds = ANY_SECONDS,
    num_workers: int = 1,
    device: torch.device = CPU,
    total: Optional[int] = None,
) -> None:
    """Store the teacher's targets of all cuts that the writer does not have yet.

    A run that was cut short goes on where it stopped; each cut's targets are the same
    to the last bit. :meth:`TargetWriter.finish` makes the manifest when this returns.

    Args:
      cuts: Cuts with features, in the order of the manifest; iterated over twice.
      teacher: Computes what the writer's fingerprint names.
      writer: Stores it; of several jobs' cuts, it gets those of its own.
      tokenizer: The teacher's, where lattices are stored.
      max_duration: Seconds of audio in a batch, padding counted.
      cut_seconds: The shortest and the longest duration of cuts that get targets.
      num_workers: Processes that read features; 0: this one.
      device: Where the teacher runs.
      total: The number of cuts of this job, for the progress bar.

    Raises:
      KDError: features that can't be read, targets that can't be stored, memory or a
        disk that is full, or a store that was begun with narrower ``cut_seconds``.
    """
    remedy = (
        f"give `max_duration` less than {max_duration:g}, or if one cut is too long "
        "for it `cut_seconds`; the same command then goes on where this one stopped"
    )
    teacher.to(device)
    if len(writer):
        logging.warning("%d cuts have their targets already", len(writer))
    _check_left_out(cuts, cut_seconds, writer)
    job, num_jobs = writer.job, writer.num_jobs
    compute = partial(_compute, teacher, writer.fingerprint, tokenizer, device)
    plan = DumpPlan(cuts, max_duration, job, num_jobs, cut_seconds, done=writer)
    loader = torch.utils.data.DataLoader(
        FeatureReader(remedy), sampler=plan, batch_size=None, num_workers=num_workers
    )
    heap = Heap(WARM_UP)
    frames, start = 0, time.perf_counter()
    with ExitStack() as stack:
        bar = tqdm(desc="Teacher's targets", unit=" cuts", total=total)
        stack.enter_context(bar)
        bar.update(len(writer))
        stack.enter_context(enough_memory("reading features or storing", remedy))
        encoding = stack.enter_context(_EncodingThread(writer))
        for batch, x, x_lens in loader:
            values: List[Dict[str, Any]] = []
            if batch.cuts:
                with enough_memory(f"the teacher's pass over {batch}", remedy):
                    values = compute(batch.cuts, x, x_lens)
                frames += sum(encoder_frames(n) for n in x_lens.tolist())
            encoding.put(batch, values)
            heap.after_batch()
            bar.update(len(values))
            rate = frames / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"{rate:.0f} frames/s, {writer.bytes_written / 1e6:.1f} MB"
            )


def rehearse(
    cuts: Iterable[Cut],
    teacher: Teacher,
    encoder: RecordEncoder,
    fingerprint: Fingerprint,
    *,
    tokenizer: Optional[Any] = None,
    cut_seconds: Seconds = ANY_SECONDS,
    device: torch.device = CPU,
) -> float:
    """Make the record of one cut, and store nothing.

    What the teacher can't compute, or what can't be stored in the form that the
    fingerprint names, is refused so before there is a store.

    Returns the bytes that a second of this cut takes.

    Args:
      cuts: Those of :func:`dump_targets`; the first that gets targets is taken.
      teacher: That of :func:`dump_targets`.
      encoder: One as the writer's.
      fingerprint: That of the store.
      tokenizer: The teacher's, where lattices are stored.
      cut_seconds: The shortest and the longest duration of cuts that get targets.
      device: Where the teacher runs.

    Raises:
      KDError: what :func:`dump_targets` would refuse for this cut.
    """
    teacher.to(device)
    cut = next(cut for cut in cuts if gets_targets(cut, cut_seconds))
    remedy = (
        f"it is the first cut, of {cut.duration:g} s, alone; free memory, or give "
        "`cut_seconds` if it is too long"
    )
    with enough_memory(f"the teacher's pass over the cut {cut.id}", remedy):
        x, x_lens = read_features([cut])
        (values,) = _compute(teacher, fingerprint, tokenizer, device, [cut], x, x_lens)
        record = encoder.encode(cut, **values)
    return sum(map(len, record.parts.values())) / cut.duration


def _compute(
    teacher: Teacher,
    fingerprint: Fingerprint,
    tokenizer: Optional[Any],
    device: torch.device,
    cuts: List[Cut],
    x: torch.Tensor,
    x_lens: torch.Tensor,
) -> List[Dict[str, Any]]:
    """The value of each cut, by kind, of the kinds that the fingerprint names."""
    y = labels_of(cuts, tokenizer) if fingerprint.lattice else None
    x, x_lens = x.to(device), x_lens.to(device)
    out = teacher.outputs_to_store(x, x_lens, cuts, y, fingerprint.s_range)
    values = {name: kind.take(out) for name, kind in fingerprint.kinds.items()}
    return [{name: rows[i] for name, rows in values.items()} for i in range(len(cuts))]


def _check_left_out(
    cuts: Iterable[Cut], cut_seconds: Seconds, writer: TargetWriter
) -> None:
    """Refuse to go on with a store that was begun with narrower ``cut_seconds``."""
    if not writer.left_out:
        return
    for cut in cuts:
        if cut.id in writer.left_out and gets_targets(cut, cut_seconds):
            raise KDError(
                f"the cut {cut.id} of {cut.duration:g} s was left without targets by a "
                "run with another `cut_seconds`: give the same, or --overwrite"
            )


class _EncodingThread:
    """Encodes and stores values while the teacher runs on the next batch.

    Batches of a stretch go by length, and records are stored in the order of the cuts:
    they wait until the stretch has all of them.
    """

    def __init__(self, writer: TargetWriter) -> None:
        self.writer = writer
        self.records: Dict[str, Record] = {}
        self.pool = ThreadPoolExecutor(1)
        self.pending: Deque[Future] = deque()

    def put(self, batch: DumpBatch, values: List[Dict[str, Any]]) -> None:
        while len(self.pending) > 2:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._store, batch, values))

    def _store(self, batch: DumpBatch, values: List[Dict[str, Any]]) -> None:
        encode = self.writer.encoder.encode
        for cut, value_of_kind in zip(batch.cuts, values):
            if cut.id not in self.writer:
                self.records[cut.id] = encode(cut, **value_of_kind)
        for cut in batch.stretch or []:
            if cut.id in self.records:
                self.writer.append(cut, self.records.pop(cut.id))
            elif cut.id not in self.writer:
                self.writer.leave_out(cut)

    def __enter__(self) -> "_EncodingThread":
        return self

    def __exit__(self, kind: Any, *exc: Any) -> None:
        if kind is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            return
        while self.pending:
            self.pending.popleft().result()
        self.pool.shutdown()

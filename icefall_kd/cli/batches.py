"""The batches that a teacher hears, and their features."""

from dataclasses import dataclass
from typing import Container, Iterator, List, Optional, Tuple

import torch
from lhotse.cut import Cut

from icefall_kd.cli.cuts import Seconds, is_within, name_unreadable
from icefall_kd.cli.memory import enough_memory
from icefall_kd.targets.heard import collate_heard, why_unheard


def is_heard(cut: Cut, seconds: Seconds) -> bool:
    """Whether the teacher is asked about ``cut``; see :class:`Plan`."""
    return is_within(cut, seconds) and not why_unheard(cut)


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
class Batch:
    cuts: List[Cut]  # none of a stretch that the teacher hears nothing of
    window: Optional[List[Cut]]  # the whole stretch, with its last batch

    def __str__(self) -> str:
        longest = max(cut.duration for cut in self.cuts)
        seconds = longest * len(self.cuts)
        return (
            f"a batch of {len(self.cuts)} cuts, {seconds:.1f} s with padding, the "
            f"longest of them {self.cuts[0].id}"
        )


class Plan:
    """The batches of one job, in their order.

    They are the same whatever was done before and whichever job does them, so each
    cut's targets are the same to the last bit: a stretch of cuts goes to one job.

    Args:
      cuts: All of them, in their order.
      max_duration: Seconds of a batch.
      job: Whose batches, of ``num_jobs``, from 0 on.
      window: Seconds of a stretch.
      seconds: Shorter and longer cuts go without targets, as those that can't be heard.
      done: Ids of cuts that the manifest has already.
    """

    def __init__(
        self,
        cuts: Iterator[Cut],
        max_duration: float,
        job: int,
        num_jobs: int,
        window: float,
        seconds: Seconds,
        done: Container[str],
    ) -> None:
        self.cuts, self.max_duration, self.seconds = cuts, max_duration, seconds
        self.window = window
        self.job, self.num_jobs = job, num_jobs
        self.done = done

    def __iter__(self) -> Iterator[Batch]:
        windows = _windows(self.cuts, self.window)
        for i, window in enumerate(windows):
            if i % self.num_jobs != self.job or all(c.id in self.done for c in window):
                continue
            heard = [cut for cut in window if is_heard(cut, self.seconds)]
            batches = list(_batches(heard, self.max_duration)) or [[]]
            for j, batch in enumerate(batches):
                yield Batch(batch, window if j == len(batches) - 1 else None)


class Reader(torch.utils.data.Dataset):
    """Reads the features of a batch, in a process of its own perhaps.

    Args:
      remedy: What helps where memory runs out.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def __getitem__(self, batch: Batch):
        if not batch.cuts:
            return batch, None, None
        with enough_memory(f"reading the features of {batch}", self.remedy):
            return (batch, *read_features(batch.cuts))


def read_features(cuts: List[Cut]) -> Tuple[torch.Tensor, torch.Tensor]:
    """What the teacher hears of ``cuts``; see :func:`collate_heard`.

    Raises:
      KDError: features that can't be read.
    """
    try:
        return collate_heard(cuts)
    except MemoryError:
        raise
    except Exception:  # the storage behind lhotse raises what it likes
        name_unreadable(cuts)
        raise

"""The batches that a teacher runs on, and their features."""

from dataclasses import dataclass
from typing import Container, Iterable, Iterator, List, Optional, Tuple

import torch
from lhotse.cut import Cut

from icefall_kd.errors import KDError
from icefall_kd.memory import enough_memory
from icefall_kd.targets.cuts import ANY_SECONDS, Seconds, gets_targets
from icefall_kd.targets.model_input import collate_input

# Seconds of a stretch of the manifest. One job does a whole stretch; a job that was cut
# short does its last stretch again. No option changes this number, so that jobs which
# continue with another --max-duration still have the same stretches.
STRETCH = 1000.0


def stretches(cuts: Iterable[Cut], seconds: float) -> Iterator[List[Cut]]:
    """Parts of a manifest, in file order.

    Args:
      cuts: All cuts.
      seconds: The sum of durations in a part, at most, if it has several cuts.
    """
    stretch: List[Cut] = []
    total = 0.0
    for cut in cuts:
        if stretch and total + cut.duration > seconds:
            yield stretch
            stretch, total = [], 0.0
        stretch.append(cut)
        total += cut.duration
    if stretch:
        yield stretch


def batches(stretch: List[Cut], max_duration: float) -> Iterator[List[Cut]]:
    """Batches of the cuts of a stretch, longest first.

    Args:
      stretch: The cuts.
      max_duration: Seconds in a batch, padding counted.
    """
    batch: List[Cut] = []
    for cut in sorted(stretch, key=lambda c: (-c.duration, c.id)):
        if batch and batch[0].duration * (len(batch) + 1) > max_duration:
            yield batch
            batch = []
        batch.append(cut)
    if batch:
        yield batch


@dataclass
class DumpBatch:
    """Cuts that the teacher runs on at once."""

    cuts: List[Cut]  # none where the stretch has no cut that gets targets
    stretch: Optional[List[Cut]]  # all of its cuts, with the last of its batches

    def __str__(self) -> str:
        longest = max(cut.duration for cut in self.cuts)
        seconds = longest * len(self.cuts)
        return (
            f"a batch of {len(self.cuts)} cuts, {seconds:.1f} s with padding, the "
            f"longest of them {self.cuts[0].id}"
        )


def batches_of(
    stretch: List[Cut], cuts: List[Cut], max_duration: float
) -> Iterator[DumpBatch]:
    """Batches of some cuts of a stretch, the last of them with the stretch.

    Args:
      stretch: All of its cuts.
      cuts: Those that a model runs on. For none there is one batch without cuts.
      max_duration: Seconds in a batch, padding counted.
    """
    parts = list(batches(cuts, max_duration)) or [[]]
    for part in parts[:-1]:
        yield DumpBatch(part, None)
    yield DumpBatch(parts[-1], stretch)


class DumpPlan:
    """The batches of one job, in their order.

    They are the same whatever was done before and whichever job does them, so each
    cut's targets are the same to the last bit: a stretch of cuts goes to one job.

    Args:
      cuts: All of them, in their order.
      max_duration: Seconds in a batch, padding counted.
      job: Whose batches, of ``num_jobs``, from 0 on.
      num_jobs: How many jobs share the cuts.
      cut_seconds: Shorter and longer cuts go without targets.
      done: Ids of cuts that the manifest has already.
    """

    def __init__(
        self,
        cuts: Iterable[Cut],
        max_duration: float,
        job: int = 0,
        num_jobs: int = 1,
        cut_seconds: Seconds = ANY_SECONDS,
        done: Container[str] = (),
    ) -> None:
        self.cuts, self.max_duration, self.done = cuts, max_duration, done
        self.job, self.num_jobs = job, num_jobs
        self.cut_seconds = cut_seconds

    def __iter__(self) -> Iterator[DumpBatch]:
        for i, stretch in enumerate(stretches(self.cuts, STRETCH)):
            if i % self.num_jobs != self.job or all(c.id in self.done for c in stretch):
                continue
            cuts = [cut for cut in stretch if gets_targets(cut, self.cut_seconds)]
            yield from batches_of(stretch, cuts, self.max_duration)


class FeatureReader(torch.utils.data.Dataset):
    """Reads the features of a batch, in a process of its own perhaps.

    Args:
      remedy: What helps where memory runs out.
    """

    def __init__(self, remedy: str = "free memory") -> None:
        self.remedy = remedy

    def __getitem__(self, batch: DumpBatch) -> Tuple:
        """The batch, its features (N, T, F) and its lengths (N,); None for no cuts."""
        if not batch.cuts:
            return batch, None, None
        with enough_memory(f"reading the features of {batch}", self.remedy):
            return (batch, *read_features(batch.cuts))


def read_features(cuts: List[Cut]) -> Tuple[torch.Tensor, torch.Tensor]:
    """The features of ``cuts`` as a model gets them; see :func:`collate_input`.

    Args:
      cuts: Cuts with stored features.

    Raises:
      KDError: features that can't be read.
    """
    try:
        return collate_input(cuts)
    except MemoryError:
        raise
    except Exception:  # the storage behind lhotse raises what it likes
        for cut in cuts:
            _check_readable(cut)
        raise


def _check_readable(cut: Cut) -> None:
    try:
        cut.load_features()
    except Exception as e:
        place = f"{cut.features.storage_path}/{cut.features.storage_key}"
        raise KDError(
            f"the features of cut {cut.id} can't be read from {place} "
            f"({type(e).__name__}): compute them again"
        ) from None

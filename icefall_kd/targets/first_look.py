"""A first look at training cuts, before any of them is trained on."""

from collections import Counter
from typing import Any
from typing import Counter as Counts
from typing import Iterable, Iterator

from lhotse.cut import Cut
from lhotse.lazy import (
    LazyInfiniteApproximateMultiplexer,
    LazyIteratorMultiplexer,
    LazyRepeater,
)
from tqdm.auto import tqdm

from icefall_kd.targets.model_input import check_supervision
from icefall_kd.targets.transcript import UNTRANSCRIBED, origin_of

SAMPLE = 1000  # cuts
# The attributes of Lhotse's lazy sets that hold what they are made of.
_SOURCES = ("cuts", "iterator", "iterators", "source")


def is_endless(cuts: Any) -> bool:
    """Return whether Lhotse's operations on cuts make a set that never ends.

    That is what ``repeat()`` without a number returns, and whatever is made of it.

    Args:
      cuts: A set of cuts, or a part of one.
    """
    if isinstance(cuts, LazyInfiniteApproximateMultiplexer):
        return True
    if isinstance(cuts, LazyRepeater) and cuts.times is None:
        return True
    if isinstance(cuts, (list, tuple)):
        return False  # of cuts
    sources = []
    for name in _SOURCES:
        source = getattr(cuts, name, None)
        if source is not None:
            sources += source if name == "iterators" else [source]
    endless = [is_endless(source) for source in sources]
    if isinstance(cuts, LazyIteratorMultiplexer) and cuts.stop_early:
        return bool(endless) and all(endless)
    return any(endless)


class FirstLook:
    """Cuts that are counted as they are read, with a progress bar.

    Of a Shar, all of which would be read from its storage, and of cuts without end, the
    first ``SAMPLE`` are looked at: a dataset's workers check each cut again.

    Args:
      cuts: The training cuts.
      silent: Whether the bar is hidden, as another process shows one.
    """

    def __init__(self, cuts: Iterable[Cut], silent: bool = False) -> None:
        self.cuts, self.silent = cuts, silent
        # Of all cuts; 0 where they were not read to their end.
        self.total = self.untranscribed = 0
        # The cuts that were looked at, by where their transcripts come from.
        self.origins: Counts[str] = Counter()

    def __iter__(self) -> Iterator[Cut]:
        endless = is_endless(self.cuts)
        total, self.origins = 0, Counter()
        with tqdm(
            desc="Looking at the training cuts",
            unit=" cuts",
            delay=2,
            mininterval=1,
            disable=self.silent,
        ) as bar:
            for cut in self.cuts:
                if total >= SAMPLE and (endless or _of_a_shar(cut)):
                    return
                total += 1
                check_supervision(cut)
                self.origins[origin_of(cut)] += 1
                bar.update()
                yield cut
        self.total, self.untranscribed = total, self.origins[UNTRANSCRIBED]

    def all(self) -> int:
        """Read all cuts; return how many there are."""
        for _ in self:
            pass
        return self.total


def _of_a_shar(cut: Cut) -> bool:
    # A mixed cut has no custom fields of its own in older versions of Lhotse.
    inner = [t.cut for t in getattr(cut, "tracks", None) or []] or [cut]
    return any((c.custom or {}).get("shard_origin") for c in inner)

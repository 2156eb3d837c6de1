"""Mixes manifests of different teaching into one that a recipe trains on.

Some cuts have a transcript of people, some one of a teacher, some none, and each may
have a teacher's targets or not. In training each cut gets the losses that it allows.
"""

import json
import random
from array import array
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any
from typing import Counter as Counts
from typing import Dict, Iterator, List, Sequence, Tuple

import numpy as np
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from tqdm.auto import tqdm

from icefall_kd.errors import disk_errors, require
from icefall_kd.files import making_folder, replacing
from icefall_kd.kinds.nbest import read_nbest
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.targets.manifest import open_manifest
from icefall_kd.targets.model_input import check_supervision
from icefall_kd.targets.reading import ONE_TEACHER
from icefall_kd.targets.store import (
    FIELD,
    is_left_out,
    read_fingerprint,
    tracks_with_targets,
)
from icefall_kd.targets.transcript import ORIGINS, UNTRANSCRIBED, origin_of

MOST_TIMES = 1000  # that a cut occurs
HEAD = ("manifest", *ORIGINS, "with targets", "hours", "times")


@dataclass
class Source:
    """A manifest that is mixed, and what it holds.

    Args:
      path: The manifest.
      weight: Its share of the cuts that come, beside the other manifests' weights.
    """

    path: str
    weight: float = 1.0
    cuts: int = 0  # that can be trained on
    seconds: float = 0.0
    left_out: int = 0  # without transcript, and a dump left them without targets
    with_targets: int = 0
    without_targets: int = 0  # those have n-best lists or transcripts
    origins: Counts[str] = field(default_factory=Counter)
    chosen: int = 0  # the cuts of it in the mix

    def row(self) -> Tuple[str, ...]:
        """Its row of the table below ``HEAD``."""
        numbers = [*(self.origins[o] for o in ORIGINS), self.with_targets]
        hours = f"{self.seconds / 3600:,.2f}"
        times = f"{self.chosen / self.cuts:.3g}"
        return (self.path, *(f"{n:,}" for n in numbers), hours, times)


class Survey:
    """Checks the cuts of all manifests, and counts them."""

    def __init__(self) -> None:
        self.hashes = array("Q")
        self.features: Tuple[Any, ...] = ()
        self.owner = ""  # the cut of these features
        self.stores: Dict[str, str] = {}  # by the first cut that points there

    def read(self, source: Source) -> None:
        """Check and count the cuts of a manifest.

        Args:
          source: The manifest; its counts are set.

        Raises:
          KDError: a cut that can't be trained on, or of other features than the rest.
        """
        bar = tqdm(
            ManifestCuts(source.path),
            desc=f"Reading {Path(source.path).name}",
            unit=" cuts",
            delay=2,
            leave=False,
        )
        for cut in bar:
            if not teaches(cut, source.path):
                source.left_out += 1
                continue
            self._check_features(cut, source.path)
            self.hashes.append(_hash(cut.id))
            stores = {pointer.store for _, _, pointer in tracks_with_targets(cut)}
            for store in stores - set(self.stores):
                self._check_store(store)
                self.stores[store] = cut.id
            source.cuts += 1
            source.seconds += cut.duration
            source.with_targets += bool(stores)
            source.without_targets += not stores
            source.origins[origin_of(cut)] += 1
        require(
            source.cuts,
            f"{source.path} has no cut that can be trained on, as `icefall-kd dump` "
            "left all of them out: leave the manifest out",
        )

    def _check_features(self, cut: Cut, path: str) -> None:
        found: Tuple[Any, ...] = ("no features", cut.sampling_rate)
        if cut.has_features:
            size, shift = cut.num_features, cut.frame_shift
            found = (f"{size} features every {shift:g} s", cut.sampling_rate)
        self.features = self.features or found
        self.owner = self.owner or f"the cut {cut.id} of {path}"
        require(
            found == self.features,
            f"the cut {cut.id} of {path} has {found[0]} at {found[1]} Hz and "
            f"{self.owner} {self.features[0]} at {self.features[1]} Hz: compute all "
            "by the same extractor",
        )

    def _check_store(self, store: str) -> None:
        for other in list(self.stores)[:1]:
            fingerprint = read_fingerprint(store)
            fingerprint.check_same(read_fingerprint(other), store, other, ONE_TEACHER)

    def check_ids(self, sources: Sequence[Source]) -> None:
        """Refuse an id that occurs twice.

        Args:
          sources: All manifests, which were read.

        Raises:
          KDError: an id of two cuts.
        """
        hashes, counts = np.unique(np.asarray(self.hashes), return_counts=True)
        suspects = set(
            hashes[counts > 1].tolist()
        )  # few differ, as hashes have 64 bits
        if not suspects:
            return
        seen: Dict[str, str] = {}
        for source in sources:
            for cut in ManifestCuts(source.path):
                if _hash(cut.id) not in suspects:
                    continue
                require(
                    cut.id not in seen,
                    f"the cut id {cut.id} is in {seen.get(cut.id)} and in "
                    f"{source.path}"
                    f"{' twice' if seen.get(cut.id) == source.path else ''}: leave it "
                    "out of one, or give the cuts other ids before targets are dumped",
                )
                seen[cut.id] = source.path


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def teaches(cut: Cut, path: str) -> bool:
    """Return whether anything can teach a student on a cut.

    Args:
      cut: The cut.
      path: Its manifest, for messages.

    Returns:
      False where nothing can since a dump left it out.

    Raises:
      KDError: a cut without transcript, targets or n-best list, or with another number
        of supervisions than 1.
    """
    check_supervision(cut)
    if origin_of(cut) != UNTRANSCRIBED or tracks_with_targets(cut) or read_nbest(cut):
        return True
    require(
        is_left_out(cut),
        f"the cut {cut.id} of {path} has no transcript and no targets, so nothing "
        "teaches on it: label it with `icefall-kd label`, dump its targets with "
        "`icefall-kd dump`, or leave it out",
    )
    return False


def choose_counts(sources: Sequence[Source], weighted: bool) -> None:
    """Choose how many cuts of each manifest are in the mix.

    With weights the numbers are in their ratio, and as small as they can be for each
    cut to occur. Without, each cut occurs once.

    Args:
      sources: The manifests; ``chosen`` is set.
      weighted: Whether the weights count.

    Raises:
      KDError: weights by which cuts would occur too often.
    """
    scale = max(s.cuts / s.weight for s in sources)
    for source in sources:
        source.chosen = round(source.weight * scale) if weighted else source.cuts
        times = source.chosen / source.cuts
        require(
            times <= MOST_TIMES,
            f"with these weights each of the {source.cuts} cuts of {source.path} "
            f"occurs {times:.0f} times before all other cuts have occurred once, and "
            f"at most {MOST_TIMES} are allowed: give it a lower --weight",
        )


def mixed(sources: Sequence[Source], seed: int) -> Iterator[Cut]:
    """Yield the cuts of the mix.

    At each place the manifests' chances are the cuts that each has left. So the numbers
    are exact and the ratio is the same throughout, where Lhotse's ``mux`` ends with
    what is left of one.

    Args:
      sources: The manifests, with ``chosen``.
      seed: Of the random order.
    """
    draw = random.Random(seed)
    streams = [_again_and_again(source.path) for source in sources]
    left = [source.chosen for source in sources]
    while any(left):
        (i,) = draw.choices(range(len(left)), weights=left)
        left[i] -= 1
        yield next(streams[i])


def _again_and_again(path: str) -> Iterator[Cut]:
    """The cuts of a manifest, whose ids get a number from the second time on."""
    for time in count():
        for cut in ManifestCuts(path):
            if not teaches(cut, path):
                continue
            yield prepared(cut if not time else cut.with_id(f"{cut.id}_repeat{time}"))


def prepared(cut: Cut) -> Cut:
    """Return a cut as every recipe can read it, wherever the mix lies.

    Args:
      cut: The cut.

    Returns:
      Its missing text is "", which a recipe's filter of its cuts can encode, and its
      pointers name the stores that were found.
    """
    for _, inner, pointer in tracks_with_targets(cut):
        inner.custom[FIELD] = pointer.to_dict()
    if origin_of(cut) == UNTRANSCRIBED:
        cut = cut.map_supervisions(lambda s: fastcopy(s, text=""))
    return cut


def mix(
    out_cuts: Path, sources: Sequence[Source], weighted: bool, seed: int = 0
) -> List[Tuple[str, ...]]:
    """Write the mix of several manifests.

    Args:
      out_cuts: The manifest to write.
      sources: The manifests.
      weighted: Whether their weights count; else each cut occurs once.
      seed: Of the random order.

    Returns:
      A table of what is in it.

    Raises:
      KDError: cuts that do not fit together, or that nothing teaches on. Then nothing
        is written.
    """
    survey = Survey()
    for source in sources:
        survey.read(source)
    survey.check_ids(sources)
    choose_counts(sources, weighted)
    total = sum(source.chosen for source in sources)
    with ExitStack() as stack:
        stack.enter_context(disk_errors(out_cuts))
        stack.enter_context(making_folder(out_cuts.parent))
        temporary = stack.enter_context(replacing(out_cuts, shared=True))
        bar = tqdm(
            mixed(sources, seed),
            desc="Mixing",
            unit=" cuts",
            total=total,
            delay=2,
            leave=False,
        )
        with open_manifest(temporary, "wb") as out:
            for cut in bar:
                line = json.dumps(cut.to_dict(), ensure_ascii=False)
                out.write(line.encode() + b"\n")
    return [HEAD, *(source.row() for source in sources)]

"""The cuts of a manifest, checked before a teacher runs on them."""

import gzip
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Set, Tuple

from lhotse import CutSet, Features
from lhotse.cut import Cut
from tqdm.auto import tqdm

from icefall_kd.errors import KDError, require
from icefall_kd.targets.model_input import input_frames, why_unusable
from icefall_kd.targets.places import look_beside

UNUSABLE_AT_MOST = 1 / 20  # of the cuts
Seconds = Tuple[float, float]  # of the shortest and of the longest cut
ANY_SECONDS: Seconds = (0.0, math.inf)
Check = Callable[[Cut], Any]  # raises a KDError for a cut that can't be used


class ManifestCuts:
    """The cuts of a manifest, or of the folder of a Shar, checked as they are read.

    They can be iterated over as often as is needed.

    Args:
      path: The manifest or the folder.
      light: Whether to leave the arrays of a Shar unread.

    Raises:
      KDError: nothing there, what can't be read, or no cuts; while iterating, a
        manifest that is damaged beyond its first cut.
    """

    def __init__(self, path: str, light: bool = False) -> None:
        self.path = path
        require(
            Path(path).exists(),
            f"the manifest {path} does not exist: make the features first",
        )
        try:
            look_beside(Path(path).parent)
            is_shar = Path(path).is_dir()
            if is_shar and light:
                cuts = CutSet.from_shar(fields={"cuts": shards_of(Path(path))})
            elif is_shar:
                cuts = CutSet.from_shar(in_dir=path)
            else:
                cuts = CutSet.from_file(path)
        except Exception as e:  # json, gzip and lhotse raise many kinds
            raise KDError(
                f"the manifest {path} can't be read ({type(e).__name__}): make it again"
            ) from None
        require(
            cuts is not None and next(iter(cuts), None) is not None,
            f"the manifest {path} holds no cuts: make the data again",
        )
        self.cuts = cuts

    def __iter__(self) -> Iterator[Cut]:
        try:
            for cut in self.cuts:
                _check_types(cut)
                yield cut
        except Exception as e:  # json, gzip and lhotse raise many kinds
            failed_disk = isinstance(e, OSError) and not isinstance(e, gzip.BadGzipFile)
            if isinstance(e, KDError) or failed_disk:
                raise
            raise KDError(
                f"the manifest {self.path} can't be read to its end "
                f"({type(e).__name__}): make it again"
            ) from None


def shards_of(shar: Path, field: str = "cuts") -> List[Path]:
    """The jsonl files of a Shar's field, in their order.

    Args:
      shar: The Shar's folder.
      field: The name of the field.
    """
    return sorted(p for p in shar.glob(f"{field}.*") if ".jsonl" in p.suffixes)


@dataclass
class Survey:
    """Counts the cuts of a manifest: which get targets, and why others don't.

    Args:
      path: The manifest.
      cut_seconds: The shortest and the longest cut that get targets.
      why_not: Returns why a cut can't be used, "" if it can.
    """

    path: str
    cut_seconds: Seconds = ANY_SECONDS
    why_not: Callable[[Cut], str] = why_unusable
    total: int = 0  # cuts
    seconds: float = 0.0  # of the cuts that get targets
    features: Optional[Features] = None  # of the first cut that gets targets
    outside: int = 0  # shorter or longer than ``cut_seconds``
    unusable: int = 0  # cuts that can't be used
    first_unusable: str = ""  # its id, and why
    longer: int = 0  # cuts of which a recipe uses the first frames alone
    first_longer: str = ""

    def count(self, cut: Cut) -> bool:
        """Count ``cut``; return whether the teacher runs on it."""
        self.total += 1
        if not is_within(cut, self.cut_seconds):
            self.outside += 1
            return False
        reason = self.why_not(cut)
        if reason:
            self.unusable += 1
            first = f"the cut {cut.id} of {self.path} {reason}"
            self.first_unusable = self.first_unusable or first
            return False
        self.features = self.features or cut.features
        if input_frames(cut) < cut.num_frames - 1:  # not by rounding
            self.longer += 1
            self.first_longer = self.first_longer or cut.id
        self.seconds += cut.duration
        return True

    def check(self) -> None:
        """Refuse a manifest of which too few cuts can be used, or none."""
        require(
            self.unusable <= UNUSABLE_AT_MOST * self.total,
            f"{self.first_unusable}, and {self.unusable} of the {self.total} cuts are "
            "such, which is more than 1 in 20: mend them or leave them out",
        )
        shortest, longest = self.cut_seconds
        require(
            self.features is not None,
            f"none of the {self.total} cuts in {self.path} is {shortest:g} to "
            f"{longest:g} s long: give other bounds with `cut_seconds`",
        )

    def warn(self) -> None:
        """Log how many cuts go without targets, or are not used to their end."""
        shortest, longest = self.cut_seconds
        if self.outside:
            logging.warning(
                f"{self.outside} of {self.total} cuts are not {shortest:g} to "
                f"{longest:g} s long: they are left out"
            )
        if self.unusable:
            logging.warning(
                f"{self.unusable} of {self.total} cuts can't be used and are left out: "
                f"{self.first_unusable}"
            )
        if self.longer:
            logging.warning(
                f"{self.longer} of {self.total} cuts are longer than their "
                f"supervision, {self.first_longer} the first: recipe and teacher use "
                "as many frames as the supervision has, from the cut's first on, and "
                "the recipe fails where such a cut is the longest of its batch; "
                "`lhotse cut trim-to-supervisions` mends it"
            )


def is_within(cut: Cut, cut_seconds: Seconds) -> bool:
    """Whether a cut is no shorter and no longer than two bounds.

    Args:
      cut: Any cut.
      cut_seconds: The durations of the shortest and of the longest cut.
    """
    return cut_seconds[0] <= cut.duration <= cut_seconds[1]


def gets_targets(cut: Cut, cut_seconds: Seconds) -> bool:
    """Whether the teacher runs on ``cut``.

    Args:
      cut: Any cut.
      cut_seconds: The durations of the shortest and of the longest cut.
    """
    return is_within(cut, cut_seconds) and not why_unusable(cut)


def _check_types(cut: Cut) -> None:
    """Refuse what Lhotse takes from a manifest without a look at it.

    Raises:
      TypeError: an id or a text that is none, or numbers that are none.
    """
    numbers = [cut.start, cut.duration]
    features = getattr(cut, "features", None)
    if features is not None:
        names = ("num_frames", "num_features", "frame_shift", "sampling_rate")
        numbers += [getattr(features, name) for name in names]
    texts = [cut.id, *(s.text for s in cut.supervisions if s.text is not None)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text")
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        raise TypeError("a number")


def checked(
    survey: Survey,
    num_features: int,
    checks: Sequence[Check] = (),
    light: bool = True,
) -> Iterator[Cut]:
    """The cuts of a manifest that get targets; one that is wrong is refused.

    Args:
      survey: Names the manifest, and counts all of its cuts.
      num_features: Features in a frame that the teacher takes.
      checks: What else each of these cuts has to pass.
      light: Whether to leave the arrays of a Shar unread.

    Raises:
      KDError: a cut that occurs twice, or has no features or those of another kind.
    """
    path = survey.path
    seen: Set[str] = set()
    for cut in ManifestCuts(path, light):
        require(
            cut.id not in seen,
            f"the cut id {cut.id} occurs twice in {path}: make cut ids unique",
        )
        seen.add(cut.id)
        problem = _problem(cut, num_features, survey.features)
        require(not problem, f"the cut {cut.id} of {path} {problem}")
        if survey.count(cut):
            for check in checks:
                check(cut)
            yield cut


def _problem(cut: Cut, num_features: int, first: Optional[Features]) -> str:
    """Return why no command can use a cut; "" if it can be used."""
    if not cut.has_features:
        return (
            "has no features, and a teacher's targets are stored for precomputed ones: "
            "compute them first; a recipe that computes them on the fly can run the "
            "teacher in training, --kd-teacher-exp-dir"
        )
    if cut.num_features != num_features:
        return (
            f"has {cut.num_features} features a frame and the teacher takes "
            f"{num_features}: give the features that it was trained on"
        )
    features = getattr(cut, "features", None)  # a mixed cut's are its tracks'
    if first is None or features is None:
        return ""
    for name in ("type", "frame_shift", "sampling_rate"):
        value, expected = getattr(features, name, None), getattr(first, name)
        if value != expected:
            return (
                f"has features of {name} {value} and the cuts before it of {expected}: "
                "compute all by the same extractor, or dump each kind into a store of "
                "its own"
            )
    return ""


def survey(
    path: str,
    num_features: int,
    checks: Sequence[Check] = (),
    cut_seconds: Seconds = ANY_SECONDS,
) -> Survey:
    """Check all cuts of a manifest before the teacher starts; see :func:`checked`.

    Args:
      path: The manifest, or the folder of a Shar.
      num_features: Features in a frame that the teacher takes.
      checks: What else each cut that gets targets has to pass.
      cut_seconds: The durations of the shortest and of the longest cut that get them.

    Raises:
      KDError: a cut that is wrong, or too few that can be used.
    """
    counts = Survey(path, cut_seconds)
    bar = tqdm(
        checked(counts, num_features, checks),
        desc="Checking the cuts",
        unit=" cuts",
        delay=2,
        leave=False,
    )
    with bar:
        for _ in bar:
            pass
    counts.check()
    return counts

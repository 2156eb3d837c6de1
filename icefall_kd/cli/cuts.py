"""The cuts that a command reads, checked before the teacher hears them."""

import gzip
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Set, Tuple

from lhotse import CutSet, Features
from lhotse.cut import Cut
from tqdm.auto import tqdm

from icefall_kd.errors import KDError
from icefall_kd.targets.heard import heard_frames, why_unheard
from icefall_kd.targets.places import look_beside
from icefall_kd.zipformer import encoder_frames

SPACE = "\u2581"  # sentencepiece's
UNHEARD_AT_MOST = 1 / 20  # of the cuts
Seconds = Tuple[float, float]  # of the shortest and of the longest cut
ANY_SECONDS: Seconds = (0.0, math.inf)


def open_cuts(path: str, light: bool = False) -> CutSet:
    """The cuts of a manifest, or of a Shar's folder; if ``light``, without arrays."""
    if not Path(path).exists():
        raise KDError(f"the manifest {path} does not exist: make the features first")
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
    if cuts is None or next(iter(cuts), None) is None:
        raise KDError(f"the manifest {path} holds no cuts: make the data again")
    return cuts


def shards_of(shar: Path, field: str = "cuts") -> List[Path]:
    """The jsonl files of a Shar's field, in their order."""
    return sorted(p for p in shar.glob(f"{field}.*") if ".jsonl" in p.suffixes)


def readable(cuts: CutSet, path: str) -> Iterator[Cut]:
    """The cuts, with a sentence for a manifest that is damaged beyond its first."""
    try:
        for cut in cuts:
            _check_types(cut)
            yield cut
    except Exception as e:  # json, gzip and lhotse raise many kinds
        failed_disk = isinstance(e, OSError) and not isinstance(e, gzip.BadGzipFile)
        if isinstance(e, KDError) or failed_disk:
            raise
        raise KDError(
            f"the manifest {path} can't be read to its end ({type(e).__name__}): make "
            "it again"
        ) from None


@dataclass
class Survey:
    """What a look at the cuts of a manifest found.

    Args:
      path: The manifest.
      seconds: Cuts that are shorter or longer are left out.
      why_not: Says why a cut can't be used, "" if it can.
    """

    path: str
    seconds: Seconds = ANY_SECONDS
    why_not: Callable[[Cut], str] = why_unheard
    total: int = 0  # cuts
    features: Optional[Features] = None  # of the first cut that is heard
    outside: int = 0  # shorter or longer than ``seconds``
    unheard: int = 0  # cuts that can't be used
    first_unheard: str = ""  # its id, and why
    longer: int = 0  # cuts of which a recipe hears the first frames alone
    first_longer: str = ""

    def count(self, cut: Cut) -> bool:
        """Count ``cut``; return whether the teacher is to hear it."""
        self.total += 1
        if not is_within(cut, self.seconds):
            self.outside += 1
            return False
        reason = self.why_not(cut)
        if reason:
            self.unheard += 1
            self.first_unheard = (
                self.first_unheard or f"the cut {cut.id} of {self.path} {reason}"
            )
            return False
        self.features = self.features or cut.features
        if heard_frames(cut) < cut.num_frames - 1:  # not by rounding
            self.longer += 1
            self.first_longer = self.first_longer or cut.id
        return True

    def check(self) -> None:
        """Refuse a manifest of which the teacher hears too little, or nothing."""
        if self.unheard > UNHEARD_AT_MOST * self.total:
            raise KDError(
                f"{self.first_unheard}, and {self.unheard} of the {self.total} cuts "
                "are such, which is more than 1 in 20: mend them or leave them out"
            )
        if self.features is None:
            shortest, longest = self.seconds
            raise KDError(
                f"none of the {self.total} cuts in {self.path} is {shortest:g} to "
                f"{longest:g} s long: give --cut-seconds other bounds"
            )

    def warn(self) -> None:
        """Say which cuts the teacher does not hear, or not whole."""
        if self.outside:
            shortest, longest = self.seconds
            logging.warning(
                f"{self.outside} of {self.total} cuts are not {shortest:g} to "
                f"{longest:g} s long: they are left out"
            )
        if self.unheard:
            logging.warning(
                f"{self.unheard} of {self.total} cuts can't be used and are left out: "
                f"{self.first_unheard}"
            )
        if self.longer:
            logging.warning(
                f"{self.longer} of {self.total} cuts are longer than their "
                f"supervision, {self.first_longer} the first: recipe and teacher hear "
                "as many frames as the supervision has, from the cut's first on, and "
                "the recipe fails where such a cut is the longest of its batch; "
                "`lhotse cut trim-to-supervisions` mends it"
            )


def is_within(cut: Cut, seconds: Seconds) -> bool:
    """Whether a cut is no shorter and no longer than ``seconds``."""
    return seconds[0] <= cut.duration <= seconds[1]


def parse_seconds(text: str) -> Seconds:
    """The bounds of ``--cut-seconds``, "1:20"; all lengths where it is ""."""
    if not text:
        return ANY_SECONDS
    try:
        shortest, longest = map(float, text.split(":"))
    except ValueError:
        shortest = longest = math.nan
    if not 0 <= shortest <= longest:
        raise KDError(
            f"--cut-seconds is {text!r}: give the seconds of the shortest and of the "
            "longest cut that is trained on, such as 1:20"
        )
    return shortest, longest


def _check_types(cut: Cut) -> None:
    """Refuse what Lhotse takes from a manifest as it stands there.

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
    asked: Sequence[Callable[[Cut], Any]] = (),
    light: bool = True,
) -> Iterator[Cut]:
    """The cuts that the teacher hears, one by one; a cut that is wrong is refused.

    Args:
      survey: Of the manifest to read; it counts all cuts.
      num_features: What the teacher takes.
      asked: Functions that are to come, each refusing a cut that it can't do.
      light: Whether to leave the arrays of a Shar unread.
    """
    path = survey.path
    seen: Set[str] = set()
    for cut in readable(open_cuts(path, light), path):
        if cut.id in seen:
            raise KDError(
                f"the cut id {cut.id} occurs twice in {path}: make cut ids unique"
            )
        seen.add(cut.id)
        problem = _problem(cut, num_features, survey.features)
        if problem:
            raise KDError(f"the cut {cut.id} of {path} {problem}")
        if survey.count(cut):
            for function in asked:
                function(cut)
            yield cut


def _problem(cut: Cut, num_features: int, first: Optional[Features]) -> str:
    """Why no command can go on with a cut like this one; "" if it can."""
    if not cut.has_features:
        return (
            "has no features, and what is stored of a teacher is what it says on "
            "precomputed ones: compute them first; a recipe that computes them on the "
            "fly can ask the teacher in training, --kd-teacher-exp-dir"
        )
    if cut.num_features != num_features:
        return (
            f"has {cut.num_features} features a frame and the teacher takes "
            f"{num_features}: give the features that it was trained on"
        )
    return _strange(cut, first)


def _strange(cut: Cut, first: Optional[Features]) -> str:
    """How a cut's features differ in kind from those of the first one."""
    features = getattr(cut, "features", None)  # a mixed cut's are its tracks'
    for name in ("type", "frame_shift", "sampling_rate"):
        value = getattr(features, name, None)
        if None not in (first, features) and value != getattr(first, name):
            return (
                f"has features of {name} {value} and the cuts before it of "
                f"{getattr(first, name)}: compute all by the same extractor, or dump "
                "each kind into a store of its own"
            )
    return ""


def survey(
    path: str,
    num_features: int,
    asked: Sequence[Callable[[Cut], Any]] = (),
    seconds: Seconds = ANY_SECONDS,
) -> Survey:
    """Check all cuts before the teacher starts; see :func:`checked`."""
    counts = Survey(path, seconds)
    bar = tqdm(
        checked(counts, num_features, asked),
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


def labels_of(
    cuts: List[Cut],
    sp: Any,
    use: str = "a lattice",
    remedy: str = "dump without --keep-lattice",
) -> List[List[int]]:
    """The labels of each transcript; ``use`` is what needs them."""
    for cut in cuts:
        if len(cut.supervisions) != 1 or not (cut.supervisions[0].text or "").strip():
            raise KDError(
                f"the cut {cut.id} has no transcript, and {use} needs one: leave it "
                f"out, or {remedy}"
            )
    return sp.encode([c.supervisions[0].text for c in cuts], out_type=int)


def is_unknown(labels: List[int], sp: Any) -> bool:
    """Whether the tokens know nothing of a transcript."""
    return {sp.unk_id(), sp.piece_to_id(SPACE)}.issuperset(labels)


def why_long(cut: Cut, labels: List[int], use: str) -> str:
    """Why ``labels`` are too many for ``use``, as the rest of a sentence, or ""."""
    if fits(cut, labels):
        return ""
    return (
        f"has {len(labels)} labels and the teacher gives "
        f"{encoder_frames(heard_frames(cut))} frames, and {use} needs as many frames"
    )


def fits(cut: Cut, labels: List[int]) -> bool:
    """Whether the teacher gives as many frames as there are labels.

    Where it doesn't, no path gets through a lattice, and icefall's training leaves the
    cut out.
    """
    return len(labels) <= encoder_frames(heard_frames(cut))


def name_unreadable(batch: List[Cut]) -> None:
    for cut in batch:
        try:
            cut.load_features()
        except Exception as e:
            f = cut.features
            raise KDError(
                f"the features of cut {cut.id} can't be read from "
                f"{f.storage_path}/{f.storage_key} ({type(e).__name__}): compute them "
                "again"
            ) from None

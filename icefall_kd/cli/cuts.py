"""The cuts that a command reads, checked before the teacher hears them."""

import gzip
import math
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Set, Tuple

from lhotse import CutSet, Features
from lhotse.cut import Cut, MonoCut
from tqdm.auto import tqdm

from icefall_kd.errors import KDError
from icefall_kd.hook import MIN_FRAMES, encoder_frames

SPACE = "\u2581"  # sentencepiece's


def open_cuts(path: str, light: bool = False) -> CutSet:
    """The cuts of a manifest, or of a Shar's folder; if ``light``, without arrays."""
    if not Path(path).exists():
        raise KDError(f"the manifest {path} does not exist: make the features first")
    try:
        is_shar = Path(path).is_dir()
        if is_shar and light:
            shards = sorted(Path(path).glob("cuts.*"))
            cuts = CutSet.from_shar(fields={"cuts": shards})
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
    path: str,
    num_features: int,
    asked: Sequence[Callable[[Cut], Any]] = (),
    light: bool = True,
) -> Iterator[Cut]:
    """The cuts of ``path`` one by one, refused where the teacher can't hear them.

    Args:
      num_features: What the teacher takes.
      asked: Functions that are to come, each refusing a cut that it can't do.
      light: Whether to leave the arrays of a Shar unread.
    """
    seen: Set[str] = set()
    first: Optional[Features] = None
    for cut in readable(open_cuts(path, light), path):
        problem = _problem(cut, num_features) or _strange(cut, first)
        if problem:
            raise KDError(f"the cut {cut.id} of {path} {problem}")
        if cut.id in seen:
            raise KDError(
                f"the cut id {cut.id} occurs twice in {path}: make cut ids unique"
            )
        for function in asked:
            function(cut)
        first = first or cut.features
        seen.add(cut.id)
        yield cut


def _problem(cut: Cut, num_features: int) -> str:
    if not isinstance(cut, MonoCut):
        return (
            f"is a {type(cut).__name__} and must be a MonoCut: dump the teacher "
            "before mixing, padding or appending"
        )
    if not cut.has_features:
        return "has no features: compute them first"
    if cut.num_features != num_features:
        return (
            f"has {cut.num_features} features a frame and the teacher takes "
            f"{num_features}: give the features that it was trained on"
        )
    if cut.num_frames < MIN_FRAMES:
        return (
            f"has {cut.num_frames} feature frames and the teacher needs "
            f"{MIN_FRAMES}: leave it out"
        )
    return ""


def _strange(cut: Cut, first: Optional[Features]) -> str:
    """How a cut's features differ in kind from those of the first one."""
    for name in ("type", "frame_shift", "sampling_rate"):
        value = getattr(cut.features, name)
        if first is not None and value != getattr(first, name):
            return (
                f"has features of {name} {value} and the cuts before it of "
                f"{getattr(first, name)}: compute all by the same extractor, or dump "
                "each kind into a store of its own"
            )
    return ""


def survey(
    path: str, num_features: int, asked: Sequence[Callable[[Cut], Any]] = ()
) -> Tuple[Features, int]:
    """Check all cuts before the teacher starts; the features of one, and how many."""
    bar = tqdm(
        checked(path, num_features, asked),
        desc="Checking the cuts",
        unit=" cuts",
        delay=2,
        leave=False,
    )
    found, total = None, 0
    with bar:
        for cut in bar:
            found = found or cut.features
            total += 1
    return found, total


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


def refuse_long(cuts: List[Cut], y: List[List[int]], use: str) -> None:
    """Refuse a cut with more labels than frames, for ``use``."""
    for cut, labels in zip(cuts, y):
        if not fits(cut, labels):
            raise KDError(
                f"the cut {cut.id} has {len(labels)} labels and the teacher gives "
                f"{encoder_frames(cut.num_frames)} frames, and {use} needs as many "
                "frames: leave it out, as icefall's training does"
            )


def fits(cut: Cut, labels: List[int]) -> bool:
    """Whether the teacher gives as many frames as there are labels.

    Where it doesn't, no path gets through a lattice, and icefall's training leaves the
    cut out.
    """
    return len(labels) <= encoder_frames(cut.num_frames)


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

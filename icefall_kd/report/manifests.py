"""Seconds of speech in test sets, and bytes of targets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterable, List

from lhotse.cut import Cut

from icefall_kd.errors import KDError
from icefall_kd.targets.store import read_fingerprint, tracks_with_targets


@dataclass
class Stored:
    """What the targets of a manifest take.

    Args:
      cuts: That have targets, of ``all_cuts``.
      seconds: Of speech that has targets.
      sizes: Bytes of each part, such as ctc.
      kept: How they are kept, such as ctc adaptive:0.999:16; once for each form.
      missing: Stores that can't be asked how they are kept.
    """

    all_cuts: int = 0
    cuts: int = 0
    frames: int = 0
    seconds: float = 0.0
    sizes: Dict[str, int] = field(default_factory=dict)
    kept: List[str] = field(default_factory=list)
    missing: List[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def manifests_of(folder: Path, test_set: str) -> List[Path]:
    """The manifests of a set, by icefall's names: ``*cuts_<set>.jsonl.gz``."""
    end = f"cuts_{_plain(test_set)}.jsonl.gz"
    return sorted(p for p in folder.glob("*.jsonl.gz") if _plain(p.name).endswith(end))


def seconds_of(cuts: Iterable[Cut]) -> float:
    return sum(cut.duration for cut in cuts)


def stored_by(cuts: Iterable[Cut]) -> Stored:
    """Add up the targets that cuts carry.

    Raises:
      KDError: a cut whose targets are damaged.
    """
    found = Stored()
    stores = {}
    for cut in cuts:
        tracks = tracks_with_targets(cut)
        found.all_cuts += 1
        found.cuts += bool(tracks)
        for _, _, pointer in tracks:
            stores[pointer.store] = None
            found.frames += pointer.frames
            found.seconds += pointer.duration
            for name, size in pointer.sizes.items():
                found.sizes[name] = found.sizes.get(name, 0) + size
    for store in stores:
        try:
            mark = read_fingerprint(store)
        except KDError:
            found.missing.append(store)
            continue
        kept = ", ".join(f"{name} {form}" for name, form in mark.forms.items())
        if kept not in found.kept:
            found.kept.append(kept)
    return found


def _plain(name: str) -> str:
    """Recipes differ in the case and the hyphens of a set's names."""
    return name.lower().replace("_", "-").replace("cuts-", "cuts_")

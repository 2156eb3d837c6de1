"""Speakers of test sets, and bytes of targets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterable, List

from lhotse.cut import Cut

from icefall_kd.errors import KDError
from icefall_kd.targets.store import read_fingerprint, tracks_with_targets


@dataclass
class TargetSizes:
    """The size of the targets of a manifest.

    Args:
      all_cuts: The number of its cuts.
      cuts: The number of cuts that have targets.
      seconds: Seconds of speech that have targets.
      sizes: Bytes of each kind, such as ctc.
      forms: How the stores keep targets, such as "ctc adaptive:0.999:16".
      missing: Stores whose fingerprint can't be read.
    """

    all_cuts: int = 0
    cuts: int = 0
    seconds: float = 0.0
    sizes: Dict[str, int] = field(default_factory=dict)
    forms: List[str] = field(default_factory=list)
    missing: List[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all kinds."""
        return sum(self.sizes.values())


def manifests_of(folder: Path, test_set: str) -> List[Path]:
    """The manifests of a test set, by icefall's names ``*cuts_<set>.jsonl.gz``.

    Args:
      folder: The folder of manifests.
      test_set: The set's name; case and hyphens may differ from the manifest's.
    """

    def plain(name: str) -> str:
        return name.lower().replace("_", "-").replace("cuts-", "cuts_")

    end = f"cuts_{plain(test_set)}.jsonl.gz"
    return sorted(p for p in folder.glob("*.jsonl.gz") if plain(p.name).endswith(end))


def speakers_of(cuts: Iterable[Cut]) -> Dict[str, str]:
    """The speaker of each cut id, without the cuts that don't have one speaker.

    Args:
      cuts: The cuts of a test set.
    """
    speakers = {}
    for cut in cuts:
        names = {s.speaker for s in cut.supervisions}
        if len(names) == 1 and None not in names:
            speakers[cut.id] = names.pop()
    return speakers


def measure_targets(cuts: Iterable[Cut]) -> TargetSizes:
    """Add up the targets of ``cuts``.

    Raises:
      KDError: the targets of a cut are damaged.
    """
    total = TargetSizes()
    stores = {}  # in the order of the cuts
    for cut in cuts:
        tracks = tracks_with_targets(cut)
        total.all_cuts += 1
        total.cuts += bool(tracks)
        for _, _, pointer in tracks:
            stores[pointer.store] = None
            total.seconds += pointer.duration
            for name, size in pointer.sizes.items():
                total.sizes[name] = total.sizes.get(name, 0) + size
    for store in stores:
        try:
            forms = read_fingerprint(store).forms
        except KDError:
            total.missing.append(store)
            continue
        form = ", ".join(f"{kind} {form}" for kind, form in forms.items())
        if form not in total.forms:
            total.forms.append(form)
    return total

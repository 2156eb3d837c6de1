"""The cuts of a manifest that are decoded, checked before a model runs on them."""

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from lhotse import Features
from lhotse.cut import Cut, MultiCut
from tqdm.auto import tqdm

from icefall_kd.errors import require
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.targets.model_input import check_supervision
from icefall_kd.targets.transcript import has_no_text

_SET = re.compile(r"(?:.*_)?cuts[_-](.+)")


@dataclass
class CutsToDecode:
    """What is known of a manifest's cuts.

    Args:
      path: The manifest.
      num_features: Features in a frame that the model takes.
      sampling_rate: Samples a second of the audio that features are computed from; None
        where they are stored.
    """

    path: str
    num_features: int
    sampling_rate: Optional[int] = None
    seconds: float = 0.0  # of all cuts
    # The text of each cut in the manifest's order; None for a cut without one.
    texts: Dict[str, Optional[str]] = field(default_factory=dict)
    features: Optional[Features] = None  # of the first cut
    # The shortest cut of half a second or more, or the first one: its id and seconds.
    shortest: Tuple[str, float] = ("", math.inf)

    def survey(self) -> "CutsToDecode":
        """Check all cuts, and return this object.

        Raises:
          KDError: a cut that can't be decoded.
        """
        bar = tqdm(
            ManifestCuts(self.path, light=True),
            desc="Checking the cuts",
            unit=" cuts",
            delay=2,
            leave=False,
        )
        with bar:
            for cut in bar:
                self._count(cut)
        return self

    def _count(self, cut: Cut) -> None:
        require(
            cut.id not in self.texts,
            f"the cut id {cut.id} occurs twice in {self.path}: make cut ids unique",
        )
        problem = self.problem(cut)
        require(not problem, f"the cut {cut.id} of {self.path} {problem}")
        if cut.supervisions:
            check_supervision(cut)
        text = None if has_no_text(cut) else cut.supervisions[0].text
        self.texts[cut.id] = text
        self.seconds += cut.duration
        if not self.shortest[0]:
            self.shortest = (cut.id, math.inf)
        if 0.5 <= cut.duration < self.shortest[1]:
            self.shortest = (cut.id, cut.duration)

    def problem(self, cut: Cut) -> str:
        """Why a cut can't be decoded, as the rest of a sentence; "" if it can.

        Args:
          cut: The next one of the manifest: its features must be as those before.
        """
        if self.sampling_rate is not None:
            return _audio_problem(cut, self.sampling_rate)
        if not cut.has_features:
            return (
                "has no features: compute them first, or give --on-the-fly-feats 1 if "
                "the model was trained on lhotse's Fbank of the audio"
            )
        if cut.num_features != self.num_features:
            return (
                f"has {cut.num_features} features a frame and the model takes "
                f"{self.num_features}: give the features that it was trained on"
            )
        features = getattr(cut, "features", None)  # a mixed cut's are its tracks'
        for name in ("type", "frame_shift", "sampling_rate") if features else ():
            value, first = getattr(features, name), getattr(self.features, name, None)
            if self.features is not None and value != first:
                return (
                    f"has features of {name} {value} and the cuts before it of "
                    f"{first}: compute all by the same extractor"
                )
        self.features = self.features or features
        return ""


def _audio_problem(cut: Cut, sampling_rate: int) -> str:
    if not cut.has_recording:
        return "has no recording, whose features could be computed: give one that has"
    if isinstance(cut, MultiCut):
        return (
            f"has {cut.num_channels} channels, and a model hears one: choose it with "
            "lhotse's cut.to_mono()"
        )
    if cut.sampling_rate != sampling_rate:
        return (
            f"has audio of {cut.sampling_rate} Hz and the model's features are of "
            f"{sampling_rate} Hz (--sampling-rate): resample the cuts with lhotse's "
            f"CutSet.resample({sampling_rate})"
        )
    return ""


def name_of_set(path: str) -> str:
    """The name of the set of cuts in a manifest, by icefall's names of manifests.

    Args:
      path: Such as ``data/fbank/librispeech_cuts_test-clean.jsonl.gz``.

    Returns:
      Such as ``test-clean``; the file's name without its endings where it is no such
      name.
    """
    name = Path(path).resolve().name.split(".jsonl")[0]
    match = _SET.fullmatch(name)
    return match[1] if match else name


def hash_of_manifest(path: str) -> str:
    """SHA-256 of a manifest, or of the names and sizes of a Shar's files.

    Args:
      path: The manifest or the folder.
    """
    digest = hashlib.sha256()
    if Path(path).is_dir():
        files: List[Path] = sorted(p for p in Path(path).rglob("*") if p.is_file())
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()

"""What a target store was made of: who may read it, and who may add to it."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch
from lhotse import Features

from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.kinds.codec import Codec, LatticeCodec
from icefall_kd.kinds.hidden import HiddenCodec, parse_hidden
from icefall_kd.targets.typed import typed

FILENAME = "fingerprint.json"
# Settings that change what a causal teacher says, and not its parameters.
STREAMING = ("chunk_size", "left_context_frames")
MOVED = (
    "if the store was moved, say where it lies now with `icefall-kd repoint CUTS "
    "--storage-dir FOLDER`"
)


def hash_state_dict(state_dict: dict) -> str:
    """SHA-256 over names, shapes and bytes of a model's parameters."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        value = value.detach().cpu().contiguous().reshape(-1)
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def name_of(model: torch.nn.Module, settings: Dict[str, Any]) -> str:
    """What a fingerprint calls a teacher: its parameters, and its chunks if causal.

    Args:
      settings: The recipe's params that the model was built by.
    """
    found = hash_state_dict(model.state_dict())
    if settings.get("causal"):
        for option in STREAMING:
            found += f" {option} {settings.get(option)}"
    return found


@dataclass(frozen=True)
class Fingerprint:
    """One store's teacher, tokens and clock. Kept as JSON beside the arrays."""

    teacher: str  # SHA-256 of the teacher's parameters
    tokens: str  # SHA-256 of its tokens in order; "" where unknown
    vocab_size: int
    blank_id: int
    subsampling_factor: int  # feature frames per target frame
    frame_shift: float  # seconds between two target frames
    sampling_rate: int  # Hz
    num_features: int
    feature_type: str  # Lhotse's name of the extractor
    feature_shift: float = 0.01  # seconds between two feature frames
    ctc: str = (
        "dense"  # how CTC targets are kept; "" for none; see icefall_kd.kinds.codec
    )
    lattice: str = ""  # how lattices are kept; "" for none
    s_range: int = 0  # label positions of a lattice at a frame; 0 for none
    hidden: str = ""  # which layers are kept, and how; see icefall_kd.kinds.hidden
    version: int = 3  # of the store's bytes

    @staticmethod
    def of(
        teacher: str,
        settings: Dict[str, Any],
        features: Features,
        tokens: Optional[str] = None,
        **kept: Any,
    ) -> "Fingerprint":
        """The fingerprint of a store to be made.

        Args:
          teacher: See :func:`hash_state_dict`.
          settings: The recipe's params.
          features: Of any of the cuts.
          tokens: See :func:`hash_tokens`.
          kept: ``ctc``, ``lattice``, ``s_range`` and ``hidden``.
        """
        factor = int(settings.get("subsampling_factor", 4))
        found = Fingerprint(
            teacher=teacher,
            tokens=tokens or "",
            vocab_size=int(settings["vocab_size"]),
            blank_id=int(settings["blank_id"]),
            subsampling_factor=factor,
            frame_shift=factor * features.frame_shift,
            sampling_rate=features.sampling_rate,
            num_features=features.num_features,
            feature_type=features.type,
            feature_shift=features.frame_shift,
            **kept,
        )
        ctc, lattice = found.codecs()  # refuses what they can't read
        return replace(found, ctc=str(ctc or ""), lattice=str(lattice or ""))

    def codecs(self) -> Tuple[Optional[Codec], Optional[LatticeCodec]]:
        """How CTC targets and lattices are kept."""
        lattice = None
        if self.lattice:
            lattice = LatticeCodec.parse(self.lattice, self.blank_id)
        return Codec.parse(self.ctc) if self.ctc else None, lattice

    def hidden_codecs(self) -> Tuple[HiddenCodec, ...]:
        """How hidden layers are kept."""
        return parse_hidden(self.hidden)

    @property
    def digest(self) -> str:
        """Start of the SHA-256 of all fields; every record carries it."""
        return _digest(self)

    @staticmethod
    def read(folder: Union[str, Path]) -> "Fingerprint":
        """Read the fingerprint of the store in ``folder``."""
        path = Path(folder) / FILENAME
        try:
            values = json.loads(path.read_text("utf8"))
            if values["version"] != Fingerprint.version:
                raise KDError(
                    f"the target store {folder} is of version {values['version']} and "
                    f"this icefall_kd reads version {Fingerprint.version}: make the "
                    "targets again with `icefall-kd dump --overwrite`"
                )
            return typed(Fingerprint, values)
        except FileNotFoundError:
            raise KDError(
                f"the target store {folder} has no {FILENAME}: {MOVED}, or make the "
                "targets again with `icefall-kd dump`"
            ) from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise KDError(
                f"{path} is damaged or of another version: make the targets again with "
                "`icefall-kd dump --overwrite`"
            ) from None

    def write(self, folder: Union[str, Path]) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILENAME, shared=True) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf8")

    def check_same(self, other: "Fingerprint", folder: Union[str, Path]) -> None:
        """Refuse to add what ``other`` says to a store made by ``self``."""
        for f in fields(self):
            mine, its = getattr(self, f.name), getattr(other, f.name)
            if mine != its:
                raise KDError(
                    f"the target store {folder} was made with {f.name} {mine!r} and "
                    f"this teacher has {its!r}: give another folder, or --overwrite"
                )

    def check_student(
        self, vocab_size: int, blank_id: int, tokens: Optional[str] = None
    ) -> None:
        """Refuse a student whose symbols are not the teacher's, in their order."""
        if vocab_size != self.vocab_size:
            raise KDError(
                f"the student's BPE model has {vocab_size} symbols and the teacher's "
                f"{self.vocab_size}: train the student with the teacher's --bpe-model"
            )
        if blank_id != self.blank_id:
            raise KDError(
                f"the student's blank id is {blank_id} and the teacher's "
                f"{self.blank_id}: train the student with the teacher's --bpe-model"
            )
        if tokens and self.tokens and tokens != self.tokens:
            raise KDError(
                f"the student's tokens (hash {tokens[:8]}) are not the teacher's (hash "
                f"{self.tokens[:8]}), though both are {vocab_size}: train the student "
                "with the teacher's --bpe-model"
            )


@lru_cache(maxsize=64)
def _digest(fingerprint: Fingerprint) -> str:
    text = json.dumps(asdict(fingerprint), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

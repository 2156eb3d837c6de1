"""What a target store was made of, which decides what may be added or read together."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch
from lhotse import Features

from icefall_kd.errors import KDError, require
from icefall_kd.files import replacing
from icefall_kd.kinds import KINDS, TargetKind
from icefall_kd.targets.json_records import typed
from icefall_kd.zipformer import subsampling_factor

FILENAME = "fingerprint.json"
# Settings that change what a causal teacher computes, and not its parameters.
STREAMING = ("chunk_size", "left_context_frames")
MOVED = (
    "if the store was moved, give its new folder with `icefall-kd repoint CUTS "
    "--storage-dir FOLDER`"
)


def hash_state_dict(state_dict: dict) -> str:
    """Return the SHA-256 over names, shapes and bytes of a model's parameters.

    Args:
      state_dict: The model's.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        value = value.detach().cpu().contiguous().reshape(-1)
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def name_of(model: torch.nn.Module, settings: Dict[str, Any]) -> str:
    """Return what a fingerprint calls a teacher: its parameters, its chunks if causal.

    Args:
      model: The teacher.
      settings: The recipe's params that the model was built by.
    """
    name = hash_state_dict(model.state_dict())
    if settings.get("causal"):
        for option in STREAMING:
            name += f" {option} {settings.get(option)}"
    return name


@dataclass(frozen=True)
class Fingerprint:
    """What a store's targets depend on. Its JSON lies beside the records.

    ``ctc``, ``lattice``, ``hidden`` and ``further_kinds`` give the form of each kind of
    target (:mod:`icefall_kd.kinds`) that the store holds.
    """

    teacher: str  # SHA-256 of the teacher's parameters; see name_of
    tokens: str  # SHA-256 of its tokens in order; "" where unknown
    vocab_size: int
    blank_id: int
    subsampling_factor: int  # feature frames in a frame
    frame_shift: float  # seconds between two frames
    sampling_rate: int  # Hz
    num_features: int
    feature_type: str  # Lhotse's name of the extractor
    feature_shift: float = 0.01  # seconds between two feature frames
    ctc: str = "dense"  # "" for none
    lattice: str = ""
    s_range: int = 0  # label positions of a lattice at a frame; 0 for all
    hidden: str = ""
    version: int = 3  # of the store's bytes
    # By name, for kinds that have no field of their own; not in the JSON if empty.
    further_kinds: Dict[str, str] = field(default_factory=dict, hash=False)

    @staticmethod
    def of(
        teacher: str,
        settings: Dict[str, Any],
        features: Features,
        tokens: Optional[str] = None,
        **forms: Any,
    ) -> "Fingerprint":
        """Return the fingerprint of a store to be made.

        Args:
          teacher: The teacher's name, of :func:`name_of`.
          settings: The recipe's params.
          features: Those of any of the cuts.
          tokens: Their hash, of :func:`icefall_kd.tokens.hash_tokens`.
          forms: ``ctc``, ``lattice``, ``s_range``, ``hidden`` and ``further_kinds``.

        Raises:
          KDError: a form that is none.
        """
        factor = subsampling_factor(settings)
        fingerprint = Fingerprint(
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
            **forms,
        )
        # Of several spellings of a form always the same.
        kinds = {name: str(kind) for name, kind in fingerprint.kinds.items()}
        names = ("ctc", "lattice", "hidden")
        forms = {name: kinds.pop(name, "") for name in names}
        return replace(fingerprint, **forms, further_kinds=kinds)

    @property
    def forms(self) -> Dict[str, str]:
        """The form of each kind of target that the store holds."""
        fields_of_kinds = {
            "ctc": self.ctc,
            "lattice": self.lattice,
            "hidden": self.hidden,
        }
        forms = {**fields_of_kinds, **self.further_kinds}
        return {name: form for name, form in forms.items() if form}

    @cached_property
    def kinds(self) -> Dict[str, TargetKind]:
        """The kinds of targets that the store holds, as :meth:`make_kinds` returns."""
        return self.make_kinds()

    def make_kinds(self) -> Dict[str, TargetKind]:
        """Construct the kinds of targets that the store holds, by name.

        Raises:
          KDError: a kind that is not registered, or a form that is none.
        """
        kinds = {}
        for name, form in self.forms.items():
            require(
                name in KINDS,
                f"the fingerprint names the kind of target {name!r}, and this "
                f"icefall_kd has {', '.join(KINDS)}: register its class with "
                "icefall_kd.kinds.register_kind() before",
            )
            kinds[name] = KINDS[name](form, self.vocab_size, self.blank_id)
        return kinds

    def to_dict(self) -> Dict[str, Any]:
        """Return what the JSON file holds."""
        return {k: v for k, v in asdict(self).items() if k != "further_kinds" or v}

    @cached_property
    def digest(self) -> str:
        """The start of the SHA-256 of all fields; every pointer holds it."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @staticmethod
    def read(folder: Union[str, Path]) -> "Fingerprint":
        """Read a store's fingerprint.

        Args:
          folder: The store.

        Raises:
          KDError: no fingerprint, or one that is damaged or of another version.
        """
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
        """Write the fingerprint's file.

        Args:
          folder: The store; it is made where there is none.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILENAME, shared=True) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf8")

    def check_same(
        self,
        other: "Fingerprint",
        folder: Union[str, Path],
        owner: str = "this teacher",
        remedy: str = "give another folder, or --overwrite",
    ) -> None:
        """Refuse another fingerprint than this one.

        Args:
          other: What targets are to be added, or are read together.
          folder: This one's store, for messages.
          owner: What ``other`` belongs to, for messages.
          remedy: What helps where they differ.

        Raises:
          KDError: a field that differs.
        """
        names = [f.name for f in fields(self) if f.name != "further_kinds"]
        rows = [(name, getattr(self, name), getattr(other, name)) for name in names]
        for name in {**self.further_kinds, **other.further_kinds}:
            forms = (x.further_kinds.get(name, "") for x in (self, other))
            rows.append((name, *forms))
        for name, old, new in rows:
            require(
                old == new,
                f"the target store {folder} was made with {name} {old!r} and "
                f"{owner} has {new!r}: {remedy}",
            )

    def check_student(
        self, vocab_size: int, blank_id: int, tokens: Optional[str] = None
    ) -> None:
        """Refuse a student whose tokens are not the teacher's, in their order.

        Args:
          vocab_size: The number of the student's tokens.
          blank_id: The student's blank.
          tokens: The hash of the student's tokens; None or "" where unknown.

        Raises:
          KDError: one of them differs.
        """
        if vocab_size != self.vocab_size:
            raise KDError(
                f"the student's tokenizer has {vocab_size} tokens and the teacher's "
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

"""What a target store was made of: who may read it, and who may add to it."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Optional, Union

import torch

from icefall_kd.errors import KDError

FILENAME = "fingerprint.json"


def hash_state_dict(state_dict: dict) -> str:
    """SHA-256 over names, shapes and bytes of a model's parameters."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        value = value.detach().cpu().contiguous().reshape(-1)
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_tokens(bpe_model: Union[str, Path]) -> str:
    """SHA-256 over the pieces of a sentencepiece model, in their order."""
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor()
    try:
        sp.load(str(bpe_model))
    except (OSError, RuntimeError):
        raise KDError(
            f"the BPE model {bpe_model} can't be read: give --bpe-model the bpe.model "
            "that the recipe trains with"
        ) from None
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()


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
    kind: str = "ctc-logprobs-fp16"

    @staticmethod
    def read(folder: Union[str, Path]) -> "Fingerprint":
        """Read the fingerprint of the store in ``folder``."""
        path = Path(folder) / FILENAME
        try:
            values = json.loads(path.read_text("utf8"))
            return Fingerprint(**values)
        except FileNotFoundError:
            raise KDError(
                f"the target store {folder} has no {FILENAME}: make the targets again "
                "with `icefall-kd dump`"
            ) from None
        except (ValueError, TypeError):
            raise KDError(
                f"{path} is damaged or of another version: make the targets again with "
                "`icefall-kd dump --overwrite`"
            ) from None

    def write(self, folder: Union[str, Path]) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{FILENAME}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf8")
        temporary.replace(folder / FILENAME)

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
        """Refuse a student whose symbols are not the teacher's."""
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

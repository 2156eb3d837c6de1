"""What a kind of target is: how it is taken, stored, read and lined up with a batch.

To add a kind, write one file with a subclass of :class:`FrameKind` or
:class:`UtteranceKind` and add the class to :mod:`icefall_kd.kinds`. The writer, the
dataset, the fingerprint and the reports then find it by its name.
"""

from typing import Any, Callable, ClassVar, Dict, List, Optional, Sequence

import torch

from icefall_kd.errors import KDError, require
from icefall_kd.types import EncoderOut, index_rows

Parts = Dict[str, bytes]  # of a cut's record: the bytes of each part by its name


class TargetKind:
    """A kind of target in one form, as a store holds it.

    A record has one part for the kind, under the kind's name; a subclass may make
    several of it.

    Args:
      form: How the kind is stored, such as "top:8"; a fingerprint has the same text.
      vocab_size: V, the number of the teacher's tokens.
      blank_id: The teacher's blank.

    Attributes:
      name: The kind's name in fingerprints, in records and in ``Targets.parts``.
      title: What a message calls its targets.
      example: An option of ``icefall-kd dump`` that stores them.
      quantizer_of: Loads the quantizer of a codec that needs one; set by who encodes.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    example: ClassVar[str] = ""
    quantizer_of: Callable[[Any], Any]

    def __init__(self, form: str, vocab_size: int, blank_id: int) -> None:
        self.form, self.vocab_size, self.blank_id = form, vocab_size, blank_id

    def __str__(self) -> str:
        """The form, of several spellings always the same."""
        return self.form

    # Writing

    def take(self, out: EncoderOut) -> List[Any]:
        """Take the kind's values of each row from the outputs of a teacher.

        Args:
          out: The outputs for a batch of N rows.

        Returns:
          N values, without padding and on the CPU, as :meth:`check` and :meth:`encode`
          take them.
        """
        raise NotImplementedError

    def check(self, value: Any, cut_id: str) -> None:
        """Refuse a value that can't be stored.

        Args:
          value: The value of one cut; None where the teacher gave none.
          cut_id: The cut, for messages.

        Raises:
          KDError: no value, or one of another shape or range.
        """
        self.require_value(value, cut_id, self.title, self)

    @staticmethod
    def require_value(value: Any, cut_id: str, title: str, form: Any) -> None:
        """Refuse a cut that comes without a value which the store keeps.

        Args:
          value: The value; None where it is missing.
          cut_id: The cut.
          title: What the message calls the value.
          form: The form in which the store keeps it.
        """
        require(
            value is not None,
            f"the cut {cut_id} comes without {title}, and the store holds that as "
            f"{form}: give it to write()",
        )

    def frames(self, value: Any) -> List[int]:
        """Return the number of frames T of each part of a checked value."""
        raise NotImplementedError

    def encode(self, value: Any, cut_id: str) -> Parts:
        """Turn a checked value into the bytes of its parts.

        Args:
          value: The value of one cut.
          cut_id: The seed of a form that draws random tokens.
        """
        raise NotImplementedError

    # Reading

    def collate(
        self,
        records: Sequence[Parts],
        frames: Sequence[int],
        index: torch.Tensor,
        record_of_row: Sequence[Optional[int]],
    ) -> Any:
        """Turn the records of a batch into the kind's values in ``Targets.parts``.

        Args:
          records: One or more, in the order of rows and time.
          frames: The number of frames of each record.
          index: (N, T), int64. All frames of all records are numbered one after
            another; this is the number of each frame of each row, and 0 outside the
            mask.
          record_of_row: The number of the record that each row consists of; None for a
            row that is a part of a cut or a mixture of cuts.

        Raises:
          ValueError: bytes that :meth:`encode` did not make.
        """
        raise NotImplementedError

    # On a batch. These know no form: a batch's targets may come from a teacher in the
    # training process.

    @staticmethod
    def index_frames(values: Any, index: Any) -> Any:
        """Rearrange frames, to another frame rate or along a time warp.

        Args:
          values: The kind's values in ``Targets.parts``.
          index: What indexes the rows and frames of a tensor (N, T, ...).

        Returns:
          The values at these frames; None where the kind can't be rearranged.
        """
        raise NotImplementedError

    @staticmethod
    def map_tokens(values: Any, token_ids: torch.Tensor) -> Any:
        """Express values that are over the teacher's tokens in the student's.

        Args:
          values: The kind's values in ``Targets.parts``.
          token_ids: (V,), the student's id of each of the teacher's tokens.

        Returns:
          The values over the student's tokens; None where the kind can't be mapped.
        """
        raise NotImplementedError


class FrameKind(TargetKind):
    """A kind with a value for each frame of the encoder: it follows every cut.

    A subclass defines :meth:`decode` in place of ``collate``, and the rest of
    :class:`TargetKind`'s part on writing.
    """

    def decode(self, records: Sequence[Parts], frames: Sequence[int]) -> Any:
        """Turn records into values, all frames of all records one after another.

        Args:
          records: One or more.
          frames: The number of frames of each.

        Returns:
          A tensor (sum of the frames, ...), or what
          :func:`icefall_kd.types.map_tensors` takes.

        Raises:
          ValueError: bytes that :meth:`encode` did not make.
        """
        raise NotImplementedError

    def collate(self, records, frames, index, record_of_row) -> Any:
        return index_rows(self.decode(records, frames), index)

    @staticmethod
    def index_frames(values: Any, index: Any) -> Any:
        return index_rows(values, index)

    @staticmethod
    def map_tokens(values: Any, token_ids: torch.Tensor) -> Any:
        return values  # which have nothing to do with tokens


class UtteranceKind(TargetKind):
    """A kind with one value for an utterance: only a whole cut has it.

    A subclass defines :meth:`decode` in place of ``collate``, and the rest of
    :class:`TargetKind`'s part on writing.
    """

    def decode(self, record: Parts) -> Optional[Any]:
        """Turn a record into the utterance's value; None where it has none.

        Args:
          record: The record of a whole cut.

        Raises:
          ValueError: bytes that :meth:`encode` did not make.
        """
        raise NotImplementedError

    def collate(self, records, frames, index, record_of_row) -> List[Optional[Any]]:
        return [None if i is None else self.decode(records[i]) for i in record_of_row]

    @staticmethod
    def index_frames(values: Any, index: Any) -> None:
        return None

    @staticmethod
    def map_tokens(values: Any, token_ids: torch.Tensor) -> None:
        return None


def check_finite(logits: torch.Tensor, name: str) -> None:
    """Refuse logits that float16 can't hold.

    Args:
      logits: (..., V).
      name: What the message calls them.

    Raises:
      KDError: numbers that are not finite, or that span more than 60000 in a row.
    """
    if not torch.isfinite(logits).all():
        raise KDError(
            f"the teacher's {name} are not finite: check the teacher's checkpoint and "
            "the cut's features"
        )
    spread = float((logits.amax(-1) - logits.amin(-1)).max()) if logits.numel() else 0
    if spread > 6e4:
        raise KDError(
            f"the teacher's {name} span {spread:.3g} in a frame, and float16 holds "
            "60000: check the teacher's checkpoint and the cut's features"
        )

"""A cut's targets as bytes."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List

from lhotse.cut import MonoCut

from icefall_kd.errors import KDError, require
from icefall_kd.targets.fingerprint import Fingerprint


@dataclass(frozen=True)
class Record:
    """A cut's targets as bytes.

    Args:
      frames: T, the number of frames.
      parts: The bytes of each part, in their order in the store's file.
    """

    frames: int
    parts: Dict[str, bytes]


class RecordEncoder:
    """Makes records, and refuses values that can't be stored.

    Args:
      fingerprint: Names the kinds and forms that are stored.
      quantizer_of: Returns the quantizer of a codec of hidden rows
        (:class:`icefall_kd.kinds.hidden.HiddenCodec`); None for float16.

    Raises:
      KDError: a fingerprint without any kind.
    """

    def __init__(
        self, fingerprint: Fingerprint, quantizer_of: Callable[[Any], Any]
    ) -> None:
        self.kinds = fingerprint.make_kinds()
        require(
            self.kinds,
            "the store would keep nothing: name a form for CTC targets, lattices, "
            "hidden layers or simple targets",
        )
        for kind in self.kinds.values():
            kind.quantizer_of = quantizer_of

    def encode(self, cut: MonoCut, **values: Any) -> Record:
        """Make one cut's record.

        Args:
          cut: The cut.
          values: See :meth:`icefall_kd.targets.writer.TargetWriter.write`, and for the
            errors too.
        """
        parts: Dict[str, bytes] = {}
        frames: List[int] = []
        for name, kind in self.kinds.items():
            value = values.get(name)
            kind.check(value, cut.id)
            parts.update(kind.encode(value, cut.id))
            frames += kind.frames(value)
        if len(set(frames)) > 1 or not frames[0]:
            raise KDError(
                f"the cut {cut.id} comes with {frames} frames of {list(parts)}: give "
                "each the same number, one or more"
            )
        return Record(frames[0], parts)

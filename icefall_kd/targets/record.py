"""What a teacher said on a cut, as bytes."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Union

import numpy as np
import torch
from lhotse.cut import MonoCut

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import HiddenCodec, Layer
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.types import NoPath, PrunedLattice


@dataclass(frozen=True)
class Record:
    """A cut's targets as bytes."""

    frames: int  # of the teacher's encoder
    parts: Dict[str, bytes]


class Encoder:
    """Makes records, and refuses what can't be kept.

    Args:
      fingerprint: Says what is kept, and how.
      quantizer_of: Gives the quantizer of a layer that is kept as codes; None for one
        that is not.

    Raises:
      KDError: a fingerprint that keeps nothing.
    """

    def __init__(
        self, fingerprint: Fingerprint, quantizer_of: Callable[[HiddenCodec], Any]
    ) -> None:
        self.vocab_size = fingerprint.vocab_size
        self.ctc, self.lattice = fingerprint.codecs()
        self.hidden = fingerprint.hidden_codecs()
        if not (self.ctc or self.lattice or self.hidden):
            raise KDError(
                "the store would keep nothing: name a form for CTC targets, lattices "
                "or hidden layers"
            )
        self.quantizer_of = quantizer_of
        self._quantizers: Dict[Layer, Any] = {}

    def encode(
        self,
        cut: MonoCut,
        logits: Union[torch.Tensor, np.ndarray, None] = None,
        lattice: Union[PrunedLattice, NoPath, None] = None,
        hidden: Optional[Dict[Layer, torch.Tensor]] = None,
    ) -> Record:
        """One cut's record; of arguments and errors see :meth:`LogitWriter.write`."""
        parts, frames = {}, []
        if self.ctc is not None:
            if logits is None:
                raise _missing(cut, "CTC logits", self.ctc)
            logits = torch.as_tensor(logits).detach().float().cpu()
            parts["ctc"] = self._ctc_part(cut, logits)
            frames.append(len(logits))
        if self.lattice is not None:
            if lattice is None:
                raise _missing(cut, "a lattice", self.lattice)
            if isinstance(lattice, NoPath):
                frames.append(lattice.frames)
            else:
                check_finite(lattice.logits, f"lattice on cut {cut.id}")
                parts["lattice"] = self.lattice.encode(lattice, cut.id)
                frames.append(int(lattice.boundary[0, 3]))
        for codec in self.hidden:
            rows = (hidden or {}).get(codec.layer)
            if rows is None:
                raise _missing(cut, f"layer {codec.layer}", codec)
            quantizer = self._quantizer(codec)
            codec.check(rows, quantizer, cut.id)
            parts[codec.part] = codec.encode(rows.detach(), quantizer)
            frames.append(len(rows))
        if len(set(frames)) > 1 or not frames[0]:
            raise KDError(
                f"the cut {cut.id} comes with {frames} frames of {list(parts)}: give "
                "each the same number, one or more"
            )
        return Record(frames[0], parts)

    def _quantizer(self, codec: HiddenCodec) -> Any:
        if codec.layer not in self._quantizers:
            self._quantizers[codec.layer] = self.quantizer_of(codec)
        return self._quantizers[codec.layer]

    def _ctc_part(self, cut: MonoCut, logits: torch.Tensor) -> bytes:
        v = self.vocab_size
        if logits.ndim != 2 or logits.size(1) != v or not len(logits):
            raise KDError(
                f"the logits of cut {cut.id} have shape {tuple(logits.shape)} and must "
                f"be (frames, {v}) with at least one frame"
            )
        check_finite(logits, f"logits on cut {cut.id}")
        return self.ctc.encode(self.ctc.keep(logits, cut.id), v)


def _missing(cut: MonoCut, name: str, kept: Any) -> KDError:
    return KDError(
        f"the cut {cut.id} comes without {name}, and the store keeps that as {kept}: "
        "give it to write()"
    )


def check_finite(logits: torch.Tensor, name: str) -> None:
    """Refuse what float16 can't hold."""
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

"""The CTC head's distribution over tokens at each frame."""

import torch

from icefall_kd.kinds.distribution import DistributionKind
from icefall_kd.types import EncoderOut


class CtcKind(DistributionKind):
    """CTC targets: (T, V) logits of a cut."""

    name = "ctc"
    title = "CTC targets"
    example = "--keep dense"
    head = "CTC"

    @staticmethod
    def logits(out: EncoderOut) -> torch.Tensor:
        return out.ctc_logits

"""The acoustic half of the transducer's simple joiner at each frame.

The pruned transducer loss (Kuang et al., arXiv:2206.13236) finds its ranges by a simple
joiner, whose logits are a sum of two halves: simple_am_proj(encoder output) of a frame,
and simple_lm_proj(decoder output) of a label position. The softmax of the first one is
a distribution over tokens at each frame, without a transcript.
"""

import torch

from icefall_kd.kinds.distribution import DistributionKind
from icefall_kd.types import EncoderOut


class SimpleKind(DistributionKind):
    """Simple targets: (T, V) logits of a cut, of ``simple_am_proj``."""

    name = "simple"
    title = "simple targets"
    example = "--keep-simple dense"
    head = "simple joiner's"

    @staticmethod
    def logits(out: EncoderOut) -> torch.Tensor:
        return out.simple_logits

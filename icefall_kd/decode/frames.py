"""How feature frames, stack frames and frames of a model lie on one another."""

import math
from typing import Sequence

from torch import nn

from icefall_kd.errors import KDError

FEATURE_FRAMES = 100  # a second


def widest(sizes: Sequence[int]) -> int:
    """Return the largest of a causal model's chunk sizes; -1, no chunks, is more.

    Args:
      sizes: The model's ``chunk_size``, or ``left_context_frames``.
    """
    return -1 if -1 in sizes else max(sizes)


class Frames:
    """What a Zipformer's modules say of its frames.

    Stack frame s begins at feature frame ``front_stride * s`` and needs ``kernel`` of
    them. Frame t begins at feature frame ``stride * t``, and t + 1 frames need
    ``overhang`` more than ``stride * (t + 1)``.

    Args:
      model: A recipe's model with a front end, ``encoder_embed``.

    Raises:
      KDError: The model is built in another way.
    """

    def __init__(self, model: nn.Module) -> None:
        encoder = getattr(model, "encoder", None)
        conv = getattr(getattr(model, "encoder_embed", None), "conv", None)
        factors = getattr(encoder, "downsampling_factor", None)
        out_factor = getattr(encoder, "output_downsampling_factor", None)
        if conv is None or factors is None or out_factor is None:
            raise KDError(
                f"the model {type(model).__name__} is no Zipformer with an "
                "encoder_embed, so it is not known where its frames lie: decode its "
                "recordings as a whole"
            )
        self.kernel = self.front_stride = 1
        for layer in conv.modules():
            if isinstance(layer, nn.Conv2d):
                self.kernel += (layer.kernel_size[0] - 1) * self.front_stride
                self.front_stride *= layer.stride[0]
        self.out_factor = int(out_factor)
        self.stride = self.front_stride * self.out_factor
        self.overhang = self.kernel - self.front_stride
        # Stack frames at which every stack begins a new frame.
        self.least_common = self.out_factor
        for factor in factors:
            self.least_common = _lcm(self.least_common, int(factor))
        chunk = widest(encoder.chunk_size) if getattr(encoder, "causal", False) else -1
        if chunk > 0:
            self.least_common = _lcm(self.least_common, chunk)
        self.step = self.least_common // self.out_factor  # in frames

    def seconds(self, frames: int) -> float:
        """Return the duration of ``frames``."""
        return frames * self.stride / FEATURE_FRAMES


def _lcm(a: int, b: int) -> int:
    return a * b // math.gcd(a, b)

"""The records that cross rooms."""

from dataclasses import dataclass
from typing import Optional

import torch


@dataclass
class EncoderOut:
    """What one forward pass of a recipe's model gave.

    N utterances, T frames after subsampling, C channels, V symbols.
    """

    encoder_out: torch.Tensor  # (N, T, C)
    encoder_out_lens: torch.Tensor  # (N,), valid frames
    ctc_logits: Optional[torch.Tensor] = None  # (N, T, V), before LogSoftmax


@dataclass
class Targets:
    """What a teacher said on one batch, row by row as the batch's features."""

    ctc_logits: torch.Tensor  # (N, T, V), up to a constant per frame
    lens: torch.Tensor  # (N,), valid frames

    def to(self, device: torch.device) -> "Targets":
        return Targets(self.ctc_logits.to(device), self.lens.to(device))

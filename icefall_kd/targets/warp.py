"""Targets that follow SpecAugment's time warp."""

from dataclasses import replace
from typing import Any, List, Tuple

import numpy as np
import torch
from lhotse.dataset import signal_transforms

from icefall_kd.types import Targets, select

# Zipformer's encoder frame j hears feature frames around 4 j + 5.
FACTOR, CENTER = 4, 5


class WarpRecord(torch.nn.Module):
    """A SpecAugment that remembers where the frames of its last batch came from.

    Args:
      augment: Lhotse's ``SpecAugment``, whose place this takes among the dataset's
        ``input_transforms``.
    """

    def __init__(self, augment: torch.nn.Module) -> None:
        super().__init__()
        self.augment = augment
        # Row, first feature frame, and the frame that each frame of it was before.
        self.moves: List[Tuple[int, int, torch.Tensor]] = []

    def forward(self, features: torch.Tensor, *args: Any, **kwargs: Any):
        self.moves = []
        size, width = features[0].numel(), features.size(2)
        warp = signal_transforms.time_warp

        def told(segment: torch.Tensor, factor: int) -> torch.Tensor:
            state = np.random.get_state()
            found = warp(segment, factor)
            after = np.random.get_state()
            np.random.set_state(state)  # the same draw, on the frames' numbers
            source = warp(
                torch.arange(len(segment), dtype=torch.float)[:, None], factor
            )
            np.random.set_state(after)
            at = segment.storage_offset()
            self.moves.append((at // size, at % size // width, source[:, 0]))
            return found

        signal_transforms.time_warp = told
        try:
            return self.augment(features.contiguous(), *args, **kwargs)
        finally:
            signal_transforms.time_warp = warp

    def move(self, targets: Targets) -> Targets:
        """The targets of the last batch, moved as its features were.

        A frame takes the target of the frame that is heard at its middle.
        """
        index = torch.arange(targets.mask.size(1)).repeat(len(targets.lens), 1)
        for row, first, source in self.moves:
            n = int(targets.lens[row])
            heard = FACTOR * torch.arange(n) + CENTER - first
            inside = (heard >= 0) & (heard < len(source))
            was = source[heard.clamp(0, len(source) - 1)] + first
            frame = ((was - CENTER) / FACTOR).round().long().clamp(0, max(0, n - 1))
            index[row, :n] = torch.where(inside, frame, index[row, :n])
        at = (torch.arange(len(index)).unsqueeze(1), index)
        return replace(
            targets,
            ctc=None if targets.ctc is None else select(targets.ctc, at),
            mask=targets.mask[at],
            hidden={layer: x[at] for layer, x in targets.hidden.items()},
        )

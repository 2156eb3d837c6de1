"""Targets that follow SpecAugment's time warp."""

from dataclasses import replace
from typing import Any, List, Optional, Tuple

import numpy as np
import torch
from lhotse.dataset import signal_transforms

from icefall_kd.types import Targets, index_rows


def first_center(factor: float) -> float:
    """The feature frame in the middle of what Zipformer's first encoder frame hears.

    Its front end makes 50 Hz frames around feature frames 4, 6, 8 ..., and an encoder
    frame is the mean of ``factor`` / 2 of those; the next one is ``factor`` feature
    frames later.
    """
    return 4 + (factor - 2) / 2


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
        self.num_frames = 0  # of the last batch's features

    def forward(self, features: torch.Tensor, *args: Any, **kwargs: Any):
        self.moves, self.num_frames = [], features.size(1)
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

    def move(self, targets: Targets, factor: Optional[float] = None) -> Targets:
        """The targets of the last batch, moved as its features were.

        A frame takes the target of the frame that is heard at its middle.

        Args:
          targets: Of the rows of the last batch's features.
          factor: Feature frames of an encoder frame; by default as many as the batch's
            longest row of targets has of them.
        """
        if not self.moves or not int(targets.lens.max()):
            return targets
        if factor is None:
            factor = round((self.num_frames - 7) / int(targets.lens.max()))
        center = first_center(factor)
        index = torch.arange(targets.mask.size(1)).repeat(len(targets.lens), 1)
        for row, first, source in self.moves:
            n = int(targets.lens[row])
            heard = (factor * torch.arange(n) + center).round().long() - first
            inside = (heard >= 0) & (heard < len(source))
            was = source[heard.clamp(0, len(source) - 1)] + first
            frame = ((was - center) / factor).round().long().clamp(0, max(0, n - 1))
            index[row, :n] = torch.where(inside, frame, index[row, :n])
        at = (torch.arange(len(index)).unsqueeze(1), index)
        return replace(
            targets,
            mask=targets.mask[at],
            parts={
                k: index_rows(x, at) if k in ("ctc", "hidden") else x
                for k, x in targets.parts.items()
            },
        )

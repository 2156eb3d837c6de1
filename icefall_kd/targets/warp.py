"""Targets that follow SpecAugment's time warp."""

from dataclasses import replace
from typing import Any, List, Optional, Tuple

import numpy as np
import torch
from lhotse.dataset import signal_transforms

from icefall_kd.kinds import KINDS
from icefall_kd.types import Targets

# Of a warped segment: its row, its first feature frame, and for each of its frames the
# frame of the segment that it was before, a float.
Warp = Tuple[int, int, torch.Tensor]


def first_center(factor: float) -> float:
    """Return the feature frame in the middle of the input of Zipformer's frame 0.

    The front end makes stack frames around feature frames 4, 6, 8 ..., and a frame is
    the mean of ``factor`` / 2 of those; the next one is ``factor`` feature frames
    later.

    Args:
      factor: Feature frames in a frame.
    """
    return 4 + (factor - 2) / 2


class WarpRecord(torch.nn.Module):
    """A SpecAugment that records where the frames of its last batch came from.

    Args:
      augment: Lhotse's ``SpecAugment``, whose place this takes among the dataset's
        ``input_transforms``.
    """

    def __init__(self, augment: torch.nn.Module) -> None:
        super().__init__()
        self.augment = augment
        self.warps: List[Warp] = []
        self.num_frames = 0  # of the last batch's features

    def forward(self, features: torch.Tensor, *args: Any, **kwargs: Any):
        self.warps, self.num_frames = [], features.size(1)
        row_size, width = features[0].numel(), features.size(2)
        warp = signal_transforms.time_warp

        def recording_warp(segment: torch.Tensor, factor: int) -> torch.Tensor:
            state_before = np.random.get_state()
            warped = warp(segment, factor)
            state_after = np.random.get_state()
            # The same draw a second time, on the numbers of the frames.
            np.random.set_state(state_before)
            numbers = torch.arange(len(segment), dtype=torch.float)[:, None]
            source = warp(numbers, factor)[:, 0]
            np.random.set_state(state_after)
            # The segment is a view of the features: its offset tells row and frame.
            row, position = divmod(segment.storage_offset(), row_size)
            self.warps.append((row, position // width, source))
            return warped

        signal_transforms.time_warp = recording_warp
        try:
            return self.augment(features.contiguous(), *args, **kwargs)
        finally:
            signal_transforms.time_warp = warp

    def move(self, targets: Targets, factor: Optional[float] = None) -> Targets:
        """Move the targets of the last batch as its features were; see
        :func:`move_frames`.

        Args:
          targets: Those of the rows of the last batch's features.
          factor: Feature frames in a frame; by default that of the batch's longest row.
        """
        if factor is None:
            longest = max(1, int(targets.lens.max()))
            factor = round((self.num_frames - 7) / longest)
        return move_frames(targets, self.warps, factor)


def move_frames(targets: Targets, warps: List[Warp], factor: float) -> Targets:
    """Move targets as the features of their batch were moved.

    A frame takes the target of the frame whose features are at its middle now. A kind
    that can't be moved stays as it is.

    Args:
      targets: Those of the rows of the features.
      warps: What happened to the features.
      factor: Feature frames in a frame.
    """
    if not warps:
        return targets
    center, lens = first_center(factor), targets.lens.tolist()
    index = torch.arange(targets.mask.size(1)).repeat(len(lens), 1)
    for row, first, source in warps:
        n = lens[row]
        # Frame -> feature frame of the segment at its middle -> feature frame of
        # the row that it was before -> frame that had this in its middle.
        middle = (factor * torch.arange(n) + center).round().long() - first
        inside = (middle >= 0) & (middle < len(source))
        before = source[middle.clamp(0, len(source) - 1)] + first
        frame = ((before - center) / factor).round().long()
        frame = frame.clamp(0, max(0, n - 1))
        index[row, :n] = torch.where(inside, frame, index[row, :n])
    rows = torch.arange(len(index)).unsqueeze(1)
    rows_and_frames = tuple(x.to(targets.mask.device) for x in (rows, index))
    parts = {}
    for name, values in targets.parts.items():
        warped = KINDS[name].index_frames(values, rows_and_frames)
        parts[name] = values if warped is None else warped
    return replace(targets, mask=targets.mask[rows_and_frames], parts=parts)

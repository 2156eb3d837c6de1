"""Features as they are before the dataset's transforms, for a teacher that hears
those."""

from typing import Any, Dict, List, Optional

import torch
from lhotse import CutSet

from icefall_kd.errors import require
from icefall_kd.targets.warp import WarpRecord

CLEAN, WARPS = "kd_clean_inputs", "kd_time_warps"  # fields of a batch


class KeepFeatures(torch.nn.Module):
    """The first of a dataset's ``input_transforms``: it keeps what the others get.

    Attributes:
      features: (N, T, F), those of the last batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features: Optional[torch.Tensor] = None

    def forward(self, features: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # A copy: a transform may change in place what it gets.
        self.features = features.clone()
        return features

    def take(self) -> torch.Tensor:
        """Return the features of the last batch, and keep them no longer."""
        features, self.features = self.features, None
        return features


class CleanFeatures(torch.utils.data.Dataset):
    """A recipe's dataset, with what its features were before SpecAugment.

    ``batch["kd_clean_inputs"]`` are the features before all of the dataset's
    ``input_transforms``, as they are read or computed once for both. What is done to
    the cuts before, such as a change of speed or noise, is in both.
    ``batch["kd_time_warps"]`` says how a time warp that the student's targets follow
    moved the frames; see :func:`icefall_kd.targets.warp.move_frames`.

    Args:
      dataset: The recipe's dataset.
      time_warp: The record of its time warps; None where there are none.

    Raises:
      KDError: a dataset without ``input_transforms``.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        time_warp: Optional[WarpRecord] = None,
    ) -> None:
        transforms: Optional[List[Any]] = getattr(dataset, "input_transforms", None)
        require(
            transforms is not None,
            f"the training dataset ({type(dataset).__name__}) has no input_transforms, "
            "before which its features are clean: use lhotse's "
            "K2SpeechRecognitionDataset, or give --kd-teacher-clean false",
        )
        self.dataset, self.time_warp, self.keep = dataset, time_warp, KeepFeatures()
        dataset.input_transforms = [self.keep, *transforms]

    def __getitem__(self, cuts: CutSet) -> Dict[str, Any]:
        batch = self.dataset[cuts]
        batch[CLEAN] = self.keep.take()
        if self.time_warp is not None:
            batch[WARPS] = self.time_warp.warps
        return batch

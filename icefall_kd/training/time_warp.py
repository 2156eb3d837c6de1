"""SpecAugment's time warp, which moves frames away from the teacher's targets."""

import logging
from typing import Any, Dict, List

import torch

from icefall_kd.errors import KDError, require
from icefall_kd.targets.warp import WarpRecord

CHOICES = ("off", "follow")
FACTOR = "spec_aug_time_warp_factor"


class TimeWarp:
    """Switches the time warp off, or lets targets follow it, by ``--kd-time-warp``.

    The time warp is a transform of the dataset. With CR-CTC it is within the model.

    Args:
      params: The recipe's params, in which CR-CTC's time warp is switched off.
      joint: The joint loss.
      stored: Whether targets are of the features before the time warp.
      cached: Whether a teacher in the training process computed them.

    Attributes:
      applies: Whether frames and targets would come apart.
      record: The record of the dataset's time warps, if targets follow them.

    Raises:
      KDError: The option has a value that can't be used, or targets can't follow.
    """

    def __init__(
        self, params: Dict[str, Any], joint: Any, stored: bool, cached: bool
    ) -> None:
        self.choice = params["kd_time_warp"]
        self.record: Any = None
        require(
            self.choice in CHOICES,
            f"`time_warp` is {self.choice}, and must be one of {', '.join(CHOICES)}",
        )
        in_model = bool(params.get("use_cr_ctc", False))
        factor = int(params.get(FACTOR, 0) or 0)
        augments = in_model or bool(params.get("enable_spec_aug", False))
        # Else a teacher in the training process gets the features that were warped.
        separates = bool(joint.teacher_kinds) and (stored or in_model)
        self.applies = factor >= 1 and augments and separates
        if not self.applies:
            return
        if self.choice == "follow":
            _check_follow(joint, in_model, cached)
            logging.info(f"Targets follow the time warp (factor {factor})")
            return
        logging.warning(
            f"SpecAugment's time warp (--spec-aug-time-warp-factor {factor}) is "
            "switched off: it would move frames away from the teacher's targets"
        )
        if in_model:
            params[FACTOR] = 0
            self.applies = False

    def apply(self, dataset: torch.utils.data.Dataset) -> torch.utils.data.Dataset:
        """Switch off the time warp in the dataset's transforms, or record it.

        Args:
          dataset: The recipe's training dataset.

        Raises:
          KDError: It has no such transform.
        """
        if not self.applies:
            return dataset
        transforms: List[Any] = getattr(dataset, "input_transforms", None) or []
        warps = [i for i, t in enumerate(transforms) if hasattr(t, "time_warp_factor")]
        require(
            warps,
            f"the training dataset ({type(dataset).__name__}) has no SpecAugment among "
            "its input_transforms, and by --spec-aug-time-warp-factor it warps time: "
            "add --spec-aug-time-warp-factor 0",
        )
        for i in warps:
            if self.choice == "off":
                transforms[i].time_warp_factor = 0
            else:
                transforms[i] = self.record = WarpRecord(transforms[i])
        return dataset


def _check_follow(joint: Any, in_model: bool, cached: bool) -> None:
    """Refuse ``--kd-time-warp follow`` where targets can't follow."""
    reason = ""
    if in_model:
        reason = "with --use-cr-ctc 1 the model itself warps, unseen"
    elif cached:
        reason = "--kd-teacher-cache-dir reads its targets after the data loader"
    elif "lattice" in joint.kinds:
        reason = "lattices can't be moved as CTC targets can"
    if reason:
        raise KDError(f"`time_warp` is follow, and {reason}: give `time_warp` off")

"""What becomes of SpecAugment's time warp, which moves frames away from targets."""

import logging
from typing import Any, Dict, List

from icefall_kd.errors import KDError

KINDS = ("off", "follow")
FACTOR = "spec_aug_time_warp_factor"


class TimeWarp:
    """``--kd-time-warp``: no time warp, or targets that follow it.

    In the data loader it is a transform of the dataset; with CR-CTC the model warps,
    by ``params``.

    Args:
      params: The recipe's own. With CR-CTC its time warp is switched off there.
      stored: Whether the targets were made before, of features as they are.
      cached: Whether the teacher in the training process makes them.
    """

    def __init__(self, params: Dict[str, Any], joint, stored: bool, cached: bool):
        self.kind = params["kd_time_warp"]
        self.record = None  # a WarpRecord, once the dataset is there
        if self.kind not in KINDS:
            raise KDError(
                f"--kd-time-warp is {self.kind}, and must be one of {', '.join(KINDS)}"
            )
        inside = bool(params.get("use_cr_ctc", False))
        factor = int(params.get(FACTOR, 0) or 0)
        on = factor >= 1 and (inside or bool(params.get("enable_spec_aug", False)))
        # A teacher in the training process hears what the data loader has warped.
        self.moves = on and bool(joint.teacher_kinds) and (stored or inside)
        if not self.moves:
            return
        if self.kind == "follow":
            self._check_follow(joint, inside, cached)
            logging.info(f"Targets follow the time warp (factor {factor})")
            return
        logging.warning(
            f"SpecAugment's time warp (--spec-aug-time-warp-factor {factor}) is "
            "switched off: it would move frames away from the teacher's targets"
        )
        if inside:
            params[FACTOR] = 0
            self.moves = False

    def _check_follow(self, joint, inside: bool, cached: bool) -> None:
        why = ""
        if inside:
            why = "with --use-cr-ctc 1 the model itself warps, unseen"
        elif cached:
            why = "--kd-teacher-cache-dir reads its targets behind the data loader"
        elif "lattice" in joint.kinds:
            why = "lattices can't be moved as CTC targets can"
        if why:
            raise KDError(
                f"--kd-time-warp is follow, and {why}: give --kd-time-warp off"
            )

    def apply(self, dataset):
        """Let the dataset's transforms warp no more, or remember how they did."""
        if not self.moves:
            return dataset
        transforms: List[Any] = getattr(dataset, "input_transforms", None) or []
        found = [i for i, t in enumerate(transforms) if hasattr(t, "time_warp_factor")]
        if not found:
            raise KDError(
                f"the training dataset ({type(dataset).__name__}) has no SpecAugment "
                "among its input_transforms, and --spec-aug-time-warp-factor says that "
                "it warps time: add --spec-aug-time-warp-factor 0"
            )
        for i in found:
            if self.kind == "off":
                transforms[i].time_warp_factor = 0
            else:
                from icefall_kd.targets.warp import WarpRecord

                transforms[i] = self.record = WarpRecord(transforms[i])
        return dataset

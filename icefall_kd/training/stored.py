"""The targets that the training cuts carry, as this student can use them."""

import logging
from typing import Any, Dict, Optional

import torch

from icefall_kd.targets.dataset import TargetDataset, store_fingerprint
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.first_look import FirstLook
from icefall_kd.targets.places import look_beside
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import tracks_with_targets
from icefall_kd.targets.warp import WarpRecord
from icefall_kd.tokens import hash_tokens, token_map
from icefall_kd.training import checks
from icefall_kd.training.tokenizer import StudentTokenizer
from icefall_kd.zipformer import subsampling_factor


class StoredTargets:
    """Fits the targets that ``icefall-kd dump`` stored to the student and the terms.

    Args:
      params: The recipe's params.
      joint: The joint loss.
      tokenizer: The student's.
    """

    def __init__(
        self, params: Dict[str, Any], joint: Any, tokenizer: StudentTokenizer
    ) -> None:
        self.params, self.joint, self.tokenizer = params, joint, tokenizer

    def wrap(
        self,
        dataset: torch.utils.data.Dataset,
        cuts: FirstLook,
        time_warp: Optional[WarpRecord] = None,
    ) -> TargetDataset:
        """Return the dataset, which puts the targets of its cuts into each batch.

        Args:
          dataset: The recipe's training dataset.
          cuts: The training cuts.
          time_warp: The record of the dataset's time warps, which targets follow.

        Raises:
          KDError: Cuts have no targets, or the store does not fit the joint loss or
            the student.
        """
        folder = str(self.params.get("manifest_dir") or "")
        look_beside(folder)
        missing = self.params["kd_missing"]
        fingerprint, store = store_fingerprint(cuts, missing)
        self.joint.check_store(fingerprint, store)
        checks.check_best_path(self.params, self.joint, fingerprint, store)
        if self.joint.projectors is not None:
            self.joint.projectors.read_widths(_layers_of_one(cuts.cuts))
        token_ids = self._token_map(fingerprint, store)
        frame_shift = self._frame_shift(fingerprint, store)
        return TargetDataset(
            dataset,
            missing,
            self.joint.teacher_kinds,
            frame_shift,
            token_ids,
            time_warp=time_warp,
            manifest_dir=folder,
        )

    def _token_map(
        self, fingerprint: Fingerprint, store: str
    ) -> Optional[torch.Tensor]:
        """The student's id of each of the teacher's tokens; None for the same ids."""
        names = self.tokenizer.names()
        tokens = names and hash_tokens(names)
        token_ids = None
        if tokens and fingerprint.tokens and tokens != fingerprint.tokens:
            token_ids = token_map(store, names, fingerprint.tokens)
        if token_ids is None:
            blank_id = self.params.get("blank_id", 0)
            fingerprint.check_student(self.params["vocab_size"], blank_id, tokens)
            return None
        checks.check_lattices_stay(self.joint, "the orders of tokens", store)
        logging.warning(
            f"The teacher's tokens in {store} have another order than the "
            "student's: targets are reordered"
        )
        return token_ids

    def _frame_shift(self, fingerprint: Fingerprint, store: str) -> Optional[float]:
        """Seconds between the student's frames; None where the teacher's are alike."""
        factor = subsampling_factor(self.params)
        shift = factor * fingerprint.feature_shift
        if abs(shift - fingerprint.frame_shift) <= 1e-6:
            return None
        checks.check_lattices_stay(self.joint, "the frame rates", store)
        logging.warning(
            f"The teacher gives a frame every {fingerprint.frame_shift} s and the "
            f"student every {shift} s: targets are resampled in time"
        )
        return shift


def _layers_of_one(cuts: Any) -> Dict[Any, torch.Tensor]:
    """The hidden layers of the first cut with targets."""
    for cut in cuts:
        if tracks_with_targets(cut):
            return collate_targets([cut], kinds=["hidden"]).parts["hidden"]
    return {}

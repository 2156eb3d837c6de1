"""Targets of a teacher that runs in the training process."""

from typing import Any, Dict

import torch

from icefall_kd.targets.dataset import cuts_of_rows
from icefall_kd.training.online import online_teacher, open_cache
from icefall_kd.training.tokenizer import StudentTokenizer
from icefall_kd.types import EncoderOut, Targets


class OnlineTargets:
    """Runs the teacher of ``--kd-teacher-exp-dir`` on training batches.

    Args:
      params: The recipe's params.
      joint: The joint loss.
      tokenizer: The student's.

    Attributes:
      cache: The cache of the teacher's targets, from the first batch on; or None.
    """

    def __init__(
        self,
        params: Dict[str, Any],
        joint: Any,
        tokenizer: StudentTokenizer,
    ) -> None:
        self.params, self.joint, self.tokenizer = dict(params), joint, tokenizer
        self.teacher, self.teacher_name = online_teacher(
            params, joint.teacher_layers, with_ctc="ctc" in joint.kinds
        )
        self.cache: Any = None

    def targets(
        self, batch: Dict[str, Any], student: EncoderOut, device: torch.device
    ) -> Targets:
        """Run the teacher on a training batch, or read what a cache has of it.

        Args:
          batch: The recipe's.
          student: The student's outputs, for its labels.
          device: The student's.
        """
        cuts = cuts_of_rows(batch)
        self.teacher.to(device)
        if self.params["kd_teacher_cache_dir"]:
            if self.cache is None:
                self.cache = open_cache(
                    self.teacher,
                    self.teacher_name,
                    self.params,
                    cuts[0],
                    self.tokenizer.names(),
                )
            return self.cache.targets(cuts, device)
        x = batch["inputs"].to(device)
        labels = None
        if "lattice" in self.joint.kinds and batch.get("kd_transcribed", True):
            # The recipe's own labels, whatever it makes them with.
            blank_id = self.params.get("blank_id", 0)
            rows = student.labels[: len(x), 1:].tolist()
            labels = [[token for token in row if token != blank_id] for row in rows]
        return self.teacher.targets(
            x,
            batch["supervisions"]["num_frames"].to(device),
            cuts,
            y=labels,
            s_range=self.params["kd_teacher_s_range"],
            path_only=bool(self.params["kd_teacher_path_only"]),
            missing=self.params["kd_missing"],
        )

"""Targets that are computed in the training process, or that no term needs."""

from typing import Any, Dict

import torch

from icefall_kd.targets.dataset import cuts_of_rows
from icefall_kd.targets.look import FirstLook
from icefall_kd.training.online import open_cache
from icefall_kd.training.tokenizer import StudentTokenizer
from icefall_kd.types import EncoderOut, Targets


class NoTargets:
    """No targets: the terms read n-best lists alone, which the cuts carry."""

    def wrap(
        self, dataset: torch.utils.data.Dataset, cuts: FirstLook
    ) -> torch.utils.data.Dataset:
        """Let the dataset return its cuts, and count them all.

        Args:
          dataset: The recipe's training dataset.
          cuts: The training cuts.
        """
        dataset.return_cuts = True
        cuts.all()
        return dataset

    def targets(
        self, batch: Dict[str, Any], student: EncoderOut, device: torch.device
    ) -> Targets:
        """Return empty targets of a training batch.

        Args:
          batch: The recipe's.
          student: The student's outputs, for the numbers of frames.
          device: The student's.
        """
        return Targets(student.encoder_out_lens[: len(batch["inputs"])])


class OnlineTargets:
    """Targets of a teacher that runs in the training process.

    Args:
      params: The recipe's params.
      joint: The joint loss.
      teacher: The teacher.
      teacher_name: Its name in the fingerprint of a cache.
      tokenizer: The student's.

    Attributes:
      cache: The cache of the teacher's targets, from the first batch on; or None.
    """

    def __init__(
        self,
        params: Dict[str, Any],
        joint: Any,
        teacher: Any,
        teacher_name: str,
        tokenizer: StudentTokenizer,
    ) -> None:
        self.params, self.joint = params, joint
        self.teacher, self.teacher_name = teacher, teacher_name
        self.tokenizer = tokenizer
        self.cache: Any = None

    def wrap(
        self, dataset: torch.utils.data.Dataset, cuts: FirstLook
    ) -> torch.utils.data.Dataset:
        """Let the dataset return its cuts; count them if weights change by epoch.

        Args:
          dataset: The recipe's training dataset.
          cuts: The training cuts.
        """
        dataset.return_cuts = True
        if self.joint.moves:
            cuts.all()
        return dataset

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

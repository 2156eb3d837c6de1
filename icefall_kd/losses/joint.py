"""The recipe's loss and the distillation terms, weighed and added."""

import math
from typing import Dict, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.losses.ctc import ctc_kd_loss
from icefall_kd.losses.kl import check_temperature
from icefall_kd.types import EncoderOut, Targets, select


class JointKDLoss:
    """L = hard_weight * L_recipe + ctc_weight * KD_ctc.

    L_recipe is what the recipe's ``compute_loss`` made of its transducer and CTC
    losses; KD_ctc is :func:`icefall_kd.losses.ctc_kd_loss`. All are sums over frames.

    Args:
      ctc_weight: Weight of KD_ctc, 0 or more.
      hard_weight: Weight of the recipe's own loss, 0 or more.
      temperature: T of the CTC term, above 0.

    Raises:
      KDError: a weight or temperature out of range, or both weights 0.
    """

    def __init__(
        self,
        ctc_weight: float = 1.0,
        hard_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        for name, value in (("ctc", ctc_weight), ("hard", hard_weight)):
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise KDError(
                    f"the KD {name} weight is {value!r}, and must be a finite number "
                    f"from 0 on: mend --kd-{name}-weight"
                )
        if ctc_weight == 0 and hard_weight == 0:
            raise KDError(
                "the KD ctc weight and the KD hard weight are both 0, so there is "
                "nothing to train: give --kd-ctc-weight or --kd-hard-weight a value"
            )
        check_temperature(temperature)
        self.ctc_weight = float(ctc_weight)
        self.hard_weight = float(hard_weight)
        self.temperature = float(temperature)

    def __call__(
        self, hard_loss: torch.Tensor, student: EncoderOut, targets: Targets
    ) -> Tuple[torch.Tensor, Dict[str, float]]:
        """Add the terms.

        Args:
          hard_loss: Scalar, the recipe's loss.
          student: What the student's forward pass gave.
          targets: What the teacher said on the same batch.

        Returns:
          The joint loss, and the unweighted terms by name, to be logged.

        Raises:
          KDError: numbers of frames or symbols of student and teacher that differ.
        """
        logits = student.ctc_logits
        if not targets.mask.any():  # no cut of the batch has targets
            loss = self.hard_weight * hard_loss + 0.0 * logits.sum()
            return loss, {"kd_ctc_loss": 0.0, "kd_frames": 0.0}
        if isinstance(targets.ctc, torch.Tensor) and targets.ctc.size(-1) != (
            logits.size(-1)
        ):
            raise KDError(
                f"the student's CTC head has {logits.size(-1)} symbols and the "
                f"teacher's targets have {targets.ctc.size(-1)}: both need the same "
                "BPE model"
            )
        lens = student.encoder_out_lens
        moved = targets.whole.cpu() & (targets.lens.cpu() != lens.cpu())
        if moved.any():
            raise KDError(
                f"the student gives {lens.tolist()} frames for the cuts of a batch and "
                f"the teacher's targets have {targets.lens.tolist()}: the cuts were "
                "changed after the targets were made, or the frame rates differ; run "
                "`icefall-kd dump` on the cuts that are trained on"
            )
        targets = targets.to(logits.device)
        # A part of a cut has fewer frames of its own than the whole has there.
        t = min(int(lens.max()), targets.mask.size(1))
        kd_ctc = ctc_kd_loss(
            logits[:, :t],
            select(targets.ctc, (slice(None), slice(t))),
            lens.clamp(max=t),
            self.temperature,
            targets.mask[:, :t],
        )
        loss = self.hard_weight * hard_loss + self.ctc_weight * kd_ctc
        lens = lens.cpu().unsqueeze(1)
        counted = targets.mask[:, :t].cpu() & (torch.arange(t) < lens)
        return loss, {
            "kd_ctc_loss": kd_ctc.detach().cpu().item(),
            "kd_frames": float(counted.sum()),
        }

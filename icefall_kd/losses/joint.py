"""The recipe's loss and the distillation terms, weighed and added."""

import math
from typing import Any, Dict, Optional, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.losses.ctc import ctc_kd_loss
from icefall_kd.losses.kl import check_temperature
from icefall_kd.losses.transducer import FORMS, shift, stored_nodes, transducer_kd_loss
from icefall_kd.types import EncoderOut, Nodes, Targets, select


class JointKDLoss:
    """L = hard_weight * L_recipe + ctc_weight * KD_ctc + rnnt_weight * KD_rnnt.

    L_recipe is what the recipe's ``compute_loss`` made of its transducer and CTC
    losses; KD_ctc is :func:`icefall_kd.losses.ctc_kd_loss`, KD_rnnt
    :func:`icefall_kd.losses.transducer_kd_loss`. All are sums, as icefall's.

    Args:
      ctc_weight: Weight of KD_ctc, 0 or more.
      hard_weight: Weight of the recipe's own loss, 0 or more.
      temperature: T of the KD terms, above 0.
      rnnt_weight: Weight of KD_rnnt, 0 or more.
      rnnt_form: "nodes", or "collapsed" to {next label, blank, rest}.
      rnnt_shift: Frames by which a streaming student may lag behind its teacher.

    Raises:
      KDError: a weight or temperature out of range, or all weights 0.
    """

    def __init__(
        self,
        ctc_weight: float = 1.0,
        hard_weight: float = 1.0,
        temperature: float = 1.0,
        rnnt_weight: float = 0.0,
        rnnt_form: str = "nodes",
        rnnt_shift: int = 0,
    ) -> None:
        weights = {"ctc": ctc_weight, "rnnt": rnnt_weight, "hard": hard_weight}
        for name, value in weights.items():
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise KDError(
                    f"the KD {name} weight is {value!r}, and must be a finite number "
                    f"from 0 on: mend --kd-{name}-weight"
                )
        if not any(weights.values()):
            raise KDError(
                "the KD ctc weight, the KD rnnt weight and the KD hard weight are all "
                "0, so there is nothing to train: give --kd-ctc-weight, "
                "--kd-rnnt-weight or --kd-hard-weight a value"
            )
        check_temperature(temperature)
        if rnnt_form not in FORMS:
            raise KDError(
                f"the form of the transducer's KD is {rnnt_form!r}: give "
                f"--kd-rnnt-form one of {', '.join(FORMS)}"
            )
        if not (isinstance(rnnt_shift, int) and rnnt_shift >= 0):
            raise KDError(f"--kd-rnnt-shift is {rnnt_shift!r}: give 0 or more frames")
        self.ctc_weight = float(ctc_weight)
        self.hard_weight = float(hard_weight)
        self.rnnt_weight = float(rnnt_weight)
        self.temperature = float(temperature)
        self.rnnt_form, self.rnnt_shift = rnnt_form, rnnt_shift

    def __str__(self) -> str:
        text = f"{self.hard_weight} * loss"
        if self.ctc_weight:
            text += f" + {self.ctc_weight} * kd_ctc_loss"
        if self.rnnt_weight:
            text += f" + {self.rnnt_weight} * kd_rnnt_loss ({self.rnnt_form}"
            text += f", shifted by {self.rnnt_shift})" if self.rnnt_shift else ")"
        return f"{text}, temperature {self.temperature}"

    def __call__(
        self,
        hard_loss: torch.Tensor,
        student: EncoderOut,
        targets: Targets,
        joiner: Optional[Any] = None,
        blank_id: int = 0,
    ) -> Tuple[torch.Tensor, Dict[str, float]]:
        """Add the terms.

        Args:
          hard_loss: Scalar, the recipe's loss.
          student: What the student's forward pass gave.
          targets: What the teacher said on the same batch.
          joiner: The student's, for KD_rnnt.
          blank_id: The student's.

        Returns:
          The joint loss, and the unweighted terms by name, to be logged.

        Raises:
          KDError: numbers of frames or symbols of student and teacher that differ.
        """
        loss, info = self.hard_weight * hard_loss, {}
        _check_frames(student, targets)
        targets = targets.to(student.encoder_out.device)
        if self.ctc_weight:
            kd_ctc, frames = self._ctc(student, targets)
            loss = loss + self.ctc_weight * kd_ctc
            info["kd_ctc_loss"] = _number(kd_ctc, "kd_ctc_loss")
            info["kd_frames"] = frames
        if self.rnnt_weight:
            kd_rnnt = self._rnnt(student, targets, joiner, blank_id)
            loss = loss + self.rnnt_weight * kd_rnnt
            info["kd_rnnt_loss"] = _number(kd_rnnt, "kd_rnnt_loss")
        return loss, info

    def _ctc(self, student: EncoderOut, targets: Targets) -> Tuple[torch.Tensor, float]:
        logits = student.ctc_logits
        if targets.ctc is None or not targets.mask.any():
            return 0.0 * logits.sum(), 0.0  # no cut of the batch has targets
        if isinstance(targets.ctc, torch.Tensor) and targets.ctc.size(-1) != (
            logits.size(-1)
        ):
            raise KDError(
                f"the student's CTC head has {logits.size(-1)} symbols and the "
                f"teacher's targets have {targets.ctc.size(-1)}: both need the same "
                "BPE model"
            )
        # A part of a cut has fewer frames of its own than the whole has there.
        lens = student.encoder_out_lens
        t = min(int(lens.max()), targets.mask.size(1))
        mask = targets.mask[:, :t]
        value = ctc_kd_loss(
            logits[:, :t],
            select(targets.ctc, (slice(None), slice(t))),
            lens.clamp(max=t),
            self.temperature,
            mask,
        )
        inside = torch.arange(t, device=mask.device) < lens.to(mask.device)[:, None]
        return value, float((mask & inside).sum())

    def _rnnt(
        self, student: EncoderOut, targets: Targets, joiner: Any, blank_id: int
    ) -> torch.Tensor:
        nodes = targets.nodes
        if nodes is None:
            nodes = stored_nodes(targets.lattices or [])
        lens = student.encoder_out_lens
        if nodes is None:  # no cut of the batch is whole and has a lattice
            states = student.encoder_out.sum() + student.decoder_out.sum()
            return 0.0 * (states + sum(p.sum() for p in joiner.parameters()))
        _check_labels(student.symbols, nodes)
        if self.rnnt_shift:
            nodes = shift(nodes, self.rnnt_shift, lens)
        return transducer_kd_loss(
            joiner,
            student.encoder_out,
            lens,
            student.decoder_out,
            nodes,
            self.temperature,
            self.rnnt_form,
            blank_id=blank_id,
        )


def _number(value: torch.Tensor, name: str) -> float:
    found = value.detach().cpu().item()
    if not math.isfinite(found):
        raise KDError(
            f"{name} is {found}: the student's outputs are not finite; lower "
            "--base-lr, or train without --use-fp16 to find where it begins"
        )
    return found


def _check_frames(student: EncoderOut, targets: Targets) -> None:
    lens = student.encoder_out_lens
    moved = targets.whole.cpu() & (targets.lens.cpu() != lens.cpu())
    if targets.mask.any() and moved.any():
        raise KDError(
            f"the student gives {lens.tolist()} frames for the cuts of a batch and "
            f"the teacher's targets have {targets.lens.tolist()}: the cuts were "
            "changed after the targets were made, or the frame rates differ; run "
            "`icefall-kd dump` on the cuts that are trained on"
        )


def _check_labels(symbols: torch.Tensor, nodes: Nodes) -> None:
    """Refuse a lattice of other transcripts than the student's."""
    some = (nodes.label >= 0).nonzero().squeeze(1)
    row, position = nodes.row[some], nodes.position[some] + 1
    inside = position < symbols.size(1)
    mine = symbols[row, position.clamp(max=symbols.size(1) - 1)]
    wrong = ~inside | (mine != nodes.label[some].to(mine.dtype))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise KDError(
            f"label {int(position[i])} of row {int(row[i])} of the batch is "
            f"{int(mine[i])} for the student and {int(nodes.label[some[i]])} in the "
            "teacher's lattice: the transcripts or their BPE model changed after the "
            "targets were made; run `icefall-kd dump` on the cuts that are trained on"
        )

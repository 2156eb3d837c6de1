"""The joint loss: the recipe's own loss and the terms, weighted and added."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import torch

from icefall_kd.errors import NotFiniteError, require
from icefall_kd.terms import TERMS
from icefall_kd.terms.base import UNSTORED_KINDS, Term, heads_of
from icefall_kd.terms.condition import Condition
from icefall_kd.terms.finite import NonFiniteBatches, finite_number
from icefall_kd.terms.inputs import TermInputs, check_frames, count_copies
from icefall_kd.terms.projectors import Projectors
from icefall_kd.terms.schedule import Curve, Schedule, Weight
from icefall_kd.types import EncoderOut, Targets

if TYPE_CHECKING:
    from icefall_kd.targets.fingerprint import Fingerprint


class JointKDLoss:
    """The recipe's loss and distillation terms.

    L = (1 - a) L_recipe + a (hard_weight L_recipe + sum over terms of weight * term),

    where L_recipe is the result of the recipe's ``compute_loss`` and a the schedule's
    share of distillation, 1 by default. All are sums over frames, as icefall's losses.
    ::

        joint = JointKDLoss(
            [CtcTerm(weight=0.8, temperature=2.0), TransducerTerm(weight="0:1,20:0.5")],
            hard_weight=0.5,
        )
        loss, info = joint(recipe_loss, student, targets, model)

    Args:
      terms: The terms, each with its weight; those whose weight is always 0 are off.
      hard_weight: The weight of the recipe's own loss, 0 or more, also by epoch.
      schedule: The share a; None for 1.
      condition: Which utterances teach: "none", "right" or "better"; see
        :class:`~icefall_kd.terms.condition.Condition`.

    Attributes:
      terms: The terms that are on, by name.
      condition: The condition.

    Raises:
      KDError: two terms of one name, a weight out of range, all weights 0, or another
        condition.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        hard_weight: Weight = 1.0,
        schedule: Optional[Schedule] = None,
        condition: str = "none",
    ) -> None:
        names = [term.name for term in terms]
        require(
            len(set(names)) == len(names),
            f"`terms` has a term twice among {', '.join(names)}: give each once",
        )
        self.hard_weight = Curve.parse(hard_weight, "`hard_weight`")
        self.schedule = schedule or Schedule()
        self.condition = Condition(condition)
        self.terms = {term.name: term for term in terms if term.weight.highest > 0}
        require(
            self.terms or self.hard_weight.highest,
            f"the weights of {', '.join([*names, 'hard'])} are all 0, so there is "
            "nothing to train: give a term a weight, or `hard_weight` a value",
        )
        temperatures = dict.fromkeys(term.temperature for term in terms)
        self._temperatures = [t for t in temperatures if t is not None]  # for the log
        self._non_finite = NonFiniteBatches()

    @classmethod
    def from_params(
        cls, params: Dict[str, Any], num_epochs: float = math.inf
    ) -> JointKDLoss:
        """Construct the joint loss that the ``--kd-*`` options describe.

        Args:
          params: The recipe's params.
          num_epochs: How many epochs this training has.
        """
        schedule = Schedule(params["kd_schedule"], num_epochs, params["kd_last_epochs"])
        terms = [term.from_params(params) for term in TERMS.values()]
        hard_weight, condition = params["kd_hard_weight"], params["kd_condition"]
        return cls(terms, hard_weight, schedule, condition)

    @property
    def kinds(self) -> List[str]:
        """The kinds of targets that the terms and the condition read."""
        return list(dict.fromkeys([*self._kinds_of_terms, *self.condition.kinds]))

    @property
    def _kinds_of_terms(self) -> List[str]:
        return [kind for term in self.terms.values() for kind in term.kinds]

    @property
    def teacher_kinds(self) -> List[str]:
        """Those of :attr:`kinds` that a teacher outputs; cuts carry n-best lists."""
        return [kind for kind in self.kinds if kind not in UNSTORED_KINDS]

    @property
    def teacher_layers(self) -> List[Any]:
        """The hidden layers that the terms read of the teacher."""
        return [layer for t in self.terms.values() for layer in t.teacher_layers]

    @property
    def student_layers(self) -> List[Any]:
        """The hidden layers that the terms read of the student."""
        return [layer for t in self.terms.values() for layer in t.student_layers]

    @property
    def projectors(self) -> Optional[Projectors]:
        """The projectors of the hidden term, which train beside the student."""
        hidden = self.terms.get("hidden")
        return hidden and hidden.projectors

    @property
    def is_constant(self) -> bool:
        """Whether all weights stay the same while the student trains."""
        weights = [self.hard_weight, *(t.weight for t in self.terms.values())]
        return self.schedule.is_constant and all(len(w.points) == 1 for w in weights)

    def heads(self, model: torch.nn.Module) -> List[str]:
        """Return the heads of a student that the terms and the condition read: "ctc",
        "transducer", "simple".

        Args:
          model: The student.
        """
        heads = [h for t in self.terms.values() for h in (*t.heads, *t.optional_heads)]
        heads += self.condition.heads
        return [head for head in heads_of(model) if head in heads]

    def leave_out_terms(self, model: torch.nn.Module) -> None:
        """Go on without the terms whose heads a student lacks.

        Args:
          model: The student.

        Raises:
          KDError: no term remains, or the condition needs what they or the student
            lack.
        """
        for name, term in list(self.terms.items()):
            lacking = term.missing_heads(model)
            if not lacking:
                continue
            del self.terms[name]
            require(
                self.terms,
                f"{term.parameter('weight')} is above 0 and the student has no "
                f"{lacking[0]}: train it with one, or give another term a weight",
            )
            logging.warning(
                f"The term kd_{name}_loss is off: the student has no {lacking[0]}"
            )
        kinds = [kind for kind in self._kinds_of_terms if kind not in UNSTORED_KINDS]
        self.condition.check_student(model, kinds)

    def check_store(self, fingerprint: Fingerprint, store: str) -> None:
        """Refuse a store that lacks what a term or the condition reads.

        Args:
          fingerprint: The store's.
          store: Its folder, for messages.
        """
        for term in self.terms.values():
            term.check_store(fingerprint, store)
        self.condition.check_store(fingerprint, store)

    def weights(self, epoch: float = 0.0) -> Dict[str, float]:
        """Return the weights in force, by term, and that of the recipe's loss, "hard".

        Args:
          epoch: How many epochs are done, with a fraction.
        """
        share = self.schedule(epoch)
        weights = {"hard": 1 - share + share * self.hard_weight(epoch)}
        for name, term in self.terms.items():
            weights[name] = share * term.weight(epoch)
        return weights

    def __str__(self) -> str:
        text = f"{self.hard_weight} * loss"
        for name, term in self.terms.items():
            note = term.note()
            text += f" + {term.weight} * kd_{name}_loss" + (
                f" ({note})" if note else ""
            )
        for temperature in self._temperatures:
            text += f", temperature {temperature}"
        if not self.schedule.is_constant:
            text += f", schedule {self.schedule}"
        if self.condition:
            text += f", of utterances where the teacher is {self.condition}"
        return text

    def __call__(
        self,
        hard_loss: torch.Tensor,
        student: EncoderOut,
        targets: Targets,
        model: Optional[torch.nn.Module] = None,
        blank_id: int = 0,
        epoch: float = 0.0,
        transcribed: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Dict[str, float]]:
        """Compute the joint loss of a batch.

        Args:
          hard_loss: Scalar, the recipe's loss.
          student: The outputs of the student's forward pass, N rows; with a condition
            they have its ``labels``.
          targets: The teacher's targets of the same batch. Where the student has its
            rows twice, as CR-CTC (Yao et al., arXiv:2410.05101) has them, each copy
            gets them, and the terms are means over the copies, as the recipe's are.
          model: The student, for the terms of its transducer.
          blank_id: The student's blank.
          epoch: How many epochs are done, with a fraction.
          transcribed: (N,), bool, the rows of the targets that have transcripts; None:
            all. The others teach whatever the condition; they must have no part in
            ``hard_loss``, which does not count where no row has a transcript.

        Returns:
          The joint loss, and what is to be logged, on the scale of sums: the unweighted
          terms by name, and the number of frames of each, ``kd_frames`` of the CTC
          term; both are 0 where a term is off in this batch. With a condition also
          ``kd_taught``, the share of the utterances that taught, from 0 to 1.

        Raises:
          KDError: numbers of frames or tokens of student and teacher that differ, or
            many batches in a row whose terms are not finite. A term that is not finite
            in one batch is left out of it; see :mod:`icefall_kd.terms.finite`.
        """
        weights = self.weights(epoch)
        has_hard_loss = transcribed is None or bool(transcribed.any())
        hard_weight = weights["hard"] if has_hard_loss else 0.0
        loss = _weighted_hard_loss(hard_weight, hard_loss, student, model)
        info: Dict[str, float] = {}
        copies = count_copies(student, targets)
        targets = targets.tile(copies)
        check_frames(student, targets)
        targets = targets.to(student.encoder_out.device)
        for term in self.terms.values():
            term.prepare(student, targets)
        active = [term for name, term in self.terms.items() if weights[name]]
        node_logits = any(term.needs_node_logits for term in active)
        batch = TermInputs(student, targets, model, blank_id, node_logits)
        if self.condition:
            teaches = has_targets = batch.mask.any(1)
            if has_hard_loss and active:
                teaches = self.condition.teaching_rows(batch)
                if transcribed is not None:
                    rows = transcribed.to(teaches.device).repeat(copies)
                    teaches = torch.where(rows, teaches, has_targets)
            info["kd_taught"] = float(teaches.float().mean()) if active else 0.0
            targets = targets.of_rows(teaches)
            batch = TermInputs(student, targets, model, blank_id, node_logits)
        errors: List[NotFiniteError] = []
        for name, term in self.terms.items():
            value, frames, number = loss.new_zeros(()), 0.0, 0.0
            try:
                if term in active:
                    value, frames = term.value(batch)
                    number = finite_number(value, f"kd_{name}_loss") / copies
            except NotFiniteError as e:
                errors.append(e)
                value, frames = loss.new_zeros(()), 0.0
            loss = loss + weights[name] * value / copies
            info[f"kd_{name}_loss"] = number
            info[term.frames_name] = frames / copies
        self._non_finite.count(errors)
        return loss, info


def _weighted_hard_loss(
    weight: float,
    loss: torch.Tensor,
    student: EncoderOut,
    model: Optional[torch.nn.Module],
) -> torch.Tensor:
    """Weight the recipe's loss; without a weight it doesn't count, finite or not."""
    if weight or torch.isfinite(loss):
        return weight * loss
    # DDP waits for a gradient of each parameter that the recipe's loss was made of.
    return TermInputs.zero(student.encoder_out, *(model.parameters() if model else ()))

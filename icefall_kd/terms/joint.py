"""The recipe's loss and the distillation terms, weighed and added."""

from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch

from icefall_kd.errors import KDError, NotFiniteError
from icefall_kd.losses.ctc import FRAMES, ctc_kd_loss
from icefall_kd.losses.full_sum import full_sum_kd_loss
from icefall_kd.losses.kl import check_temperature
from icefall_kd.losses.sequence import nbest_ctc_loss, nbest_transducer_loss
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.losses.transducer import (
    FORMS,
    nodes_kd_loss,
    shift,
    stored_nodes,
    total_kd_loss,
)
from icefall_kd.terms.batch_checks import check_frames, check_labels, count_copies
from icefall_kd.terms.finite import NonFiniteBatches, finite_number
from icefall_kd.terms.layers import HiddenLayers
from icefall_kd.terms.schedule import Curve, Schedule
from icefall_kd.types import EncoderOut, Nodes, Targets, index_rows

Weight = Union[float, str, Curve]
Term = Tuple[torch.Tensor, float]  # a sum over frames, and how many these are
TOTAL = "total"


class JointKDLoss:
    """L = (1 - a) L_recipe + a (hard_weight L_recipe + sum over terms of weight * KD).

    L_recipe is what the recipe's ``compute_loss`` made of its transducer and CTC
    losses, a the schedule's share of distillation, 1 by default. All are sums, as
    icefall's. A weight is a number or a :class:`icefall_kd.terms.schedule.Curve` over
    the epochs; a term whose weight is always 0 is off.

    ============  ===================================================================
    ``ctc``       :func:`icefall_kd.losses.ctc_kd_loss`
    ``rnnt``      :func:`icefall_kd.losses.transducer_kd_loss` on the teacher's lattice
    ``full_sum``  :func:`icefall_kd.losses.full_sum.full_sum_kd_loss`, same nodes
    ``hidden``    :class:`icefall_kd.terms.layers.HiddenLayers`
    ``nbest``     :func:`icefall_kd.losses.sequence.nbest_ctc_loss`, where the student
                  has a CTC head, + that of its transducer, where it has one
    ============  ===================================================================

    Args:
      ctc_weight, rnnt_weight, full_sum_weight, hidden_weight, nbest_weight: Of the
        terms, 0 or more.
      hard_weight: Of the recipe's own loss, 0 or more.
      temperature: T of the frame and node terms, above 0.
      rnnt_form: "nodes"; "collapsed" to {next label, blank, rest}; "mean_u";
        "sampled_u"; or "total", the mean over U mixed with the CTC head.
      rnnt_shift: Frames by which a streaming student may lag behind its teacher.
      node_weights: "occupancy" of the teacher's path, or "equal".
      ctc_frames: Which frames count; see :func:`icefall_kd.losses.ctc_kd_loss`.
      ctc_delay: Frames by which a streaming student's CTC head may lag behind.
      hidden: The pairs of layers, for ``hidden_weight``.
      schedule: Of the share a.

    Raises:
      KDError: a weight or temperature out of range, or all weights 0.
    """

    def __init__(
        self,
        ctc_weight: Weight = 1.0,
        hard_weight: Weight = 1.0,
        temperature: float = 1.0,
        rnnt_weight: Weight = 0.0,
        rnnt_form: str = "nodes",
        rnnt_shift: int = 0,
        full_sum_weight: Weight = 0.0,
        hidden_weight: Weight = 0.0,
        nbest_weight: Weight = 0.0,
        node_weights: str = "occupancy",
        ctc_frames: str = "all",
        ctc_delay: int = 0,
        hidden: Optional[HiddenLayers] = None,
        schedule: Optional[Schedule] = None,
    ) -> None:
        self.hard = Curve.parse(hard_weight, "hard")
        weights = {
            "ctc": ctc_weight,
            "rnnt": rnnt_weight,
            "full_sum": full_sum_weight,
            "hidden": hidden_weight,
            "nbest": nbest_weight,
        }
        curves = {name: Curve.parse(value, name) for name, value in weights.items()}
        self.terms = {name: c for name, c in curves.items() if c.highest > 0}
        if not self.terms and not self.hard.highest:
            raise KDError(
                f"the KD {', '.join(curves)} and hard weights are all 0, so there is "
                "nothing to train: give --kd-ctc-weight, --kd-rnnt-weight or "
                "--kd-hard-weight a value"
            )
        check_temperature(temperature)
        for name, value, known in (
            ("rnnt-form", rnnt_form, (*FORMS, TOTAL)),
            ("node-weights", node_weights, ("occupancy", "equal")),
            ("ctc-frames", ctc_frames, FRAMES),
        ):
            if value not in known:
                raise KDError(
                    f"--kd-{name} is {value!r}: give one of {', '.join(known)}"
                )
        for name, value in (("rnnt-shift", rnnt_shift), ("ctc-delay", ctc_delay)):
            if not (isinstance(value, int) and value >= 0):
                raise KDError(f"--kd-{name} is {value!r}: give 0 or more frames")
        if rnnt_form == TOTAL and rnnt_shift:
            raise KDError(
                f"--kd-rnnt-shift is {rnnt_shift} and the form is {TOTAL}, whose CTC "
                "half stays where it is: give --kd-rnnt-shift 0, or another form"
            )
        if "hidden" in self.terms and hidden is None:
            raise KDError(
                "the KD hidden weight is above 0 and no layers are named: give "
                "--kd-hidden-layers, such as out:out"
            )
        self.temperature = float(temperature)
        self.rnnt_form, self.rnnt_shift = rnnt_form, rnnt_shift
        self.node_weights = node_weights
        self.ctc_frames, self.ctc_delay = ctc_frames, ctc_delay
        self.hidden = hidden if "hidden" in self.terms else None
        self.schedule = schedule or Schedule()
        self.non_finite = NonFiniteBatches()

    @property
    def needs_lattice(self) -> bool:
        return "rnnt" in self.terms or "full_sum" in self.terms

    @property
    def needs_ctc_targets(self) -> bool:
        return "ctc" in self.terms or self.is_total

    @property
    def needs_targets(self) -> bool:
        return not set(self.terms) <= {"nbest"}

    @property
    def is_total(self) -> bool:
        return "rnnt" in self.terms and self.rnnt_form == TOTAL

    @property
    def moves(self) -> bool:
        """Whether a weight changes while the student trains."""
        curves = (self.hard, *self.terms.values())
        return self.schedule.moves or any(len(c.points) > 1 for c in curves)

    def switch_off(self, name: str) -> None:
        """Go on without a term, which the student has no head for."""
        del self.terms[name]

    def weights(self, epoch: float = 0.0) -> Dict[str, float]:
        """The effective weights after so many epochs, the hard loss's among them."""
        share = self.schedule(epoch)
        found = {"hard": 1 - share + share * self.hard(epoch)}
        return {**found, **{n: share * c(epoch) for n, c in self.terms.items()}}

    def __str__(self) -> str:
        notes = {
            "ctc": self.ctc_frames if self.ctc_frames != "all" else "",
            "rnnt": self.rnnt_form,
            "hidden": str(self.hidden),
        }
        if self.ctc_delay:
            notes["ctc"] += f" delays 0 to {self.ctc_delay}"
        if self.rnnt_shift:
            notes["rnnt"] += f", shifted by {self.rnnt_shift}"
        if self.node_weights != "occupancy":
            notes["rnnt"] += f", {self.node_weights} nodes"
        text = f"{self.hard} * loss"
        for name, curve in self.terms.items():
            note = notes.get(name, "").strip()
            text += f" + {curve} * kd_{name}_loss" + (f" ({note})" if note else "")
        text += f", temperature {self.temperature}"
        return text + (f", schedule {self.schedule}" if self.schedule.moves else "")

    def __call__(
        self,
        hard_loss: torch.Tensor,
        student: EncoderOut,
        targets: Targets,
        model: Optional[Any] = None,
        blank_id: int = 0,
        epoch: float = 0.0,
        transcribed: bool = True,
    ) -> Tuple[torch.Tensor, Dict[str, float]]:
        """Add the terms.

        Args:
          hard_loss: Scalar, the recipe's loss.
          student: What the student's forward pass gave.
          targets: What the teacher said on the same batch. Where the student has its
            rows twice, as CR-CTC (Yao et al., arXiv:2410.05101) has them, each copy
            gets them, and the terms are means over the copies, as the recipe's are.
          model: The student, for the terms of its transducer.
          blank_id: The student's.
          epoch: How many epochs are done, a fraction among them.
          transcribed: Whether the batch has transcripts; the hard loss is off without.

        Returns:
          The joint loss, and what is to be logged, on the scale of sums: the unweighted
          terms by name, ``kd_frames``, those that have CTC targets, and the frames of
          the other terms, which are 0 where a term is off in this batch.

        Raises:
          KDError: numbers of frames or symbols of student and teacher that differ, or
            many batches in a row whose terms are not finite. A term that is not finite
            in one batch is left out of it; see :mod:`icefall_kd.terms.finite`.
        """
        weights = self.weights(epoch)
        loss = _weighted(
            weights["hard"] if transcribed else 0.0, hard_loss, student, model
        )
        info: Dict[str, float] = {}
        copies = count_copies(student, targets)
        targets = targets.tile(copies)
        check_frames(student, targets)
        targets = targets.to(student.encoder_out.device)
        if self.hidden is not None:  # in every process, whatever its batch has
            self.hidden.build(student, targets)
        on = [name for name in self.terms if weights[name]]
        batch = _Batch(self, on, student, targets, model, blank_id)
        errors: List[NotFiniteError] = []
        for name in self.terms:
            term: Callable[[], Term] = getattr(batch, name)
            value, frames, number = loss.new_zeros(()), 0.0, 0.0
            try:
                if name in on:
                    value, frames = term()
                    number = finite_number(value, f"kd_{name}_loss") / copies
            except NotFiniteError as e:
                errors.append(e)
                value, frames = loss.new_zeros(()), 0.0
            loss = loss + weights[name] * value / copies
            info[f"kd_{name}_loss"] = number
            frames_name = "kd_frames" if name == "ctc" else f"kd_{name}_frames"
            info[frames_name] = frames / copies
        self.non_finite.saw(errors)
        return loss, info


class _Batch:
    """The terms of one batch, of which ``on`` count."""

    def __init__(self, joint, on, student, targets, model, blank_id) -> None:
        self.joint, self.on = joint, on
        self.student, self.targets = student, targets
        self.model, self.blank_id = model, blank_id
        self._found: Optional[Nodes] = None
        self._asked: Optional[StudentNodes] = None
        lens = student.encoder_out_lens.to(targets.mask.device)
        # A part of a cut has fewer frames of its own than the whole has there.
        t = min(int(lens.max()), targets.mask.size(1))
        inside = torch.arange(t, device=lens.device) < lens[:, None]
        self.mask = targets.mask[:, :t] & inside
        self.lens, self.frames = lens.clamp(max=t), slice(t)

    def _ctc_logits(self) -> Tuple[torch.Tensor, Any]:
        """Those of the student and of the teacher, as long as the mask."""
        logits, said = self.student.ctc_logits, self.targets.parts["ctc"]
        if isinstance(said, torch.Tensor) and said.size(-1) != logits.size(-1):
            raise KDError(
                f"the student's CTC head has {logits.size(-1)} symbols and the "
                f"teacher's targets have {said.size(-1)}: both need the same BPE model"
            )
        return logits[:, self.frames], index_rows(said, (slice(None), self.frames))

    def _no_ctc_targets(self) -> bool:
        return self.targets.parts.get("ctc") is None or not self.targets.mask.any()

    def ctc(self) -> Term:
        if self._no_ctc_targets():
            return _nothing(self.student.ctc_logits), 0.0
        logits, said = self._ctc_logits()
        value = ctc_kd_loss(
            logits,
            said,
            self.lens,
            temperature=self.joint.temperature,
            mask=self.mask,
            frames=self.joint.ctc_frames,
            delay=self.joint.ctc_delay,
            blank_id=self.blank_id,
        )
        return value, float(self.mask.sum())

    def _stored(self) -> Optional[Nodes]:
        if self._found is None:
            nodes = self.targets.parts.get("nodes")
            if nodes is None:
                nodes = stored_nodes(self.targets.parts.get("lattice") or [])
            if nodes is not None:
                check_labels(self.student.labels, nodes)
            self._found = nodes
        return self._found

    def _no_lattice(self) -> Term:
        student, joiner = self.student, self.model.joiner
        states = (student.encoder_out, student.decoder_out)
        return _nothing(*states, *joiner.parameters()), 0.0

    def _student_nodes(self, nodes: Nodes) -> StudentNodes:
        """The student's joiner at nodes, asked once for all terms."""
        if self._asked is None or self._asked.nodes is not nodes:
            student = self.student
            self._asked = StudentNodes(
                self.model.joiner,
                student.encoder_out,
                student.decoder_out,
                nodes,
                student.encoder_out_lens,
            )
            if student.lattice_logits is not None:
                self._asked.take_logits(student.ranges, student.lattice_logits)
            if "full_sum" in self.on and nodes is self._found:
                self._asked.logits()  # which the other terms then take too
        return self._asked

    def _frames_of(self, nodes: Nodes) -> float:
        return float(
            self.student.encoder_out_lens.to(nodes.row.device)[nodes.row.unique()].sum()
        )

    def rnnt(self) -> Term:
        nodes, joint = self._stored(), self.joint
        if nodes is None:  # no cut of the batch is whole and has a lattice
            return self._no_lattice()
        if joint.rnnt_shift:
            nodes = shift(nodes, joint.rnnt_shift, self.student.encoder_out_lens)
        asked = self._student_nodes(nodes)
        if joint.is_total:
            if self._no_ctc_targets():
                return self._no_lattice()
            value = total_kd_loss(
                asked, *self._ctc_logits(), temperature=joint.temperature
            )
        else:
            value = nodes_kd_loss(
                asked,
                temperature=joint.temperature,
                form=joint.rnnt_form,
                blank_id=self.blank_id,
                node_weights=joint.node_weights,
            )
        return value, self._frames_of(nodes)

    def full_sum(self) -> Term:
        nodes = self._stored()
        if nodes is None:
            return self._no_lattice()
        asked = self._student_nodes(nodes)
        value = full_sum_kd_loss(asked, blank_id=self.blank_id)
        return value, self._frames_of(nodes)

    def hidden(self) -> Term:
        value = self.joint.hidden(self.student, self.targets, self.mask)
        return value, (
            float(self.mask.sum()) if self.targets.parts.get("hidden") else 0.0
        )

    def nbest(self) -> Term:
        lists, student = self.targets.parts.get("nbest"), self.student
        value = _nothing(student.encoder_out)
        if not lists or not any(lists):
            return value, 0.0
        if student.ctc_logits is not None:
            value = value + nbest_ctc_loss(
                student.ctc_logits,
                lists,
                student.encoder_out_lens,
                blank_id=self.blank_id,
            )
        if student.decoder_out is not None:
            value = value + nbest_transducer_loss(
                self.model, student.encoder_out, lists, student.encoder_out_lens
            )
        some = torch.tensor([bool(x) for x in lists], device=self.lens.device)
        return value, float(student.encoder_out_lens.to(some.device)[some].sum())


def _weighted(
    weight: float, loss: torch.Tensor, student: EncoderOut, model: Optional[Any]
) -> torch.Tensor:
    """The recipe's loss as it counts; without weight it is no term, inf or not."""
    if weight or torch.isfinite(loss):
        return weight * loss
    # DDP waits for a gradient of each parameter that the recipe's loss was made of.
    return _nothing(student.encoder_out, *(model.parameters() if model else ()))


def _nothing(*of: torch.Tensor) -> torch.Tensor:
    """0, whose gradient is 0 whatever stands there."""
    return sum(x.flatten()[:0].sum() for x in of)

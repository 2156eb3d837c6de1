"""The term of the transducer's output at the nodes of the teacher's lattice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Tuple

from icefall_kd.errors import KDError, require
from icefall_kd.terms.base import TEMPERATURE, Option, Term
from icefall_kd.terms.schedule import Curve, Weight

if TYPE_CHECKING:
    import torch

    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.terms.inputs import TermInputs

TOTAL = "total"
MEANS = ("mean_u", TOTAL)  # forms that average over all tokens: they need dense targets


class TransducerTerm(Term):
    """The KL divergence of the transducer's output at the nodes of a lattice.

    See :func:`icefall_kd.losses.transducer_kd_loss` for its equation.

    Args:
      weight: The weight in the joint loss, 0 or more.
      temperature: T, above 0.
      form: "nodes"; "collapsed" to {next label, blank, rest}; "mean_u"; "sampled_u"; or
        "total", the mean over label positions mixed with the CTC head, see
        :func:`icefall_kd.losses.transducer.total_kd_loss`.
      shift: Frames by which a streaming student is later than its teacher.
      node_weighting: "occupancy", the probability that the teacher's alignment passes
        through a node; or "equal".
      blank_weight: The weight of whether a node emits, beside which symbol, 0 or more.

    Raises:
      KDError: a parameter out of range, or a shift of the form "total".
    """

    name = "rnnt"
    options = (
        Option(
            "rnnt-weight",
            "weight",
            Curve,
            0.0,
            "Weight of the transducer's term: the KL divergence between the joiner's "
            "outputs of teacher and student, summed over the nodes of the teacher's "
            "pruned lattice. It is a number such as 1, or numbers by epoch.",
        ),
        TEMPERATURE,
        Option(
            "rnnt-form",
            "form",
            str,
            "nodes",
            "What the transducer's term compares. nodes: all tokens at each node. "
            "collapsed: {next label, blank, all others} at each node. mean_u: the mean "
            "over the label positions of a frame. sampled_u: one label position of "
            "each frame, drawn at random. total: mean_u mixed with the CTC head.",
        ),
        Option(
            "rnnt-shift",
            "shift",
            int,
            0,
            "The number of frames (of 40 ms) by which a streaming student's transducer "
            "is later than its teacher: frame t of the teacher teaches frame t + N of "
            "the student, with N such as 4.",
            bounds=(0, 1000),
        ),
        Option(
            "rnnt-node-weighting",
            "node_weighting",
            str,
            "occupancy",
            "How the transducer's term weighs nodes. occupancy: by the probability "
            "that the teacher's alignment passes through the node. equal: each node "
            "counts 1.",
        ),
        Option(
            "rnnt-blank-weight",
            "blank_weight",
            float,
            1.0,
            "Weight B, within the transducer's term, of whether a node emits: the term "
            "is B times the divergence of blank and not blank, and that of the symbols "
            "where the teacher has no blank. 1 is the plain divergence. 0 leaves it to "
            "the student when it emits, and teaches what.",
        ),
    )

    def __init__(
        self,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        form: str = "nodes",
        shift: int = 0,
        node_weighting: str = "occupancy",
        blank_weight: float = 1.0,
    ) -> None:
        from icefall_kd.losses.checks import check_temperature
        from icefall_kd.losses.transducer import FORMS, check_blank_weight

        super().__init__(weight)
        check_temperature(temperature)
        self.require_one_of("form", form, (*FORMS, TOTAL))
        self.require_one_of("node_weighting", node_weighting, ("occupancy", "equal"))
        self.require_frames("shift", shift)
        check_blank_weight(blank_weight, form)
        require(
            form != TOTAL or not shift,
            f"{self.parameter('shift')} is {shift} and the form is {TOTAL}, whose CTC "
            f"half is not shifted: give {self.parameter('shift')} 0, or another form",
        )
        self.temperature = float(temperature)
        self.form, self.shift, self.node_weighting = form, shift, node_weighting
        self.blank_weight = float(blank_weight)
        with_ctc = form == TOTAL
        self.kinds = ("ctc", "lattice") if with_ctc else ("lattice",)
        self.heads = ("transducer", "ctc") if with_ctc else ("transducer",)

    def note(self) -> str:
        note = self.form
        if self.shift:
            note += f", shifted by {self.shift}"
        if self.node_weighting != "occupancy":
            note += f", {self.node_weighting} nodes"
        if self.blank_weight != 1:
            note += f", blank times {self.blank_weight:g}"
        return note

    def check_store(self, fingerprint: Fingerprint, store: str) -> None:
        """Refuse a ``store`` whose ``fingerprint`` names another temperature, or forms
        that a mean over all tokens can't be taken of."""
        super().check_store(fingerprint, store)
        lattice = fingerprint.kinds["lattice"].codec
        ctc = fingerprint.kinds["ctc"].codec if self.form == TOTAL else None
        if ctc is not None:
            ctc.check_temperature(self.temperature)
        lattice.check_temperature(self.temperature)
        if self.form not in MEANS:
            return
        node_codec = lattice.node_codec
        lattice_is_dense = node_codec is not None and node_codec.method == "dense"
        ctc_is_dense = ctc is None or ctc.method == "dense"
        if not (lattice_is_dense and ctc_is_dense):
            raise KDError(
                f"the store {store} keeps its CTC targets as "
                f"{fingerprint.ctc or 'none'} and its lattices as "
                f"{fingerprint.lattice}, and {self.parameter('form')} {self.form} "
                "takes means over all tokens: dump with --keep dense --keep-lattice "
                "dense"
            )

    def value(self, batch: TermInputs) -> Tuple[torch.Tensor, float]:
        """Sum the divergence over the nodes of the lattices of ``batch``."""
        from icefall_kd.losses.nodes import shift
        from icefall_kd.losses.transducer import nodes_kd_loss, total_kd_loss

        nodes = batch.nodes
        if nodes is None:  # no row of the batch has a lattice
            return batch.zero_of_transducer(), 0.0
        if self.shift:
            nodes = shift(nodes, self.shift, batch.student.encoder_out_lens)
        student = batch.student_nodes(nodes)
        if self.form == TOTAL:
            ctc_logits = batch.ctc_logits()
            if ctc_logits is None:
                return batch.zero_of_transducer(), 0.0
            value = total_kd_loss(student, *ctc_logits, temperature=self.temperature)
        else:
            value = nodes_kd_loss(
                student,
                temperature=self.temperature,
                form=self.form,
                node_weighting=self.node_weighting,
                blank_weight=self.blank_weight,
                blank_id=batch.blank_id,
            )
        return value, batch.count_frames(nodes.row.unique())

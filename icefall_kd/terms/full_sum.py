"""The term of a transcript's probability, summed over its alignments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Tuple

from icefall_kd.errors import KDError
from icefall_kd.terms.base import Option, Term
from icefall_kd.terms.schedule import Curve, Weight

if TYPE_CHECKING:
    import torch

    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.terms.inputs import TermInputs


class FullSumTerm(Term):
    """The distance between teacher and student of a transcript's log-probability.

    See :func:`icefall_kd.losses.full_sum.full_sum_kd_loss` for its equation.

    Args:
      weight: The weight in the joint loss, 0 or more.
      form: "two-sided", the distance of the two, or "one-sided", which is 0 where the
        student finds the transcript more probable than its teacher.

    Raises:
      KDError: a parameter out of range.
    """

    name = "full_sum"
    kinds = ("lattice",)
    heads = ("transducer",)
    needs_node_logits = True
    options = (
        Option(
            "full-sum-weight",
            "weight",
            Curve,
            0.0,
            "Weight of the full-sum term: the distance between the teacher's and the "
            "student's log-probability of the transcript, each summed over the paths "
            "of the teacher's lattice. It is a number such as 0.1, or numbers by "
            "epoch.",
        ),
        Option(
            "full-sum-form",
            "form",
            str,
            "two-sided",
            "What the full-sum term compares. two-sided: the student is to have the "
            "teacher's log-probability of the transcript. one-sided: it is to have it "
            "or more, so that a teacher teaches nothing on an utterance whose "
            "transcript it finds less probable than the student does.",
        ),
    )

    def __init__(self, weight: Weight = 1.0, form: str = "two-sided") -> None:
        from icefall_kd.losses.full_sum import FULL_SUM_FORMS

        super().__init__(weight)
        self.require_one_of("form", form, FULL_SUM_FORMS)
        self.form = form

    def note(self) -> str:
        return "" if self.form == "two-sided" else self.form

    def check_store(self, fingerprint: Fingerprint, store: str) -> None:
        """Refuse a ``store`` whose ``fingerprint`` names a temperature other than 1."""
        super().check_store(fingerprint, store)
        try:
            fingerprint.kinds["lattice"].codec.check_temperature(1.0)
        except KDError:
            raise KDError(
                f"the store {store} keeps its lattices as {fingerprint.lattice}, and "
                "the term kd_full_sum_loss needs them at temperature 1, whatever "
                "`temperature` is: dump with --keep-lattice dense or collapsed, or set "
                f"{self.parameter('weight')} to 0"
            ) from None

    def value(self, batch: TermInputs) -> Tuple[torch.Tensor, float]:
        """Sum the distance over the utterances of ``batch`` that have a lattice."""
        from icefall_kd.losses.full_sum import full_sum_kd_loss

        nodes = batch.nodes
        if nodes is None:  # no row of the batch has a lattice
            return batch.zero_of_transducer(), 0.0
        value = full_sum_kd_loss(
            batch.student_nodes(nodes), form=self.form, blank_id=batch.blank_id
        )
        return value, batch.count_frames(nodes.row.unique())

"""The term of the teacher's n-best lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Tuple

from icefall_kd.terms.base import Option, Term
from icefall_kd.terms.schedule import Curve

if TYPE_CHECKING:
    import torch

    from icefall_kd.terms.inputs import TermInputs


class NbestTerm(Term):
    """The CTC loss and the transducer loss of n-best lists, for the student's heads.

    See :func:`icefall_kd.losses.sequence.nbest_ctc_loss` and
    :func:`icefall_kd.losses.sequence.nbest_transducer_loss` for their equations.

    Args:
      weight: The weight in the joint loss, 0 or more.
    """

    name = "nbest"
    kinds = ("nbest",)
    optional_heads = ("ctc", "transducer")
    options = (
        Option(
            "nbest-weight",
            "weight",
            Curve,
            0.0,
            "Weight of the n-best term: the CTC loss and the transducer loss of the "
            "n-best lists that the cuts carry. It is a number such as 0.5, or numbers "
            "by epoch. With the weights of all terms at 0 distillation is off.",
        ),
    )

    def value(self, batch: TermInputs) -> Tuple[torch.Tensor, float]:
        """Sum the losses over the utterances of ``batch`` that have a list."""
        import torch

        from icefall_kd.losses.sequence import nbest_ctc_loss, nbest_transducer_loss

        lists, student = batch.targets.parts.get("nbest"), batch.student
        value = batch.zero(student.encoder_out)
        if not lists or not any(lists):
            return value, 0.0
        if student.ctc_logits is not None:
            value = value + nbest_ctc_loss(
                student.ctc_logits,
                lists,
                student.encoder_out_lens,
                blank_id=batch.blank_id,
            )
        if student.decoder_out is not None:
            value = value + nbest_transducer_loss(
                batch.model, student.encoder_out, lists, student.encoder_out_lens
            )
        has_list = torch.tensor([bool(x) for x in lists], device=batch.lens.device)
        return value, batch.count_frames(has_list)

"""The term of the acoustic half of the transducer's simple joiner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Tuple

from icefall_kd.terms.base import TEMPERATURE, Option, Term
from icefall_kd.terms.schedule import BY_EPOCH, Curve, Weight

if TYPE_CHECKING:
    import torch

    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.terms.inputs import TermInputs


class SimpleTerm(Term):
    """The KL divergence of the simple joiner's acoustic half at each frame.

    sum over frames of T^2 KL(softmax(a~_t / T) || softmax(a_t / T)), where a_t is
    ``simple_am_proj`` of the encoder's output at frame t, as the pruned transducer loss
    has it (Kuang et al., arXiv:2206.13236); see
    :func:`icefall_kd.losses.ctc_kd_loss`, which computes it. The gradient goes through
    the student's own ``simple_am_proj`` into its encoder.

    Args:
      weight: The weight in the joint loss, 0 or more.
      temperature: T, above 0.

    Raises:
      KDError: a parameter out of range.
    """

    name = "simple"
    kinds = ("simple",)
    heads = ("simple",)
    options = (
        Option(
            "simple-weight",
            "weight",
            Curve,
            0.0,
            "Weight of the simple term: the KL divergence between the outputs of "
            "teacher and student for the acoustic half of the transducer's simple "
            "joiner (simple_am_proj of a frame), summed over frames. It needs targets "
            f"of --keep-simple. {BY_EPOCH}",
        ),
        TEMPERATURE,
    )

    def __init__(self, weight: Weight = 1.0, temperature: float = 1.0) -> None:
        from icefall_kd.losses.checks import check_temperature

        super().__init__(weight)
        check_temperature(temperature)
        self.temperature = float(temperature)

    def check_store(self, fingerprint: Fingerprint, store: str) -> None:
        """Refuse a ``store`` whose ``fingerprint`` names another temperature."""
        super().check_store(fingerprint, store)
        codec = fingerprint.kinds["simple"].codec
        codec.check_temperature(self.temperature, "simple targets")

    def value(self, batch: TermInputs) -> Tuple[torch.Tensor, float]:
        """Sum the divergence over the frames of ``batch`` that have targets."""
        from icefall_kd.losses.ctc import ctc_kd_loss

        student_and_teacher = batch.simple_logits()
        if student_and_teacher is None:
            return batch.zero(batch.student.simple_logits), 0.0
        value = ctc_kd_loss(
            *student_and_teacher,
            batch.lens,
            mask=batch.mask,
            temperature=self.temperature,
            name="kd_simple_loss",
        )
        return value, float(batch.mask.sum())

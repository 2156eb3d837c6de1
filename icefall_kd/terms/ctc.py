"""The term of the CTC head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Tuple

from icefall_kd.terms.base import TEMPERATURE, Option, Term
from icefall_kd.terms.schedule import BY_EPOCH, Curve, Weight

if TYPE_CHECKING:
    import torch

    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.terms.inputs import TermInputs


class CtcTerm(Term):
    """The KL divergence of the CTC head at each frame.

    See :func:`icefall_kd.losses.ctc_kd_loss` for its equation.

    Args:
      weight: The weight in the joint loss, 0 or more.
      temperature: T, above 0.
      frame_weighting: How frames are weighted: "all", "non-blank", "symmetric",
        "entropy" or "confidence".
      delay: Frames by which a streaming student may be later than its teacher.
      symbol_weight: The weight of which symbol a frame is, beside blank or not, 0 or
        more; with a delay 1.

    Raises:
      KDError: a parameter out of range.
    """

    name = "ctc"
    kinds = ("ctc",)
    heads = ("ctc",)
    frames_name = "kd_frames"
    options = (
        Option(
            "ctc-weight",
            "weight",
            Curve,
            0.0,
            "Weight of the CTC term: the KL divergence between the CTC outputs of "
            "teacher and student, summed over frames. The recipe scales its own CTC "
            "loss by --ctc-loss-scale, 0.2 by default, and not this term: a weight of "
            f"1 counts five times as much as that. {BY_EPOCH}",
        ),
        TEMPERATURE,
        Option(
            "ctc-frame-weighting",
            "frame_weighting",
            str,
            "all",
            "How the CTC term weighs frames. all: each frame counts 1. non-blank: only "
            "frames where the teacher's best token is not the blank count. symmetric: "
            "those, and the blank frames beside them. entropy, confidence: all frames "
            "count, by the teacher's entropy or confidence. With entropy the gradient "
            "is about 4 times as large as with all: give a quarter of the weight.",
        ),
        Option(
            "ctc-delay",
            "delay",
            int,
            0,
            "The largest number of frames (of 40 ms) by which a streaming student's "
            "CTC head may be later than its teacher without loss; each token takes the "
            "best delay from 0 to this one, such as 5. Wrong tokens still count.",
            bounds=(0, 50),
        ),
        Option(
            "ctc-symbol-weight",
            "symbol_weight",
            float,
            1.0,
            "Weight W, within the CTC term, of which symbol (a token other than blank) "
            "a frame is: the term is the divergence of blank and not blank at each "
            "frame, and W times that of the symbols where the teacher has no blank. 1 "
            "is the plain divergence, 2 doubles what the symbols count, 0 leaves blank "
            "or not. It can't be given with --kd-ctc-delay.",
        ),
    )

    def __init__(
        self,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        frame_weighting: str = "all",
        delay: int = 0,
        symbol_weight: float = 1.0,
    ) -> None:
        from icefall_kd.losses.checks import check_temperature
        from icefall_kd.losses.ctc import check_symbol_weight
        from icefall_kd.losses.frames import FRAME_WEIGHTINGS

        super().__init__(weight)
        check_temperature(temperature)
        self.require_one_of("frame_weighting", frame_weighting, FRAME_WEIGHTINGS)
        self.require_frames("delay", delay)
        check_symbol_weight(symbol_weight, delay)
        self.temperature = float(temperature)
        self.frame_weighting, self.delay = frame_weighting, delay
        self.symbol_weight = float(symbol_weight)

    def note(self) -> str:
        notes = [] if self.frame_weighting == "all" else [self.frame_weighting]
        if self.delay:
            notes.append(f"delays 0 to {self.delay}")
        if self.symbol_weight != 1:
            notes.append(f"symbols times {self.symbol_weight:g}")
        return " ".join(notes)

    def check_store(self, fingerprint: Fingerprint, store: str) -> None:
        """Refuse a ``store`` whose ``fingerprint`` names another temperature."""
        super().check_store(fingerprint, store)
        fingerprint.kinds["ctc"].codec.check_temperature(self.temperature)

    def value(self, batch: TermInputs) -> Tuple[torch.Tensor, float]:
        """Sum the divergence over the frames of ``batch`` that have targets."""
        from icefall_kd.losses.ctc import ctc_kd_loss

        student_and_teacher = batch.ctc_logits()
        if student_and_teacher is None:
            return batch.zero(batch.student.ctc_logits), 0.0
        value = ctc_kd_loss(
            *student_and_teacher,
            batch.lens,
            mask=batch.mask,
            temperature=self.temperature,
            frame_weighting=self.frame_weighting,
            delay=self.delay,
            symbol_weight=self.symbol_weight,
            blank_id=batch.blank_id,
        )
        return value, float(batch.mask.sum())

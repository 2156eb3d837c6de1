"""Conditional teaching: which utterances of a batch teach the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

from icefall_kd.errors import require
from icefall_kd.terms.base import HEADS, heads_of

if TYPE_CHECKING:
    import torch

    from icefall_kd.kinds.codec import Codec
    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.terms.inputs import TermInputs

NONE, RIGHT, BETTER = CHOICES = ("none", "right", "better")


class Condition:
    """What a teacher must know of an utterance with a transcript to teach it.

    Meng et al., Conditional teacher-student learning (arXiv:1904.12399), let a frame
    teach where the teacher's best class is the true one, and train on the true one
    elsewhere. CTC's transcripts are of utterances, and so is this condition:

    - "none": all utterances teach;
    - "right": those teach where the teacher's best CTC labels are the transcript;
    - "better": those teach where the teacher's CTC loss of the transcript is below the
      student's at this step, both over the frames that have targets. Where an utterance
      has too few frames for its transcript, neither is better, and it does not teach.

    An utterance that does not teach has no part in the terms. The recipe's loss is of a
    whole batch, so it counts there as it does everywhere, with its weight
    (1 - a) + a hard_weight, and no share of the terms' weight goes to it. An utterance
    without a transcript always teaches, and so does an n-best list, which is no output
    of this teacher.

    Args:
      choice: "none", "right" or "better".

    Raises:
      KDError: another word.
    """

    def __init__(self, choice: str = NONE) -> None:
        require(
            choice in CHOICES,
            f"`condition` is {choice!r}: give one of {', '.join(CHOICES)}",
        )
        self.choice = choice

    def __bool__(self) -> bool:
        return self.choice != NONE

    def __str__(self) -> str:
        return self.choice

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of targets that are read, whatever the terms read."""
        return ("ctc",) if self else ()

    @property
    def heads(self) -> Sequence[str]:
        """The student's heads that are read: the transducer's has the labels."""
        return {NONE: (), RIGHT: ("transducer",), BETTER: ("transducer", "ctc")}[
            self.choice
        ]

    def check_student(self, model: torch.nn.Module, kinds: Sequence[str]) -> None:
        """Refuse a student without the head that is compared, or terms to condition.

        Args:
          model: The student.
          kinds: The kinds of a teacher's outputs that the terms read.

        Raises:
          KDError: it has no CTC head, or no term reads outputs of a teacher.
        """
        require(
            not self or kinds,
            f"`condition` is {self} and no term reads a teacher's outputs: give a term "
            f"of them a weight, such as `CtcTerm.weight`, or `condition` {NONE}",
        )
        require(
            self.choice != BETTER or "ctc" in heads_of(model),
            f"`condition` is {self} and the student has no {HEADS['ctc'][1]}, whose "
            f"loss is compared with the teacher's: train it with one, or give "
            f"`condition` {RIGHT}",
        )

    def check_store(self, fingerprint: Fingerprint, store: str) -> None:
        """Refuse a store without the CTC targets that tell what a teacher knows.

        Args:
          fingerprint: The store's.
          store: Its folder, for messages.

        Raises:
          KDError: it keeps none, or a form that does not tell.
        """
        if not self:
            return
        require(
            "ctc" in fingerprint.forms,
            f"`condition` is {self} and the store {store} keeps no CTC targets, which "
            "tell what its teacher knows: dump with --keep dense, or give `condition` "
            f"{NONE}",
        )
        self.check_form(fingerprint.kinds["ctc"].codec)

    def check_form(self, codec: Codec) -> None:
        """Refuse a form of CTC targets that does not tell what a teacher knows.

        Args:
          codec: That of the CTC targets.

        Raises:
          KDError: random draws, or for "better" a temperature other than 1.
        """
        reason = ""
        if self and codec.method == "sampled":
            reason = "random draws, of which the best token is not known"
        elif self.choice == BETTER and codec.temperature != 1:
            reason = (
                f"softmaxes at temperature {codec.temperature:g}, and the score of a "
                "transcript is at temperature 1"
            )
        require(
            not reason,
            f"`condition` is {self} and the CTC targets are kept as {codec}, {reason}: "
            f"keep them as dense or adaptive:.999:16, or give `condition` {NONE}",
        )

    def teaching_rows(self, batch: TermInputs) -> torch.Tensor:
        """Return which rows of a batch with transcripts teach.

        Args:
          batch: The batch, whose student has ``labels``.

        Returns:
          (N,), bool; of the rows without targets all are False.
        """
        import torch

        from icefall_kd.losses.transcript import best_labels, transcript_scores
        from icefall_kd.types import index_rows

        mask, blank_id = batch.mask, batch.blank_id
        has_targets = mask.any(1)
        if not has_targets.any():
            return has_targets
        labels = batch.student.labels
        if self.choice == RIGHT:
            frames = (slice(None), slice(mask.size(1)))
            ctc = index_rows(batch.targets.parts["ctc"], frames)
            best = best_labels(ctc, mask, blank_id)
            transcripts = [
                [label for label in row[1:] if label != blank_id]
                for row in labels.tolist()
            ]
            right = [x == y for x, y in zip(best, transcripts)]
            return torch.tensor(right, device=mask.device) & has_targets
        vocab_size = batch.student.ctc_logits.size(-1)
        student, teacher = (
            transcript_scores(rows, mask, labels, vocab_size, blank_id)
            for rows in batch.ctc_logits()
        )
        return teacher < student

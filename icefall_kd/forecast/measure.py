"""Takes the measures of a forecast: runs teacher and students on the same cuts."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from torch import nn

from icefall_kd.forecast.divergences import divergences
from icefall_kd.forecast.intervals import log_ratio, rate
from icefall_kd.forecast.measures import (
    HEADS,
    HeadMeasures,
    Interval,
    Measures,
    ModelMeasures,
)
from icefall_kd.forecast.students import is_sliced
from icefall_kd.student.importance import FeatureBatch
from icefall_kd.student.scores import UtteranceScores, score_utterances

LAST = 3  # epochs, at most, that tell whether a training still improves
Scores = Dict[str, UtteranceScores]  # by head


@dataclass
class Listener:
    """Runs models on the same cuts.

    Args:
      batches: Features (N, T, F), lengths (N,) in feature frames, and token ids.
      tokenizer: The tokenizer of these tokens.
      blank_id: The token id of blank.
      advance: A function that is called after each batch.
    """

    batches: Sequence[FeatureBatch]
    tokenizer: Any
    blank_id: int = 0
    advance: Callable[[], Any] = lambda: None

    def scores(self, model: nn.Module) -> Scores:
        """Return the scores of each utterance.

        Args:
          model: An icefall AsrModel.
        """
        return score_utterances(
            model, self.batches, self.tokenizer, self.blank_id, self.advance
        )


def measure(
    listener: Listener,
    teacher: nn.Module,
    start: Optional[nn.Module] = None,
    epochs: Iterable[Tuple[int, nn.Module]] = (),
    hours: Tuple[float, float] = (0.0, 0.0),
) -> Measures:
    """Measure a teacher, and a student before and in its training.

    The teacher is compared with the epoch whose WERs have the lowest sum over the
    heads, or without epochs with the student before training.

    Args:
      listener: The cuts, on which each model runs once and two of them twice.
      teacher: An icefall AsrModel.
      start: The student before training; None: it is not measured.
      epochs: Numbers and models of epochs of the student's training without
        distillation, in their order; each model is kept in memory only while it is the
        best one.
      hours: Hours of training cuts with and without transcripts.
    """
    of_teacher = listener.scores(teacher)
    of_start = listener.scores(start) if start is not None else None
    of_epochs: List[Tuple[int, Scores]] = []
    measured: List[ModelMeasures] = []
    best, best_scores, student = 0, of_start, start
    for epoch, model in epochs:
        scores = listener.scores(model)
        of_epochs.append((epoch, scores))
        measured.append(_summary(scores, model, epoch))
        if not best or _errors(scores) < _errors(best_scores):
            best, best_scores, student = epoch, scores, model
    words = next(iter(of_teacher.values())).words
    last, changes = _changes([scores for _, scores in of_epochs])
    terms = ()
    if student is not None:
        terms = divergences(
            teacher, student, listener.batches, listener.blank_id, listener.advance
        )
    return Measures(
        cuts=len(words),
        words=sum(words),
        teacher=_summary(of_teacher, teacher),
        start=None if of_start is None else _summary(of_start, start),
        epochs=tuple(measured),
        best=best,
        gaps=_ratios(best_scores, of_teacher) if best else {},
        changes=changes,
        last=last,
        worse=_share_worse(of_teacher, best_scores) if student is not None else None,
        sliced=None if start is None else is_sliced(start, teacher),
        terms=terms,
        transcribed=hours[0],
        untranscribed=hours[1],
    )


def _summary(scores: Scores, model: nn.Module, epoch: int = 0) -> ModelMeasures:
    heads = {}
    for head, of_head in scores.items():
        loss, _ = of_head.summary()
        right = sum(of_head.right) / len(of_head.right)
        wer = rate(of_head.errors, of_head.words)
        heads[head] = HeadMeasures(loss, wer, right)
    return ModelMeasures(epoch, sum(p.numel() for p in model.parameters()), heads)


def _errors(scores: Scores) -> int:
    return sum(sum(of_head.errors) for of_head in scores.values())


def _ratios(scores: Scores, others: Scores) -> Dict[str, Interval]:
    """log(WER / WER of others) of each head that both have."""
    return {
        head: log_ratio(scores[head].errors, others[head].errors, scores[head].words)
        for head in HEADS
        if head in scores and head in others
    }


def _changes(epochs: Sequence[Scores]) -> Tuple[int, Dict[str, Interval]]:
    """How many epochs are the last ones, and how the lowest WER changed in them."""
    last = min(LAST, len(epochs) // 2)
    if not last:
        return 0, {}
    changes = {}
    for head, first in epochs[0].items():
        errors = [scores[head].errors for scores in epochs]
        later, earlier = (min(x, key=sum) for x in (errors[-last:], errors[:-last]))
        changes[head] = log_ratio(later, earlier, first.words)
    return last, changes


def _share_worse(teacher: Scores, student: Scores) -> Optional[float]:
    """The share of utterances to whose transcript the teacher gives less probability.

    By the CTC head, or by the transducer where one has no CTC head.
    """
    shared = [head for head in HEADS if head in teacher and head in student]
    if not shared:
        return None
    pairs = list(zip(teacher[shared[0]].losses, student[shared[0]].losses))
    # Not what rounding leaves of equal models.
    return sum(a > b + 1e-3 for a, b in pairs) / len(pairs)

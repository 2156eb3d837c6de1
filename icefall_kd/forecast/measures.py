"""What a forecast is made of: numbers of teacher and student on the same cuts.

This module loads no torch, so that a verdict can be computed of stored measures.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

HEADS = ("ctc", "transducer")
BLANKS, SPIKES = "teacher's best is blank", "teacher's best is a token"


@dataclass(frozen=True)
class Interval:
    """A value with its interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class HeadMeasures:
    """One head of a model: nats a token, WER in percent by greedy search."""

    loss: float
    wer: Interval
    right: float  # the share of utterances whose best tokens are the transcript's


@dataclass(frozen=True)
class ModelMeasures:
    """A teacher, a student before training, or a student after an epoch."""

    epoch: int  # 0 where it is no matter
    parameters: int
    heads: Dict[str, HeadMeasures]  # of those of HEADS that it has


@dataclass(frozen=True)
class TermMeasures:
    """A term of the loss between teacher and student, at one kind of frames or nodes.

    Where it is a KL divergence, ``value`` is the sum of ``blank``, the divergence of
    blank against all other tokens, and of ``tokens``, (1 - b) times that among the
    others, b the teacher's probability of blank. All are in nats, means over
    ``count``.
    """

    term: str  # "ctc", "rnnt" or "hidden"
    where: str
    count: float  # frames, or the occupancy of nodes
    value: float
    blank: Optional[float] = None
    tokens: Optional[float] = None
    entropy: Optional[float] = None  # the teacher's


@dataclass(frozen=True)
class Measures:
    """All that a verdict is made of.

    Args:
      cuts: The number of cuts.
      words: The number of words in their transcripts.
      teacher: The teacher.
      start: The student before training.
      epochs: Epochs of the student's training without distillation, in their order.
      best: The epoch of these that is compared with the teacher; 0 for none.
      gaps: For each head that both have, log(WER of the best epoch / WER of the
        teacher).
      changes: For each head log(lowest WER of the last ``last`` epochs / lowest WER of
        those before); {} for fewer than two epochs.
      last: How many epochs these last ones are.
      worse: The share of utterances whose transcript has a lower probability with the
        teacher than with the student; None where no head is shared.
      sliced: Whether the student starts from slices of the teacher; None: not known.
      terms: Divergences between the teacher and the student's best epoch, or the
        student before training.
      transcribed: Hours of training cuts with transcripts; 0: not given.
      untranscribed: Hours of training cuts without.
    """

    cuts: int
    words: int
    teacher: ModelMeasures
    start: Optional[ModelMeasures] = None
    epochs: Tuple[ModelMeasures, ...] = ()
    best: int = 0
    gaps: Dict[str, Interval] = field(default_factory=dict)
    changes: Dict[str, Interval] = field(default_factory=dict)
    last: int = 0
    worse: Optional[float] = None
    sliced: Optional[bool] = None
    terms: Tuple[TermMeasures, ...] = ()
    transcribed: float = 0.0
    untranscribed: float = 0.0

    @property
    def student(self) -> Optional[ModelMeasures]:
        """The best epoch; None where no training was measured."""
        return next((m for m in self.epochs if m.epoch == self.best), None)

    def as_dict(self) -> Dict[str, Any]:
        """Return the measures as numbers, lists and dictionaries, for JSON."""
        return dataclasses.asdict(self)


def measures_of(values: Dict[str, Any]) -> Measures:
    """Return the measures that :meth:`Measures.as_dict` made ``values`` of.

    Args:
      values: Of JSON.

    Raises:
      KeyError, TypeError: values that are none of measures.
    """

    def model(value: Optional[Dict[str, Any]]) -> Optional[ModelMeasures]:
        if value is None:
            return None
        heads = {
            head: HeadMeasures(**{**of_head, "wer": Interval(**of_head["wer"])})
            for head, of_head in value["heads"].items()
        }
        return ModelMeasures(**{**value, "heads": heads})

    def intervals(value: Dict[str, Any]) -> Dict[str, Interval]:
        return {head: Interval(**x) for head, x in value.items()}

    epochs: List[Any] = [model(x) for x in values["epochs"]]
    read = {
        "teacher": model(values["teacher"]),
        "start": model(values["start"]),
        "epochs": tuple(epochs),
        "gaps": intervals(values["gaps"]),
        "changes": intervals(values["changes"]),
        "terms": tuple(TermMeasures(**x) for x in values["terms"]),
    }
    return Measures(**{**values, **read})

"""The verdict of a forecast: sentences and options, from measures alone."""

import math
from dataclasses import dataclass
from typing import Dict, List, Optional

from icefall_kd.errors import require
from icefall_kd.forecast.measures import SPIKES, Interval, Measures, ModelMeasures
from icefall_kd.forecast.model import (
    LEAST_UNTRANSCRIBED,
    MOST_CONVERGED,
    MOST_GAP,
    SITUATIONS,
    STEADY,
    expected_ratio,
)

YES, NO, OPEN = "yes", "no", "open"
# WER in percent from which on a teacher's targets are wrong too often to learn from.
MOST_WER = 50.0
# Nats at the teacher's spikes, below which a distribution is hardly more than a label.
LEAST_ENTROPY = 0.05
# The share of cuts that the teacher scores worse than the student, from which on these
# are left to the transcripts.
MOST_WORSE = 0.3
MOST_WORDS = 10**9
NAMES = {"ctc": "CTC", "transducer": "transducer"}
_WHOM = {
    "falling": "students that were still improving",
    "converged": "students that had converged",
    "slices": "students that started from slices of their teacher",
    "untranscribed": "students whose teacher heard speech that they had no transcripts "
    "of",
}
# The lines of egs/digits/ASR/conf/kd.yaml by term: RESULTS.md has how they were chosen.
MIX: Dict[str, List[str]] = {
    "ctc": ["ctc-weight: 1.0"],
    "transducer": ["rnnt-weight: 1.0"],
    "hidden": [
        "hidden-weight: 10.0",
        "hidden-layers: out:out",
        "hidden-distance: cosine",
    ],
    "": ["hard-weight: 1.0", "temperature: 1.0"],
}


@dataclass(frozen=True)
class Verdict:
    """What a forecast says.

    Args:
      answer: "yes", "no", or "open" where a training without distillation is needed to
        tell.
      situation: The situation of the model, one of
        :data:`icefall_kd.forecast.model.SITUATIONS`; "" where it is open.
      ratios: For each head the expected WER ratio with / without distillation.
      sentences: The verdict's sentences.
      lines: Lines of kd.yaml; [] where distillation isn't advised.
    """

    answer: str
    situation: str
    ratios: Dict[str, Interval]
    sentences: List[str]
    lines: List[str]


def situation_of(measures: Measures) -> str:
    """Return which of the model's situations a student is in; "" for no training.

    Args:
      measures: Of teacher and student.
    """
    if not measures.gaps:
        return ""
    if measures.untranscribed > LEAST_UNTRANSCRIBED * measures.transcribed:
        return "untranscribed"
    if measures.sliced:
        return "slices"
    return "converged" if _is_flat(measures) else "falling"


def _is_flat(measures: Measures) -> bool:
    changes = measures.changes.values()
    return bool(changes) and all(c.value > STEADY and c.high > 0 for c in changes)


def decide(measures: Measures) -> Verdict:
    """Return the verdict of some measures.

    Args:
      measures: Of teacher and student.
    """
    situation = situation_of(measures)
    ratios = {
        head: expected_ratio(gap, situation) for head, gap in measures.gaps.items()
    }
    reason = _why_bad(measures.teacher)
    if not situation:
        if reason:
            return Verdict(NO, "", {}, [f"Don't: {reason}"], [])
        return Verdict(OPEN, "", {}, [_no_training(measures)], _lines(measures))
    sentences = [_at_most(measures)]
    if reason:
        return Verdict(NO, situation, ratios, [*sentences, f"Don't: {reason}"], [])
    sentences.append(_expected(ratios, situation))
    reason = _why_no_gap(measures) or _why_no_gain(ratios)
    if reason:
        return Verdict(NO, situation, ratios, [*sentences, f"Don't: {reason}"], [])
    sentences += _where(measures) + _warnings(measures, situation)
    return Verdict(YES, situation, ratios, sentences, _lines(measures))


# Reasons against


def _why_bad(teacher: ModelMeasures) -> str:
    """Why nothing is to be learnt from a teacher; "" for a good one."""
    wers = {head: of_head.wer.value for head, of_head in teacher.heads.items()}
    if any(wer < MOST_WER for wer in wers.values()):
        return ""
    shown = " and ".join(f"{wer:.1f} % in {NAMES[head]}" for head, wer in wers.items())
    return (
        f"the teacher is wrong on too many words ({shown}, and {MOST_WER:g} % is the "
        "most): train it on, or take a better one."
    )


def _why_no_gap(measures: Measures) -> str:
    """Why there is nothing to learn; "" where the teacher is better in some head."""
    gaps = measures.gaps
    if any(gap.low > 0 for gap in gaps.values()):
        return ""
    shown = ", ".join(
        f"{_wer(measures.teacher, head)} % against {_wer(measures.student, head)} % in "
        f"{NAMES[head]}"
        for head in gaps
    )
    if all(gap.value <= 0 for gap in gaps.values()):
        return (
            f"the student without KD is already as good as its teacher ({shown}): take "
            "a better teacher, or a smaller student."
        )
    best = max(gaps.values(), key=lambda gap: gap.value)
    words = words_needed(best, 1 - math.exp(-best.value), measures.words)
    return (
        f"the teacher is not better than the student within the interval ({shown}): "
        f"take a better teacher, or measure on more words, as about {words:,} would "
        f"show this difference and the cuts have {measures.words:,}."
    )


def _why_no_gain(ratios: Dict[str, Interval]) -> str:
    if any(ratio.value < 1 for ratio in ratios.values()):
        return ""
    return (
        "the gap is too small to pay for what distillation costs a student that "
        "starts from slices: train without it."
    )


def half_width(gap: Interval) -> float:
    """Return half of the interval of a gap, as a share of the student's WER.

    Args:
      gap: g; teacher and student differ by the share 1 - exp(-g).
    """
    return (math.exp(-gap.low) - math.exp(-gap.high)) / 2


def words_needed(gap: Interval, difference: float, words: int) -> int:
    """Return how many words would narrow a gap's interval to a difference.

    The interval's width falls as the root of the number of words.

    Args:
      gap: Measured on ``words`` words.
      difference: A share of the student's WER, which half of the interval shall be.
      words: Their number.
    """
    exact = words * (half_width(gap) / difference) ** 2 if difference else math.inf
    if exact > MOST_WORDS:
        return MOST_WORDS
    unit = 10 ** max(0, len(str(math.ceil(exact))) - 2)  # two digits count
    return math.ceil(exact / unit) * unit


def check_words(measures: Measures, difference: float) -> None:
    """Refuse cuts of too few words for a difference that is to be seen.

    Args:
      measures: Of teacher and student.
      difference: In percent of the student's WER; it is seen if half of the interval is
        no larger.

    Raises:
      KDError: a head with a wider interval.
    """
    for head, gap in measures.gaps.items():
        half = 100 * half_width(gap)
        require(
            half <= difference,
            f"the {measures.words:,} words of `cuts` show a difference between teacher "
            f"and student in {NAMES[head]} from {half:.3g} % on, and `difference` is "
            f"{difference:g} %: give about "
            f"{words_needed(gap, difference / 100, measures.words):,} words, with more "
            "cuts or `num_cuts`, or a larger `difference`",
        )


# Sentences


def _wer(model: Optional[ModelMeasures], head: str) -> str:
    return f"{model.heads[head].wer.value:.1f}"


def _at_most(measures: Measures) -> str:
    parts = []
    for head, gap in measures.gaps.items():
        most, low, high = (
            max(0.0, 100 * (1 - math.exp(-g))) for g in (gap.value, gap.low, gap.high)
        )
        parts.append(
            f"{most:.0f} % ({low:.0f} to {high:.0f}) in {NAMES[head]}: teacher "
            f"{_wer(measures.teacher, head)} %, student without KD "
            f"{_wer(measures.student, head)} %, {_trend(measures, head)}"
        )
    return f"KD can gain at most about {'; '.join(parts)}."


def _trend(measures: Measures, head: str) -> str:
    change = measures.changes.get(head)
    if change is None:
        return "whether still falling isn't known of one epoch"
    word = "still falling" if change.value <= STEADY or change.high <= 0 else "flat"
    percent = [100 * (math.exp(x) - 1) for x in (change.value, change.low, change.high)]
    epochs = "last epoch" if measures.last == 1 else f"last {measures.last} epochs"
    return (
        f"{word}: {percent[0]:+.0f} % ({percent[1]:+.0f} to {percent[2]:+.0f}) in the "
        f"{epochs}"
    )


def _expected(ratios: Dict[str, Interval], situation: str) -> str:
    parts = [
        f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f}) in {NAMES[head]}"
        for head, r in ratios.items()
    ]
    return (
        f"Expected WER with KD, as a multiple of that without: {' and '.join(parts)}, "
        f"by {SITUATIONS[situation].points} measurements of {_WHOM[situation]}, on one "
        "small corpus."
    )


def _no_training(measures: Measures) -> str:
    teacher = ", ".join(
        f"{_wer(measures.teacher, head)} % in {NAMES[head]}"
        for head in measures.teacher.heads
    )
    return (
        f"Not known yet: the teacher has {teacher}, and how good the student becomes "
        "without KD is not measured. Train it without KD for some epochs and give "
        "`baseline_dir`. If you distil all the same, begin with the lines below."
    )


def _where(measures: Measures) -> List[str]:
    """Where the student is far from its teacher."""
    frames = [term for term in measures.terms if term.term == "ctc"]
    spikes = next((term for term in frames if term.where == SPIKES), None)
    divergence = sum(term.count * term.value for term in frames)
    if spikes is None or divergence <= 0:
        return []
    share = 100 * spikes.count * spikes.value / divergence
    frames_share = 100 * spikes.count / sum(term.count for term in frames)
    of_blank = 100 * spikes.blank / spikes.value if spikes.value else 0.0
    sentence = (
        f"{share:.0f} % of the CTC divergence is at the {frames_share:.0f} % of frames "
        f"where the teacher's best is a token, {of_blank:.0f} % of that about blank or "
        "not"
    )
    if spikes.entropy < LEAST_ENTROPY:
        sentence += (
            f"; there the teacher is so sure ({spikes.entropy:.3f} nats of entropy) "
            "that it says hardly more than a label and its place"
        )
    return [f"{sentence}."]


def _warnings(measures: Measures, situation: str) -> List[str]:
    warnings = []
    if not _is_flat(measures):
        warnings.append(
            "The student without KD has not converged, so part of the gap will close "
            "by itself: the forecast is for as many epochs as it has now."
        )
    largest = max(gap.value for gap in measures.gaps.values())
    if largest > MOST_GAP:
        warnings.append(
            f"A student's WER of more than {math.exp(MOST_GAP):.1f} times its "
            "teacher's was not among those measurements, and counts as if it were so "
            "many times."
        )
    if situation == "converged" and largest > MOST_CONVERGED:
        warnings.append(
            "No converged student was that far from its teacher among those "
            "measurements, so its range is a guess."
        )
    if situation == "untranscribed":
        share = measures.untranscribed / max(measures.transcribed, 1e-9)
        warnings.append(
            f"There is {share:.2g} times as much speech without transcripts as with "
            "them, and in those measurements there was as much: with less expect less."
        )
    if _is_often_worse(measures):
        warnings.append(
            f"On {100 * measures.worse:.0f} % of the cuts the teacher gives the "
            "transcript a lower probability than the student does: the condition below "
            "leaves such cuts to the transcripts (what it gains isn't measured yet)."
        )
    return warnings


def _is_often_worse(measures: Measures) -> bool:
    return measures.worse is not None and measures.worse > MOST_WORSE


def _lines(measures: Measures) -> List[str]:
    """The lines of the terms that both models have, and in which the teacher leads."""
    lines: List[str] = []
    student = measures.student or measures.start
    for head in ("ctc", "transducer"):
        gap = measures.gaps.get(head)
        has_both = head in measures.teacher.heads and (
            student is None or head in student.heads
        )
        if has_both and (gap is None or gap.value > 0):
            lines += MIX[head]
    lines += [*MIX["hidden"], *MIX[""]]
    return [*lines, "condition: better"] if _is_often_worse(measures) else lines

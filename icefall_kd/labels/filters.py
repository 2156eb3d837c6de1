"""What judges a pseudo-label: each filter says why it drops one.

All measures in percent have one rule, that of Distil-Whisper: what is below the
threshold is kept, and what is equal to it is dropped.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from icefall_kd.errors import require
from icefall_kd.labels.text import unknown_parts

Bounds = Tuple[float, float]  # both are kept
LONGEST_LOOP = 50  # words


@dataclass(frozen=True)
class Case:
    """A pseudo-label that is judged; words are characters if they are the unit.

    Args:
      cut_id: The cut's.
      text: What a student would learn, rewritten by the rules.
      words: Its words.
      seconds: The duration of the supervision.
      frames: Of the student's encoder output.
      scores: The teacher's.
      reference: The words of the original text; None where there was none.
      ctc_words: What the CTC head of the teacher heard; None where it has not both.
      other_words: What another teacher said; None where there is no other.
    """

    cut_id: str
    text: str
    words: List[str]
    seconds: float
    frames: int = 0
    scores: Dict[str, float] = field(default_factory=dict)
    reference: Optional[List[str]] = None
    ctc_words: Optional[List[str]] = None
    other_words: Optional[List[str]] = None


class Filter(NamedTuple):
    """Judges labels."""

    name: str  # what its count is called
    why_not: Callable[[Case], str]  # why a label is dropped; "" if it is kept


def words_of(text: str, unit: str) -> List[str]:
    """The words of a text, or its characters without blanks.

    Args:
      text: The text.
      unit: ``WER`` or ``CER``.
    """
    return text.split() if unit == "WER" else list("".join(text.split()))


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """The insertions, deletions and substitutions from one text to another.

    Args:
      a: The words of one.
      b: The words of the other.
    """
    import kaldialign

    return kaldialign.edit_distance(list(a), list(b))["total"]


def not_empty() -> Filter:
    """Drop a label without a text. This one is always there."""
    return Filter("empty", lambda case: "" if case.text else "no text")


def error_rate_below(threshold: float, unit: str) -> Filter:
    """Drop a label whose error rate against the original text is too high.

    Where there is no original text nothing is known, and the label is kept.

    Args:
      threshold: In percent; a rate that is equal is dropped, as in Distil-Whisper.
      unit: ``WER`` or ``CER``.
    """

    def why_not(case: Case) -> str:
        if not case.reference:
            return ""
        errors = distance(case.reference, case.words)
        percent = 100 * errors / len(case.reference)
        return "" if percent < threshold else f"{unit} {percent:.1f} %"

    return Filter(unit, why_not)


def differs_below(threshold: float, name: str, field_name: str) -> Filter:
    """Drop a label that two do not agree on.

    The difference is the edit distance, as a share of the longer of both.

    Args:
      threshold: In percent; a difference that is equal is dropped.
      name: ``heads`` or ``agreement``.
      field_name: What the words are compared with: ``ctc_words`` or ``other_words``.
    """

    def why_not(case: Case) -> str:
        other = getattr(case, field_name)
        require(
            other is not None,
            f"the label of cut {case.cut_id} has no `ctc_text`, as its teacher has not "
            "both heads or was not searched by the transducer's: leave the option out",
        )
        longest = max(len(case.words), len(other), 1)
        percent = 100 * distance(case.words, other) / longest
        if percent < threshold:
            return ""
        return f"{percent:.1f} % differ from {' '.join(other) or 'nothing'!r}"

    return Filter(name, why_not)


def score_at_least(least: float, measure: str) -> Filter:
    """Drop a label that its teacher is unsure of.

    Args:
      least: The lowest score that is kept.
      measure: The name of the score; "" for ``heads``, or the first that a label has
        where its teacher has not both heads.
    """

    def why_not(case: Case) -> str:
        # A transducer's errors are mostly words that it left out, and no token's
        # score tells of these. The other head does.
        default = "heads" if "heads" in case.scores else next(iter(case.scores), "")
        name = measure or default
        require(
            name in case.scores,
            f"the label of cut {case.cut_id} has no score {name!r}, and its teacher "
            f"gave {', '.join(case.scores) or 'none'}: choose another `measure`, or "
            "leave it out",
        )
        score = case.scores[name]
        return "" if score >= least else f"{name} {score:.3f}"

    return Filter("score", why_not)


def rate_within(bounds: Bounds, unit: str) -> Filter:
    """Drop a label with too many or too few words or characters for its duration.

    Args:
      bounds: The least and the most in a second.
      unit: ``words`` or ``characters``; blanks are none.
    """

    def why_not(case: Case) -> str:
        words = case.text.split()
        count = len(words) if unit == "words" else sum(map(len, words))
        rate = count / max(case.seconds, 1e-3)
        is_within = bounds[0] <= rate <= bounds[1]
        return "" if is_within else f"{rate:.2f} {unit} a second"

    return Filter(f"{unit} a second", why_not)


def repeats_at_most(most: int) -> Filter:
    """Drop a label in which words come again and again, as a hallucination's do.

    Args:
      most: How often the same words, one or several, may come in a row.
    """

    def why_not(case: Case) -> str:
        count, words = longest_loop(case.words)
        return "" if count <= most else f"{count} times {' '.join(words)!r}"

    return Filter("repeats", why_not)


def longest_loop(words: Sequence[str]) -> Tuple[int, List[str]]:
    """The words that come most often in a row, and how often.

    Args:
      words: Any number of words. Loops of more than 50 of them are not looked for.
    """
    best, loop = min(1, len(words)), list(words[:1])
    for period in range(1, LONGEST_LOOP + 1):
        if period * (best + 1) > len(words):
            break  # there is no room for more
        run = 0  # words that are those of a period before
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else 0
            count = 1 + run // period
            if count > best:
                best, loop = count, list(words[i - period + 1 : i + 1])
    return best, loop


def only_characters(allowed: str) -> Filter:
    """Drop a label with other characters than those that are allowed.

    Args:
      allowed: What stands between the brackets of a regular expression, such as
        ``a-z'``; blanks are allowed.

    Raises:
      KDError: what is no such thing.
    """
    try:
        other = re.compile(f"[^ {allowed}]")
    except re.error:
        other = None
    require(
        other is not None and "]" not in allowed.replace("\\]", ""),
        f"`characters` is {allowed!r}, and must be what stands between the brackets of "
        "a regular expression, such as a-z'",
    )

    def why_not(case: Case) -> str:
        others = sorted(set(other.findall(case.text)))
        return f"the characters {' '.join(others)!r}" if others else ""

    return Filter("characters", why_not)


def has_tokens(tokenizer: Any) -> Filter:
    """Drop a label that the student's tokens can't write, or its frames can't hold.

    Args:
      tokenizer: The student's.
    """

    def why_not(case: Case) -> str:
        unknown = unknown_parts(tokenizer, case.text)
        if unknown:
            return f"no tokens for {' '.join(unknown)!r}"
        count = len(tokenizer.encode(case.text, out_type=int))
        if count > case.frames:
            return f"{count} tokens in {case.frames} frames"
        return ""

    return Filter("tokens", why_not)

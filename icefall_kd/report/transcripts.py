"""Reads the transcripts of a decoding, and counts the errors of each utterance."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np

from icefall_kd.errors import KDError

# icefall's, and that of the digits recipe.
_ERRS_COUNTS = (
    re.compile(
        r"Errors: (\d+) insertions, (\d+) deletions, (\d+) substitutions, "
        r"over (\d+) reference words"
    ),
    re.compile(r"%[WC]ER .*\[(\d+) / (\d+),"),
)

_LINE = re.compile(r"(.*?):\t(ref|hyp|timestamp_ref|timestamp_hyp)=(.*)")

Pair = Tuple[Sequence[str], Sequence[str]]  # words or characters: reference, result


@dataclass(frozen=True)
class Scores:
    """Errors of each utterance of a decoded test set.

    Args:
      path: The file of the transcripts.
      ids: The id of the cut of each utterance, sorted; a cut of several utterances has
        its id as often.
      references: The reference of each utterance, its words joined by blanks.
      errors: Insertions, deletions and substitutions of each utterance, (N,).
      words: The words of its reference, or the characters, (N,).
      characters: Whether characters are scored.
    """

    path: Path
    ids: List[str]
    references: List[str]
    errors: np.ndarray
    words: np.ndarray
    characters: bool = False

    @property
    def percent(self) -> float:
        """The error rate."""
        return 100 * float(self.errors.sum() / self.words.sum())


def read_scores(path: Path, percent: float) -> Scores:
    """Count the errors of each utterance of a ``recogs-*.txt``.

    The file has words or characters. Where its words don't give the stated errors, its
    characters are scored, as a recipe's CER does.

    Args:
      path: What icefall's ``store_transcripts`` wrote. The counts of the ``errs-*.txt``
        beside it must be those of the transcripts.
      percent: The error rate that the report shows, to two decimals.

    Raises:
      KDError: the file is damaged, has no words, or has other errors than the errs file
        or ``percent`` say.
    """
    utterances = sorted(_read_utterances(path))
    ids = [cut_id for cut_id, *_ in utterances]
    pairs = [(reference, result) for _, reference, result in utterances]
    if not any(reference for reference, _ in pairs):
        raise KDError(
            f"{path} has {len(pairs)} utterances without a word of reference: decode "
            "a transcribed set, or remove it"
        )
    errs = path.with_name(path.name.replace("recogs-", "errs-", 1))
    stated = _read_errs_counts(errs)
    first = None
    for characters in (False, True):
        units = [_characters(pair) for pair in pairs] if characters else pairs
        for sclite in (False, True):  # sclite's alignment may have more errors
            errors, words = _count_errors(units, sclite)
            scores = Scores(
                path, ids, [" ".join(r) for r, _ in units], errors, words, characters
            )
            first = first or scores
            if _agree(scores, percent, stated):
                return scores
    raise KDError(_disagreement(first, percent, errs, stated))


def _agree(scores: Scores, percent: float, stated: Optional[Tuple[int, int]]) -> bool:
    """Whether scores are those that the result files state."""
    counts = (int(scores.errors.sum()), int(scores.words.sum()))
    return abs(scores.percent - percent) < 0.0051 and stated in (None, counts)


def _disagreement(
    scores: Scores, percent: float, errs: Path, stated: Optional[Tuple[int, int]]
) -> str:
    """The sentence for transcripts that have other errors than their result files."""
    result = f"{percent:.2f} %"
    if stated is not None:
        result += f", and {errs.name} {stated[0]} errors in {stated[1]} words"
    return (
        f"{scores.path} has {scores.errors.sum()} errors in {scores.words.sum()} words "
        f"({scores.percent:.2f} %), and the result beside it is {result}: decode "
        f"again, or remove {scores.path.name} for a report without its interval"
    )


def _read_utterances(path: Path) -> Iterator[Tuple[str, List[str], List[str]]]:
    """Yield id, reference and recognised words of each utterance."""
    number, reference = 0, None
    with open(path, encoding="utf8", errors="replace") as f:
        for line in f:
            number += 1
            match = _LINE.fullmatch(line.rstrip("\n"))
            if match and match[2].startswith("timestamp"):
                continue
            words = _words(match[3]) if match else None
            if words is None:
                raise _damaged(path, number)
            if match[2] == "ref" and reference is None:
                reference = match[1], words
            elif match[2] == "hyp" and reference and reference[0] == match[1]:
                yield (*reference, words)
                reference = None
            else:
                raise _damaged(path, number)
    if reference is not None:
        raise _damaged(path, number + 1)


def _damaged(path: Path, number: int) -> KDError:
    return KDError(
        f"{path} is damaged at line {number}, where id:<TAB>ref=[...] or "
        "id:<TAB>hyp=[...] is looked for: decode again, or remove it"
    )


def _words(text: str) -> Optional[List[str]]:
    """The words that Python printed as a list, or None; other text is as it was."""
    if not text.startswith("["):  # a recipe that scores characters of one string
        return text.split()
    try:
        words = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        return None
    return words


def _characters(pair: Pair) -> Pair:
    """The characters of the words, as icefall scores them."""
    reference, result = pair
    return list("".join(reference)), list("".join(result))


def _count_errors(pairs: Sequence[Pair], sclite: bool) -> Tuple[np.ndarray, np.ndarray]:
    """Errors and reference words of each pair, (N,) both."""
    import kaldialign

    errors = [kaldialign.edit_distance(*p, sclite_mode=sclite)["total"] for p in pairs]
    return np.array(errors), np.array([len(reference) for reference, _ in pairs])


def _read_errs_counts(path: Path) -> Optional[Tuple[int, int]]:
    """Errors and words that an errs file states in its first lines, or None."""
    if not path.is_file():
        return None
    with open(path, encoding="utf8", errors="replace") as f:
        head = "".join(line for line, _ in zip(f, range(3)))
    icefall, digits = (pattern.search(head) for pattern in _ERRS_COUNTS)
    if icefall:
        *errors, words = map(int, icefall.groups())
        return sum(errors), words
    return (int(digits[1]), int(digits[2])) if digits else None

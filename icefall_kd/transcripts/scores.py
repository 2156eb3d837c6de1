"""Result files of icefall: transcripts, errors of words or characters, and rates.

The files are those of icefall's ``store_transcripts`` and ``write_error_stats``, byte
by byte, so that whatever reads these reads them too.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, TextIO, Tuple

from icefall_kd.files import replacing

GAP = "*"  # icefall's mark of an insertion or a deletion


class Result(NamedTuple):
    """The transcript of a cut and what was recognized, as words or characters."""

    cut_id: str
    reference: List[str]
    found: List[str]


def to_characters(results: Sequence[Result]) -> List[Result]:
    """The same results by characters, as icefall's CER has them.

    Args:
      results: Those of words.
    """
    return [
        Result(r.cut_id, list("".join(r.reference)), list("".join(r.found)))
        for r in results
    ]


@dataclass
class Errors:
    """Counts of errors, with the alignment of each result."""

    insertions: Counter = field(default_factory=Counter)  # of words
    deletions: Counter = field(default_factory=Counter)  # of words
    substitutions: Counter = field(default_factory=Counter)  # of pairs of words
    correct: Counter = field(default_factory=Counter)  # of words
    length: int = 0  # words of all references
    alignments: List[Tuple[str, List[Tuple[str, str]]]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All errors."""
        kinds = (self.insertions, self.deletions, self.substitutions)
        return sum(sum(kind.values()) for kind in kinds)

    @property
    def percent(self) -> float:
        """The error rate."""
        return 100.0 * self.total / self.length

    def counts(self) -> Dict[str, int]:
        """Errors of each kind, and the length of all references."""
        return {
            "insertions": sum(self.insertions.values()),
            "deletions": sum(self.deletions.values()),
            "substitutions": sum(self.substitutions.values()),
            "length": self.length,
        }


def count_errors(results: Sequence[Result]) -> Errors:
    """Align references and what was found, by kaldialign.

    Args:
      results: One for each cut.
    """
    import kaldialign

    errors = Errors()
    for result in results:
        pairs = kaldialign.align(result.reference, result.found, GAP)
        for reference, found in pairs:
            if reference == GAP:
                errors.insertions[found] += 1
            elif found == GAP:
                errors.deletions[reference] += 1
            elif reference != found:
                errors.substitutions[reference, found] += 1
            else:
                errors.correct[reference] += 1
        errors.length += len(result.reference)
        errors.alignments.append((result.cut_id, pairs))
    return errors


def write_results(
    folder: Path, name: str, setting: str, results: Sequence[Result], errors: Errors
) -> None:
    """Write ``recogs-``, ``errs-`` and ``wer-summary-`` of a set.

    Args:
      folder: Where they appear.
      name: Set and suffix, such as ``test-clean-epoch-30_avg-9``.
      setting: The setting's name in the summary.
      results: Sorted, of at least one word of reference.
      errors: Those of ``results``.
    """
    write_transcripts(folder / f"recogs-{name}.txt", results)
    with replacing(folder / f"errs-{name}.txt", shared=True) as temporary:
        with open(temporary, "w", encoding="utf8") as f:
            _write_errors(f, errors)
    with replacing(folder / f"wer-summary-{name}.txt", shared=True) as temporary:
        rate = float(f"{errors.percent:.2f}")
        temporary.write_text(f"settings\tWER\n{setting}\t{rate}\n", "utf8")


def write_transcripts(path: Path, results: Sequence[Result]) -> None:
    """Write references and what was found.

    Args:
      path: The file.
      results: Sorted.
    """
    with replacing(path, shared=True) as temporary:
        with open(temporary, "w", encoding="utf8") as f:
            for result in results:
                print(f"{result.cut_id}:\tref={result.reference}", file=f)
                print(f"{result.cut_id}:\thyp={result.found}", file=f)


def _write_errors(f: TextIO, errors: Errors) -> None:
    counts = errors.counts()
    print(f"%WER = {errors.percent:.2f}", file=f)
    print(
        f"Errors: {counts['insertions']} insertions, {counts['deletions']} deletions, "
        f"{counts['substitutions']} substitutions, over {errors.length} reference "
        f"words ({sum(errors.correct.values())} correct)",
        file=f,
    )
    print(
        "Search below for sections starting with PER-UTT DETAILS:, "
        "SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, PER-WORD STATS:",
        file=f,
    )
    print("\nPER-UTT DETAILS: corr or (ref->hyp)  ", file=f)
    for cut_id, pairs in errors.alignments:
        print(f"{cut_id}:\t{_shown(pairs)}", file=f)
    print("\nSUBSTITUTIONS: count ref -> hyp", file=f)
    for (reference, found), count in _most_first(errors.substitutions):
        print(f"{count}   {reference} -> {found}", file=f)
    print("\nDELETIONS: count ref", file=f)
    for word, count in _most_first(errors.deletions):
        print(f"{count}   {word}", file=f)
    print("\nINSERTIONS: count hyp", file=f)
    for word, count in _most_first(errors.insertions):
        print(f"{count}   {word}", file=f)
    print("\nPER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp", file=f)
    for word, row in _rows_of_words(errors):
        print(f"{word}   {' '.join(map(str, row))}", file=f)


def _most_first(counter: Counter) -> List[Tuple]:
    return sorted(counter.items(), key=lambda item: (item[1], item[0]), reverse=True)


def _shown(pairs: Sequence[Tuple[str, str]]) -> str:
    """The words of an alignment; errors that follow one another are one pair."""
    words = []
    for is_right, group in groupby(pairs, key=lambda pair: pair[0] == pair[1]):
        group = list(group)
        if is_right:
            words += [reference for reference, _ in group]
            continue
        sides = [[w for w in side if w != GAP] for side in zip(*group)]
        reference, found = (" ".join(side) or GAP for side in sides)
        same = reference == found  # icefall's alignment may delete and insert a word
        words.append(reference if same else f"({reference}->{found})")
    return " ".join(words)


def _rows_of_words(errors: Errors) -> List[Tuple[str, Tuple[int, ...]]]:
    """Each word and its row of counts, the worst first."""
    as_reference, as_found = Counter(), Counter()
    for (reference, found), count in errors.substitutions.items():
        as_reference[reference] += count
        as_found[found] += count
    kinds = (errors.correct, as_reference, as_found, errors.insertions)
    words = set().union(*kinds, errors.deletions)
    rows = []
    for word in words:
        right, missed, wrong, more = (kind[word] for kind in kinds)
        fewer = errors.deletions[word]
        total = missed + wrong + more + fewer
        row = (right, total, right + missed + fewer, right + wrong + more)
        rows.append((total, word, row))
    # The most errors first; words of equally many backwards, as in icefall.
    rows.sort(reverse=True)
    return [(word, row) for _, word, row in rows]

"""Applies filters to a labelled manifest, and writes what is left and what is not."""

import json
import math
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, TextIO

from lhotse.cut import Cut
from lhotse.utils import fastcopy
from tqdm.auto import tqdm

from icefall_kd.errors import disk_errors, require
from icefall_kd.files import making_folder, replacing
from icefall_kd.kinds.nbest import FIELD as NBEST
from icefall_kd.kinds.nbest import read_nbest, write_nbest
from icefall_kd.labels.filters import Case, Filter, distance, words_of
from icefall_kd.labels.pseudo_label import read, replaced
from icefall_kd.labels.text import TextRules, unknown_parts
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.targets.manifest import open_manifest
from icefall_kd.zipformer import encoder_frames

SHIFT = 0.01  # seconds of a feature frame


@dataclass
class ErrorRate:
    """Errors of labels against original texts."""

    errors: int = 0
    words: int = 0

    @property
    def percent(self) -> float:
        """The rate; NaN without a word."""
        return 100 * self.errors / self.words if self.words else math.nan


@dataclass
class Outcome:
    """What was kept and dropped.

    Args:
      names: Those of the filters.
    """

    names: List[str]
    cuts: int = 0
    seconds: float = 0.0
    kept: int = 0
    kept_seconds: float = 0.0
    dropped: Dict[str, int] = field(default_factory=dict)  # by each filter
    alone: Dict[str, int] = field(default_factory=dict)  # by it and no other
    first: Dict[str, str] = field(
        default_factory=dict
    )  # a cut that it dropped, and why
    of_all: ErrorRate = field(default_factory=ErrorRate)
    of_kept: ErrorRate = field(default_factory=ErrorRate)

    def count(self, case: Case, reasons: Dict[str, str]) -> None:
        """Count a label.

        Args:
          case: The label.
          reasons: By the name of each filter that drops it.
        """
        self.cuts += 1
        self.seconds += case.seconds
        if not reasons:
            self.kept += 1
            self.kept_seconds += case.seconds
        for name, reason in reasons.items():
            self.dropped[name] = self.dropped.get(name, 0) + 1
            self.first.setdefault(name, f"{case.cut_id}: {reason}")
        if len(reasons) == 1:
            (name,) = reasons
            self.alone[name] = self.alone.get(name, 0) + 1
        if case.reference:
            errors = distance(case.reference, case.words)
            for rate in (self.of_all, *(() if reasons else (self.of_kept,))):
                rate.errors += errors
                rate.words += len(case.reference)

    def rows(self) -> List[Sequence[str]]:
        """A table: the filters, with their counts."""
        rows = [("filter", "the first that it drops", "dropped", "by it alone")]
        for name in self.names:
            counts = (f"{d.get(name, 0):,}" for d in (self.dropped, self.alone))
            rows.append((name, self.first.get(name, ""), *counts))
        return rows

    def sentence(self, unit: str) -> str:
        """What was kept, and how right it is where that is known.

        Args:
          unit: ``WER`` or ``CER``.
        """
        share = 100 * self.kept_seconds / max(self.seconds, 1e-9)
        text = (
            f"{self.kept:,} of {self.cuts:,} cuts kept, {self.kept_seconds:,.1f} s of "
            f"{self.seconds:,.1f} s ({share:.1f} %)"
        )
        if self.of_all.words:
            text += f"; {unit} of the labels {self.of_all.percent:.2f} %"
            if self.of_kept.words:
                text += f", of those kept {self.of_kept.percent:.2f} %"
        return text


class Sieve(NamedTuple):
    """What a manifest is filtered by.

    Args:
      filters: The filters.
      rules: Rewrite the texts, those of the original too.
      unit: ``WER`` or ``CER``: whether words are words or characters.
      tokenizer: The student's, for n-best lists; None where it is not known.
    """

    filters: Sequence[Filter]
    rules: TextRules
    unit: str = "WER"
    tokenizer: Any = None

    def case(self, cut: Cut, other: Optional[Cut] = None) -> Case:
        """What the filters see of a cut.

        Args:
          cut: The cut.
          other: The same one, labelled by another teacher.
        """
        label = read(cut)
        text = self.rules(label["said"])
        texts = [label["original"], label.get("ctc_text")]
        texts.append(None if other is None else read(other)["said"])
        reference, ctc_words, other_words = (
            None if text is None else words_of(self.rules(text), self.unit)
            for text in texts
        )
        (supervision,) = cut.supervisions
        frames = encoder_frames(round(supervision.duration / SHIFT))
        return Case(
            cut.id,
            text,
            words_of(text, self.unit),
            supervision.duration,
            max(0, frames),
            label["scores"],
            reference,
            ctc_words,
            other_words,
        )

    def reasons(self, case: Case) -> Dict[str, str]:
        """Why a label is dropped, by the name of each filter; nothing if it is kept.

        Args:
          case: The label. Of an empty one nothing else is asked.
        """
        reasons: Dict[str, str] = {}
        for of_filter in self.filters:
            reason = of_filter.why_not(case)
            if reason:
                reasons[of_filter.name] = reason
            if not case.text:
                break
        return reasons

    def rewrite(self, cut: Cut, case: Case) -> Cut:
        """Return a copy of a cut with the text that a student learns.

        Args:
          cut: The cut.
          case: What the filters saw.
        """
        value = {**read(cut), "rules": self.rules.digest}
        cut = replaced(cut, case.text, value)
        if (cut.custom or {}).get(NBEST) is None:
            return cut
        texts: Dict[str, float] = {}
        for said, score in read_nbest(cut):
            text = self.rules(said)
            if not text or self.tokenizer and unknown_parts(self.tokenizer, text):
                continue
            if text in texts:  # two that have become one
                low, high = sorted((texts[text], score))
                score = high + math.log1p(math.exp(low - high))
            texts[text] = score
        custom = {k: v for k, v in cut.custom.items() if k != NBEST}
        cut = fastcopy(cut, custom=custom)
        return write_nbest(cut, sorted(texts.items(), key=lambda x: -x[1]))


def sift(
    in_cuts: str, out_cuts: Path, sieve: Sieve, other_cuts: str = "", page: str = ""
) -> Outcome:
    """Write the cuts whose labels are kept.

    Args:
      in_cuts: A labelled manifest.
      out_cuts: The manifest to write.
      sieve: The filters.
      other_cuts: The same manifest, labelled by another teacher; "" for none.
      page: The page of what was dropped, Markdown; "" for none.

    Raises:
      KDError: cuts without labels, two manifests of other cuts, or nothing that is
        kept. Then nothing is written.
    """
    outcome = Outcome([f.name for f in sieve.filters])
    with ExitStack() as stack:
        stack.enter_context(disk_errors(out_cuts))
        stack.enter_context(making_folder(out_cuts.parent))
        temporary = stack.enter_context(replacing(out_cuts, shared=True))
        rows = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf8"))
        with open_manifest(temporary, "wb") as out:
            for cut, other in _pairs(in_cuts, other_cuts):
                case = sieve.case(cut, other)
                reasons = sieve.reasons(case)
                outcome.count(case, reasons)
                if reasons:
                    rows.write(_row(cut, case, reasons))
                    continue
                values = sieve.rewrite(cut, case).to_dict()
                out.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        require(
            outcome.kept,
            f"none of the {outcome.cuts} cuts in {in_cuts} is kept, for reasons such "
            f"as {'; '.join(outcome.first.values())}: loosen the filters, or take "
            "another teacher",
        )
        if page:
            target = stack.enter_context(replacing(Path(page), shared=True))
            with open(target, "w", encoding="utf8") as f:
                _write_page(f, outcome, sieve.unit, rows)
    return outcome


def _pairs(in_cuts: str, other_cuts: str) -> Iterator[Any]:
    """Each cut, with the same one of another manifest or None."""
    bar = tqdm(desc="Filtering", unit=" cuts", delay=2, leave=False)
    with bar:
        if not other_cuts:
            for cut in ManifestCuts(in_cuts):
                yield cut, None
                bar.update()
            return
        for cut, other in zip_longest(ManifestCuts(in_cuts), ManifestCuts(other_cuts)):
            ids = [None if c is None else c.id for c in (cut, other)]
            require(
                ids[0] == ids[1],
                f"{in_cuts} has the cut {ids[0]} where {other_cuts} has {ids[1]}: give "
                "two labellings of the same manifest, before either is filtered",
            )
            yield cut, other
            bar.update()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def _row(cut: Cut, case: Case, reasons: Dict[str, str]) -> str:
    label = read(cut)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    cells = (cut.id, f"{case.seconds:.2f}", why, label["said"], label["original"] or "")
    return "| " + " | ".join(map(_cell, cells)) + " |\n"


def _write_page(f: TextIO, outcome: Outcome, unit: str, rows: TextIO) -> None:
    f.write(f"# Pseudo-labels that were dropped\n\n{outcome.sentence(unit)}.\n\n")
    for i, row in enumerate(outcome.rows()):
        f.write("| " + " | ".join(map(_cell, row)) + " |\n")
        if not i:
            f.write("|---|---|---|---|\n")
    f.write("\n| cut | seconds | why | the teacher said | original text |\n")
    f.write("|---|---|---|---|---|\n")
    rows.seek(0)
    for line in rows:
        f.write(line)

"""What a decoding gave and cost: icefall's files, a summary and a table."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from icefall_kd.transcripts.costs import sum_up
from icefall_kd.transcripts.cuts import CutsToDecode
from icefall_kd.transcripts.first_answers import FirstAnswers
from icefall_kd.transcripts.journal import Journal
from icefall_kd.transcripts.recognizer import Method
from icefall_kd.transcripts.scores import (
    Errors,
    Result,
    count_errors,
    to_characters,
    write_results,
    write_transcripts,
)


@dataclass(frozen=True)
class Outcome:
    """A decoding that has come to its end.

    Args:
      folder: Where its files are.
      test_set: The name of the set.
      suffix: The end of the names of its files.
      method: The search.
      known: The cuts.
      journal: What was found in each.
      first: The student's answers, in a cascade.
    """

    folder: Path
    test_set: str
    suffix: str
    method: Method
    known: CutsToDecode
    journal: Journal
    first: Optional[FirstAnswers] = None

    @property
    def utterances(self) -> Dict[str, Dict[str, Any]]:
        """What was found in each cut."""
        answers = self.first.utterances if self.first else {}
        return {**answers, **self.journal.utterances}

    def results(self, tokenizer: Any) -> Tuple[List[Result], List[Result]]:
        """The words of each cut, sorted, and those of cuts without a text.

        Args:
          tokenizer: The model's.
        """
        results: Tuple[List[Result], List[Result]] = ([], [])
        utterances = self.utterances
        for cut_id, text in self.known.texts.items():
            tokens = utterances[cut_id]["tokens"]
            words = tokenizer.decode(tokens).split() if tokens else []
            reference = [] if text is None else text.split()
            results[text is None].append(Result(cut_id, reference, words))
        return sorted(results[0]), sorted(results[1])

    def write(self, tokenizer: Any, unit: str) -> Dict[str, Errors]:
        """Write icefall's files.

        Args:
          tokenizer: The model's.
          unit: ``WER`` or ``CER``, of which the files are.

        Returns:
          The errors of both units; nothing where no cut has a text.
        """
        results, untranscribed = self.results(tokenizer)
        if untranscribed:
            name = f"recogs-{self.test_set}-without-text-{self.suffix}.txt"
            write_transcripts(self.folder / name, untranscribed)
            count = len(results) + len(untranscribed)
            logging.warning(
                f"{len(untranscribed)} of {count} cuts have no text and are not "
                f"scored: what was found in them is in {self.folder / name}"
            )
        if not results:
            return {}
        characters = to_characters(results)
        errors = {"WER": count_errors(results), "CER": count_errors(characters)}
        write_results(
            self.folder,
            f"{self.test_set}-{self.suffix}",
            self.method.setting,
            results if unit == "WER" else characters,
            errors[unit],
        )
        return errors

    def summary(self, errors: Dict[str, Errors]) -> Dict[str, Any]:
        """Sum up, for the JSON file and the table.

        Args:
          errors: What :meth:`write` returned.
        """
        texts = self.known.texts
        summary = {
            "set": self.test_set,
            "suffix": self.suffix,
            "method": vars(self.method),
            "cuts": len(texts),
            "untranscribed": sum(text is None for text in texts.values()),
            "too_short": sum(not u["num_frames"] for u in self.utterances.values()),
            "errors": {kind: of_kind.counts() for kind, of_kind in errors.items()},
            "percent": {kind: of_kind.percent for kind, of_kind in errors.items()},
        }
        costs = sum_up(self.journal.batches, self.first.batches if self.first else ())
        frames = sum(u["num_frames"] for u in self.journal.utterances.values())
        costs["search"]["share"] = costs["search"].get("frames", 0) / max(frames, 1)
        if self.first is not None:
            chosen = {**self.first.cascade.as_dict(), "asked": len(self.first.asked)}
            summary["cascade"] = chosen
        return {**summary, **costs}


def table_of(summary: Dict[str, Any]) -> List[Tuple[str, str]]:
    """The rows of a decoding's table.

    Args:
      summary: What its JSON file has.
    """
    rows = [("", f"{summary['set']}, {summary['method']['name']}")]
    cuts = f"{summary['cuts']:,}"
    if summary["untranscribed"]:
        cuts += f", {summary['untranscribed']:,} of them without text, not scored"
    if summary["too_short"]:
        cuts += f", {summary['too_short']:,} too short for the model"
    rows.append(("cuts", cuts))
    if "cascade" in summary:
        asked, measure = summary["cascade"]["asked"], summary["cascade"]["measure"]
        rows.append(("cascade", f"{asked:,} cuts decoded by the teacher, by {measure}"))
    rows.append(("audio", f"{summary['audio_seconds']:,.1f} s"))
    for kind, percent in summary["percent"].items():
        counts = summary["errors"][kind]
        names = ("insertions", "deletions", "substitutions")
        kinds = ", ".join(f"{counts[name]:,} {name}" for name in names)
        rows.append((f"{kind} %", f"{percent:.2f} ({kinds} of {counts['length']:,})"))
    rtf, latency = summary["rtf"], summary["latency_ms"]
    rows += [
        ("RTF encoder", f"{rtf['encoder']:.5f}"),
        ("RTF search", f"{rtf['search']:.5f}"),
        ("RTF", f"{rtf['encoder'] + rtf['search']:.5f}"),
        ("latency", ", ".join(f"{p} {ms:.1f} ms" for p, ms in latency.items())),
    ]
    memory = summary["peak_memory_mb"]
    if memory:
        shown = ", ".join(f"{name} {mb:,.0f} MB" for name, mb in memory.items())
        rows.append(("peak memory", shown))
    search = "; ".join(summary["search"]["ways"]) or "none"
    if summary["method"]["skip_blanks"] is not None:
        search += f", in {100 * summary['search']['share']:.1f} % of the frames"
    if summary["search"].get("drafted"):
        drafted, accepted = (summary["search"][k] for k in ("drafted", "accepted"))
        search += f", {accepted:,} of {drafted:,} drafted tokens accepted"
        if summary["device"] == "cpu":
            search += " (on a CPU --draft none is faster)"
    rows.append(("search", search))
    threads, seconds = summary["threads"], summary["max_duration"]
    where = f"{summary['device']}, {threads} threads, batches of {seconds:g} s"
    rows.append(("on", where))
    return rows

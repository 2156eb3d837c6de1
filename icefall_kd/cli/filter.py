"""Keeps the pseudo-labels that a student can learn from."""

import math
from pathlib import Path
from typing import List, Optional

import click

from icefall_kd.cli.combine import check_not_overwritten
from icefall_kd.cli.options import Count, Number, Place, Text, command
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import need_kaldialign, require
from icefall_kd.files import MANIFEST, check_new_file
from icefall_kd.labels import filters
from icefall_kd.labels.filters import Bounds, Filter
from icefall_kd.labels.sifting import Sieve, sift
from icefall_kd.labels.text import TextRules
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.tokens import load_tokenizer

MOST_PERCENT = 10**6
PERCENT = {"type": Number(0, MOST_PERCENT), "default": None, "metavar": "PERCENT"}


EXAMPLE = """
icefall-kd filter --bpe-model data/lang_bpe_500/bpe.model --max-repeats 4 \\
  --heads-threshold 10 labels.jsonl.gz train.jsonl.gz
"""


@command(example=EXAMPLE)
@click.argument("in_cuts", type=Place())
@click.argument("out_cuts", type=Place())
@click.option(
    "--rules",
    type=Place(optional=True),
    default="",
    metavar="FILE",
    help="How the teacher's text becomes the student's: a file of lines `lower`, "
    "`upper`, `nfc` or `nfkc`, or of a regular expression, a tab and what replaces it. "
    "Original texts are rewritten too before they are compared.",
)
@click.option(
    "--bpe-model",
    "--lang-dir",
    "bpe_model",
    type=Place(optional=True),
    default="",
    metavar="PATH",
    help="The student's bpe.model, or the folder of its tokens.txt: drop texts that "
    "its tokens can't write, or that have more tokens than frames.",
)
@click.option(
    "--wer-threshold",
    **PERCENT,
    help="Drop labels whose error rate against the original text is not below this. "
    "Cuts without one are kept.",
)
@click.option(
    "--min-score",
    type=Number(-(10**6), 10**6),
    default=None,
    metavar="SCORE",
    help="Drop labels of which the teacher is less sure, such as -0.1.",
)
@click.option(
    "--measure",
    type=Text(),
    default="",
    metavar="NAME",
    help="The score that --min-score is about. A recipe's model has token, "
    "worst-token, frame, path and heads (see `icefall-kd cascade`), a Whisper has "
    "token, worst-token, compression and speech, a program with --nbest has score. "
    "Default: heads where the teacher has both heads, else token, or score.",
)
@click.option(
    "--agree-with",
    "other_cuts",
    type=Place(optional=True),
    default="",
    metavar="CUTS",
    help="The same manifest, labelled by another teacher.",
)
@click.option(
    "--agree-threshold",
    "agreement",
    **PERCENT,
    help="With --agree-with: drop labels that differ, and not below this, from the "
    "other teacher's: edit distance as a share of the longer text.",
)
@click.option(
    "--heads-threshold",
    "heads",
    **PERCENT,
    help="Drop labels that differ, and not below this, from what the CTC head of a "
    "transducer's model heard.",
)
@click.option(
    "--words-per-second",
    type=Text(),
    default="",
    metavar="LEAST:MOST",
    help="Drop labels with fewer or more words a second, such as 0.5:5.",
)
@click.option(
    "--characters-per-second",
    type=Text(),
    default="",
    metavar="LEAST:MOST",
    help="Drop labels with fewer or more characters a second, blanks not counted.",
)
@click.option(
    "--max-repeats",
    type=Count(1, 10**6),
    default=None,
    metavar="N",
    help="Drop labels in which the same words, one or several, come more than N times "
    "in a row, as in hallucinations.",
)
@click.option(
    "--characters",
    type=Text(),
    default="",
    metavar="SET",
    help="Drop labels with other characters than these and blanks: what stands between "
    "the brackets of a regular expression, such as a-z'.",
)
@click.option(
    "--unit",
    type=click.Choice(("WER", "CER")),
    default="WER",
    help="Whether error rates, differences and repeats are of words or of characters.",
)
@click.option(
    "--page",
    type=Place(optional=True),
    default="",
    metavar="FILE",
    help="Write a page in Markdown of what is dropped, with the reasons.",
)
def filter(
    in_cuts: str,
    out_cuts: str,
    rules: str,
    bpe_model: str,
    wer_threshold: Optional[float],
    min_score: Optional[float],
    measure: str,
    other_cuts: str,
    agreement: Optional[float],
    heads: Optional[float],
    words_per_second: str,
    characters_per_second: str,
    max_repeats: Optional[int],
    characters: str,
    unit: str,
    page: str,
) -> None:
    """Keep the labels of IN_CUTS that a student can learn from; write OUT_CUTS.

    IN_CUTS is a manifest of `icefall-kd label`. Labels without a text are always
    dropped; each option adds a filter. The table counts what each filter drops, and
    what no other one would. Nothing is decoded anew: try other thresholds on the same
    IN_CUTS.
    """
    need_kaldialign()
    _check(in_cuts, out_cuts, other_cuts, agreement, min_score, measure, page)
    tokenizer = load_tokenizer(bpe_model) if bpe_model else None
    chosen: List[Optional[Filter]] = [
        filters.not_empty(),
        filters.has_tokens(tokenizer) if tokenizer is not None else None,
        filters.only_characters(characters) if characters else None,
        _rate(words_per_second, "words", "--words-per-second"),
        _rate(characters_per_second, "characters", "--characters-per-second"),
        None if max_repeats is None else filters.repeats_at_most(max_repeats),
        None if min_score is None else filters.score_at_least(min_score, measure),
        None if heads is None else filters.differs_below(heads, "heads", "ctc_words"),
        (
            None
            if agreement is None
            else filters.differs_below(agreement, "agreement", "other_words")
        ),
        (
            None
            if wer_threshold is None
            else filters.error_rate_below(wer_threshold, unit)
        ),
    ]
    used = [f for f in chosen if f is not None]
    sieve = Sieve(used, TextRules(rules), unit, tokenizer)
    outcome = sift(in_cuts, Path(out_cuts), sieve, other_cuts, page)
    click.echo(text_table(outcome.rows(), left=2))
    click.echo(f"{out_cuts}: {outcome.sentence(unit)}")
    click.echo("Next: train on it, or join it with other cuts by `icefall-kd mix`.")


def _check(
    in_cuts: str,
    out_cuts: str,
    other_cuts: str,
    agreement: Optional[float],
    min_score: Optional[float],
    measure: str,
    page: str,
) -> None:
    """Refuse files that can't be read or written, and options that need another one."""
    check_new_file(out_cuts, "OUT_CUTS", MANIFEST)
    for path in (in_cuts, other_cuts):
        if path:
            ManifestCuts(path)
            check_not_overwritten(path, out_cuts, "OUT_CUTS")
    if page:
        check_new_file(page, "--page")
        for path in (in_cuts, out_cuts, other_cuts):
            require(
                Path(page).resolve() != Path(path).resolve(),
                f"--page is {page}, which is a manifest of this command: give it "
                "another name, such as dropped.md",
            )
    require(
        bool(other_cuts) == (agreement is not None),
        "--agree-with and --agree-threshold go together: give both",
    )
    require(
        not measure or min_score is not None,
        f"--measure is {measure} and there is no --min-score: give both",
    )


def _rate(text: str, unit: str, option: str) -> Optional[Filter]:
    """A filter of the words or characters in a second; None for no text."""
    if not text:
        return None
    try:
        least, most = map(float, text.split(":"))
    except ValueError:
        least = most = math.nan
    require(
        0 <= least <= most,
        f"{option} is {text!r}: give the least and the most, such as 0.5:5",
    )
    bounds: Bounds = (least, most)
    return filters.rate_within(bounds, unit)

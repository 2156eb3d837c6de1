"""The tables of error rates: intervals, seeds, differences, equal cost."""

import math
from pathlib import Path

import numpy as np
import pytest

from icefall_kd.report.comparison import Comparison, Model, Run, TestAudio
from icefall_kd.report.intervals import measure
from icefall_kd.report.logs import LogLine, SavedCheckpoint, Training
from icefall_kd.report.models import models_table
from icefall_kd.report.page import Bullets, Heading, Table, Text
from icefall_kd.report.rates import (
    differences_table,
    equal_table,
    rate_blocks,
    rate_table,
    seeds_table,
)
from icefall_kd.report.results import Decoding, ErrorRate
from icefall_kd.report.tables import blocks_of
from icefall_kd.report.transcripts import Scores
from icefall_kd.report.words import words_of

pytest.importorskip("matplotlib")
KEY = ("wer", "greedy_search", "test")


def scores(errors):
    """Ten words an utterance."""
    n = len(errors)
    words = np.full(n, 10)
    return Scores(Path("x"), [str(i) for i in range(n)], n * [""], errors, words)


def decoding(percent, suffix="epoch-3-avg-1"):
    rates = {"test": ErrorRate(percent, "greedy_search")}
    return Decoding("greedy_search", "wer", suffix, rates, "2025-01-02-03-04-05")


def run(name, percent, earlier=(), seconds=(), errors=None, settings=None):
    """A run whose epochs ended after some seconds, and whose last rate is percent."""
    training = None
    if seconds or settings is not None:
        ends = list(enumerate(seconds, start=1))
        batches = [LogLine(e, 99, {"loss": 1.0}, seconds=s) for e, s in ends]
        saved = [SavedCheckpoint(e, 99, f"epoch-{e}", s) for e, s in ends]
        training = Training(settings or {}, 9, batches, saved=saved)
    last = f"epoch-{len(seconds) or 3}-avg-1"
    made = Run(name, Path("no") / name, training, [decoding(percent, last)], [])
    made.earlier += [decoding(p, f"epoch-{e}-avg-1") for e, p in earlier]
    if errors is not None:
        made.scores[KEY] = scores(np.array(errors))
    return made


def report(*models, lang="en"):
    made = [Model(name, list(runs)) for name, *runs in models]
    names = [*(m.name for m in made), "", ""]
    roles = names[:2] if len(made) > 1 else ["", ""]
    scored = {
        m.name: [r.scores[KEY] for r in m.runs]
        for m in made
        if all(KEY in r.scores for r in m.runs)
    }
    statistics = {KEY: measure(scored, roles[1])} if scored else {}
    words = words_of(lang)
    return Comparison(made, *roles, "WER", TestAudio(), {}, words, statistics)


def three(lang="en"):
    """A student with 2 errors in each utterance, and one with 1 by three seeds."""
    seeds = [run(f"K ({i})", p, errors=[1] * 9) for i, p in ((1, 9), (2, 10), (3, 11))]
    return report(
        ("T", run("T", 4.0)),
        ("S", run("S", 20.0, errors=[2] * 9)),
        ("K", *seeds),
        lang=lang,
    )


def notes(made):
    (found,) = (b for b in blocks_of(made) if isinstance(b, Bullets))
    return "\n".join(found.items)


def test_a_rate_has_its_interval_where_there_are_transcripts():
    (row,) = rate_table(three(), "wer").rows
    assert row[2:5] == ["4.00", "20.00 [20.00, 20.00]", "10.00 [10.00, 10.00]"]
    assert row[5:] == ["-50.0 %", "62 %"]
    assert "T: no interval, as no/T has no greedy_search/recogs-test-*" in notes(
        three()
    )


def test_each_seed_is_told_with_the_deviation():
    made = three()
    (row,) = seeds_table(made, "wer").rows
    assert row == [
        *("greedy_search", "test", "K", "10.00", "1.00"),
        "9.00, 10.00, 11.00",
    ]
    assert math.isnan(made.model("S").deviation("greedy_search", "wer", "test"))


def test_a_seed_that_was_not_decoded_leaves_no_mean():
    other = run("K (2)", 5.0)
    other.decodings.clear()
    made = report(
        ("T", run("T", 4.0)), ("S", run("S", 8.0)), ("K", run("K (1)", 6.0), other)
    )
    (row,) = rate_table(made, "wer").rows
    assert row[4:] == ["-", "-", "-"]
    assert seeds_table(made, "wer").rows[0][3:] == ["-", "-", "6.00, -"]
    assert "K (2): no decoding results in no" in notes(made)


def test_differences_are_against_the_baseline():
    table = differences_table(three(), "wer")
    (row,) = table.rows
    assert row == [
        *("greedy_search", "test", "K", "-10.00 [-10.00, -10.00]"),
        *("0.500 [0.500, 0.500]", "0.0002", "100.0 %"),
    ]
    assert len(table.head) == len(row)


def test_the_standard_error_by_seeds_is_told_where_both_have_seeds():
    runs = {
        name: [run(f"{name} {i}", p, errors=[e] * 9) for i, p in enumerate(rates)]
        for name, e, rates in (("S", 2, (19, 20, 21)), ("K", 1, (9, 10, 11, 12)))
    }
    made = report(("T", run("T", 4.0)), ("S", *runs["S"]), ("K", *runs["K"]))
    table = differences_table(made, "wer")
    assert table.head[-1] == "standard error by seeds (points)"
    # sqrt(1 / 3 + (5 / 3) / 4)
    assert table.rows[0][-1] == "0.87"
    texts = [b.text for b in rate_blocks(made) if isinstance(b, Text)]
    assert any("may turn round with other seeds" in text for text in texts)
    assert not any("may turn round" in str(b) for b in rate_blocks(three()))


def test_without_transcripts_there_are_no_differences_and_no_text():
    made = report(("T", run("T", 4.0)), ("S", run("S", 8.0)), ("K", run("K", 6.0)))
    assert [type(b).__name__ for b in rate_blocks(made)] == [
        *("Heading", "Table", "Text", "Plots"),
    ]


def test_the_text_says_how_large_the_test_set_is_and_what_is_not_contained():
    texts = [b.text for b in rate_blocks(three()) if isinstance(b, Text)]
    assert any("test has 90 words in 9 utterances" in text for text in texts)
    assert any(
        "not how far it would vary if the model were trained" in t for t in texts
    )
    assert any("does not hold the variation of seeds" in t for t in texts)


def test_at_equal_steps_and_seconds_the_last_result_within_them_counts():
    fast = run("S", 8.0, [(1, 9.0)], seconds=(100, 200))
    slow = run("K", 5.0, [(1, 7.0), (2, 6.0)], seconds=(150, 290, 450))
    made = report(("T", run("T", 4.0, seconds=(9,))), ("S", fast), ("K", slow))
    steps = equal_table(made, "wer", "steps")
    assert steps.head == ["decoding method", "test set", "training steps", "S", "K"]
    assert steps.rows == [
        ["greedy_search", "test", "200", "8.00 (epoch 2, avg 1; 200)"]
        + ["6.00 (epoch 2, avg 1; 200)"]
    ]
    assert equal_table(made, "wer", "seconds").rows == [
        ["greedy_search", "test", "200", "8.00 (epoch 2, avg 1; 200)"]
        + ["7.00 (epoch 1, avg 1; 150)"]
    ]
    headings = [b.text for b in rate_blocks(made) if isinstance(b, Heading)]
    assert headings[1:] == ["WER (%) at equal steps", "WER (%) at equal seconds"]


def test_at_equal_steps_seeds_have_their_mean():
    short = run("S", 8.0, seconds=(1, 2))
    seeds = [
        run(f"K {i}", 1.0, [(2, p)], seconds=(1, 2, 3)) for i, p in enumerate((5, 7))
    ]
    made = report(("T", run("T", 4.0)), ("S", short), ("K", *seeds))
    (row,) = equal_table(made, "wer", "steps").rows
    assert row[3:] == ["8.00 (epoch 2, avg 1; 200)", "6.00 (epoch 2, avg 1; 200)"]


def write_transcripts(folder, suffix, errors):
    """Ten words an utterance, of which so many are wrong."""
    lines = []
    for i, n in enumerate(errors):
        lines.append(f"{i}:\tref={['a'] * 10}")
        lines.append(f"{i}:\thyp={['a'] * (10 - n) + ['b'] * n}")
    folder.mkdir(parents=True)
    (folder / f"recogs-test-{suffix}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("by_speaker", [False, True])
def test_results_with_transcripts_have_their_interval_at_equal_steps(
    tmp_path, by_speaker
):
    pytest.importorskip("kaldialign")
    errors = [[0, 3, 1, 4, 0, 2], [1, 3, 1, 5, 0, 2]]  # of two seeds
    short = run("S", 20.0, seconds=(1, 2), errors=[2] * 6)
    seeds = []
    for i, of_seed in enumerate(errors):
        percent = 100 * sum(of_seed) / 60
        seeds.append(run(f"K {i}", 1.0, [(2, percent)], seconds=(1, 2, 3)))
        seeds[-1].earlier[0].folder = tmp_path / str(i)
        write_transcripts(tmp_path / str(i), "epoch-2-avg-1", of_seed)
    made = report(("T", run("T", 4.0)), ("S", short), ("K", *seeds))
    speakers = {str(i): f"s{i % 3}" for i in range(6)} if by_speaker else None
    if by_speaker:
        made.audio.speakers["test"] = speakers
    expected = measure({"K": [scores(np.array(e)) for e in errors]}, "", speakers)
    low, high = expected.intervals["K"].low, expected.intervals["K"].high
    assert low < 18 < high
    (row,) = equal_table(made, "wer", "steps").rows
    assert row[3:] == [
        "20.00 [20.00, 20.00] (epoch 2, avg 1; 200)",
        f"18.33 [{low:.2f}, {high:.2f}] (epoch 2, avg 1; 200)",
    ]


def test_a_seed_without_transcripts_leaves_its_model_without_an_interval(tmp_path):
    pytest.importorskip("kaldialign")
    seeds = [run(f"K {i}", 1.0, [(2, 20.0)], seconds=(1, 2, 3)) for i in (0, 1)]
    for seed, folder in zip(seeds, (tmp_path / "0", tmp_path / "1")):
        seed.earlier[0].folder = folder
    write_transcripts(tmp_path / "0", "epoch-2-avg-1", [2, 2])
    made = report(
        ("T", run("T", 4.0)), ("S", run("S", 8.0, seconds=(1, 2))), ("K", *seeds)
    )
    (row,) = equal_table(made, "wer", "steps").rows
    assert row[3:] == ["8.00 (epoch 2, avg 1; 200)", "20.00 (epoch 2, avg 1; 200)"]


def test_a_model_without_a_result_that_early_has_a_dash():
    short = run("S", 8.0, [(1, 9.0)], seconds=(1, 2))
    made = report(
        ("T", run("T", 4.0)), ("S", short), ("K", run("K", 5.0, seconds=(1, 2, 3)))
    )
    (row,) = equal_table(made, "wer", "steps").rows
    assert row[3:] == ["8.00 (epoch 2, avg 1; 200)", "-"]


def test_models_with_one_result_have_no_table_at_equal_cost():
    made = report(
        ("T", run("T", 4.0)),
        ("S", run("S", 8.0, seconds=(1, 2))),
        ("K", run("K", 5.0, seconds=(1, 2, 3))),
    )
    assert not equal_table(made, "wer", "steps").rows


def test_results_of_other_options_are_not_taken_for_earlier_ones():
    long = run("K", 5.0, [(2, 6.0)], seconds=(1, 2, 3))
    long.earlier[0].suffix += "-chunk-16"
    made = report(
        ("T", run("T", 4.0)), ("S", run("S", 8.0, [(1, 9)], (1, 2))), ("K", long)
    )
    assert equal_table(made, "wer", "steps").rows[0][-1] == "-"


def test_each_run_has_its_column_with_seed_steps_and_seconds():
    seeds = [
        run(f"K ({i})", 5.0, (), (60, 1234.5), settings={"seed": i}) for i in (4, 5)
    ]
    table = models_table(report(("K", *seeds)))
    assert table.head == ["", "K (4)", "K (5)"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["seed"] == ["4", "5"]
    assert rows["training steps"] == ["≥ 200", "≥ 200"]
    assert rows["training seconds"] == ["1,234", "1,234"]


def test_seeds_that_are_equal_and_checkpoints_that_differ_are_noted():
    seeds = [run("K (1)", 5.0, settings={"seed": 1}) for _ in range(2)]
    assert "not all runs have seeds of their own (1, 1)" in notes(report(("K", *seeds)))
    others = [run("K (1)", 5.0, (), (1, 2)), run("K (2)", 5.0, (), (1, 2, 3))]
    text = notes(report(("K", *others)))
    assert "different checkpoints (epoch 2, avg 1; epoch 3, avg 1)" in text
    assert "seeds of their own" not in text


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_all_blocks_are_there_in_both_languages(lang):
    made = three(lang)
    assert sum(isinstance(b, Table) for b in rate_blocks(made)) == 3
    assert blocks_of(made)
    by_speaker = {str(i): f"s{i % 3}" for i in range(9)}
    one = {"S": [scores(np.array([2] * 9))]}
    made.statistics[KEY] = measure(one, "", by_speaker)
    texts = "".join(b.text for b in rate_blocks(made) if isinstance(b, Text))
    assert ("of 3 speakers" if lang == "en" else "3 个说话人") in texts

"""Intervals and differences of models, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from icefall_kd.errors import KDError
from icefall_kd.report.bootstrap import Bootstrap
from icefall_kd.report.intervals import measure, need_interval
from icefall_kd.report.transcripts import Scores

N = 40


def scores(seed=0, rate=0.2, n=N, path="x", **changed):
    rng = np.random.default_rng(seed)
    words = 1 + np.arange(n) % 7
    fields = {
        "path": Path(path),
        "ids": [f"u{i:03d}" for i in range(n)],
        "references": ["w " * int(k) for k in words],
        "errors": rng.binomial(words, rate),
        "words": words,
    }
    return Scores(**{**fields, **changed})


def test_each_model_has_an_interval_and_a_difference_to_the_baseline():
    found = measure({"T": [scores(0)], "S": [scores(1)], "K": [scores(2)]}, "S")
    assert list(found.intervals) == ["T", "S", "K"]
    assert list(found.differences) == ["T", "K"]
    assert (found.utterances, found.words) == (N, scores().words.sum())
    alone = measure({"S": [scores(1)]})
    assert alone.intervals["S"] == found.intervals["S"] and not alone.differences


def test_the_seeds_of_a_model_are_pooled_in_any_order():
    seeds = [scores(i) for i in range(3)]
    one = measure({"S": [scores(9)], "K": seeds}, "S")
    other = measure({"S": [scores(9)], "K": seeds[::-1]}, "S")
    assert one == other
    sums = sum(s.errors for s in seeds)[:, None], 3 * seeds[0].words[:, None]
    assert one.intervals["K"] == Bootstrap(*sums).interval(0)
    rates = [s.percent for s in seeds]
    points = sum(rates) / 3 - scores(9).percent
    assert one.differences["K"].points == pytest.approx(points)


def test_three_seeds_that_are_equal_say_no_more_than_one():
    one = measure({"S": [scores(9)], "K": [scores(1)]}, "S")
    three = measure({"S": [scores(9)], "K": [scores(1)] * 3}, "S")
    assert one.intervals["K"].low == pytest.approx(three.intervals["K"].low)
    assert one.differences["K"].p == three.differences["K"].p


def test_an_utterance_that_one_model_lacks_is_refused():
    short = scores(n=N - 1, path="short")
    for pair in ([scores(), short], [short, scores()]):
        with pytest.raises(KDError, match=f"u{N - 1:03d} is in x and not in short"):
            measure({"S": pair[:1], "K": pair[1:]}, "S")
        with pytest.raises(KDError, match="not in short"):  # also of two seeds
            measure({"K": pair})


def test_references_that_differ_are_refused():
    other = scores(references=["other", *scores().references[1:]], path="y")
    said = "the references of utterance u000 differ, 'w ' in x and 'other' in y: decode"
    with pytest.raises(KDError, match=said):
        measure({"S": [scores()], "K": [other]}, "S")


def speakers(count, n=N):
    return {f"u{i:03d}": f"s{i % count:03d}" for i in range(n)}


def test_by_speaker_the_units_are_speakers():
    found = measure({"S": [scores()]}, "", speakers(5))
    assert (found.speakers, found.utterances) == (5, N)
    errors, words = (
        np.array([x[i::5].sum() for i in range(5)])[:, None]
        for x in (scores().errors, scores().words)
    )
    assert found.intervals["S"] == Bootstrap(errors, words).interval(0)
    assert measure({"S": [scores()]}).speakers == 0


def test_where_each_utterance_has_its_own_speaker_nothing_changes():
    found = measure({"S": [scores()]}, "", speakers(N))
    assert found.intervals == measure({"S": [scores()]}).intervals


def test_a_cut_without_a_speaker_is_refused():
    with pytest.raises(KDError, match="no speaker for the cut u039 of x: give"):
        measure({"S": [scores()]}, "", speakers(5, N - 1))


def test_a_single_speaker_is_refused():
    with pytest.raises(KDError, match="x has one speaker, s000, and an interval needs"):
        measure({"S": [scores()]}, "", speakers(1))


KEY = ("wer", "greedy_search", "dev")


def test_too_few_words_are_refused_with_the_number_that_is_needed():
    found = {KEY: measure({"S": [scores(rate=0.1)], "K": [scores(rate=0.4)]}, "S")}
    half = max(i.half_width for i in found[KEY].intervals.values())
    need_interval(found, half)
    words = scores().words.sum()
    with pytest.raises(KDError) as refusal:
        need_interval(found, half / 2)
    said = str(refusal.value)
    assert f"the test set dev has {words} words, too few for `interval`" in said
    assert f"'K' by greedy_search is ±{half:.2f} percentage points" in said
    assert f"and {4 * words} words are needed" in said


def test_the_offered_interval_is_taken():
    found = {KEY: measure({"S": [scores()]})}
    with pytest.raises(KDError) as refusal:
        need_interval(found, 0.01)
    need_interval(found, float(str(refusal.value).split()[-1]))


def test_by_speaker_the_number_of_speakers_that_is_needed_is_named():
    found = {KEY: measure({"S": [scores()]}, "", speakers(5))}
    half = found[KEY].intervals["S"].half_width
    with pytest.raises(KDError, match="words of 20 speakers are needed"):
        need_interval(found, half / 2 * 1.0001)


def test_the_needed_words_are_about_enough():
    """Four times the utterances have about half of the interval."""
    half = measure({"S": [scores(n=200)]}).intervals["S"].half_width
    longer = measure({"S": [scores(1, n=800)]}).intervals["S"].half_width
    assert longer == pytest.approx(half / 2, rel=0.2)

"""Confidence, curves and choices, counted by hand."""

import pytest

from icefall_kd.errors import KDError
from icefall_kd.transcripts.cascade import (
    MEASURES,
    Cascade,
    Pair,
    Point,
    choose,
    confidences,
    mean_rate,
    measures_of,
)

pytest.importorskip("kaldialign")


def utterance(log_probs=(), ctc_tokens=None, ctc_log_prob=0.0, num_frames=10):
    tokens = list(range(1, 1 + len(log_probs)))
    return {
        "tokens": tokens,
        "log_probs": list(log_probs),
        "ctc_tokens": tokens if ctc_tokens is None else ctc_tokens,
        "ctc_log_prob": ctc_log_prob,
        "num_frames": num_frames,
    }


@pytest.mark.parametrize(
    "measure, expected",
    [
        ("token", -0.5),
        ("worst-token", -0.75),
        ("frame", -0.25),
        ("path", -2.5),
        ("heads", -0.25 - 1 / 3),
    ],
)
def test_each_measure_of_an_utterance(measure, expected):
    u = utterance((-0.25, -0.75), [1, 2, 3], -0.25)
    assert confidences(measure, {"a": u}) == {"a": pytest.approx(expected)}


@pytest.mark.parametrize("measure", MEASURES)
def test_an_utterance_without_frames_is_less_sure_than_any_other(measure):
    both = {"none": utterance(num_frames=0), "some": utterance((-9.0,), [], -0.5)}
    values = confidences(measure, both)
    assert values["none"] < values["some"]


def test_the_measures_are_those_that_a_decoding_has_the_values_for():
    method = {"name": "greedy_search"}
    assert measures_of({"ctc": True, "method": method}) == list(MEASURES)
    assert measures_of({"ctc": False, "method": method}) == ["token", "worst-token"]
    by_ctc = measures_of({"ctc": True, "method": {"name": "ctc-greedy-search"}})
    assert "heads" not in by_ctc and "frame" in by_ctc


@pytest.fixture
def pair():
    """Four utterances of five words; the student is unsure of c, then of a and d."""
    return Pair(
        {"token": [-2.0, -1.0, -3.0, -2.0]},
        ([2, 1, 4, 0], [1, 2, 0, 0]),
        [5, 5, 5, 5],
        {"seconds": ([1.0, 1.0, 1.0, 1.0], [2.0, 4.0, 6.0, 8.0])},
    )


def test_a_curve_by_hand(pair):
    assert pair.curve("token", "seconds") == [
        Point(-3.0, 0, 35.0, 4 / 20),
        Point(-2.5, 1, 15.0, 10 / 20),
        Point(-1.5, 3, 10.0, 20 / 20),  # a and d are equally sure
        Point(1.0, 4, 15.0, 24 / 20),
    ]


def test_the_thresholds_of_a_curve_ask_for_what_it_says(pair):
    utterances = {
        name: utterance([value]) for name, value in zip("abcd", (-2, -1, -3, -2))
    }
    for point in pair.curve("token", "seconds"):
        asked = Cascade("token", point.threshold, {}, {}).unsure(utterances)
        assert len(asked) == point.asked


def test_choices(pair):
    points = pair.curve("token", "seconds")
    assert choose(points, max_rate=15.0).asked == 1
    assert choose(points, max_rate=14.9).asked == 3
    assert choose(points, max_cost=0.5).asked == 1
    assert choose(points, max_cost=9.0).asked == 3  # the lowest rate, not the most


def test_a_wish_that_a_curve_has_no_point_for_is_refused(pair):
    points = pair.curve("token", "seconds")
    with pytest.raises(KDError, match="^`max_rate` is 9, and .* is 10.00 %: give more"):
        choose(points, max_rate=9.0)
    with pytest.raises(KDError, match="^`max_cost` is 0.1, .* 0.200 of the teacher: "):
        choose(points, max_cost=0.1)


def test_the_mean_of_a_curve_is_over_its_costs():
    points = [Point(0, 0, 10.0, 0.5), Point(0, 1, 6.0, 1.0), Point(0, 2, 6.0, 2.0)]
    assert mean_rate(points) == pytest.approx((8 * 0.5 + 6 * 1) / 1.5)
    assert mean_rate(points[:1]) == 0

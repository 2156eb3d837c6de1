"""The verdict of measures, without any model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from icefall_kd.errors import KDError
from icefall_kd.forecast.measures import (
    BLANKS,
    SPIKES,
    HeadMeasures,
    Interval,
    Measures,
    ModelMeasures,
    TermMeasures,
    measures_of,
)
from icefall_kd.forecast.model import MOST_GAP, SITUATIONS, expected_ratio
from icefall_kd.forecast.verdict import (
    MIX,
    NO,
    OPEN,
    YES,
    check_words,
    decide,
    half_width,
    situation_of,
    words_needed,
)

ROOT = Path(__file__).resolve().parents[2]


def model(ctc, transducer=None, epoch=0):
    heads = {"ctc": HeadMeasures(1.0, Interval(ctc, ctc - 1, ctc + 1), 0.5)}
    if transducer is not None:
        wer = Interval(transducer, transducer - 1, transducer + 1)
        heads["transducer"] = HeadMeasures(1.5, wer, 0.4)
    return ModelMeasures(epoch, 1000, heads)


def interval(value, half=0.05):
    return Interval(value, value - half, value + half)


def made(teacher=(8.0, 10.0), student=(16.0, 20.0), half=0.05, **changes):
    """Measures of a student that has converged, some of them changed."""
    heads = ("ctc", "transducer")[: len(teacher)]
    gaps = {
        head: interval(math.log(b / a), half)
        for head, a, b in zip(heads, teacher, student)
    }
    values = dict(
        cuts=300,
        words=1200,
        teacher=model(*teacher),
        epochs=(model(*student, epoch=4), model(*student, epoch=5)),
        best=5,
        gaps=gaps,
        changes={head: interval(0.0) for head in heads},
        last=1,
        worse=0.1,
        sliced=False,
    )
    return Measures(**{**values, **changes})


# The answer


def test_a_teacher_twice_as_good_is_worth_it():
    verdict = decide(made())
    assert (verdict.answer, verdict.situation) == (YES, "converged")
    expected = SITUATIONS["converged"].slope * -math.log(2)
    assert verdict.ratios["ctc"].value == pytest.approx(math.exp(expected))
    assert verdict.sentences[0].startswith(
        "KD can gain at most about 50 % (47 to 52) in CTC: teacher 8.0 %, student "
        "without KD 16.0 %, flat: +0 % (-5 to +5) in the last epoch; 50 % (47 to 52) "
        "in transducer: teacher 10.0 %"
    )
    assert not any(sentence.startswith("Don't") for sentence in verdict.sentences)


def test_a_teacher_as_good_as_its_student_within_the_interval_is_not():
    verdict = decide(made(student=(8.5, 10.5), half=0.2))
    assert verdict.answer == NO and verdict.lines == []
    assert "Don't: the teacher is not better than the student within the interval" in (
        verdict.sentences[-1]
    )
    # Half of the interval is to shrink to the difference, 1 - 8 / 8.5.
    half = 8 / 8.5 * math.sinh(0.2)
    words = 1200 * (half / (1 - 8 / 8.5)) ** 2
    assert f"about {math.ceil(words / 1000)},000 would show" in verdict.sentences[-1]


def test_a_student_that_is_better_than_its_teacher_is_not_taught():
    verdict = decide(made(student=(7.0, 9.0)))
    assert verdict.answer == NO
    assert "already as good as its teacher (8.0 % against 7.0 % in CTC, 10.0 %" in (
        verdict.sentences[-1]
    )
    assert verdict.sentences[0].startswith(
        "KD can gain at most about 0 % (0 to 0) in CTC"
    )


def test_one_head_in_which_the_teacher_leads_is_enough_and_gets_its_term():
    verdict = decide(made(student=(7.0, 20.0)))
    assert verdict.answer == YES
    assert "rnnt-weight: 1.0" in verdict.lines
    assert "ctc-weight: 1.0" not in verdict.lines


def test_a_teacher_that_is_wrong_on_half_of_the_words_teaches_nothing():
    assert decide(made((50.0, 60.0), (90.0, 95.0))).answer == NO
    assert decide(made((49.0, 60.0), (90.0, 95.0))).answer == YES
    last = decide(made((50.0, 60.0), (90.0, 95.0))).sentences[-1]
    assert "wrong on too many words (50.0 % in CTC and 60.0 % in transducer" in last


def test_a_small_gap_does_not_pay_for_what_slices_lose():
    small = made(student=(8.8, 11.0), half=0.01, sliced=True)
    assert decide(small).answer == NO
    assert "too small to pay" in decide(small).sentences[-1]
    assert decide(replace(small, sliced=False)).answer == YES
    assert decide(made(sliced=True)).answer == YES


def test_without_a_training_the_answer_is_open():
    verdict = decide(
        made(epochs=(), best=0, gaps={}, changes={}, last=0, start=model(97.0, 99.0))
    )
    assert (verdict.answer, verdict.situation, verdict.ratios) == (OPEN, "", {})
    assert "give `baseline_dir`" in verdict.sentences[0] and verdict.lines
    bad = made((70.0,), (90.0,), epochs=(), best=0, gaps={}, changes={}, last=0)
    assert decide(bad).answer == NO


# The situation


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "converged"),
        ({"changes": {"ctc": interval(0.0), "transducer": interval(-0.3)}}, "falling"),
        ({"changes": {"ctc": interval(-0.04, 0.01)}}, "falling"),  # little, but sure
        ({"changes": {"ctc": interval(-0.04, 0.2)}}, "converged"),
        ({"changes": {}, "last": 0}, "falling"),
        ({"sliced": True}, "slices"),
        ({"sliced": None}, "converged"),
        ({"sliced": True, "transcribed": 1.0, "untranscribed": 0.5}, "untranscribed"),
        ({"transcribed": 1.0, "untranscribed": 0.05}, "converged"),
        ({"untranscribed": 0.05}, "untranscribed"),
    ],
)
def test_the_situation(changes, expected):
    measures = made(**changes)
    assert situation_of(measures) == expected
    assert decide(measures).situation == expected


def test_what_has_not_converged_is_said():
    falling = made(changes={"ctc": interval(-0.3)})
    text = " ".join(decide(falling).sentences)
    assert "still falling: -26 % (-30 to -22) in the last epoch" in text
    assert "has not converged" in text
    assert "has not converged" not in " ".join(decide(made()).sentences)
    alone = " ".join(decide(made(changes={}, last=0)).sentences)
    assert "whether still falling isn't known of one epoch" in alone


def test_untranscribed_hours_and_a_teacher_that_doubts_are_said():
    text = " ".join(decide(made(transcribed=2.0, untranscribed=1.0)).sentences)
    assert "0.5 times as much speech without transcripts" in text
    doubted = decide(made(worse=0.6))
    assert "On 60 % of the cuts the teacher" in " ".join(doubted.sentences)
    assert doubted.lines[-1] == "condition: better"
    assert "condition: better" not in decide(made(worse=0.3)).lines


# Terms


def test_the_lines_are_those_of_the_recipe_s_file():
    text = (ROOT / "egs/digits/ASR/conf/kd.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert decide(made()).lines == lines


def test_the_lines_are_options_of_training():
    import argparse

    from icefall_kd.training.options import add_options

    parser = argparse.ArgumentParser()
    words = []
    for line in decide(made(worse=0.6)).lines:
        name, value = line.split(": ")
        words += [f"--kd-{name}", value]
    add_options(parser, words)
    params = parser.parse_args(words)
    assert params.kd_condition == "better"


def test_a_head_that_one_of_both_lacks_has_no_term():
    verdict = decide(made((8.0,), (16.0,)))
    assert verdict.lines == [*MIX["ctc"], *MIX["hidden"], *MIX[""]]
    without = replace(made(), teacher=model(8.0))
    assert (
        "rnnt-weight: 1.0"
        not in decide(replace(without, gaps={"ctc": interval(0.7)})).lines
    )


# Numbers


def test_the_range_has_the_model_s_spread_and_the_gap_s_interval():
    sure = expected_ratio(Interval(0.5, 0.5, 0.5), "slices")
    unsure = expected_ratio(Interval(0.5, 0.1, 0.9), "slices")
    s = SITUATIONS["slices"]
    middle = s.cost - s.slope * 0.5
    assert math.log(sure.value) == pytest.approx(middle)
    assert math.log(sure.high) == pytest.approx(middle + 2 * s.spread)
    assert math.log(unsure.low) == pytest.approx(
        middle - 2 * math.sqrt(s.spread**2 + (s.slope * 0.2) ** 2)
    )


def test_a_gap_larger_than_any_measured_counts_as_the_largest():
    largest = expected_ratio(Interval(MOST_GAP, MOST_GAP, MOST_GAP), "falling")
    assert expected_ratio(Interval(3.0, 2.0, 4.0), "falling") == largest
    text = " ".join(decide(made((1.0, 10.0), (20.0, 20.0))).sentences)
    assert "more than 5.1 times its teacher's was not among" in text
    assert "more than" not in " ".join(decide(made()).sentences)


def test_a_converged_student_far_from_its_teacher_is_a_guess():
    assert "its range is a guess" in " ".join(decide(made()).sentences)
    near = made(student=(9.5, 12.0))
    assert "its range is a guess" not in " ".join(decide(near).sentences)


def test_where_the_student_differs_is_said():
    def terms(entropy):
        blanks = TermMeasures("ctc", BLANKS, 900.0, 0.1, 0.1, 0.0, 0.01)
        spikes = TermMeasures("ctc", SPIKES, 100.0, 2.1, 1.05, 1.05, entropy)
        return (blanks, spikes, TermMeasures("rnnt", SPIKES, 5.0, 9.0, 8.0, 1.0, 0.0))

    text = " ".join(decide(made(terms=terms(0.3))).sentences)
    assert "70 % of the CTC divergence is at the 10 % of frames where" in text
    assert "a token, 50 % of that about blank or not." in text
    sure = " ".join(decide(made(terms=terms(0.04))).sentences)
    assert "so sure (0.040 nats of entropy)" in sure


def test_words_that_are_needed_grow_with_the_square_of_the_interval():
    gap = Interval(0.0, -0.2, 0.2)
    half = math.sinh(0.2)
    assert half_width(gap) == pytest.approx(half)
    assert words_needed(gap, half / 2, 1000) in (4000, 4100)  # by rounding
    assert words_needed(gap, half, 1234) == 1300  # rounded up
    assert words_needed(gap, 0.0, 1000) == 10**9


def test_too_few_words_for_a_difference_are_refused_with_how_many_are_needed():
    measures = made(half=0.3)
    half = 0.5 * math.sinh(0.3)  # of the student's WER, twice the teacher's
    words = 1200 * (half / 0.05) ** 2
    with pytest.raises(KDError) as e:
        check_words(measures, 5)
    assert str(e.value).startswith(
        "the 1,200 words of `cuts` show a difference between teacher and student in "
        f"CTC from {100 * half:.3g} % on, and `difference` is 5 %: give about "
        f"{math.ceil(words / 1000)},000 words"
    )
    check_words(measures, 16)
    check_words(made(half=0.05), 5)


def test_measures_survive_json():
    terms = (TermMeasures("ctc", "x", 3.0, 0.5, 0.25, 0.25, 0.1),)
    measures = made(terms=terms, start=model(97.0))
    text = json.dumps(measures.as_dict())
    assert measures_of(json.loads(text)) == measures
    assert decide(measures_of(json.loads(text))) == decide(measures)

"""labels/filters.py: what each filter drops, and what is equal to its threshold."""

import random

import pytest

from icefall_kd.errors import KDError
from icefall_kd.labels import filters
from icefall_kd.labels.filters import Case, longest_loop
from icefall_kd.tokens import load_tokenizer

pytest.importorskip("kaldialign")


def case(text, **more):
    more.setdefault("seconds", 2.0)
    for name in ("reference", "ctc_words", "other_words"):
        if name in more:
            more[name] = more[name].split()
    return Case("c1", text, text.split(), **more)


@pytest.mark.parametrize("threshold, kept", [(49.9, False), (50, False), (50.1, True)])
def test_an_error_rate_that_equals_the_threshold_is_dropped(threshold, kept):
    judge = filters.error_rate_below(threshold, "WER").why_not
    assert bool(judge(case("a x", reference="a b"))) != kept


def test_without_an_original_text_no_error_rate_drops_anything():
    judge = filters.error_rate_below(1, "WER").why_not
    assert judge(case("a")) == "" and judge(case("a", reference="")) == ""
    assert judge(case("a x b c", reference="a b")) == "WER 100.0 %"


@pytest.mark.parametrize("field", ["ctc_words", "other_words"])
def test_a_difference_is_a_share_of_the_longer_text(field):
    judge = filters.differs_below(33.4, "heads", field).why_not
    assert judge(case("a b c", **{field: "a b"})) == ""
    assert judge(case("a b", **{field: "a b c"})) == ""
    assert judge(case("a b", **{field: "c"})).startswith("100.0 %")
    assert judge(case("a", **{field: ""})).startswith("100.0 %")


def test_a_label_without_the_ctc_heads_words_is_refused():
    with pytest.raises(KDError, match="cut c1 has no `ctc_text`"):
        filters.differs_below(5, "heads", "ctc_words").why_not(case("a"))


def test_the_heads_or_the_first_score_counts_unless_another_is_named():
    scores, one_head = {"token": -0.1, "heads": -0.9}, {"token": -0.1, "frame": -0.9}
    for measure, least, kept, found in (
        ("", -0.9, True, scores),
        ("", -0.89, False, scores),
        ("token", -0.1, True, scores),
        ("", -0.1, True, one_head),
        ("", -0.09, False, one_head),
        ("frame", -0.9, True, one_head),
    ):
        judge = filters.score_at_least(least, measure).why_not
        assert (judge(case("a", scores=found)) == "") == kept
    with pytest.raises(KDError, match="has no score 'path', and its teacher gave tok"):
        filters.score_at_least(-1, "path").why_not(case("a", scores=scores))


@pytest.mark.parametrize(
    "unit, rate", [("words", 1.5), ("characters", 3.5)]  # of 3 words in 2 s
)
def test_both_bounds_of_a_rate_are_kept(unit, rate):
    for bounds, kept in (
        ((rate, rate), True),
        ((0, rate - 0.01), False),
        ((rate + 0.01, 9), False),
    ):
        judge = filters.rate_within(bounds, unit).why_not
        assert (judge(case("ab cd efg")) == "") == kept


def naive_loop(words):
    """Every start, every length, one repeat after the other."""
    best = 0
    for start in range(len(words)):
        for period in range(1, len(words) - start + 1):
            part, count = words[start : start + period], 1
            while words[start + count * period :][:period] == part:
                count += 1
            best = max(best, count)
    return best


def test_loops_are_those_that_the_naive_search_finds():
    draw = random.Random(3)
    for _ in range(300):
        words = draw.choices("ab", k=draw.randrange(13))
        count, loop = longest_loop(words)
        assert count == naive_loop(words), words
        assert " ".join(loop * count) in " ".join(words)


def test_a_hallucination_is_dropped_and_a_word_said_twice_is_not():
    judge = filters.repeats_at_most(3).why_not
    assert judge(case("seven seven seven")) == ""
    assert judge(case("oh nine two nine two nine two nine two")) == "4 times 'nine two'"


def test_other_characters_are_dropped_and_named():
    judge = filters.only_characters("a-z'").why_not
    assert judge(case("it's a")) == ""
    assert judge(case("It's 4 a")) == "the characters '4 I'"


@pytest.mark.parametrize("allowed", ["a]", "z-a", "a][b"])
def test_what_is_no_set_of_characters_is_refused(allowed):
    with pytest.raises(KDError, match="`characters` is"):
        filters.only_characters(allowed)


def test_what_tokens_can_not_write_or_frames_not_hold_is_dropped(bpe_models):
    sp = load_tokenizer(bpe_models.ab)
    judge = filters.has_tokens(sp).why_not
    count = len(sp.encode("ab ba"))
    assert judge(case("ab ba", frames=count)) == ""
    assert judge(case("ab ba", frames=count - 1)).startswith(f"{count} tokens in")
    assert judge(case("ab β", frames=50)) == "no tokens for 'β'"

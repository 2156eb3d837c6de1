"""Intervals and p values: against naive loops, exact cases and known rates."""

import math

import numpy as np
import pytest

from icefall_kd.report.bootstrap import DRAWS, Bootstrap, sums_by_group


def utterances(n=200, rate=0.1, seed=0, least=1):
    """Errors and words of n utterances, (n, 1) both."""
    rng = np.random.default_rng(seed)
    words = rng.integers(least, 12, (n, 1))
    return rng.binomial(words, rate), words


def naive_rates(errors, words, draws, seed=1):
    """The rates of resampled sets, utterance by utterance."""
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(draws):
        wrong = total = 0
        for _ in range(len(errors)):
            i = rng.integers(len(errors))
            wrong, total = wrong + errors[i], total + words[i]
        rates.append(100 * wrong / total)
    return np.array(rates)


def test_an_interval_is_that_of_a_naive_loop():
    errors, words = utterances(60)
    rates = naive_rates(errors[:, 0], words[:, 0], 4000)
    found = Bootstrap(errors, words).interval(0)
    low, high = np.quantile(rates, [0.025, 0.975])
    # The standard error of such a quantile of 4000 draws is 0.04 of the deviation.
    assert found.low == pytest.approx(low, abs=0.15 * rates.std())
    assert found.high == pytest.approx(high, abs=0.15 * rates.std())


def test_the_half_width_is_kaldis_196_deviations():
    """compute-wer-bootci prints mean and 1.96 deviations of the draws."""
    found = Bootstrap(*utterances(500))
    half = 1.96 * found.draws.std()
    assert found.interval(0).half_width == pytest.approx(half, rel=0.05)
    assert found.draws.mean() == pytest.approx(found.rates[0], rel=0.01)


def test_kaldialigns_interval_of_the_same_texts_is_the_same():
    kaldialign = pytest.importorskip("kaldialign")
    errors, words = utterances(150)
    texts = [["x"] * n[0] for n in words]
    results = [["y"] * e[0] + ["x"] * (n[0] - e[0]) for e, n in zip(errors, words)]
    theirs = kaldialign.bootstrap_wer_ci(texts, results)
    found = Bootstrap(errors, words).interval(0)
    assert found.half_width == pytest.approx(100 * theirs["ci95"], rel=0.06)


def test_a_single_utterance_has_an_interval_of_no_width():
    found = Bootstrap(np.array([[1]]), np.array([[4]])).interval(0)
    assert (found.low, found.high, found.half_width) == (25, 25, 0)


def test_without_errors_the_interval_is_zero():
    found = Bootstrap(np.zeros((9, 1)), np.ones((9, 1))).interval(0)
    assert (found.low, found.high) == (0, 0)


def test_draws_are_the_same_every_time():
    one, other = (Bootstrap(*utterances()) for _ in range(2))
    assert np.array_equal(one.draws, other.draws)


@pytest.mark.parametrize("n", [3, 50, 3000])
def test_each_draw_has_as_many_utterances_as_the_set(n):
    """Also where the draws are made in several parts."""
    found = Bootstrap(np.arange(n)[:, None] % 2, np.ones((n, 1)), draws=2000)
    counts = found.draws[:, 0] * n / 100
    assert len(counts) == 2000
    assert counts == pytest.approx(np.round(counts))
    rate = (n // 2) / n
    assert counts.mean() / n == pytest.approx(rate, abs=4 * math.sqrt(0.25 / n / 2000))


def test_draws_that_have_only_empty_references_are_left_out():
    errors, words = np.array([[0], [1]]), np.array([[0], [4]])
    found = Bootstrap(errors, words)
    assert 0.7 * DRAWS < len(found.draws) < 0.8 * DRAWS  # 3 of 4
    assert set(found.draws[:, 0]) == {25.0}


def test_equal_models_have_ratio_1_and_p_1():
    errors, words = utterances()
    found = Bootstrap(errors.repeat(2, 1), words.repeat(2, 1)).difference(0, 1)
    assert (found.points, found.ratio, found.p, found.improvement) == (0, 1, 1, 0)
    assert found.interval.half_width == found.ratio_interval.half_width == 0


def test_a_model_that_is_better_on_every_utterance_has_the_least_p():
    errors, words = utterances()
    found = Bootstrap(np.hstack([errors, errors + 1]), words.repeat(2, 1))
    better, worse = found.difference(0, 1), found.difference(1, 0)
    assert better.p == worse.p == 2 / (DRAWS + 1)
    assert (better.improvement, worse.improvement) == (1, 0)
    assert better.interval.high < 0 < worse.interval.low
    assert better.ratio_interval.high < 1
    assert better.points == -worse.points


def test_a_difference_is_that_of_a_naive_loop():
    rng = np.random.default_rng(3)
    errors, words = utterances(80, 0.2)
    other = np.clip(errors + rng.integers(-1, 2, errors.shape), 0, None)
    points, ratios = [], []
    for _ in range(4000):
        chosen = rng.integers(0, 80, 80)
        rates = [100 * x[chosen].sum() / words[chosen].sum() for x in (errors, other)]
        points.append(rates[0] - rates[1])
        ratios.append(rates[0] / rates[1])
    found = Bootstrap(np.hstack([errors, other]), words.repeat(2, 1)).difference(0, 1)
    for values, interval in (
        (points, found.interval),
        (ratios, found.ratio_interval),
    ):
        ends = np.quantile(values, [0.025, 0.975])
        assert [interval.low, interval.high] == pytest.approx(
            ends, abs=0.15 * np.std(values)
        )
    share = np.mean(np.array(points) < 0)
    assert found.improvement == pytest.approx(share, abs=0.04)
    assert found.p == pytest.approx(2 * min(share, 1 - share), abs=0.1)


def test_where_the_baseline_has_no_errors_there_is_no_ratio():
    words = np.full((5, 2), 4)
    found = Bootstrap(np.array([[1, 0]] * 5), words).difference(0, 1)
    assert math.isnan(found.ratio) and math.isnan(found.ratio_interval.low)
    assert found.points == 25


def test_draws_without_errors_of_the_baseline_have_an_endless_ratio():
    errors = np.array([[1, 0], [1, 0], [1, 0], [1, 1]])
    found = Bootstrap(errors, np.full((4, 2), 4)).difference(0, 1)
    assert found.ratio == 4 and found.ratio_interval.high == math.inf


def test_the_order_of_seeds_does_not_matter():
    seeds = [utterances(97, seed=i)[0] for i in range(3)]
    words = utterances(97)[1] * 3
    one = Bootstrap(seeds[0] + seeds[1] + seeds[2], words)
    other = Bootstrap(seeds[2] + seeds[0] + seeds[1], words)
    assert np.array_equal(one.draws, other.draws)


def test_the_rate_of_a_draw_is_the_mean_over_seeds():
    seeds = [utterances(30, seed=i)[0] for i in range(3)]
    words = utterances(30)[1]
    apart = Bootstrap(np.hstack(seeds), words.repeat(3, 1))
    pooled = Bootstrap(sum(seeds), 3 * words)
    assert pooled.draws[:, 0] == pytest.approx(apart.draws.mean(axis=1))


def test_the_interval_covers_a_known_rate_in_95_of_100_sets():
    covered = 0
    for seed in range(400):
        errors, words = utterances(150, 0.1, seed, least=4)
        found = Bootstrap(errors, words, draws=1000).interval(0)
        covered += found.low <= 10 <= found.high
    # 0.95 less four standard errors, and less what 150 utterances cost.
    assert 0.895 < covered / 400 < 0.985


def test_a_p_below_005_of_equal_models_is_one_in_twenty():
    rng = np.random.default_rng(0)
    low = 0
    for _ in range(400):
        words = rng.integers(4, 12, (150, 1)).repeat(2, 1)
        errors = rng.binomial(words, 0.1)
        low += Bootstrap(errors, words, draws=1000).difference(0, 1).p < 0.05
    assert 0.01 < low / 400 < 0.10


def test_sums_by_group_are_those_of_each_speaker():
    values = np.array([[1, 10], [2, 20], [4, 40]])
    sums = sums_by_group(values, np.array(["b", "a", "b"]))
    assert sums.tolist() == [[2, 20], [5, 50]]


def test_speakers_that_differ_give_a_wider_interval_than_their_utterances():
    rng = np.random.default_rng(0)
    speakers = np.arange(12).repeat(40)
    words = np.full((480, 1), 10)
    errors = rng.binomial(10, np.linspace(0.02, 0.3, 12)[speakers])[:, None]
    alone = Bootstrap(errors, words).interval(0)
    sums = [sums_by_group(values, speakers) for values in (errors, words)]
    assert Bootstrap(*sums).interval(0).half_width > 3 * alone.half_width

"""Confidence intervals of error rates, and of their differences, by the bootstrap.

Utterances are resampled with replacement (Bisani and Ney, 2004, "Bootstrap estimates
for confidence intervals in ASR performance evaluation"; Kaldi's compute-wer-bootci).
Where a model has several seeds, its errors and words are sums over them: all seeds and
models share each draw, and the rate of a draw is the mean over seeds. Where utterances
depend on each other, as those of a speaker do, the units are speakers (Liu and Peng,
2020, "Statistical testing on ASR performance via blockwise bootstrap").
"""

import math
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
_SEED = 0
_COUNTS_AT_ONCE = 4_000_000  # 32 MB of float64


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Args:
      low: Its lower end.
      high: Its upper end.
    """

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of its width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference:
    """How the error rate of a model differs from that of a baseline.

    Args:
      points: The difference in percentage points, below 0 where the model is better.
      interval: The interval of the difference.
      ratio: The model's rate by the baseline's; NaN where the baseline has no errors.
      ratio_interval: The interval of the ratio.
      p: The two-sided p of "there is no difference".
      improvement: The share of draws in which the model is better, which Kaldi calls
        the probability of improvement.
    """

    points: float
    interval: Interval
    ratio: float
    ratio_interval: Interval
    p: float
    improvement: float


class Bootstrap:
    """Error rates of models on the same utterances, and in resampled sets of them.

    Args:
      errors: The errors of each unit and model, (N, M).
      words: Its reference words, (N, M). All models have the same utterances, so the
        columns are equal, or multiples where models have different numbers of seeds.
      draws: How often the N units are drawn.
    """

    def __init__(
        self, errors: np.ndarray, words: np.ndarray, draws: int = DRAWS
    ) -> None:
        models = errors.shape[1]
        sums = _resampled_sums(np.concatenate([errors, words], axis=1), draws)
        with_words = (sums[:, models:] > 0).all(axis=1)  # not only empty references
        sums = sums[with_words]
        self.rates = 100 * errors.sum(axis=0) / words.sum(axis=0)  # (M,)
        self.draws = 100 * sums[:, :models] / sums[:, models:]  # (draws, M)

    def interval(self, model: int) -> Interval:
        """The interval of a model's error rate in percent.

        Args:
          model: Its column.
        """
        return _percentiles(self.draws[:, model])

    def difference(self, model: int, baseline: int) -> Difference:
        """How a model differs from a baseline on the same draws.

        Args:
          model: Its column.
          baseline: The column of the baseline.
        """
        ours, base = self.draws[:, model], self.draws[:, baseline]
        points = ours - base
        # Counted with the observed set, as Davison and Hinkley do: p is never 0.
        tails = [1 + np.count_nonzero(tail) for tail in (points <= 0, points >= 0)]
        rate, base_rate = self.rates[model], self.rates[baseline]
        ratio, ratio_interval = math.nan, Interval(math.nan, math.nan)
        if base_rate > 0:
            ratio = float(rate / base_rate)
            ratio_interval = _percentiles(_ratios(ours, base))
        return Difference(
            points=float(rate - base_rate),
            interval=_percentiles(points),
            ratio=ratio,
            ratio_interval=ratio_interval,
            p=float(min(1.0, 2 * min(tails) / (len(points) + 1))),
            improvement=float(np.mean(points < 0)),
        )


def sums_by_group(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The sums of ``values`` in each group, (G, M), in the order of the groups.

    Args:
      values: Values of each utterance, (N, M).
      groups: The group of each utterance, such as its speaker, (N,).
    """
    _, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((index.max() + 1, values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def _resampled_sums(values: np.ndarray, draws: int) -> np.ndarray:
    """The sums of N units that are drawn from ``values``, (N, C), as (draws, C)."""
    rng = np.random.default_rng(_SEED)
    n = len(values)
    rows = max(1, min(draws, _COUNTS_AT_ONCE // n))
    sums = []
    for first in range(0, draws, rows):
        size = min(rows, draws - first)
        chosen = rng.integers(0, n, (size, n))
        chosen += n * np.arange(size)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n)
        sums.append(counts.astype(float) @ values.astype(float))
    return np.concatenate(sums)


def _percentiles(values: np.ndarray) -> Interval:
    """The ends of the middle :data:`LEVEL` of ``values``, of which some may be inf."""
    ordered = np.sort(values)
    outside = int(len(ordered) * (1 - LEVEL) / 2 + 1e-9)
    return Interval(float(ordered[outside]), float(ordered[-1 - outside]))


def _ratios(ours: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Ratios of rates: 1 where both are 0, and inf where only ``base`` is."""
    ratios = np.full(len(ours), np.inf)
    np.divide(ours, base, out=ratios, where=base > 0)
    ratios[(base == 0) & (ours == 0)] = 1.0
    return ratios

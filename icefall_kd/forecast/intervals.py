"""Intervals of WERs and of their ratios, by the bootstrap of the report."""

import math
from typing import Sequence

import numpy as np

from icefall_kd.forecast.measures import Interval
from icefall_kd.report.bootstrap import Bootstrap

DRAWS = 2000  # enough for two digits of an interval
HALF = 0.5  # of an error, which a count of 0 has too, so that it has a logarithm


def _columns(*counts: Sequence[int]) -> np.ndarray:
    """(N, M)."""
    return np.stack([np.asarray(x) for x in counts], axis=1)


def rate(errors: Sequence[int], words: Sequence[int]) -> Interval:
    """Return a WER in percent with its interval.

    Args:
      errors: The number of errors of each utterance.
      words: The number of words in each transcript.
    """
    samples = Bootstrap(_columns(errors), _columns(words), DRAWS)
    interval = samples.interval(0)
    return Interval(float(samples.rates[0]), interval.low, interval.high)


def log_ratio(
    errors: Sequence[int], others: Sequence[int], words: Sequence[int]
) -> Interval:
    """Return log(WER / another WER) with its interval, both on the same utterances.

    Each draw has the same utterances of both, so what is hard for both cancels.

    Args:
      errors: The number of errors of each utterance.
      others: The number of errors of the other model.
      words: The number of words in each transcript.
    """
    samples = Bootstrap(_columns(errors, others), _columns(words, words), DRAWS)
    draws = samples.draws
    half = 100 * HALF / sum(words)
    logs = np.log((draws[:, 0] + half) / (draws[:, 1] + half))
    value = math.log((sum(errors) + HALF) / (sum(others) + HALF))
    low, high = np.percentile(logs, (2.5, 97.5))
    return Interval(value, float(low), float(high))

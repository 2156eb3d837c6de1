"""What distillation is expected to give, by the gap between teacher and student.

With g = log(WER of the student without distillation / WER of the teacher), the gap, the
WER ratio r of the student with distillation to that without is expected to be

    log r = cost - slope min(g, MOST_GAP),

and to lie within two standard deviations of that. ``slope`` is the share of the gap, in
logarithms, that distillation closes. ``cost`` is what it takes from a student that
needs no teacher.
"""

import math
from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple

from icefall_kd.forecast.measures import Interval

Point = Tuple[float, float]  # a gap g, and the log r that training gave


@dataclass(frozen=True)
class Situation:
    """The model's numbers for one kind of training.

    Args:
      slope: Of the gap.
      cost: Added to log r.
      spread: The standard deviation of log r about the model.
      points: How many pairs of a run and a head they were fitted to.
    """

    slope: float
    cost: float
    spread: float
    points: int


# Fitted by `benchmarks/forecast.py` to the tables in egs/digits/ASR/RESULTS.md, that
# is to benchmarks/forecast_digits.json: 16 trainings of one corpus, with students of
# one size. None was trained to the end with a gap above 0.22, so for converged students
# with a larger gap the numbers are an extrapolation.
SITUATIONS: Dict[str, Situation] = {
    "falling": Situation(0.62, 0.0, 0.22, 6),
    "converged": Situation(0.45, 0.0, 0.11, 6),
    "slices": Situation(0.40, 0.09, 0.10, 14),
    "untranscribed": Situation(0.41, 0.0, 0.10, 6),
}
# The largest gaps that they were fitted to, of converged students and of all.
MOST_CONVERGED, MOST_GAP = 0.22, 1.62
# Runs of the same corpus and size differ less than those of others will.
LEAST_SPREAD = 0.1
# The gaps of other situations are too far from 0 to tell a cost from the slope.
WITH_COST = ("slices",)
# More untranscribed speech than this, by hours of transcribed, makes a situation of its
# own; in the runs above it was 1.
LEAST_UNTRANSCRIBED = 0.1
# Lower WERs in the last epochs than in those before, in logarithms: still falling.
STEADY = -0.05


def expected_ratio(gap: Interval, situation: str) -> Interval:
    """Return the expected r, with the interval of the model and of the gap.

    Args:
      gap: g, with its own interval.
      situation: One of SITUATIONS.
    """
    numbers = SITUATIONS[situation]
    middle = numbers.cost - numbers.slope * min(gap.value, MOST_GAP)
    low, high = (min(g, MOST_GAP) for g in (gap.low, gap.high))
    of_gap = numbers.slope * (high - low) / 4  # a standard deviation
    width = 2 * math.hypot(numbers.spread, of_gap)
    return Interval(*(math.exp(middle + x) for x in (0.0, -width, width)))


def fit(points: Sequence[Point], with_cost: bool) -> Optional[Situation]:
    """Fit the numbers of a situation by least squares.

    The slope is kept within 0 and 1, and the cost at 0 or above.

    Args:
      points: Gaps, and what training gave.
      with_cost: Whether there is a cost; else it is 0.

    Returns:
      The numbers; None for fewer than three points.
    """
    n = len(points)
    if n < 3:
        return None
    mean_gap = sum(g for g, _ in points) / n if with_cost else 0.0
    mean_ratio = sum(y for _, y in points) / n if with_cost else 0.0
    square = sum((g - mean_gap) ** 2 for g, _ in points)
    product = sum((g - mean_gap) * (y - mean_ratio) for g, y in points)
    slope = min(1.0, max(0.0, -product / square)) if square else 0.0
    cost = max(0.0, mean_ratio + slope * mean_gap)
    squares = sum((y - cost + slope * g) ** 2 for g, y in points)
    spread = math.sqrt(squares / (n - 1 - with_cost))
    return Situation(slope, cost, max(LEAST_SPREAD, spread), n)

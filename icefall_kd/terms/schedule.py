"""Weights that change while the student trains, and the share of distillation.

============  ===================================================================
``scratch``   the loss is all distillation from the first batch on
``warmup``    the recipe's own loss alone for 15 % of the epochs, then a rise of
              distillation to its whole share in 5 % of them
``finetune``  a rise of distillation in the first 5 % of the epochs, for a student
              that has converged
============  ===================================================================

Each may end in epochs without distillation.
"""

import math
from dataclasses import dataclass
from typing import Tuple, Union

from icefall_kd.errors import KDError, require

# Where distillation begins and where its share is 1, as a share of all epochs.
SCHEDULES = {"scratch": (0.0, 0.0), "warmup": (0.15, 0.2), "finetune": (0.0, 0.05)}
BY_EPOCH = (
    "It is a number, or numbers by epoch: 0:0.8,10:0.5 falls from 0.8 to 0.5 in the "
    "first ten epochs."
)


@dataclass(frozen=True)
class Curve:
    """A weight by epoch: linear between its points, constant outside them.

    Args:
      points: Pairs of the epochs from the start and the weight there.
    """

    points: Tuple[Tuple[float, float], ...]

    @staticmethod
    def parse(value: "Weight", parameter: str) -> "Curve":
        """Parse a weight.

        Args:
          value: A number, a curve, or a text: "0.8" is constant, and "0:0.8,10:0.5"
            falls from 0.8 to 0.5 in ten epochs.
          parameter: How an error names the weight.

        Raises:
          KDError: weights that are not finite and 0 or more, or epochs that don't rise.
        """
        refusal = KDError(
            f"{parameter} is {value!r}, and must be a finite number from 0 on, or such "
            "numbers by epoch, as in 0:0.8,10:0.5"
        )
        parts = str(value).split(",")
        points = []
        try:
            for part in parts:
                epoch, colon, weight = part.rpartition(":")
                points.append((float(epoch) if colon else 0.0, float(weight)))
        except ValueError:
            raise refusal from None
        epochs = [epoch for epoch, _ in points]
        if len(points) > 1 and ":" not in parts[0]:
            raise refusal
        if epochs != sorted(set(epochs)):
            raise refusal
        if not all(math.isfinite(x) and x >= 0 for point in points for x in point):
            raise refusal
        return Curve(tuple(points))

    def __call__(self, epoch: float) -> float:
        """Return the weight.

        Args:
          epoch: How many epochs are done, with a fraction.
        """
        last_epoch, last_weight = self.points[0]
        for next_epoch, next_weight in self.points:
            if epoch < next_epoch:
                share = (epoch - last_epoch) / (next_epoch - last_epoch or 1.0)
                return last_weight + max(0.0, share) * (next_weight - last_weight)
            last_epoch, last_weight = next_epoch, next_weight
        return last_weight

    @property
    def highest(self) -> float:
        """The largest weight of all epochs."""
        return max(weight for _, weight in self.points)

    def __str__(self) -> str:
        if len(self.points) == 1:
            return str(self.points[0][1])
        return ",".join(f"{epoch:g}:{weight:g}" for epoch, weight in self.points)


Weight = Union[float, str, Curve]


@dataclass(frozen=True)
class Schedule:
    """The share of distillation in the loss by epoch, from 0 to 1.

    With the share a, L = (1 - a) L_recipe + a L_kd, where L_kd is the joint loss with
    all its weights: where a is 0 the student trains as its recipe trains it.

    Args:
      schedule: One of ``SCHEDULES``.
      num_epochs: How many epochs the training has.
      last_epochs: How many of the last epochs go without distillation.

    Raises:
      KDError: another schedule, or more last epochs than the training has.
    """

    schedule: str = "scratch"
    num_epochs: float = math.inf
    last_epochs: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.schedule in SCHEDULES,
            f"`schedule` is {self.schedule!r}: give one of {', '.join(SCHEDULES)}",
        )
        require(
            0 <= self.last_epochs < self.num_epochs,
            f"`last_epochs` is {self.last_epochs} of {self.num_epochs} epochs: give 0 "
            "or more, and fewer than the training has",
        )
        require(
            self.is_constant or math.isfinite(self.num_epochs),
            f"`schedule` is {self.schedule} with `last_epochs` {self.last_epochs:g}, "
            "which needs the number of epochs, and the recipe has no --num-epochs: "
            "give `schedule` scratch and `last_epochs` 0",
        )

    @property
    def is_constant(self) -> bool:
        """Whether the share is 1 in all epochs."""
        return self.schedule == "scratch" and not self.last_epochs

    def __call__(self, epoch: float) -> float:
        """Return the share.

        Args:
          epoch: How many epochs are done, with a fraction.
        """
        if self.is_constant:
            return 1.0
        if epoch >= self.num_epochs - self.last_epochs and self.last_epochs:
            return 0.0
        begin, end = (x * self.num_epochs for x in SCHEDULES[self.schedule])
        if epoch < begin:
            return 0.0
        return min(1.0, (epoch - begin) / (end - begin)) if end > begin else 1.0

    def __str__(self) -> str:
        text = self.schedule
        if self.last_epochs:
            text += f", the last {self.last_epochs:g} epochs without distillation"
        return text

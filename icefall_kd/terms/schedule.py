"""Weights that change while the student trains.

===========  ====================================================================
``scratch``  distillation from the first batch on
``warmup``   15 % of the epochs on hard labels alone, 5 % to raise distillation
``finetune`` 5 % of the epochs to raise it, for a student that has converged
===========  ====================================================================

Each may end in epochs without distillation.
"""

import math
from dataclasses import dataclass
from typing import Any, Tuple

from icefall_kd.errors import KDError

# Where distillation begins and where it is whole, as a share of all epochs.
SCHEDULES = {"scratch": (0.0, 0.0), "warmup": (0.15, 0.2), "finetune": (0.0, 0.05)}


@dataclass(frozen=True)
class Curve:
    """A weight over the epochs: linear between its points, constant outside them.

    ``0.8`` is a constant; ``0:0.8,10:0.5`` falls from 0.8 to 0.5 in ten epochs.
    """

    points: Tuple[Tuple[float, float], ...]  # (epochs from the start, weight)

    @staticmethod
    def parse(value: Any, name: str) -> "Curve":
        """The curve that a number or a text names.

        Raises:
          KDError: weights that are not finite and 0 or more, or epochs that don't rise.
        """
        wrong = KDError(
            f"the KD {name} weight is {value!r}, and must be a finite number from 0 "
            "on, or such numbers by epoch, as in 0:0.8,10:0.5: mend "
            f"--kd-{name.replace('_', '-')}-weight"
        )
        points = []
        try:
            for part in str(value).split(","):
                at, colon, weight = part.rpartition(":")
                points.append((float(at) if colon else 0.0, float(weight)))
        except ValueError:
            raise wrong from None
        at = [x for x, _ in points]
        if len(points) > 1 and (":" not in str(value).split(",")[0]):
            raise wrong
        if at != sorted(set(at)) or not all(math.isfinite(x) and x >= 0 for x in at):
            raise wrong
        if not all(math.isfinite(w) and w >= 0 for _, w in points):
            raise wrong
        return Curve(tuple(points))

    def __call__(self, epoch: float) -> float:
        before = self.points[0]
        for after in self.points:
            if epoch < after[0]:
                share = (epoch - before[0]) / (after[0] - before[0] or 1.0)
                return before[1] + max(0.0, share) * (after[1] - before[1])
            before = after
        return before[1]

    @property
    def highest(self) -> float:
        return max(w for _, w in self.points)

    def __str__(self) -> str:
        if len(self.points) == 1:
            return str(self.points[0][1])
        return ",".join(f"{at:g}:{w:g}" for at, w in self.points)


@dataclass(frozen=True)
class Schedule:
    """How much of the loss is distillation, from 0 to 1.

    With a this share, L = (1 - a) L_recipe + a L_kd, L_kd the joint loss of all
    weights: where a is 0 the student trains as its recipe trains it.

    Args:
      name: One of ``SCHEDULES``.
      num_epochs: Of the whole training.
      last_epochs: The last ones, without distillation.

    Raises:
      KDError: another name, or more last epochs than there are.
    """

    name: str = "scratch"
    num_epochs: float = math.inf
    last_epochs: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise KDError(
                f"the KD schedule is {self.name!r}: give --kd-schedule one of "
                f"{', '.join(SCHEDULES)}"
            )
        if not 0 <= self.last_epochs < self.num_epochs:
            raise KDError(
                f"--kd-last-epochs is {self.last_epochs} of {self.num_epochs} epochs: "
                "give 0 or more, and fewer than there are"
            )
        if self.moves and not math.isfinite(self.num_epochs):
            raise KDError(
                f"the KD schedule {self.name} needs the number of epochs, and the "
                "recipe has no --num-epochs: give --kd-schedule scratch"
            )

    @property
    def moves(self) -> bool:
        return self.name != "scratch" or self.last_epochs > 0

    def __call__(self, epoch: float) -> float:
        """The share after so many epochs, a fraction among them."""
        if not self.moves:
            return 1.0
        if epoch >= self.num_epochs - self.last_epochs and self.last_epochs:
            return 0.0
        begin, whole = (x * self.num_epochs for x in SCHEDULES[self.name])
        if epoch < begin:
            return 0.0
        return min(1.0, (epoch - begin) / (whole - begin)) if whole > begin else 1.0

    def __str__(self) -> str:
        text = self.name
        if self.last_epochs:
            text += f", the last {self.last_epochs:g} epochs without distillation"
        return text

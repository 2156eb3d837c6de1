"""Batches whose distillation is not finite: they are left out, counted and logged."""

import logging
import math
from typing import Sequence

import torch

from icefall_kd.errors import KDError, NotFiniteError

PATIENCE = 20  # batches in a row


class NonFiniteBatches:
    """Counts the batches where a term could not be computed.

    Half precision overflows now and then. A recipe's GradScaler skips such a step when
    the recipe's own loss or its gradient is not finite, so distillation leaves its term
    out of the batch and lets the recipe decide.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0

    def count(self, errors: Sequence[NotFiniteError]) -> None:
        """Count a batch, and log a warning where it has errors.

        Args:
          errors: One for each term that is not finite; none for most batches.

        Raises:
          KDError: the batch is the last of PATIENCE such batches in a row, in this
            process; of several processes this one ends alone, and their launcher ends
            the others.
        """
        if not errors:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE:
            raise KDError(f"{self.in_a_row} batches in a row: {errors[0].sentence}")
        logging.warning(
            f"Distillation is left out of this batch ({self.total} so far were not "
            f"finite): {'; '.join(e.sentence for e in errors)}"
        )


def finite_number(value: torch.Tensor, name: str) -> float:
    """Return the number in a scalar.

    Args:
      value: The scalar, with its graph or without.
      name: What an error calls it.

    Raises:
      NotFiniteError: it is inf or NaN.
    """
    number = value.detach().cpu().item()
    if not math.isfinite(number):
        raise NotFiniteError(
            f"{name} is {number}: the student's outputs are not finite; lower the "
            "learning rate, or train in float32 to find where it begins"
        )
    return number

"""A student that trains as its int8 export will compute.

The recipe's train.py has no line for it: the layers round by themselves, and a hook of
the model looks at the clock when a batch enters.
"""

import logging
import math
from typing import Any, Dict

import torch

from icefall_kd.errors import require
from icefall_kd.rounding import SCALES, RoundedLinears
from icefall_kd.training.clock import EpochClock


class Int8Awareness:
    """Rounds the student's linear layers in training, by ``--kd-int8-from``.

    The passes without a gradient, such as those of validation, stay in float32: so
    their losses compare with those of other runs.

    Args:
      params: The recipe's params.
      model: The student, as the recipe trains it.
      clock: The session's clock.

    Attributes:
      first_epoch: How many epochs are done before it rounds.

    Raises:
      KDError: ``--kd-int8-from`` is no number of epochs, ``--kd-int8-scales`` is not
        known, or the model has no linear layer that an int8 export rounds.
    """

    def __init__(
        self, params: Dict[str, Any], model: torch.nn.Module, clock: EpochClock
    ) -> None:
        self.clock = clock
        self.first_epoch = _epochs(params["kd_int8_from"])
        self._rounds, scales = False, params["kd_int8_scales"]
        require(
            scales in SCALES,
            f"`int8_scales` is {scales!r}, and must be {' or '.join(SCALES)}",
        )
        model = getattr(model, "module", model)
        self._linears = RoundedLinears(
            model, lambda: self._rounds and torch.is_grad_enabled(), scales
        )
        require(
            self._linears.names,
            f"`int8_from` is {params['kd_int8_from']}, and {type(model).__name__} has "
            "no linear layer that an int8 export rounds: leave it out",
        )
        # A plain function: a deep copy of the model shares it.
        self._hook = model.register_forward_pre_hook(lambda *_: self._before_forward())

    @property
    def needs_fractions(self) -> bool:
        """Whether rounding is to begin within an epoch."""
        return bool(self.first_epoch % 1)

    def close(self) -> None:
        """Give the model its own forward passes back."""
        self._hook.remove()
        self._linears.close()

    def _before_forward(self) -> None:
        if self._rounds or not torch.is_grad_enabled():
            return
        done = self.clock.epochs_done() + self.clock.fraction()
        if done >= self.first_epoch:
            self._rounds = True
            logging.info(
                f"From {done:g} epochs on, {len(self._linears.names)} linear layers "
                "compute in training as in an int8 export"
            )


def _epochs(text: str) -> float:
    try:
        epochs = float(text)
    except ValueError:
        epochs = math.nan
    require(
        math.isfinite(epochs) and epochs >= 0,
        f"`int8_from` is {text!r}, and must be a number of epochs from 0 on, such as "
        "0 or 1.5: mend it, or leave it out to train in float32",
    )
    return epochs

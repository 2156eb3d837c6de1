"""Refusals that the losses share."""

import math
from typing import Optional

import torch

from icefall_kd.errors import KDError, NotFiniteError


def check_temperature(temperature: float) -> None:
    """Refuse a ``temperature`` that is no finite number above 0.

    Raises:
      KDError: It is none.
    """
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise KDError(
            f"`temperature` is {temperature!r}, and must be a finite number above 0: "
            "2.0 is a good start"
        )


def valid_frames(
    x: torch.Tensor, lengths: torch.Tensor, mask: Optional[torch.Tensor], name: str
) -> torch.Tensor:
    """Return which frames of a batch count.

    Args:
      x: (N, T, ...), on the device of the result.
      lengths: (N,), valid frames, 0 to T.
      mask: (N, T), bool: of the valid frames only these; None: all.
      name: What errors call ``x``, in the plural.

    Returns:
      (N, T), bool.

    Raises:
      KDError: Lengths or a mask that do not fit ``x``.
    """
    n, t = x.shape[:2]
    if lengths.shape != (n,) or (n and not 0 <= int(lengths.min())):
        raise KDError(
            f"lengths are {lengths.tolist()} and must be {n} numbers from 0 to {t}"
        )
    if n and int(lengths.max()) > t:
        raise KDError(
            f"lengths go up to {int(lengths.max())}, and the {name} have {t} frames"
        )
    valid = torch.arange(t, device=x.device) < lengths.to(x.device).unsqueeze(1)
    if mask is not None:
        if mask.shape != valid.shape:
            raise KDError(
                f"the mask has shape {tuple(mask.shape)} and must be {(n, t)}"
            )
        valid &= mask.to(x.device)
    return valid


def refuse_nan(x: torch.Tensor, name: str) -> None:
    """Refuse a student whose output has NaN.

    Args:
      x: The output, of any shape.
      name: What the error calls it, in the plural.

    Raises:
      NotFiniteError: It has NaN.
    """
    if torch.isnan(x).any():
        raise NotFiniteError(
            f"the student's {name} of shape {tuple(x.shape)} have NaN: lower the "
            "learning rate, or train in float32 to find where it begins"
        )

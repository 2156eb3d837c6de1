"""Numbers that torchrun sets for each of its processes, in the environment."""

import os
import re
from typing import Optional

from icefall_kd.cli.options import MOST_JOBS
from icefall_kd.errors import KDError


def number_of(name: str) -> Optional[int]:
    """The number that an environment variable holds, or None where it is not set.

    Args:
      name: Such as ``WORLD_SIZE``, ``RANK`` or ``LOCAL_RANK``.

    Raises:
      KDError: something else than a whole number from 0 to ``MOST_JOBS``.
    """
    text = os.environ.get(name)
    if text is None:
        return None
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    if not 0 <= number <= MOST_JOBS:
        raise KDError(
            f"the environment variable {name} is {text[:50]!r}, and torchrun sets it "
            f"to a number from 0 to {MOST_JOBS}: unset it, or run this under torchrun"
        )
    return number

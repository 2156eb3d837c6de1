"""Numbers that torchrun sets for each of its processes, and the job that they make."""

import os
import re
from typing import Optional, Tuple

from icefall_kd.cli.options import MOST_JOBS
from icefall_kd.errors import KDError, require


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


def job_of(num_jobs: int, job: int) -> Tuple[int, int]:
    """This process's job and the number of jobs, by the options or by torchrun.

    Args:
      num_jobs: The option --num-jobs.
      job: The option --job.

    Raises:
      KDError: a number of a job that there is not.
    """
    size = number_of("WORLD_SIZE") or 1
    if num_jobs == 1 and size > 1:
        rank = number_of("RANK")
        if rank is None or rank >= size:
            raise KDError(
                f"the environment has WORLD_SIZE {size} and RANK {rank}, and torchrun "
                f"sets RANK to 0 to {size - 1}: unset WORLD_SIZE, or run this under "
                "torchrun"
            )
        return rank, size
    require(
        0 <= job < num_jobs,
        f"--job is {job} and --num-jobs {num_jobs}: give --job 0 to {num_jobs - 1}",
    )
    return job, num_jobs

"""Memory: one sentence where it runs out, and a heap that doesn't grow."""

import ctypes
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from icefall_kd.errors import KDError

# Of a GPU, of torch on a CPU, of the system, and of the kernel that ends a process.
SIGNS = (
    "out of memory",
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
    "is killed by signal: Killed",
)
STATUS = Path("/proc/self/statm")
SYSTEM = Path("/proc/meminfo")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a device's or the system's memory is full."""
    if isinstance(error, MemoryError):
        return True
    # torch.cuda.OutOfMemoryError is a RuntimeError too; OSError is of a fork.
    return isinstance(error, (RuntimeError, OSError)) and any(
        sign in str(error) for sign in SIGNS
    )


def free_memory() -> float:
    """Bytes that new programs may have; infinite where the system doesn't say."""
    if SYSTEM.exists():
        for line in SYSTEM.read_text("ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return math.inf


@contextmanager
def enough_memory(work: str, remedy: str) -> Iterator[None]:
    """Refuse in one sentence what memory does not suffice for.

    Args:
      work: What needs the memory, with its size, as the sentence's subject.
      remedy: What the user can do.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as e:
        if not is_out_of_memory(e):
            raise
        raise KDError(f"memory ran out in {work}: {remedy}") from None


class Heap:
    """Gives what torch has freed back to the system, where it is glibc's to keep.

    Batches of all sizes fragment its heap: on a CPU the peak of a dump grew by a half
    from 400 cuts to 4000.

    Args:
      warm_up: Batches whose memory is taken for what a batch needs.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.batches, self.limit = warm_up, 0, 0
        try:
            self.trim = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError, TypeError):  # another C library, or Windows
            self.trim = None

    def after_batch(self) -> None:
        """Give freed memory back if the process holds more than its first batches."""
        if self.trim is None or not STATUS.exists():
            return
        self.batches += 1
        pages = int(STATUS.read_text("ascii").split()[1])
        if self.batches <= self.warm_up:
            self.limit = max(self.limit, pages)
        elif pages > 0.9 * self.limit:
            self.trim(0)

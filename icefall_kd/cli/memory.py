"""One sentence where memory runs out."""

from contextlib import contextmanager
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device's or the system's memory is full."""
    if isinstance(error, MemoryError):
        return True
    # torch.cuda.OutOfMemoryError is a RuntimeError too; OSError is of a fork.
    return isinstance(error, (RuntimeError, OSError)) and any(
        sign in str(error) for sign in SIGNS
    )


@contextmanager
def enough_memory(work: str, remedy: str) -> Iterator[None]:
    """Refuse in one sentence what memory does not suffice for.

    Args:
      work: What is done, with its size, as the sentence's subject.
      remedy: What the user can do.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as e:
        if not is_out_of_memory(e):
            raise
        raise KDError(f"memory ran out in {work}: {remedy}") from None

"""Where memory runs out, one sentence; every other error as it was."""

import pytest
import torch

from icefall_kd.cli.memory import enough_memory
from icefall_kd.errors import KDError

FULL = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
def test_full_memory_is_one_sentence(error):
    with pytest.raises(KDError) as e:
        with enough_memory("a pass over 3 cuts, 7.5 s", "give --max-duration less"):
            raise error
    assert e.value.sentence == (
        "memory ran out in a pass over 3 cuts, 7.5 s: give --max-duration less"
    )


def test_memory_that_really_runs_out():
    with pytest.raises(KDError, match="memory ran out in it: free some"):
        with enough_memory("it", "free some"):
            torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2"), OSError(28, "No space left"), KDError("refused")],
)
def test_other_errors_come_through(error):
    with pytest.raises(type(error)) as e:
        with enough_memory("it", "free some"):
            raise error
    assert e.value is error

"""Where memory runs out, one sentence; and freed memory goes back to the system."""

import pytest
import torch

from icefall_kd import memory
from icefall_kd.errors import KDError
from icefall_kd.memory import Heap, enough_memory

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


# The heap: freed memory goes back when a batch has left more than the first ones did


@pytest.fixture
def trims(tmp_path, monkeypatch):
    """Feed page counts, one a batch; learn after which memory was given back."""
    monkeypatch.setattr(memory, "STATUS", tmp_path / "statm")

    def run(pages):
        found, it = [], Heap(warm_up=3)
        it.trim = lambda pad: found.append(it.batches)
        for n in pages:
            memory.STATUS.write_text(f"99999 {n} 1 1 0 1 0\n")
            it.after_batch()
        return found

    return run


def test_the_first_batches_set_the_limit(trims):
    assert trims([50, 100, 70, 89, 91, 300, 40]) == [5, 6]


def test_a_system_without_the_file_or_the_function_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    it = Heap(warm_up=0)
    it.trim = lambda pad: pytest.fail("trimmed")
    it.after_batch()
    it.trim = None
    it.after_batch()
    assert it.batches == 0

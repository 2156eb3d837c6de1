"""Heap: freed memory goes back when a batch has left more than the first ones did."""

import pytest

from icefall_kd.cli import heap
from icefall_kd.cli.heap import Heap


@pytest.fixture
def trims(tmp_path, monkeypatch):
    """Feed page counts, one a batch; learn after which memory was given back."""
    monkeypatch.setattr(heap, "STATUS", tmp_path / "statm")

    def run(pages):
        found, it = [], Heap(warm_up=3)
        it.trim = lambda pad: found.append(it.batches)
        for n in pages:
            heap.STATUS.write_text(f"99999 {n} 1 1 0 1 0\n")
            it.after_batch()
        return found

    return run


def test_the_first_batches_set_the_limit(trims):
    assert trims([50, 100, 70, 89, 91, 300, 40]) == [5, 6]


def test_a_system_without_the_file_or_the_function_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(heap, "STATUS", tmp_path / "none")
    it = Heap(warm_up=0)
    it.trim = lambda pad: pytest.fail("trimmed")
    it.after_batch()
    it.trim = None
    it.after_batch()
    assert it.batches == 0

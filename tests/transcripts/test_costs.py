"""What a decoding took, from the lines of its journal."""

import pytest
import torch

from icefall_kd.transcripts.costs import peak_memory, percentile, sum_up


def batch(encoder, search, *durations, way="looping", rounds=1, memory=1.0):
    return {
        "seconds": {"encoder": encoder, "search": search, "confidence": 0.5},
        "memory": {"process": memory},
        "search": {"way": way, "rounds": rounds},
        "utterances": [{"id": f"{way} {d}", "duration": d} for d in durations],
    }


def test_sums_over_batches():
    costs = sum_up([batch(1, 0.5, 2, 4), batch(2, 1, 4, way="band", memory=7.0)])
    assert costs["audio_seconds"] == 10
    assert costs["rtf"] == {"encoder": 0.3, "search": 0.15, "confidence": 0.1}
    # Two of three utterances waited 1.5 s, one 3 s.
    assert costs["latency_ms"] == {"p50": 1500, "p90": 3000, "p99": 3000}
    assert costs["peak_memory_mb"] == {"process": 7.0}
    assert costs["search"] == {"ways": ["band", "looping"], "rounds": 2}


def test_who_waits_for_the_teacher_has_waited_for_the_student():
    costs = sum_up([batch(2, 1, 4)], [batch(1, 0.5, 2, 4)])
    assert costs["audio_seconds"] == 6 and costs["rtf"]["encoder"] == 0.5
    assert costs["latency_ms"] == {"p50": 1500, "p90": 4500, "p99": 4500}
    assert costs["search"]["rounds"] == 1  # the teacher's


def test_nothing_decoded_costs_nothing():
    costs = sum_up([])
    assert costs["audio_seconds"] == 0 and costs["rtf"]["search"] == 0
    assert costs["latency_ms"]["p99"] == 0


@pytest.mark.parametrize(
    "percent, expected", [(1, 1), (50, 50), (90, 90), (99, 99), (100, 100)]
)
def test_percentiles_of_a_hundred_values(percent, expected):
    assert percentile(list(range(100, 0, -1)), percent) == expected
    assert percentile([3.0], percent) == 3.0


def test_memory_that_was_held_once_stays_the_peak():
    before = peak_memory(torch.device("cpu"))
    block = bytearray(b"x" * (before and 64 << 20))
    during = peak_memory(torch.device("cpu"))
    del block
    after = peak_memory(torch.device("cpu"))
    # Linux adds up a process's pages per thread, and is exact to some of them alone.
    for earlier, later in ((before, during), (during, after)):
        assert later.get("process", 0) >= earlier.get("process", 0) - 1

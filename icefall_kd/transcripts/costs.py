"""What a decoding took: seconds for a second of audio, latency, memory."""

import math
import sys
from pathlib import Path
from typing import Any, Dict, Sequence

import torch

PERCENTILES = (50, 90, 99)


def peak_memory(device: torch.device) -> Dict[str, float]:
    """The most memory that this process has held, in MB.

    Args:
      device: Where the model runs.

    Returns:
      ``process``, and ``gpu`` on a GPU; nothing where the system does not say.
    """
    memory = {}
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("utf8", "replace").splitlines():
            if line.startswith("VmHWM:"):
                memory["process"] = int(line.split()[1]) / 1024
    elif sys.platform == "darwin":
        import resource

        memory["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        memory["gpu"] = torch.cuda.max_memory_allocated(device) / 2**20
    return memory


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that so many percent of them do not exceed.

    Args:
      values: One or more numbers.
      percent: Above 0 and up to 100.
    """
    index = math.ceil(percent / 100 * len(values)) - 1
    return sorted(values)[max(0, index)]


def sum_up(
    batches: Sequence[Dict[str, Any]], earlier: Sequence[Dict[str, Any]] = ()
) -> Dict[str, Any]:
    """Sum up the costs of a decoding's batches.

    An utterance's latency is the time of encoder and search of its batch: so long it
    waits for its result.

    Args:
      batches: Those of a journal.
      earlier: Those of the student's journal, in a cascade: its answers come first.

    Returns:
      ``audio_seconds``; ``seconds`` and ``rtf`` of ``encoder``, ``search`` and
      ``confidence``; ``latency_ms`` by percentile; ``peak_memory_mb``; and ``search``,
      the sums of the search's counts.
    """
    parts = ("encoder", "search", "confidence")
    both = [*earlier, *batches]
    seconds = {part: math.fsum(b["seconds"][part] for b in both) for part in parts}
    durations: Dict[str, float] = {}
    latencies: Dict[str, float] = {}
    memory: Dict[str, float] = {}
    counts: Dict[str, int] = {}
    for batch in both:
        took = 1000 * (batch["seconds"]["encoder"] + batch["seconds"]["search"])
        for utterance in batch["utterances"]:
            durations[utterance["id"]] = utterance["duration"]
            latencies[utterance["id"]] = latencies.get(utterance["id"], 0.0) + took
        for name, value in batch["memory"].items():
            memory[name] = max(value, memory.get(name, 0.0))
    for batch in batches:
        for name, value in batch["search"].items():
            if isinstance(value, (int, float)):
                counts[name] = counts.get(name, 0) + value
    audio, waited = math.fsum(durations.values()), list(latencies.values())
    ways = sorted({b["search"]["way"] for b in batches} - {""})
    return {
        "audio_seconds": audio,
        "seconds": seconds,
        "rtf": {part: seconds[part] / audio if audio else 0.0 for part in parts},
        "latency_ms": {
            f"p{p}": percentile(waited, p) if waited else 0.0 for p in PERCENTILES
        },
        "peak_memory_mb": memory,
        "search": {"ways": ways, **counts},
    }

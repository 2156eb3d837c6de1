"""How long the presets take on a machine: a file of measured times, and what follows.

A time is a real-time factor (RTF): seconds of one CPU thread for a second of audio. A
model between two presets has not been measured. Its RTF is read off the line between
the two that are next to it in multiply-adds, on logarithmic axes.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from icefall_kd.errors import KDError, require
from icefall_kd.files import replacing
from icefall_kd.student.count import count_multiply_adds
from icefall_kd.student.presets import LADDER

# What runs a model, and how its weights are kept. The first is what --rtf goes by.
SIDES = ("onnxruntime fp32", "onnxruntime int8", "torch fp32", "torch int8")
PARTS = ("encoder", "search")
_FORMAT = 1


def multiply_adds(settings: Dict[str, Any]) -> float:
    """Multiply-adds for a second of audio of what is timed: all but a CTC head.

    Args:
      settings: By the names of the recipe's params.
    """
    counts = count_multiply_adds(settings)
    return counts["all"] - counts["ctc_output"]


@dataclass(frozen=True)
class PresetTimes:
    """Measured times of presets.

    Args:
      machine: The CPU, and the versions of torch and onnxruntime.
      conditions: What was timed: the utterance's seconds, tokens a frame, vocabulary.
      multiply_adds: Of each preset, for a second of audio.
      rtf: By preset, side of :data:`SIDES` and part of :data:`PARTS`.
    """

    machine: Dict[str, str]
    conditions: Dict[str, float]
    multiply_adds: Dict[str, float]
    rtf: Dict[str, Dict[str, Dict[str, float]]]

    def of(self, name: str, side: str = SIDES[0]) -> float:
        """The RTF of a preset, encoder and search together.

        Args:
          name: The preset.
          side: Of :data:`SIDES`.
        """
        return sum(self.rtf[name][side].values())

    def of_model(self, products: float) -> Optional[float]:
        """The RTF of a model by the line through the presets; None outside of it.

        Args:
          products: Its multiply-adds for a second of audio.
        """
        for (x, y), (next_x, next_y) in self._steps():
            if x <= products <= next_x:
                share = math.log(products / x) / math.log(next_x / x)
                return y * (next_y / y) ** share
        return None

    def products_for(self, rtf: float) -> float:
        """The most multiply-adds for a second of audio that have an RTF.

        Args:
          rtf: The RTF.

        Raises:
          KDError: it is not between those of the presets.
        """
        for (x, y), (next_x, next_y) in reversed(self._steps()):
            if min(y, next_y) <= rtf <= max(y, next_y):
                share = math.log(rtf / y) / math.log(next_y / y) if y != next_y else 1
                return x * (next_x / x) ** share
        known = {self.of(name): name for name in LADDER if name in self.rtf}
        least, most = min(known), max(known)
        raise KDError(
            f"`rtf` is {rtf:g}, and the presets were measured from {least:.4f} "
            f"({known[least]}) to {most:.4f} ({known[most]}): give one between them"
        )

    def _steps(self) -> List[Tuple[Tuple[float, float], Tuple[float, float]]]:
        """Neighbours in multiply-adds of the ladder's presets, each with its RTF."""
        names = [name for name in LADDER if name in self.rtf]
        points = sorted((self.multiply_adds[name], self.of(name)) for name in names)
        return list(zip(points, points[1:]))


def write_times(times: PresetTimes, path: Path) -> None:
    """Write times into a file of JSON.

    Args:
      times: The times.
      path: The file; one that is there is replaced.
    """
    with replacing(path) as temporary:
        text = json.dumps({"format": _FORMAT, **asdict(times)}, indent=2)
        temporary.write_text(text + "\n", "utf8")


def read_times(path: Path) -> PresetTimes:
    """Read the file of :func:`write_times`.

    Args:
      path: The file, which exists.

    Raises:
      KDError: it is another file, or of another version.
    """
    try:
        fields = json.loads(path.read_text("utf8"))
        require(fields.pop("format") == _FORMAT, "another format")
        times = PresetTimes(**fields)
        machine = {str(k): str(v) for k, v in times.machine.items()}
        numbers = [*times.multiply_adds.values()]
        require(len(set(times.rtf) & set(LADDER)) > 1, "fewer than two presets")
        for name in times.rtf:
            numbers.append(times.multiply_adds[name])
            numbers += [times.rtf[name][side][part] for side in SIDES for part in PARTS]
        require(all(0 < n < math.inf for n in numbers), "no positive number")
        rtf = {
            name: {side: {p: float(sides[side][p]) for p in PARTS} for side in SIDES}
            for name, sides in times.rtf.items()
        }
    # Whatever the JSON of other programs makes of a dictionary's methods.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, KDError):
        raise KDError(
            f"{path} is no file of times that `icefall-kd student --list --measure` of "
            "this version wrote: give another --times, or measure anew"
        ) from None
    return PresetTimes(machine, times.conditions, times.multiply_adds, rtf)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: 1 where two measures order everything alike, -1 where oppositely.

    Args:
      a: Two or more different numbers.
      b: As many.
    """

    def ranks(values: Sequence[float]) -> List[float]:
        # Equal ones share the mean of their ranks.
        return [
            sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2
            for v in values
        ]

    x, y = ranks(a), ranks(b)
    mean = (len(x) - 1) / 2
    spread = [math.sqrt(sum((r - mean) ** 2 for r in z)) for z in (x, y)]
    if not all(spread):  # all equal
        return 0.0
    return sum((r - mean) * (s - mean) for r, s in zip(x, y)) / (spread[0] * spread[1])

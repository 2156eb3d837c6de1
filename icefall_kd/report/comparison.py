"""The data of a report: models, their error rates, test sets and targets."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from icefall_kd.report.logs import Training
from icefall_kd.report.manifests import TargetSizes
from icefall_kd.report.results import Decoding


@dataclass
class Model:
    """The logs and results of one model.

    Args:
      name: The user's name for it.
      exp: Its experiment folder.
      training: Its training logs, or None.
      decodings: The last decoding of each method.
      earlier: All other decodings.
    """

    name: str
    exp: Path
    training: Optional[Training]
    decodings: List[Decoding]
    earlier: List[Decoding]

    @property
    def parameters(self) -> Optional[int]:
        """The number of parameters, or None if no log has it."""
        logs = [self.training, *(d.log for d in self.decodings)]
        return next((log.parameters for log in logs if log and log.parameters), None)

    def percent(self, method: str, kind: str, test_set: str) -> float:
        """The error rate of a ``method`` on a ``test_set``, or NaN.

        Args:
          method: Such as ``greedy_search``.
          kind: ``wer`` or ``cer``.
          test_set: Its name.
        """
        for d in self.decodings:
            if (d.method, d.kind) == (method, kind) and test_set in d.rates:
                return d.rates[test_set].percent
        return math.nan


@dataclass
class TestAudio:
    """Seconds of audio in the test sets.

    Args:
      folder: The folder of their manifests; "" if none was given.
      seconds: By test set.
      ambiguous: The manifests of each set that has several, so no seconds.
    """

    __test__ = False  # no class of tests

    folder: str = ""
    seconds: Dict[str, float] = field(default_factory=dict)
    ambiguous: Dict[str, List[str]] = field(default_factory=dict)


@dataclass
class Comparison:
    """All data of a report.

    Args:
      models: In the order of the report.
      teacher: The name of a model; "" if nothing is compared.
      baseline: The name of the student without KD; "" if nothing is compared.
      unit: The unit of wer-summaries, WER or CER.
      audio: Seconds of the test sets.
      targets: The size of targets by manifest.
      words: Those of one language, see :mod:`icefall_kd.report.words`.
    """

    models: Sequence[Model]
    teacher: str
    baseline: str
    unit: str
    audio: TestAudio
    targets: Dict[str, TargetSizes]
    words: Dict[str, str]

    def text(self, key: str, **values: Any) -> str:
        """The text of a ``key``, with ``values`` for its braces."""
        return self.words[key].format(**values)

    def model(self, name: str) -> Model:
        """The model of that ``name``."""
        return next(m for m in self.models if m.name == name)

    def unit_of(self, kind: str) -> str:
        """The unit of summaries of a ``kind``, cer or wer."""
        return "CER" if kind == "cer" else self.unit

    @property
    def names(self) -> List[str]:
        """The models' names."""
        return [m.name for m in self.models]

    @property
    def students(self) -> List[Model]:
        """The models that are compared with the baseline."""
        if not self.baseline:
            return []
        return [m for m in self.models if m.name not in (self.teacher, self.baseline)]

    @property
    def decodings(self) -> List[Tuple[Model, Decoding]]:
        """The last decodings of all models."""
        return [(m, d) for m in self.models for d in m.decodings]

    @property
    def methods(self) -> List[str]:
        """All decoding methods."""
        return sorted({d.method for _, d in self.decodings})

    @property
    def sets(self) -> Dict[str, List[Tuple[str, str]]]:
        """Method and test set of all error rates, by kind of summary."""
        rows: Dict[str, set] = {}
        for _, d in self.decodings:
            rows.setdefault(d.kind, set()).update((d.method, s) for s in d.rates)
        return {kind: sorted(rows[kind]) for kind in sorted(rows, reverse=True)}


def relative_change(rate: float, baseline: float) -> Optional[float]:
    """By how many percent ``rate`` is above ``baseline``, or None without a baseline.

    Args:
      rate: An error rate; NaN for none.
      baseline: That of the student without KD.
    """
    if not baseline > 0 or not math.isfinite(rate):
        return None
    return 100 * (rate - baseline) / baseline


def gap_closed(rate: float, baseline: float, teacher: float) -> Optional[float]:
    """How many percent of the gap between two models are closed, or None without a gap.

    Args:
      rate: An error rate; NaN for none.
      baseline: That of the student without KD.
      teacher: That of the teacher.
    """
    if not baseline > teacher or not math.isfinite(rate):
        return None
    return 100 * (baseline - rate) / (baseline - teacher)

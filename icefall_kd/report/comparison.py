"""The data of a report: models, their error rates, test sets and targets."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from icefall_kd.report.checkpoints import read_steps
from icefall_kd.report.exports import ExportedForm
from icefall_kd.report.intervals import Key, Statistics
from icefall_kd.report.logs import Series, Training
from icefall_kd.report.manifests import TargetSizes
from icefall_kd.report.results import Decoding
from icefall_kd.report.transcripts import Scores


@dataclass(frozen=True)
class Steps:
    """A number of training steps.

    Args:
      count: The number.
      exact: False where it is only that of the logged batches, which is smaller.
    """

    count: int
    exact: bool = True


@dataclass
class Run:
    """The logs and results of one training: of a model, or of one of its seeds.

    Args:
      name: The model's name, with the number of the seed where there are several.
      exp: Its experiment folder.
      training: Its training logs, or None.
      decodings: The last decoding of each method.
      earlier: All other decodings.
      scores: The errors of each utterance, for the last decodings that have
        transcripts.
      exports: What the check of its exported files found.
    """

    name: str
    exp: Path
    training: Optional[Training]
    decodings: List[Decoding]
    earlier: List[Decoding]
    scores: Dict[Key, Scores] = field(default_factory=dict)
    exports: List[ExportedForm] = field(default_factory=list)

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

    @property
    def without_scores(self) -> List[Tuple[Decoding, str]]:
        """The last decodings and test sets whose transcripts are missing."""
        return [
            (d, test_set)
            for d in self.decodings
            for test_set in sorted(d.rates)
            if (d.kind, d.method, test_set) not in self.scores
        ]

    def steps(self, checkpoint: str = "") -> Optional[Steps]:
        """The training steps until a checkpoint, or None if nothing tells.

        Args:
          checkpoint: Such as ``epoch-30``; "" for that of the last logged epoch.
        """
        batches = self.training.batches if self.training else []
        if not checkpoint and not batches:
            return None
        checkpoint = checkpoint or f"epoch-{batches[-1].epoch}"
        kind, _, number = checkpoint.rpartition("-")
        if kind != "epoch":
            return Steps(int(number))
        exact = read_steps(self.exp / f"{checkpoint}.pt")
        if exact is not None:
            return Steps(exact)
        logged = self.training.least_steps(int(number)) if self.training else 0
        return Steps(logged, exact=False) if logged else None


@dataclass
class Model:
    """A model, trained once or with several seeds.

    Args:
      name: The user's name for it.
      runs: Its trainings.
    """

    name: str
    runs: List[Run]

    @property
    def parameters(self) -> Optional[int]:
        """The number of parameters, or None if no log has it."""
        return next((run.parameters for run in self.runs if run.parameters), None)

    def percents(self, method: str, kind: str, test_set: str) -> List[float]:
        """The error rate of each seed, see :meth:`Run.percent`."""
        return [run.percent(method, kind, test_set) for run in self.runs]

    def percent(self, method: str, kind: str, test_set: str) -> float:
        """The mean error rate over seeds; NaN where a seed has none."""
        return mean(self.percents(method, kind, test_set))

    def deviation(self, method: str, kind: str, test_set: str) -> float:
        """The standard deviation of the error rate over seeds; NaN for one seed."""
        rates = self.percents(method, kind, test_set)
        if len(rates) < 2 or not all(map(math.isfinite, rates)):
            return math.nan
        return stdev(rates)


@dataclass
class TestAudio:
    """Seconds of audio in the test sets, and who speaks.

    Args:
      folder: The folder of their manifests; "" if none was given.
      seconds: By test set.
      ambiguous: The manifests of each set that has several, so no seconds.
      speakers: The speaker of each cut id, by test set; only with --by-speaker.
    """

    __test__ = False  # no class of tests

    folder: str = ""
    seconds: Dict[str, float] = field(default_factory=dict)
    ambiguous: Dict[str, List[str]] = field(default_factory=dict)
    speakers: Dict[str, Dict[str, str]] = field(default_factory=dict)


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
      statistics: Intervals and differences of the results that have transcripts.
    """

    models: Sequence[Model]
    teacher: str
    baseline: str
    unit: str
    audio: TestAudio
    targets: Dict[str, TargetSizes]
    words: Dict[str, str]
    statistics: Dict[Key, Statistics] = field(default_factory=dict)

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
    def runs(self) -> List[Run]:
        """The runs of all models."""
        return [run for m in self.models for run in m.runs]

    def model_of(self, run: Run) -> Model:
        """The model that a run belongs to."""
        return next(m for m in self.models if any(r is run for r in m.runs))

    @property
    def students(self) -> List[Model]:
        """The models that are compared with the baseline."""
        if not self.baseline:
            return []
        return [m for m in self.models if m.name not in (self.teacher, self.baseline)]

    @property
    def decodings(self) -> List[Tuple[Run, Decoding]]:
        """The last decodings of all runs."""
        return [(run, d) for run in self.runs for d in run.decodings]

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


def loss_curves(
    runs: Sequence[Run],
) -> Iterator[Tuple[str, Dict[int, Series], Dict[int, Series]]]:
    """The curves of each loss: ``loss`` first, those of distillation last.

    Args:
      runs: The trainings.

    Yields:
      The loss's name; and by the run's index, of the runs that logged it, its curve in
      training and that in validation.
    """
    trained = [(i, run.training) for i, run in enumerate(runs) if run.training]
    train = {i: training.losses() for i, training in trained}
    valid = {i: training.valid_losses() for i, training in trained}
    curves = [*train.values(), *valid.values()]
    names = dict.fromkeys(name for series in curves for name in series)
    for name in sorted(names, key=lambda n: (n.startswith("kd_"), n != "loss")):
        lines = {i: series[name] for i, series in train.items() if name in series}
        marks = {i: series[name] for i, series in valid.items() if name in series}
        yield name, lines, marks


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

"""Reads the logs of icefall's training scripts."""

import ast
import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from icefall_kd.errors import KDError
from icefall_kd.terms import TERMS
from icefall_kd.terms.schedule import Curve

DATE = r"\d{4}(?:-\d\d){5}"

_ENTRY = re.compile(
    r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) [A-Z]+ \[[^\]]*\] (?:\(\d+/\d+\) )?(.*)",
    re.DOTALL,
)
_TRAIN_LOG = re.compile(rf"log-train-({DATE})(?:-0)?")
_BATCH = re.compile(
    r"Epoch (\d{1,9}), batch (\d{1,9}), loss\[([^\]]*)\], tot_loss\[([^\]]*)\]"
)
_VALIDATION = re.compile(r"Epoch (\d{1,9}), validation: (.*?over [\d.]+ frames)")
_VALUE = re.compile(r"(\w+)=([-+]?(?:nan|inf|\d+\.?\d*(?:e[-+]?\d+)?))\b")
_WEIGHT = re.compile(r"kd_(\w+)_weight")
_SAVED = re.compile(
    r"Saving checkpoint to (?:.*/)?(?:\.tmp\.)?((?:epoch|checkpoint)-\d{1,9})\.pt"
)
_PARAMETERS = re.compile(r"Number of model parameters: (\d{1,18})\b")
_SETTING = re.compile(r"'(\w+)': ('[^']*'|[^,{}]+)")

Series = List[Tuple[float, float]]  # epochs from the start of the first, value


@dataclass
class LogLine:
    """The numbers of one batch, or of one validation.

    Args:
      epoch: Its number, from 1 on.
      batch: The number of the batch in the epoch, from 0 on.
      losses: Means per frame, of a batch over about the last 200 batches, of a
        validation over its set.
      weights: The weight of each term at this batch.
      seconds: Seconds of training until this line, see :attr:`Training.seconds`.
    """

    epoch: int
    batch: int
    losses: Dict[str, float]
    weights: Dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class SavedCheckpoint:
    """A checkpoint that a training saved.

    Args:
      epoch: The epoch of the last line of a batch before it.
      batch: The number of this batch in the epoch.
      name: Such as ``epoch-30`` or ``checkpoint-4000``.
      seconds: Seconds of training until then, see :attr:`Training.seconds`.
    """

    epoch: int
    batch: int
    name: str
    seconds: float


@dataclass
class Training:
    """A training, read from the logs of all its starts.

    Args:
      settings: The recipe's params at the last start that trained; {} if no log has
        them.
      parameters: The number of the model's parameters, or None.
      batches: Lines of batches, in their order.
      validations: Lines of validations, in their order.
      kd_settings: The params of the last start that distilled, as fine-tuning on hard
        labels may follow.
      kd_from: Epoch and batch where that start began.
      skipped: The number of entries with an impossible date, which are left out.
      saved: The checkpoints that it saved, in their order.
    """

    settings: Dict[str, Any] = field(default_factory=dict)
    parameters: Optional[int] = None
    batches: List[LogLine] = field(default_factory=list)
    validations: List[LogLine] = field(default_factory=list)
    kd_settings: Dict[str, Any] = field(default_factory=dict)
    kd_from: Tuple[int, int] = (0, 0)
    skipped: int = 0
    saved: List[SavedCheckpoint] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of training, by the time stamps of the logs.

        Each start counts from the first entry of its log. Where a training continued,
        neither the time between two starts counts nor the batches that were lost.
        """
        lines = (*self.batches, *self.validations, *self.saved)
        return max((line.seconds for line in lines), default=0.0)

    def seconds_until(self, checkpoint: str) -> Optional[float]:
        """Seconds of training until a checkpoint, or None if the logs don't tell.

        Args:
          checkpoint: Such as ``epoch-30`` or ``checkpoint-4000``.
        """
        times = [saved.seconds for saved in self.saved if saved.name == checkpoint]
        if not times and checkpoint.startswith("epoch-"):
            epoch = int(checkpoint[len("epoch-") :])
            lines = (*self.batches, *self.validations)
            times = [line.seconds for line in lines if line.epoch == epoch]
        return max(times, default=None)

    def least_steps(self, epoch: int) -> int:
        """The steps of all epochs to ``epoch``, as far as a line of a batch tells.

        icefall logs each fiftieth batch, so that up to 49 of each epoch are missing.

        Args:
          epoch: The number of an epoch.
        """
        last = {b.epoch: b.batch + 1 for b in self.batches if b.epoch <= epoch}
        return sum(last.values())

    @property
    def distils(self) -> Optional[bool]:
        """Whether a KD weight was above 0; None if no log has the settings."""
        if not self.settings:
            return None
        return bool(self.kd_settings) or _distils(self.settings)

    def losses(self) -> Dict[str, Series]:
        """The curve of each training loss.

        icefall's means begin anew in each epoch, with the noise of a single batch;
        that one is left out in all epochs but the first.
        """
        lines = [line for i, line in enumerate(self.batches) if line.batch or not i]
        return self._curves(lines, lambda line: line.losses)

    def valid_losses(self) -> Dict[str, Series]:
        """The curve of each validation loss."""
        return self._curves(self.validations, lambda line: line.losses)

    def weights(self) -> Dict[str, Series]:
        """The curve of each weight that is not always 0; {} without distillation."""
        if not self.distils:
            return {}
        curves = self._curves(self.batches, lambda line: line.weights)
        used = [
            name
            for name in weight_names()
            if any(weight for _, weight in curves.get(name, []))
        ]
        return {name: curves[name] for name in used}

    def append(self, start: "Training") -> None:
        """Add a later start; of batches that both logged, those of ``start`` count."""
        self.skipped += start.skipped
        if start.batches or not self.settings:
            self.settings = start.settings or self.settings
        self.parameters = start.parameters or self.parameters
        if start.batches:
            first = (start.batches[0].epoch, start.batches[0].batch)
            for lines in (self.batches, self.validations, self.saved):
                lines[:] = [line for line in lines if (line.epoch, line.batch) < first]
            until = self.seconds
            for line in (*start.batches, *start.validations, *start.saved):
                line.seconds += until
            if self.kd_from >= first:  # trained again without distillation
                self.kd_settings = {}
            if _distils(start.settings):
                self.kd_settings, self.kd_from = start.settings, first
        self.batches += start.batches
        self.validations += start.validations
        self.saved += start.saved

    def _curves(
        self, lines: Iterable[LogLine], values: Callable[[LogLine], Dict[str, float]]
    ) -> Dict[str, Series]:
        """Curves of the numbers by name, over epochs from the start of the first."""
        longest, lengths = 1, {}  # of the epochs up to each
        for line in self.batches:
            longest = max(longest, line.batch)
            lengths[line.epoch] = longest
        curves: Dict[str, Series] = {}
        for line in lines:
            x = line.epoch - 1 + line.batch / lengths.get(line.epoch, 1)
            for name, value in values(line).items():
                curves.setdefault(name, []).append((x, value))
        return curves


def read_training(exp: Path) -> Optional[Training]:
    """Read all logs in ``exp``/log.

    Args:
      exp: The experiment folder of train.py.

    Returns:
      The training, or None if there is no log.
    """
    logs = [(_TRAIN_LOG.fullmatch(p.name), p) for p in (exp / "log").glob("log-train*")]
    logs = sorted((match[1], path) for match, path in logs if match)
    if not logs:
        return None
    training = Training()
    for _, path in logs:
        training.append(_read_start(path))
    return training


def read_entries(path: Path) -> Iterator[Tuple[Optional[datetime], str]]:
    """Yield time and message of each entry of a log.

    A message may have several lines. The time is None for an impossible date, such as
    one of month 13.

    Args:
      path: The log.
    """
    date, lines = "", []
    with open(path, encoding="utf8", errors="replace") as f:
        for line in f:
            match = _ENTRY.match(line.rstrip("\n"))
            if match is None:
                lines.append(line.rstrip("\n"))
                continue
            if date:
                yield _parse_time(date), "\n".join(lines)
            date, lines = match[1], [match[2]]
    if date:
        yield _parse_time(date), "\n".join(lines)


def parse_params(message: str) -> Dict[str, Any]:
    """The params that a recipe logs at its start; {} if ``message`` is another one."""
    if not message.startswith("{"):
        return {}
    try:
        params = json.loads(message)
        return params if isinstance(params, dict) else {}
    except RecursionError:
        return {}
    except ValueError:  # an older icefall prints Python's dictionary
        return {name: _literal(text) for name, text in _SETTING.findall(message)}


def parse_num_parameters(message: str) -> Optional[int]:
    """The number of parameters, if ``message`` is the entry that has it."""
    match = _PARAMETERS.search(message)
    return int(match[1]) if match else None


def _read_start(path: Path) -> Training:
    """Read the log of one start."""
    start = Training()
    constant: Dict[str, float] = {}
    begin = None
    for time, message in read_entries(path):
        if time is None:
            start.skipped += 1
            continue
        begin = begin or time
        seconds = (time - begin).total_seconds()
        if not start.settings:
            start.settings = parse_params(message)
            constant = _constant_weights(start.settings)
        start.parameters = parse_num_parameters(message) or start.parameters
        last = start.batches[-1] if start.batches else None
        if match := _BATCH.search(message):
            start.batches.append(_batch_line(match, constant, seconds))
        elif match := _VALIDATION.search(message):
            epoch = int(match[1])
            batch = last.batch if last and last.epoch == epoch else 0
            line = LogLine(epoch, batch, _losses(match[2]), seconds=seconds)
            start.validations.append(line)
        elif last and (match := _SAVED.match(message)):
            saved = SavedCheckpoint(last.epoch, last.batch, match[1], seconds)
            start.saved.append(saved)
    return start


def _batch_line(
    match: "re.Match[str]", constant: Dict[str, float], seconds: float
) -> LogLine:
    """The line of a batch; ``constant`` are the weights that no line logs."""
    weights = {
        weight[1]: value
        for name, value in _values(match[3]).items()
        if (weight := _WEIGHT.fullmatch(name))
    }
    losses, weights = _losses(match[4]), {**constant, **weights}
    return LogLine(int(match[1]), int(match[2]), losses, weights, seconds)


def weight_names() -> List[str]:
    """The names of all weights in the order of the report: hard, and the terms."""
    return ["hard", *TERMS]


def _distils(settings: Dict[str, Any]) -> bool:
    """Whether a KD weight of the recipe's params is above 0 at some time."""
    for term in TERMS:
        value = settings.get(f"kd_{term}_weight")
        try:
            if value is not None and Curve.parse(value, term).highest > 0:
                return True
        except KDError:
            pass
    return False


def _constant_weights(settings: Dict[str, Any]) -> Dict[str, float]:
    """Weights that are numbers; of a curve the log has the value at each batch."""
    weights = {}
    for term in weight_names():
        try:
            weights[term] = float(settings[f"kd_{term}_weight"])
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
    return weights


def _values(text: str) -> Dict[str, float]:
    return {name: float(value) for name, value in _VALUE.findall(text)}


def _losses(text: str) -> Dict[str, float]:
    return {k: v for k, v in _values(text).items() if k.endswith("loss")}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _parse_time(text: str) -> Optional[datetime]:
    try:
        return datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f")
    except ValueError:
        return None

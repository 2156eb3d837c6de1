"""What icefall's scripts wrote into their logs."""

import ast
import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from icefall_kd.errors import KDError
from icefall_kd.terms.schedule import Curve

TERMS = ("ctc", "rnnt", "full_sum", "hidden", "nbest")
WEIGHTS = ("hard", *TERMS)
DATE = r"\d{4}(?:-\d\d){5}"

_RECORD = re.compile(
    r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) [A-Z]+ \[[^\]]*\] (?:\(\d+/\d+\) )?(.*)",
    re.DOTALL,
)
_TRAIN_LOG = re.compile(rf"log-train-({DATE})(?:-0)?")
_BATCH = re.compile(
    r"Epoch (\d{1,9}), batch (\d{1,9}), loss\[([^\]]*)\], tot_loss\[([^\]]*)\]"
)
_VALIDATION = re.compile(r"Epoch (\d{1,9}), validation: (.*?over [\d.]+ frames)")
_VALUE = re.compile(r"(\w+)=([-+]?(?:nan|inf|\d+\.?\d*(?:e[-+]?\d+)?))\b")
_PARAMETERS = re.compile(r"Number of model parameters: (\d{1,18})\b")
_SETTING = re.compile(r"'(\w+)': ('[^']*'|[^,{}]+)")

Series = List[Tuple[float, float]]  # epochs from the start of the first, value


@dataclass
class Batch:
    """A line of a training log.

    Args:
      epoch: From 1 on.
      batch: Its number in the epoch, from 0 on.
      losses: Per frame, over about the last 200 batches; of a validation, over its set.
      weights: In force at this batch, by term.
    """

    epoch: int
    batch: int
    losses: Dict[str, float]
    weights: Dict[str, float] = field(default_factory=dict)


@dataclass
class Training:
    """A training, put together from the logs of all its starts.

    Args:
      settings: The recipe's params at the last start that trained; {} where no log
        has them.
      parameters: Of the model, or None.
      batches: In their order.
      validations: In theirs.
      kd_settings: As ``settings``, of the last start that distilled: fine-tuning on
        hard labels may follow.
      kd_from: Epoch and batch where that one began.
      skipped: Entries that were left out, for an impossible date.
    """

    settings: Dict[str, Any]
    parameters: Optional[int]
    batches: List[Batch]
    validations: List[Batch]
    kd_settings: Dict[str, Any] = field(default_factory=dict)
    kd_from: Tuple[int, int] = (0, 0)
    skipped: int = 0

    @property
    def distils(self) -> Optional[bool]:
        """Whether a KD weight was above 0; None where no log tells the settings."""
        if not self.settings:
            return None
        return bool(self.kd_settings) or _distil(self.settings)

    def epochs(self) -> Tuple[int, int]:
        """The first and the last epoch of the logs; (0, 0) for none."""
        if not self.batches:
            return 0, 0
        return self.batches[0].epoch, self.batches[-1].epoch

    def losses(self) -> Dict[str, Series]:
        """Each training loss over the epochs.

        icefall's means begin anew in each epoch, with the noise of a single batch;
        that one is left out in all epochs but the first.
        """
        lines = [b for i, b in enumerate(self.batches) if b.batch or not i]
        return _series(lines, _length_of_epochs(self.batches), "losses")

    def valid_losses(self) -> Dict[str, Series]:
        """Each validation loss over the epochs."""
        return _series(self.validations, _length_of_epochs(self.batches), "losses")

    def weights(self) -> Dict[str, Series]:
        """Each weight over the epochs; {} without distillation."""
        if not self.distils:
            return {}
        found = _series(self.batches, _length_of_epochs(self.batches), "weights")
        found = {k: found[k] for k in WEIGHTS if k in found}
        return {k: v for k, v in found.items() if any(w for _, w in v)}


def records(path: Path) -> Iterator[Tuple[Optional[datetime], str]]:
    """Time and message of each entry of a log; a message may have several lines.

    The time is None where the date is one that there is not, such as of month 13.
    """
    when, lines = "", []
    with open(path, encoding="utf8", errors="replace") as f:
        for line in f:
            match = _RECORD.match(line.rstrip("\n"))
            if match is None:
                lines.append(line.rstrip("\n"))
                continue
            if when:
                yield _time(when), "\n".join(lines)
            when, lines = match[1], [match[2]]
    if when:
        yield _time(when), "\n".join(lines)


def settings_of(message: str) -> Dict[str, Any]:
    """The params that a recipe logs at its start; {} for any other message."""
    if not message.startswith("{"):
        return {}
    try:
        found = json.loads(message)
        return found if isinstance(found, dict) else {}
    except RecursionError:
        return {}
    except ValueError:  # an older icefall prints Python's dictionary
        return {name: _literal(text) for name, text in _SETTING.findall(message)}


def parameters_of(message: str) -> Optional[int]:
    match = _PARAMETERS.search(message)
    return int(match[1]) if match else None


def read_training(exp: Path) -> Optional[Training]:
    """The training that logged into ``exp``/log, or None.

    Where two starts logged the same batches, those of the later one count.
    """
    logs = [(_TRAIN_LOG.fullmatch(p.name), p) for p in (exp / "log").glob("log-train*")]
    logs = sorted((match[1], path) for match, path in logs if match)
    if not logs:
        return None
    found = Training({}, None, [], [])
    for _, path in logs:
        _add(found, _read_start(path))
    return found


def _read_start(path: Path) -> Training:
    found = Training({}, None, [], [])
    constant: Dict[str, float] = {}
    for time, message in records(path):
        if time is None:
            found.skipped += 1
            continue
        settings = {} if found.settings else settings_of(message)
        if settings:
            found.settings = settings
            constant = _constant_weights(settings)
        found.parameters = parameters_of(message) or found.parameters
        if match := _BATCH.search(message):
            weights = {
                name[3:-7]: value
                for name, value in _values(match[3]).items()
                if name.startswith("kd_") and name.endswith("_weight")
            }
            found.batches.append(
                Batch(
                    int(match[1]),
                    int(match[2]),
                    _losses(match[4]),
                    {**constant, **weights},
                )
            )
        elif match := _VALIDATION.search(message):
            epoch, last = int(match[1]), found.batches[-1:]
            at = last[0].batch if last and last[0].epoch == epoch else 0
            found.validations.append(Batch(epoch, at, _losses(match[2])))
    return found


def _add(found: Training, start: Training) -> None:
    found.skipped += start.skipped
    if start.batches or not found.settings:
        found.settings = start.settings or found.settings
    found.parameters = start.parameters or found.parameters
    if start.batches:
        first = (start.batches[0].epoch, start.batches[0].batch)
        for lines in (found.batches, found.validations):
            lines[:] = [b for b in lines if (b.epoch, b.batch) < first]
        if found.kd_from >= first:  # trained again without
            found.kd_settings = {}
        if _distil(start.settings):
            found.kd_settings, found.kd_from = start.settings, first
    found.batches += start.batches
    found.validations += start.validations


def _distil(settings: Dict[str, Any]) -> bool:
    return any(_highest(settings, term) > 0 for term in TERMS)


def _highest(settings: Dict[str, Any], term: str) -> float:
    value = settings.get(f"kd_{term}_weight")
    try:
        return 0.0 if value is None else Curve.parse(value, term).highest
    except KDError:
        return 0.0


def _constant_weights(settings: Dict[str, Any]) -> Dict[str, float]:
    found = {}
    for term in WEIGHTS:
        try:
            found[term] = float(settings[f"kd_{term}_weight"])
        except (KeyError, TypeError, ValueError, OverflowError):
            pass  # a curve: then the log has the weight at each batch
    return found


def _length_of_epochs(batches: List[Batch]) -> Dict[int, int]:
    """The largest batch number seen in each epoch or the ones before."""
    lengths: Dict[int, int] = {}
    longest = 1
    for b in batches:
        longest = max(longest, b.batch)
        lengths[b.epoch] = longest
    return lengths


def _series(lines: List[Batch], lengths: Dict[int, int], of: str) -> Dict[str, Series]:
    found: Dict[str, Series] = {}
    for line in lines:
        x = line.epoch - 1 + line.batch / lengths.get(line.epoch, 1)
        for name, value in getattr(line, of).items():
            found.setdefault(name, []).append((x, value))
    return found


def _values(text: str) -> Dict[str, float]:
    return {name: float(value) for name, value in _VALUE.findall(text)}


def _losses(text: str) -> Dict[str, float]:
    return {k: v for k, v in _values(text).items() if k.endswith("loss")}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _time(text: str) -> Optional[datetime]:
    try:
        return datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f")
    except ValueError:
        return None

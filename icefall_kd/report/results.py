"""Word and character error rates, and the time that decoding took."""

import os
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from icefall_kd.errors import KDError
from icefall_kd.report.logs import DATE, parameters_of, records, settings_of

_SUMMARY = re.compile(r"(wer|cer)-summary[-_](.+)\.txt")
_ERRS = re.compile(r"errs-(.+)\.txt")
# A set's name may hold hyphens, and so may what follows; this begins the latter.
_SUFFIX = re.compile(r"^(.+?)[-_]((?:epoch|iter)-\d+[-_]avg-\d+.*)$")
_NUMBER = re.compile(r"(epoch|iter)-(\d+)[-_]avg-(\d+)[-_]*")
_LOG = re.compile(rf"log-decode-(.+)-({DATE})(?:-\d+)?")
_RATE = re.compile(r"%[WC]ER\s*=?\s*(\d+\.?\d*)")
_SCORED = re.compile(r"\[(.+)\] %[WC]ER ")
_SET_DONE = re.compile(r"\s*For (.+), [WC]ER of different settings are:")
_BEFORE = ("Number of model parameters", "About to get", "Wrote detailed error stats")


@dataclass(frozen=True)
class Rate:
    """An error rate of one set.

    Args:
      percent: Of the best setting, which stands first in icefall's summary.
      setting: Its name.
      settings: How many there were.
    """

    percent: float
    setting: str
    settings: int = 1


@dataclass
class Log:
    """What a decoding script logged.

    Args:
      seconds: Of decoding, by set.
      device: "" where the log doesn't tell.
      max_duration: Seconds of audio in a batch, as the params have it; None: unknown.
      skipped: Entries that were left out, for an impossible date.
    """

    date: str
    seconds: Dict[str, float] = field(default_factory=dict)
    device: str = ""
    max_duration: Optional[float] = None
    parameters: Optional[int] = None
    skipped: int = 0


@dataclass
class Decoding:
    """One model's checkpoints, decoded by one method: a rate for each set.

    Args:
      method: The folder in the experiment folder, such as ``greedy_search``.
      kind: ``cer`` for a cer-summary, else ``wer``.
      suffix: What icefall's file names end in.
      date: Of its newest log, or of its files.
    """

    method: str
    kind: str
    suffix: str
    rates: Dict[str, Rate] = field(default_factory=dict)
    date: str = ""
    log: Optional[Log] = None

    @property
    def order(self) -> Tuple[bool, int, str]:
        """Rises with the training: epochs above iterations, later ones above others."""
        kind, number, _ = self._numbers()
        return kind == "epoch", number, self.date

    @property
    def checkpoint(self) -> str:
        """Such as ``epoch 30, avg 9``."""
        kind, number, avg = self._numbers()
        return f"{kind} {number}, avg {avg}"

    @property
    def options(self) -> str:
        """The rest of the suffix: how it was decoded."""
        return _NUMBER.sub("", self.suffix, count=1).strip("-_")

    def _numbers(self) -> Tuple[str, int, int]:
        match = _NUMBER.match(self.suffix)
        return match[1], int(match[2]), int(match[3])


def read_decodings(exp: Path) -> List[Decoding]:
    """All decodings of an experiment folder, the last of each method first.

    Raises:
      KDError: a summary without a result.
    """
    found: List[Decoding] = []
    for folder in _method_folders(exp):
        method = _shown(folder.relative_to(exp).as_posix())
        logs = _logs_of(folder)
        here: Dict[Tuple[str, str], Decoding] = {}
        summaries = [(_SUMMARY.fullmatch(_shown(p.name)), p) for p in folder.iterdir()]
        summaries = [(m, p) for m, p in summaries if m]
        # A set that was decoded again counts with the newer file.
        for match, path in sorted(summaries, key=lambda mp: (_mtime(mp[1]), mp[1])):
            rates = _read_summary(path)
            parts = _SUFFIX.match(match[2])
            if parts is None:
                continue
            test_set = _without_setting(parts[1], [name for name, _ in rates])
            decoding = here.setdefault(
                (match[1], parts[2]), Decoding(method, match[1], parts[2])
            )
            decoding.rates[test_set] = Rate(rates[0][1], rates[0][0], len(rates))
            decoding.date = _mtime(path)
        if not here:  # the summaries are gone
            _add_errs(here, method, folder)
        for (_, suffix), decoding in here.items():
            if suffix in logs:
                decoding.log = _read_logs(logs[suffix])
                decoding.date = decoding.log.date
        found += here.values()
    found.sort(key=lambda d: d.order, reverse=True)
    return sorted(found, key=lambda d: (d.method, d.kind))


def split_last(decodings: List[Decoding]) -> Tuple[List[Decoding], List[Decoding]]:
    """The last decoding of each method, and all others."""
    last, others = {}, []
    for d in decodings:
        if last.setdefault((d.method, d.kind), d) is not d:
            others.append(d)
    return list(last.values()), others


def _shown(name: str) -> str:
    """A file's name, with a mark for each byte that is not UTF-8."""
    return os.fsencode(name).decode("utf8", "replace")


def _method_folders(exp: Path) -> List[Path]:
    folders = [*exp.glob("*"), *(exp / "streaming").glob("*")]
    return sorted(p for p in folders if p.is_dir())


def _logs_of(folder: Path) -> Dict[str, List[Tuple[str, Path]]]:
    """Dates and logs by suffix, the newest first."""
    found: Dict[str, List[Tuple[str, Path]]] = {}
    for path in folder.glob("log-decode-*"):
        match = _LOG.fullmatch(_shown(path.name))
        if match:
            found.setdefault(match[1], []).append((match[2], path))
    return {suffix: sorted(logs, reverse=True) for suffix, logs in found.items()}


def _read_logs(logs: List[Tuple[str, Path]]) -> Log:
    """The newest log, with the sets that older ones alone decoded under the same."""
    found, *older = (_read_log(*log) for log in logs)
    for log in older:
        if (log.device, log.max_duration) == (found.device, found.max_duration):
            found.seconds = {**log.seconds, **found.seconds}
            found.skipped += log.skipped
    return found


def _mtime(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d-%H-%M-%S")


def _read_summary(path: Path) -> List[Tuple[str, float]]:
    found = []
    lines = path.read_text("utf8", errors="replace").splitlines()
    for line in lines[1:]:
        name, tab, value = line.rpartition("\t")
        try:
            found.append((name, float(value)))
        except ValueError:
            found = []
            break
    if not found:
        raise KDError(
            f"{path} holds no error rate, and a line `settings<TAB>rate` is looked for "
            "behind its heading: decode again, or remove it"
        )
    return found


def _without_setting(head: str, settings: List[str]) -> str:
    """The set's name where the name of a setting may stand behind it."""
    for name in sorted(settings, key=len, reverse=True):
        for joint in "-_":
            if head.endswith(joint + name) and len(head) > len(name) + 1:
                return head[: -len(name) - 1]
    return head


def _add_errs(here: Dict[Tuple[str, str], Decoding], method: str, folder: Path) -> None:
    """Take the rates of errs files; of several settings, that of the last one."""
    for path in sorted(folder.glob("errs-*.txt"), key=lambda p: (_mtime(p), p)):
        name = _ERRS.fullmatch(_shown(path.name))
        parts = name and _SUFFIX.match(name[1])
        with open(path, encoding="utf8", errors="replace") as f:
            rate = _RATE.match(f.readline())
        if parts is None or rate is None:
            continue
        key = ("wer", parts[2])
        decoding = here.setdefault(key, Decoding(method, *key))
        test_set = _without_setting(parts[1], [_shown(folder.name)])
        decoding.rates[test_set] = Rate(float(rate[1]), _shown(folder.name))
        decoding.date = _mtime(path)


def _read_log(date: str, path: Path) -> Log:
    found = Log(date)
    begin = end = None
    for time, message in records(path):
        if time is None:
            found.skipped += 1
            continue
        for name, value in settings_of(message).items():
            if name == "max_duration":
                found.max_duration = value
            if name == "device":
                found.device = str(value)
        if message.startswith("Device: "):
            found.device = message[8:].strip()
        found.parameters = parameters_of(message) or found.parameters
        if message.startswith(_BEFORE):
            begin = time
        elif message.startswith("The transcripts are stored in") and end is None:
            # The settings of a method are searched together, and stored one by one.
            end = begin and (time - begin).total_seconds()
        elif match := _SET_DONE.match(message):
            if end is not None:
                found.seconds[match[1]] = end
            begin, end = time, None
        elif (match := _SCORED.match(message)) and end is None and begin:
            found.seconds[match[1]] = (time - begin).total_seconds()
            begin = time
    return found

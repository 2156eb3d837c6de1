"""Reads word and character error rates, and the logs of decoding."""

import glob
import json
import os
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple

from icefall_kd.errors import require
from icefall_kd.report.logs import (
    DATE,
    parse_num_parameters,
    parse_params,
    read_entries,
)

_SUMMARY = re.compile(r"(wer|cer)-summary[-_](.+)\.txt")
_ERRS = re.compile(r"errs-(.+)\.txt")
# A set's name and the suffix after it may contain hyphens; this begins the suffix.
_SUFFIX = re.compile(r"^(.+?)[-_]((?:epoch|iter)-\d+[-_]avg-\d+.*)$")
_NUMBER = re.compile(r"(epoch|iter)-(\d+)[-_]avg-(\d+)[-_]*")
_LOG = re.compile(rf"log-decode-(.+)-({DATE})(?:-\d+)?")
_RATE = re.compile(r"%[WC]ER\s*=?\s*(\d+\.?\d*)")
_SCORED = re.compile(r"\[(.+)\] %[WC]ER ")
_SET_DONE = re.compile(r"\s*For (.+), [WC]ER of different settings are:")
_READY = ("Number of model parameters", "About to get", "Wrote detailed error stats")


@dataclass(frozen=True)
class ErrorRate:
    """An error rate of one test set.

    Args:
      percent: The rate of the best setting, the first one of icefall's summary.
      setting: The name of that setting.
      settings: The number of settings.
    """

    percent: float
    setting: str
    settings: int = 1


@dataclass
class DecodingLog:
    """The log of a decoding script.

    Args:
      date: The date in its name.
      seconds: The time of decoding each test set.
      device: Such as cuda:0; "" if the log has none.
      max_duration: Seconds of audio in a batch, or None.
      parameters: The number of the model's parameters, or None.
      skipped: The number of entries with an impossible date, which are left out.
    """

    date: str
    seconds: Dict[str, float] = field(default_factory=dict)
    device: str = ""
    max_duration: Optional[float] = None
    parameters: Optional[int] = None
    skipped: int = 0


@dataclass
class Decoding:
    """The results of one model's checkpoint and one decoding method.

    Args:
      method: The folder in the experiment folder, such as ``greedy_search``.
      kind: ``cer`` for a cer-summary, else ``wer``.
      suffix: The end of icefall's file names, with checkpoint and options.
      rates: The error rate of each test set.
      date: The date of its newest log, or of its files.
      log: Its logs, or None.
      folder: The folder of its files.
    """

    method: str
    kind: str
    suffix: str
    rates: Dict[str, ErrorRate] = field(default_factory=dict)
    date: str = ""
    log: Optional[DecodingLog] = None
    folder: Path = Path()

    @property
    def order(self) -> Tuple[bool, int, str]:
        """A sorting key that rises with the training; epochs follow iterations."""
        kind, number, _ = self._numbers()
        return kind == "epoch", number, self.date

    @property
    def checkpoint(self) -> str:
        """Such as ``epoch 30, avg 9``."""
        kind, number, avg = self._numbers()
        return f"{kind} {number}, avg {avg}"

    @property
    def options(self) -> str:
        """The rest of the suffix: the options of decoding."""
        return _NUMBER.sub("", self.suffix, count=1).strip("-_")

    @property
    def saved_as(self) -> str:
        """The name of the last checkpoint that was averaged, such as ``epoch-30``."""
        kind, number, _ = self._numbers()
        return f"{'epoch' if kind == 'epoch' else 'checkpoint'}-{number}"

    def transcripts(self, test_set: str) -> Optional[Path]:
        """The file with the transcripts of a test set, by its best setting, or None.

        Where several settings are searched, some recipes keep only the transcripts of
        the last one, in a file whose name has no setting.

        Args:
          test_set: Its name.
        """
        rate = self.rates[test_set]
        heads = [f"{test_set}-{rate.setting}", f"{test_set}_{rate.setting}"]
        if rate.settings == 1:
            heads.append(test_set)
        paths = {}
        for path in sorted(self.folder.glob("recogs-*.txt")):
            parts = _SUFFIX.match(_printable(path.stem)[len("recogs-") :])
            if parts and parts[2] == self.suffix:
                paths[parts[1]] = path
        return next((paths[head] for head in heads if head in paths), None)

    def _numbers(self) -> Tuple[str, int, int]:
        match = _NUMBER.match(self.suffix)
        return match[1], int(match[2]), int(match[3])


def read_decodings(exp: Path) -> List[Decoding]:
    """Read all decodings of an experiment folder, the last of each method first.

    Args:
      exp: The experiment folder of decode.py.

    Raises:
      KDError: a summary without a result.
    """
    decodings: List[Decoding] = []
    folders = [*exp.glob("*"), *(exp / "streaming").glob("*")]
    for folder in sorted(path for path in folders if path.is_dir()):
        method = _printable(folder.relative_to(exp).as_posix())
        results = _read_summaries(folder, method) or _read_errs(folder, method)
        logs = _logs_of(folder)
        for decoding in results:
            decoding.folder = folder
            if decoding.suffix in logs:
                decoding.log = _read_logs(logs[decoding.suffix])
            measured = _read_measured(folder, decoding.suffix)
            if measured and (decoding.log is None or decoding.log.date < measured.date):
                decoding.log = measured
            if decoding.log:
                decoding.date = decoding.log.date
        decodings += results
    decodings.sort(key=lambda d: d.order, reverse=True)
    return sorted(decodings, key=lambda d: (d.method, d.kind))


def split_last(decodings: List[Decoding]) -> Tuple[List[Decoding], List[Decoding]]:
    """The last decoding of each method, and all earlier ones.

    Args:
      decodings: Those of one model, as :func:`read_decodings` returns them.
    """
    last, earlier = {}, []
    for decoding in decodings:
        key = (decoding.method, decoding.kind)
        if last.setdefault(key, decoding) is not decoding:
            earlier.append(decoding)
    return list(last.values()), earlier


def _printable(name: str) -> str:
    """A file's name, with a mark for each byte that is not UTF-8."""
    return os.fsencode(name).decode("utf8", "replace")


def _oldest_first(paths: Iterable[Path]) -> List[Path]:
    return sorted(paths, key=lambda path: (_mtime(path), path))


def _logs_of(folder: Path) -> Dict[str, List[Tuple[str, Path]]]:
    """Dates and logs by suffix, the newest first."""
    logs: Dict[str, List[Tuple[str, Path]]] = {}
    for path in folder.glob("log-decode-*"):
        match = _LOG.fullmatch(_printable(path.name))
        if match:
            logs.setdefault(match[1], []).append((match[2], path))
    return {suffix: sorted(paths, reverse=True) for suffix, paths in logs.items()}


def _read_logs(logs: List[Tuple[str, Path]]) -> DecodingLog:
    """The newest log, with the sets that only older ones of the same device have."""
    newest, *older = (_read_log(*log) for log in logs)
    for log in older:
        if (log.device, log.max_duration) == (newest.device, newest.max_duration):
            newest.seconds = {**log.seconds, **newest.seconds}
            newest.skipped += log.skipped
    return newest


def _read_measured(folder: Path, suffix: str) -> Optional[DecodingLog]:
    """What `icefall-kd decode` measured, of the sets that were decoded as the newest.

    It writes a file for each set. One that is damaged is left out.
    """
    found: List[DecodingLog] = []
    for path in folder.glob(f"decoding-*-{glob.escape(suffix)}.json"):
        try:
            values = json.loads(path.read_text("utf8"))
            seconds = values["seconds"]["encoder"] + values["seconds"]["search"]
            log = DecodingLog(
                values["date"],
                {values["set"]: seconds},
                values["device"],
                values["max_duration"],
                values["parameters"],
            )
        except (ValueError, LookupError, TypeError):
            continue
        found.append(log)
    if not found:
        return None
    newest, *older = sorted(found, key=lambda log: log.date, reverse=True)
    for log in older:
        if (log.device, log.max_duration) == (newest.device, newest.max_duration):
            newest.seconds = {**log.seconds, **newest.seconds}
    return newest


def _mtime(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d-%H-%M-%S")


def _read_summaries(folder: Path, method: str) -> List[Decoding]:
    """Read the summaries of error rates; the newest one of a set counts."""
    decodings: Dict[Tuple[str, str], Decoding] = {}
    summaries = [p for p in folder.iterdir() if _SUMMARY.fullmatch(_printable(p.name))]
    for path in _oldest_first(summaries):
        match = _SUMMARY.fullmatch(_printable(path.name))
        rates = _read_summary(path)
        parts = _SUFFIX.match(match[2])
        if parts is None:
            continue
        key = (match[1], parts[2])
        decoding = decodings.setdefault(key, Decoding(method, *key))
        test_set = _without_setting(parts[1], [name for name, _ in rates])
        setting, percent = rates[0]
        decoding.rates[test_set] = ErrorRate(percent, setting, len(rates))
        decoding.date = _mtime(path)
    return list(decodings.values())


def _read_summary(path: Path) -> List[Tuple[str, float]]:
    """The settings and error rates of a summary, the best first."""
    rates = []
    lines = path.read_text("utf8", errors="replace").splitlines()
    for line in lines[1:]:
        name, tab, value = line.rpartition("\t")
        try:
            rates.append((name, float(value)))
        except ValueError:
            rates = []
            break
    require(
        rates,
        f"{path} holds no error rate, and a line `settings<TAB>rate` is looked for "
        "after its heading: decode again, or remove it",
    )
    return rates


def _without_setting(head: str, settings: List[str]) -> str:
    """The set's name, of a text that may end with the name of a setting."""
    for name in sorted(settings, key=len, reverse=True):
        if len(head) > len(name) + 1 and head.endswith((f"-{name}", f"_{name}")):
            return head[: -len(name) - 1]
    return head


def _read_errs(folder: Path, method: str) -> List[Decoding]:
    """Read errs files, for a folder without summaries; of a set, the newest counts."""
    decodings: Dict[str, Decoding] = {}
    setting = _printable(folder.name)
    for path in _oldest_first(folder.glob("errs-*.txt")):
        name = _ERRS.fullmatch(_printable(path.name))
        parts = name and _SUFFIX.match(name[1])
        with open(path, encoding="utf8", errors="replace") as f:
            rate = _RATE.match(f.readline())
        if parts is None or rate is None:
            continue
        suffix = parts[2]
        decoding = decodings.setdefault(suffix, Decoding(method, "wer", suffix))
        test_set = _without_setting(parts[1], [setting])
        decoding.rates[test_set] = ErrorRate(float(rate[1]), setting)
        decoding.date = _mtime(path)
    return list(decodings.values())


def _read_log(date: str, path: Path) -> DecodingLog:
    """Read one log. A set's time begins when the model is ready, or the set before."""
    log = DecodingLog(date)
    begin = seconds = None
    for time, message in read_entries(path):
        if time is None:
            log.skipped += 1
            continue
        params = parse_params(message)
        log.max_duration = params.get("max_duration", log.max_duration)
        log.device = str(params.get("device", log.device))
        if message.startswith("Device: "):
            log.device = message[8:].strip()
        log.parameters = parse_num_parameters(message) or log.parameters
        if message.startswith(_READY):
            begin = time
        elif message.startswith("The transcripts are stored in") and seconds is None:
            # The settings of a method are searched together, and stored one by one.
            seconds = begin and (time - begin).total_seconds()
        elif match := _SET_DONE.match(message):
            if seconds is not None:
                log.seconds[match[1]] = seconds
            begin, seconds = time, None
        elif (match := _SCORED.match(message)) and seconds is None and begin:
            log.seconds[match[1]] = (time - begin).total_seconds()
            begin = time
    return log

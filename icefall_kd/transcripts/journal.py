"""What was found in each batch, in a file that grows and survives ``kill -9``."""

import json
import logging
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Tuple

from icefall_kd.errors import KDError, disk_errors
from icefall_kd.files import lock_file


class Journal:
    """The results of a decoding, a line for each batch.

    The first line is the header: what the results depend on. A process that is killed
    leaves half a line at most, which the next one cuts off.

    Args:
      path: The file. Its folder is made.
      header: What the results depend on. A file with another header is begun anew.
      overwrite: Whether to begin anew in any case.
      keep: Whether ``batches`` and ``utterances`` hold what is in the file; else they
        stay empty, and memory does not grow.
      remedy: What the user can do where another process writes the file.

    Raises:
      KDError: another process writes the file, or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        header: Dict[str, Any],
        overwrite: bool = False,
        keep: bool = True,
        remedy: str = "give another --res-dir",
    ) -> None:
        self.path, self.header, self.keep = path, header, keep
        self.batches: List[Dict[str, Any]] = []
        self.utterances: Dict[str, Dict[str, Any]] = {}
        self.num_batches = self.num_utterances = 0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")
        lock_file(self._file, remedy)
        self._file.seek(0)
        lines = whole_lines(self._file)
        first, end = next(lines, (None, 0))
        if first is not None and not overwrite and first != header:
            logging.warning(
                f"{path} is of another model, manifest or other options, and is begun "
                "anew"
            )
        if overwrite or first != header:
            self._file.truncate(0)
            self._write(header)
            return
        for batch, end in lines:  # noqa: B007
            self._add(batch)
        self._file.truncate(end)

    def append(self, batch: Dict[str, Any]) -> None:
        """Add a batch.

        Args:
          batch: ``utterances``, a list of dictionaries with an ``id`` each, and more.

        Raises:
          KDError: the disk is full. The batches before are kept, here and in the file.
        """
        self._write(batch)
        self._add(batch)

    def _add(self, batch: Dict[str, Any]) -> None:
        self.num_batches += 1
        self.num_utterances += len(batch["utterances"])
        if self.keep:
            self.batches.append(batch)
            self.utterances.update({u["id"]: u for u in batch["utterances"]})

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:
            pass  # of a full disk; what counts was flushed

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def _write(self, value: Dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False).encode("utf8") + b"\n"
        with disk_errors(self.path, range(self.num_utterances)):
            self._file.write(line)
            self._file.flush()


def read_journal(path: Path) -> List[Dict[str, Any]]:
    """Read the header and the batches of a decoding.

    Args:
      path: The file of a :class:`Journal`.

    Raises:
      KDError: no such file, or another one.
    """
    try:
        with open(path, "rb") as f:
            lines = [value for value, _ in whole_lines(f)]
    except OSError as e:
        raise KDError(
            f"{path} can't be read ({e.strerror}): give a file utterances-*.jsonl of "
            "`icefall-kd decode`"
        ) from None
    if not lines or "decoding" not in lines[0]:
        raise KDError(
            f"{path} is no list of decoded utterances: give a file utterances-*.jsonl "
            "of `icefall-kd decode`"
        )
    return lines


def whole_lines(file: BinaryIO) -> Iterator[Tuple[Dict[str, Any], int]]:
    """Read a journal line by line: its header, then its batches.

    Args:
      file: The open file, at its beginning.

    Yields:
      The dictionary of each whole line, up to a damaged one, and the line's end.
    """
    end = 0
    for number, line in enumerate(file):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        if not isinstance(value, dict) or (number and "utterances" not in value):
            break
        end += len(line)
        yield value, end

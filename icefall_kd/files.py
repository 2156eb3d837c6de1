"""Files that are there whole or not at all."""

import os
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator
from uuid import uuid4


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place if all goes well.

    Args:
      path: In a folder that exists.
      shared: Several processes, on several machines perhaps, may write it at once.
    """
    temporary = own_name(path) if shared else path.with_name(f".tmp.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def own_name(path: Path) -> Path:
    """A hidden name beside ``path`` that nobody else uses.

    It tells machine and process, so that what a process left that was killed is known
    and removed by the next one that asks for a name beside ``path``.
    """
    begin, end = f".tmp.{socket.gethostname()}.", f".{path.name}"
    for name in os.listdir(path.parent):
        if name.startswith(begin) and name.endswith(end):
            process = name[len(begin) : -len(end)].partition(".")[0]
            if process.isdigit() and not _lives(int(process)):
                _remove(path.with_name(name))
    return path.with_name(f"{begin}{os.getpid()}.{uuid4().hex[:8]}{end}")


def _lives(process: int) -> bool:
    if os.name == "nt":  # where os.kill() ends a process whatever the signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def _remove(path: Path) -> None:
    """Remove a file or a folder, which another process may do at the same time."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

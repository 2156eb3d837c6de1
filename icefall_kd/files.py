"""Files that are written completely or not at all, and their encoding."""

import codecs
import errno
import locale
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator, List, Sequence, Union
from uuid import uuid4

from icefall_kd.errors import KDError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

CAN_LOCK = fcntl is not None
MANIFEST = (".jsonl.gz", ".jsonl")  # what Lhotse reads line by line


def check_new_file(path: str, name: str, suffixes: Sequence[str] = ()) -> None:
    """Refuse a path that no file can be written to, before the work for it begins.

    Args:
      path: The path as the user gave it.
      name: The argument or option that gave it, such as OUT_CUTS.
      suffixes: The endings of which its name must have one; none: any name will do.

    Raises:
      KDError: the path is empty, a folder, below a file, or ends otherwise.
    """
    remedy = "give it the name of a file"
    if suffixes:
        remedy += f" that ends with {' or '.join(suffixes)}"
    if not path:
        raise KDError(f"{name} is empty: {remedy}")
    if path.endswith("/") or Path(path).is_dir():
        raise KDError(f"{name} is the folder {path}: {remedy}")
    stem = Path(path).name
    if suffixes and not any(stem.endswith(x) and stem != x for x in suffixes):
        raise KDError(f"{name} is {path}: {remedy}, so that Lhotse can read it")
    check_new_folder(str(Path(path).parent), f"the folder of {name}")


def check_new_folder(path: str, name: str) -> None:
    """Refuse a path that can't become a folder, as it or one above it is a file.

    Args:
      path: The path as the user gave it.
      name: The argument or option that gave it, such as --storage-dir.

    Raises:
      KDError: a part of the path is a file.
    """
    for folder in (Path(path), *Path(path).parents):
        if folder.exists():
            if not folder.is_dir():
                raise KDError(f"{name} is {path}, and {folder} is a file: give another")
            return


def is_same_folder(a: Union[str, Path], b: Union[str, Path]) -> bool:
    """Whether paths ``a`` and ``b``, relative or not, name the same folder.

    The folder need not exist.
    """
    try:
        return Path(a) == Path(b) or Path(a).resolve() == Path(b).resolve()
    except (ValueError, OSError):  # a name that no file can have
        return False


def missing_folders(path: Path) -> List[Path]:
    """The folders that ``path.mkdir(parents=True)`` would create, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


@contextmanager
def making_folder(folder: Path) -> Iterator[None]:
    """Make a folder; what was made and is empty is removed again if the block fails.

    Args:
      folder: The folder, with those above it.
    """
    made = missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary file's path; it replaces ``path`` if the block succeeds.

    Args:
      path: The file to write, in a folder that exists.
      shared: Whether several processes, also of several machines, may write it at
        once.
    """
    temporary = temporary_name(path) if shared else path.with_name(f".tmp.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lock_file(file: BinaryIO, remedy: str) -> None:
    """Keep other processes that lock a file out, where its file system can.

    The lock ends when the file is closed, at the latest with this process.

    Args:
      file: Open for writing; closed where it is refused.
      remedy: What the user can do but wait.

    Raises:
      KDError: another process has locked the file.
    """
    if fcntl is None:
        return
    try:
        # Not flock(): a killed run's data loading workers would hold it on.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            return  # a file system without locks
        file.close()
        raise KDError(
            f"{file.name} is being written by another process: wait for it, or {remedy}"
        ) from None


def temporary_name(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process uses.

    The name contains machine and process id. So files that a killed process left are
    recognised, and removed by the next call for the same ``path``.
    """
    begin, end = f".tmp.{socket.gethostname()}.", f".{path.name}"
    for name in os.listdir(path.parent):
        if name.startswith(begin) and name.endswith(end):
            process = name[len(begin) : -len(end)].partition(".")[0]
            if process.isdigit() and not _is_running(int(process)):
                _remove(path.with_name(name))
    return path.with_name(f"{begin}{os.getpid()}.{uuid4().hex[:8]}{end}")


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where os.kill() ends a process whatever the signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # the process of another user
    return True


def _remove(path: Path) -> None:
    """Remove a file or a folder, which another process may do at the same time."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def text_encoding() -> str:
    """The encoding that Python's ``open`` uses by default."""
    return codecs.lookup(locale.getpreferredencoding(False)).name


def run_in_utf8() -> None:
    """Restart this program in Python's UTF-8 mode if the locale's encoding differs.

    Lhotse opens its manifests, which are UTF-8, in the locale's encoding. Printed text
    keeps that encoding, as the terminal expects.
    """
    if text_encoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    printed = f"{sys.stdout.encoding}:backslashreplace"
    env = {"PYTHONIOENCODING": printed, **os.environ, "PYTHONUTF8": "1"}
    command = [sys.executable, *sys.orig_argv[1:]]
    if os.name == "nt":  # where another process can't take this one's place
        raise SystemExit(subprocess.run(command, env=env).returncode)
    os.execve(sys.executable, command, env)

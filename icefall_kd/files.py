"""Files that are there whole or not at all, and their encoding."""

import codecs
import locale
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Sequence, Union
from uuid import uuid4

from icefall_kd.errors import KDError

MANIFEST = (".jsonl.gz", ".jsonl")  # what Lhotse reads line by line


def check_new_file(path: str, name: str, suffixes: Sequence[str] = ()) -> None:
    """Refuse a path that no file can be written to, before the work for it begins.

    Args:
      path: As the user gave it.
      name: What the user knows it by, such as OUT_CUTS.
      suffixes: One of which its name must have; none: any name will do.
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
    """Refuse a path that no folder can be made at: it, or one above it, is a file."""
    for folder in (Path(path), *Path(path).parents):
        if folder.exists():
            if not folder.is_dir():
                raise KDError(f"{name} is {path}, and {folder} is a file: give another")
            return


def is_same_folder(a: Union[str, Path], b: Union[str, Path]) -> bool:
    """Whether two paths are of one folder, be it there or not, or one relative."""
    try:
        return Path(a) == Path(b) or Path(a).resolve() == Path(b).resolve()
    except (ValueError, OSError):  # a name that no file can have
        return False


def missing_folders(path: Path) -> List[Path]:
    """The folders that ``path.mkdir(parents=True)`` would make, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


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


def text_encoding() -> str:
    """How Python reads a text file that does not say its encoding."""
    return codecs.lookup(locale.getpreferredencoding(False)).name


def run_in_utf8() -> None:
    """Begin this program anew in Python's UTF-8 mode, where the locale is another.

    Lhotse opens its manifests, which are UTF-8, by the locale's encoding. What is
    printed keeps that encoding, as the terminal expects.
    """
    if text_encoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    printed = f"{sys.stdout.encoding}:backslashreplace"
    env = {"PYTHONIOENCODING": printed, **os.environ, "PYTHONUTF8": "1"}
    command = [sys.executable, *sys.orig_argv[1:]]
    if os.name == "nt":  # where another process can't take this one's place
        raise SystemExit(subprocess.run(command, env=env).returncode)
    os.execve(sys.executable, command, env)

"""Files that are there whole or not at all, and their encoding."""

import codecs
import locale
import os
import subprocess
import sys
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
    name = f"{uuid4().hex}.{path.name}" if shared else path.name
    temporary = path.with_name(f".tmp.{name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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

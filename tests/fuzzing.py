"""Programs that are given values which they can't use, and what they may do then.

A program that refuses ends with status 1 or 2 and one sentence, and leaves every file
as it was.
"""

import io
import os
import re
import signal
import sys
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, Sequence

NOT_UTF8 = os.fsdecode(b"\xe9t\xe9")
SECONDS = 300  # none of the cases takes one, on a machine that has time for it
# For an option, whatever it takes.
BAD_VALUES = (
    "",
    " ",
    "x",
    "nan",
    "inf",
    "0",
    "-1",
    "-0.5",
    "1.5",
    "1e400",
    "2147483648",
    "1" + 20 * "0",
    "9" * 5000,
    "x" * 300,
    "a,b",
    ",",
    ":",
    "a\nb",
    NOT_UTF8,
    ".",
    "a-folder",
    "a-file",
    "a-file/x",
    "no/such/file",
)
# What is no sentence: bars of progress, and warnings that say what goes on.
_BESIDE = re.compile(
    r"([A-Z][a-z' ]+: +\d+(%| (cuts|vectors|steps|batches|shards)).*|.*Warning: .*|"
    r"  warnings\..*|\d+ cuts have their targets already)?"
)
_TYPE = re.compile(r"\W*\w*(Error|Exception|Warning)\b")


class Hang(BaseException):
    """Raised in a case that takes longer than SECONDS."""


@dataclass
class Run:
    """How a program ended.

    Args:
      fault: What is wrong with that, whatever it was asked; "" for nothing.
    """

    status: int
    out: str
    err: str
    fault: str = ""


@contextmanager
def bounded(seconds: int = SECONDS) -> Iterator[None]:
    """Raise :class:`Hang` in what takes longer, and refuse new processes."""

    def hang(*_):
        raise Hang

    def fork():
        raise AssertionError("a process was started")

    before, forks = signal.signal(signal.SIGALRM, hang), os.fork
    os.fork = fork
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.fork = forks


def run(main: Callable[[], None]) -> Run:
    """Run a program that ends by SystemExit, or not, with streams as in a terminal."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf8", errors="backslashreplace")
    status, fault = 0, ""
    with redirect_stdout(out), redirect_stderr(err), bounded():
        try:
            main()
        except SystemExit as e:
            status = e.code or 0
        except Hang:
            fault = f"not done after {SECONDS} s"
        except BaseException as e:
            place = traceback.extract_tb(e.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            fault = f"a traceback: {type(e).__name__}: {str(e)[:200]} ({where})"
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Run(status, *texts, fault)


def check_refusal(done: Run, statuses: Sequence[int] = (1, 2)) -> str:
    """What is wrong with a refusal; "" for nothing."""
    if done.fault:
        return done.fault
    if done.status not in statuses:
        return f"status {done.status}"
    lines = [line.rsplit("\r", 1)[-1] for line in done.err.split("\n")]
    lines = [line for line in lines if not _BESIDE.fullmatch(line)]
    if lines and lines[0].lower().startswith("usage: "):  # click's and argparse's form
        errors = [i for i, line in enumerate(lines) if "rror: " in line]
        lines = lines[errors[0] :] if errors else lines
    if len(lines) != 1:
        return f"not one sentence but {len(lines)}: {lines!r}"
    name, _, sentence = lines[0].partition("rror: ")
    if not sentence or "Traceback" in done.err:
        return f"no sentence: {lines[0]!r}"
    if _TYPE.match(sentence):
        return f"an exception's name in place of a sentence: {lines[0]!r}"
    return ""


def tree(*folders: Path) -> Dict[str, tuple]:
    """What lies below folders: small files' bytes, large ones' sizes and times."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            status = path.lstat()
            seen = (status.st_mode, status.st_size)
            if path.is_symlink():
                seen += (os.readlink(path),)
            elif path.is_file() and status.st_size < 50_000:
                seen += (path.read_bytes(),)
            elif path.is_file():
                seen += (status.st_mtime_ns, status.st_ino)
            found[str(path)] = seen
    return found


def changes(before: Dict[str, tuple], after: Dict[str, tuple]) -> str:
    """The files that are new, lost or changed; "" for none."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return ", ".join(sorted(os.fsencode(n).decode("utf8", "replace") for n in names))


@contextmanager
def command_line(*words: str) -> Iterator[None]:
    """These words as the process's own."""
    before = sys.argv
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv = before

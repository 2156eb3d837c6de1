"""A refusal: one sentence that names the thing, both values and the remedy."""

import sys
from contextlib import contextmanager
from typing import Iterator


class KDError(ValueError):
    """What the user gave can't be used; the message is one whole sentence."""

    @property
    def sentence(self) -> str:
        # A DataLoader worker puts its traceback before the message.
        sentence = str(self).strip().rsplit("KDError: ", 1)[-1]
        return " ".join(sentence.splitlines())  # a file's name may hold line breaks


class NotFiniteError(KDError):
    """Numbers of one batch are inf or NaN; the next batch may be well again."""


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _report(error: KDError) -> None:
    print(f"icefall_kd: error: {error.sentence}", file=sys.stderr)


def install_excepthook() -> None:
    """Let an uncaught :class:`KDError` end the program with its sentence alone.

    Python's exit status stays 1; every other exception is shown as before.
    """
    before = sys.excepthook
    if getattr(before, "icefall_kd", False):
        return

    def hook(kind, error, traceback):
        if isinstance(error, KDError):
            _report(error)
        elif kind.__name__ == "ProcessRaisedException" and "KDError: " in str(error):
            _report(KDError(str(error)))
        else:
            before(kind, error, traceback)

    hook.icefall_kd = True
    sys.excepthook = hook


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what a failed disk or an impossible path raises into a :class:`KDError`."""
    try:
        yield
    except OSError as e:
        place = f" ({e.filename})" if e.filename else ""
        raise KDError(
            f"{e.strerror or e}{place}: free space or mend the path, then retry"
        ) from None


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn a :class:`KDError`, or a failed disk, into one sentence and exit 1."""
    try:
        with disk_errors():
            yield
    except KDError as e:
        _report(e)
        raise SystemExit(1) from None

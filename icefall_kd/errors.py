"""A refusal: one sentence that names the thing, both values and the remedy."""

import re
import sys
from contextlib import contextmanager
from typing import Iterator, Mapping


class KDError(Exception):
    """What the user gave can't be used; the message is one whole sentence.

    Below the command line a message names a parameter in backticks, such as
    ```temperature```; :func:`with_flags` makes an option of it for those who gave one.
    """

    @property
    def sentence(self) -> str:
        # A DataLoader worker puts its traceback before the message.
        sentence = str(self).strip().rsplit("KDError: ", 1)[-1]
        return " ".join(sentence.splitlines())  # a file's name may hold line breaks


def require(condition: object, message: str) -> None:
    """Raise :class:`KDError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise KDError(message)


def with_flags(sentence: str, flags: Mapping[str, str]) -> str:
    """Name options in place of parameters.

    Args:
      sentence: An error's, with its parameters in backticks.
      flags: The option of each parameter that the user could have given, such as
        ``{"s_range": "--s-range"}``. Other parameters stay as they are.

    Returns:
      The sentence, in which "`s_range` is 1" has become "--s-range is 1".
    """
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), sentence)


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

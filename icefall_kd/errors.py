"""A refusal: one sentence that names the thing, both values and the remedy."""

import errno
import re
import sys
from contextlib import contextmanager
from typing import Iterator, Mapping, Sized

# What a user can do about an operating system's error.
_REMEDIES = {
    "free space": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "mend the path": (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EINVAL,
    ),
    "give a path that you may read and write": (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ),
    "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "free memory": (errno.ENOMEM,),
}


class KDError(Exception):
    """The user's input can't be used; the message is one whole sentence.

    Below the command line a message names a parameter in backticks, such as
    ```temperature```; :func:`with_flags` makes an option of it for those who gave one.
    """

    @property
    def sentence(self) -> str:
        """The message on one line, without the traceback of a DataLoader worker."""
        sentence = str(self).strip().rsplit("KDError: ", 1)[-1]
        return " ".join(sentence.splitlines())  # a file's name may hold line breaks


def require(condition: object, message: str) -> None:
    """Raise :class:`KDError` with ``message`` unless ``condition`` is true.

    Args:
      condition: Any value, of which the truth counts.
      message: One sentence with the values and the remedy.
    """
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
    return re.sub(r"`([\w.]+)`", lambda match: flags.get(match[1], match[0]), sentence)


@contextmanager
def naming_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Let refusals of a block, or of a decorated function, name options.

    Args:
      flags: The option of each parameter, as in :func:`with_flags`.
    """
    try:
        yield
    except KDError as e:
        sentence = with_flags(str(e), flags)
        if sentence == str(e):
            raise
        raise type(e)(sentence) from None


class NotFiniteError(KDError):
    """Numbers of one batch are inf or NaN; those of the next may be finite again."""


def need_kaldialign() -> None:
    """Refuse to count errors without kaldialign.

    Raises:
      KDError: kaldialign can't be imported.
    """
    try:
        import kaldialign  # noqa: F401
    except ImportError as e:
        raise KDError(
            "the errors of each utterance are counted by kaldialign, which can't be "
            f'imported ({e}): run `pip install "icefall_kd[report]"`'
        ) from None


def first_line(error: BaseException) -> str:
    """The class of ``error`` and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _report(error: KDError) -> None:
    print(f"icefall_kd: error: {error.sentence}", file=sys.stderr)


def install_excepthook(flags: Mapping[str, str] = {}) -> None:
    """Let an uncaught :class:`KDError` end the program with its sentence alone.

    Python's exit status stays 1; every other exception goes to the hook before.

    Args:
      flags: The option of each parameter, as in :func:`with_flags`.
    """
    before = sys.excepthook
    if getattr(before, "icefall_kd", False):
        return

    def hook(kind, error, traceback):
        is_of_process = kind.__name__ == "ProcessRaisedException"
        if isinstance(error, KDError) or (is_of_process and "KDError: " in str(error)):
            _report(KDError(with_flags(str(error), flags)))
        else:
            before(kind, error, traceback)

    hook.icefall_kd = True
    sys.excepthook = hook


def remedy_for(error: OSError) -> str:
    """What the user can do about ``error``, by its errno."""
    for remedy, numbers in _REMEDIES.items():
        if error.errno in numbers:
            return remedy
    return "free space or mend the path"


@contextmanager
def disk_errors(place: object = "", kept: Sized = ()) -> Iterator[None]:
    """Turn an OSError, of a full disk or an impossible path, into a KDError.

    Args:
      place: The file or folder that is written, for errors that name none.
      kept: The cuts that are done and stay so, counted at the error.
    """
    try:
        yield
    except OSError as e:
        named = e.filename or place
        where = f" ({named})" if named else ""
        cuts = "1 cut, which is" if len(kept) == 1 else f"{len(kept)} cuts, which are"
        done = f" after {cuts} kept" if len(kept) else ""
        raise KDError(
            f"{e.strerror or e}{where}{done}: {remedy_for(e)}, then retry"
        ) from None


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn a KDError or an OSError into one sentence on stderr and exit status 1."""
    try:
        with disk_errors():
            yield
    except KDError as e:
        _report(e)
        raise SystemExit(1) from None

"""What a long command says before it begins: how much there is to do, and to store."""

import shutil
from pathlib import Path
from typing import Union

import click


def begin(sentence: str) -> None:
    """Print what a command will do, beside the progress bar that comes next.

    Args:
      sentence: Its words; what the command finds goes to the standard output.
    """
    click.echo(sentence, err=True)


def speech(cuts: int, seconds: float) -> str:
    """An amount of speech, such as "96 cuts, 3.8 min of audio".

    Args:
      cuts: The number of cuts.
      seconds: Their durations' sum.
    """
    unit, factor = "s", 1
    if seconds >= 60:
        unit, factor = ("h", 3600) if seconds >= 3600 else ("min", 60)
    text = f"{seconds / factor:,.1f} {unit}"
    return f"{cuts:,} cuts, {text} of audio"


def size_of(count: float) -> str:
    """A number of bytes, such as "1.2 MB".

    Args:
      count: The bytes.
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def free_space(place: Union[str, Path]) -> str:
    """How much can be written to a folder, such as "54.1 GB".

    Args:
      place: The folder, or a file or a folder that will be made.
    """
    path = Path(place).absolute()
    while not path.exists():
        path = path.parent
    return size_of(shutil.disk_usage(path).free)

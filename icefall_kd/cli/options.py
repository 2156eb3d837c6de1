"""The kinds of values that options take, refused here where no command can use them.

A value that is refused ends the command before anything is read or written, by one
sentence with the option, the value and its bounds.
"""

import math
import reprlib
from typing import Any, Optional

import click

from icefall_kd.errors import KDError, naming_flags, one_sentence

# Bounds that no sensible use comes near, and beyond which a command would run out of
# memory or processes, or never end.
MOST_THREADS = 1024  # threads or processes of one machine
MOST_JOBS = 10_000
MOST_SEED = 2**32 - 1  # numpy's


class Command(click.Command):
    """A command whose refusals name its options in place of parameters."""

    def invoke(self, ctx: click.Context) -> Any:
        with naming_flags({param.name: _name_of(param) for param in self.params}):
            return super().invoke(ctx)


class Commands(click.Group):
    """The commands, each of whose refusals is one sentence, and exit status 1."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with one_sentence():
            return super().main(*args, **kwargs)


def _name_of(param: Optional[click.Parameter]) -> str:
    """What a user calls an option or an argument, such as --cuts or IN_CUTS."""
    if param is None:
        return "the value"
    is_option = isinstance(param, click.Option)
    return param.opts[0] if is_option else param.human_readable_name


def _refuse(param: Optional[click.Parameter], value: Any, must: str) -> None:
    """Refuse ``value``; ``must`` says what it must be, or what to do."""
    shown = str(value)
    if len(shown) > 30 or not shown.strip() or not shown.isprintable():
        shown = reprlib.repr(shown)
    raise KDError(f"{_name_of(param)} is {shown}, and must be {must}")


class Count(click.ParamType):
    """A whole number from ``least`` to ``most``."""

    name = "integer"

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def convert(
        self,
        value: Any,
        param: Optional[click.Parameter],
        ctx: Optional[click.Context],
    ) -> int:
        try:
            number = int(value)
        except ValueError:  # also of more digits than Python reads
            number = self.least - 1
        if not self.least <= number <= self.most:
            _refuse(param, value, f"a whole number from {self.least} to {self.most}")
        return number


class Number(click.ParamType):
    """A number above ``above`` and up to ``most``; neither NaN nor infinite."""

    name = "number"

    def __init__(self, above: float, most: float) -> None:
        self.above, self.most = above, most

    def convert(
        self,
        value: Any,
        param: Optional[click.Parameter],
        ctx: Optional[click.Context],
    ) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not self.above < number <= self.most:  # false for NaN too
            must = f"a number above {self.above} and up to {self.most}"
            _refuse(param, value, must)
        return number


class YesNo(click.types.BoolParamType):
    """true or false, yes or no, 1 or 0; an empty value is neither."""

    def convert(
        self,
        value: Any,
        param: Optional[click.Parameter],
        ctx: Optional[click.Context],
    ) -> bool:
        if isinstance(value, str) and not value.strip():
            _refuse(param, value, "true or false")
        return super().convert(value, param, ctx)


class Text(click.ParamType):
    """A text in UTF-8, which manifests, reports and messages can hold."""

    name = "text"

    def convert(
        self,
        value: Any,
        param: Optional[click.Parameter],
        ctx: Optional[click.Context],
    ) -> str:
        try:
            value.encode("utf8")
        except UnicodeEncodeError:  # bytes of the command line that are not
            _refuse(param, value, "in UTF-8: rename the file, or write it in UTF-8")
        return value


class Place(Text):
    """The path of a file or a folder.

    Args:
      optional: Whether "" may be given, for none.
    """

    name = "path"

    def __init__(self, optional: bool = False) -> None:
        self.optional = optional

    def convert(
        self,
        value: Any,
        param: Optional[click.Parameter],
        ctx: Optional[click.Context],
    ) -> str:
        if not value and not self.optional:
            raise KDError(f"{_name_of(param)} is empty: give it a file or a folder")
        return super().convert(value, param, ctx)

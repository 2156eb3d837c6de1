"""What all commands share: how they are found and refuse, and what their options take.

A value that is refused ends the command before anything is read or written, by one
sentence with the option, the value and its bounds.
"""

import importlib
import math
import reprlib
from functools import wraps
from typing import Any, Callable, Dict, List, Optional, Tuple

import click

from icefall_kd.errors import KDError, naming_flags, one_sentence

# Bounds that no sensible use comes near, and beyond which a command would run out of
# memory or processes, or never end.
MOST_THREADS = 1024  # threads or processes of one machine
MOST_JOBS = 10_000
MOST_SEED = 2**32 - 1  # numpy's
# Options that have another name now, by command and former name.
RENAMED: Dict[Tuple[str, str], str] = {
    ("dump", "--weights"): "--teacher-weights",
    ("quantizer", "--codes"): "--num-codebooks",
    ("shar", "--store"): "--storage-dir",
}
Param = Optional[click.Parameter]
Context = Optional[click.Context]


class Commands(click.Group):
    """Commands that are imported when they run; refusals are one sentence and status 1.

    Args:
      modules: For each command the module that has a function of its name, and the
        first sentence of its help.
      args: Those of :class:`click.Group`.
      kwargs: Those of :class:`click.Group`.
    """

    def __init__(
        self, *args: Any, modules: Dict[str, Tuple[str, str]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.modules = modules

    def list_commands(self, ctx: Context) -> List[str]:
        return sorted(self.modules)

    def get_command(self, ctx: Context, cmd_name: str) -> Optional[click.Command]:
        if cmd_name not in self.modules:
            return None
        module = importlib.import_module(self.modules[cmd_name][0])
        return getattr(module, cmd_name)

    def leaves(self) -> Dict[str, click.Command]:
        """All commands that do something, by their words, such as ``plot wer``."""
        leaves: Dict[str, click.Command] = {}
        for name in self.list_commands(None):
            found = self.get_command(None, name)
            if isinstance(found, Commands):
                inner = found.leaves().items()
                leaves.update((f"{name} {word}", leaf) for word, leaf in inner)
            else:
                leaves[name] = found
        return leaves

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        with formatter.section("Commands"):
            names = self.list_commands(ctx)
            formatter.write_dl([(name, self.modules[name][1]) for name in names])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with one_sentence():
            return super().main(*args, **kwargs)


class Command(click.Command):
    """A command whose refusals name its options in place of parameters.

    Args:
      example: Command lines with which its help ends, as a shell takes them.
      args: Those of :class:`click.Command`.
      kwargs: Those of :class:`click.Command`.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        for param in self.params:
            if param.default == "":  # a help shows no empty text as a default
                param.show_default = False

    @property
    def flags(self) -> Dict[str, str]:
        """The option or argument of each parameter."""
        return {param.name: _name_of(param) for param in self.params}

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.example:
            with formatter.section("Example"):
                for line in self.example.strip().splitlines():
                    formatter.write(f"{' ' * formatter.current_indent}{line}\n")

    def parse_args(self, ctx: click.Context, args: List[str]) -> List[str]:
        for word in args:
            option = word.partition("=")[0]
            if word == "--":
                break
            if (self.name, option) in RENAMED:
                name = RENAMED[self.name, option]
                raise KDError(f"{option} is called {name} now: give {name}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with naming_flags(self.flags):
            return super().invoke(ctx)


def command(**settings: Any) -> Callable:
    """Decorate a function as a command of ``icefall-kd``.

    Args:
      settings: Those of :func:`click.command`.
    """
    return click.command(cls=Command, **settings)


def _name_of(param: Param) -> str:
    """The name by which a user knows an option or an argument: --cuts, IN_CUTS."""
    if param is None:
        return "the value"
    is_option = isinstance(param, click.Option)
    return param.opts[0] if is_option else param.human_readable_name


def _refuse(param: Param, value: Any, remedy: str) -> None:
    """Refuse ``value``; ``remedy`` is what it must be."""
    text = str(value)
    if len(text) > 30 or not text.strip() or not text.isprintable():
        text = reprlib.repr(text)
    raise KDError(f"{_name_of(param)} is {text}, and must be {remedy}")


class Count(click.ParamType):
    """A whole number.

    Args:
      least: The least that is taken.
      most: The most that is taken.
    """

    name = "integer"

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: Param, ctx: Context) -> int:
        try:
            number = int(value)
        except ValueError:  # also of more digits than Python reads
            number = self.least - 1
        if not self.least <= number <= self.most:
            _refuse(param, value, f"a whole number from {self.least} to {self.most}")
        return number


class Number(click.ParamType):
    """A number, neither NaN nor infinite.

    Args:
      above: It must be above this.
      most: The most that is taken.
    """

    name = "number"

    def __init__(self, above: float, most: float) -> None:
        self.above, self.most = above, most

    def convert(self, value: Any, param: Param, ctx: Context) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not self.above < number <= self.most:  # false for NaN too
            remedy = f"a number above {self.above} and up to {self.most}"
            _refuse(param, value, remedy)
        return number


class YesNo(click.types.BoolParamType):
    """true or false, yes or no, 1 or 0; an empty value is neither."""

    def convert(self, value: Any, param: Param, ctx: Context) -> bool:
        if isinstance(value, str) and not value.strip():
            _refuse(param, value, "true or false")
        return super().convert(value, param, ctx)


class Text(click.ParamType):
    """A text in UTF-8, which manifests, reports and messages can hold."""

    name = "text"

    def convert(self, value: Any, param: Param, ctx: Context) -> str:
        try:
            value.encode("utf8")
        except UnicodeEncodeError:  # bytes of the command line that are not
            _refuse(param, value, "in UTF-8: rename the file, or write it in UTF-8")
        return value


class Place(click.Path):
    """The path of a file or a folder, which shells complete.

    What is there is checked by the command, whose refusal names the remedy.

    Args:
      optional: Whether "" may be given, for none.
    """

    def __init__(self, optional: bool = False) -> None:
        super().__init__(readable=False)
        self.optional = optional

    def convert(self, value: Any, param: Param, ctx: Context) -> str:
        if not value and not self.optional:
            raise KDError(f"{_name_of(param)} is empty: give it a file or a folder")
        return Text().convert(value, param, ctx)


# The fields of TeacherSpec, each by a parameter of its name.
_FIELDS = (
    *("recipe", "exp_dir", "epoch", "iteration", "avg"),
    *("use_averaged_model", "model_flags", "bpe_model"),
)
# For a command with teacher_options: MODEL FLAGS are options of train.py alone.
MODEL_FLAGS = {"ignore_unknown_options": True}


def _teacher_params(required: bool) -> List[Callable]:
    """The decorators of the options by which icefall's scripts name a model."""
    return [
        click.option(
            "--recipe",
            type=Place(),
            metavar="FOLDER",
            required=required,
            help="The folder of the teacher's train.py, such as ./zipformer.",
        ),
        click.option(
            "--exp-dir",
            type=Place(),
            metavar="FOLDER",
            required=required,
            help="The teacher's experiment folder, such as zipformer/exp. `dump` takes "
            "several teachers' folders, separated by commas.",
        ),
        click.option(
            "--epoch",
            type=Count(0, 10**6),
            default=0,
            metavar="N",
            help="Load epoch-N.pt.",
        ),
        click.option(
            "--iter",
            "iteration",
            type=Count(0, 10**9),
            default=0,
            metavar="N",
            help="Load checkpoint-N.pt instead of an epoch. 0: load the epoch.",
        ),
        click.option(
            "--avg",
            type=Count(1, 10_000),
            default=1,
            metavar="N",
            help="Average N checkpoints, the last of which --epoch or --iter names.",
        ),
        click.option(
            "--use-averaged-model",
            type=YesNo(),
            default=True,
            metavar="BOOL",
            help="Average over all steps between the first and the last checkpoint, as "
            "decode.py does. Give 0 for a checkpoint that has no model_avg.",
        ),
        click.option(
            "--bpe-model",
            "--lang-dir",
            "bpe_model",
            type=Place(optional=True),
            default="",
            metavar="PATH",
            help="The teacher's bpe.model, or the folder of its tokens.txt if its "
            "tokens are characters.",
        ),
        click.argument(
            "model_flags", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL FLAGS]..."
        ),
    ]


def teacher_options(required: bool = True) -> Callable:
    """Give a command the options that name a teacher.

    The function gets ``teacher``, a :class:`icefall_kd.teacher.spec.TeacherSpec`, in
    their place.

    Args:
      required: Whether --recipe and --exp-dir must be given.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(**values: Any) -> Any:
            from icefall_kd.teacher.spec import TeacherSpec

            fields = {name: values.pop(name) for name in _FIELDS}
            for name in ("recipe", "exp_dir"):
                fields[name] = fields[name] or ""
            return function(teacher=TeacherSpec(**fields), **values)

        for param in reversed(_teacher_params(required)):
            run = param(run)
        return run

    return decorate


def job_options(function: Callable) -> Callable:
    """Give a command the options of several jobs, ``num_jobs`` and ``job``.

    Args:
      function: The command's.
    """
    number = click.option(
        "--job",
        type=Count(0, MOST_JOBS - 1),
        default=0,
        metavar="N",
        help="The number of this job, from 0 to --num-jobs minus 1.",
    )
    count = click.option(
        "--num-jobs",
        type=Count(1, MOST_JOBS),
        default=1,
        metavar="N",
        help="How many jobs share the manifest.",
    )
    return count(number(function))

"""The ``--kd-*`` options of a plugged recipe, from its command line and from a file."""

import argparse
import difflib
import reprlib
import sys
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence

from icefall_kd.errors import KDError, naming_flags
from icefall_kd.terms import TERMS, term_options
from icefall_kd.terms.base import Option
from icefall_kd.terms.schedule import Curve
from icefall_kd.training.session_options import SESSION_OPTIONS

MUST_BE = {
    int: "a whole number",
    float: "a number",
    str: "one text in UTF-8",
    bool: "true or false",
    Curve: "a number, or numbers by epoch",
}
SWITCH = {  # as icefall's str2bool reads them
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}
RENAMED = {  # old name: new name
    "cache-dir": "teacher-cache-dir",
    "ctc-frames": "ctc-frame-weighting",
    "hidden-kind": "hidden-distance",
    "keep": "teacher-keep",
    "node-weights": "rnnt-node-weighting",
    "path-only": "teacher-path-only",
    "projector-lr": "hidden-projector-lr",
    "s-range": "teacher-s-range",
    "teacher-ranges": "stored-ranges",
}


def all_options() -> List[Option]:
    """Return the ``--kd-*`` options of the terms and of the session."""
    return [*term_options(), *SESSION_OPTIONS]


def flags_of_parameters() -> Dict[str, str]:
    """Return the ``--kd-*`` option of each parameter that an error may name."""
    flags = {option.parameter: option.flag for option in all_options()}
    for term in TERMS.values():
        for option in term.options:
            flags[f"{term.__name__}.{option.parameter}"] = option.flag
    return flags


def flags_in_errors() -> ContextManager[None]:
    """Name ``--kd-*`` options in place of parameters in the errors of a block.

    It is a decorator too.
    """
    return naming_flags(flags_of_parameters())


def distils(params: Dict[str, Any]) -> bool:
    """Return whether a term has a weight, so that distillation is on.

    Args:
      params: The recipe's params.
    """
    return any(params[f"kd_{name}_weight"] != 0 for name in TERMS)


def _must_be(option: Option) -> str:
    """Describe what the value of an option must be."""
    if option.bounds is None:
        return MUST_BE[option.type]
    least, most = option.bounds
    return f"{MUST_BE[option.type]} from {least} to {most}"


def _read(option: Option, text: str) -> Any:
    """Read the value of an option.

    Raises:
      ValueError: the text is of another type, or out of bounds.
    """
    text.encode("utf8")  # a UnicodeEncodeError is a ValueError
    if option.type is Curve:  # params and checkpoints hold a number or the text itself
        try:
            return float(text)
        except ValueError:
            return text
    if option.type is bool:
        if text.lower() not in SWITCH:
            raise ValueError
        return SWITCH[text.lower()]
    value = option.type(text)
    if option.bounds and not option.bounds[0] <= value <= option.bounds[1]:
        raise ValueError
    return value


def _type_of(option: Option) -> Callable[[str], Any]:
    """Return the function with which argparse reads an option."""

    def read(text: str) -> Any:
        try:
            return _read(option, text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{reprlib.repr(text)} is not {_must_be(option)}"
            ) from None

    return read


class _Renamed(argparse.Action):
    """An option's old name, which is refused with the new one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: Any = None):
        new = RENAMED[self.option_strings[0].replace("--kd-", "")]
        raise KDError(
            f"{self.option_strings[0]} is called --kd-{new} now: give --kd-{new}"
        )


def add_options(
    parser: argparse.ArgumentParser, words: Optional[Sequence[str]] = None
) -> None:
    """Add the options to a recipe's parser; the file's values are their defaults.

    Args:
      parser: The recipe's.
      words: The command line; None for this process's.

    Raises:
      KDError: a file that ``--kd-config`` names and that can't be read.
    """
    group = parser.add_argument_group("knowledge distillation (icefall_kd)")
    group.add_argument(
        "--kd-config",
        type=str,
        default="",
        help="YAML file of these options without --kd-, with lines such as "
        "`ctc-weight: 0.8`. Options on the command line override it.",
    )
    for option in all_options():
        group.add_argument(
            option.flag,
            type=_type_of(option),
            default=option.default,
            help=option.help,
        )
    for name in RENAMED:
        group.add_argument(
            f"--kd-{name}",
            action=_Renamed,
            nargs="?",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    path = _config_of(sys.argv[1:] if words is None else words)
    if path:
        parser.set_defaults(**read_config(path))


def _config_of(words: Sequence[str]) -> Optional[str]:
    """Return the file of ``--kd-config``, or None.

    Where the option has no value, the recipe's parser refuses it later.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--kd-config", nargs="?")
    return parser.parse_known_args(words)[0].kd_config


def read_config(path: str) -> Dict[str, Any]:
    """Read the options of a YAML file.

    Args:
      path: The file.

    Returns:
      The values by the names that they have in ``params``, such as "kd_ctc_weight".

    Raises:
      KDError: no such file, no YAML, or an option that doesn't exist.
    """
    import yaml

    try:  # all values as text: YAML itself reads 3:2 as 182 and 10:0.5 as 600.5
        text = Path(path).read_text(encoding="utf-8")
        lines = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as e:
        raise KDError(
            f"the file of --kd-config, {path}, can't be read "
            f"({' '.join(str(e).split())}): give a YAML file such as `ctc-weight: 0.8`"
        ) from None
    if not isinstance(lines, dict):
        raise KDError(
            f"the file of --kd-config, {path}, holds no options: give lines such as "
            "`ctc-weight: 0.8`"
        )
    options = {option.name: option for option in all_options()}
    values = {}
    for key, value in lines.items():
        name = str(key).replace("_", "-")
        if name in RENAMED:
            raise KDError(
                f"{path} has the option {name!r}, which is called {RENAMED[name]!r} "
                f"now: give {RENAMED[name]!r}"
            )
        if name not in options:
            near = difflib.get_close_matches(name, options, 1) or sorted(options)
            raise KDError(
                f"{path} has the option {name!r}, which there is not: did you mean "
                f"{near[0]!r}?"
            )
        option = options[name]
        try:
            if not isinstance(value, str):
                raise ValueError
            values[option.dest] = _read(option, value)
        except ValueError:
            raise KDError(
                f"{path} has {name}: {reprlib.repr(value)}, and {name} must be "
                f"{_must_be(option)}"
            ) from None
    return values

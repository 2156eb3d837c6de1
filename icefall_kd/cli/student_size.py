"""The size of a student by the options --preset, --params, --speed and --set."""

import math
from typing import Any, Dict, Sequence

from icefall_kd.errors import KDError, naming_flags, require
from icefall_kd.student import presets
from icefall_kd.student.build import check_settings
from icefall_kd.student.count import count_parameters
from icefall_kd.student.search import nearest, parse_goal

# Parameters, and layers in a stack, beyond which a model would take hours to build.
LARGEST, DEEPEST = 10**10, 100
_BOOLS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_KINDS = {int: int, float: float, bool: lambda word: _BOOLS[word.lower()]}


def parse_changes(changes: Sequence[str], settings: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of --set, as values of the types that the teacher's have.

    Args:
      changes: NAME=VALUE each, such as "encoder-dim=32,32".
      settings: The teacher's.

    Raises:
      KDError: a setting that the teacher does not have, or a value of another type.
    """
    parsed: Dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        name = name.strip().replace("-", "_")
        require(equals and value, f"--set {change} is not of the form NAME=VALUE")
        check_settings(settings, {name: value})
        kind = type(settings[name])
        try:
            parsed[name] = _KINDS.get(kind, str)(value)
        except (ValueError, KeyError):
            raise KDError(
                f"--set {change}: {name} takes a {kind.__name__}, as the teacher's "
                f"{settings[name]}"
            ) from None
        # Those of a model are sizes; a list of them is looked at stack by stack.
        require(
            kind not in (int, float) or 0 < parsed[name] < math.inf,
            f"--set {change}: {name} must be above 0, and finite",
        )
    return parsed


def check_goal(size: str, params: str, speed: str) -> None:
    """Refuse several sizes, and a speed in place of a size.

    Args:
      size: The option --preset; "" where it is not given, as for the others.
      params: The option --params.
      speed: The option --speed.

    Raises:
      KDError: two of them, or a value of one that is for the other.
    """
    options = {"--preset": size, "--params": params, "--speed": speed}
    words = [f"{name} {value}" for name, value in options.items() if value]
    require(len(words) <= 1, f"{' and '.join(words)} are given: give one of them")
    for name, value, example in (("--params", params, "5M"), ("--speed", speed, "3x")):
        with naming_flags({"goal": name}):
            is_speed = bool(value) and parse_goal(value).kind == "speed"
        require(
            not value or is_speed == (name == "--speed"),
            f"{name} is {value}, and takes a value as {example}",
        )


def changes_of(
    settings: Dict[str, Any], size: str, goal: str, set_by_user: Sequence[str]
) -> Dict[str, Any]:
    """The settings in which the student differs from the teacher.

    Args:
      settings: The teacher's.
      size: The name of a preset, or "".
      goal: Of --params or --speed, or "".
      set_by_user: The settings of --set, which override the others.

    Raises:
      KDError: a preset that there is not, a goal that no student reaches, or settings
        as :func:`parse_changes` refuses them.
    """
    changes: Dict[str, Any] = {}
    if size:
        changes = presets.preset(size)
    elif goal:
        speed = parse_goal(goal).kind == "speed"
        with naming_flags({"goal": "--speed" if speed else "--params"}):
            changes = nearest(goal, settings, settings)
    changes.update(parse_changes(set_by_user, settings))
    return changes


def check_random(
    settings: Dict[str, Any], new: Dict[str, Any], defaults: Dict[str, Any]
) -> None:
    """Refuse what a student that is no slice of its teacher must keep to all the same.

    Args:
      settings: The teacher's.
      new: What differs in the student.
      defaults: The options that the recipe's train.py has for its model.

    Raises:
      KDError: a setting without an option, or a student that is far too large.
    """
    for name, value in new.items():
        require(
            name in defaults,
            f"{name} can't be set to {value}: train.py has no option for it that makes "
            f"a model; choose of {', '.join(defaults)}",
        )
    try:
        layers = max(presets.per_stack({**settings, **new}, "num_encoder_layers"))
        size = count_parameters({**settings, **new})["all"]
    except KDError:  # of a variant that nobody counted yet
        return
    require(
        layers <= DEEPEST and size <= LARGEST,
        f"the student would have {size:,} parameters and {layers} layers in a stack, "
        f"and at most {LARGEST:,} and {DEEPEST} are built: give smaller numbers",
    )

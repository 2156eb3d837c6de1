"""The settings of a student of a given size or speed.

Between the smallest model that makes sense and the teacher lies a line through the
ladder of presets, and a student is a point on it. Each preset is bounded by the
teacher, setting by setting, so that each point is a slice of it; where the teacher's
stacks are others than the presets', the line goes straight from the smallest to the
teacher. Without a teacher it ends at XL. Where the recipe has an option for the
channels of its front end, they are part of the line; presets have icefall's.

The search doesn't measure which stacks or layers can best be spared: it reads no data.
"""

import re
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds, count_parameters
from icefall_kd.student.presets import (
    LADDER,
    PRESETS,
    embed_channels,
    per_stack,
    preset,
    to_ints,
)

TOLERANCE = 0.05  # the largest relative distance of a student from its goal
_NEAR = 0.01  # a preset or the teacher itself at this distance is taken at once
_STEPS = 100  # points on the line between two presets
_MULTIPLE = 4  # of widths: the decoder's convolution has groups of four

# The smallest model: nothing on the line is below it, unless the teacher is.
_SMALLEST = {
    "num_encoder_layers": 1,
    "num_heads": 4,
    "feedforward_dim": 32,
    "encoder_dim": 16,
    "encoder_unmasked_dim": 16,
    "decoder_dim": 32,
    "joiner_dim": 32,
}
_SMALLEST_FRONT = (8, 16, 32)
_COUNTS = ("num_encoder_layers", "num_heads")  # the others are widths
_SINGLE = ("pos_dim", "decoder_dim", "joiner_dim")  # one number for all stacks
_GOAL = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKmMxX]?)")

Point = Dict[str, Tuple[int, ...]]


class Goal(NamedTuple):
    """A number of parameters, or a speed relative to the teacher's."""

    kind: str  # "parameters" or "speed"
    value: float
    text: str  # the user's words


def parse_goal(goal: Union[str, int]) -> Goal:
    """Parse a goal for a student.

    Args:
      goal: A number of parameters, as ``"5M"``, ``"800k"`` or ``5000000``, or a speed,
        as ``"2.5x"``.

    Raises:
      KDError: ``goal`` has another form, is 0, or below the teacher's speed.
    """
    text = str(goal).strip()
    match = _GOAL.fullmatch(text)
    number, unit = match.groups() if match else ("", "")
    if not match or (unit == "" and "." in number):
        raise KDError(
            f"{text!r} is no goal for a student: give a number of parameters, as 5M, "
            "800k or 5000000, or a speed, as 2.5x"
        )
    value = float(number)
    if unit in ("x", "X"):
        if value < 1:
            raise KDError(
                f"a student of {text} the speed would be slower than its teacher: give "
                "1x or more"
            )
        return Goal("speed", value, text)
    value *= {"k": 1e3, "m": 1e6}.get(unit.lower(), 1)
    if value == 0:
        raise KDError(f"no student has {text} parameters: give 800k, 5M or the like")
    return Goal("parameters", value, text)


# The line


def _numbers_of(name: str, settings: Dict[str, Any]) -> Tuple[int, ...]:
    if name == "embed_channels":
        return embed_channels(settings)
    return (to_ints if name in _SINGLE else per_stack)(settings, name)


def _to_point(settings: Dict[str, Any], front: bool) -> Point:
    """The settings that make up a model's shape, with its ``front`` end or without."""
    names = [*PRESETS["s"], *(["embed_channels"] if front else [])]
    return {name: _numbers_of(name, settings) for name in names}


def _to_settings(point: Point) -> Dict[str, Any]:
    return {
        name: numbers[0] if name in _SINGLE else ",".join(map(str, numbers))
        for name, numbers in point.items()
    }


def _bounded(point: Point, bound: Point) -> Point:
    """The smaller setting of both, by name; fixed settings are those of ``bound``."""
    names = [n for n in (*_SMALLEST, "embed_channels") if n in bound]
    return {**bound, **{n: tuple(map(min, point[n], bound[n])) for n in names}}


def _ends(teacher: Optional[Dict[str, Any]], front: bool) -> List[Point]:
    """The points that the line goes through, from the smallest to the largest."""
    ends = [_to_point(preset(name), front) for name in LADDER]
    if teacher is not None:
        largest = _to_point(teacher, front)
        if largest["downsampling_factor"] == ends[0]["downsampling_factor"]:
            ends = [_bounded(point, largest) for point in ends] + [largest]
        else:
            ends = [largest]
    smallest = {n: (v,) * len(ends[0][n]) for n, v in _SMALLEST.items()}
    if front:
        smallest["embed_channels"] = _SMALLEST_FRONT
    ends.insert(0, _bounded(smallest, ends[0]))
    return [point for i, point in enumerate(ends) if point not in ends[:i]]


def _between(a: Point, b: Point, x: float) -> Point:
    """a^(1 - x) b^x, setting by setting; ``a`` is nowhere more than ``b``."""
    point = {}
    for name in a:
        step = 1 if name in _COUNTS else _MULTIPLE
        numbers = []
        for low, high in zip(a[name], b[name]):
            value = step * round(low * (high / low) ** x / step)
            numbers.append(min(max(value, low), high))
        point[name] = tuple(numbers)
    return point


def _candidates(ends: List[Point]) -> Iterator[Tuple[int, Point]]:
    """Yield points with their rank.

    Rank 0 is an end of the line or of a part of it, 1 a point on the line, and 2 one
    with the numbers of layers of a neighbouring part. The number of layers is whole, so
    the line has steps: rank 2 fills the gaps there.
    """
    line = [
        _between(a, b, i / _STEPS)
        for a, b in zip(ends, ends[1:])
        for i in range(_STEPS)
    ]
    depths = list(dict.fromkeys(p["num_encoder_layers"] for p in line))
    for end in ends:
        yield 0, end
    for point in line:
        yield 1, point
        i = depths.index(point["num_encoder_layers"])
        for layers in depths[max(i - 1, 0) : i] + depths[i + 1 : i + 2]:
            yield 2, {**point, "num_encoder_layers": layers}


# The search


def _shown(value: float, kind: str) -> str:
    """A goal that :func:`parse_goal` takes, of three digits."""
    unit, end = (1, "x") if kind == "speed" else (1e6, "M")
    if end == "M" and value < 1e6:
        unit, end = 1e3, "k"
    value /= unit
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}{end}"


def _refusal(goal: Goal, values: List[float], of_teacher: bool) -> KDError:
    """The error for a goal that none of the reachable ``values`` is near."""
    nearest_value = min(values, key=lambda v: max(v / goal.value, goal.value / v))
    speed = goal.kind == "speed"
    extreme = "nearest"
    if goal.value > max(values):
        extreme = "fastest" if speed else "largest"
    elif goal.value < min(values):
        extreme = "slowest" if speed else "smallest"
    student = "no student of this teacher" if of_teacher else "no student"
    shown = _shown(nearest_value, goal.kind)
    if speed:
        return KDError(
            f"{student} is {goal.text} as fast in multiply-adds: the {extreme} is "
            f"{shown}; give `goal` {shown}"
        )
    return KDError(
        f"{student} has {goal.text} parameters: the {extreme} has "
        f"{nearest_value:,.0f}; give `goal` {shown}"
    )


def nearest(
    goal: Union[str, int],
    base: Dict[str, Any],
    teacher: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Find the settings that bring ``base`` nearest to a goal.

    Between neighbouring presets each setting goes geometrically, a^(1 - x) b^x, to
    whole layers and heads and to widths in multiples of four. A preset within 1 % of
    the goal is taken as it is; else the nearest point of the line within 2 %; else,
    where whole layers leave a gap in the line, a point beside it.

    Args:
      goal: Parameters (``"5M"``, ``"800k"``, ``5000000``), or how many times fewer
        multiply-adds than the teacher's (``"2.5x"``, utterances of 10 s).
      base: The student's settings by the names of the recipe's params; its vocabulary,
        features, heads and ``causal`` are kept and counted. With ``embed_channels``
        the student's front end may be narrower too.
      teacher: The settings of the teacher that the student is to be a slice of; None
        for any shape.

    Returns:
      The settings that differ from ``base``, in the form of the recipe's options.

    Raises:
      KDError: a goal of another form, a speed without a teacher, or none within 5 %.
    """
    wanted = parse_goal(goal)
    if wanted.kind == "speed":
        if teacher is None:
            raise KDError(
                f"a speed of {wanted.text} is one relative to a teacher, and there is "
                "none: give a number of parameters"
            )
        reference = count_multiply_adds(teacher)["all"]

    def value_of(settings: Dict[str, Any]) -> float:
        if wanted.kind == "speed":
            return reference / count_multiply_adds(settings)["all"]
        return count_parameters(settings)["all"]

    values = []
    best, best_point = (3, 0.0), None  # the lowest rank, and its least distance
    for rank, point in _candidates(_ends(teacher, "embed_channels" in base)):
        value = value_of({**base, **_to_settings(point)})
        values.append(value)
        distance = max(value / wanted.value, wanted.value / value) - 1
        if distance > (_NEAR, 2 * _NEAR, TOLERANCE)[rank]:
            rank = 2
        if distance <= TOLERANCE and (rank, distance) < best:
            best, best_point = (rank, distance), point
    if best_point is None:
        raise _refusal(wanted, values, teacher is not None)
    changed = _to_settings(best_point)
    stacks = {"downsampling_factor": changed["downsampling_factor"]}
    return {
        name: value
        for name, value in changed.items()
        if name not in base or _numbers_of(name, {**stacks, **base}) != best_point[name]
    }

"""The settings of a student of a given size or speed.

Between the smallest model that makes sense and the teacher lies a line through the
ladder of presets, and a student is a point on it. Each preset is bounded by the
teacher, setting by setting, so that each point is a slice of it; where the teacher's
stacks are others than the presets', the line goes straight from the smallest to the
teacher. Without a teacher it ends at XL.

Not searched: which stacks or layers can best be spared (the line knows no data).
"""

import re
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds, count_parameters
from icefall_kd.student.presets import LADDER, PRESETS, per_stack, preset, to_ints

TOLERANCE = 0.05  # of the goal; a point farther off isn't taken
_NEAR = 0.01  # as near as this, a preset or the teacher itself is taken as it is
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
_WHOLE = ("num_encoder_layers", "num_heads")  # the others are widths
_SINGLE = ("pos_dim", "decoder_dim", "joiner_dim")  # one number for all stacks
_GOAL = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKmMxX]?)")

Point = Dict[str, Tuple[int, ...]]


class Goal(NamedTuple):
    """How large (parameters), or how many times as fast as the teacher (speed)."""

    kind: str  # "parameters" or "speed"
    value: float
    text: str  # as it was given


def parse_goal(goal: Union[str, int]) -> Goal:
    """``"5M"``, ``"800k"`` or ``5000000`` parameters, or ``"2.5x"`` the speed.

    Raises:
      KDError: anything else, nothing, or a student slower than its teacher.
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


def _read(name: str, settings: Dict[str, Any]) -> Tuple[int, ...]:
    return (to_ints if name in _SINGLE else per_stack)(settings, name)


def _numbers(settings: Dict[str, Any]) -> Point:
    """The settings that make up a model's shape."""
    return {name: _read(name, settings) for name in PRESETS["s"]}


def _settings(point: Point) -> Dict[str, Any]:
    return {
        name: numbers[0] if name in _SINGLE else ",".join(map(str, numbers))
        for name, numbers in point.items()
    }


def _bounded(point: Point, bound: Point) -> Point:
    """``bound``, and no more of what varies than ``point`` has."""
    return {**bound, **{n: tuple(map(min, point[n], bound[n])) for n in _SMALLEST}}


def _ends(teacher: Optional[Dict[str, Any]]) -> List[Point]:
    """What the line goes through, from the smallest to the largest."""
    ends = [_numbers(preset(name)) for name in LADDER]
    if teacher is not None:
        top = _numbers(teacher)
        same = top["downsampling_factor"] == ends[0]["downsampling_factor"]
        ends = [_bounded(p, top) for p in ends] if same else []
        ends.append(top)
    first = ends[0]
    smallest = {n: (v,) * len(first[n]) for n, v in _SMALLEST.items()}
    ends.insert(0, _bounded(smallest, first))
    return [p for i, p in enumerate(ends) if p not in ends[:i]]


def _between(a: Point, b: Point, x: float) -> Point:
    """a^(1 - x) b^x, setting by setting; ``a`` is nowhere more than ``b``."""
    point = {}
    for name in a:
        step = 1 if name in _WHOLE else _MULTIPLE
        numbers = []
        for low, high in zip(a[name], b[name]):
            value = step * round(low * (high / low) ** x / step)
            numbers.append(min(max(value, low), high))
        point[name] = tuple(numbers)
    return point


def _candidates(ends: List[Point]) -> Iterator[Tuple[int, Point]]:
    """Points with their rank: 0 for an end of two stretches, 1 for a point on the line,
    2 for one with the layers that the line has a little before or behind it.

    Layers come whole, so the line has steps; rank 2 fills the gaps there.
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
        for other in depths[max(i - 1, 0) : i] + depths[i + 1 : i + 2]:
            yield 2, {**point, "num_encoder_layers": other}


# The search


def _shown(value: float, kind: str) -> str:
    """A goal that :func:`parse_goal` takes, of three digits."""
    unit, end = (1, "x") if kind == "speed" else (1e6, "M")
    if end == "M" and value < 1e6:
        unit, end = 1e3, "k"
    value /= unit
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}{end}"


def _none_near(goal: Goal, values: List[float], of_teacher: bool) -> KDError:
    nearest = min(values, key=lambda v: max(v / goal.value, goal.value / v))
    least, most = ("smallest", "largest")
    if goal.kind == "speed":
        least, most = ("slowest", "fastest")
    which = "nearest"
    if goal.value > max(values):
        which = most
    elif goal.value < min(values):
        which = least
    who = "no student of this teacher" if of_teacher else "no student"
    shown = _shown(nearest, goal.kind)
    if goal.kind == "speed":
        return KDError(
            f"{who} is {goal.text} as fast in multiply-adds: the {which} is {shown}; "
            f"give --speed {shown}"
        )
    return KDError(
        f"{who} has {goal.text} parameters: the {which} has {nearest:,.0f}; give "
        f"--params {shown}"
    )


def nearest(
    goal: Union[str, int],
    base: Dict[str, Any],
    teacher: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """The settings that bring ``base`` to a goal.

    Between neighbouring presets each setting goes geometrically, a^(1 - x) b^x, to
    whole layers and heads and to widths in multiples of four. A preset within 1 % of
    the goal is taken as it is; else the nearest point of the line within 2 %; else,
    where whole layers leave a gap in the line, a point beside it.

    Args:
      goal: Parameters (``"5M"``, ``"800k"``, ``5000000``), or how many times fewer
        multiply-adds than the teacher's (``"2.5x"``, utterances of 10 s).
      base: The student's settings by the names of the recipe's params; its vocabulary,
        features, heads and ``causal`` are kept and counted.
      teacher: The settings of the teacher that the student is to be a slice of; None
        for any shape.

    Returns:
      Those that differ from ``base``, as the recipe's parser has them.

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

    best, values = None, []
    for rank, point in _candidates(_ends(teacher)):
        value = value_of({**base, **_settings(point)})
        values.append(value)
        off = max(value / wanted.value, wanted.value / value) - 1
        if off > (_NEAR, 2 * _NEAR, TOLERANCE)[rank]:
            rank = 2
        if off <= TOLERANCE and (best is None or (rank, off) < best[:2]):
            best = (rank, off, point)
    if best is None:
        raise _none_near(wanted, values, teacher is not None)
    changed = _settings(best[2])
    stacks = {"downsampling_factor": changed["downsampling_factor"]}
    return {
        name: value
        for name, value in changed.items()
        if name not in base or _read(name, {**stacks, **base}) != best[2][name]
    }

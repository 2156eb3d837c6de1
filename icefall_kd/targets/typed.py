"""Records that a file holds as JSON, which somebody else may have written."""

import math
from dataclasses import fields
from functools import lru_cache
from typing import Any, Callable, Dict, Optional, Tuple, Type, TypeVar, get_type_hints

T = TypeVar("T")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


_CHECKS: Dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    Optional[str]: lambda value: value is None or isinstance(value, str),
    int: _is_count,
    float: _is_number,
    Dict[str, int]: lambda value: isinstance(value, dict)
    and all(isinstance(k, str) and _is_count(v) for k, v in value.items()),
}


@lru_cache(maxsize=16)
def _checks_of(kind: Type) -> Tuple[Tuple[str, Callable[[Any], bool]], ...]:
    hints = get_type_hints(kind)
    return tuple((f.name, _CHECKS[hints[f.name]]) for f in fields(kind))


def typed(kind: Type[T], values: Any) -> T:
    """An instance of a dataclass, made of the values that a file holds.

    Args:
      kind: A dataclass of texts, numbers, whole numbers from 0 on, and dictionaries of
        such.
      values: A dictionary of its fields, or what stands in its place.

    Raises:
      TypeError: fields that are missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"no dictionary but a {type(values).__name__}")
    found = kind(**values)
    for name, is_right in _checks_of(kind):
        if not is_right(getattr(found, name)):
            raise TypeError(f"{name} is a {type(getattr(found, name)).__name__}")
    return found

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


def _is_dictionary(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(
        isinstance(k, str) and is_right(v) for k, v in value.items()
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_CHECKS: Dict[Any, Callable[[Any], bool]] = {
    str: _is_text,
    Optional[str]: lambda value: value is None or _is_text(value),
    int: _is_count,
    float: _is_number,
    Dict[str, int]: _is_dictionary(_is_count),
    Dict[str, str]: _is_dictionary(_is_text),
}


@lru_cache(maxsize=16)
def _checks_of(record: Type) -> Tuple[Tuple[str, Callable[[Any], bool]], ...]:
    hints = get_type_hints(record)
    return tuple((f.name, _CHECKS[hints[f.name]]) for f in fields(record))


def typed(record: Type[T], values: Any) -> T:
    """Return an instance of a dataclass, made of the values that a file holds.

    Args:
      record: A dataclass of texts, numbers, whole numbers from 0 on, and dictionaries
        of such.
      values: A dictionary of its fields; whatever else a file may hold is refused.

    Raises:
      TypeError: fields that are missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"no dictionary but a {type(values).__name__}")
    instance = record(**values)
    for name, is_right in _checks_of(record):
        value = getattr(instance, name)
        if not is_right(value):
            raise TypeError(f"{name} is a {type(value).__name__}")
    return instance

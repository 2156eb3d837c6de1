"""Students: their settings, their size, and their parameters from a teacher's.

The names below are imported when they are first used, so that settings can be listed
and counted without torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "PRESETS": "presets",
    "preset": "presets",
    "streaming": "presets",
    "count_multiply_adds": "count",
    "count_parameters": "count",
    "nearest": "search",
    "Selection": "selection",
    "select_first": "selection",
    "select_important": "importance",
    "build_student": "build",
    "check_slices": "build",
    "HeadScores": "scores",
    "score_heads": "scores",
    "Freezer": "freeze",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

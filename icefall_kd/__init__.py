"""Knowledge distillation for icefall's Zipformer recipes.

The front door. The names below are imported when they are first used, so
``import icefall_kd`` loads neither torch nor k2.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FRONT_DOOR = {
    "TeacherHook": "icefall_kd.hook",
    "LogitWriter": "icefall_kd.targets.writer",
    "JointKDLoss": "icefall_kd.losses.joint",
    "build_student": "icefall_kd.student.build",
    "ctc_kd_loss": "icefall_kd.losses.ctc",
    "transducer_kd_loss": "icefall_kd.losses.transducer",
    "hidden_kd_loss": "icefall_kd.losses.hidden",
}

__all__ = ["__version__", *_FRONT_DOOR]


def __getattr__(name: str) -> Any:
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FRONT_DOOR[name]), name)


def __dir__() -> list:
    return sorted(__all__)

"""Knowledge distillation for icefall's Zipformer recipes.

The front door. The names below are imported when they are first used, so
``import icefall_kd`` loads neither torch nor k2.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Each public name: its module and its name there.
_FRONT_DOOR = {
    "ModelTap": "icefall_kd.tap:ModelTap",
    "TeacherHook": "icefall_kd.tap:ModelTap",  # its former name
    "LogitWriter": "icefall_kd.targets.writer:LogitWriter",
    "JointKDLoss": "icefall_kd.terms.joint:JointKDLoss",
    "build_student": "icefall_kd.student.build:build_student",
    "ctc_kd_loss": "icefall_kd.losses.ctc:ctc_kd_loss",
    "transducer_kd_loss": "icefall_kd.losses.transducer:transducer_kd_loss",
    "hidden_kd_loss": "icefall_kd.losses.hidden:hidden_kd_loss",
}

__all__ = ["__version__", *_FRONT_DOOR]


def __getattr__(name: str) -> Any:
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _FRONT_DOOR[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list:
    return sorted(__all__)

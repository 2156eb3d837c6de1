"""Knowledge distillation for icefall's Zipformer recipes.

The public names below are imported when they are first used, so
``import icefall_kd`` loads neither torch nor k2.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Each public name: its module, and its name there where it is another one.
_PUBLIC_NAMES = {
    # Running a model
    "ModelTap": "icefall_kd.tap",
    "TeacherHook": "icefall_kd.tap:ModelTap",  # its former name
    "load_model": "icefall_kd.teacher.loader:load_recipe_model",
    "Teacher": "icefall_kd.teacher.teacher",
    "TeacherSpec": "icefall_kd.teacher.spec",
    # Storing targets and reading them
    "dump_targets": "icefall_kd.targets.dump",
    "Fingerprint": "icefall_kd.targets.fingerprint",
    "TargetWriter": "icefall_kd.targets.writer",
    "LogitWriter": "icefall_kd.targets.writer:TargetWriter",  # its former name
    "TargetDataset": "icefall_kd.targets.dataset",
    "KDDataset": "icefall_kd.targets.dataset:TargetDataset",  # its former name
    "collate_targets": "icefall_kd.targets.dataset",
    # A new kind of target
    "FrameKind": "icefall_kd.kinds",
    "UtteranceKind": "icefall_kd.kinds",
    "register_kind": "icefall_kd.kinds",
    # What they exchange
    "EncoderOut": "icefall_kd.types",
    "LatticeTargets": "icefall_kd.types",
    "NoPath": "icefall_kd.types",
    "Nodes": "icefall_kd.types",
    "PrunedLattice": "icefall_kd.types",
    "SparseDistribution": "icefall_kd.types",
    "Targets": "icefall_kd.types",
    # The student and its losses
    "build_student": "icefall_kd.student.build",
    "JointKDLoss": "icefall_kd.terms.joint",
    "CtcTerm": "icefall_kd.terms",
    "TransducerTerm": "icefall_kd.terms",
    "FullSumTerm": "icefall_kd.terms",
    "HiddenTerm": "icefall_kd.terms",
    "NbestTerm": "icefall_kd.terms",
    "Schedule": "icefall_kd.terms.schedule",
    "ctc_kd_loss": "icefall_kd.losses.ctc",
    "transducer_kd_loss": "icefall_kd.losses.transducer",
    "hidden_kd_loss": "icefall_kd.losses.hidden",
}

__all__ = ["__version__", *_PUBLIC_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC_NAMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list:
    return sorted(__all__)

"""Knowledge distillation for icefall's Zipformer recipes.

The public names below are imported when they are first used, so
``import icefall_kd`` loads neither torch nor k2.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Each public name: its module, and its name there where it is another one.
_PUBLIC_NAMES = {
    # Refusals
    "KDError": "icefall_kd.errors",
    "one_sentence": "icefall_kd.errors",
    # Running a model
    "ModelTap": "icefall_kd.tap",
    "TeacherHook": "icefall_kd.tap:ModelTap",  # its former name
    "load_model": "icefall_kd.teacher.loader:load_recipe_model",
    "load_checkpoint": "icefall_kd.teacher.checkpoints",
    "import_train": "icefall_kd.teacher.recipe",
    "load_tokenizer": "icefall_kd.tokens",
    "encoder_frames": "icefall_kd.zipformer",
    "get_engine": "icefall_kd.rnnt",
    "Teacher": "icefall_kd.teacher.teacher",
    "TeacherSpec": "icefall_kd.teacher.spec",
    # Storing targets and reading them
    "dump_targets": "icefall_kd.targets.dump",
    "Fingerprint": "icefall_kd.targets.fingerprint",
    "read_fingerprint": "icefall_kd.targets.store",
    "Pointer": "icefall_kd.targets.store",
    "TargetWriter": "icefall_kd.targets.writer",
    "LogitWriter": "icefall_kd.targets.writer:TargetWriter",  # its former name
    "TargetDataset": "icefall_kd.targets.dataset",
    "KDDataset": "icefall_kd.targets.dataset:TargetDataset",  # its former name
    "collate_targets": "icefall_kd.targets.reading",
    "read_nbest": "icefall_kd.kinds.nbest",
    "write_nbest": "icefall_kd.kinds.nbest",
    # A new kind of target
    "Codec": "icefall_kd.kinds.codec",
    "FrameKind": "icefall_kd.kinds",
    "UtteranceKind": "icefall_kd.kinds",
    "register_kind": "icefall_kd.kinds",
    # What they exchange
    "Distribution": "icefall_kd.types",
    "EncoderOut": "icefall_kd.types",
    "LatticeTargets": "icefall_kd.types",
    "NoPath": "icefall_kd.types",
    "Nodes": "icefall_kd.types",
    "PrunedLattice": "icefall_kd.types",
    "SparseDistribution": "icefall_kd.types",
    "Targets": "icefall_kd.types",
    # The student
    "PRESETS": "icefall_kd.student.presets",
    "preset": "icefall_kd.student.presets",
    "count_parameters": "icefall_kd.student.count",
    "count_multiply_adds": "icefall_kd.student.count",
    "build_student": "icefall_kd.student.build",
    "select_important": "icefall_kd.student.importance",
    "score_heads": "icefall_kd.student.scores",
    # Searches
    "GreedySearch": "icefall_kd.decode",
    "BeamSearch": "icefall_kd.decode",
    "Hypothesis": "icefall_kd.decode",
    "ctc_greedy": "icefall_kd.decode",
    "transducer_greedy": "icefall_kd.decode",
    "skip_blanks": "icefall_kd.decode",
    "WindowedEncoder": "icefall_kd.decode.windows",
    "StreamingEncoder": "icefall_kd.decode.streaming",
    "search_pieces": "icefall_kd.decode.windows",
    # The joint loss, and a new term of it
    "JointKDLoss": "icefall_kd.terms.joint",
    "CtcTerm": "icefall_kd.terms",
    "TransducerTerm": "icefall_kd.terms",
    "FullSumTerm": "icefall_kd.terms",
    "HiddenTerm": "icefall_kd.terms",
    "NbestTerm": "icefall_kd.terms",
    "Schedule": "icefall_kd.terms.schedule",
    "Term": "icefall_kd.terms.base",
    "Option": "icefall_kd.terms.base",
    "register_term": "icefall_kd.terms",
    # Losses alone
    "ctc_kd_loss": "icefall_kd.losses.ctc",
    "transducer_kd_loss": "icefall_kd.losses.transducer",
    "full_sum_kd_loss": "icefall_kd.losses.full_sum",
    "StudentNodes": "icefall_kd.losses.student_nodes",
    "hidden_kd_loss": "icefall_kd.losses.hidden",
    "nbest_ctc_loss": "icefall_kd.losses.sequence",
    "nbest_transducer_loss": "icefall_kd.losses.sequence",
}

__all__ = ["__version__", *_PUBLIC_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC_NAMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list:
    return sorted(__all__)

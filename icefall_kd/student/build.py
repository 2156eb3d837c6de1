"""A smaller Zipformer that starts from its teacher's layers.

A student has its teacher's number of stacks, and its head and positional dimensions.
"""

from dataclasses import replace
from typing import Any, Callable, Dict, Optional, Tuple

from torch import nn

from icefall_kd.errors import KDError, require
from icefall_kd.student.front import strongest_front
from icefall_kd.student.presets import embed_channels, per_stack, to_ints
from icefall_kd.student.selection import Selection, select_first
from icefall_kd.student.slices import Slicer

# A slice would not mean the same with these changed.
_FIXED_PER_STACK = (
    "downsampling_factor",
    "query_head_dim",
    "pos_head_dim",
    "value_head_dim",
    "cnn_module_kernel",
)
_FIXED = (
    *_FIXED_PER_STACK,
    "pos_dim",
    "feature_dim",
    "context_size",
    "vocab_size",
    "blank_id",
    "causal",
)
_WIDTHS = ("encoder_dim", "num_heads", "feedforward_dim", "decoder_dim", "joiner_dim")
_GROUP = 4  # channels that the decoder's convolution reads together


def check_settings(settings: Dict[str, Any], changes: Dict[str, Any]) -> None:
    """Refuse ``changes`` of names that the teacher's ``settings`` don't have."""
    for name in changes:
        if name not in settings:
            require(
                name != "embed_channels",
                "embed_channels can't be set, as the recipe's train.py has no option "
                "for it: add it as egs/librispeech/ASR/README.md says, or leave it out",
            )
            known = ", ".join(k for k in sorted(settings) if "dim" in k or "num_" in k)
            raise KDError(
                f"the teacher has no setting {name!r}, so it can't be set: choose of "
                f"{known}"
            )


def check_slices(
    teacher: nn.Module, settings: Dict[str, Any], changes: Dict[str, Any]
) -> Dict[str, Any]:
    """Check that a student can start from slices of the teacher's parameters.

    Args:
      teacher: The trained model.
      settings: Its settings, by the names of the recipe's params.
      changes: Those that differ in the student.

    Returns:
      The student's settings.

    Raises:
      KDError: as :func:`build_student`.
    """
    check_settings(settings, changes)
    _check_zipformer(teacher)
    student = {**settings, **changes}
    _check_fixed(settings, student)
    _check_sizes(settings, student)
    _check_own_widths(student)
    return student


def _check_zipformer(teacher: nn.Module) -> None:
    """Refuse a model whose layers are not those of icefall's Zipformer."""
    encoder = getattr(teacher, "encoder", teacher)
    names = {name for name, _ in teacher.named_parameters()}
    for layer in ("encoder.encoders.0.layers.0", "encoder.encoders.0.encoder.layers.0"):
        if {f"{layer}.nonlin_attention.in_proj.weight", f"{layer}.norm.log_scale"} <= (
            names
        ):
            return
    raise KDError(
        f"the teacher's encoder is a {type(encoder).__name__} without the layers of "
        "icefall's zipformer recipes (nonlin_attention, BiasNorm), so a student can't "
        "start from it: give a teacher of those recipes, or `init` random"
    )


def _check_fixed(teacher: Dict[str, Any], student: Dict[str, Any]) -> None:
    for name in _FIXED:
        old, new = teacher.get(name), student.get(name)
        same = old == new
        if not same and name in _FIXED_PER_STACK:  # "4" and "4,4" may be the same
            same = per_stack(teacher, name) == per_stack(student, name)
        require(
            same,
            f"the student's {name} is {new} and its teacher's {old}: a student that "
            "starts from its teacher keeps it; leave it out of `changes`, give "
            "`goal` in place of `preset`, or `init` random",
        )


def _check_sizes(teacher: Dict[str, Any], student: Dict[str, Any]) -> None:
    """Refuse a student that is deeper or wider than its teacher in some stack."""

    def exceeds(name: str) -> bool:
        sizes = zip(per_stack(student, name), per_stack(teacher, name))
        return any(new > old for new, old in sizes)

    if exceeds("num_encoder_layers"):
        old, new = (per_stack(s, "num_encoder_layers") for s in (teacher, student))
        raise KDError(
            f"the student's layers per stack are {new} and its teacher's {old}: a "
            "student that starts from its teacher has no more layers; lower "
            "num-encoder-layers, or give `init` random"
        )
    widths = [name for name in _WIDTHS if name in teacher and exceeds(name)]
    channels = zip(embed_channels(student), embed_channels(teacher))
    if any(new > old for new, old in channels):
        widths.append("embed_channels")
    for name in widths:
        raise KDError(
            f"the student's {name} is {student[name]} and its teacher's "
            f"{teacher.get(name)}: a student that starts from its teacher can't be "
            "wider; give at most the teacher's, or `init` random"
        )


def _check_own_widths(student: Dict[str, Any]) -> None:
    """Refuse widths of a student that don't fit each other."""
    unmasked = per_stack(student, "encoder_unmasked_dim")
    if any(a > b for a, b in zip(unmasked, per_stack(student, "encoder_dim"))):
        raise KDError(
            f"the student's encoder_unmasked_dim is {student['encoder_unmasked_dim']} "
            f"and its encoder_dim {student['encoder_dim']}: give at most that"
        )
    # With one label of context the decoder has no convolution.
    if "decoder_dim" in student and student.get("context_size") != 1:
        (width,) = to_ints(student, "decoder_dim")
        below = max(width // _GROUP * _GROUP, _GROUP)
        require(
            width % _GROUP == 0,
            f"the student's decoder_dim is {width}, and the decoder's convolution "
            f"takes its channels by {_GROUP}: give {below}",
        )


def _make_model(
    get_model: Callable, settings: Dict[str, Any], changes: Dict[str, Any]
) -> nn.Module:
    per_stack(settings, "num_encoder_layers")  # get_model takes stacks without layers
    embed_channels(settings)
    try:
        return get_model(settings)
    except Exception as e:  # the model asserts, or raises errors of any class
        shown = ", ".join(f"{k}={v}" for k, v in changes.items())
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}".rstrip(": ")
        raise KDError(
            f"no model has the settings {shown} ({reason}): give each stack one "
            "number, encoder_unmasked_dim at most encoder_dim, decoder_dim a multiple "
            f"of {_GROUP}"
        ) from None


def build_student(
    teacher: nn.Module,
    settings: Dict[str, Any],
    changes: Dict[str, Any],
    get_model: Callable[[Dict[str, Any]], nn.Module],
    init: str = "teacher",
    selection: Optional[Selection] = None,
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Build a student from a teacher, with some settings changed.

    With ``init="teacher"`` each layer starts from a teacher layer of its stack and each
    narrower matrix from some of its channels: whole heads, whole hidden units of all
    projections of a module, and one set of channels along the residual stream, which
    all stacks share. By default layers are the first, the last and evenly between, and
    channels the first, which are those that Zipformer's training masks least
    (``encoder_unmasked_dim``). The front end's channels are in no order, and of them
    those are taken that have the largest weights
    (:func:`icefall_kd.student.front.strongest_front`). Another choice is given as
    ``selection``, such as that of
    :func:`icefall_kd.student.importance.select_important`.

    By construction the student's outputs are as follows:

    - With all layers and widths of the teacher, parameters and outputs are the
      teacher's, bit for bit.
    - With fewer hidden units (``feedforward_dim``, ``num_heads``, ``joiner_dim``,
      ``decoder_dim``, ``embed_channels``) it gives the same as the teacher where the
      units left out are masked, that is, set to zero before the matrix that reads them.
    - With fewer layers it gives the same as the teacher where the layers left out are
      bypassed.
    - With a narrower residual stream (``encoder_dim``), convolutions and nonlinear
      attention have fewer hidden units too. All stacks' outputs are those of a teacher
      that is changed in three ways: these units are masked; the channels that a stack
      leaves out are zero in its input and after each module of its layers; and each
      BiasNorm, also the front end's, takes its mean square over the kept channels. The
      encoder's output takes each channel from the last stack that has it. It is the
      same where this stack is the same in both models. If that is so in all channels,
      the heads' outputs are the same too.

    ``selection.norm_shifts``, which a choice by importance has, scales each BiasNorm
    once more.

    Args:
      teacher: The trained model.
      settings: Its settings, by the names of the recipe's params.
      changes: Those that differ in the student.
      get_model: The recipe's ``get_model``; it takes an AttributeDict of settings.
      init: "teacher", or "random" for the parameters that ``get_model`` draws.
      selection: The layers, channels, heads and hidden units that the student takes.

    Returns:
      The student and its settings.

    Raises:
      KDError: a student wider or deeper than its teacher, a setting that slices
        can't follow, or a teacher that is no Zipformer of icefall's zipformer recipes.
    """
    if init not in ("teacher", "random"):
        raise KDError(f"init is {init!r}, and must be 'teacher' or 'random'")
    check_settings(settings, changes)
    student_settings = type(settings)(settings)
    student_settings.update(changes)
    if init == "teacher":
        check_slices(teacher, settings, changes)
        selection = selection or select_first(settings, student_settings)
        channels = embed_channels(student_settings)
        if channels != embed_channels(settings):
            front = strongest_front(teacher.state_dict(), channels)
            selection = replace(selection, units={**front, **selection.units})
    student = _make_model(get_model, student_settings, changes)
    if init == "teacher":
        slicer = Slicer(teacher.state_dict(), selection, settings, student_settings)
        parameters = {
            name: slicer(name, value.shape).to(value.dtype)
            for name, value in student.state_dict().items()
        }
        student.load_state_dict(parameters, strict=True)
    return student, student_settings

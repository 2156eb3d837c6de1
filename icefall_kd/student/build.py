"""A smaller Zipformer that starts from its teacher's layers.

Not here yet: other numbers of stacks, other head or positional dimensions, and
choosing layers and channels by their measured importance.
"""

import re
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError

# A layer of a stack, with or without the wrapper that downsamples.
_LAYER = re.compile(r"^(encoder\.encoders\.(\d+)\.(?:encoder\.)?layers\.)(\d+)(\..*)$")
# Projections whose rows are several blocks; the head dimensions share the others.
_BLOCKS = ((".conv_module", 2), (".nonlin_attention.", 3))
# A slice would not mean the same with these changed.
_FIXED = (
    "downsampling_factor",
    "query_head_dim",
    "pos_head_dim",
    "value_head_dim",
    "pos_dim",
    "cnn_module_kernel",
    "feature_dim",
    "context_size",
    "vocab_size",
    "blank_id",
)


def to_ints(value: Any) -> Tuple[int, ...]:
    """``"2,2,4"``, 2 or (2, 2, 4) as a tuple."""
    if isinstance(value, str):
        return tuple(int(v) for v in value.split(","))
    return tuple(value) if isinstance(value, (tuple, list)) else (int(value),)


def per_stack(settings: Dict[str, Any], name: str) -> Tuple[int, ...]:
    """A setting for each stack; one number stands for all of them."""
    value = to_ints(settings[name])
    n = len(to_ints(settings["downsampling_factor"]))
    return value * n if len(value) == 1 else value


def layer_map(n_teacher: int, n_student: int) -> List[int]:
    """Which teacher layer each student layer starts from: first, last, and evenly
    between (Distil-Whisper's maximally spaced layers, arXiv:2311.00430)."""
    if n_student == 1:
        return [0]
    step = (n_teacher - 1) / (n_student - 1)
    return [round(j * step) for j in range(n_student)]


def _row_blocks(name: str, settings: Dict[str, Any]) -> List[int]:
    """Relative sizes of the blocks that a projection's rows are made of."""
    if ".self_attn_weights.in_proj." in name:
        stack = int(_LAYER.match(name).group(2))
        heads = per_stack(settings, "num_heads")[stack]
        q = heads * per_stack(settings, "query_head_dim")[stack]
        return [q, q, heads * per_stack(settings, "pos_head_dim")[stack]]
    for part, n in _BLOCKS:
        if part in name and ".in_proj." in name:
            return [1] * n
    return [1]


def _sizes(rows: int, blocks: List[int]) -> List[int]:
    return [rows * b // sum(blocks) for b in blocks]


def _slice(
    name: str,
    value: torch.Tensor,
    shape: torch.Size,
    teacher: Dict[str, Any],
    student: Dict[str, Any],
) -> torch.Tensor:
    """The first channels of ``value``, block by block, in the student's shape."""
    if value.shape == shape:
        return value
    if value.ndim != len(shape) or any(a < b for a, b in zip(value.shape, shape)):
        raise KDError(
            f"the student's {name} has shape {tuple(shape)} and its teacher's only "
            f"{tuple(value.shape)}: a student that starts from its teacher can't be "
            "wider; lower its --set values, or give --init random"
        )
    sources = value.split(_sizes(value.size(0), _row_blocks(name, teacher)))
    wanted = _sizes(shape[0], _row_blocks(name, student))
    value = torch.cat([s[:w] for s, w in zip(sources, wanted)])
    return value[tuple(slice(0, n) for n in shape)]


def _check(teacher: Dict[str, Any], student: Dict[str, Any]) -> None:
    for name in _FIXED:
        old, new = teacher.get(name), student.get(name)
        same = old == new
        if not same and isinstance(old, str) and isinstance(new, str):
            same = to_ints(old) == to_ints(new)
        if not same:
            raise KDError(
                f"the student's {name} is {new} and its teacher's {old}: a student "
                "that starts from its teacher keeps it; leave it out of --set, or give "
                "--init random"
            )
    old, new = (per_stack(s, "num_encoder_layers") for s in (teacher, student))
    if len(old) != len(new) or any(a < b for a, b in zip(old, new)):
        raise KDError(
            f"the student's layers per stack are {new} and its teacher's {old}: a "
            "student that starts from its teacher has as many stacks and no more "
            "layers; lower num-encoder-layers, or give --init random"
        )


def check_settings(settings: Dict[str, Any], changes: Dict[str, Any]) -> None:
    """Refuse names that the teacher doesn't have."""
    for name in changes:
        if name not in settings:
            known = ", ".join(k for k in sorted(settings) if "dim" in k or "num_" in k)
            raise KDError(
                f"the teacher has no setting {name!r}, so it can't be set: choose of "
                f"{known}"
            )


def _no_model(changes: Dict[str, Any], error: Exception) -> KDError:
    shown = ", ".join(f"{k}={v}" for k, v in changes.items())
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return KDError(
        f"no model has the settings {shown} ({reason}): give each stack one number, "
        "encoder_unmasked_dim at most encoder_dim, and at least one layer"
    )


def _make(get_model: Callable, settings: Dict[str, Any], changes: Dict[str, Any]):
    try:
        if min(per_stack(settings, "num_encoder_layers")) < 1:
            raise ValueError("a stack without layers")
        return get_model(settings)
    except Exception as e:  # the model asserts, and raises what it likes
        raise _no_model(changes, e) from None


def build_student(
    teacher: nn.Module,
    settings: Dict[str, Any],
    changes: Dict[str, Any],
    get_model: Callable[[Dict[str, Any]], nn.Module],
    init: str = "teacher",
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Build a student with some of the teacher's settings changed.

    With ``init="teacher"`` each layer starts from a teacher layer of its stack (first,
    last, evenly between) and each narrower matrix from its first channels, whole heads
    and whole blocks of fused projections. The first channels are those that
    Zipformer's training masks least (``encoder_unmasked_dim``). Parameters of equal
    shape are copied bit for bit.

    Args:
      teacher: The trained model.
      settings: Its settings, by the names of the recipe's params.
      changes: Those that differ in the student.
      get_model: The recipe's ``get_model``; it takes an AttributeDict of settings.
      init: "teacher", or "random" as ``get_model`` leaves it.

    Returns:
      The student and its settings.

    Raises:
      KDError: a student wider or deeper than its teacher, or a setting that slices
        can't follow.
    """
    if init not in ("teacher", "random"):
        raise KDError(f"init is {init!r}, and must be 'teacher' or 'random'")
    check_settings(settings, changes)
    new = type(settings)(settings)
    new.update(changes)
    if init == "teacher":
        try:
            _check(settings, new)
        except (ValueError, IndexError) as e:
            if isinstance(e, KDError):
                raise
            raise _no_model(changes, e) from None
    student = _make(get_model, new, changes)
    if init == "random":
        return student, new
    maps = [
        layer_map(a, b)
        for a, b in zip(
            per_stack(settings, "num_encoder_layers"),
            per_stack(new, "num_encoder_layers"),
        )
    ]
    source = teacher.state_dict()
    target = student.state_dict()
    for name, value in target.items():
        match = _LAYER.match(name)
        origin = name
        if match:
            stack, layer = int(match.group(2)), int(match.group(3))
            origin = f"{match.group(1)}{maps[stack][layer]}{match.group(4)}"
        if origin not in source:
            raise KDError(
                f"the teacher has no parameter {origin} for the student's {name}: "
                "give the student the teacher's heads, or --init random"
            )
        sliced = _slice(name, source[origin], value.shape, settings, new)
        target[name] = sliced.to(value.dtype).clone()
    student.load_state_dict(target, strict=True)
    return student, new

"""Facts about the models of icefall's Zipformer recipes: frames, layers and heads.

A model has an ``encoder_embed``, an ``encoder`` and as heads a ``ctc_output``, a
transducer or both. The older Zipformer has no ``encoder_embed``: its encoder takes
features itself. This module loads no torch.
"""

from typing import TYPE_CHECKING, Any, Mapping, Union

from icefall_kd.errors import KDError, require

if TYPE_CHECKING:
    from torch import nn

OUT = "out"  # the encoder's output among the layers; the stacks go by their index
Layer = Union[int, str]

MIN_FRAMES = 9  # feature frames that give one frame of output
TRANSDUCER_PARTS = ("decoder", "joiner", "simple_am_proj", "simple_lm_proj")


def stack_frames(num_frames: int) -> int:
    """Return how many stack frames (50 Hz) the front end makes of feature frames.

    Args:
      num_frames: Feature frames (100 Hz), a number or a tensor of numbers.
    """
    return (num_frames - 7) // 2


def encoder_frames(num_frames: int) -> int:
    """Return how many frames of output (25 Hz) the encoder makes of feature frames.

    Args:
      num_frames: Feature frames (100 Hz), a number or a tensor of numbers.
    """
    return (stack_frames(num_frames) + 1) // 2


def subsampling_factor(params: Mapping[str, Any]) -> int:
    """Return how many feature frames make a frame by a recipe's params.

    Args:
      params: The recipe's params; 4 without ``subsampling_factor``.
    """
    return int(params.get("subsampling_factor", 4))


def has_ctc(model: "nn.Module") -> bool:
    """Return whether ``model``, of a recipe, has a CTC head."""
    return getattr(model, "ctc_output", None) is not None


def has_transducer(model: "nn.Module") -> bool:
    """Return whether ``model``, of a recipe, has a transducer head."""
    return getattr(model, "joiner", None) is not None


def ctc_linear(model: "nn.Module") -> "nn.Linear":
    """Return the linear layer of the CTC head: its output is LogSoftmax's input.

    Args:
      model: A recipe's model, whose ``ctc_output`` is Dropout, Linear, LogSoftmax.

    Raises:
      KDError: The model has no CTC head.
    """
    from torch import nn

    head = model.ctc_output.modules() if has_ctc(model) else ()
    linears = [module for module in head if isinstance(module, nn.Linear)]
    require(
        linears,
        f"the model {type(model).__name__} has no CTC head (ctc_output), and CTC "
        "distillation needs one: train it with `use_ctc` 1",
    )
    return linears[-1]


def require_transducer(model: "nn.Module", purpose: str, remedy: str) -> None:
    """Refuse a model that lacks a part of the transducer head.

    Args:
      model: A recipe's model.
      purpose: What needs the head, such as "a lattice"; it is put into the sentence.
      remedy: What the user can do instead; it ends the sentence.

    Raises:
      KDError: The model has no ``decoder``, ``joiner`` or simple projection.
    """
    for name in TRANSDUCER_PARTS:
        if getattr(model, name, None) is None:
            raise KDError(
                f"the model {type(model).__name__} has no {name}, and {purpose} needs "
                f"a transducer head: {remedy}"
            )

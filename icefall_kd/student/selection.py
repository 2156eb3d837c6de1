"""The layers, channels, heads and hidden units that a student takes of its teacher."""

from dataclasses import dataclass, field
from typing import Any, Dict, List

import torch

from icefall_kd.student.presets import per_stack

# Ends the name of a layer whose attention heads are listed among the units.
HEADS = ".heads"
# The front end's convolutions, whose channels are listed there too, and the module of
# its hidden units.
FRONT_CONVS = ("encoder_embed.conv.0", "encoder_embed.conv.4", "encoder_embed.conv.7")
CONVNEXT = "encoder_embed.convnext"


@dataclass
class Selection:
    """Indices into the teacher's layers and channels, in the student's order.

    Args:
      layers: For each stack, the teacher's layers that it keeps.
      stream: The channels of the residual stream that all stacks share.
      units: Hidden units by the names of the teacher's modules, with the channels of
        :data:`FRONT_CONVS`; and heads by the names of its layers and :data:`HEADS`.
        Head 0 is the first, as the nonlinear attention uses its weights too. Of a
        module that is missing the first units are taken.
      norm_shifts: Numbers that are added to BiasNorm's log-scales, by the names of the
        teacher's modules.
    """

    layers: List[List[int]]
    stream: List[int]
    units: Dict[str, List[int]] = field(default_factory=dict)
    norm_shifts: Dict[str, float] = field(default_factory=dict)

    def indices(self, name: str, count: int) -> torch.Tensor:
        """``count`` units of the module ``name``, (count,); by default the first."""
        units = self.units.get(name) or range(count)
        return torch.tensor(list(units), dtype=torch.int64)


def layer_map(n_teacher: int, n_student: int) -> List[int]:
    """The teacher's layer from which each layer of the student starts.

    These are the first, the last, and evenly spaced ones between (Distil-Whisper's
    maximally spaced layers, arXiv:2311.00430).

    Args:
      n_teacher: The number of layers of the teacher's stack.
      n_student: That of the student's.
    """
    if n_student == 1:
        return [0]
    step = (n_teacher - 1) / (n_student - 1)
    return [round(j * step) for j in range(n_student)]


def select_first(teacher: Dict[str, Any], student: Dict[str, Any]) -> Selection:
    """Select evenly spaced layers, and the first channels, heads and hidden units.

    Args:
      teacher: The teacher's settings, by the names of the recipe's params.
      student: The student's settings.
    """
    depths = zip(
        per_stack(teacher, "num_encoder_layers"),
        per_stack(student, "num_encoder_layers"),
    )
    width = max(per_stack(student, "encoder_dim"))
    return Selection([layer_map(old, new) for old, new in depths], list(range(width)))

"""What a student keeps of its teacher: layers, channels, heads and hidden units."""

from dataclasses import dataclass, field
from typing import Any, Dict, List

import torch

from icefall_kd.student.presets import per_stack


def layer_map(n_teacher: int, n_student: int) -> List[int]:
    """Which teacher layer each student layer starts from: first, last, and evenly
    between (Distil-Whisper's maximally spaced layers, arXiv:2311.00430)."""
    if n_student == 1:
        return [0]
    step = (n_teacher - 1) / (n_student - 1)
    return [round(j * step) for j in range(n_student)]


# Ends the name by which a layer's attention heads stand among units.
HEADS = ".heads"


@dataclass
class Kept:
    """Which of the teacher's numbers a student's are, by their indices."""

    layers: List[List[int]]  # of each stack
    stream: List[int]  # the residual stream's channels, in the student's order
    # Hidden units by the names of the teacher's modules, heads by its layers' names and
    # HEADS, head 0 before the others, as its weights are nonlinear attention's too; of
    # what is not here the first are kept.
    units: Dict[str, List[int]] = field(default_factory=dict)

    # What is added to BiasNorm's log-scales, by the names of the teacher's modules.
    norms: Dict[str, float] = field(default_factory=dict)

    def of(self, name: str, n: int) -> torch.Tensor:
        kept = self.units.get(name) or range(n)
        return torch.tensor(list(kept), dtype=torch.int64)


def keep_first(teacher: Dict[str, Any], student: Dict[str, Any]) -> Kept:
    """Evenly spaced layers, and of channels, heads and hidden units the first.

    Args:
      teacher: Its settings, by the names of the recipe's params.
      student: The student's.
    """
    layers = zip(
        per_stack(teacher, "num_encoder_layers"),
        per_stack(student, "num_encoder_layers"),
    )
    width = max(per_stack(student, "encoder_dim"))
    return Kept([layer_map(a, b) for a, b in layers], list(range(width)))

"""Teacher-guided pruning: the recipe's pruned loss uses its teacher's ranges.

The source is Interspeech 2025, zhang25n. The recipe's model calls its transducer engine
by the engine's own name, ``k2.get_rnnt_prune_ranges(...)``, for the label positions of
each frame. Hooks of modules don't get this call, and the model is not edited: so the
function in the engine's module is replaced, from ``kd.begin(batch)`` until its first
call.
"""

from typing import Any, Callable, List, Optional, Tuple

import torch

from icefall_kd.errors import KDError, require
from icefall_kd.rnnt import get_engine
from icefall_kd.types import LatticeTargets, Targets

FUNCTION = "get_rnnt_prune_ranges"


class TeacherRanges:
    """Gives the student's pruned loss the teacher's ranges, batch by batch.

    It also keeps the joiner's logits on these ranges, so that the KL at the lattice's
    nodes needs no second forward pass of the joiner.

    Args:
      model: The student.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.engine = get_engine()
        self.joiner = model.joiner
        self._begun = False
        self._lattices: List[Optional[LatticeTargets]] = []
        self._engines_function: Optional[Callable] = None  # while it is replaced
        self._joiner_hook: Any = None
        self._ranges: Optional[torch.Tensor] = None  # (N, T, S)
        self._logits: Optional[torch.Tensor] = None  # (N, T, S, V)

    def begin(self, targets: Optional[Targets]) -> None:
        """Guide the next forward pass.

        Args:
          targets: Those of its batch; without lattices the student's own ranges stay.
        """
        self.close()  # the last batch's forward pass may have failed
        self._begun = True
        self._lattices = (
            targets.parts.get("lattice") if targets is not None else None
        ) or []
        if self._lattices:
            self._engines_function = getattr(self.engine, FUNCTION)
            setattr(self.engine, FUNCTION, self._guided_ranges)
            self._joiner_hook = self.joiner.register_forward_hook(self._keep_logits)

    def take(self) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """End the batch.

        Returns:
          The teacher's ranges, (N, T, S), and the joiner's logits there, (N, T, S, V);
          None and None where the student's own ranges stayed.

        Raises:
          KDError: The recipe did not call ``begin()`` before its forward pass.
        """
        require(
            self._begun,
            "--kd-stored-ranges is true, and compute_loss() does not call "
            "kd.begin(batch) before it reads the batch: plug the recipe again with "
            "`icefall-kd plug`",
        )
        ranges_and_logits = self._ranges, self._logits
        self.close()
        return ranges_and_logits

    def close(self) -> None:
        """Undo what :meth:`begin` did."""
        self._restore_engine()
        if self._joiner_hook is not None:
            self._joiner_hook.remove()
            self._joiner_hook = None
        self._ranges = self._logits = None
        self._begun, self._lattices = False, []

    def _restore_engine(self) -> None:
        if self._engines_function is not None:
            setattr(self.engine, FUNCTION, self._engines_function)
            self._engines_function = None

    def _keep_logits(self, joiner, inputs, output: torch.Tensor) -> None:
        if self._ranges is not None and self._logits is None:
            self._logits = output

    def _guided_ranges(self, px_grad, py_grad, boundary, s_range: int) -> torch.Tensor:
        """Replaces the engine's function, whose arguments these are; (N, T, S)."""
        self._restore_engine()
        ranges = getattr(self.engine, FUNCTION)(px_grad, py_grad, boundary, s_range)
        if not torch.is_grad_enabled():  # validation keeps the recipe's loss
            return ranges
        width, num_labels = ranges.size(2), px_grad.size(1)
        copies = len(boundary) // len(self._lattices)  # 2 with CR-CTC
        for i, lattice in enumerate(self._lattices * copies):
            if lattice is None:
                continue
            t, u = int(boundary[i, 3]), int(boundary[i, 2])
            _check_lattice(lattice, i, t, u, s_range, width)
            first = lattice.ranges[:, 0].to(ranges.device)
            first = first.clamp(max=num_labels + 1 - width)
            ranges[i, :t] = first[:, None] + torch.arange(width, device=ranges.device)
            ranges[i, t:] = ranges[i, t - 1]
        self._ranges = ranges
        return ranges


def _check_lattice(
    lattice: LatticeTargets, row: int, t: int, u: int, s_range: int, width: int
) -> None:
    """Refuse a lattice that is not of this row, or wider than the student's."""
    frames, lattice_width = lattice.ranges.shape
    labels = lattice.labels.size(0)
    if frames != t or labels != u:
        raise KDError(
            f"row {row} of a batch has {t} frames and {u} labels, and its teacher's "
            f"lattice {frames} and {labels}: run `icefall-kd dump` on the cuts that "
            "are trained on, with the student's tokenizer"
        )
    if min(lattice_width, u + 1) > width:
        raise KDError(
            f"the teacher's lattices are {lattice_width} wide and --prune-range is "
            f"{s_range}: give the student as many, or set --kd-stored-ranges false"
        )

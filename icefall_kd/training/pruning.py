"""Teacher-guided pruning: the recipe's pruned loss looks where its teacher's path goes.

The recipe's model asks its engine for the label positions of each frame, a call that no
hook of a module sees. So the engine's function is wrapped while a session lasts, and a
training batch says that it is on its way when the recipe reads its features.
"""

from typing import Any, Callable, Dict, Optional, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.rnnt import get_engine
from icefall_kd.types import Targets

NAME = "get_rnnt_prune_ranges"
_current: Optional["TeacherRanges"] = None


class _Batch(dict):
    """A batch that says when its features are read."""

    def __getitem__(self, key: str) -> Any:
        if key == "inputs" and _current is not None:
            _current.expect(super().__getitem__("kd_targets"))
        return super().__getitem__(key)


class AnnouncedBatches(torch.utils.data.Dataset):
    """The batches of a :class:`icefall_kd.targets.KDDataset`, as they are."""

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, cuts: Any) -> Dict[str, Any]:
        return _Batch(self.dataset[cuts])


class TeacherRanges:
    """Puts a teacher's ranges in the place of the student's own (Interspeech 2025,
    zhang25n), and keeps what the student's joiner says there, so that the lattice's KL
    needs no second pass of it.

    Args:
      model: The student.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        global _current
        self.engine = get_engine()
        self.own: Callable = getattr(self.engine, NAME)
        self.coming: Optional[Targets] = None
        self._ranges: Optional[torch.Tensor] = None
        self._logits: Optional[torch.Tensor] = None
        setattr(self.engine, NAME, self._guided)
        self._tap = model.joiner.register_forward_hook(self._keep)
        _current = self

    def close(self) -> None:
        """Give the engine its function back."""
        global _current
        setattr(self.engine, NAME, self.own)
        self._tap.remove()
        _current = None

    def expect(self, targets: Optional[Targets]) -> None:
        """Forget the last batch, whose pass may have failed; these come next."""
        self.coming, self._ranges, self._logits = targets, None, None

    def take(self) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """The ranges of the last batch, (N, T, S), and the joiner's logits there; None
        where the student's own ranges stood."""
        taken = self._ranges, self._logits
        self.expect(None)
        return taken

    def _keep(self, module, args, output) -> None:
        if self._ranges is not None and self._logits is None:
            self._logits = output

    def _guided(self, px_grad, py_grad, boundary, s_range: int) -> torch.Tensor:
        ranges = self.own(px_grad, py_grad, boundary, s_range)
        targets = self.coming
        self.expect(None)
        lattices = targets.parts.get("lattice") if targets is not None else None
        if not lattices or not torch.is_grad_enabled():
            return ranges
        width, last = ranges.size(2), px_grad.size(1)
        copies = len(boundary) // len(lattices)  # two of CR-CTC
        for i, lattice in enumerate(lattices * copies):
            if lattice is None:
                continue
            t, u = int(boundary[i, 3]), int(boundary[i, 2])
            if lattice.ranges.size(0) != t or lattice.labels.size(0) != u:
                raise KDError(
                    f"row {i} of a batch has {t} frames and {u} labels, and its "
                    f"teacher's lattice {lattice.ranges.size(0)} and "
                    f"{lattice.labels.size(0)}: run `icefall-kd dump` on the cuts "
                    "that are trained on, with the student's BPE model"
                )
            if min(lattice.ranges.size(1), u + 1) > width:
                raise KDError(
                    f"the teacher's lattices are {lattice.ranges.size(1)} wide and "
                    f"--prune-range is {s_range}: give the student as many, or set "
                    "--kd-teacher-ranges 0"
                )
            first = lattice.ranges[:, 0].to(ranges.device).clamp(max=last + 1 - width)
            ranges[i, :t] = first[:, None] + torch.arange(width, device=ranges.device)
            ranges[i, t:] = ranges[i, t - 1]
        self._ranges = ranges
        return ranges

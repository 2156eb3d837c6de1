"""Parts of the student that are frozen while its recipe trains it.

The recipe builds its optimizer after ``attach()``, and from all parameters. So a part
is frozen when the first training batch enters the model, by a hook of the model.
"""

from typing import Any, Dict

import torch

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.student.freeze import Freezer
from icefall_kd.training.progress import Progress


class Freezing:
    """What ``--kd-freeze`` asks for, batch by batch.

    Args:
      params: The recipe's own.
      model: The student, as the recipe trains it.
      progress: That of the session, which counts the batches, or one's own.

    Raises:
      KDError: what :class:`icefall_kd.student.freeze.Freezer` refuses.
    """

    def __init__(self, params: Dict[str, Any], model, progress: Progress) -> None:
        self.params, self.progress = params, progress
        batch = params.get("batch_idx_train")
        thawed = [
            part
            for part, at in progress.thawed.items()
            if batch is None or at <= batch  # else the checkpoint is an earlier one
        ]
        self.freezer = Freezer(
            model, params["kd_freeze"], float(progress.whole()), thawed
        )
        progress.thawed = {part: progress.thawed[part] for part in thawed}
        self._hook = None

    def start(self) -> None:
        """Freeze from the next training batch on."""
        if self.freezer.pending and not self.progress.kept:
            self.progress.keep(self.progress.hidden)
        # A plain function: a deep copy of the model shares it.
        self._hook = self.freezer.model.register_forward_pre_hook(
            lambda module, args: self._before_batch(module)
        )

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self.freezer.close()
        self.progress.close()

    @property
    def asks_for_fractions(self) -> bool:
        """Whether a part is to thaw within an epoch."""
        return any(until % 1 for until in self.freezer.pending)

    def _before_batch(self, model) -> None:
        if not torch.is_grad_enabled():
            return
        for part in self.freezer.update(self._epoch()):
            self.progress.thawed[str(part)] = int(self.params.get("batch_idx_train", 0))
            self.progress.learned = True
            self.progress.save()

    def after_batch(self, trains: bool, batch: Dict[str, Any]) -> None:
        """Count a training batch, where no session does; keep the file at others."""
        if trains:
            self.progress.mark()
            self.progress.saw(len(batch["supervisions"]["text"]))
        else:
            self.progress.save()

    def _epoch(self) -> float:
        """How many epochs are done, the same number in all processes.

        Each counts the cuts of its own batches: within an epoch the first one's count
        holds for all, or one would thaw what another one still freezes.
        """
        whole = self.progress.whole()
        if not any(whole < until < whole + 1 for until in self.freezer.pending):
            return float(whole)
        fraction = self.progress.fraction()
        if rank_and_world_size()[1] > 1:
            import torch.distributed as dist

            device = next(self.freezer.model.parameters()).device
            agreed = torch.tensor(fraction, dtype=torch.float64, device=device)
            dist.broadcast(agreed, 0)
            fraction = agreed.item()
        return whole + fraction

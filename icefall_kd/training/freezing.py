"""Parts of the student that are frozen while its recipe trains it.

The recipe builds its optimizer after ``attach()``, and from all parameters. So a part
is frozen when the first training batch enters the model, by a hook of the model.
"""

from typing import Any, Dict

import torch

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.student.freeze import Freezer
from icefall_kd.training.checkpoint import KDCheckpoint
from icefall_kd.training.clock import EpochClock


class Freezing:
    """Freezes and thaws parts of the student by ``--kd-freeze``.

    Args:
      params: The recipe's params.
      model: The student, as the recipe trains it.
      clock: The session's clock.
      checkpoint: The session's file, which keeps which parts thawed.

    Attributes:
      thawed: The batch of the whole training that was the first of each thawed part.

    Raises:
      KDError: What :class:`icefall_kd.student.freeze.Freezer` refuses.
    """

    def __init__(
        self,
        params: Dict[str, Any],
        model: torch.nn.Module,
        clock: EpochClock,
        checkpoint: KDCheckpoint,
    ) -> None:
        self.params, self.clock, self.checkpoint = params, clock, checkpoint
        self.thawed: Dict[str, int] = {}
        checkpoint.register("thawed", self)
        self.freezer = Freezer(
            model, params["kd_freeze"], float(clock.epochs_done()), self.thawed
        )
        self._hook: Any = None

    def state_dict(self) -> Dict[str, int]:
        """Return which parts thawed, and when."""
        return dict(self.thawed)

    def load_state_dict(self, state: Dict[str, int]) -> None:
        """Take over the parts that had thawed by the checkpoint's batch.

        Args:
          state: That of :meth:`state_dict`, perhaps of a later batch.
        """
        batch = self.params.get("batch_idx_train")
        self.thawed = {
            part: first_batch
            for part, first_batch in state.items()
            if batch is None or first_batch <= batch
        }

    def start(self) -> None:
        """Freeze from the next training batch on."""
        # A plain function: a deep copy of the model shares it.
        self._hook = self.freezer.model.register_forward_pre_hook(
            lambda *_: self._before_forward()
        )

    def close(self) -> None:
        """Thaw all parts."""
        if self._hook is not None:
            self._hook.remove()
        self.freezer.close()

    @property
    def needs_fractions(self) -> bool:
        """Whether a part is to thaw within an epoch."""
        return any(epochs % 1 for epochs in self.freezer.pending)

    def _before_forward(self) -> None:
        if not torch.is_grad_enabled():
            return
        for part in self.freezer.update(self._epoch()):
            self.thawed[str(part)] = int(self.params.get("batch_idx_train", 0))
            self.checkpoint.write()

    def _epoch(self) -> float:
        """Return how many epochs are done, the same number in all processes.

        Each process counts the cuts of its own batches. Within an epoch the first one's
        count holds for all: else one would thaw what another one still freezes.
        """
        done = self.clock.epochs_done()
        if not any(done < epochs < done + 1 for epochs in self.freezer.pending):
            return float(done)
        fraction = self.clock.fraction()
        if rank_and_world_size()[1] > 1:
            import torch.distributed as dist

            device = next(self.freezer.model.parameters()).device
            shared = torch.tensor(fraction, dtype=torch.float64, device=device)
            dist.broadcast(shared, 0)
            fraction = shared.item()
        return done + fraction

"""How many epochs of distillation are done."""

import math
from typing import Any, Dict, Optional

from icefall_kd.distributed import rank_and_world_size


class EpochClock:
    """Counts the epochs since distillation began, with the fraction of the present one.

    The fraction is that of the training cuts. Where their number is not known, it is
    taken from the epoch before.

    Args:
      params: The recipe's params. The recipe writes the number of its epoch to their
        ``cur_epoch``, which is not set before the first one.

    Attributes:
      first_epoch: The recipe's number of the epoch where distillation began, which may
        have been in an earlier process.
      cuts_per_epoch: The cuts of an epoch in all processes; 0 where not known.
      cuts_seen: The cuts of the present epoch so far, in all processes.
      epoch: The recipe's number of the last counted batch's epoch; None before.
      batches: The batches that this process counted.
    """

    def __init__(self, params: Dict[str, Any]) -> None:
        self.params = params
        self.first_epoch = int(params.get("start_epoch") or 1)
        self.cuts_per_epoch = 0
        self.cuts_seen = 0
        self.epoch: Optional[int] = None
        self.batches = 0
        # Whether cuts_seen counts from the epoch's first batch on.
        self._from_epochs_start = not int(params.get("start_batch") or 0)
        self._loaded_state: Optional[Dict[str, Any]] = None

    @property
    def num_epochs(self) -> float:
        """The epochs of this training, or infinity where the params lack them."""
        if not self.params.get("num_epochs"):
            return math.inf
        return max(1, int(self.params["num_epochs"]) - self.first_epoch + 1)

    @property
    def is_memory_scan(self) -> bool:
        """Whether icefall looks for batches that fill the memory, without training."""
        started = bool(self.params.get("start_epoch"))
        return started and not self.params.get("cur_epoch")

    @property
    def epoch_ended(self) -> bool:
        """Whether the recipe's epoch is another one than that of the last batch."""
        self._apply_loaded_state()
        return self.epoch is not None and self.params.get("cur_epoch") != self.epoch

    def epochs_done(self) -> int:
        """Return how many epochs are done, without the present one."""
        epoch = self.params.get("cur_epoch") or self.params.get("start_epoch") or 1
        return max(0, int(epoch) - self.first_epoch)

    def fraction(self) -> float:
        """Return how much of the present epoch is done, from 0 to 1."""
        self._apply_loaded_state()
        if not self.cuts_per_epoch or self.params.get("cur_epoch") != self.epoch:
            return 0.0
        return min(1.0, self.cuts_seen / self.cuts_per_epoch)

    def count(self, cuts: int) -> float:
        """Count a training batch.

        Args:
          cuts: The batch's number of cuts in this process.

        Returns:
          How many epochs were done before the batch.
        """
        epoch = self.params.get("cur_epoch")
        if not epoch:
            return float(self.epochs_done())
        self._apply_loaded_state()
        if epoch != self.epoch:
            if self.cuts_seen and self._from_epochs_start:
                self.cuts_per_epoch = self.cuts_seen
            self._from_epochs_start |= self.epoch is not None
            self.cuts_seen, self.epoch = 0, epoch
        done = self.epochs_done() + self.fraction()
        self.cuts_seen += cuts * rank_and_world_size()[1]
        self.batches += 1
        return done

    def state_dict(self) -> Dict[str, Any]:
        """Return what a training that goes on needs in order to count on."""
        self._apply_loaded_state()
        return {
            "epoch": self.epoch,
            "seen": self.cuts_seen,
            "per_epoch": self.cuts_per_epoch,
            "from_start": self._from_epochs_start,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Count on from ``state`` as soon as the recipe's epochs begin.

        Args:
          state: That of :meth:`state_dict`.
        """
        self._loaded_state = state

    def _apply_loaded_state(self) -> None:
        state = self._loaded_state
        if state is None or not self.params.get("cur_epoch"):
            return
        self._loaded_state = None
        self.epoch, self.cuts_seen = state["epoch"], state["seen"]
        self.cuts_per_epoch = state["per_epoch"]
        # Lhotse's samplers begin an epoch anew that was cut short.
        cut_short = self.params["cur_epoch"] == self.epoch
        self._from_epochs_start = state["from_start"] and not cut_short

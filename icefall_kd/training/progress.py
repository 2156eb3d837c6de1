"""How far a training is, and what distillation keeps beside its checkpoints."""

import atexit
import copy
import logging
import math
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.errors import KDError
from icefall_kd.files import replacing

FILE = "kd.pt"
CHECKPOINTS = 5  # within an epoch, and as many at an epoch's end, whose states are kept


class Progress:
    """Epochs since distillation began, and a file of it for a training that goes on.

    ``kd.pt`` in the student's ``--exp-dir`` holds the epoch where this training began,
    the projectors between hidden layers, and which frozen parts thawed. It is read
    where a training goes on, and no checkpoint knows of it. What belongs to the last
    checkpoints is kept for each of them, so that a training that goes on from one does
    what it would have done.

    Args:
      params: The recipe's own, whose ``cur_epoch`` it moves on.
    """

    def __init__(self, params: Dict[str, Any]) -> None:
        self.params = params
        self.first = int(params.get("start_epoch") or 1)
        self.goes_on = int(params.get("start_batch") or 0) > 0
        self.file = Path(params["exp_dir"]) / FILE if params.get("exp_dir") else None
        self.hidden: Optional[Any] = None
        self.kept = False
        state = self._read()
        if state and (self.goes_on or self.first > state["first_epoch"]):
            self.first, self.state = state["first_epoch"], state
        else:
            self.state = None
        # By the batch of each checkpoint: projectors, and how far its epoch was.
        self.at: Dict[int, Dict[str, Any]] = dict((self.state or {}).get("at", {}))
        # Behind the last batch that may have a checkpoint, and not among those yet.
        self.newest: Optional[Dict[str, Any]] = (self.state or {}).get("newest")
        if self.newest and self.newest["batch"] not in self.at:
            self.at[self.newest["batch"]] = {**self.newest, "ended": not self.goes_on}
        self.from_checkpoint = self.at.get(int(params.get("batch_idx_train") or 0))
        # Parts that thawed, and the batch of the whole training that was their first.
        self.thawed: Dict[str, int] = dict((self.state or {}).get("thawed", {}))
        self.per_epoch = 0  # cuts, of all processes; 0: unknown
        self.seen, self.epoch = 0, None
        self.from_start = not self.goes_on  # whether `seen` counts a whole epoch
        self.learned = False  # since the file was written

    @property
    def num_epochs(self) -> float:
        """Of this training, or infinity where the recipe doesn't say."""
        if not self.params.get("num_epochs"):
            return math.inf
        return max(1, int(self.params["num_epochs"]) - self.first + 1)

    @property
    def searches(self) -> bool:
        """Whether icefall looks for batches that fill the memory, which trains nothing.

        That comes before any epoch.
        """
        started = bool(self.params.get("start_epoch"))
        return started and not self.params.get("cur_epoch")

    def whole(self) -> int:
        """How many whole epochs are done."""
        now = self.params.get("cur_epoch") or self.params.get("start_epoch") or 1
        return max(0, int(now) - self.first)

    def fraction(self) -> float:
        """How much of the present epoch is done, from 0 to 1.

        It is that of the training cuts; where their number is not known, that of the
        epoch before.
        """
        self._go_on()
        if not self.per_epoch or self.params.get("cur_epoch") != self.epoch:
            return 0.0
        return min(1.0, self.seen / self.per_epoch)

    def _go_on(self) -> None:
        """Count on from the checkpoint, once the epochs begin."""
        if self.from_checkpoint is not None and self.params.get("cur_epoch"):
            vars(self).update(self.from_checkpoint["counted"])
            self.from_checkpoint = None
            # Lhotse's samplers begin the epoch anew where it was cut short.
            self.from_start &= self.params["cur_epoch"] != self.epoch

    def saw(self, cuts: int) -> float:
        """Count a batch; return how many epochs were done before it."""
        if not self.params.get("cur_epoch"):
            return float(self.whole())
        self._go_on()
        epoch = self.params["cur_epoch"]
        if epoch != self.epoch:
            if self.seen and self.from_start:
                self.per_epoch = self.seen
            self.from_start |= self.epoch is not None
            self.seen, self.epoch = 0, epoch
        self.learned = True
        done = self.whole() + self.fraction()
        self.seen += cuts * rank_and_world_size()[1]
        return done

    def mark(self) -> None:
        """Keep what belongs to a checkpoint; call it before each training batch.

        The recipe writes one behind an epoch's last batch, and behind every
        ``save_every_n``-th.
        """
        epoch = self.params.get("cur_epoch")
        if not (self.kept and epoch):
            return
        self._go_on()
        behind = int(self.params.get("batch_idx_train") or 0) - 1
        every = int(self.params.get("save_every_n") or 0)
        ended = self.epoch is not None and epoch != self.epoch
        if behind > 0 and (ended or (every and behind % every == 0)):
            self.at.pop(behind, None)
            self.at[behind] = {**self._present(), "ended": ended}
            for kind in (True, False):
                batches = [
                    b for b, s in self.at.items() if s.get("ended", False) == kind
                ]
                for old in batches[:-CHECKPOINTS]:
                    del self.at[old]
            self.learned = True
            self.save()

    def before_checkpoint(self) -> None:
        """Keep what belongs to the checkpoint that may be about to be written.

        A training that is killed before its next batch goes on from that one too.
        """
        if not (self.kept and self.params.get("cur_epoch") and self.epoch is not None):
            return
        batch = int(self.params.get("batch_idx_train") or 0)
        self.newest = {**self._present(), "batch": batch}
        self.learned = True
        self.save()

    def _present(self) -> Dict[str, Any]:
        names = ("epoch", "seen", "per_epoch", "from_start")
        state: Dict[str, Any] = {
            "counted": {name: getattr(self, name) for name in names}
        }
        if self.hidden is not None:
            state["hidden"] = copy.deepcopy(self.hidden.state_dict())
        return state

    def keep(self, hidden: Optional[Any]) -> None:
        """Begin to keep the file, with the projectors of ``hidden``."""
        if self.state and hidden is not None:
            state = (self.from_checkpoint or self.state).get("hidden", {})
            if state and self.from_checkpoint is None:
                logging.warning(
                    f"{self.file} has no projectors of the checkpoint that this "
                    "training goes on from: it takes the newest"
                )
            hidden.load_state_dict(state)
        self.hidden = hidden
        if self.file is not None and rank_and_world_size()[0] == 0:
            self.kept = True
            atexit.register(self.save)

    def save(self) -> None:
        """Write the file, if training went on since it was written."""
        if not (self.kept and self.learned and self.file.parent.is_dir()):
            return
        state: Dict[str, Any] = {"first_epoch": self.first, "at": self.at}
        if self.newest:
            state["newest"] = self.newest
        if self.hidden is not None:
            state["hidden"] = self.hidden.state_dict()
        if self.thawed:
            state["thawed"] = self.thawed
        with replacing(self.file) as temporary:
            torch.save(state, temporary)
        self.learned = False

    def close(self) -> None:
        self.kept = False
        atexit.unregister(self.save)

    def _read(self) -> Optional[Dict[str, Any]]:
        if self.file is None or not self.file.is_file():
            return None
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            kept = {name: dict(state.get(name, {})) for name in ("at", "thawed")}
            return {**state, **kept, "first_epoch": int(state["first_epoch"])}
        except Exception as e:  # torch raises many kinds for what is none
            raise KDError(
                f"{self.file} can't be read ({type(e).__name__}): remove it to begin "
                "the schedule and the projectors anew"
            ) from None

"""``kd.pt``: what distillation keeps beside the recipe's checkpoints."""

import atexit
import copy
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.training.clock import EpochClock

FILE = "kd.pt"
SNAPSHOTS = 5  # of checkpoints within an epoch, and as many of those at an epoch's end


class KDCheckpoint:
    """The file ``kd.pt`` in the student's experiment folder.

    No checkpoint of the recipe has anything of it. It holds the epoch where
    distillation began, the newest state of each registered object, and a snapshot of
    these and of the clock for each of the recipe's last checkpoints, so that a training
    that goes on from one of them does what it would have done::

        {"first_epoch": 1,
         "at": {BATCH: {"counted": CLOCK, NAME: STATE, "ended": True}},
         "newest": {"batch": BATCH, "counted": CLOCK, NAME: STATE},
         NAME: STATE}

    Args:
      params: The recipe's params.
      clock: The clock, whose ``first_epoch`` and counts are set where a training goes
        on.

    Raises:
      KDError: The folder's file can't be read.
    """

    def __init__(self, params: Dict[str, Any], clock: EpochClock) -> None:
        self.params, self.clock = params, clock
        self.file = Path(params["exp_dir"]) / FILE if params.get("exp_dir") else None
        self.is_written = False  # by this process
        self._saved_batches = 0  # the clock's, when the file was written
        self._objects: Dict[str, Any] = {}
        self._snapshot_names: List[str] = []  # of objects whose state snapshots have
        within_epoch = int(params.get("start_batch") or 0) > 0
        state = self._read()
        if state and (within_epoch or clock.first_epoch > state["first_epoch"]):
            clock.first_epoch = state["first_epoch"]
        else:
            state = {}
        self.state = state
        self.snapshots: Dict[int, Dict[str, Any]] = dict(state.get("at", {}))
        # For a checkpoint that the recipe may have written after the last batch.
        self.newest: Optional[Dict[str, Any]] = state.get("newest")
        if self.newest and self.newest["batch"] not in self.snapshots:
            snapshot = {**self.newest, "ended": not within_epoch}
            self.snapshots[self.newest["batch"]] = snapshot
        # That of the checkpoint which this training goes on from.
        self.snapshot = self.snapshots.get(int(params.get("batch_idx_train") or 0))
        if self.snapshot is not None:
            clock.load_state_dict(self.snapshot["counted"])

    def _read(self) -> Dict[str, Any]:
        if self.file is None or not self.file.is_file():
            return {}
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            tables = {name: dict(state.get(name, {})) for name in ("at", "thawed")}
            return {**state, **tables, "first_epoch": int(state["first_epoch"])}
        except Exception as e:  # torch raises many kinds for what is no such file
            raise KDError(
                f"{self.file} can't be read ({type(e).__name__}): remove it to begin "
                "the schedule and the projectors anew"
            ) from None

    def register(self, name: str, stateful: Any, noun: str = "") -> None:
        """Load an object's state where a training goes on, and keep it from now on.

        Args:
          name: Its name in the file.
          stateful: Any object with ``state_dict()`` and ``load_state_dict()``.
          noun: What a warning calls it, such as "projectors". Each snapshot has a state
            of it. "" for an object whose newest state fits every checkpoint.
        """
        if noun:
            self._snapshot_names.append(name)
        snapshot = self.snapshot if noun else None
        state = (self.state if snapshot is None else snapshot).get(name, {})
        if state and noun and snapshot is None:
            logging.warning(
                f"{self.file} has no {noun} of the checkpoint that this training goes "
                "on from: it takes the newest"
            )
        stateful.load_state_dict(state)
        self._objects[name] = stateful

    def start(self) -> None:
        """Write the file from now on, in the first process, and when it ends."""
        if self.file is not None and rank_and_world_size()[0] == 0:
            self.is_written = True
            atexit.register(self.save)

    def close(self) -> None:
        """Write the file no more."""
        self.is_written = False
        atexit.unregister(self.save)

    def before_batch(self) -> None:
        """Take a snapshot if the recipe may have written a checkpoint since the last
        batch; call it before each training batch.

        The recipe writes one after an epoch's last batch, and after every
        ``save_every_n``-th.
        """
        if not (self.is_written and self.params.get("cur_epoch")):
            return
        last_batch = int(self.params.get("batch_idx_train") or 0) - 1
        every = int(self.params.get("save_every_n") or 0)
        ended = self.clock.epoch_ended
        if last_batch <= 0 or not (ended or (every and last_batch % every == 0)):
            return
        self.snapshots.pop(last_batch, None)  # the newest is to be the last one
        self.snapshots[last_batch] = {**self._take_snapshot(), "ended": ended}
        for at_epochs_end in (True, False):
            batches = [
                batch
                for batch, snapshot in self.snapshots.items()
                if snapshot.get("ended", False) == at_epochs_end
            ]
            for batch in batches[:-SNAPSHOTS]:
                del self.snapshots[batch]
        self.write()

    def before_checkpoint(self) -> None:
        """Take a snapshot as the recipe may be about to write a checkpoint.

        A training that is killed before its next batch goes on from that one too.
        """
        if not self.params.get("cur_epoch") or self.clock.epoch is None:
            return
        if self.is_written:
            batch = int(self.params.get("batch_idx_train") or 0)
            self.newest = {**self._take_snapshot(), "batch": batch}
            self.write()

    def _take_snapshot(self) -> Dict[str, Any]:
        states = {n: self._objects[n].state_dict() for n in self._snapshot_names}
        return {"counted": self.clock.state_dict(), **copy.deepcopy(states)}

    def save(self) -> None:
        """Write the file, if a batch was counted since it was written."""
        if self.clock.batches > self._saved_batches:
            self.write()

    def write(self) -> None:
        """Write the file, if this process does."""
        if not (self.is_written and self.file.parent.is_dir()):
            return
        state: Dict[str, Any] = {
            "first_epoch": self.clock.first_epoch,
            "at": self.snapshots,
        }
        if self.newest:
            state["newest"] = self.newest
        states = {name: x.state_dict() for name, x in self._objects.items()}
        state.update({name: x for name, x in states.items() if x})
        with replacing(self.file) as temporary:
            torch.save(state, temporary)
        self._saved_batches = self.clock.batches

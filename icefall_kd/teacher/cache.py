"""A teacher that runs in the first epoch and whose targets are read from the second."""

from dataclasses import replace
from typing import Dict, List, Sequence

import torch
from lhotse.cut import Cut, MonoCut, MultiCut

from icefall_kd.errors import KDError, require
from icefall_kd.targets.manifest import read_pointers
from icefall_kd.targets.model_input import collate_input, why_unusable
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer
from icefall_kd.targets.writer import TargetWriter
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.types import Targets


class CachingTeacher:
    """A teacher in the training process, whose targets are stored as it runs.

    It runs on each cut's own stored features, without noise and SpecAugment, so that
    what is stored stands for the cut in every epoch.

    Args:
      teacher: Computes the targets of cuts that are not stored yet.
      writer: Stores them. Each process of a DDP training has its own, a job of the same
        manifest, and reads what the other processes have stored.
      missing: What becomes of a cut that the teacher can't run on: "refuse" or "hard";
        see :func:`icefall_kd.targets.reading.collate_targets`.
    """

    def __init__(
        self, teacher: Teacher, writer: TargetWriter, missing: str = "refuse"
    ) -> None:
        self.teacher = teacher
        self.writer = writer
        self.missing = missing
        self.pointers: Dict[str, Pointer] = {}
        self._offsets = dict.fromkeys(writer.partials(), 0)
        self._read_new_pointers()

    def targets(self, cuts: Sequence[Cut], device: torch.device) -> Targets:
        """The teacher's targets of a batch, row by row, on the CPU.

        Args:
          cuts: The cut of each row.
          device: Where the teacher runs.

        Raises:
          KDError: a cut that is made of two cuts with speech, has no features, or that
            the teacher can't run on and is to be refused.
        """
        sources = [speech_of(cut) for cut in cuts]
        usable = [cut for cut in sources if self._is_usable(cut)]
        if any(cut.id not in self.pointers for cut in usable):
            self._read_new_pointers()
        new = {cut.id: cut for cut in usable if cut.id not in self.pointers}
        if new:
            self._store(list(new.values()), device)
        return collate_targets([self._with_pointer(c) for c in sources], self.missing)

    def _is_usable(self, cut: Cut) -> bool:
        reason = why_unusable(cut)
        require(
            not reason or self.missing != "refuse",
            f"the cut {cut.id} {reason}: leave it out, or let such cuts have the hard "
            "loss alone with --kd-missing hard",
        )
        return not reason

    def _read_new_pointers(self) -> None:
        """Take up what this and the other processes have stored since."""
        for path, offset in self._offsets.items():
            pointers, self._offsets[path] = read_pointers(path, offset)
            self.pointers.update(pointers)

    def _store(self, cuts: List[MonoCut], device: torch.device) -> None:
        x, x_lens = collate_input(cuts)
        targets = self.teacher.targets(x.to(device), x_lens.to(device), cuts)
        for i, (cut, n) in enumerate(zip(cuts, targets.lens.tolist())):
            values = {kind: rows[i, :n] for kind, rows in targets.parts.items()}
            self.pointers[cut.id] = self.writer.write(cut, **values)

    def _with_pointer(self, cut: Cut) -> Cut:
        """A copy of ``cut`` with the pointer at its targets, if it has any."""
        if cut.id not in self.pointers:
            return cut
        cut = cut.with_id(cut.id)
        pointer = replace(self.pointers[cut.id])
        cut.custom = {**(cut.custom or {}), FIELD: pointer.to_dict()}
        return cut


def speech_of(cut: Cut) -> Cut:
    """The one MonoCut in ``cut`` that has a supervision; a MultiCut stays itself.

    Args:
      cut: A cut of a training batch, mixed with noise or padded perhaps.

    Raises:
      KDError: none or several of them, one that is not at the start of ``cut``, or one
        without stored features.
    """
    if isinstance(cut, MultiCut):
        return cut
    tracks = getattr(cut, "tracks", None)
    inner = [t.cut for t in tracks] if tracks else [cut]
    speech = [c for c in inner if isinstance(c, MonoCut) and c.supervisions]
    if len(speech) != 1 or (tracks and tracks[inner.index(speech[0])].offset != 0):
        raise KDError(
            f"the cut {cut.id} is made of {len(speech)} cuts with speech, and a "
            "caching teacher runs on one at the cut's start: train without "
            "concatenation, or dump the targets first"
        )
    require(
        speech[0].has_features,
        f"the cut {speech[0].id} has no stored features, and a caching teacher runs on "
        "those: compute them first, or run the teacher without a cache",
    )
    return speech[0]

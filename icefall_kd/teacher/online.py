"""Teachers that are asked while the student trains."""

import math
from dataclasses import replace
from typing import Callable, Dict, List, Optional, Sequence

import torch
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.dataset.collation import collate_features
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.hook import TeacherHook
from icefall_kd.targets.dataset import collate_targets
from icefall_kd.targets.store import FIELD, Pointer
from icefall_kd.targets.writer import LogitWriter
from icefall_kd.types import Targets


class OnlineTeacher:
    """One or more teachers in the training process: no storage, no gradient.

    They hear what the student hears, augmented as it is, in eval mode; their random
    draws leave the student's random state alone. Several teachers are averaged,
    p = sum_m w_m p_m, or one is chosen for each cut.

    Args:
      models: Trained recipe models, of the same tokens. They are frozen.
      weights: One for each model, above 0; they are brought to a sum of 1. Equal by
        default.
      choose: Given a cut, the index of the model that it is taught by; instead of
        ``weights``.

    Raises:
      KDError: no models, or weights that don't fit them.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Optional[Sequence[float]] = None,
        choose: Optional[Callable[[Cut], int]] = None,
    ) -> None:
        if not models:
            raise KDError("there is no teacher: give one model or more")
        if weights is not None and choose is not None:
            raise KDError("weights and choose are both given: give one of them")
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models) or not all(0 < w < math.inf for w in weights):
            raise KDError(
                f"the weights are {weights} for {len(models)} teachers: give a number "
                "above 0 for each"
            )
        for model in models:
            model.eval().requires_grad_(False)
        self.hooks = [TeacherHook(model) for model in models]
        self.log_weights = [math.log(w / sum(weights)) for w in weights]
        self.choose = choose

    def to(self, device: torch.device) -> "OnlineTeacher":
        for hook in self.hooks:
            hook.model.to(device)
        return self

    def targets(
        self,
        x: torch.Tensor,
        x_lens: torch.Tensor,
        cuts: Optional[Sequence[Cut]] = None,
    ) -> Targets:
        """What the teachers say on a batch.

        Args:
          x: (N, T, F), features.
          x_lens: (N,), valid frames.
          cuts: The cut of each row, where a teacher is chosen for each.
        """
        outs = [hook.encode(x, x_lens) for hook in self.hooks]
        log_probs = [out.ctc_logits.float().log_softmax(-1) for out in outs]
        if len({lp.size(-1) for lp in log_probs}) > 1:
            raise KDError(
                f"the teachers have {[lp.size(-1) for lp in log_probs]} symbols: "
                "teachers of one student need the same BPE model"
            )
        stacked = torch.stack(log_probs)  # (M, N, T, V)
        if self.choose is not None:
            index = torch.tensor([self._chosen(cut) for cut in cuts or []])
            if len(index) != len(x):
                raise KDError(
                    f"there are {len(index)} cuts for {len(x)} rows, and each row's "
                    "teacher is chosen by its cut: give one cut for each"
                )
            ctc = stacked[index.to(x.device), torch.arange(len(x), device=x.device)]
        else:
            weights = stacked.new_tensor(self.log_weights)[:, None, None, None]
            ctc = (stacked + weights).logsumexp(0) if len(outs) > 1 else stacked[0]
        return Targets(ctc, outs[0].encoder_out_lens)

    def _chosen(self, cut: Cut) -> int:
        index = self.choose(cut)
        if not 0 <= index < len(self.hooks):
            raise KDError(
                f"the teacher chosen for cut {cut.id} is {index}, and there are "
                f"{len(self.hooks)}: give 0 to {len(self.hooks) - 1}"
            )
        return index


class CachingTeacher:
    """Asked online in the first epoch, stored as it goes, read from then on.

    It hears each cut's own stored features, without noise and SpecAugment, so that
    what is stored stands for the cut in every epoch.

    Args:
      teacher: Who is asked.
      writer: Where the answers go. Each process of a DDP training has its own; what
        another process stored is asked again.
    """

    def __init__(self, teacher: OnlineTeacher, writer: LogitWriter) -> None:
        self.teacher = teacher
        self.writer = writer
        self.pointers: Dict[str, Pointer] = dict(writer.pointers())

    def targets(self, cuts: Sequence[Cut], device: torch.device) -> Targets:
        """What the teacher says on the cuts of a batch, row by row.

        Raises:
          KDError: a cut that is made of two cuts with speech, or has no features.
        """
        carriers = [speech_of(cut) for cut in cuts]
        new = {c.id: c for c in carriers if c.id not in self.pointers}
        if new:
            self._ask(list(new.values()), device)
        return collate_targets([self._with_pointer(c) for c in carriers])

    def _ask(self, cuts: List[MonoCut], device: torch.device) -> None:
        x, x_lens = collate_features(CutSet.from_cuts(cuts))
        found = self.teacher.targets(x.to(device), x_lens.to(device), cuts)
        for cut, logits, n in zip(cuts, found.ctc, found.lens.tolist()):
            self.pointers[cut.id] = self.writer.write(cut, logits[:n])

    def _with_pointer(self, cut: MonoCut) -> MonoCut:
        cut = cut.with_id(cut.id)
        pointer = replace(self.pointers[cut.id])
        cut.custom = {**(cut.custom or {}), FIELD: pointer.to_dict()}
        return cut


def speech_of(cut: Cut) -> MonoCut:
    """The one MonoCut in ``cut`` that has a supervision."""
    tracks = getattr(cut, "tracks", None)
    inner = [t.cut for t in tracks] if tracks else [cut]
    found = [c for c in inner if isinstance(c, MonoCut) and c.supervisions]
    if len(found) != 1 or (tracks and tracks[inner.index(found[0])].offset != 0):
        raise KDError(
            f"the cut {cut.id} is made of {len(found)} cuts with speech, and a caching "
            "teacher hears one at the cut's start: train without concatenation, or "
            "dump the targets first"
        )
    if not found[0].has_features:
        raise KDError(
            f"the cut {found[0].id} has no stored features, and a caching teacher "
            "hears those: compute them first, or ask the teacher without a cache"
        )
    return found[0]

"""Teachers that are asked while the student trains."""

import math
from dataclasses import replace
from typing import Callable, Dict, List, Optional, Sequence

import torch
from lhotse.cut import Cut, MonoCut, MultiCut
from torch import nn
from torch.nn import functional as F

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import Layer, hidden_rows
from icefall_kd.losses.transducer import nodes_of, path_nodes
from icefall_kd.tap import ModelTap
from icefall_kd.targets.dataset import collate_targets
from icefall_kd.targets.heard import collate_heard, why_unheard
from icefall_kd.targets.manifest import read_pointers
from icefall_kd.targets.store import FIELD, Pointer
from icefall_kd.targets.writer import LogitWriter
from icefall_kd.types import EncoderOut, Nodes, PrunedLattice, Targets
from icefall_kd.zipformer import MIN_FRAMES


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
      hidden: Layers to be taken too (:mod:`icefall_kd.kinds.hidden`), of one model.
      ctc: Whether CTC logits are taken.

    Raises:
      KDError: no models, weights that don't fit them, or hidden layers of several.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Optional[Sequence[float]] = None,
        choose: Optional[Callable[[Cut], int]] = None,
        hidden: Sequence[Layer] = (),
        ctc: bool = True,
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
        if hidden and len(models) > 1:
            raise KDError(
                f"there are {len(models)} teachers, and hidden layers of several can't "
                "be averaged: keep those of one teacher"
            )
        for model in models:
            model.eval().requires_grad_(False)
        self.hidden = tuple(hidden)
        self.hooks = [ModelTap(model, hidden, ctc) for model in models]
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.weights /= self.weights.sum()
        self.choose = choose

    def to(self, device: torch.device) -> "OnlineTeacher":
        for hook in self.hooks:
            hook.model.to(device)
        return self

    def close(self) -> None:
        """Take the taps off the models."""
        for hook in self.hooks:
            hook.close()

    def targets(
        self,
        x: torch.Tensor,
        x_lens: torch.Tensor,
        cuts: Optional[Sequence[Cut]] = None,
        y: Optional[Sequence[Sequence[int]]] = None,
        s_range: int = 5,
        path_only: bool = False,
        missing: str = "refuse",
    ) -> Targets:
        """What the teachers say on a batch.

        A row with more labels than frames has no nodes, as a stored one has no lattice.

        Args:
          x: (N, T, F), features.
          x_lens: (N,), valid frames.
          cuts: The cut of each row, where a teacher is chosen for each.
          y: The labels of each row, for lattices.
          s_range: Label positions of a lattice at a frame; 0: all of them.
          path_only: Of a lattice the nodes of its best alignment alone.
          missing: What becomes of a row that is too short to be heard: "refuse", or
            "hard", a row whose mask is False throughout.

        Raises:
          KDError: such a row, if it is to be refused.
        """
        heard = x_lens >= MIN_FRAMES
        if missing == "hard":
            x = F.pad(x, (0, 0, 0, max(0, MIN_FRAMES - x.size(1))))
            x_lens = x_lens.clamp(min=MIN_FRAMES)
        elif cuts and not heard.all():
            # By the batch: a cut may have no stored features, or be mixed with noise.
            row = int((~heard).nonzero()[0])
            raise KDError(
                f"the cut {cuts[row].id} has {int(x_lens[row])} feature frames and the "
                f"teacher needs {MIN_FRAMES}: leave it out, or let such cuts have the "
                "hard loss alone with --kd-missing hard"
            )
        outs = self.encode(x, x_lens)
        lens = outs[0].encoder_out_lens
        found = Targets(lens * heard, whole=heard)
        if self.hooks[0].with_ctc:
            found.parts["ctc"] = self.ctc(outs, cuts).float().log_softmax(-1)
        if self.hidden:
            rows = {layer: hidden_rows(outs[0], layer) for layer in self.hidden}
            found.parts["hidden"] = rows
        if y is not None:
            found.parts["nodes"] = self._nodes(outs, y, s_range, cuts, path_only)
        return found

    def _nodes(
        self,
        outs: List[EncoderOut],
        y: Sequence[Sequence[int]],
        s_range: int,
        cuts: Optional[Sequence[Cut]],
        path_only: bool,
    ) -> Optional[Nodes]:
        """The nodes of all rows that have as many frames as labels; None for none."""
        lens = outs[0].encoder_out_lens
        fits = [len(labels) <= n for labels, n in zip(y, lens.tolist())]
        y = [labels if ok else labels[:1] for labels, ok in zip(y, fits)]
        lattice = self.lattice(outs, y, s_range, cuts)
        if path_only:
            blank_id = int(self.hooks[0].model.decoder.blank_id)
            nodes = path_nodes(lattice, blank_id)
        else:
            nodes = nodes_of(lattice)
        if all(fits):
            return nodes
        rows = torch.tensor(fits, device=lens.device)
        return nodes.select(rows[nodes.row]) if any(fits) else None

    def encode(self, x: torch.Tensor, x_lens: torch.Tensor) -> List[EncoderOut]:
        """Each model's forward pass."""
        return [hook.encode(x, x_lens) for hook in self.hooks]

    def ctc(
        self, outs: List[EncoderOut], cuts: Optional[Sequence[Cut]] = None
    ) -> torch.Tensor:
        """CTC logits, (N, T, V), those of all models averaged."""
        logits = [out.ctc_logits for out in outs]
        if len(logits) == 1 and self.choose is None:
            return logits[0]
        return _mixed(logits, self._weights(outs, cuts))

    def lattice(
        self,
        outs: List[EncoderOut],
        y: Sequence[Sequence[int]],
        s_range: int = 5,
        cuts: Optional[Sequence[Cut]] = None,
    ) -> PrunedLattice:
        """The transducers' outputs, averaged on the nodes of the first of each row.

        Args:
          outs: Of :meth:`encode`.
          y: The labels of each row.
          s_range: Label positions at a frame; 0: all of them.
          cuts: The cut of each row, where a teacher is chosen for each.
        """
        s_range = s_range or 1 + max(len(labels) for labels in y)
        found = [h.lattice(o, y, s_range) for h, o in zip(self.hooks, outs)]
        if len(found) == 1:
            return found[0]
        weights = self._weights(outs, cuts)  # (M, N)
        first = (weights > 0).int().argmax(0)
        rows = torch.arange(len(first), device=first.device)
        ranges = torch.stack([x.ranges for x in found])[first, rows]
        found = [h.lattice(o, y, s_range, ranges) for h, o in zip(self.hooks, outs)]
        return replace(
            found[0],
            logits=_mixed([x.logits for x in found], weights),
            occupancy=sum(
                w[:, None, None] * x.occupancy for w, x in zip(weights, found)
            ),
        )

    def _weights(
        self, outs: List[EncoderOut], cuts: Optional[Sequence[Cut]]
    ) -> torch.Tensor:
        """(M, N): each model's share in each row."""
        lens = outs[0].encoder_out_lens
        if self.choose is None:
            weights = self.weights[:, None].expand(-1, len(lens))
            return weights.to(device=lens.device, dtype=torch.float32)
        index = torch.tensor([self._chosen(cut) for cut in cuts or []])
        if len(index) != len(lens):
            raise KDError(
                f"there are {len(index)} cuts for {len(lens)} rows, and each row's "
                "teacher is chosen by its cut: give one cut for each"
            )
        chosen = torch.arange(len(outs))[:, None] == index
        return chosen.float().to(lens.device)

    def _chosen(self, cut: Cut) -> int:
        index = self.choose(cut)
        if not 0 <= index < len(self.hooks):
            raise KDError(
                f"the teacher chosen for cut {cut.id} is {index}, and there are "
                f"{len(self.hooks)}: give 0 to {len(self.hooks) - 1}"
            )
        return index


def _mixed(logits: List[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """log sum_m w_m softmax(logits_m)."""
    sizes = [x.size(-1) for x in logits]
    if len(set(sizes)) > 1:
        raise KDError(
            f"the teachers have {sizes} symbols: teachers of one student need the same "
            "BPE model"
        )
    total = None
    for x, w in zip(logits, weights):
        w = w.log().view(-1, *[1] * (x.ndim - 1))
        term = x.float().log_softmax(-1) + w
        total = term if total is None else torch.logaddexp(total, term)
    return total


class CachingTeacher:
    """Asked online in the first epoch, stored as it goes, read from then on.

    It hears each cut's own stored features, without noise and SpecAugment, so that
    what is stored stands for the cut in every epoch.

    Args:
      teacher: Who is asked.
      writer: Where the answers go. Each process of a DDP training has its own, a job
        of the same manifest, and reads what the others have stored.
      missing: What becomes of a cut that can't be heard: "refuse" or "hard"; see
        :func:`icefall_kd.targets.dataset.collate_targets`.
    """

    def __init__(
        self, teacher: OnlineTeacher, writer: LogitWriter, missing: str = "refuse"
    ) -> None:
        self.teacher = teacher
        self.writer = writer
        self.missing = missing
        self.pointers: Dict[str, Pointer] = {}
        self._offsets = dict.fromkeys(writer.partials(), 0)
        self._learn()

    def targets(self, cuts: Sequence[Cut], device: torch.device) -> Targets:
        """What the teacher says on the cuts of a batch, row by row.

        Raises:
          KDError: a cut that is made of two cuts with speech, has no features, or
            can't be heard and is to be refused.
        """
        carriers = [speech_of(cut) for cut in cuts]
        heard = [cut for cut in carriers if self._is_heard(cut)]
        if any(c.id not in self.pointers for c in heard):
            self._learn()
        new = {c.id: c for c in heard if c.id not in self.pointers}
        if new:
            self._ask(list(new.values()), device)
        return collate_targets([self._with_pointer(c) for c in carriers], self.missing)

    def _is_heard(self, cut: Cut) -> bool:
        reason = why_unheard(cut)
        if reason and self.missing == "refuse":
            raise KDError(
                f"the cut {cut.id} {reason}: leave it out, or let such cuts have the "
                "hard loss alone with --kd-missing hard"
            )
        return not reason

    def _learn(self) -> None:
        """Take up what this and the other processes have stored since."""
        for path, offset in self._offsets.items():
            found, self._offsets[path] = read_pointers(path, offset)
            self.pointers.update(found)

    def _ask(self, cuts: List[MonoCut], device: torch.device) -> None:
        x, x_lens = collate_heard(cuts)
        found = self.teacher.targets(x.to(device), x_lens.to(device), cuts)
        for cut, logits, n in zip(cuts, found.parts["ctc"], found.lens.tolist()):
            self.pointers[cut.id] = self.writer.write(cut, logits[:n])

    def _with_pointer(self, cut: Cut) -> Cut:
        """A copy of ``cut`` with the pointer at its targets, if it has any."""
        if cut.id not in self.pointers:
            return cut
        cut = cut.with_id(cut.id)
        pointer = replace(self.pointers[cut.id])
        cut.custom = {**(cut.custom or {}), FIELD: pointer.to_dict()}
        return cut


def speech_of(cut: Cut) -> Cut:
    """The one MonoCut in ``cut`` that has a supervision; a MultiCut stays itself."""
    if isinstance(cut, MultiCut):
        return cut
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

"""One or more trained models that run as the teacher."""

import math
from dataclasses import replace
from typing import Callable, List, Optional, Sequence, Tuple, Union

import torch
from lhotse.cut import Cut
from torch import nn
from torch.nn import functional as F

from icefall_kd.errors import KDError, require
from icefall_kd.kinds.hidden import Layer, hidden_rows
from icefall_kd.losses.nodes import nodes_of, path_nodes
from icefall_kd.tap import ModelTap
from icefall_kd.types import (
    EncoderOut,
    Nodes,
    NoPath,
    PrunedLattice,
    Targets,
    map_tensors,
)
from icefall_kd.zipformer import MIN_FRAMES


class Teacher:
    """One or more models that run as one teacher, without gradient.

    The models are in eval mode, and their random draws leave the process's random
    state alone. Several models are averaged, p = sum_m w_m p_m, or one is chosen for
    each cut.

    Args:
      models: Trained recipe models, of the same tokens. They are frozen.
      weights: One for each model, above 0; they are brought to a sum of 1. Equal by
        default.
      choose: Given a cut, returns the index of the model that teaches it; instead of
        ``weights``.
      layers: The hidden layers whose rows are taken (:mod:`icefall_kd.kinds.hidden`),
        of one model.
      with_ctc: Whether CTC logits are taken.
      with_simple: Whether those of the simple joiner's acoustic half are.

    Raises:
      KDError: no models, weights that don't fit them, or hidden layers of several.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Optional[Sequence[float]] = None,
        choose: Optional[Callable[[Cut], int]] = None,
        layers: Sequence[Layer] = (),
        with_ctc: bool = True,
        with_simple: bool = False,
    ) -> None:
        require(models, "there is no teacher: give one model or more")
        require(
            weights is None or choose is None,
            "`weights` and `choose` are both given: give one of them",
        )
        weights = [1.0] * len(models) if weights is None else list(weights)
        require(
            len(weights) == len(models) and all(0 < w < math.inf for w in weights),
            f"`weights` is {weights} for {len(models)} teachers: give a number above 0 "
            "for each",
        )
        require(
            not layers or len(models) == 1,
            f"there are {len(models)} teachers, and hidden layers of several can't be "
            "averaged: keep those of one teacher",
        )
        for model in models:
            model.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.with_ctc, self.with_simple = with_ctc, with_simple
        self.taps = [
            ModelTap(model, layers, with_ctc, with_simple=with_simple)
            for model in models
        ]
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.weights /= self.weights.sum()
        self.choose = choose

    def to(self, device: torch.device) -> "Teacher":
        """Move the models to ``device``; returns the teacher itself."""
        for tap in self.taps:
            tap.model.to(device)
        return self

    def close(self) -> None:
        """Take the taps off the models."""
        for tap in self.taps:
            tap.close()

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
        """The targets of a batch for the losses, on the models' device.

        A row with more labels than frames has no nodes, as a stored one has no lattice.

        Args:
          x: (N, T, F), features.
          x_lens: (N,), valid feature frames.
          cuts: The cut of each row, where a teacher is chosen for each.
          y: The labels of each row, for lattices; None for no lattices.
          s_range: Label positions of a lattice at a frame; 0: all of them.
          path_only: Whether a lattice has the nodes of its best alignment alone.
          missing: What becomes of a row that is too short for the encoder: "refuse", or
            "hard", a row whose mask is False throughout.

        Raises:
          KDError: such a row, if it is to be refused.
        """
        long_enough = x_lens >= MIN_FRAMES
        if missing == "hard":
            x = F.pad(x, (0, 0, 0, max(0, MIN_FRAMES - x.size(1))))
            x_lens = x_lens.clamp(min=MIN_FRAMES)
        elif cuts and not long_enough.all():
            # By the batch: a cut may have no stored features, or be mixed with noise.
            row = int((~long_enough).nonzero()[0])
            raise KDError(
                f"the cut {cuts[row].id} has {int(x_lens[row])} feature frames and the "
                f"teacher needs {MIN_FRAMES}: leave it out, or let such cuts have the "
                "hard loss alone with --kd-missing hard"
            )
        outs = self.run(x, x_lens)
        lens = outs[0].encoder_out_lens
        targets = Targets(lens * long_enough, whole=long_enough)
        if self.with_ctc:
            log_probs = self.ctc_logits(outs, cuts).float().log_softmax(-1)
            targets.parts["ctc"] = log_probs
        if self.with_simple:
            log_probs = self.simple_logits(outs, cuts).float().log_softmax(-1)
            targets.parts["simple"] = log_probs
        if self.layers:
            rows = {layer: hidden_rows(outs[0], layer) for layer in self.layers}
            targets.parts["hidden"] = rows
        if y is not None:
            targets.parts["nodes"] = self._nodes(outs, y, s_range, cuts, path_only)
        return targets

    def outputs_to_store(
        self,
        x: torch.Tensor,
        x_lens: torch.Tensor,
        cuts: Sequence[Cut],
        y: Optional[Sequence[Sequence[int]]] = None,
        s_range: int = 5,
    ) -> EncoderOut:
        """Compute the outputs of a batch, of which each kind takes what it stores.

        Args:
          x: (N, T, F), features.
          x_lens: (N,), valid feature frames.
          cuts: The cut of each row.
          y: The labels of each row, for lattices; None for no lattices.
          s_range: Label positions of a lattice at a frame; 0: all of the cut's own.

        Returns:
          The outputs of the first model, with the logits and the ``lattices`` of all of
          them.
        """
        outs = self.run(x, x_lens)
        ctc = self.ctc_logits(outs, cuts) if self.with_ctc else None
        simple = self.simple_logits(outs, cuts) if self.with_simple else None
        lattices = None
        if y is not None:
            lattices = self._lattice_of_each(outs, y, s_range, cuts)
        logits = {"ctc_logits": ctc, "simple_logits": simple}
        return replace(outs[0], **logits, lattices=lattices)

    def run(self, x: torch.Tensor, x_lens: torch.Tensor) -> List[EncoderOut]:
        """Run each model; return the outputs of each.

        Args:
          x: (N, T, F), features.
          x_lens: (N,), valid feature frames.
        """
        return [tap.encode(x, x_lens) for tap in self.taps]

    def ctc_logits(
        self, outs: List[EncoderOut], cuts: Optional[Sequence[Cut]] = None
    ) -> torch.Tensor:
        """CTC logits, (N, T, V); of several models the log of their averaged softmax.

        Args:
          outs: The forward pass of each model.
          cuts: The cut of each row, where a teacher is chosen for each.
        """
        return self._logits([out.ctc_logits for out in outs], outs, cuts)

    def simple_logits(
        self, outs: List[EncoderOut], cuts: Optional[Sequence[Cut]] = None
    ) -> torch.Tensor:
        """The same of the simple joiner's acoustic half, (N, T, V).

        Args:
          outs: The forward pass of each model.
          cuts: The cut of each row, where a teacher is chosen for each.
        """
        return self._logits([out.simple_logits for out in outs], outs, cuts)

    def _logits(
        self,
        logits: List[torch.Tensor],
        outs: List[EncoderOut],
        cuts: Optional[Sequence[Cut]],
    ) -> torch.Tensor:
        """Those of one model, or the log of the averaged softmax of several."""
        if len(logits) == 1 and self.choose is None:
            return logits[0]
        return _averaged(logits, self._weights(outs, cuts))

    def lattice(
        self,
        outs: List[EncoderOut],
        y: Sequence[Sequence[int]],
        s_range: int = 5,
        cuts: Optional[Sequence[Cut]] = None,
    ) -> PrunedLattice:
        """The pruned lattice of a batch, averaged over the models.

        The first model that has a weight for a row prunes that row's lattice, and all
        models compute their log-probabilities at the nodes that are left.

        Args:
          outs: The forward pass of each model.
          y: The labels of each row.
          s_range: Label positions at a frame; 0: all of them.
          cuts: The cut of each row, where a teacher is chosen for each.
        """
        s_range = s_range or 1 + max(len(labels) for labels in y)
        pairs = list(zip(self.taps, outs))
        lattices = [tap.lattice(out, y, s_range) for tap, out in pairs]
        if len(lattices) == 1:
            return lattices[0]
        weights = self._weights(outs, cuts)  # (M, N)
        first = (weights > 0).int().argmax(0)
        rows = torch.arange(len(first), device=first.device)
        ranges = torch.stack([lattice.ranges for lattice in lattices])[first, rows]
        lattices = [tap.lattice(out, y, s_range, ranges) for tap, out in pairs]
        occupancy = sum(
            w[:, None, None] * lattice.occupancy
            for w, lattice in zip(weights, lattices)
        )
        logits = _averaged([lattice.logits for lattice in lattices], weights)
        return replace(lattices[0], logits=logits, occupancy=occupancy)

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
        fits, y = _fitting(y, lens.tolist())
        lattice = self.lattice(outs, y, s_range, cuts)
        if path_only:
            blank_id = int(self.taps[0].model.decoder.blank_id)
            nodes = path_nodes(lattice, blank_id)
        else:
            nodes = nodes_of(lattice)
        if all(fits):
            return nodes
        rows = torch.tensor(fits, device=lens.device)
        return nodes.select(rows[nodes.row]) if any(fits) else None

    def _lattice_of_each(
        self,
        outs: List[EncoderOut],
        y: Sequence[Sequence[int]],
        s_range: int,
        cuts: Sequence[Cut],
    ) -> List[Union[PrunedLattice, NoPath]]:
        """The lattice of each row alone, N = 1, or that it has no path; on the CPU."""
        lens = outs[0].encoder_out_lens.tolist()
        fits, y = _fitting(y, lens)
        batch = self.lattice(outs, y, s_range, cuts)
        lattices: List[Union[PrunedLattice, NoPath]] = []
        for i, fit in enumerate(fits):
            if not fit:
                lattices.append(NoPath(lens[i]))
                continue
            lattice = _row_of(batch, i)
            if not s_range:  # with the positions of the batch's longest transcript
                lattice = _without_padded_positions(lattice)
            lattices.append(lattice)
        return lattices

    def _weights(
        self, outs: List[EncoderOut], cuts: Optional[Sequence[Cut]]
    ) -> torch.Tensor:
        """(M, N): each model's share in each row."""
        lens = outs[0].encoder_out_lens
        if self.choose is None:
            weights = self.weights[:, None].expand(-1, len(lens))
            return weights.to(device=lens.device, dtype=torch.float32)
        index = torch.tensor([self._chosen(cut) for cut in cuts or []])
        require(
            len(index) == len(lens),
            f"there are {len(index)} cuts for {len(lens)} rows, and each row's teacher "
            "is chosen by its cut: give one cut for each",
        )
        chosen = torch.arange(len(outs))[:, None] == index
        return chosen.float().to(lens.device)

    def _chosen(self, cut: Cut) -> int:
        index = self.choose(cut)
        require(
            0 <= index < len(self.taps),
            f"the teacher chosen for cut {cut.id} is {index}, and there are "
            f"{len(self.taps)}: give 0 to {len(self.taps) - 1}",
        )
        return index


def _fitting(
    y: Sequence[Sequence[int]], lens: Sequence[int]
) -> Tuple[List[bool], List[Sequence[int]]]:
    """Whether each row has as many frames as labels, and labels that fit all rows."""
    fits = [len(labels) <= n for labels, n in zip(y, lens)]
    return fits, [labels if fit else labels[:1] for labels, fit in zip(y, fits)]


def _averaged(logits: List[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """log sum_m w_m softmax(logits_m).

    Args:
      logits: Of each of M models (N, ..., V).
      weights: (M, N).
    """
    sizes = [x.size(-1) for x in logits]
    require(
        len(set(sizes)) == 1,
        f"the teachers have {sizes} tokens: teachers of one student need the same "
        "tokens",
    )
    total = None
    for x, w in zip(logits, weights):
        term = x.float().log_softmax(-1) + w.log().view(-1, *[1] * (x.ndim - 1))
        total = term if total is None else torch.logaddexp(total, term)
    return total


def _row_of(lattice: PrunedLattice, i: int) -> PrunedLattice:
    """The lattice of row ``i`` alone, N = 1, on the CPU."""
    return map_tensors(lambda x: x[i : i + 1].cpu(), lattice)


def _without_padded_positions(lattice: PrunedLattice) -> PrunedLattice:
    """A full lattice, N = 1, with the label positions of its own transcript alone."""
    size = int(lattice.boundary[0, 2]) + 1
    names = ("ranges", "logits", "occupancy")
    narrow = {name: getattr(lattice, name)[:, :, :size] for name in names}
    return replace(lattice, **narrow)

"""The records that cross rooms.

N utterances, T frames after subsampling, U labels, S label positions that a pruned
lattice keeps at a frame, V symbols.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple, Union

import torch


@dataclass
class SparseDistribution:
    """A distribution over V symbols: some of them, and the mass of all others.

    Where a row keeps fewer than K symbols, the rest of it has log-probability -inf (and
    index 0).
    """

    indices: torch.Tensor  # (..., K), int64
    log_probs: torch.Tensor  # (..., K)
    log_tail: torch.Tensor  # (...), log of the mass outside `indices`; -inf for none

    def to(self, device: torch.device) -> "SparseDistribution":
        return SparseDistribution(
            self.indices.to(device), self.log_probs.to(device), self.log_tail.to(device)
        )


Distribution = Union[torch.Tensor, SparseDistribution]


def sparse(rows: Optional[Distribution]) -> bool:
    return isinstance(rows, SparseDistribution)


def repeat(rows: Distribution, copies: int) -> Distribution:
    """The rows so many times, one copy behind the other, as ``torch.cat`` has it."""
    if isinstance(rows, SparseDistribution):
        fields = (rows.indices, rows.log_probs, rows.log_tail)
        return SparseDistribution(*(torch.cat([x] * copies) for x in fields))
    return torch.cat([rows] * copies)


def select(rows: Distribution, index: Any) -> Distribution:
    """``rows[index]``, for a tensor and for a sparse distribution."""
    if isinstance(rows, SparseDistribution):
        return SparseDistribution(
            rows.indices[index], rows.log_probs[index], rows.log_tail[index]
        )
    is_list = isinstance(index, torch.Tensor) and index.ndim == 1
    if is_list and index.dtype == torch.int64:
        return rows.index_select(0, index)  # several times as fast on a CPU
    return rows[index]


@dataclass
class EncoderOut:
    """What one forward pass of a recipe's model gave."""

    encoder_out: torch.Tensor  # (N, T, C)
    encoder_out_lens: torch.Tensor  # (N,), valid frames
    ctc_logits: Optional[torch.Tensor] = None  # (N, T, V), before LogSoftmax
    # By index of the stack, (N, T50, C): at the encoder's inner 50 Hz.
    hidden: Dict[int, torch.Tensor] = field(default_factory=dict)
    hidden_lens: Optional[torch.Tensor] = None  # (N,), valid frames of those
    decoder_out: Optional[torch.Tensor] = None  # (N, U + 1, D)
    symbols: Optional[torch.Tensor] = None  # (N, U + 1), what the decoder got
    # Where the recipe's own pruned loss stood on the teacher's ranges: these,
    # (N, T, S), and what its joiner said there, (N, T, S, V).
    ranges: Optional[torch.Tensor] = None
    lattice_logits: Optional[torch.Tensor] = None


@dataclass
class PrunedLattice:
    """A transducer's output at the nodes (t, u) of a pruned lattice.

    At frame t stand the S label positions ``ranges[n, t]``, each one more than the one
    before. All positions, S = U + 1, make the full lattice.
    """

    ranges: torch.Tensor  # (N, T, S), int64, label position u of each node
    boundary: torch.Tensor  # (N, 4), int64: 0, 0, U_n, T_n, as k2 has it
    symbols: torch.Tensor  # (N, U), int64
    logits: torch.Tensor  # (N, T, S, V), the joiner's, before softmax
    # (N, T, S), probability that the path passes the node; sums to T_n + U_n.
    occupancy: torch.Tensor


@dataclass
class NoPath:
    """In place of a lattice that no path gets through: more labels than frames."""

    frames: int


@dataclass
class LatticeTargets:
    """What a teacher's pruned lattice said of one utterance.

    R nodes have an occupancy above 0; ``nodes`` has a row for each, in the order of
    ``occupancy > 0``.
    """

    ranges: torch.Tensor  # (T, S), int64
    symbols: torch.Tensor  # (U,), int64
    occupancy: torch.Tensor  # (T, S)
    nodes: Distribution  # (R, V) log-probabilities, or sparse

    def to(self, device: torch.device) -> "LatticeTargets":
        tensors = (self.ranges, self.symbols, self.occupancy, self.nodes)
        return LatticeTargets(*(x.to(device) for x in tensors))


@dataclass
class Nodes:
    """Nodes (t, u) of a batch's lattices, and what the teacher says at each.

    R of them, of all utterances.
    """

    row: torch.Tensor  # (R,), int64, the utterance
    frame: torch.Tensor  # (R,), int64, t
    position: torch.Tensor  # (R,), int64, u: labels emitted before
    label: torch.Tensor  # (R,), int64, the one that comes next; -1 behind the last
    occupancy: torch.Tensor  # (R,)
    teacher: Distribution  # (R, V), or sparse

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device) -> "Nodes":
        return Nodes(**{k: v.to(device) for k, v in vars(self).items()})

    def repeat(self, copies: int, rows: int) -> "Nodes":
        """Those of a batch of ``rows`` that stands there so many times."""
        found = {k: repeat(v, copies) for k, v in vars(self).items()}
        copy = torch.arange(copies, device=self.row.device)
        found["row"] = found["row"] + rows * copy.repeat_interleave(len(self))
        return Nodes(**found)

    def select(self, index: torch.Tensor) -> "Nodes":
        return Nodes(**{k: select(v, index) for k, v in vars(self).items()})


@dataclass
class Targets:
    """What a teacher said on one batch, row by row as the batch's features.

    Frames where ``mask`` is False hold nothing that a loss may read.
    """

    ctc: Optional[Distribution]  # (N, T, V) log-probabilities, or sparse; None: none
    lens: torch.Tensor  # (N,), frames
    mask: Optional[torch.Tensor] = None  # (N, T), bool; None: all frames below lens
    # (N,), bool: rows whose cut is as the teacher heard it, so that the student must
    # give the same number of frames; None: all.
    whole: Optional[torch.Tensor] = None
    # A row's lattice; None for one that is not whole, whose labels are unknown, and
    # for one with more labels than frames.
    lattices: Optional[List[Optional[LatticeTargets]]] = None
    # Nodes of all rows, where the teacher was asked online.
    nodes: Optional[Nodes] = None
    # By layer, (N, T, R, C) in float or codes in int64; see icefall_kd.kinds.hidden.
    hidden: Dict[Union[int, str], torch.Tensor] = field(default_factory=dict)
    # A row's hypotheses: labels and the teacher's log score of each; none: [].
    nbest: Optional[List[List[Tuple[List[int], float]]]] = None

    def __post_init__(self) -> None:
        if self.mask is None:
            ctc = self.ctc.indices if sparse(self.ctc) else self.ctc
            t = int(self.lens.max()) if ctc is None else ctc.size(1)
            frames = torch.arange(t, device=self.lens.device)
            self.mask = frames < self.lens.unsqueeze(1)
        if self.whole is None:
            self.whole = torch.ones_like(self.lens, dtype=torch.bool)

    def repeat(self, copies: int) -> "Targets":
        """Of a batch that stands there so many times, one copy behind the other."""
        if copies == 1:
            return self
        return Targets(
            None if self.ctc is None else repeat(self.ctc, copies),
            *(repeat(x, copies) for x in (self.lens, self.mask, self.whole)),
            self.lattices and self.lattices * copies,
            self.nodes and self.nodes.repeat(copies, len(self.lens)),
            {layer: repeat(x, copies) for layer, x in self.hidden.items()},
            self.nbest and self.nbest * copies,
        )

    def to(self, device: torch.device) -> "Targets":
        tensors = (self.ctc, self.lens, self.mask, self.whole)
        lattices = self.lattices and [x and x.to(device) for x in self.lattices]
        hidden = {layer: x.to(device) for layer, x in self.hidden.items()}
        tensors = [x if x is None else x.to(device) for x in tensors]
        nodes = self.nodes and self.nodes.to(device)
        return Targets(*tensors, lattices, nodes, hidden, self.nbest)

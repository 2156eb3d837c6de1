"""The records that pass between folders.

N utterances (the rows of a batch), T frames of the encoder's output, U labels, S label
positions that a pruned lattice has at a frame, V tokens.
"""

from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Callable, Dict, Optional, Union

import torch


@dataclass
class SparseDistribution:
    """A distribution over V tokens: K of them, and the mass of all others.

    A row with fewer than K tokens is filled up with log-probability -inf and index 0.
    """

    indices: torch.Tensor  # (..., K), int64
    log_probs: torch.Tensor  # (..., K)
    log_tail: torch.Tensor  # (...), log of the mass outside `indices`; -inf for none

    def to(self, device: torch.device) -> "SparseDistribution":
        """Return the distribution on another device."""
        return map_tensors(lambda x: x.to(device), self)


Distribution = Union[torch.Tensor, SparseDistribution]


def is_sparse(rows: Optional[Distribution]) -> bool:
    """Return whether a distribution is a :class:`SparseDistribution`."""
    return isinstance(rows, SparseDistribution)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply a function to each tensor of a value.

    Args:
      function: Takes and returns a tensor.
      value: A tensor, or a dataclass, dictionary or list of such values, however deep.
        Anything else in it (numbers, texts, None) stays as it is.

    Returns:
      A value of the same structure.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if is_dataclass(value):
        return replace(value, **map_tensors(function, vars(value)))
    if isinstance(value, dict):
        return {key: map_tensors(function, x) for key, x in value.items()}
    if isinstance(value, list):
        return [map_tensors(function, x) for x in value]
    return value


def index_rows(rows: Any, index: Any) -> Any:
    """Return ``rows[index]`` for a tensor, and for each tensor of a distribution.

    Args:
      rows: A tensor, or what :func:`map_tensors` takes.
      index: Whatever a tensor is indexed by.
    """
    if isinstance(index, torch.Tensor) and index.ndim == 1:
        if index.dtype == torch.int64:  # several times as fast on a CPU
            return map_tensors(lambda x: x.index_select(0, index), rows)
    return map_tensors(lambda x: x[index], rows)


def tile(value: Any, copies: int, rows: int) -> Any:
    """Repeat a value of a batch, one copy of the batch after another.

    Args:
      value: Tensors whose first dimension is the batch's, lists with an entry for each
        row, dictionaries of these, or :class:`Nodes`.
      copies: How many times.
      rows: N, how many rows the batch has.
    """
    if isinstance(value, list):
        return value * copies
    if isinstance(value, dict):
        return {key: tile(x, copies, rows) for key, x in value.items()}
    if isinstance(value, Nodes):
        return value.tile(copies, rows)
    return map_tensors(lambda x: torch.cat([x] * copies), value)


@dataclass
class EncoderOut:
    """The outputs of one forward pass of a recipe's model."""

    encoder_out: torch.Tensor  # (N, T, C)
    encoder_out_lens: torch.Tensor  # (N,), valid frames
    ctc_logits: Optional[torch.Tensor] = None  # (N, T, V), before LogSoftmax
    simple_logits: Optional[torch.Tensor] = None  # (N, T, V), of simple_am_proj
    # By index of the stack, (N, stack frames, C): 50 Hz inside the encoder.
    hidden: Dict[int, torch.Tensor] = field(default_factory=dict)
    hidden_lens: Optional[torch.Tensor] = None  # (N,), valid stack frames
    decoder_out: Optional[torch.Tensor] = None  # (N, U + 1, D)
    # (N, U + 1), the decoder's input: a blank, then the labels.
    labels: Optional[torch.Tensor] = None
    # Where the recipe's own pruned loss used the teacher's ranges: these, (N, T, S),
    # and its joiner's logits at their nodes, (N, T, S, V).
    ranges: Optional[torch.Tensor] = None
    lattice_logits: Optional[torch.Tensor] = None
    # For each row a PrunedLattice with N = 1 or NoPath, on the CPU: a teacher's alone.
    lattices: Optional[list] = None


@dataclass
class PrunedLattice:
    """A transducer's output at the nodes (t, u) of a pruned lattice.

    Frame t has S nodes, at the label positions ``ranges[n, t]``, each one more than the
    one before. All positions, S = U + 1, make the full lattice.
    """

    ranges: torch.Tensor  # (N, T, S), int64, label position u of each node
    boundary: torch.Tensor  # (N, 4), int64: 0, 0, U_n, T_n, as k2 has it
    labels: torch.Tensor  # (N, U), int64
    logits: torch.Tensor  # (N, T, S, V), the joiner's, before softmax
    # (N, T, S), probability that the path passes the node; sums to T_n + U_n.
    occupancy: torch.Tensor


@dataclass
class NoPath:
    """Marks an utterance that has no lattice, as it has more labels than frames."""

    frames: int  # T of the utterance


@dataclass
class LatticeTargets:
    """A teacher's pruned lattice of one utterance, as a store holds it.

    R nodes have an occupancy above 0; ``nodes`` has a row for each, in the order of
    ``occupancy > 0``.
    """

    ranges: torch.Tensor  # (T, S), int64
    labels: torch.Tensor  # (U,), int64
    occupancy: torch.Tensor  # (T, S)
    nodes: Distribution  # (R, V) log-probabilities, or sparse

    def to(self, device: torch.device) -> "LatticeTargets":
        """Return the targets on another device."""
        return map_tensors(lambda x: x.to(device), self)


@dataclass
class Nodes:
    """The R nodes (t, u) of the lattices of all rows, with the teacher's output."""

    row: torch.Tensor  # (R,), int64, the node's utterance
    frame: torch.Tensor  # (R,), int64, t
    position: torch.Tensor  # (R,), int64, u: labels emitted before
    label: torch.Tensor  # (R,), int64, the next label; -1 after the last
    occupancy: torch.Tensor  # (R,)
    teacher: Distribution  # (R, V) log-probabilities, or sparse

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device) -> "Nodes":
        """Return the nodes on another device."""
        return map_tensors(lambda x: x.to(device), self)

    def tile(self, copies: int, rows: int) -> "Nodes":
        """Return the nodes of a batch that is repeated.

        Args:
          copies: How many times the batch occurs, one copy after another.
          rows: N, how many rows the batch has.
        """
        tiled = map_tensors(lambda x: torch.cat([x] * copies), self)
        copy = torch.arange(copies, device=self.row.device)
        tiled.row += rows * copy.repeat_interleave(len(self))
        return tiled

    def select(self, index: torch.Tensor) -> "Nodes":
        """Return some of the nodes, by an index or a mask of them, (R,)."""
        return index_rows(self, index)


@dataclass
class Targets:
    """A teacher's targets for one batch, row by row as the batch's features.

    ``parts`` maps a kind of target (:mod:`icefall_kd.kinds`) to its values; "nodes" and
    "nbest" come with a batch and are in no store:

    ==========  ======================================================================
    "ctc"       (N, T, V) log-probabilities, or a :class:`SparseDistribution`
    "simple"    the same, of the simple joiner's acoustic half
    "lattice"   for each row its :class:`LatticeTargets` from a store; None for a row
                that is not whole, whose labels are unknown, or that has more labels
                than frames
    "nodes"     :class:`Nodes` of all rows, from a teacher in the training process
    "hidden"    for each layer (N, T, R, C) vectors, or codes in int64
    "nbest"     for each row a list of hypotheses: token ids and the log score of each
    ==========  ======================================================================

    Frames where ``mask`` is False hold nothing that a loss may read.
    """

    lens: torch.Tensor  # (N,), frames
    mask: Optional[torch.Tensor] = None  # (N, T), bool; None: all frames below lens
    # (N,), bool: rows whose cut spans what the teacher's input was, so that the student
    # must output the same number of frames; None: all.
    whole: Optional[torch.Tensor] = None
    parts: Dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask is None:
            ctc = self.parts.get("ctc")
            ctc = ctc.indices if is_sparse(ctc) else ctc
            t = int(self.lens.max()) if ctc is None else ctc.size(1)
            frames = torch.arange(t, device=self.lens.device)
            self.mask = frames < self.lens.unsqueeze(1)
        if self.whole is None:
            self.whole = torch.ones_like(self.lens, dtype=torch.bool)

    def tile(self, copies: int) -> "Targets":
        """Return the targets of a batch that is repeated.

        Args:
          copies: How many times the batch occurs, one copy after another.
        """
        if copies == 1:
            return self
        return Targets(**tile(vars(self), copies, len(self.lens)))

    def of_rows(self, rows: torch.Tensor) -> "Targets":
        """Return the targets without those of some rows, as if their cuts had none.

        N-best lists stay: they come from the cuts, and not from this teacher.

        Args:
          rows: (N,), bool, on the targets' device: the rows that keep theirs.
        """
        parts = dict(self.parts)
        for name, values in self.parts.items():
            if isinstance(values, Nodes):
                nodes = values.select(rows[values.row])
                parts[name] = nodes if len(nodes) else None
            elif isinstance(values, list) and name != "nbest":
                pairs = zip(values, rows.tolist())
                parts[name] = [x if is_kept else None for x, is_kept in pairs]
        return replace(self, mask=self.mask & rows.unsqueeze(1), parts=parts)

    def to(self, device: torch.device) -> "Targets":
        """Return the targets on another device."""
        return map_tensors(lambda x: x.to(device), self)

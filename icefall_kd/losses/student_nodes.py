"""The student's transducer at the nodes of its teacher's lattice."""

import copy
from typing import Optional, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError, NotFiniteError
from icefall_kd.losses.kl import linear_kl, row_kl
from icefall_kd.types import Distribution, Nodes, is_sparse


class StudentNodes:
    """The student's joiner at the nodes of a lattice, evaluated once for all losses.

    ::

        student = StudentNodes(joiner, encoder_out, decoder_out, nodes, lengths)
        loss = full_sum_kd_loss(student) + nodes_kd_loss(student, form="collapsed")

    Args:
      joiner: The student's, with ``encoder_proj``, ``decoder_proj``, ``output_linear``.
      encoder_out: (N, T, C), the student's, with its graph.
      decoder_out: (N, U + 1, D), of the labels behind a leading blank.
      nodes: R nodes and the teacher's output there.
      lengths: (N,), valid frames of ``encoder_out``.

    Raises:
      KDError: nodes beyond the student's frames or labels, another vocabulary; later,
        a student that gives NaN.
    """

    def __init__(
        self,
        joiner: nn.Module,
        encoder_out: torch.Tensor,
        decoder_out: torch.Tensor,
        nodes: Nodes,
        lengths: torch.Tensor,
    ) -> None:
        self.joiner = joiner
        self.encoder_out, self.decoder_out = encoder_out, decoder_out
        here = nodes.row.device == encoder_out.device
        self.nodes = nodes if here else nodes.to(encoder_out.device)
        self.lengths = lengths.to(encoder_out.device)
        _check_inside(encoder_out, lengths, decoder_out, self.nodes)
        _check_vocabulary(self.nodes.teacher, joiner.output_linear.out_features)
        self._states: Optional[torch.Tensor] = None
        self._logits: Optional[torch.Tensor] = None

    @property
    def states(self) -> torch.Tensor:
        """What the joiner's output layer gets at each node, (R, J)."""
        if self._states is None:
            self._states = joiner_states(
                self.joiner, self.encoder_out, self.decoder_out, self.nodes
            )
            refuse_nan(self._states, "joiner states")
        return self._states

    def logits(self) -> torch.Tensor:
        """The joiner's output at each node, (R, V), before softmax; made if asked."""
        if self._logits is None:
            self._logits = self.joiner.output_linear(self.states)
            refuse_nan(self._logits, "joiner logits")
        return self._logits

    def take_logits(self, ranges: torch.Tensor, logits: torch.Tensor) -> None:
        """Take the joiner's output from a lattice that was evaluated already.

        Nothing is taken where the lattice lacks a node.

        Args:
          ranges: (N, T, S), the lattice's label positions.
          logits: (N, T, S, V), the student's, with their graph.
        """
        row, frame = self.nodes.row, self.nodes.frame
        s = self.nodes.position - ranges[row, frame, 0]
        if ((s >= 0) & (s < ranges.size(2))).all():
            self._logits = logits[row, frame, s]
            refuse_nan(self._logits, "joiner logits")

    def kl(
        self,
        teacher: Distribution,
        temperature: float = 1.0,
        weights: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """:func:`icefall_kd.losses.kl.row_kl` of the logits.

        Where nobody asked for the logits, they don't come to exist whole here either.

        Args:
          teacher: (R, V), or sparse.
          temperature: T.
          weights: (R,), of the nodes; None: 1.
        """
        if self._logits is not None:
            return row_kl(
                self._logits, teacher, temperature=temperature, weights=weights
            )
        layer = self.joiner.output_linear
        return linear_kl(
            self.states, layer, teacher, temperature=temperature, weights=weights
        )

    def select(self, index: torch.Tensor) -> "StudentNodes":
        """The student at some of the nodes; where it wasn't evaluated yet, it will be
        at these alone."""
        some = copy.copy(self)
        some.nodes = self.nodes.select(index)
        if self._states is not None:
            some._states = self._states[index]
        if self._logits is not None:
            some._logits = self._logits[index]
        return some


def joiner_states(
    joiner: nn.Module,
    encoder_out: torch.Tensor,
    decoder_out: torch.Tensor,
    nodes: Nodes,
) -> torch.Tensor:
    """What the joiner's output layer gets at each node, (R, J).

    tanh(W_e encoder_out[n, t] + W_d decoder_out[n, u]), as icefall's joiner.
    """
    am = joiner.encoder_proj(_only(encoder_out, nodes.row, nodes.frame))
    lm = joiner.decoder_proj(_only(decoder_out, nodes.row, nodes.position))
    return torch.tanh(am[nodes.row, nodes.frame] + lm[nodes.row, nodes.position])


def _only(x: torch.Tensor, row: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """0 where no node stands: NaN in padding would reach the projection's gradient."""
    used = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    used[row, index] = True
    return x.masked_fill(~used.unsqueeze(-1), 0.0)


def refuse_nan(x: torch.Tensor, name: str) -> None:
    """Refuse a student that gives NaN."""
    if torch.isnan(x).any():
        raise NotFiniteError(
            f"the student's {name} of shape {tuple(x.shape)} have NaN: lower "
            "--base-lr, or train without --use-fp16 to find where it begins"
        )


def _check_inside(encoder_out, lens, decoder_out, nodes: Nodes) -> None:
    n, t = encoder_out.shape[:2]
    sizes: Tuple[Tuple[str, torch.Tensor, int], ...] = (
        ("utterance", nodes.row, min(n, len(lens), len(decoder_out))),
        ("frame", nodes.frame, t),
        ("label position", nodes.position, decoder_out.size(1)),
    )
    if not len(nodes):
        return
    for name, index, size in sizes:
        if int(index.min()) < 0 or int(index.max()) >= size:
            raise KDError(
                f"the teacher's lattice has {name} {int(index.max())}, and the student "
                f"has {size} of them: the targets are of other cuts, or of other "
                "transcripts"
            )
    if (nodes.frame >= lens.to(nodes.frame.device)[nodes.row]).any():
        raise KDError(
            f"the teacher's lattice has frames beyond the student's {lens.tolist()}: "
            "the targets are of other cuts, or the frame rates differ"
        )


def _check_vocabulary(teacher: Distribution, v: int) -> None:
    if not is_sparse(teacher):
        found = teacher.size(1)
    else:
        found = int(teacher.indices.max()) + 1 if teacher.indices.numel() else 0
        if found <= v:
            return
    if found != v:
        raise KDError(
            f"the student's joiner has {v} symbols and the teacher's lattice {found}: "
            "both need the same BPE model"
        )

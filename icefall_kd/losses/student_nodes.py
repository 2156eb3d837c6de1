"""The student's transducer at the nodes of its teacher's lattice."""

import copy
from typing import Any, Dict, Optional, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.losses.checks import refuse_nan
from icefall_kd.losses.kl import ChunkKL, linear_kl, plain_kl, row_kl
from icefall_kd.types import Distribution, Nodes, is_sparse


class StudentNodes:
    """The student's joiner at the nodes of a lattice, evaluated once for all losses.

    ::

        student = StudentNodes(joiner, encoder_out, decoder_out, nodes, lengths)
        loss = full_sum_kd_loss(student) + nodes_kd_loss(student, form="collapsed")

    Args:
      joiner: The student's, with ``encoder_proj``, ``decoder_proj``, ``output_linear``.
      encoder_out: (N, T, C), the student's, with its graph.
      decoder_out: (N, U + 1, D), of the labels after a leading blank.
      nodes: R nodes with the teacher's distributions.
      lengths: (N,), valid frames of ``encoder_out``.

    Raises:
      KDError: Nodes beyond the student's frames or labels, another vocabulary; later,
        a student whose output is NaN.
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
        is_near = nodes.row.device == encoder_out.device
        self.nodes = nodes if is_near else nodes.to(encoder_out.device)
        self.lengths = lengths.to(encoder_out.device)
        _check_inside(encoder_out, lengths, decoder_out, self.nodes)
        _check_vocabulary(self.nodes.teacher, joiner.output_linear.out_features)
        self._states: Optional[torch.Tensor] = None
        self._logits: Optional[torch.Tensor] = None

    @property
    def states(self) -> torch.Tensor:
        """The input of the joiner's output layer at each node, (R, J)."""
        if self._states is None:
            self._states = joiner_states(
                self.joiner, self.encoder_out, self.decoder_out, self.nodes
            )
            refuse_nan(self._states, "joiner states")
        return self._states

    def logits(self) -> torch.Tensor:
        """Return the joiner's output at each node, (R, V), before softmax.

        It is computed at the first call; from then on all losses take it.
        """
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
        *,
        temperature: float = 1.0,
        weights: Optional[torch.Tensor] = None,
        chunk_kl: ChunkKL = plain_kl,
    ) -> torch.Tensor:
        """Return :func:`icefall_kd.losses.kl.row_kl` of the logits.

        Logits that were not computed yet are computed in chunks, and not held.

        Args:
          teacher: (R, V), or sparse.
          temperature: T, above 0.
          weights: (R,), of the nodes; None: 1.
          chunk_kl: What is computed in place of the KL, see there.
        """
        options: Dict[str, Any] = {
            "temperature": temperature,
            "weights": weights,
            "chunk_kl": chunk_kl,
        }
        if self._logits is not None:
            return row_kl(self._logits, teacher, **options)
        return linear_kl(self.states, self.joiner.output_linear, teacher, **options)

    def select(self, index: torch.Tensor) -> "StudentNodes":
        """Return the student at some of the nodes.

        Where it wasn't evaluated yet, it will be at these alone.

        Args:
          index: Their indices or a mask, (R,).
        """
        selected = copy.copy(self)
        selected.nodes = self.nodes.select(index)
        if self._states is not None:
            selected._states = self._states[index]
        if self._logits is not None:
            selected._logits = self._logits[index]
        return selected


def joiner_states(
    joiner: nn.Module,
    encoder_out: torch.Tensor,
    decoder_out: torch.Tensor,
    nodes: Nodes,
) -> torch.Tensor:
    """Return tanh(W_e encoder_out[n, t] + W_d decoder_out[n, u]), as icefall's joiner.

    Args:
      joiner: With ``encoder_proj`` (W_e) and ``decoder_proj`` (W_d).
      encoder_out: (N, T, C).
      decoder_out: (N, U + 1, D).
      nodes: R nodes (n, t, u).

    Returns:
      The input of the joiner's output layer at each node, (R, J).
    """
    row, frame, position = nodes.row, nodes.frame, nodes.position
    am = joiner.encoder_proj(_zero_unused(encoder_out, row, frame))
    lm = joiner.decoder_proj(_zero_unused(decoder_out, row, position))
    return torch.tanh(am[row, frame] + lm[row, position])


def _zero_unused(
    x: torch.Tensor, row: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """0 where no node is: NaN in padding would reach the projection's gradient."""
    used = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    used[row, index] = True
    return x.masked_fill(~used.unsqueeze(-1), 0.0)


def _check_inside(
    encoder_out: torch.Tensor,
    lengths: torch.Tensor,
    decoder_out: torch.Tensor,
    nodes: Nodes,
) -> None:
    if not len(nodes):
        return
    n, t = encoder_out.shape[:2]
    sizes: Tuple[Tuple[str, torch.Tensor, int], ...] = (
        ("utterance", nodes.row, min(n, len(lengths), len(decoder_out))),
        ("frame", nodes.frame, t),
        ("label position", nodes.position, decoder_out.size(1)),
    )
    for name, index, size in sizes:
        if int(index.min()) < 0 or int(index.max()) >= size:
            raise KDError(
                f"the teacher's lattice has {name} {int(index.max())}, and the student "
                f"has {size} of them: the targets are of other cuts, or of other "
                "transcripts"
            )
    if (nodes.frame >= lengths.to(nodes.frame.device)[nodes.row]).any():
        raise KDError(
            f"the teacher's lattice has frames beyond the student's "
            f"{lengths.tolist()}: the targets are of other cuts, or the frame rates "
            "differ"
        )


def _check_vocabulary(teacher: Distribution, v: int) -> None:
    """Refuse a dense teacher of other tokens, and a sparse one with a token above V."""
    size = v
    if not is_sparse(teacher):
        size = teacher.size(1)
    elif teacher.indices.numel():
        size = max(v, int(teacher.indices.max()) + 1)
    if size != v:
        raise KDError(
            f"the student's joiner has {v} tokens and the teacher's lattice {size}: "
            "both need the same tokenizer"
        )

"""Distillation of the transducer head on the nodes of the teacher's pruned lattice."""

from dataclasses import replace
from typing import List, Optional, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.losses.kl import check_temperature, linear_kl, row_kl
from icefall_kd.types import (
    Distribution,
    LatticeTargets,
    Nodes,
    PrunedLattice,
    SparseDistribution,
    sparse,
)

FORMS = ("nodes", "collapsed")


def nodes_of(lattice: PrunedLattice) -> Nodes:
    """All nodes of a batch's lattice that its teacher may pass."""
    row, frame, s = (lattice.occupancy > 0).nonzero(as_tuple=True)
    position = lattice.ranges[row, frame, s]
    return Nodes(
        row,
        frame,
        position,
        _labels(lattice.symbols, lattice.boundary[:, 2], row, position),
        lattice.occupancy[row, frame, s],
        lattice.logits[row, frame, s],
    )


def stored_nodes(lattices: List[Optional[LatticeTargets]]) -> Optional[Nodes]:
    """The nodes of stored lattices, row by row; None where no row has one."""
    parts = []
    for row, lattice in enumerate(lattices):
        if lattice is None:
            continue
        frame, s = (lattice.occupancy > 0).nonzero(as_tuple=True)
        position = lattice.ranges[frame, s]
        symbols = lattice.symbols.unsqueeze(0)
        lens = torch.tensor([symbols.size(1)], device=symbols.device)
        label = _labels(symbols, lens, torch.zeros_like(frame), position)
        which = torch.full_like(frame, row)
        occupancy = lattice.occupancy[frame, s]
        parts.append(Nodes(which, frame, position, label, occupancy, lattice.nodes))
    if not parts:
        return None
    columns = {k: [vars(p)[k] for p in parts] for k in vars(parts[0])}
    teacher = _joined(columns.pop("teacher"))
    return Nodes(**{k: torch.cat(v) for k, v in columns.items()}, teacher=teacher)


def _labels(symbols, lens, row, position) -> torch.Tensor:
    """(R,): the label behind each position; -1 behind the last."""
    if symbols.size(1) == 0:
        return torch.full_like(position, -1)
    label = symbols[row, position.clamp(max=symbols.size(1) - 1)]
    return label.masked_fill(position >= lens[row], -1)


def _joined(parts: List[Distribution]) -> Distribution:
    if not sparse(parts[0]):
        return torch.cat(parts)
    width = max(p.indices.size(1) for p in parts)

    def padded(x: torch.Tensor, value: float) -> torch.Tensor:
        return nn.functional.pad(x, (0, width - x.size(1)), value=value)

    return SparseDistribution(
        torch.cat([padded(p.indices, 0) for p in parts]),
        torch.cat([padded(p.log_probs, -torch.inf) for p in parts]),
        torch.cat([p.log_tail for p in parts]),
    )


def collapse(nodes: Nodes, blank_id: int, temperature: float = 1.0) -> Nodes:
    """Nodes whose teacher tells {next label, blank, rest} apart and no more.

    A label that a sparse teacher doesn't keep stays in the rest: a coarser division,
    whose KL divergence is exact and smaller.
    """
    label = nodes.label.clamp(min=0)
    pair = torch.stack((label, torch.full_like(label, blank_id)), -1)
    if sparse(nodes.teacher):
        hit = nodes.teacher.indices.unsqueeze(1) == pair.unsqueeze(2)  # (R, 2, K)
        log_probs = nodes.teacher.log_probs.unsqueeze(1)
        log_pair = log_probs.masked_fill(~hit, -torch.inf).amax(-1)
        # A padding entry has index 0 and -inf, so that it can't be the maximum.
        others = ~hit.any(1)
        others = nodes.teacher.log_probs.masked_fill(~others, -torch.inf)
        rest = torch.logaddexp(nodes.teacher.log_tail, others.logsumexp(-1))
    else:
        logits = nodes.teacher.to(
            torch.promote_types(nodes.teacher.dtype, torch.float32)
        )
        log_probs = (logits / temperature).log_softmax(-1)
        log_pair = log_probs.gather(1, pair)
        ids = torch.arange(log_probs.size(1), device=label.device)
        taken = (ids == pair[:, :1]) & (nodes.label >= 0).unsqueeze(1)
        taken |= ids == blank_id
        rest = log_probs.masked_fill(taken, -torch.inf).logsumexp(-1)
    gone = nodes.label < 0
    if sparse(nodes.teacher):  # what the clamped label -1 has taken out goes back
        back = log_pair[:, 0].masked_fill(~gone | (pair[:, 0] == blank_id), -torch.inf)
        rest = torch.logaddexp(rest, back)
    first = log_pair[:, 0].masked_fill(gone, -torch.inf)
    log_pair = torch.stack((first, log_pair[:, 1]), -1)
    return replace(nodes, teacher=SparseDistribution(pair, log_pair, rest))


def shift(nodes: Nodes, frames: int, encoder_out_lens: torch.Tensor) -> Nodes:
    """Teach a student that lags behind: what the teacher says at t, at t + frames.

    (Kurata and Saon, arXiv:2110.03334.) Nodes beyond the student's end go.
    """
    if frames < 0:
        raise KDError(
            f"the shift is {frames} frames, and a student can't hear the future: give "
            "0 or more"
        )
    moved = nodes.frame + frames
    inside = moved < encoder_out_lens.to(moved.device)[nodes.row]
    return replace(nodes, frame=moved).select(inside)


def joiner_states(
    joiner: nn.Module,
    encoder_out: torch.Tensor,
    decoder_out: torch.Tensor,
    nodes: Nodes,
) -> torch.Tensor:
    """What the joiner's output layer gets at each node, (R, J).

    tanh(W_e encoder_out[n, t] + W_d decoder_out[n, u]), as icefall's joiner.
    """
    am = joiner.encoder_proj(encoder_out)
    lm = joiner.decoder_proj(decoder_out)
    return torch.tanh(am[nodes.row, nodes.frame] + lm[nodes.row, nodes.position])


def transducer_kd_loss(
    joiner: nn.Module,
    encoder_out: torch.Tensor,
    encoder_out_lens: torch.Tensor,
    decoder_out: torch.Tensor,
    nodes: Nodes,
    temperature: float = 1.0,
    form: str = "nodes",
    occupancy: bool = True,
    blank_id: int = 0,
) -> torch.Tensor:
    """KL divergence of the transducer's outputs, over the nodes of a lattice.

    sum over nodes r = (n, t, u) of w_r T^2 KL(P~(.|t, u) || P(.|t, u)), w_r the
    teacher's occupancy of the node, or 1. The student's joiner is asked at these nodes
    alone, and its logits never exist whole.

    ``form="collapsed"`` tells {next label, blank, rest} apart (Panchapagesan et al.,
    arXiv:2011.06110). Nodes of the best path alone come from a store kept as
    ``path:...`` (arXiv:2110.03334).

    Args:
      joiner: The student's, with ``encoder_proj``, ``decoder_proj``, ``output_linear``.
      encoder_out: (N, T, C), the student's, with its graph.
      encoder_out_lens: (N,), valid frames.
      decoder_out: (N, U + 1, D), of the labels behind a leading blank.
      nodes: Of :func:`nodes_of` or :func:`stored_nodes`.
      temperature: T. A sparse teacher is at this temperature already.
      form: "nodes" or "collapsed".
      occupancy: Whether nodes count by the teacher's occupancy.
      blank_id: For "collapsed".

    Returns:
      A scalar, summed as icefall sums its losses; 0 with a zero gradient for no nodes.

    Raises:
      KDError: nodes beyond the student's frames or labels, another vocabulary.
    """
    check_temperature(temperature)
    if form not in FORMS:
        raise KDError(f"the form is {form!r}, and must be one of {FORMS}")
    nodes = nodes.to(encoder_out.device)
    _check_inside(encoder_out, encoder_out_lens, decoder_out, nodes)
    v = joiner.output_linear.out_features
    _check_vocabulary(nodes.teacher, v)
    if form == "collapsed":
        nodes = collapse(nodes, blank_id, temperature)
    states = joiner_states(joiner, encoder_out, decoder_out, nodes)
    weights = nodes.occupancy if occupancy else None
    return linear_kl(states, joiner.output_linear, nodes.teacher, temperature, weights)


def lattice_kd_loss(
    student: PrunedLattice,
    teacher: PrunedLattice,
    temperature: float = 1.0,
    occupancy: bool = True,
) -> torch.Tensor:
    """:func:`transducer_kd_loss` of logits that exist already, on the same ranges.

    Args:
      student: With the student's logits, (N, T, S, V).
      teacher: On the same nodes, which is checked.
    """
    check_temperature(temperature)
    if student.logits.shape != teacher.logits.shape or not torch.equal(
        student.ranges, teacher.ranges
    ):
        raise KDError(
            f"the student's lattice has shape {tuple(student.logits.shape)} and the "
            f"teacher's {tuple(teacher.logits.shape)}, and both must stand on the same "
            "ranges: ask the student with ranges=teacher.ranges"
        )
    rows = (teacher.occupancy.flatten() > 0).nonzero().squeeze(1)
    weights = teacher.occupancy.flatten()[rows] if occupancy else None
    return row_kl(
        student.logits.flatten(0, 2),
        teacher.logits.detach().flatten(0, 2),
        temperature,
        rows,
        rows,
        weights,
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
    if not sparse(teacher):
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

"""Nodes of a teacher's pruned lattice: those that count, collapsed, or shifted."""

from dataclasses import replace
from typing import Optional, Sequence

import torch
from torch import nn

from icefall_kd.errors import require
from icefall_kd.lattice import best_path, next_labels, passed_nodes
from icefall_kd.losses.kl import compute_dtype
from icefall_kd.types import (
    Distribution,
    LatticeTargets,
    Nodes,
    PrunedLattice,
    SparseDistribution,
    is_sparse,
)


def nodes_of(lattice: PrunedLattice) -> Nodes:
    """Return the nodes of a batch's lattice that a store would hold.

    They are those of :func:`icefall_kd.lattice.passed_nodes`.

    Args:
      lattice: The teacher's, of N utterances.
    """
    row, frame, s = passed_nodes(lattice.occupancy).nonzero(as_tuple=True)
    position = lattice.ranges[row, frame, s]
    lens = lattice.boundary[:, 2]
    return Nodes(
        row,
        frame,
        position,
        next_labels(lattice.labels, position, row, lens),
        lattice.occupancy[row, frame, s],
        lattice.logits[row, frame, s],
    )


def path_nodes(lattice: PrunedLattice, blank_id: int) -> Nodes:
    """Return the nodes of each utterance's best alignment, with an occupancy of 1.

    (Kurata and Saon, arXiv:2110.03334.)

    Args:
      lattice: The teacher's, of N utterances.
      blank_id: The token id of blank.
    """
    occupancy = best_path(lattice, blank_id).to(lattice.occupancy.dtype)
    return nodes_of(replace(lattice, occupancy=occupancy))


def stored_nodes(lattices: Sequence[Optional[LatticeTargets]]) -> Optional[Nodes]:
    """Return the nodes of a batch's stored lattices; None where no row has one.

    Args:
      lattices: The lattice of each row, or None.
    """
    parts = []
    for row, lattice in enumerate(lattices):
        if lattice is None:
            continue
        frame, s = passed_nodes(lattice.occupancy).nonzero(as_tuple=True)
        position = lattice.ranges[frame, s]
        parts.append(
            Nodes(
                torch.full_like(frame, row),
                frame,
                position,
                next_labels(lattice.labels, position),
                lattice.occupancy[frame, s],
                lattice.nodes,
            )
        )
    if not parts:
        return None
    columns = zip(*(vars(part).values() for part in parts))
    *columns, teacher = columns  # the last field of Nodes
    return Nodes(*(torch.cat(column) for column in columns), _concatenated(teacher))


def _concatenated(parts: Sequence[Distribution]) -> Distribution:
    if not is_sparse(parts[0]):
        return torch.cat(parts)
    k = max(part.indices.size(1) for part in parts)

    def padded(x: torch.Tensor, value: float) -> torch.Tensor:
        return nn.functional.pad(x, (0, k - x.size(1)), value=value)

    return SparseDistribution(
        torch.cat([padded(part.indices, 0) for part in parts]),
        torch.cat([padded(part.log_probs, -torch.inf) for part in parts]),
        torch.cat([part.log_tail for part in parts]),
    )


def collapse(nodes: Nodes, blank_id: int, temperature: float = 1.0) -> Nodes:
    """Return nodes whose teacher has three classes: next label, blank, and the rest.

    A label that a sparse teacher dropped stays in the rest: a coarser division, whose
    KL divergence is exact and smaller.

    Args:
      nodes: R nodes.
      blank_id: The token id of blank.
      temperature: T, of a dense teacher; a sparse one is at its own.
    """
    has_label = nodes.label >= 0  # (R,); after the last label there is none
    label = nodes.label.clamp(min=0)
    pair = torch.stack((label, torch.full_like(label, blank_id)), -1)  # (R, 2)
    if is_sparse(nodes.teacher):
        log_probs = nodes.teacher.log_probs  # (R, K)
        is_pair = nodes.teacher.indices.unsqueeze(1) == pair.unsqueeze(2)  # (R, 2, K)
        is_pair[:, 0] &= has_label.unsqueeze(1)
        # An entry that fills up a row has -inf, and can't be the maximum.
        log_pair = log_probs.unsqueeze(1).masked_fill(~is_pair, -torch.inf).amax(-1)
        log_others = log_probs.masked_fill(is_pair.any(1), -torch.inf).logsumexp(-1)
        log_rest = torch.logaddexp(nodes.teacher.log_tail, log_others)
    else:
        logits = nodes.teacher.to(compute_dtype(nodes.teacher.dtype))
        log_probs = (logits / temperature).log_softmax(-1)  # (R, V)
        log_pair = log_probs.gather(1, pair)
        token = torch.arange(log_probs.size(1), device=label.device)
        is_pair = (token == pair[:, :1]) & has_label.unsqueeze(1)  # (R, V)
        is_pair |= token == blank_id
        log_rest = log_probs.masked_fill(is_pair, -torch.inf).logsumexp(-1)
    log_label = log_pair[:, 0].masked_fill(~has_label, -torch.inf)
    log_pair = torch.stack((log_label, log_pair[:, 1]), -1)
    return replace(nodes, teacher=SparseDistribution(pair, log_pair, log_rest))


def shift(nodes: Nodes, frames: int, lengths: torch.Tensor) -> Nodes:
    """Return nodes for a late student: those of frame t, at t + frames.

    (Kurata and Saon, arXiv:2110.03334.) Nodes beyond the student's end are left out.

    Args:
      nodes: The teacher's.
      frames: How many frames late the student is, 0 or more.
      lengths: (N,), the student's valid frames.

    Raises:
      KDError: ``frames`` is below 0.
    """
    require(
        frames >= 0,
        f"the shift is {frames} frames, and no student is earlier than its teacher: "
        "give 0 or more",
    )
    frame = nodes.frame + frames
    is_inside = frame < lengths.to(frame.device)[nodes.row]
    return replace(nodes, frame=frame).select(is_inside)

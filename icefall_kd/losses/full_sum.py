"""Distillation of a whole sequence's probability, summed over its alignments."""

from typing import Any, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.lattice import path_sums
from icefall_kd.losses.kl import wide
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.losses.transducer import collapse


def full_sum_kd_loss(student: StudentNodes, *, blank_id: int = 0) -> torch.Tensor:
    """Distance between what teacher and student make of a transcript as a whole.

    sum over utterances n of d(log P(y_n|x_n) - log P~(y_n|x_n)): the student is taught
    the teacher's probability of the sequence, and may choose its own alignments
    (the idea of Zeineldeen et al., arXiv:2303.05958). The distance is chosen here:
    d(x) = x^2 / 2 up to 1 nat and |x| - 1/2 beyond, an absolute difference, on the
    scale of the transducer loss itself, whose gradient goes to 0 where the two agree.

    Both sums run over the same paths: through the teacher's nodes, by arcs (next label
    or blank) whose probability the teacher gave. So a pruned lattice and a sparse
    teacher leave out paths of teacher and student alike, and neither sum is guessed at:
    what a sparse tail would hold of a label is not known. ``collapsed`` and ``dense``
    lattices give all arcs. An utterance without a complete path counts 0.

    There is no temperature: a sparse teacher must be kept at temperature 1.

    Args:
      student: The student at the nodes that its teacher gave, not shifted.
      blank_id: The blank symbol.

    Returns:
      A scalar, in float32 or, for a float64 student, float64; 0 with a zero gradient
      for no nodes.

    Raises:
      KDError: nodes that don't reach from the first frame to the student's last, NaN in
        the student.
    """
    nodes, logits = student.nodes, student.logits()
    logits = logits.to(wide(logits.dtype))
    if not len(nodes):
        return logits.sum()
    rows, row = nodes.row.unique(return_inverse=True)
    boundary = _boundary(student, rows, row)
    taught = collapse(nodes, blank_id).teacher
    taught_arcs = taught.log_probs.detach().to(logits.dtype)
    arcs = logits.gather(1, taught.indices) - logits.logsumexp(-1, keepdim=True)
    arcs = arcs.masked_fill(taught_arcs == -torch.inf, -torch.inf)
    where = (row, nodes.frame, nodes.position, boundary)
    teacher_sums, _ = path_sums(taught_arcs, *where)
    sums = _PathSums.apply(arcs, *where)
    found = torch.isfinite(teacher_sums) & torch.isfinite(sums)
    return torch.nn.functional.smooth_l1_loss(
        sums[found], teacher_sums[found], reduction="sum"
    )


class _PathSums(torch.autograd.Function):
    # fast_rnnt's own backward changes what it saved, and can't run twice.

    @staticmethod
    def forward(ctx, arcs, row, frame, position, boundary) -> torch.Tensor:
        sums, taken = path_sums(arcs, row, frame, position, boundary)
        ctx.save_for_backward(taken, row)
        return sums

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> Tuple[Any, ...]:
        taken, row = ctx.saved_tensors
        return (g[row].unsqueeze(1) * taken, None, None, None, None)


def _boundary(
    student: StudentNodes, rows: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """(len(rows), 4): 0, 0, U_n, T_n; every path begins and ends in a node."""
    nodes, lens = student.nodes, student.lengths[rows].to(torch.int64)
    first = (nodes.frame == 0) & (nodes.position == 0)
    last = (nodes.frame == lens[row] - 1) & (nodes.label < 0)
    for end in (first, last):
        cut = end.new_zeros(len(rows)).index_fill(0, row[end], True).logical_not()
        if cut.any():
            i = int(cut.nonzero()[0])
            frames = nodes.frame[row == i]
            raise KDError(
                f"the teacher's lattice of row {int(rows[i])} has nodes from frame "
                f"{int(frames.min())} to {int(frames.max())} and the student "
                f"{int(lens[i])} frames, and the full sum needs all of them: give the "
                "nodes without a shift, of a teacher with the student's frame rate"
            )
    boundary = torch.zeros(len(rows), 4, dtype=torch.int64, device=row.device)
    boundary[row[last], 2] = nodes.position[last]
    boundary[:, 3] = lens
    return boundary

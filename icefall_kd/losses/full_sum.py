"""Distillation of a sequence's probability, summed over its alignments."""

from typing import Any, Tuple

import torch

from icefall_kd.errors import KDError, require
from icefall_kd.lattice import path_sums
from icefall_kd.losses.kl import compute_dtype
from icefall_kd.losses.nodes import collapse
from icefall_kd.losses.student_nodes import StudentNodes

TWO_SIDED, ONE_SIDED = FULL_SUM_FORMS = ("two-sided", "one-sided")


def full_sum_kd_loss(
    student: StudentNodes, *, form: str = TWO_SIDED, blank_id: int = 0
) -> torch.Tensor:
    """Return the distance of the probabilities that both models give to transcripts.

    sum over utterances n of d(log P(y_n|x_n) - log P~(y_n|x_n)): the student learns
    the teacher's probability of the sequence, and may choose its own alignments
    (the idea of Zeineldeen et al., arXiv:2303.05958). The distance is our choice:
    d(x) = x^2 / 2 up to 1 nat and ``|x| - 1/2`` beyond, an absolute difference, on the
    scale of the transducer loss itself, whose gradient goes to 0 where the two agree.

    The form one-sided takes d(max(0, log P~(y_n|x_n) - log P(y_n|x_n))): an utterance
    whose transcript the student finds at least as probable as the teacher does counts
    0, so a teacher that is worse teaches nothing there (the condition of Meng et al.,
    arXiv:1904.12399, with the student in place of a wrong teacher's label).

    Both sums run over the same paths: through the teacher's nodes, by arcs (next label
    or blank) whose probability the teacher's targets hold. So a pruned lattice and a
    sparse teacher leave out paths of teacher and student alike, and neither sum is
    estimated: the share of a label in a sparse tail is not known. ``collapsed`` and
    ``dense`` lattices give all arcs. An utterance without a complete path counts 0.

    There is no temperature: a sparse teacher must be stored at temperature 1.

    Args:
      student: The student at its teacher's nodes, not shifted.
      form: "two-sided" or "one-sided".
      blank_id: The token id of blank.

    Returns:
      A scalar, in float32 or, for a float64 student, float64; 0 with a zero gradient
      for no nodes.

    Raises:
      KDError: Nodes that don't reach from the first frame to the student's last, NaN in
        the student, or another form.
    """
    require(
        form in FULL_SUM_FORMS,
        f"`form` is {form!r}, and must be one of {', '.join(FULL_SUM_FORMS)}",
    )
    nodes, logits = student.nodes, student.logits()
    logits = logits.to(compute_dtype(logits.dtype))
    if not len(nodes):
        return logits.sum()
    # The G utterances that have nodes, and of each node its utterance among these.
    utterances, row = nodes.row.unique(return_inverse=True)
    boundary = _boundary(student, utterances, row)
    pair = collapse(nodes, blank_id).teacher  # next label and blank
    teacher_arcs = pair.log_probs.detach().to(logits.dtype)  # (R, 2)
    arcs = logits.gather(1, pair.indices) - logits.logsumexp(-1, keepdim=True)
    arcs = arcs.masked_fill(teacher_arcs == -torch.inf, -torch.inf)
    places = (row, nodes.frame, nodes.position, boundary)
    teacher_sums, _ = path_sums(teacher_arcs, *places)  # (G,)
    sums = _PathSums.apply(arcs, *places)
    has_path = torch.isfinite(teacher_sums) & torch.isfinite(sums)
    sums, teacher_sums = sums[has_path], teacher_sums[has_path]
    if form == ONE_SIDED:  # at the teacher's sum, above it: the distance is 0
        sums = torch.minimum(sums, teacher_sums)
    return torch.nn.functional.smooth_l1_loss(sums, teacher_sums, reduction="sum")


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
    student: StudentNodes, utterances: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """0, 0, U, T of each utterance, (G, 4); every path begins and ends in a node."""
    nodes, lens = student.nodes, student.lengths[utterances].to(torch.int64)
    is_first = (nodes.frame == 0) & (nodes.position == 0)
    is_last = (nodes.frame == lens[row] - 1) & (nodes.label < 0)
    for is_end in (is_first, is_last):
        lacks_end = torch.ones_like(lens, dtype=torch.bool)
        lacks_end[row[is_end]] = False
        if lacks_end.any():
            i = int(lacks_end.nonzero()[0])
            frames = nodes.frame[row == i]
            raise KDError(
                f"the teacher's lattice of row {int(utterances[i])} has nodes from "
                f"frame {int(frames.min())} to {int(frames.max())} and the student "
                f"{int(lens[i])} frames, and the full sum needs all of them: give the "
                "nodes without a shift, of a teacher with the student's frame rate"
            )
    boundary = torch.zeros(len(utterances), 4, dtype=torch.int64, device=row.device)
    boundary[row[is_last], 2] = nodes.position[is_last]
    boundary[:, 3] = lens
    return boundary

"""The KL divergence of a late student, over the pairs of monotone alignments."""

from typing import Any, Optional, Tuple

import torch

from icefall_kd.losses.alignment import FramePairs, align_late_student
from icefall_kd.losses.kl import FLOOR, chunk_rows, compute_dtype, scaled_logits
from icefall_kd.types import Distribution, SparseDistribution, index_rows, is_sparse


class LateKL(torch.autograd.Function):
    """T^2 sum of w KL over the pairs of the alignments.

    The gradient towards the student's row s, T sum of w (q_s - p_t) over its pairs (t,
    s), is formed in the forward pass: the softmax q, which the costs need, is written
    to the gradient's memory. What a sparse teacher's row dropped is one class, as in
    :func:`icefall_kd.losses.kl.row_kl`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: Distribution,
        temperature: float,
        valid: torch.Tensor,
        weights: Optional[torch.Tensor],
        delay: int,
    ) -> torch.Tensor:
        """Return the loss; arguments are those of
        :func:`icefall_kd.losses.alignment.align_late_student`.

        Args:
          ctx: The context that autograd gives.
          student: (N * T, V), logits.
          teacher: N * T rows.
          temperature: T.
          valid: (N, T), bool.
          weights: (R,), or None.
          delay: In frames.
        """
        ctx.save_for_backward(student)
        ctx.options = (teacher, temperature, valid, weights, delay)
        value, ctx.grad = _late_kl(student, *ctx.options)
        return value

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        """Return the gradient towards the student alone.

        Args:
          ctx: The context of the forward pass.
          g: The gradient towards the loss.
        """
        (student,) = ctx.saved_tensors
        # The first call hands out the gradient itself; another makes it again.
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            _, grad = _late_kl(student, *ctx.options)
        return grad.mul_(g).to(student.dtype), None, None, None, None, None


def _late_kl(
    student: torch.Tensor,
    teacher: Distribution,
    temperature: float,
    valid: torch.Tensor,
    weights: Optional[torch.Tensor],
    delay: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its gradient towards the student, (N * T, V)."""
    # The softmax of valid rows comes here first; the others have a gradient of 0.
    grad = torch.empty_like(student, dtype=compute_dtype(student.dtype))
    grad.index_fill_(0, (~valid).flatten().nonzero().squeeze(1), 0.0)
    pairs = align_late_student(
        student, teacher, temperature, valid, weights, delay, grad
    )
    rows = valid.flatten().nonzero().squeeze(1)
    with torch.autocast(student.device.type, enabled=False):
        if is_sparse(teacher):
            kl = _sparse_gradient(grad, teacher, temperature, rows, pairs)
        else:
            _dense_gradient(grad, teacher, temperature, rows, pairs)
            kl = pairs.kl
    if pairs.weights is not None:  # what has no weight may be inf or NaN
        kl = (kl * pairs.weights).masked_fill(pairs.weights == 0, 0.0)
    return (kl.sum(dtype=torch.float64) * temperature**2).to(grad.dtype), grad


def _scales(pairs: FramePairs, temperature: float) -> torch.Tensor:
    """T w of each pair, (P,)."""
    scale = torch.full_like(pairs.kl, temperature)
    return scale if pairs.weights is None else scale * pairs.weights.to(scale.dtype)


def _sum_over_student_rows(
    scale: torch.Tensor, pairs: FramePairs, rows: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """The scales of each student's row, (R,); rows of none get a gradient of 0."""
    sums = scale.new_zeros(len(rows)).index_add_(0, pairs.student, scale)
    grad.index_fill_(0, rows[(sums == 0).nonzero().squeeze(1)], 0.0)
    return sums


def _dense_gradient(
    grad: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    rows: torch.Tensor,
    pairs: FramePairs,
) -> None:
    """Turn the student's softmax, in ``grad``, into the gradient.

    Row s gets q_s times the sum of its scales, minus the scaled p_t of each pair.

    Args:
      grad: (N * T, V).
      teacher: (N * T, V).
      temperature: T.
      rows: (R,), the valid rows.
      pairs: P pairs of these.
    """
    scale = _scales(pairs, temperature)  # (P,)
    sums = _sum_over_student_rows(scale, pairs, rows, grad)  # (R,)
    # Without weights and at T = 1 few rows have another sum than 1.
    to_scale = ((sums != 1) & (sums != 0)).nonzero().squeeze(1)
    step = chunk_rows(grad.device, grad.size(1))
    for part in to_scale.split(step):
        row = rows[part]
        grad.index_copy_(0, row, grad.index_select(0, row) * sums[part, None])
    has_scales = pairs.weights is not None or temperature != 1
    for part in (scale != 0).nonzero().squeeze(1).split(step):
        y = index_rows(teacher, rows[pairs.teacher[part]])
        p = scaled_logits(y, temperature, grad.dtype).softmax(-1)
        if has_scales:
            p *= scale[part, None]
        grad.index_add_(0, rows[pairs.student[part]], p, alpha=-1)


def _sparse_gradient(
    grad: torch.Tensor,
    teacher: SparseDistribution,
    temperature: float,
    rows: torch.Tensor,
    pairs: FramePairs,
) -> torch.Tensor:
    """The same of a sparse teacher; returns the KL of each pair, (P,).

    It is computed again, as the gradient needs the tail's mass more exactly than the
    costs do.
    """
    scale = _scales(pairs, temperature)  # (P,)
    kl = torch.empty_like(scale)
    sums = _sum_over_student_rows(scale, pairs, rows, grad)  # (R,)
    counts = sums[pairs.student] != 0  # (P,)
    kl.masked_fill_(~counts, 0.0)
    # Pairs are in the order of the student's rows too. A row's first pair takes the
    # place of the softmax; the later ones, which are few, work on a copy of it.
    is_first = torch.ones_like(counts)
    is_first[1:] = pairs.student[1:] != pairs.student[:-1]
    later_pairs = (~is_first & counts).nonzero().squeeze(1)
    copies = grad.index_select(0, rows[pairs.student[later_pairs]])
    step = chunk_rows(grad.device, grad.size(1))
    for part in (is_first & counts).nonzero().squeeze(1).split(step):
        row = rows[pairs.student[part]]
        y = index_rows(teacher, rows[pairs.teacher[part]])
        q = grad.index_select(0, row)
        kl[part], gradient = _sparse_kl_of_softmax(q, y, scale[part])
        grad.index_copy_(0, row, gradient)
    for part, q in zip(later_pairs.split(step), copies.split(step)):
        y = index_rows(teacher, rows[pairs.teacher[part]])
        kl[part], gradient = _sparse_kl_of_softmax(q, y, scale[part])
        grad.index_add_(0, rows[pairs.student[part]], gradient)
    return kl


def _sparse_kl_of_softmax(
    q: torch.Tensor, teacher: SparseDistribution, scale: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """KL of rows whose softmax is ``q``, (C,), and ``scale`` times its gradient, in q.

    Masses below the smallest number of the type, 1e-38 in float32, count as that.

    Args:
      q: (C, V), the student's softmax; it is overwritten by the gradient.
      teacher: Of C rows.
      scale: (C,).
    """
    indices = teacher.indices
    log_p, log_p_tail = teacher.log_probs.to(q.dtype), teacher.log_tail.to(q.dtype)
    p, p_tail = log_p.exp(), log_p_tail.exp()
    is_token = (log_p > -torch.inf).to(q.dtype)
    q_kept = q.gather(1, indices) * is_token  # (C, K)
    # What is left in q is the rest. An entry that fills up may have the index of a kept
    # token: it takes nothing.
    q.scatter_add_(1, indices, -q_kept)
    q_tail = q.sum(-1)
    tiny = torch.finfo(q.dtype).tiny
    least_tail = q_tail.clamp(min=tiny)
    kl = (p * (log_p.clamp(min=FLOOR) - q_kept.clamp(min=tiny).log())).sum(-1)
    kl += p_tail * (log_p_tail.clamp(min=FLOOR) - least_tail.log())
    q *= (scale * (q_tail - p_tail) / least_tail)[:, None]
    q.scatter_add_(1, indices, (q_kept - p) * scale[:, None])
    return kl.clamp_(min=0.0), q

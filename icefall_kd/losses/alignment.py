"""Monotone alignments of a late student's frames with its teacher's."""

import math
from typing import NamedTuple, Optional, Tuple

import numpy as np
import torch

from icefall_kd.losses.kl import FLOOR, cast_teacher, chunk_rows, log_sum_exp, wide
from icefall_kd.types import Distribution, index_rows, is_sparse


class FramePairs(NamedTuple):
    """P pairs of frames, numbered from 0 to R - 1 among the R valid ones."""

    student: torch.Tensor  # (P,), int64
    teacher: torch.Tensor  # (P,), int64, in rising order
    weights: Optional[torch.Tensor]  # (P,), or None: 1
    kl: torch.Tensor  # (P,), unweighted, without T^2


@torch.no_grad()
def align_late_student(
    student: torch.Tensor,
    teacher: Distribution,
    temperature: float,
    valid: torch.Tensor,
    weights: Optional[torch.Tensor],
    delay: int,
    softmax: Optional[torch.Tensor] = None,
) -> FramePairs:
    """Find the alignments of least loss for a student that is up to ``delay`` late.

    An alignment is a path of pairs (t, s), teacher's frame and student's, from the
    first frame of both to the last of both. A step moves on by one frame at the
    teacher, at the student, or at both, so no frame of either side is left out, and
    0 <= s - t <= delay throughout. With the cost

        c(t, j) = max(w_t, w_t+j) KL(teacher_t || student_t+j),   j = 0..delay,

    the least cost of a path up to (t, j) is

        D(t, j) = c(t, j) + min(D(t-1, j), D(t-1, j+1), D(t, j-1)):

    both moved on, the teacher alone, the student alone. This is dynamic time warping
    (Sakoe and Chiba, 1978) in a band. A pair has the larger of both frames' weights, so
    that no frame of the student is aligned away to one that does not count. A stretch
    of valid frames, such as an utterance, is aligned by itself.

    Args:
      student: (N * T, V), logits.
      teacher: N * T rows of V logits or log-probabilities, or sparse.
      temperature: Of both; a sparse teacher is at it already.
      valid: (N, T), bool, frames that count on both sides. Others are never read.
      weights: (R,), w of the R valid frames, 0 or more; None: 1.
      delay: In frames, above 0.
      softmax: (N * T, V), takes the softmax of the student's valid rows; None: is not
        wanted.

    Returns:
      The pairs of all stretches.
    """
    rows = valid.flatten().nonzero().squeeze(1)
    starts = torch.ones_like(valid)
    starts[:, 1:] = ~valid[:, :-1]
    stretch = starts.flatten()[rows].cumsum(0) - 1  # (R,), which one a row is in
    lengths = stretch.bincount()
    delay = min(delay, int(lengths.max()) - 1)
    kl = _costs(student, teacher, temperature, rows, delay, softmax)
    costs = kl.clone()
    if weights is not None:
        for j in range(delay + 1):
            n = len(weights) - j
            larger = torch.maximum(weights[:n], weights[j:])
            costs[:n, j] = (kl[:n, j] * larger).masked_fill(larger == 0, 0.0)  # 0 * NaN
    for j in range(1, delay + 1):  # a pair lies in one stretch
        costs[len(rows) - j :, j] = torch.inf
        costs[:-j, j].masked_fill_(stretch[j:] != stretch[:-j], torch.inf)
    first_row = lengths.cumsum(0) - lengths
    at = torch.arange(len(rows), device=rows.device) - first_row[stretch]
    # (frames, delays, stretches), so that a step of the search reads contiguously.
    # Behind the end of a short stretch the path goes on along j = 0 without cost.
    table = torch.full(
        (int(lengths.max()), delay + 1, len(lengths)), torch.inf, dtype=torch.float64
    )
    table[:, 0] = 0.0
    at, stretch = at.cpu(), stretch.cpu()
    table[at, :, stretch] = costs.cpu().to(torch.float64)
    low, high = _best_paths(table.numpy())
    low, high = (torch.from_numpy(x)[at, stretch].to(rows.device) for x in (low, high))
    count = high - low + 1
    teacher_index = torch.arange(len(rows), device=rows.device)
    teacher_index = teacher_index.repeat_interleave(count)
    # The pairs of a teacher's frame are numbered from its first one on.
    first_pair = (count.cumsum(0) - count)[teacher_index]
    number = torch.arange(len(teacher_index), device=rows.device) - first_pair
    late_by = low[teacher_index] + number
    student_index = teacher_index + late_by
    if weights is not None:
        weights = torch.maximum(weights[student_index], weights[teacher_index])
    return FramePairs(student_index, teacher_index, weights, kl[teacher_index, late_by])


def _costs(student, teacher, temperature, rows, delay, softmax) -> torch.Tensor:
    """KL of the i-th of ``rows`` and the student's (i + j)-th, (R, delay + 1).

    Cells of i + j beyond R - 1 hold anything.
    """
    v = student.size(1)
    dtype = wide(student.dtype)
    costs = torch.zeros(len(rows), delay + 1, dtype=dtype, device=rows.device)
    kept = teacher.indices.size(-1) if is_sparse(teacher) else 0
    step = chunk_rows(rows.device, max(v, (delay + 1) * kept))
    with torch.autocast(student.device.type, enabled=False):
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            # The student's rows reach as far behind the chunk as the delay does.
            x = student.index_select(0, rows[begin : begin + step + delay]).to(dtype)
            if temperature != 1:
                x *= 1 / temperature
            x.clamp_(min=FLOOR)
            q = x.softmax(-1)
            if softmax is not None:
                softmax.index_copy_(0, part, q[: len(part)])
            y = cast_teacher(index_rows(teacher, part), dtype, temperature)
            if is_sparse(y):
                _sparse_costs(q, y, costs[begin : begin + step])
            else:
                _dense_costs(x, log_sum_exp(x, q), y, costs[begin : begin + step])
    return costs.clamp_(min=0.0)


def _dense_costs(x, norms, y, costs) -> None:
    p = y.clamp_(min=FLOOR).softmax(-1)
    # Of equal rows both sides are the same, bit by bit, and the cost is 0.
    negative_entropy = (p * y).sum(-1) - log_sum_exp(y, p)
    for j in range(costs.size(1)):
        n = max(0, min(len(p), len(x) - j))
        cross = (p[:n] * x[j : j + n]).sum(-1) - norms[j : j + n]
        costs[:n, j] = negative_entropy[:n] - cross


def _sparse_costs(q, teacher, costs) -> None:
    """What a row does not keep is one class; its mass at the student is 1 - kept."""
    log_p, log_p_tail = teacher.log_probs, teacher.log_tail
    p, p_tail = log_p.exp(), log_p_tail.exp()
    negative_entropy = (p * log_p.clamp(min=FLOOR)).sum(-1)
    negative_entropy += p_tail * log_p_tail.clamp(min=FLOOR)
    # The student's row i + j at the symbols that the teacher's row i keeps, (n, D, K).
    n, n_delays = costs.shape
    at = torch.arange(n, device=q.device)[:, None]
    at = (at + torch.arange(n_delays, device=q.device)).clamp_(max=len(q) - 1)
    q_kept = q.take(at[:, :, None] * q.size(1) + teacher.indices[:, None])
    kept = (log_p > -torch.inf).to(q.dtype)
    tiny = torch.finfo(q.dtype).tiny
    log_q_tail = (1 - (q_kept * kept[:, None]).sum(-1)).clamp_(min=tiny).log_()
    cross = (p[:, None] * q_kept.clamp_(min=tiny).log_()).sum(-1)
    cross += p_tail[:, None] * log_q_tail
    costs.copy_(negative_entropy[:, None] - cross)


def _best_paths(costs: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The path of least cost through each of M tables.

    A table is walked in blocks of about sqrt(L) frames, all blocks side by side: within
    each from every delay that it may be entered with, then from block to block.

    Args:
      costs: (L, D, M), c(t, j). A path starts at (0, 0) and ends at (L - 1, 0).

    Returns:
      (L, M) each, int64: the path visits (t, low) to (t, high) and all between.
    """
    length, n_delays, n_tables = costs.shape
    n_steps = math.isqrt(length - 1) + 1
    n_blocks = -(-length // n_steps)
    # (n_steps, D, n_blocks, M); what is added goes on along j = 0 without cost.
    blocks = np.full((n_blocks * n_steps, n_delays, n_tables), np.inf)
    blocks[:length], blocks[length:, 0] = costs, 0.0
    blocks = blocks.reshape(n_blocks, n_steps, n_delays, n_tables)
    totals, entry, teacher_moved = _walk(blocks.transpose(1, 2, 0, 3))

    # From block to block: the least total at its last frame, and where it was entered.
    best = np.full((n_delays, n_tables), np.inf)
    best[0] = 0.0
    entered = np.zeros((n_blocks, n_delays, n_tables), np.int64)
    for block in range(n_blocks):
        candidates = totals[:, :, block] + best
        entered[block] = candidates.argmin(1)
        best = candidates.min(1)
    tables, j = np.arange(n_tables), np.zeros(n_tables, np.int64)
    first, last = np.zeros((2, n_blocks, n_tables), np.int64)
    for block in range(n_blocks - 1, -1, -1):
        last[block] = j
        first[block] = j = entered[block, j, tables]

    # Back through all blocks at once.
    low, high = np.zeros((2, n_blocks, n_steps, n_tables), np.int64)
    where, j = (first, np.arange(n_blocks)[:, None], tables), last
    for t in range(n_steps - 1, -1, -1):
        high[:, t] = j
        low[:, t] = entry[(t, j, *where)]
        j = low[:, t] + teacher_moved[(t, low[:, t], *where)]
    return low.reshape(-1, n_tables)[:length], high.reshape(-1, n_tables)[:length]


def _walk(blocks: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Walk through blocks from every delay i of the frame before them.

    Args:
      blocks: (n_steps, D, n_blocks, M), c(t, j).

    Returns:
      (D, D, n_blocks, M), the least cost from i to delay j at the last frame, j first.
      And (n_steps, D, D, n_blocks, M) each, j before i: the delay with which the path
      to (t, j) entered frame t; and 1 where it came there from (t - 1, j + 1), the
      teacher alone having moved on, 0 where from (t - 1, j).
    """
    n_steps, n_delays = blocks.shape[:2]
    shape = (n_delays, n_delays, *blocks.shape[2:])
    entry = np.zeros((n_steps, *shape), np.int16)
    entry[:] = np.arange(n_delays)[:, None, None, None]
    teacher_moved = np.zeros((n_steps, *shape), np.int8)
    before = np.full((n_delays + 1, *shape[1:]), np.inf)  # and a delay out of reach
    before[np.arange(n_delays), np.arange(n_delays)] = 0.0
    for t in range(n_steps):
        np.less(before[1:], before[:-1], out=teacher_moved[t], casting="unsafe")
        total = np.minimum(before[1:], before[:-1])
        total += blocks[t][:, None]
        for j in range(1, n_delays):  # the student alone moves on
            student_moved = total[j - 1] + blocks[t, j]
            better = student_moved < total[j]
            np.copyto(total[j], student_moved, where=better)
            np.copyto(entry[t, j], entry[t, j - 1], where=better)
        before[:-1] = total
    return before[:-1], entry, teacher_moved


class LateKL(torch.autograd.Function):
    """T^2 sum of w KL over the pairs of the alignments.

    The gradient towards the student's row s, T sum of w (q_s - p_t) over its pairs (t,
    s), is formed in the forward pass: the softmax q, which the costs ask for, stands
    already where the gradient is to stand. What a sparse teacher's row does not keep is
    one class there, as in :func:`icefall_kd.losses.kl.row_kl`.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature, valid, weights, delay):
        ctx.save_for_backward(student)
        ctx.options = (teacher, temperature, valid, weights, delay)
        value, ctx.grad = LateKL._both(student, *ctx.options)
        return value

    @staticmethod
    def _both(student, teacher, temperature, valid, weights, delay):
        # The softmax of valid rows will stand here; the others have no gradient.
        grad = torch.empty_like(student, dtype=wide(student.dtype))
        grad.index_fill_(0, (~valid).flatten().nonzero().squeeze(1), 0.0)
        pairs = align_late_student(
            student, teacher, temperature, valid, weights, delay, grad
        )
        rows = valid.flatten().nonzero().squeeze(1)
        teach = _teach_sparse if is_sparse(teacher) else _teach_dense
        with torch.autocast(student.device.type, enabled=False):
            kl = teach(grad, teacher, temperature, rows, pairs)
        if pairs.weights is not None:  # what has no weight may be inf or NaN
            kl = (kl * pairs.weights).masked_fill(pairs.weights == 0, 0.0)
        return (kl.sum(dtype=torch.float64) * temperature**2).to(grad.dtype), grad

    @staticmethod
    def backward(ctx, g):
        (student,) = ctx.saved_tensors
        # The first call hands out the gradient itself; another makes it again.
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            _, grad = LateKL._both(student, *ctx.options)
        return grad.mul_(g).to(student.dtype), None, None, None, None, None


def _shares(pairs: FramePairs, temperature: float) -> torch.Tensor:
    """T w of each pair, (P,)."""
    share = torch.full_like(pairs.kl, temperature)
    return share if pairs.weights is None else share * pairs.weights.to(share.dtype)


def _forget_unweighted(grad, rows, pairs, share) -> torch.Tensor:
    """The shares of each student's row, (R,); rows of none get a gradient of 0."""
    sums = share.new_zeros(len(rows)).index_add_(0, pairs.student, share)
    grad.index_fill_(0, rows[(sums == 0).nonzero().squeeze(1)], 0.0)
    return sums


def _teach_dense(grad, teacher, temperature, rows, pairs) -> torch.Tensor:
    """Turn the student's softmax, in ``grad``, into the gradient; KL of each pair."""
    share = _shares(pairs, temperature)
    sums = _forget_unweighted(grad, rows, pairs, share)
    # Few, without weights and at T = 1.
    scaled = ((sums != 1) & (sums != 0)).nonzero().squeeze(1)
    step = chunk_rows(grad.device, grad.size(1))
    for part in scaled.split(step):
        row = rows[part]
        grad.index_copy_(0, row, grad.index_select(0, row) * sums[part, None])
    weighted = pairs.weights is not None or temperature != 1
    for part in (share != 0).nonzero().squeeze(1).split(step):
        y = index_rows(teacher, rows[pairs.teacher[part]])
        p = cast_teacher(y, grad.dtype, temperature).clamp_(min=FLOOR).softmax(-1)
        if weighted:
            p *= share[part, None]
        grad.index_add_(0, rows[pairs.student[part]], p, alpha=-1)
    return pairs.kl


def _teach_sparse(grad, teacher, temperature, rows, pairs) -> torch.Tensor:
    """The same of a sparse teacher."""
    share = _shares(pairs, temperature)
    kl = torch.empty_like(share)
    # Pairs stand in the order of the student's rows too. A row's first pair takes the
    # place of the softmax; the others, which are few, work on a copy of it.
    again = torch.zeros_like(pairs.student, dtype=torch.bool)
    again[1:] = pairs.student[1:] == pairs.student[:-1]
    sums = _forget_unweighted(grad, rows, pairs, share)
    counted = sums[pairs.student] != 0
    kl.masked_fill_(~counted, 0.0)
    others = (again & counted).nonzero().squeeze(1)
    copies = grad.index_select(0, rows[pairs.student[others]])
    step = chunk_rows(grad.device, grad.size(1))
    for part in (~again & counted).nonzero().squeeze(1).split(step):
        row = rows[pairs.student[part]]
        y = cast_teacher(
            index_rows(teacher, rows[pairs.teacher[part]]), grad.dtype, 1.0
        )
        kl[part], g = _sparse_of_softmax(grad.index_select(0, row), y, share[part])
        grad.index_copy_(0, row, g)
    for part, q in zip(others.split(step), copies.split(step)):
        y = cast_teacher(
            index_rows(teacher, rows[pairs.teacher[part]]), grad.dtype, 1.0
        )
        kl[part], g = _sparse_of_softmax(q, y, share[part])
        grad.index_add_(0, rows[pairs.student[part]], g)
    return kl


def _sparse_of_softmax(q, teacher, share) -> Tuple[torch.Tensor, torch.Tensor]:
    """KL of rows whose softmax is ``q``, and ``share`` times its gradient, in ``q``.

    Masses below the smallest number of the type, 1e-38 in float32, count as that.
    """
    log_p, log_p_tail = teacher.log_probs, teacher.log_tail
    kept = (log_p > -torch.inf).to(q.dtype)
    p, p_tail = log_p.exp(), log_p_tail.exp()
    q_kept = q.gather(1, teacher.indices) * kept
    # What is left is the rest. Padding entries share index 0 with a symbol that may be
    # kept: they take nothing.
    q.scatter_add_(1, teacher.indices, -q_kept)
    q_tail = q.sum(-1)
    tiny = torch.finfo(q.dtype).tiny
    kl = (p * (log_p.clamp(min=FLOOR) - q_kept.clamp(min=tiny).log())).sum(-1)
    least_tail = q_tail.clamp(min=tiny)
    kl += p_tail * (log_p_tail.clamp(min=FLOOR) - least_tail.log())
    q *= (share * (q_tail - p_tail) / least_tail)[:, None]
    q.scatter_add_(1, teacher.indices, (q_kept - p) * share[:, None])
    return kl.clamp_(min=0.0), q

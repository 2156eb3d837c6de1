"""Monotone alignments of a late student's frames with its teacher's.

:func:`align_late_student` computes the KL divergence of each pair of frames that may
meet, finds the path of least cost by dynamic programming, and returns its pairs.
"""

import math
from typing import NamedTuple, Optional, Tuple

import numpy as np
import torch

from icefall_kd.losses.kl import (
    FLOOR,
    chunk_rows,
    compute_dtype,
    log_sum_exp,
    scaled_logits,
)
from icefall_kd.types import Distribution, SparseDistribution, index_rows, is_sparse


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
      temperature: T, of both; a sparse teacher is at it already.
      valid: (N, T), bool, frames that count on both sides. Others are never read.
      weights: (R,), w of the R valid frames, 0 or more; None: 1.
      delay: How late the student may be, in frames, above 0.
      softmax: (N * T, V), memory for the softmax of the student's valid rows; None: it
        is not wanted.

    Returns:
      The pairs of all stretches.
    """
    rows = valid.flatten().nonzero().squeeze(1)  # (R,)
    starts = torch.ones_like(valid)
    starts[:, 1:] = ~valid[:, :-1]
    stretch = starts.flatten()[rows].cumsum(0) - 1  # (R,), the stretch of each row
    lengths = stretch.bincount()  # (M,), of M stretches
    delay = min(delay, int(lengths.max()) - 1)
    kl = _divergences(student, teacher, temperature, rows, delay, softmax)  # (R, D)
    costs = _weighted(kl, weights)
    for j in range(1, delay + 1):  # a pair lies in one stretch
        costs[len(rows) - j :, j] = torch.inf
        costs[:-j, j].masked_fill_(stretch[j:] != stretch[:-j], torch.inf)
    low, high = _search(costs, stretch, lengths)

    # The teacher's i-th row meets the student's rows from i + low[i] to i + high[i].
    counts = high - low + 1
    teacher_index = torch.arange(len(rows), device=rows.device)
    teacher_index = teacher_index.repeat_interleave(counts)  # (P,)
    # The pairs of a teacher's frame are numbered from its first one on.
    first_pair = (counts.cumsum(0) - counts)[teacher_index]
    number = torch.arange(len(teacher_index), device=rows.device) - first_pair
    late_by = low[teacher_index] + number
    student_index = teacher_index + late_by
    if weights is not None:
        weights = torch.maximum(weights[student_index], weights[teacher_index])
    return FramePairs(student_index, teacher_index, weights, kl[teacher_index, late_by])


def _weighted(kl: torch.Tensor, weights: Optional[torch.Tensor]) -> torch.Tensor:
    """c(t, j) = max(w_t, w_t+j) KL, (R, D), from the KL and w, (R,)."""
    costs = kl.clone()
    if weights is not None:
        for j in range(kl.size(1)):
            n = len(weights) - j
            larger = torch.maximum(weights[:n], weights[j:])
            costs[:n, j] = (kl[:n, j] * larger).masked_fill(larger == 0, 0.0)  # 0 * NaN
    return costs


# The costs


def _divergences(
    student: torch.Tensor,
    teacher: Distribution,
    temperature: float,
    rows: torch.Tensor,
    delay: int,
    softmax: Optional[torch.Tensor],
) -> torch.Tensor:
    """KL of the i-th of ``rows`` and the student's (i + j)-th, (R, delay + 1).

    Cells of i + j beyond R - 1 hold anything. Arguments are those of
    :func:`align_late_student`.
    """
    v = student.size(1)
    dtype = compute_dtype(student.dtype)
    kl = torch.zeros(len(rows), delay + 1, dtype=dtype, device=rows.device)
    k = teacher.indices.size(-1) if is_sparse(teacher) else 0
    step = chunk_rows(rows.device, max(v, (delay + 1) * k))
    with torch.autocast(student.device.type, enabled=False):
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]  # (C,)
            # The student's rows reach as far beyond the chunk as the delay does.
            x = student.index_select(0, rows[begin : begin + step + delay]).to(dtype)
            if temperature != 1:
                x *= 1 / temperature
            x.clamp_(min=FLOOR)
            q = x.softmax(-1)  # (C + delay, V)
            if softmax is not None:
                softmax.index_copy_(0, part, q[: len(part)])
            chunk = index_rows(teacher, part)
            if is_sparse(chunk):
                _sparse_divergences(q, chunk, kl[begin : begin + step])
            else:
                y = scaled_logits(chunk, temperature, dtype)  # (C, V)
                _dense_divergences(x, log_sum_exp(x, q), y, kl[begin : begin + step])
    return kl.clamp_(min=0.0)


def _dense_divergences(
    x: torch.Tensor, norms: torch.Tensor, y: torch.Tensor, out: torch.Tensor
) -> None:
    """Write KL(y_i || x_i+j) to ``out``.

    Args:
      x: (C + D - 1, V), the student's logits / T.
      norms: (C + D - 1,), their logsumexp.
      y: (C, V), the teacher's logits / T.
      out: (C, D).
    """
    p = y.softmax(-1)
    # Of equal rows both sides are the same, bit by bit, and the divergence is 0.
    negative_entropy = (p * y).sum(-1) - log_sum_exp(y, p)
    for j in range(out.size(1)):
        n = max(0, min(len(p), len(x) - j))
        cross = (p[:n] * x[j : j + n]).sum(-1) - norms[j : j + n]
        out[:n, j] = negative_entropy[:n] - cross


def _sparse_divergences(
    q: torch.Tensor, teacher: SparseDistribution, out: torch.Tensor
) -> None:
    """Write KL(teacher_i || q_i+j) to ``out``.

    The tokens that a row dropped are one class; its mass at the student is 1 - that of
    the kept ones.

    Args:
      q: (C + D - 1, V), the student's softmax.
      teacher: Of C rows.
      out: (C, D).
    """
    log_p, log_p_tail = teacher.log_probs.to(q.dtype), teacher.log_tail.to(q.dtype)
    p, p_tail = log_p.exp(), log_p_tail.exp()
    negative_entropy = (p * log_p.clamp(min=FLOOR)).sum(-1)
    negative_entropy += p_tail * log_p_tail.clamp(min=FLOOR)
    # The student's row i + j at the tokens that the teacher's row i kept, (C, D, K).
    n, n_delays = out.shape
    row = torch.arange(n, device=q.device)[:, None]
    row = (row + torch.arange(n_delays, device=q.device)).clamp_(max=len(q) - 1)
    q_kept = q.take(row[:, :, None] * q.size(1) + teacher.indices[:, None])
    is_token = (log_p > -torch.inf).to(q.dtype)
    tiny = torch.finfo(q.dtype).tiny
    log_q_tail = (1 - (q_kept * is_token[:, None]).sum(-1)).clamp_(min=tiny).log_()
    cross = (p[:, None] * q_kept.clamp_(min=tiny).log_()).sum(-1)
    cross += p_tail[:, None] * log_q_tail
    out.copy_(negative_entropy[:, None] - cross)


# The search


def _search(
    costs: torch.Tensor, stretch: torch.Tensor, lengths: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The path of least cost through each stretch.

    Args:
      costs: (R, D), c(t, j).
      stretch: (R,), int64, the stretch of each row.
      lengths: (M,), int64, how many rows each stretch has.

    Returns:
      (R,) each, int64: the path visits (t, low) to (t, high) and all between.
    """
    device = costs.device
    first_row = lengths.cumsum(0) - lengths
    frame = torch.arange(len(stretch), device=device) - first_row[stretch]
    frame, stretch = frame.cpu(), stretch.cpu()
    # (frames, delays, stretches), so that a step of the search reads contiguously.
    # After the end of a short stretch the path goes on along j = 0 without cost.
    shape = (int(lengths.max()), costs.size(1), len(lengths))
    table = torch.full(shape, torch.inf, dtype=torch.float64)
    table[:, 0] = 0.0
    table[frame, :, stretch] = costs.cpu().to(torch.float64)
    low, high = _best_paths(table.numpy())
    low, high = torch.from_numpy(low), torch.from_numpy(high)
    return low[frame, stretch].to(device), high[frame, stretch].to(device)


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
    # Filled up to whole blocks; there the path goes on along j = 0 without cost.
    blocks = np.full((n_blocks * n_steps, n_delays, n_tables), np.inf)
    blocks[:length], blocks[length:, 0] = costs, 0.0
    blocks = blocks.reshape(n_blocks, n_steps, n_delays, n_tables)
    totals, entry, teacher_moved = _walk(blocks.transpose(1, 2, 0, 3))

    # From block to block: the least total at each delay of its last frame, and the
    # delay that it was entered with.
    best = np.full((n_delays, n_tables), np.inf)
    best[0] = 0.0
    entered = np.zeros((n_blocks, n_delays, n_tables), np.int64)
    for block in range(n_blocks):
        candidates = totals[:, :, block] + best
        entered[block] = candidates.argmin(1)
        best = candidates.min(1)
    # From the last block to the first: the delays that the path enters and leaves with.
    tables, j = np.arange(n_tables), np.zeros(n_tables, np.int64)
    first, last = np.zeros((2, n_blocks, n_tables), np.int64)
    for block in range(n_blocks - 1, -1, -1):
        last[block] = j
        first[block] = j = entered[block, j, tables]

    # Back through all blocks at once, each frame from its highest delay to its lowest.
    low, high = np.zeros((2, n_blocks, n_steps, n_tables), np.int64)
    blocks_column, j = np.arange(n_blocks)[:, None], last
    for t in range(n_steps - 1, -1, -1):
        high[:, t] = j
        low[:, t] = entry[t, j, first, blocks_column, tables]
        j = low[:, t] + teacher_moved[t, low[:, t], first, blocks_column, tables]
    return low.reshape(-1, n_tables)[:length], high.reshape(-1, n_tables)[:length]


def _walk(blocks: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Walk through blocks from every delay i of the frame before them.

    Args:
      blocks: (n_steps, D, n_blocks, M), c(t, j).

    Returns:
      The least cost from delay i before the block to delay j at its last frame, (D, D,
      n_blocks, M), indexed [j, i]. And (n_steps, D, D, n_blocks, M) each, indexed
      [t, j, i]: the delay with which the path to (t, j) entered frame t; and 1 where it
      came there from (t - 1, j + 1), the teacher alone having moved on, 0 where from
      (t - 1, j).
    """
    n_steps, n_delays = blocks.shape[:2]
    shape = (n_delays, n_delays, *blocks.shape[2:])
    entry = np.zeros((n_steps, *shape), np.int16)
    entry[:] = np.arange(n_delays)[:, None, None, None]
    teacher_moved = np.zeros((n_steps, *shape), np.int8)
    # The totals of the frame before, [j, i], and those of a delay out of reach.
    before = np.full((n_delays + 1, *shape[1:]), np.inf)
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

"""Monotone alignments of a late student's frames with its teacher's."""

from typing import Optional, Tuple

import numpy as np
import torch

from icefall_kd.losses.kl import FLOOR, chunk_rows, wide
from icefall_kd.types import Distribution, select, sparse


@torch.no_grad()
def align_late_student(
    student: torch.Tensor,
    linear: Optional[torch.nn.Linear],
    teacher: Distribution,
    temperature: float,
    valid: torch.Tensor,
    weights: Optional[torch.Tensor],
    delay: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
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
      student: (N * T, V) logits, or (N * T, C) what ``linear`` takes.
      linear: The layer that makes the logits; None: ``student`` holds them.
      teacher: N * T rows of V logits or log-probabilities, or sparse.
      temperature: Of both; a sparse teacher is at it already.
      valid: (N, T), bool, frames that count on both sides. Others are never read.
      weights: (R,), w of the R valid frames, 0 or more; None: 1.
      delay: In frames, above 0.

    Returns:
      The student's and the teacher's frames of all P pairs, (P,) int64 each, numbered
      from 0 to R - 1 among the valid ones, in the order of the teacher's.
    """
    rows = valid.flatten().nonzero().squeeze(1)
    starts = torch.ones_like(valid)
    starts[:, 1:] = ~valid[:, :-1]
    stretch = starts.flatten()[rows].cumsum(0) - 1  # (R,), which one a row is in
    lengths = stretch.bincount()
    delay = min(delay, int(lengths.max()) - 1)
    costs = _costs(student, linear, teacher, temperature, rows, delay)
    if weights is not None:
        costs[:, 0] *= weights
        for j in range(1, delay + 1):
            costs[:-j, j] *= torch.maximum(weights[:-j], weights[j:])
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
    return teacher_index + low[teacher_index] + number, teacher_index


def _costs(student, linear, teacher, temperature, rows, delay) -> torch.Tensor:
    """KL of the i-th of ``rows`` and the student's (i + j)-th, (R, delay + 1).

    Cells of i + j beyond R - 1 hold anything.
    """
    v = student.size(1) if linear is None else linear.out_features
    dtype = wide(student.dtype)
    costs = torch.zeros(len(rows), delay + 1, dtype=dtype, device=rows.device)
    step = chunk_rows(rows.device, v)
    with torch.autocast(student.device.type, enabled=False):
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            # The student's rows reach as far behind the chunk as the delay does.
            x = student[rows[begin : begin + step + delay]].to(dtype)
            if linear is not None:
                bias = None if linear.bias is None else linear.bias.to(dtype)
                x = torch.nn.functional.linear(x, linear.weight.to(dtype), bias)
            log_q = (x * (1 / temperature)).clamp_(min=FLOOR).log_softmax(-1)
            log_q.clamp_(min=FLOOR)
            p = select(teacher, part)
            cell = _sparse_costs if sparse(p) else _dense_costs
            cell(log_q, p, temperature, costs[begin : begin + step])
    return costs.clamp_(min=0.0)


def _dense_costs(log_q, teacher, temperature: float, costs) -> None:
    log_p = (teacher.to(log_q.dtype) * (1 / temperature)).clamp_(min=FLOOR)
    log_p = log_p.log_softmax(-1).clamp_(min=FLOOR)
    p = log_p.exp()
    # Of equal rows both sums are the same, bit by bit, and the cost is 0.
    negative_entropy = (p * log_p).sum(-1)
    for j in range(costs.size(1)):
        n = max(0, min(len(p), len(log_q) - j))
        costs[:n, j] = negative_entropy[:n] - (p[:n] * log_q[j : j + n]).sum(-1)


def _sparse_costs(log_q, teacher, temperature: float, costs) -> None:
    """What a row does not keep is one class; its mass at the student is 1 - kept."""
    log_p = teacher.log_probs.to(log_q.dtype)
    log_p_tail = teacher.log_tail.to(log_q.dtype)
    kept = log_p > -torch.inf
    p, p_tail = log_p.exp(), log_p_tail.exp()
    negative_entropy = (p * log_p.clamp(min=FLOOR)).sum(-1)
    negative_entropy += p_tail * log_p_tail.clamp(min=FLOOR)
    least = torch.finfo(log_q.dtype).tiny
    for j in range(costs.size(1)):
        n = max(0, min(len(p), len(log_q) - j))
        log_q_kept = log_q[j : j + n].gather(1, teacher.indices[:n])
        q_kept = log_q_kept.exp().masked_fill_(~kept[:n], 0.0).sum(-1)
        log_q_tail = (1 - q_kept).clamp_(min=least).log_()
        cross = (p[:n] * log_q_kept).sum(-1) + p_tail[:n] * log_q_tail
        costs[:n, j] = negative_entropy[:n] - cross


def _best_paths(costs: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The path of least cost through each of M tables.

    Args:
      costs: (L, D, M), c(t, j). A path starts at (0, 0) and ends at (L - 1, 0).

    Returns:
      (L, M) each, int64: the path visits (t, low) to (t, high) and all between.
    """
    length, n_delays, n_tables = costs.shape
    # Where the path that reaches (t, j) entered frame t, and whether it came there
    # from (t - 1, j + 1), the teacher alone having moved on, and not from (t - 1, j).
    entry = np.zeros((length, n_delays, n_tables), np.int64)
    teacher_moved = np.zeros((length, n_delays, n_tables), np.int64)
    entry[:] = np.arange(n_delays)[:, None]
    before = np.full(
        (n_delays + 1, n_tables), np.inf
    )  # D(t - 1, .), and a column of inf
    before[0] = 0.0
    for t in range(length):
        if t:
            np.less(before[1:], before[:-1], out=teacher_moved[t])
            total = np.minimum(before[1:], before[:-1])
        else:
            total = before[:-1].copy()
        total += costs[t]
        for j in range(1, n_delays):  # the student alone moves on
            student_moved = total[j - 1] + costs[t, j]
            better = student_moved < total[j]
            if better.any():
                total[j] = np.where(better, student_moved, total[j])
                entry[t, j] = np.where(better, entry[t, j - 1], j)
        before[:-1] = total
    low, high = np.zeros((2, length, n_tables), np.int64)
    tables, j = np.arange(n_tables), np.zeros(n_tables, np.int64)
    for t in range(length - 1, -1, -1):
        high[t] = j
        low[t] = entry[t, j, tables]
        j = low[t] + teacher_moved[t, low[t], tables]
    return low, high

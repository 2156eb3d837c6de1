"""Distillation of the CTC head, frame by frame."""

from typing import Dict, Optional, Tuple

import torch

from icefall_kd.errors import KDError, NotFiniteError
from icefall_kd.losses.alignment import LateKL
from icefall_kd.losses.kl import (
    FLOOR,
    check_temperature,
    chunk_rows,
    row_kl,
    valid_frames,
    wide,
)
from icefall_kd.types import Distribution, SparseDistribution, index_rows, is_sparse

FRAMES = ("all", "non-blank", "symmetric", "entropy", "confidence")
NEIGHBOURS = 2  # "symmetric": frames that count on either side of a non-blank one
LEAST_ENTROPY = 1e-5  # nats; what rounding leaves of a sure teacher stays below it
PEAKY = 0.99
SAMPLE = 8  # rows that the guards look at


def ctc_kd_loss(
    student: torch.Tensor,
    teacher: Distribution,
    lengths: torch.Tensor,
    *,
    mask: Optional[torch.Tensor] = None,
    temperature: float = 1.0,
    frames: str = "all",
    delay: int = 0,
    blank_id: int = 0,
) -> torch.Tensor:
    """Frame-wise KL divergence between the CTC outputs of teacher and student.

    sum over utterances n and frames t < lengths[n] of
    w_nt T^2 KL(softmax(z~_nt / T) || softmax(z_nt / T)),
    z the student's, z~ the teacher's raw logits (Hinton et al., arXiv:1503.02531;
    T^2 keeps the gradient's size as T grows). Of a sparse teacher the symbols that it
    does not keep are one class, with the teacher's tail as its mass: a lower bound of
    the dense divergence. In nats, summed as icefall sums its losses. Computed in
    float32, in float64 for float64 inputs, also inside autocast.

    A student that streams emits its symbols later than a teacher that hears the whole
    utterance. With a delay d the loss is the least sum of max(w_nt, w_ns) T^2 KL over
    pairs of a teacher's frame t and a student's frame s along a monotone alignment,
    t <= s <= t + d, that leaves out no frame of either side
    (:mod:`icefall_kd.losses.alignment`). A student that is up to d frames late has a
    loss of 0, and a label that it inserts, deletes or substitutes still costs. In
    Delayed-KD (arXiv:2505.22069) each of the teacher's frames chooses alone, and a
    wrong label that no frame chooses is free.

    Args:
      student: (N, T, V), logits before LogSoftmax; log-probabilities have the same
        value and gradient. Gradients flow here only.
      teacher: (N, T, V), before or after LogSoftmax (a constant per frame does not
        matter); or a SparseDistribution over (N, T, K) at this very temperature.
        Frames from ``lengths`` on are never read.
      lengths: (N,), valid frames, 0 to T.
      mask: (N, T), bool: of the valid frames only these count; by default all.
      temperature: T above 0.
      frames: One of FRAMES: the weights w, see :func:`frame_weights`.
      delay: How late the student may be, d, in frames, 0 or more.
      blank_id: The blank symbol.

    Returns:
      A scalar; 0 with a zero gradient if no frame is valid.

    Raises:
      KDError: shapes that differ, lengths beyond T, a bad temperature or option,
        probabilities in place of logits, NaN.
    """
    _check(student, teacher, temperature, frames, delay, blank_id)
    valid = valid_frames(student, lengths, mask, "logits")
    rows = valid.flatten().nonzero().squeeze(1)
    flat = student.flatten(0, 1)
    if is_sparse(teacher):
        teacher = teacher.to(student.device)
        _check_symbols(teacher.indices.flatten(0, 1)[rows], student.size(-1))
    else:
        teacher = teacher.detach().to(student.device)
    flat_teacher = _flat(teacher)
    _check_rows(flat, flat_teacher, rows)
    weights = None
    if frames != "all":
        weights = frame_weights(
            teacher, valid, frames, temperature=temperature, blank_id=blank_id
        )
        weights = weights.flatten()[rows]
    if delay and len(rows):
        value = LateKL.apply(
            flat, flat_teacher, float(temperature), valid, weights, delay
        )
    else:
        if weights is not None:  # rows without weight need no work
            counted = weights != 0
            rows, weights = rows[counted], weights[counted]
        value = row_kl(
            flat,
            flat_teacher,
            temperature=temperature,
            student_rows=rows,
            teacher_rows=rows,
            weights=weights,
        )
    if value.isnan():
        _refuse_nan(student, teacher, valid)
    return value


def _check(
    student: torch.Tensor,
    teacher: Distribution,
    temperature: float,
    frames: str,
    delay: int,
    blank_id: int,
) -> None:
    check_temperature(temperature)
    _check_shapes(tuple(student.shape), teacher)
    _check_options(frames, delay, blank_id, student.size(-1))


def frame_weights(
    teacher: Distribution,
    valid: torch.Tensor,
    frames: str,
    *,
    temperature: float = 1.0,
    blank_id: int = 0,
) -> torch.Tensor:
    """How much each frame of a teacher counts, (N, T), float; 0 outside ``valid``.

    "all": 1.

    "non-blank": 1 where the teacher's best symbol is not blank, else 0. A sparse
    teacher's best symbol is the best of those it keeps; its tail is no symbol.

    "symmetric" (arXiv:2506.01503): 1 where a valid non-blank frame is at most
    NEIGHBOURS frames away, before or behind, else 0: a spike comes with as many blank
    frames on its left as on its right, save at the ends of an utterance and where two
    spikes share them.

    "entropy": w_t = (H_t + e) / (mean of H over the utterance's valid frames + e), H_t
    the entropy of softmax(z~_t / T) in nats (a sparse teacher's tail is one class), e =
    LEAST_ENTROPY: mean 1 over those frames, and 1 for each where none is uncertain. A
    frame may have up to as much weight as the utterance has frames. As uncertain frames
    are those where student and teacher differ, the gradient of the whole is larger than
    that of "all", 3.6 times on a trained digits teacher.

    "confidence": the teacher's largest probability, among the symbols it keeps.

    Args:
      teacher: (N, T, V), logits or log-probabilities; or sparse, (N, T, K).
      valid: (N, T), bool.
      temperature: T, of a dense teacher; a sparse one is at its own.
    """
    _check_frames(frames)
    if frames == "all":
        return valid.to(torch.float32)
    rows = valid.flatten().nonzero().squeeze(1)
    spike, top, entropy = _statistics(_flat(teacher), rows, blank_id, temperature)

    def placed(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(valid.numel()).index_copy_(0, rows, x).view_as(valid)

    if frames == "confidence":
        return placed(top)
    if frames == "entropy":
        h = placed(entropy)
        mean = h.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return (h + LEAST_ENTROPY) / (mean + LEAST_ENTROPY) * valid
    spike = placed(spike)
    near = spike.clone()
    if frames == "symmetric":
        for j in range(1, NEIGHBOURS + 1):
            near[:, j:] |= spike[:, :-j]
            near[:, :-j] |= spike[:, j:]
        near &= valid
    return near.to(top.dtype)


def _statistics(
    said: Distribution, rows: torch.Tensor, blank_id: int, temperature: float
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of rows: not blank, the best symbol's probability, the entropy; (R,) each."""
    parts = []
    k = (said.log_probs if is_sparse(said) else said).size(1)
    for part in rows.split(chunk_rows(rows.device, k)):
        x = index_rows(said, part)
        if is_sparse(x):
            top, at = x.log_probs.max(-1, keepdim=True)
            best, top = x.indices.gather(1, at).squeeze(1), top.squeeze(1)
            log_p = torch.cat((x.log_probs, x.log_tail.unsqueeze(1)), -1)
            log_p = log_p.to(wide(log_p.dtype))
        else:
            log_p = (x.to(wide(x.dtype)) * (1 / temperature)).clamp_(min=FLOOR)
            log_p = log_p.log_softmax(-1)
            top, best = log_p.max(-1)
        h = -(log_p.exp() * log_p.clamp(min=FLOOR)).sum(-1)
        # A row that keeps no symbol has no spike; one of NaN has, so that it is found.
        spike = (best != blank_id) & (top != -torch.inf) | top.isnan()
        parts.append((spike, top.to(h.dtype).exp(), h.clamp_(min=0.0)))
    spike, top, entropy = (torch.cat(x) for x in zip(*parts))
    return spike, top, entropy


def ctc_diagnostics(
    logits: Distribution,
    lengths: torch.Tensor,
    *,
    mask: Optional[torch.Tensor] = None,
    blank_id: int = 0,
) -> Dict[str, float]:
    """What tells a CTC head that collapsed, or is too sure to teach or to learn.

    "all_blank": valid frames of utterances whose every valid frame has blank as its
    best symbol. "peakiness": valid frames whose largest probability is above 0.99.
    Both are sums over the batch, as icefall sums its losses, and shares once they are
    divided by the number of valid frames.

    Args:
      logits: (N, T, V), logits or log-probabilities; or sparse, (N, T, K).
      lengths: (N,), valid frames, 0 to T.
      mask: (N, T), bool: of the valid frames only these; by default all.
    """
    valid = valid_frames(
        logits.indices if is_sparse(logits) else logits, lengths, mask, "logits"
    )
    rows = valid.flatten().nonzero().squeeze(1)
    spike, top, _ = _statistics(_flat(logits), rows, blank_id, 1.0)
    spikes = torch.zeros_like(valid).flatten().index_copy_(0, rows, spike)
    silent = valid.any(1) & ~spikes.view_as(valid).any(1)
    return {
        "all_blank": float((valid & silent[:, None]).sum()),
        "peakiness": float((top > PEAKY).sum()),
    }


def _flat(rows: Distribution) -> Distribution:
    if is_sparse(rows):
        parts = (rows.indices, rows.log_probs, rows.log_tail)
        return SparseDistribution(*(x.detach().flatten(0, 1) for x in parts))
    return rows.detach().flatten(0, 1)


def _check_shapes(ours: Tuple[int, ...], teacher: Distribution) -> None:
    shape = (teacher.indices if is_sparse(teacher) else teacher).shape
    n_equal = 2 if is_sparse(teacher) else 3
    if len(ours) != 3 or len(shape) != 3 or ours[:n_equal] != shape[:n_equal]:
        raise KDError(
            f"student logits have shape {ours} and teacher logits {tuple(shape)}, and "
            f"both must be the same {'(N, T)' if n_equal == 2 else '(N, T, V)'}: check "
            "vocabulary and frame rate of both models"
        )


def _check_frames(frames: str) -> None:
    if frames not in FRAMES:
        raise KDError(f"frames is {frames!r}, and must be one of {', '.join(FRAMES)}")


def _check_options(frames: str, delay: int, blank_id: int, v: int) -> None:
    _check_frames(frames)
    if not isinstance(delay, int) or delay < 0:
        raise KDError(
            f"the delay is {delay!r}, and must be a number of frames from 0 on: 2 "
            "frames are 80 ms"
        )
    if not 0 <= blank_id < max(v, 1):
        raise KDError(
            f"blank_id is {blank_id}, and the student's logits have {v} symbols: give "
            "the recipe's params.blank_id"
        )


def _check_symbols(indices: torch.Tensor, v: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < v:
        raise KDError(
            f"the sparse target has symbols {int(indices.min())} to "
            f"{int(indices.max())}, and the student's logits {v} symbols: both need "
            "the same BPE model"
        )


@torch.no_grad()
def _check_rows(student: torch.Tensor, said: Distribution, rows: torch.Tensor) -> None:
    """Look for probabilities and logits in each other's place, in a few rows."""
    n = min(SAMPLE, len(rows))
    few = rows[torch.linspace(0, max(len(rows) - 1, 0), n, device=rows.device).long()]
    _check_logits("student", student[few])
    said = index_rows(said, few)
    if not is_sparse(said):
        return _check_logits("teacher", said)
    mass = said.log_probs.double().exp().sum(-1) + said.log_tail.double().exp()
    if not ((mass - 1).abs() < 0.01).all():
        raise KDError(
            "the sparse teacher's probabilities, the tail's among them, sum to "
            f"{float(mass.min()):.4g} to {float(mass.max()):.4g} and must sum to 1: "
            "its log_probs and log_tail are to be log-probabilities, not logits"
        )


def _check_logits(whose: str, x: torch.Tensor) -> None:
    if len(x) < 2 or x.size(1) < 2:  # too little to tell
        return
    tolerance = max(1e-3, 4 * torch.finfo(x.dtype).eps)
    mass = x.double().sum(-1)
    if ((x >= 0) & (x <= 1)).all() and ((mass - 1).abs() < tolerance).all():
        raise KDError(
            f"the {whose}'s logits are probabilities, as all of {len(x)} frames lie in "
            f"[{float(x.min()):.3g}, {float(x.max()):.3g}] and sum to "
            f"{float(mass.mean()):.4g}: give them before softmax, or their logarithm"
        )


def _refuse_nan(student, teacher: Distribution, valid: torch.Tensor) -> None:
    said = teacher.log_probs if is_sparse(teacher) else teacher
    for name, x, remedy in (
        ("the student's output", student, "lower --base-lr, or train without fp16"),
        ("the teacher's output", said, "make the targets again"),
    ):
        bad = int((~(x[valid] < torch.inf)).any(-1).sum())
        if bad:
            raise NotFiniteError(
                f"kd_ctc_loss is nan: {name}, of shape {tuple(x.shape)}, is not finite "
                f"in {bad} of {int(valid.sum())} valid frames: {remedy}"
            )
    raise NotFiniteError(
        "kd_ctc_loss is nan, and the student's and the teacher's outputs are finite: "
        "divided by `temperature` they are not, so give a larger one"
    )

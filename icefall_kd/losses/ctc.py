"""Distillation of the CTC head, frame by frame."""

from typing import Dict, NamedTuple, Optional

import torch

from icefall_kd.errors import KDError, NotFiniteError, require
from icefall_kd.losses.checks import check_temperature, valid_frames
from icefall_kd.losses.kl import FLOOR, chunk_rows, compute_dtype, row_kl, scaled_logits
from icefall_kd.losses.late import LateKL
from icefall_kd.types import Distribution, SparseDistribution, index_rows, is_sparse

FRAME_WEIGHTINGS = ("all", "non-blank", "symmetric", "entropy", "confidence")
NEIGHBOURS = 2  # "symmetric": frames that count on either side of a non-blank one
LEAST_ENTROPY = 1e-5  # nats; what rounding leaves of a sure teacher stays below it
PEAKY = 0.99
SAMPLE = 8  # rows that are looked at for probabilities in place of logits


def ctc_kd_loss(
    student: torch.Tensor,
    teacher: Distribution,
    lengths: torch.Tensor,
    *,
    mask: Optional[torch.Tensor] = None,
    temperature: float = 1.0,
    frame_weighting: str = "all",
    delay: int = 0,
    blank_id: int = 0,
) -> torch.Tensor:
    """Return the frame-wise KL divergence between teacher's and student's CTC outputs.

    sum over utterances n and frames t < lengths[n] of
    w_nt T^2 KL(softmax(z~_nt / T) || softmax(z_nt / T)),
    z the student's, z~ the teacher's raw logits (Hinton et al., arXiv:1503.02531;
    T^2 keeps the gradient's size as T grows). Of a sparse teacher the tokens that it
    dropped are one class, with the teacher's tail as its mass: a lower bound of
    the dense divergence. In nats, summed as icefall sums its losses. Computed in
    float32, in float64 for float64 inputs, also inside autocast.

    A student that streams emits its tokens later than a teacher whose context is the
    whole utterance. With a delay d the loss is the least sum of max(w_nt, w_ns) T^2 KL
    over pairs of a teacher's frame t and a student's frame s along a monotone
    alignment, t <= s <= t + d, that leaves out no frame of either side
    (:mod:`icefall_kd.losses.alignment`). A student that is up to d frames late has a
    loss of 0, and a token that it inserts, deletes or substitutes still costs. In
    Delayed-KD (arXiv:2505.22069) each of the teacher's frames chooses alone, and a
    wrong token that no frame chooses is free.

    Args:
      student: (N, T, V), logits before LogSoftmax; log-probabilities have the same
        value and gradient. Gradients flow here only.
      teacher: (N, T, V), before or after LogSoftmax (a constant per frame does not
        matter); or a SparseDistribution over (N, T, K) at this very temperature.
        Frames from ``lengths`` on are never read.
      lengths: (N,), valid frames, 0 to T.
      mask: (N, T), bool: of the valid frames only these count; by default all.
      temperature: T, above 0.
      frame_weighting: One of FRAME_WEIGHTINGS, for w: see :func:`frame_weights`.
      delay: How late the student may be, d, in frames, 0 or more.
      blank_id: The token id of blank.

    Returns:
      A scalar; 0 with a zero gradient if no frame is valid.

    Raises:
      KDError: Shapes that differ, lengths beyond T, a bad temperature or option,
        probabilities in place of logits, NaN.
    """
    check_temperature(temperature)
    _check_shapes(student, teacher)
    _check_options(frame_weighting, delay, blank_id, student.size(-1))
    valid = valid_frames(student, lengths, mask, "logits")
    rows = valid.flatten().nonzero().squeeze(1)  # (R,), of the N * T frames
    student_rows = student.flatten(0, 1)  # (N * T, V)
    teacher_rows = _flatten(teacher, student.device)
    _check_rows(student_rows, teacher_rows, rows)
    weights = None
    if frame_weighting != "all":
        weights = _row_weights(
            teacher_rows, valid, rows, frame_weighting, temperature, blank_id
        ).flatten()[rows]
    if delay and len(rows):
        value = LateKL.apply(
            student_rows, teacher_rows, float(temperature), valid, weights, delay
        )
    else:
        if weights is not None:  # rows without weight need no work
            rows, weights = rows[weights != 0], weights[weights != 0]
        value = row_kl(
            student_rows,
            teacher_rows,
            temperature=temperature,
            student_index=rows,
            teacher_index=rows,
            weights=weights,
        )
    if value.isnan():
        _refuse_nan(student, teacher, valid)
    return value


def frame_weights(
    teacher: Distribution,
    valid: torch.Tensor,
    frame_weighting: str,
    *,
    temperature: float = 1.0,
    blank_id: int = 0,
) -> torch.Tensor:
    """Return how much each frame of a teacher counts.

    "all": 1.

    "non-blank": 1 where the teacher's best token is not blank, else 0. A sparse
    teacher's best token is the best of those it kept; its tail is no token.

    "symmetric" (arXiv:2506.01503): 1 where a valid non-blank frame is at most
    NEIGHBOURS frames away, before or after, else 0: a spike comes with as many blank
    frames on its left as on its right, save at the ends of an utterance and where two
    spikes share them.

    "entropy": w_t = (H_t + e) / (mean of H over the utterance's valid frames + e), H_t
    the entropy of softmax(z~_t / T) in nats (a sparse teacher's tail is one class), e =
    LEAST_ENTROPY: mean 1 over those frames, and 1 for each where none is uncertain. A
    frame may have up to as much weight as the utterance has frames. As uncertain frames
    are those where student and teacher differ, the gradient of the sum is larger than
    that of "all", 3.6 times on a trained digits teacher.

    "confidence": the teacher's largest probability, among the tokens it kept.

    Args:
      teacher: (N, T, V), logits or log-probabilities; or sparse, (N, T, K).
      valid: (N, T), bool, the valid frames; others have a weight of 0.
      frame_weighting: One of FRAME_WEIGHTINGS.
      temperature: T, of a dense teacher; a sparse one is at its own.
      blank_id: The token id of blank.

    Returns:
      (N, T), float.

    Raises:
      KDError: Another value of ``frame_weighting``.
    """
    _check_frame_weighting(frame_weighting)
    rows = valid.flatten().nonzero().squeeze(1)
    teacher_rows = _flatten(teacher, valid.device)
    return _row_weights(
        teacher_rows, valid, rows, frame_weighting, temperature, blank_id
    )


def _row_weights(
    teacher_rows: Distribution,
    valid: torch.Tensor,
    rows: torch.Tensor,
    frame_weighting: str,
    temperature: float,
    blank_id: int,
) -> torch.Tensor:
    """:func:`frame_weights` of N * T rows, of which ``rows`` are valid."""
    if frame_weighting == "all":
        return valid.to(torch.float32)
    statistics = _statistics(teacher_rows, rows, blank_id, temperature)

    def to_frames(x: torch.Tensor) -> torch.Tensor:
        """(N, T), from the valid rows, (R,)."""
        return x.new_zeros(valid.numel()).index_copy_(0, rows, x).view_as(valid)

    if frame_weighting == "confidence":
        return to_frames(statistics.confidence)
    if frame_weighting == "entropy":
        entropy = to_frames(statistics.entropy)
        mean = entropy.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return (entropy + LEAST_ENTROPY) / (mean + LEAST_ENTROPY) * valid
    is_spike = to_frames(statistics.is_spike)
    counts = is_spike.clone()
    if frame_weighting == "symmetric":
        for j in range(1, NEIGHBOURS + 1):
            counts[:, j:] |= is_spike[:, :-j]
            counts[:, :-j] |= is_spike[:, j:]
        counts &= valid
    return counts.to(statistics.confidence.dtype)


class _Statistics(NamedTuple):
    """Of R rows of a CTC head, (R,) each."""

    is_spike: torch.Tensor  # bool: the best token is not blank
    confidence: torch.Tensor  # the best token's probability
    entropy: torch.Tensor  # in nats


def _statistics(
    flat: Distribution, rows: torch.Tensor, blank_id: int, temperature: float
) -> _Statistics:
    """Statistics of some ``rows`` of a distribution of N * T rows."""
    chunks = []
    width = (flat.log_probs if is_sparse(flat) else flat).size(1)
    for part in rows.split(chunk_rows(rows.device, width)):
        chunk = index_rows(flat, part)
        if is_sparse(chunk):
            top, column = chunk.log_probs.max(-1, keepdim=True)
            best, top = chunk.indices.gather(1, column).squeeze(1), top.squeeze(1)
            # The tail is one class of the entropy, (C, K + 1).
            log_p = torch.cat((chunk.log_probs, chunk.log_tail.unsqueeze(1)), -1)
            log_p = log_p.to(compute_dtype(log_p.dtype))
        else:
            log_p = scaled_logits(chunk, temperature, compute_dtype(chunk.dtype))
            log_p = log_p.log_softmax(-1)  # (C, V)
            top, best = log_p.max(-1)
        entropy = -(log_p.exp() * log_p.clamp(min=FLOOR)).sum(-1)
        # A row that kept no token has no spike; one of NaN has, so that it is refused.
        is_spike = (best != blank_id) & (top != -torch.inf) | top.isnan()
        confidence = top.to(entropy.dtype).exp()
        chunks.append((is_spike, confidence, entropy.clamp_(min=0.0)))
    return _Statistics(*(torch.cat(columns) for columns in zip(*chunks)))


def ctc_diagnostics(
    logits: Distribution,
    lengths: torch.Tensor,
    *,
    mask: Optional[torch.Tensor] = None,
    blank_id: int = 0,
) -> Dict[str, float]:
    """Return what shows that a CTC head collapsed, or is too sure to teach or to learn.

    Args:
      logits: (N, T, V), logits or log-probabilities; or sparse, (N, T, K).
      lengths: (N,), valid frames, 0 to T.
      mask: (N, T), bool: of the valid frames only these; by default all.
      blank_id: The token id of blank.

    Returns:
      "all_blank": how many valid frames are in utterances whose every valid frame has
      blank as its best token. "peakiness": how many valid frames have a largest
      probability above 0.99. Both are sums over the batch, as icefall sums its losses,
      and shares once they are divided by the number of valid frames.

    Raises:
      KDError: Lengths or a mask that do not fit.
    """
    first = logits.indices if is_sparse(logits) else logits
    valid = valid_frames(first, lengths, mask, "logits")
    rows = valid.flatten().nonzero().squeeze(1)
    statistics = _statistics(_flatten(logits, first.device), rows, blank_id, 1.0)
    is_spike = torch.zeros_like(valid).flatten()
    is_spike = is_spike.index_copy_(0, rows, statistics.is_spike).view_as(valid)
    is_silent = valid.any(1) & ~is_spike.any(1)  # (N,)
    return {
        "all_blank": float((valid & is_silent[:, None]).sum()),
        "peakiness": float((statistics.confidence > PEAKY).sum()),
    }


def _flatten(frames: Distribution, device: torch.device) -> Distribution:
    """From (N, T, ...) to N * T rows, on another device, without a graph."""
    if is_sparse(frames):
        tensors = (frames.indices, frames.log_probs, frames.log_tail)
        tensors = (x.to(device).detach().flatten(0, 1) for x in tensors)
        return SparseDistribution(*tensors)
    return frames.detach().to(device).flatten(0, 1)


# Refusals


def _check_shapes(student: torch.Tensor, teacher: Distribution) -> None:
    teacher_shape = (teacher.indices if is_sparse(teacher) else teacher).shape
    # A sparse teacher's K may differ from V.
    dims = "(N, T)" if is_sparse(teacher) else "(N, T, V)"
    n_equal = 2 if is_sparse(teacher) else 3
    are_equal = student.shape[:n_equal] == teacher_shape[:n_equal]
    require(
        student.ndim == len(teacher_shape) == 3 and are_equal,
        f"student logits have shape {tuple(student.shape)} and teacher logits "
        f"{tuple(teacher_shape)}, and both must be the same {dims}: check vocabulary "
        "and frame rate of both models",
    )


def _check_frame_weighting(frame_weighting: str) -> None:
    require(
        frame_weighting in FRAME_WEIGHTINGS,
        f"`frame_weighting` is {frame_weighting!r}, and must be one of "
        f"{', '.join(FRAME_WEIGHTINGS)}",
    )


def _check_options(frame_weighting: str, delay: int, blank_id: int, v: int) -> None:
    _check_frame_weighting(frame_weighting)
    require(
        isinstance(delay, int) and delay >= 0,
        f"`delay` is {delay!r}, and must be a number of frames from 0 on: 2 frames are "
        "80 ms",
    )
    require(
        0 <= blank_id < max(v, 1),
        f"`blank_id` is {blank_id}, and the student's logits have {v} tokens: give the "
        "recipe's params.blank_id",
    )


@torch.no_grad()
def _check_rows(
    student_rows: torch.Tensor, teacher_rows: Distribution, rows: torch.Tensor
) -> None:
    """Look for probabilities and logits in each other's place, in a few rows."""
    n = min(SAMPLE, len(rows))
    few = rows[torch.linspace(0, max(len(rows) - 1, 0), n, device=rows.device).long()]
    _check_logits("student", student_rows[few])
    if not is_sparse(teacher_rows):
        _check_logits("teacher", index_rows(teacher_rows, few))
        return
    indices, v = teacher_rows.indices[rows], student_rows.size(1)
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < v:
        raise KDError(
            f"the sparse target has tokens {int(indices.min())} to "
            f"{int(indices.max())}, and the student's logits {v} tokens: both need "
            "the same tokenizer"
        )
    sample = index_rows(teacher_rows, few)
    mass = sample.log_probs.double().exp().sum(-1) + sample.log_tail.double().exp()
    if not ((mass - 1).abs() < 0.01).all():
        raise KDError(
            "the sparse teacher's probabilities, the tail's among them, sum to "
            f"{float(mass.min()):.4g} to {float(mass.max()):.4g} and must sum to 1: "
            "its log_probs and log_tail are to be log-probabilities, not logits"
        )


def _check_logits(owner: str, x: torch.Tensor) -> None:
    if len(x) < 2 or x.size(1) < 2:  # too little to tell
        return
    tolerance = max(1e-3, 4 * torch.finfo(x.dtype).eps)
    mass = x.double().sum(-1)
    if ((x >= 0) & (x <= 1)).all() and ((mass - 1).abs() < tolerance).all():
        raise KDError(
            f"the {owner}'s logits are probabilities, as all of {len(x)} frames lie in "
            f"[{float(x.min()):.3g}, {float(x.max()):.3g}] and sum to "
            f"{float(mass.mean()):.4g}: give them before softmax, or their logarithm"
        )


def _refuse_nan(
    student: torch.Tensor, teacher: Distribution, valid: torch.Tensor
) -> None:
    teacher = teacher.log_probs if is_sparse(teacher) else teacher
    for name, x, remedy in (
        (
            "the student's output",
            student,
            "lower the learning rate, or train in float32",
        ),
        ("the teacher's output", teacher, "make the targets again"),
    ):
        bad = int((~(x[valid.to(x.device)] < torch.inf)).any(-1).sum())
        if bad:
            raise NotFiniteError(
                f"kd_ctc_loss is nan: {name}, of shape {tuple(x.shape)}, is not finite "
                f"in {bad} of {int(valid.sum())} valid frames: {remedy}"
            )
    raise NotFiniteError(
        "kd_ctc_loss is nan, and the student's and the teacher's outputs are finite: "
        "divided by `temperature` they are not, so give a larger one"
    )

"""Distillation of the CTC head, frame by frame."""

import math
from functools import partial
from typing import Optional

import torch

from icefall_kd.errors import KDError, NotFiniteError, require
from icefall_kd.losses.checks import check_temperature, valid_frames
from icefall_kd.losses.factorised import factorised_kl
from icefall_kd.losses.frames import check_frame_weighting, flatten_frames, row_weights
from icefall_kd.losses.kl import plain_kl, row_kl
from icefall_kd.losses.late import LateKL
from icefall_kd.types import Distribution, index_rows, is_sparse

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
    symbol_weight: float = 1.0,
    blank_id: int = 0,
    name: str = "kd_ctc_loss",
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

    The KL of a frame has two parts, KL_blank + (1 - b) KL_symbols: blank or not, on all
    frames, and which symbol (a token other than blank), where b, the teacher's
    probability of blank, is small. A symbol weight W multiplies the second part
    (:func:`icefall_kd.losses.factorised.factorised_kl`). Tian et al. (Speech
    Communication 160, 2024, 103071) treat frames with and without blank apart; these
    parts are those of Zhao et al. (arXiv:2203.08679) with blank as the target class,
    but for (1 - b), which stays here: W = 1 is the plain KL.

    Args:
      student: (N, T, V), logits before LogSoftmax; log-probabilities have the same
        value and gradient. Gradients flow here only.
      teacher: (N, T, V), before or after LogSoftmax (a constant per frame does not
        matter); or a SparseDistribution over (N, T, K) at this very temperature.
        Frames from ``lengths`` on are never read.
      lengths: (N,), valid frames, 0 to T.
      mask: (N, T), bool: of the valid frames only these count; by default all.
      temperature: T, above 0.
      frame_weighting: One of FRAME_WEIGHTINGS, for w: see
        :func:`icefall_kd.losses.frames.frame_weights`.
      delay: How late the student may be, d, in frames, 0 or more.
      symbol_weight: W, 0 or more; with a delay 1.
      blank_id: The token id of blank.
      name: What an error calls the loss.

    Returns:
      A scalar; 0 with a zero gradient if no frame is valid.

    Raises:
      KDError: Shapes that differ, lengths beyond T, a bad temperature or option,
        probabilities in place of logits, NaN.
    """
    check_temperature(temperature)
    _check_shapes(student, teacher)
    _check_options(frame_weighting, delay, blank_id, student.size(-1))
    check_symbol_weight(symbol_weight, delay)
    valid = valid_frames(student, lengths, mask, "logits")
    rows = valid.flatten().nonzero().squeeze(1)  # (R,), of the N * T frames
    student_rows = student.flatten(0, 1)  # (N * T, V)
    teacher_rows = flatten_frames(teacher, student.device)
    _check_rows(student_rows, teacher_rows, rows)
    weights = None
    if frame_weighting != "all":
        weights = row_weights(
            teacher_rows, valid, rows, frame_weighting, temperature, blank_id
        ).flatten()[rows]
    if delay and len(rows):
        value = LateKL.apply(
            student_rows, teacher_rows, float(temperature), valid, weights, delay
        )
    else:
        if weights is not None:  # rows without weight need no work
            rows, weights = rows[weights != 0], weights[weights != 0]
        chunk_kl = plain_kl
        if symbol_weight != 1:
            chunk_kl = partial(
                factorised_kl, symbol_weight=float(symbol_weight), blank_id=blank_id
            )
        value = row_kl(
            student_rows,
            teacher_rows,
            temperature=temperature,
            student_index=rows,
            teacher_index=rows,
            weights=weights,
            chunk_kl=chunk_kl,
        )
    if value.isnan():
        _refuse_nan(student, teacher, valid, name)
    return value


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


def _check_options(frame_weighting: str, delay: int, blank_id: int, v: int) -> None:
    check_frame_weighting(frame_weighting)
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


def check_symbol_weight(symbol_weight: float, delay: int) -> None:
    """Refuse a weight of the symbols that is none, or that is given with a delay.

    Args:
      symbol_weight: W of :func:`ctc_kd_loss`.
      delay: Its delay, in frames.

    Raises:
      KDError: ``symbol_weight`` is no finite number from 0 on, or other than 1 with a
        delay.
    """
    require(
        isinstance(symbol_weight, (int, float)) and 0 <= symbol_weight < math.inf,
        f"`symbol_weight` is {symbol_weight!r}, and must be a finite number from 0 on: "
        "2 doubles what the symbols count",
    )
    require(
        symbol_weight == 1 or not delay,
        f"`symbol_weight` is {symbol_weight:g} and `delay` {delay}, and a late student "
        "is aligned by the plain divergence: leave one of them out",
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
    student: torch.Tensor, teacher: Distribution, valid: torch.Tensor, loss: str
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
                f"{loss} is nan: {name}, of shape {tuple(x.shape)}, is not finite "
                f"in {bad} of {int(valid.sum())} valid frames: {remedy}"
            )
    raise NotFiniteError(
        f"{loss} is nan, and the student's and the teacher's outputs are finite: "
        "divided by `temperature` they are not, so give a larger one"
    )

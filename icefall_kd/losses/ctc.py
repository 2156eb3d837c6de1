"""Distillation of the CTC head, frame by frame."""

from typing import Optional

import torch

from icefall_kd.errors import KDError
from icefall_kd.losses.kl import check_temperature, row_kl, valid_frames
from icefall_kd.types import Distribution, SparseDistribution, sparse


def ctc_kd_loss(
    student_logits: torch.Tensor,
    teacher: Distribution,
    lengths: torch.Tensor,
    temperature: float = 1.0,
    mask: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Frame-wise KL divergence between the CTC outputs of teacher and student.

    sum over utterances n and frames t < lengths[n] of
    T^2 KL(softmax(z~_nt / T) || softmax(z_nt / T)),
    z the student's, z~ the teacher's raw logits (Hinton et al., arXiv:1503.02531;
    T^2 keeps the gradient's size as T grows). Of a sparse teacher the symbols that it
    does not keep are one class, with the teacher's tail as its mass: a lower bound of
    the dense divergence. In nats, summed as icefall sums its losses. Computed in
    float32, in float64 for float64 inputs, also inside autocast.

    Args:
      student_logits: (N, T, V), before LogSoftmax. Gradients flow here only.
      teacher: (N, T, V), before or after LogSoftmax (a constant per frame does not
        matter); or a SparseDistribution over (N, T, K) at this very temperature.
        Frames from ``lengths`` on are never read.
      lengths: (N,), valid frames, 0 to T.
      temperature: T above 0.
      mask: (N, T), bool: of the valid frames only these count; by default all.

    Returns:
      A scalar; 0 with a zero gradient if no frame is valid.

    Raises:
      KDError: shapes that differ, lengths beyond T, or a bad temperature.
    """
    check_temperature(temperature)
    shape = (teacher.indices if sparse(teacher) else teacher).shape
    n_equal = 2 if sparse(teacher) else 3
    if (
        student_logits.ndim != 3
        or len(shape) != 3
        or student_logits.shape[:n_equal] != shape[:n_equal]
    ):
        raise KDError(
            f"student logits have shape {tuple(student_logits.shape)} and teacher "
            f"logits {tuple(shape)}, and both must be the same "
            f"{'(N, T)' if sparse(teacher) else '(N, T, V)'}: check vocabulary and "
            "frame rate of both models"
        )
    device, v = student_logits.device, student_logits.size(2)
    valid = valid_frames(student_logits, lengths, mask, "logits")
    rows = valid.flatten().nonzero().squeeze(1)
    if sparse(teacher):
        teacher = teacher.to(device)
        _check_symbols(teacher.indices.flatten(0, 1)[rows], v)
    else:
        teacher = teacher.detach().to(device)
    return row_kl(
        student_logits.flatten(0, 1),
        _flat(teacher),
        temperature,
        student_rows=rows,
        teacher_rows=rows,
    )


def _flat(rows: Distribution) -> Distribution:
    if sparse(rows):
        parts = (rows.indices, rows.log_probs, rows.log_tail)
        return SparseDistribution(*(x.detach().flatten(0, 1) for x in parts))
    return rows.flatten(0, 1)


def _check_symbols(indices: torch.Tensor, v: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < v:
        raise KDError(
            f"the sparse target has symbols {int(indices.min())} to "
            f"{int(indices.max())}, and the student's logits {v} symbols: both need "
            "the same BPE model"
        )

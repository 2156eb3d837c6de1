"""Distillation of the CTC head, frame by frame."""

import math
from typing import Tuple

import torch

from icefall_kd.errors import KDError


def check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise KDError(
            f"the temperature is {temperature!r}, and must be a finite number above 0: "
            "2.0 is a good start"
        )


class _FrameKL(torch.autograd.Function):
    """T^2 KL(p || q) summed over rows, its gradient formed in the forward pass.

    With q = softmax(z / T) the gradient towards z is T (q - p): exactly 0 where
    student and teacher are equal.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature):
        tiny = torch.finfo(student.dtype).min
        log_q = torch.log_softmax(student / temperature, dim=-1)
        log_p = torch.log_softmax(teacher / temperature, dim=-1)
        p = log_p.exp()
        # A symbol of probability 0 adds 0, not 0 * inf.
        kl = p * (log_p.clamp(min=tiny / 4) - log_q.clamp(min=tiny / 4))
        ctx.save_for_backward((log_q.exp() - p).mul_(temperature))
        return kl.sum() * temperature**2

    @staticmethod
    def backward(ctx, grad_output) -> Tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None


def ctc_kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    lengths: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Frame-wise KL divergence between the CTC outputs of teacher and student.

    sum over utterances n and frames t < lengths[n] of
    T^2 KL(softmax(z~_nt / T) || softmax(z_nt / T)),
    z the student's, z~ the teacher's raw logits (Hinton et al., arXiv:1503.02531;
    T^2 keeps the gradient's size as T grows). In nats, summed as icefall sums its
    losses. Computed in float32, in float64 for float64 inputs, also inside autocast.

    Args:
      student_logits: (N, T, V), before LogSoftmax. Gradients flow here only.
      teacher_logits: (N, T, V), before or after LogSoftmax (a constant per frame
        does not matter). Frames from ``lengths`` on are never read.
      lengths: (N,), valid frames, 0 to T.
      temperature: T above 0.

    Returns:
      A scalar; 0 with a zero gradient if no frame is valid.

    Raises:
      KDError: shapes that differ, lengths beyond T, or a bad temperature.
    """
    check_temperature(temperature)
    if student_logits.ndim != 3 or student_logits.shape != teacher_logits.shape:
        raise KDError(
            f"student logits have shape {tuple(student_logits.shape)} and teacher "
            f"logits {tuple(teacher_logits.shape)}, and both must be the same "
            "(N, T, V): check vocabulary and frame rate of both models"
        )
    n, t, v = student_logits.shape
    if lengths.shape != (n,) or (n and not 0 <= int(lengths.min())):
        raise KDError(
            f"lengths are {lengths.tolist()} and must be {n} numbers from 0 to {t}"
        )
    if n and int(lengths.max()) > t:
        raise KDError(
            f"lengths go up to {int(lengths.max())}, and the logits have {t} frames"
        )
    device = student_logits.device
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    mask = torch.arange(t, device=device) < lengths.to(device).unsqueeze(1)
    with torch.autocast(device.type, enabled=False):
        return _FrameKL.apply(
            student_logits[mask].to(dtype),
            teacher_logits.detach()[mask].to(device=device, dtype=dtype),
            float(temperature),
        )

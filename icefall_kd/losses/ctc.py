"""Distillation of the CTC head, frame by frame."""

import math
from typing import Optional, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.types import Distribution, SparseDistribution


def check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise KDError(
            f"the temperature is {temperature!r}, and must be a finite number above 0: "
            "2.0 is a good start"
        )


def _floor(log_probs: torch.Tensor) -> torch.Tensor:
    """A symbol of probability 0 adds 0, not 0 * inf."""
    return log_probs.clamp(min=torch.finfo(log_probs.dtype).min / 4)


class _FrameKL(torch.autograd.Function):
    """T^2 KL(p || q) summed over rows, its gradient formed in the forward pass.

    With q = softmax(z / T) the gradient towards z is T (q - p): exactly 0 where
    student and teacher are equal.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature):
        log_q = torch.log_softmax(student / temperature, dim=-1)
        log_p = torch.log_softmax(teacher / temperature, dim=-1)
        p = log_p.exp()
        kl = p * (_floor(log_p) - _floor(log_q))
        ctx.save_for_backward((log_q.exp() - p).mul_(temperature))
        return kl.sum() * temperature**2

    @staticmethod
    def backward(ctx, grad_output) -> Tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None


class _SparseKL(torch.autograd.Function):
    """T^2 KL(p || q) of the K kept symbols and, as one more class, all others.

    With q = softmax(z / T) and q_tail the mass outside the kept symbols, the gradient
    towards z is T (q_i - p_i) at a kept symbol and T (q_i - p_tail q_i / q_tail) at any
    other.
    """

    @staticmethod
    def forward(ctx, student, indices, log_p, log_p_tail, temperature):
        log_q = torch.log_softmax(student / temperature, dim=-1)
        kept = log_p > -torch.inf
        # Padding entries share index 0 with a symbol that may be kept: only kept
        # entries may write.
        inside = torch.zeros_like(log_q, dtype=torch.int8)
        inside.scatter_add_(1, indices, kept.to(torch.int8))
        log_q_tail = log_q.masked_fill(inside > 0, -torch.inf).logsumexp(-1)
        log_q_top = log_q.gather(1, indices)
        p, p_tail = log_p.exp(), log_p_tail.exp()
        kl = p * (_floor(log_p) - _floor(log_q_top))
        kl_tail = p_tail * (_floor(log_p_tail) - _floor(log_q_tail))
        # q_i / q_tail as one exponential: q_tail alone may be too small to divide by.
        share = (log_q - _floor(log_q_tail)[:, None]).exp_()
        share.masked_fill_(inside > 0, 0.0).mul_(p_tail[:, None])
        grad = log_q.exp().sub_(share)
        grad.scatter_add_(1, indices, -p)
        ctx.save_for_backward(grad.mul_(temperature))
        return (kl.sum() + kl_tail.sum()) * temperature**2

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None, None, None


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
    sparse = isinstance(teacher, SparseDistribution)
    shape = (teacher.indices if sparse else teacher).shape
    n_equal = 2 if sparse else 3
    if (
        student_logits.ndim != 3
        or len(shape) != 3
        or student_logits.shape[:n_equal] != shape[:n_equal]
    ):
        raise KDError(
            f"student logits have shape {tuple(student_logits.shape)} and teacher "
            f"logits {tuple(shape)}, and both must be the same "
            f"{'(N, T)' if sparse else '(N, T, V)'}: check vocabulary and frame rate "
            "of both models"
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
    valid = torch.arange(t, device=device) < lengths.to(device).unsqueeze(1)
    if mask is not None:
        if mask.shape != valid.shape:
            raise KDError(
                f"the mask has shape {tuple(mask.shape)} and must be {(n, t)}"
            )
        valid &= mask.to(device)

    def rows(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().to(device)[valid]
        return x.to(dtype) if x.is_floating_point() else x

    with torch.autocast(device.type, enabled=False):
        student = student_logits[valid].to(dtype)
        if not sparse:
            return _FrameKL.apply(student, rows(teacher), float(temperature))
        indices = rows(teacher.indices)
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < v:
            raise KDError(
                f"the sparse target has symbols {int(indices.min())} to "
                f"{int(indices.max())}, and the student's logits {v} symbols: both "
                "need the same BPE model"
            )
        return _SparseKL.apply(
            student,
            indices,
            rows(teacher.log_probs),
            rows(teacher.log_tail),
            float(temperature),
        )

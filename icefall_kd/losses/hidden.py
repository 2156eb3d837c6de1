"""Distillation of hidden layers of the encoder."""

from typing import Optional

import torch
import torch.nn.functional as F

from icefall_kd.errors import KDError, NotFiniteError, require
from icefall_kd.losses.checks import valid_frames
from icefall_kd.losses.kl import compute_dtype

DISTANCES = ("mse", "cosine")
EPSILON = 1e-6  # of a norm


def hidden_kd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    lengths: torch.Tensor,
    *,
    mask: Optional[torch.Tensor] = None,
    distance: str = "mse",
) -> torch.Tensor:
    """Return the distance of a hidden layer of the student from one of the teacher.

    sum over utterances n and frames t < lengths[n], mean over the R vectors of a frame,
    of

    - ``mse``: mean over channels of (x - y)^2 (FitNets, arXiv:1412.6550);
    - ``cosine``: 1 - cos(x, y), computed as ``|x/|x| - y/|y||^2 / 2``, so that equal
      vectors have the loss and the gradient 0 to the last bit,

    x the student's, y the teacher's vector. Summed over frames as icefall sums its
    losses. Computed in float32, in float64 for float64 inputs, also inside autocast.

    Args:
      student: (N, T, R, C), rows of :func:`icefall_kd.kinds.hidden.hidden_rows`, after
        a projector where the widths differ. Gradients flow here only.
      teacher: (N, T, R, C). Frames from ``lengths`` on are never read.
      lengths: (N,), valid frames, 0 to T.
      mask: (N, T), bool: of the valid frames only these count; by default all.
      distance: ``mse`` or ``cosine``.

    Returns:
      A scalar; 0 with a zero gradient if no frame is valid.

    Raises:
      KDError: Shapes that differ, lengths beyond T, an unknown ``distance``, or numbers
        that are not finite.
    """
    require(
        distance in DISTANCES,
        f"`distance` is {distance!r}, and must be one of {', '.join(DISTANCES)}",
    )
    if student.ndim != 4 or student.shape != teacher.shape:
        raise KDError(
            f"the student's layer has shape {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}, and both must be the same (N, T, R, C): give the "
            "student's a projector to the teacher's width, and check the frame rates"
        )
    valid = valid_frames(student, lengths, mask, "layers")
    dtype = compute_dtype(student.dtype)
    with torch.autocast(student.device.type, enabled=False):
        x = student[valid].to(dtype)  # (F, R, C), of F valid frames
        y = teacher.detach().to(student.device)[valid].to(dtype)
        for name, values in (("student", x), ("teacher", y)):
            if not torch.isfinite(values).all():
                raise NotFiniteError(
                    f"the {name}'s layer, of shape {tuple(student.shape)}, has numbers "
                    "that are not finite in its valid frames: check its checkpoint and "
                    "the features"
                )
        if not len(x):
            return x.sum()
        if distance == "mse":
            return (x - y).square().mean((1, 2)).sum()
        x, y = (F.normalize(v, dim=-1, eps=EPSILON) for v in (x, y))
        return 0.5 * (x - y).square().sum(-1).mean(1).sum()

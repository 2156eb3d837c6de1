"""How much each frame of a CTC teacher counts, and what frames tell of a CTC head."""

from typing import Dict, NamedTuple, Optional

import torch

from icefall_kd.errors import require
from icefall_kd.losses.checks import valid_frames
from icefall_kd.losses.kl import FLOOR, chunk_rows, compute_dtype, scaled_logits
from icefall_kd.types import Distribution, SparseDistribution, index_rows, is_sparse

FRAME_WEIGHTINGS = ("all", "non-blank", "symmetric", "entropy", "confidence")
NEIGHBOURS = 2  # "symmetric": frames that count on either side of a non-blank one
LEAST_ENTROPY = 1e-5  # nats; what rounding leaves of a sure teacher stays below it
PEAKY = 0.99


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
    check_frame_weighting(frame_weighting)
    rows = valid.flatten().nonzero().squeeze(1)
    teacher_rows = flatten_frames(teacher, valid.device)
    return row_weights(
        teacher_rows, valid, rows, frame_weighting, temperature, blank_id
    )


def row_weights(
    teacher_rows: Distribution,
    valid: torch.Tensor,
    rows: torch.Tensor,
    frame_weighting: str,
    temperature: float,
    blank_id: int,
) -> torch.Tensor:
    """Return :func:`frame_weights` of a teacher whose frames are one after another.

    Args:
      teacher_rows: N * T rows, of :func:`flatten_frames`.
      valid: (N, T), bool.
      rows: (R,), int64, the valid rows.
      frame_weighting: One of FRAME_WEIGHTINGS.
      temperature: T, of a dense teacher.
      blank_id: The token id of blank.

    Returns:
      (N, T), float.
    """
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
    statistics = _statistics(flatten_frames(logits, first.device), rows, blank_id, 1.0)
    is_spike = torch.zeros_like(valid).flatten()
    is_spike = is_spike.index_copy_(0, rows, statistics.is_spike).view_as(valid)
    is_silent = valid.any(1) & ~is_spike.any(1)  # (N,)
    return {
        "all_blank": float((valid & is_silent[:, None]).sum()),
        "peakiness": float((statistics.confidence > PEAKY).sum()),
    }


def flatten_frames(frames: Distribution, device: torch.device) -> Distribution:
    """Return N * T rows, on another device, without a graph.

    Args:
      frames: (N, T, ...).
      device: Where the rows are to be.
    """
    if is_sparse(frames):
        tensors = (frames.indices, frames.log_probs, frames.log_tail)
        tensors = (x.to(device).detach().flatten(0, 1) for x in tensors)
        return SparseDistribution(*tensors)
    return frames.detach().to(device).flatten(0, 1)


def check_frame_weighting(frame_weighting: str) -> None:
    """Refuse a ``frame_weighting`` that is none of FRAME_WEIGHTINGS.

    Raises:
      KDError: It is none.
    """
    require(
        frame_weighting in FRAME_WEIGHTINGS,
        f"`frame_weighting` is {frame_weighting!r}, and must be one of "
        f"{', '.join(FRAME_WEIGHTINGS)}",
    )

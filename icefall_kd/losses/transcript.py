"""What CTC outputs say of an utterance's transcript: their best labels, its score."""

import math
from typing import List

import torch
import torch.nn.functional as F

from icefall_kd.losses.kl import compute_dtype
from icefall_kd.types import Distribution, SparseDistribution, is_sparse

# A byte of a stored tail holds the root of its mass in steps of 1/255: what is read as
# 0 was up to this.
LEAST_TAIL = 2 * math.log(1 / 510)


def best_labels(
    rows: Distribution, mask: torch.Tensor, blank_id: int = 0
) -> List[List[int]]:
    """Return the labels of the best path: equal neighbours merged, blanks left out.

    A frame without an output counts as blank, so labels before and after a gap stay
    two.

    Args:
      rows: (N, T, V), logits or log-probabilities, or a sparse distribution, which has
        the best token too.
      mask: (N, T), bool, the frames that have an output.
      blank_id: The blank.

    Returns:
      The labels of each of the N rows.
    """
    if is_sparse(rows):
        entry = rows.log_probs.argmax(-1, keepdim=True)
        best = rows.indices.gather(-1, entry).squeeze(-1)
    else:
        best = rows.argmax(-1)
    best = best.masked_fill(~mask, blank_id)
    before = F.pad(best[:, :-1], (1, 0), value=blank_id)
    begins = (best != blank_id) & (best != before)
    labels = iter(best[begins].tolist())
    return [[next(labels) for _ in range(n)] for n in begins.sum(1).tolist()]


@torch.no_grad()
def transcript_scores(
    rows: Distribution,
    mask: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    blank_id: int = 0,
) -> torch.Tensor:
    """Return -log P(y | x) of each row's transcript y, by CTC, without gradient.

    P is the sum over the alignments of y with the frames of ``mask`` (Graves et al.,
    2006). The frames outside it don't exist for the score, so that the scores of
    teacher and student are of the same frames.

    A sparse distribution knows the probability of a token that it does not keep only by
    the sum of all such tokens, the tail: each gets an equal share of it, tail / (V -
    K). A tail of 0 is taken for the largest mass that is stored as 0. Tokens just below
    the kept ones are likelier than the rest, so the share is rather too small than too
    large, and the score too high: where targets are sparse, a teacher is rather thought
    worse than it is.

    Args:
      rows: (N, T, V), logits or log-probabilities, or a sparse distribution.
      mask: (N, T), bool, the frames that count.
      labels: (N, U + 1), integers: a blank, then the labels of each row, then blanks.
      vocab_size: V.
      blank_id: The blank.

    Returns:
      (N,), in nats; inf for a row without an alignment, which has too few frames.
    """
    labels = labels.to(mask.device, torch.int64)  # k2's are int32
    if is_sparse(rows):
        log_probs = _of_sparse(rows, labels, vocab_size)
    else:
        log_probs = _of_dense(rows, labels)
    frames = mask.sum(1)
    # The frames of the mask first, in their order.
    order = torch.sort((~mask).long(), dim=1, stable=True).indices
    log_probs = log_probs.gather(1, order.unsqueeze(-1).expand_as(log_probs))
    # In place of the V tokens these are the classes, the blank being class 0. A label
    # that occurs twice is the class of its first place, as CTC must know it again.
    places = torch.arange(labels.size(1), device=labels.device)
    same = labels.unsqueeze(2) == labels.unsqueeze(1)  # (N, U + 1, U + 1)
    classes = places.masked_fill(~same, len(places)).amin(-1)
    scores = F.ctc_loss(
        log_probs.transpose(0, 1),
        classes[:, 1:],
        frames.clamp(min=1),
        (labels[:, 1:] != blank_id).sum(1),
        reduction="none",
    )
    return scores.masked_fill(frames == 0, math.inf)


def _of_dense(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(N, T, U + 1), the log-probability of each label at each frame."""
    rows = rows.detach().to(compute_dtype(rows.dtype))
    index = labels.unsqueeze(1).expand(-1, rows.size(1), -1)
    return rows.gather(2, index) - rows.logsumexp(2, keepdim=True)


def _of_sparse(
    rows: SparseDistribution, labels: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """As :func:`_of_dense`; what is not kept has its share of the tail."""
    is_token = rows.log_probs > -math.inf
    others = (vocab_size - is_token.sum(-1)).clamp(min=1)
    share = rows.log_tail.clamp(min=LEAST_TAIL) - others.log()
    log_probs = share.unsqueeze(-1).expand(-1, -1, labels.size(1))
    labels = labels.unsqueeze(1)
    for k in range(rows.indices.size(-1)):
        entry = slice(k, k + 1)
        is_label = (rows.indices[..., entry] == labels) & is_token[..., entry]
        log_probs = torch.where(is_label, rows.log_probs[..., entry], log_probs)
    return log_probs

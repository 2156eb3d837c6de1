"""What the CTC head is good for: greedy search, and frames that can be left out."""

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Iterator, List, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.decode.types import Hypothesis, SearchReport, SearchResult
from icefall_kd.errors import require
from icefall_kd.zipformer import ctc_linear


def ctc_greedy(
    ctc_logits: torch.Tensor, lengths: torch.Tensor, blank_id: int = 0
) -> List[List[int]]:
    """The best token of each frame, without repetitions and blanks.

    Args:
      ctc_logits: (N, T, V), logits or log-probabilities.
      lengths: (N,), valid frames.
      blank_id: The token id of blank, in 0 to V - 1.

    Returns:
      The token ids of each utterance.
    """
    rows = zip(ctc_logits.argmax(-1).tolist(), lengths.tolist())
    return [[token for token, _, _ in _runs(best[:n], blank_id)] for best, n in rows]


class CtcSearch:
    """icefall's ``ctc_greedy_search``, with frames and log-probabilities of tokens.

    Args:
      model: A recipe's model with a CTC head, in eval mode.
      blank_id: The token id of blank.
    """

    def __init__(self, model: nn.Module, blank_id: int = 0) -> None:
        self.linear, self.blank_id = ctc_linear(model), blank_id

    @torch.no_grad()
    def __call__(
        self, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor
    ) -> SearchResult:
        """Search whole utterances.

        Args:
          encoder_out: (N, T, C).
          encoder_out_lens: (N,), valid frames.

        Returns:
          A hypothesis of each utterance. A token's frame is the first of its run, and
          its log-probability the highest in the run. ``score`` is that of all frames'
          best tokens.
        """
        log_probs = self.linear(encoder_out).float().log_softmax(-1)
        best_log_probs, best = log_probs.max(-1)
        lens = encoder_out_lens.tolist()
        rows = zip(best.tolist(), best_log_probs.tolist(), lens)
        hypotheses = [self._hypothesis(ids[:n], values[:n]) for ids, values, n in rows]
        report = SearchReport("best token of each frame", frames=sum(lens))
        return SearchResult(hypotheses, [None] * len(hypotheses), report)

    def _hypothesis(self, best: List[int], log_probs: List[float]) -> Hypothesis:
        hypothesis = Hypothesis(score=sum(log_probs))
        for token, begin, end in _runs(best, self.blank_id):
            hypothesis.tokens.append(token)
            hypothesis.frames.append(begin)
            hypothesis.log_probs.append(max(log_probs[begin:end]))
        return hypothesis


def _runs(best: Sequence[int], blank_id: int) -> Iterator[Tuple[int, int, int]]:
    """Each run of a token but blank: the token, its first frame, the first behind."""
    begin = 0
    for token, frames in groupby(best):
        end = begin + len(list(frames))
        if token != blank_id:
            yield token, begin, end
        begin = end


@dataclass
class KeptFrames:
    """Encoder output without the frames that the CTC head calls blank."""

    encoder_out: torch.Tensor  # (N, T', C)
    encoder_out_lens: torch.Tensor  # (N,)
    frames: List[List[int]]  # of each utterance: which ones were kept
    share: float  # of the valid frames

    def restore(self, hypotheses: Sequence[Hypothesis]) -> List[Hypothesis]:
        """Return hypotheses whose frames are counted among all frames.

        Args:
          hypotheses: What a search found in the kept frames, one for each utterance.
        """
        return [
            replace(hypothesis, frames=[frames[t] for t in hypothesis.frames])
            for hypothesis, frames in zip(hypotheses, self.frames)
        ]


def skip_blanks(
    encoder_out: torch.Tensor,
    encoder_out_lens: torch.Tensor,
    ctc_logits: torch.Tensor,
    threshold: float = 0.99,
    blank_id: int = 0,
) -> KeptFrames:
    """Take out the frames at which the CTC head is sure of blank.

    This is not exact: the transducer might have had a token there, or another
    probability. It is for whole utterances, before a search or for labelling::

        kept = skip_blanks(encoder_out, lens, model.ctc_output(encoder_out))
        result = search(kept.encoder_out, kept.encoder_out_lens)
        hypotheses = kept.restore(result.hypotheses)

    Source: Tian et al., FSR: accelerating the inference process of transducer-based
    models by applying fast-skip regularization, 2021.

    Args:
      encoder_out: (N, T, C).
      encoder_out_lens: (N,), valid frames.
      ctc_logits: (N, T, V), logits or log-probabilities.
      threshold: A frame stays if blank's probability is this or less; 0 to 1.
      blank_id: The token id of blank.

    Returns:
      The frames that stay, possibly none.

    Raises:
      KDError: A threshold that is no probability, or logits of other frames.
    """
    require(
        0 <= threshold <= 1,
        f"`threshold` is {threshold}: give a probability, from 0 to 1",
    )
    require(
        ctc_logits.shape[:2] == encoder_out.shape[:2],
        f"`ctc_logits` is of {tuple(ctc_logits.shape[:2])} utterances and frames, and "
        f"`encoder_out` of {tuple(encoder_out.shape[:2])}: give those of the same "
        "batch",
    )
    steps = torch.arange(encoder_out.size(1), device=encoder_out.device)
    valid = steps < encoder_out_lens.to(encoder_out.device).unsqueeze(1)
    blank = ctc_logits.log_softmax(-1)[..., blank_id].exp()
    keep = valid & ~(blank > threshold)  # NaN stays
    lens = keep.sum(1)
    longest = int(lens.max()) if len(lens) else 0
    # The kept frames first, in their order.
    order = (~keep).long().sort(stable=True, dim=1)[1][:, :longest]
    index = order.unsqueeze(2).expand(-1, -1, encoder_out.size(2))
    rows = [row[:n] for row, n in zip(order.tolist(), lens.tolist())]
    share = float(keep.sum()) / max(float(valid.sum()), 1.0)
    kept_lens = lens.to(encoder_out_lens)
    return KeptFrames(encoder_out.gather(1, index), kept_lens, rows, share)

"""icefall's ``ctc_greedy_search``, with frames and log-probabilities of the tokens."""

from typing import Any, Optional, Sequence

import torch
from torch import nn

from icefall_kd.decode.types import Hypothesis, SearchReport, SearchResult
from icefall_kd.zipformer import ctc_linear


class CtcSearch:
    """The best token of each frame, without repetitions and blanks.

    Args:
      model: A recipe's model with a CTC head, in eval mode.
      blank_id: The token id of blank.
    """

    def __init__(self, model: nn.Module, blank_id: int = 0) -> None:
        self.linear, self.blank_id = ctc_linear(model), blank_id

    @torch.no_grad()
    def __call__(
        self,
        encoder_out: torch.Tensor,
        encoder_out_lens: torch.Tensor,
        states: Optional[Sequence[Any]] = None,
    ) -> SearchResult:
        """Search whole utterances.

        Args:
          encoder_out: (N, T, C).
          encoder_out_lens: (N,), valid frames.
          states: None, as there are no chunks.

        Returns:
          A hypothesis of each utterance. A token's frame is the first of its run, and
          its log-probability the highest in the run. ``score`` is that of all frames'
          best tokens.
        """
        log_probs = self.linear(encoder_out).float().log_softmax(-1)
        best_log_probs, best = log_probs.max(-1)
        lens = encoder_out_lens.tolist()
        rows = zip(best.tolist(), best_log_probs.tolist(), lens)
        found = [self._collapse(ids[:n], values[:n]) for ids, values, n in rows]
        frames = sum(lens)
        report = SearchReport("best token of each frame", frames=frames)
        return SearchResult(found, [None] * len(found), report)

    def _collapse(self, ids: Sequence[int], log_probs: Sequence[float]) -> Hypothesis:
        found = Hypothesis(score=sum(log_probs))
        before = self.blank_id
        for frame, (token, value) in enumerate(zip(ids, log_probs)):
            if token != self.blank_id and token != before:
                found.tokens.append(token)
                found.frames.append(frame)
                found.log_probs.append(value)
            elif token != self.blank_id:
                found.log_probs[-1] = max(found.log_probs[-1], value)
            before = token
        return found

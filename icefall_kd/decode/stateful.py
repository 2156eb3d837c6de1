"""Greedy search where the decoder is an LSTM: by label looping, without tables.

Such a decoder, of icefall's older recipes, has seen all tokens so far. So no two
contexts are alike, no table has them, and nothing is known of a segment before its
utterance has come there. Windows of frames are asked at once all the same.
"""

from dataclasses import dataclass
from typing import Any, List, Optional

import torch
from torch import nn

from icefall_kd.decode.types import MAX_SYMBOLS, Hypothesis, SearchReport

WINDOW = 8  # frames


@dataclass
class StatefulState:
    """Where the search of an utterance stands between two chunks."""

    decoder_out: Any = None  # (1, 1, C), None before the first chunk
    decoder_state: Any = None  # (h, c)
    frame: int = 0  # frames of the chunks so far
    emitted: int = 0  # tokens so far


class StatefulLooping:
    """Greedy search of one utterance after another.

    Args:
      model: A recipe's model in eval mode, whose decoder returns its output and state.
      max_sym_per_frame: Tokens at a frame at most; icefall's own is 4.
      blank_penalty: It is subtracted from blank's logit.
    """

    def __init__(
        self, model: nn.Module, max_sym_per_frame: Optional[int], blank_penalty: float
    ) -> None:
        self.model, self.blank_penalty = model, blank_penalty
        self.limited = max_sym_per_frame is not None
        self.max_sym = 1 if max_sym_per_frame is None else max_sym_per_frame
        self.blank_id = int(model.decoder.blank_id)
        self.silent = {self.blank_id, int(getattr(model, "unk_id", self.blank_id))}

    def search(
        self, encoder_out: torch.Tensor, state: StatefulState, report: SearchReport
    ) -> Hypothesis:
        """Return the new tokens of one utterance, and move its state on.

        Args:
          encoder_out: (1, T, C), valid frames.
          state: It is moved on.
          report: Where the cost is counted.
        """
        hypothesis, t, at_frame = Hypothesis(), 0, 0
        num_frames = encoder_out.size(1)
        if state.decoder_out is None:
            self._feed(self.blank_id, state, report)
        while t < num_frames and self.max_sym > 0:
            if self.limited and state.emitted >= MAX_SYMBOLS:
                break
            logits = self._logits(encoder_out[:, t : t + WINDOW], state, report)
            values, tokens = (x.tolist() for x in logits.log_softmax(-1).max(-1))
            for offset, token in enumerate(tokens):
                if token in self.silent:
                    t, at_frame = t + 1, 0
                    continue
                hypothesis.tokens.append(token)
                hypothesis.frames.append(state.frame + t)
                hypothesis.log_probs.append(values[offset])
                self._feed(token, state, report)
                state.emitted += 1
                at_frame += 1
                if at_frame >= self.max_sym:
                    t, at_frame = t + 1, 0
                break
        state.frame += num_frames
        return hypothesis

    def _feed(self, token: int, state: StatefulState, report: SearchReport) -> None:
        """Let the decoder see a token."""
        device = next(self.model.parameters()).device
        y = torch.tensor([[token]], dtype=torch.int64, device=device)
        state.decoder_out, state.decoder_state = self.model.decoder(
            y, state.decoder_state
        )
        report.decoder_rows += 1

    def _logits(
        self, frames: torch.Tensor, state: StatefulState, report: SearchReport
    ) -> torch.Tensor:
        """Return the logits (W, V) of some frames (1, W, C)."""
        report.rounds += 1
        report.joiner_rows += frames.size(1)
        if hasattr(self.model.joiner, "encoder_proj"):  # it takes (N, T, U, C)
            rows = frames.unsqueeze(2), state.decoder_out.unsqueeze(1)
        else:
            rows = frames, state.decoder_out
        logits = self.model.joiner(*rows)[0, :, 0]
        if self.blank_penalty:
            logits[..., self.blank_id] -= self.blank_penalty
        return logits


def search_each(
    looping: StatefulLooping,
    encoder_out: torch.Tensor,
    lengths: List[int],
    states: Optional[List[StatefulState]],
    report: SearchReport,
) -> tuple:
    """Return the hypotheses and states of a batch.

    Args:
      looping: The search of one.
      encoder_out: (N, T, C).
      lengths: Valid frames.
      states: Those of the chunk before, or None; they stay as they are.
      report: Where the cost is counted.
    """
    after = [
        StatefulState(**vars(s)) for s in states or [StatefulState()] * len(lengths)
    ]
    hypotheses = [
        looping.search(x[None, :n], state, report)
        for x, n, state in zip(encoder_out, lengths, after)
    ]
    return hypotheses, after

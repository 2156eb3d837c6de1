"""Greedy search with either head."""

from typing import List

import torch
from torch import nn


def ctc_greedy(
    ctc_logits: torch.Tensor, lengths: torch.Tensor, blank_id: int = 0
) -> List[List[int]]:
    """The best symbol of each frame, without repetitions and blanks.

    Args:
      ctc_logits: (N, T, V), logits or log-probabilities.
      lengths: (N,), valid frames.
      blank_id: In 0 to V - 1.
    """
    found = []
    for row, n in zip(ctc_logits.argmax(-1), lengths.tolist()):
        symbols = row[:n].unique_consecutive().tolist()
        found.append([s for s in symbols if s != blank_id])
    return found


@torch.no_grad()
def transducer_greedy(
    model: nn.Module, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor
) -> List[List[int]]:
    """The best symbol of each frame under the joiner, at most one a frame.

    As icefall's ``greedy_search`` with ``max_sym_per_frame`` 1, for models with a
    stateless decoder.

    Args:
      model: With ``decoder`` and ``joiner``, as icefall's AsrModel.
      encoder_out: (N, T, C).
      encoder_out_lens: (N,), valid frames.
    """
    blank, context = int(model.decoder.blank_id), int(model.decoder.context_size)
    found: List[List[int]] = [[-1] * (context - 1) + [blank] for _ in encoder_out]
    projected = model.joiner.encoder_proj(encoder_out)

    def decode() -> torch.Tensor:
        last = torch.tensor([y[-context:] for y in found], device=encoder_out.device)
        out = model.decoder(last, need_pad=False)  # (N, 1, D)
        return model.joiner.decoder_proj(out)

    decoder_out, lengths = decode(), encoder_out_lens.tolist()
    for t in range(max(lengths, default=0)):
        logits = model.joiner(
            projected[:, t : t + 1, None], decoder_out.unsqueeze(1), project_input=False
        )
        emitted = False
        for y, symbol, n in zip(found, logits.flatten(1).argmax(-1).tolist(), lengths):
            if symbol != blank and t < n:
                y.append(symbol)
                emitted = True
        if emitted:
            decoder_out = decode()
    return [y[context:] for y in found]

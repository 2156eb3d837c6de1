"""Greedy search with either head."""

from typing import List

import torch
from torch import nn


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
    hypotheses = []
    for best, n in zip(ctc_logits.argmax(-1), lengths.tolist()):
        tokens = best[:n].unique_consecutive().tolist()
        hypotheses.append([token for token in tokens if token != blank_id])
    return hypotheses


@torch.no_grad()
def transducer_greedy(
    model: nn.Module, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor
) -> List[List[int]]:
    """The best token of each frame under the joiner, at most one a frame.

    The result is that of icefall's ``greedy_search`` with ``max_sym_per_frame`` 1, for
    models with a stateless decoder.

    Args:
      model: An icefall AsrModel, or another with ``decoder`` and ``joiner``.
      encoder_out: (N, T, C).
      encoder_out_lens: (N,), valid frames.

    Returns:
      The token ids of each utterance.
    """
    blank, context = int(model.decoder.blank_id), int(model.decoder.context_size)
    # Each hypothesis begins with the context of an empty one.
    hypotheses = [[-1] * (context - 1) + [blank] for _ in encoder_out]
    projected = model.joiner.encoder_proj(encoder_out)

    def run_decoder() -> torch.Tensor:
        contexts = [tokens[-context:] for tokens in hypotheses]
        labels = torch.tensor(contexts, device=encoder_out.device)
        return model.joiner.decoder_proj(model.decoder(labels, need_pad=False))

    decoder_out = run_decoder()  # (N, 1, J)
    lengths = encoder_out_lens.tolist()
    for t in range(max(lengths, default=0)):
        logits = model.joiner(
            projected[:, t : t + 1, None], decoder_out.unsqueeze(1), project_input=False
        )
        best = logits.flatten(1).argmax(-1).tolist()
        emitted = False
        for tokens, token, n in zip(hypotheses, best, lengths):
            if token != blank and t < n:
                tokens.append(token)
                emitted = True
        if emitted:
            decoder_out = run_decoder()
    return [tokens[context:] for tokens in hypotheses]

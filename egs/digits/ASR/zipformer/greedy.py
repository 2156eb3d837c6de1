"""Greedy search with a model's heads."""

from typing import Dict, List, Sequence

import torch

from icefall_kd import ctc_greedy, transducer_greedy

# Of the CTC head, and of the transducer head with one symbol a frame.
METHODS = ("ctc-greedy-search", "greedy_search")


def recognise(
    model: torch.nn.Module, sp, batch: dict, methods: Sequence[str] = METHODS
) -> Dict[str, List[List[str]]]:
    """Return the words that ``model`` recognises in each utterance of ``batch``.

    Args:
      model: The model, in eval mode.
      sp: The tokens.
      batch: What `lhotse.dataset.K2SpeechRecognitionDataset` gives.
      methods: Some of ``METHODS``, which become the keys of the result.
    """
    device = next(model.parameters()).device
    encoder_out, encoder_out_lens = model.forward_encoder(
        batch["inputs"].to(device), batch["supervisions"]["num_frames"].to(device)
    )
    words = {}
    for method in methods:
        if method == "ctc-greedy-search":
            tokens = ctc_greedy(
                model.ctc_output(encoder_out),
                encoder_out_lens,
                sp.piece_to_id("<blk>"),
            )
        else:
            tokens = transducer_greedy(model, encoder_out, encoder_out_lens)
        words[method] = [text.split() for text in sp.decode(tokens)]
    return words

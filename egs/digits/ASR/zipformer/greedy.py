"""Greedy search with a model's heads."""

from typing import Dict, List, Sequence

import torch

from icefall_kd import GreedySearch, ctc_greedy

# Of the CTC head, and of the transducer head with one symbol a frame.
METHODS = ("ctc-greedy-search", "greedy_search")


class Recogniser:
    """Greedy search of batches of utterances.

    Args:
      model: The model, in eval mode. Its parameters may not change afterwards.
      sp: The tokens.
      methods: Some of ``METHODS``.
    """

    def __init__(
        self, model: torch.nn.Module, sp, methods: Sequence[str] = METHODS
    ) -> None:
        self.model, self.sp, self.methods = model, sp, methods
        self.search = GreedySearch(model) if "greedy_search" in methods else None

    def __call__(self, batch: dict) -> Dict[str, List[List[str]]]:
        """Return the words that are recognised in each utterance, by method.

        Args:
          batch: What `lhotse.dataset.K2SpeechRecognitionDataset` gives.
        """
        device = next(self.model.parameters()).device
        encoder_out, encoder_out_lens = self.model.forward_encoder(
            batch["inputs"].to(device), batch["supervisions"]["num_frames"].to(device)
        )
        words = {}
        for method in self.methods:
            if method == "ctc-greedy-search":
                tokens = ctc_greedy(
                    self.model.ctc_output(encoder_out),
                    encoder_out_lens,
                    self.sp.piece_to_id("<blk>"),
                )
            else:
                result = self.search(encoder_out, encoder_out_lens)
                tokens = [hypothesis.tokens for hypothesis in result.hypotheses]
            words[method] = [text.split() for text in self.sp.decode(tokens)]
        return words

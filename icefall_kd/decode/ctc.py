"""What the CTC head is good for: greedy search, and frames that can be left out."""

from dataclasses import dataclass, replace
from typing import List, Sequence

import torch

from icefall_kd.decode.types import Hypothesis
from icefall_kd.errors import require


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
            replace(found, frames=[frames[t] for t in found.frames])
            for found, frames in zip(hypotheses, self.frames)
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

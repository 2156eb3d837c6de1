"""Scores a model on some cuts: loss and word error rate of each head."""

from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Sequence, Tuple

import kaldialign
import torch
from torch import nn

from icefall_kd.losses.sequence import nbest_ctc_loss, nbest_transducer_loss
from icefall_kd.student.greedy import ctc_greedy, transducer_greedy
from icefall_kd.student.importance import FeatureBatch
from icefall_kd.tap import ModelTap, restoring_state
from icefall_kd.types import EncoderOut
from icefall_kd.zipformer import has_ctc, has_transducer


@dataclass
class HeadScores:
    """Losses in nats a token, and WERs in percent.

    A score is None for a head that the model lacks, and where there is no token or
    word.
    """

    ctc_loss: Optional[float] = None
    ctc_wer: Optional[float] = None
    transducer_loss: Optional[float] = None
    transducer_wer: Optional[float] = None


@torch.no_grad()
def score_heads(
    model: nn.Module,
    batches: Sequence[FeatureBatch],
    sp: Any,
    blank_id: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> HeadScores:
    """Losses and WERs, by greedy search, of a model's heads on transcribed cuts.

    Args:
      model: An icefall AsrModel.
      batches: Features (N, T, F), lengths (N,) in feature frames, and token ids.
      sp: The tokenizer of these tokens.
      blank_id: The token id of blank.
      advance: A function that is called after each batch.
    """
    heads = ["ctc"] if has_ctc(model) else []
    if has_transducer(model):
        heads.append("transducer")
    losses, errors = dict.fromkeys(heads, 0.0), dict.fromkeys(heads, 0)
    tokens = words = 0
    with restoring_state(model), ModelTap(model, with_ctc="ctc" in heads) as tap:
        model.eval()
        for x, x_lens, y in batches:
            out = tap.encode(x, x_lens)
            references = [text.split() for text in sp.decode(y)]
            tokens += sum(map(len, y))
            words += sum(map(len, references))
            for head in heads:
                loss, hypotheses = _score_batch(model, head, out, y, blank_id)
                losses[head] += loss
                for reference, text in zip(references, sp.decode(hypotheses)):
                    distance = kaldialign.edit_distance(reference, text.split())
                    errors[head] += distance["total"]
            advance()
    scores = {}
    for head in heads:
        scores[f"{head}_loss"] = losses[head] / tokens if tokens else None
        scores[f"{head}_wer"] = 100 * errors[head] / words if words else None
    return HeadScores(**scores)


def _score_batch(
    model: nn.Module,
    head: str,
    out: EncoderOut,
    labels: Sequence[Sequence[int]],
    blank_id: int,
) -> Tuple[float, List[List[int]]]:
    """The summed loss of a batch, and the token ids that greedy search finds."""
    lens = out.encoder_out_lens
    nbest = [[(tokens, 0.0)] for tokens in labels]  # the transcript alone
    if head == "ctc":
        loss = nbest_ctc_loss(out.ctc_logits, nbest, lens, blank_id=blank_id)
        return float(loss), ctc_greedy(out.ctc_logits, lens, blank_id)
    loss = nbest_transducer_loss(model, out.encoder_out, nbest, lens, simple_scale=0.0)
    return float(loss), transducer_greedy(model, out.encoder_out, lens)

"""Scores a model on some cuts: loss and word error rate of each head."""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.decode import GreedySearch, ctc_greedy
from icefall_kd.errors import need_kaldialign
from icefall_kd.losses.sequence import nbest_ctc_loss, nbest_transducer_loss
from icefall_kd.model_state import restoring_state
from icefall_kd.student.importance import FeatureBatch
from icefall_kd.tap import ModelTap
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


@dataclass
class UtteranceScores:
    """One head's scores of each utterance, in their order."""

    losses: List[float] = field(default_factory=list)  # of the transcript, in nats
    errors: List[int] = field(default_factory=list)  # words, by greedy search
    right: List[bool] = field(default_factory=list)  # whether greedy finds its tokens
    tokens: List[int] = field(default_factory=list)  # of the transcript
    words: List[int] = field(default_factory=list)  # of the transcript

    def summary(self) -> Tuple[Optional[float], Optional[float]]:
        """Return the loss in nats a token, and the WER in percent; None for none."""
        tokens, words = sum(self.tokens), sum(self.words)
        loss = sum(self.losses) / tokens if tokens else None
        return loss, 100 * sum(self.errors) / words if words else None


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
    scores = {}
    utterances = score_utterances(model, batches, sp, blank_id, advance)
    for head, of_head in utterances.items():
        scores[f"{head}_loss"], scores[f"{head}_wer"] = of_head.summary()
    return HeadScores(**scores)


@torch.no_grad()
def score_utterances(
    model: nn.Module,
    batches: Sequence[FeatureBatch],
    sp: Any,
    blank_id: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> Dict[str, UtteranceScores]:
    """Score a model's heads on each of some transcribed cuts.

    Args:
      model: An icefall AsrModel.
      batches: Features (N, T, F), lengths (N,) in feature frames, and token ids.
      sp: The tokenizer of these tokens.
      blank_id: The token id of blank.
      advance: A function that is called after each batch.

    Returns:
      The scores of each head that the model has: "ctc", "transducer".

    Raises:
      KDError: kaldialign can't be imported.
    """
    need_kaldialign()
    import kaldialign

    heads = ["ctc"] if has_ctc(model) else []
    if has_transducer(model):
        heads.append("transducer")
    scores = {head: UtteranceScores() for head in heads}
    with restoring_state(model), ModelTap(model, with_ctc="ctc" in heads) as tap:
        model.eval()
        search = GreedySearch(model) if "transducer" in heads else None
        for x, x_lens, y in batches:
            out = tap.encode(x, x_lens)
            references = [text.split() for text in sp.decode(y)]
            for head, of_head in scores.items():
                losses, hypotheses = _score_batch(model, head, out, y, blank_id, search)
                texts = [text.split() for text in sp.decode(hypotheses)]
                of_head.losses += losses
                of_head.errors += [
                    kaldialign.edit_distance(reference, text)["total"]
                    for reference, text in zip(references, texts)
                ]
                of_head.right += [list(a) == list(b) for a, b in zip(hypotheses, y)]
                of_head.tokens += map(len, y)
                of_head.words += map(len, references)
            advance()
    return scores


def _score_batch(
    model: nn.Module,
    head: str,
    out: EncoderOut,
    labels: Sequence[Sequence[int]],
    blank_id: int,
    search: Optional[GreedySearch],
) -> Tuple[List[float], List[List[int]]]:
    """The loss of each utterance of a batch, and the token ids that greedy finds."""
    lens, losses = out.encoder_out_lens, []
    for i, tokens in enumerate(labels):
        row, n = slice(i, i + 1), int(lens[i])
        nbest = [[(list(tokens), 0.0)]]  # the transcript alone
        if head == "ctc":
            logits = out.ctc_logits[row, :n]
            loss = nbest_ctc_loss(logits, nbest, lens[row], blank_id=blank_id)
        else:
            encoder_out = out.encoder_out[row, :n]
            loss = nbest_transducer_loss(
                model, encoder_out, nbest, lens[row], simple_scale=0.0
            )
        losses.append(float(loss))
    if head == "ctc":
        return losses, ctc_greedy(out.ctc_logits, lens, blank_id)
    found = search(out.encoder_out, lens).hypotheses
    return losses, [hypothesis.tokens for hypothesis in found]

"""How well a model does on some cuts: loss and word error rate of each head."""

from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence

import kaldialign
import torch
from torch import nn

from icefall_kd.decode.greedy import ctc_greedy, transducer_greedy
from icefall_kd.losses.sequence import nbest_ctc_loss, nbest_transducer_loss
from icefall_kd.student.importance import Batch
from icefall_kd.tap import ModelTap, as_found


@dataclass
class Judgement:
    """Losses in nats a token, WER in percent.

    None for a head that isn't there, and where no token or word is.
    """

    ctc_loss: Optional[float] = None
    ctc_wer: Optional[float] = None
    transducer_loss: Optional[float] = None
    transducer_wer: Optional[float] = None


def _ratio(a: float, b: int) -> Optional[float]:
    return a / b if b else None


@torch.no_grad()
def judge(
    model: nn.Module,
    batches: Sequence[Batch],
    sp: Any,
    blank_id: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> Judgement:
    """Losses and WERs, by greedy search, of a model's heads on transcribed cuts.

    Args:
      model: An icefall AsrModel.
      batches: Features (N, T, F), lengths (N,) and labels.
      sp: The SentencePiece model of the labels.
      advance: Called after each batch.
    """
    ctc = getattr(model, "ctc_output", None) is not None
    transducer = getattr(model, "joiner", None) is not None
    tokens = words = 0
    losses, errors = [0.0, 0.0], [0, 0]
    with as_found(model), ModelTap(model, ctc=ctc) as hook:
        model.eval()
        for x, x_lens, y in batches:
            out = hook.encode(x, x_lens)
            lens, one = out.encoder_out_lens, [[(labels, 0.0)] for labels in y]
            tokens += sum(map(len, y))
            refs = [text.split() for text in sp.decode(y)]
            words += sum(map(len, refs))
            hyps = [None, None]
            if ctc:
                losses[0] += float(nbest_ctc_loss(out.ctc_logits, lens, one, blank_id))
                hyps[0] = ctc_greedy(out.ctc_logits, lens, blank_id)
            if transducer:
                losses[1] += float(
                    nbest_transducer_loss(
                        model, out.encoder_out, lens, one, simple_scale=0.0
                    )
                )
                hyps[1] = transducer_greedy(model, out.encoder_out, lens)
            for head, said in enumerate(hyps):
                for ref, text in zip(refs, sp.decode(said) if said else []):
                    found = kaldialign.edit_distance(ref, text.split())
                    errors[head] += found["total"]
            advance()
    found = Judgement()
    if ctc:
        found.ctc_loss = _ratio(losses[0], tokens)
        found.ctc_wer = _ratio(100 * errors[0], words)
    if transducer:
        found.transducer_loss = _ratio(losses[1], tokens)
        found.transducer_wer = _ratio(100 * errors[1], words)
    return found

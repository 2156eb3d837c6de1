"""Sequence-level distillation: the student learns a teacher's n-best lists."""

from typing import Callable, List, Sequence, Tuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.errors import KDError, NotFiniteError, require
from icefall_kd.lattice import decode_labels, pad_labels, prune, pruned_logits
from icefall_kd.losses.checks import check_temperature, valid_frames
from icefall_kd.losses.kl import compute_dtype
from icefall_kd.rnnt import get_engine
from icefall_kd.zipformer import require_transducer

# For each utterance its hypotheses: token ids, and the teacher's log-probability.
NBest = List[List[Tuple[List[int], float]]]


def nbest_weights(scores: Sequence[float], *, temperature: float = 1.0) -> torch.Tensor:
    """Return the weights of one utterance's hypotheses.

    w_h = exp(s_h / T) / sum over h' of exp(s_h' / T): the teacher's distribution over
    sequences, cut down to its n-best list (Kim and Rush, arXiv:1606.07947).

    Args:
      scores: s, log-probabilities in nats.
      temperature: T above 0; the larger, the more even the weights.

    Returns:
      (H,), float64, of sum 1; empty for no scores.

    Raises:
      KDError: A score that is not finite, or a bad temperature.
    """
    check_temperature(temperature)
    s = torch.tensor(scores, dtype=torch.float64)
    require(
        torch.isfinite(s).all(),
        f"the scores of an n-best list are {list(scores)}, and must be finite "
        "log-probabilities: leave out hypotheses that have none",
    )
    if len(s):
        s -= s.max().item()  # before the division, which may overflow
    return (s / temperature).softmax(0)


def nbest_ctc_loss(
    student: torch.Tensor,
    nbest: NBest,
    lengths: torch.Tensor,
    *,
    temperature: float = 1.0,
    blank_id: int = 0,
) -> torch.Tensor:
    """Return the CTC loss of a teacher's n-best lists.

    sum over utterances n and hypotheses h of w_nh (-log P_ctc(y_nh | x_n)), w of
    :func:`nbest_weights` (Kim and Rush, arXiv:1606.07947, with the CTC loss of each
    hypothesis). A hypothesis of U tokens, R of which repeat the one before, needs U + R
    frames; those that don't fit are left out before the weights are taken. A hypothesis
    without tokens is all blanks. In nats, summed as icefall sums its losses. Computed
    in float32, in float64 for float64 inputs, also inside autocast.

    Args:
      student: (N, T, V), CTC logits before LogSoftmax. Frames from ``lengths`` on are
        never read.
      nbest: The hypotheses of each utterance, as token ids and the teacher's log score;
        an utterance without any counts 0.
      lengths: (N,), valid frames, 0 to T.
      temperature: T of the weights, above 0.
      blank_id: The token id of blank, 0 to V - 1.

    Returns:
      A scalar; 0 with a zero gradient if no hypothesis is left.

    Raises:
      KDError: Logits that are not finite, tokens that the student lacks, other numbers
        of lists than of rows, bad lengths, scores or temperature.
    """
    check_temperature(temperature)
    logits = _zero_padding(student, lengths, "CTC logits")
    _check_nbest(nbest, len(logits), logits.size(2), blank_id)
    frames = lengths.tolist()

    def fits(tokens: Sequence[int], row: int) -> bool:
        repeats = sum(a == b for a, b in zip(tokens, tokens[1:]))
        # Of 0 frames torch 1.13 reads what lies before the first.
        return max(1, len(tokens) + repeats) <= frames[row]

    rows, tokens, weights = _flat(nbest, fits, temperature)
    device = logits.device
    with torch.autocast(device.type, enabled=False):
        logits = logits.to(compute_dtype(logits.dtype))
        if not rows:
            return logits[:0].sum()
        log_probs = logits.log_softmax(-1).transpose(0, 1)  # (T, N, V)
        # The blank at the end, which isn't counted, keeps empty lists apart from none.
        padded = [torch.tensor([*y, blank_id]) for y in tokens]
        losses = nn.functional.ctc_loss(
            log_probs[:, torch.tensor(rows, device=device)],
            pad_sequence(padded, batch_first=True).to(device),
            torch.tensor([frames[row] for row in rows], device=device),
            torch.tensor([len(y) for y in tokens], device=device),
            blank=blank_id,
            reduction="none",
        )
        return (losses * losses.new_tensor(weights)).sum()


def nbest_transducer_loss(
    model: nn.Module,
    encoder_out: torch.Tensor,
    nbest: NBest,
    lengths: torch.Tensor,
    *,
    temperature: float = 1.0,
    prune_range: int = 5,
    simple_scale: float = 0.5,
) -> torch.Tensor:
    """Return the pruned transducer loss of a teacher's n-best lists.

    sum over utterances n and hypotheses h of w_nh (L_pruned(y_nh | x_n) +
    simple_scale L_simple(y_nh | x_n)), w of :func:`nbest_weights`: icefall's loss
    (Kuang et al., arXiv:2206.13236) of each hypothesis, weighted as in
    arXiv:1606.07947. Hypotheses without tokens, or with more tokens than frames, are
    left out before the weights are taken. In nats, summed as icefall sums its losses.
    The modules run in the type that autocast gives them, the losses in float32, or
    float64 for float64 inputs.

    All hypotheses of a batch make one batch of R rows; its joiner output is of
    (R, T, prune_range, V).

    Args:
      model: The student, with ``decoder``, ``joiner``, ``simple_am_proj`` and
        ``simple_lm_proj``, as icefall's AsrModel; not wrapped in DDP.
      encoder_out: (N, T, C), the student's, with its graph. Frames from ``lengths`` on
        are never read.
      nbest: The hypotheses of each utterance, as token ids and the teacher's log score;
        an utterance without any counts 0.
      lengths: (N,), valid frames, 0 to T.
      temperature: T of the weights, above 0.
      prune_range: Label positions at a frame, 2 or more.
      simple_scale: The factor of the simple loss, which trains the two simple
        projections; icefall has 0.5 after its warm-up.

    Returns:
      A scalar; 0 with a zero gradient if no hypothesis is left.

    Raises:
      KDError: As :func:`nbest_ctc_loss`, and for a model without transducer head.
    """
    check_temperature(temperature)
    require_transducer(model, "a transducer's loss", "use nbest_ctc_loss alone")
    require(
        prune_range >= 2,
        f"`prune_range` is {prune_range}, and no path gets through fewer than 2 label "
        "positions: icefall has 5",
    )
    encoder_out = _zero_padding(encoder_out, lengths, "encoder output")
    blank_id = int(model.decoder.blank_id)
    size = model.joiner.output_linear.out_features
    _check_nbest(nbest, len(encoder_out), size, blank_id)
    frames = lengths.tolist()
    rows, tokens, weights = _flat(
        nbest, lambda y, row: 0 < len(y) <= frames[row], temperature
    )
    # Of another type where the encoder ran within autocast and this doesn't.
    encoder_out = encoder_out.to(model.joiner.encoder_proj.weight.dtype)
    simple_am = model.simple_am_proj(encoder_out)
    am = model.joiner.encoder_proj(encoder_out)
    if not rows:
        zero = simple_am[:0].sum() + am[:0].sum()
        return zero.to(compute_dtype(zero.dtype))
    index = torch.tensor(rows, device=am.device)
    labels, boundary = pad_labels(tokens, lengths.to(am.device)[index], blank_id)
    simple, pruned = _transducer_losses(
        model, simple_am[index], am[index], labels, boundary, prune_range
    )
    losses = pruned + simple_scale * simple
    return (losses * losses.new_tensor(weights)).sum()


def _transducer_losses(
    model: nn.Module,
    simple_am: torch.Tensor,
    am: torch.Tensor,
    labels: torch.Tensor,
    boundary: torch.Tensor,
    prune_range: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The simple and the pruned loss of each row, (R,), as icefall computes them."""
    blank_id, dtype = int(model.decoder.blank_id), compute_dtype(am.dtype)
    decoder_out = decode_labels(model.decoder, labels, blank_id)
    simple_lm = model.simple_lm_proj(decoder_out)
    simple, ranges = prune(
        simple_am.to(dtype),
        simple_lm.to(dtype),
        labels,
        boundary,
        blank_id,
        prune_range,
    )
    logits = pruned_logits(model.joiner, am, decoder_out, ranges)
    with torch.autocast(am.device.type, enabled=False):
        pruned = get_engine().rnnt_loss_pruned(
            logits=logits.to(dtype),
            symbols=labels,
            ranges=ranges,
            termination_symbol=blank_id,
            boundary=boundary,
            reduction="none",
        )
    return simple, pruned


def _flat(
    nbest: NBest, fits: Callable[[Sequence[int], int], bool], temperature: float
) -> Tuple[List[int], List[Sequence[int]], List[float]]:
    """Utterance, tokens and weight of every hypothesis that fits its utterance."""
    rows, tokens, weights = [], [], []
    for row, hypotheses in enumerate(nbest):
        fitting = [(y, score) for y, score in hypotheses if fits(y, row)]
        scores = [score for _, score in fitting]
        rows += [row] * len(fitting)
        tokens += [y for y, _ in fitting]
        weights += nbest_weights(scores, temperature=temperature).tolist()
    return rows, tokens, weights


def _zero_padding(x: torch.Tensor, lengths: torch.Tensor, name: str) -> torch.Tensor:
    """``x`` with 0 in its padding, where NaN would reach gradients."""
    if x.ndim != 3:
        raise KDError(f"the {name} have shape {tuple(x.shape)} and must be (N, T, ...)")
    x = x.masked_fill(~valid_frames(x, lengths, None, name).unsqueeze(-1), 0.0)
    if not torch.isfinite(x).all():
        raise NotFiniteError(
            f"the student's {name}, of shape {tuple(x.shape)}, are not finite: lower "
            "the learning rate or train in float32"
        )
    return x


def _check_nbest(nbest: NBest, n: int, size: int, blank_id: int) -> None:
    if len(nbest) != n:
        raise KDError(
            f"there are n-best lists of {len(nbest)} utterances and the batch has {n}: "
            "give each utterance a list, which may be empty"
        )
    for row, hypotheses in enumerate(nbest):
        for tokens, _ in hypotheses:
            for k in tokens:
                if not 0 <= k < size or k == blank_id:
                    raise KDError(
                        f"a hypothesis of utterance {row} has the token {k}, and the "
                        f"student's are 0 to {size - 1} but for the blank {blank_id}: "
                        "encode the teacher's text by the student's tokenizer"
                    )

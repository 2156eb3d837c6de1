"""judge: losses and word error rates of each head."""

import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from icefall_kd import ModelTap
from icefall_kd.decode import Hypothesis, ctc_greedy, transducer_greedy
from icefall_kd.errors import KDError
from icefall_kd.student import scores
from icefall_kd.student.scores import score_heads

Y = [[3, 4, 9, 4], [5], [7, 7, 2]]


class Sp:
    """A word for each label: 7 is "w7"; those of ``silent`` are no words."""

    def __init__(self, silent=()):
        self.silent = silent

    def decode(self, ids):
        return [" ".join(f"w{i}" for i in y if i not in self.silent) for y in ids]


@pytest.fixture
def model(make_model):
    return make_model(seed=2).eval()


@pytest.fixture
def batch(features):
    return (*features, Y)


def heard(model, features):
    with ModelTap(model, with_ctc=model.ctc_output is not None) as hook:
        return hook.encode(*features)


def naive_errors(a, b):
    """The edit distance, by recursion."""

    @cache
    def of(i, j):
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        changed = of(i + 1, j + 1) + (a[i] != b[j])
        return min(of(i + 1, j) + 1, of(i, j + 1) + 1, changed)

    return of(0, 0)


def naive_transducer_loss(model, encoder_out, labels):
    """-log of the sum over all alignments, forwards over (frame, label)."""
    blank = model.decoder.blank_id
    decoder_out = model.decoder(torch.tensor([[blank, *labels]]))
    logits = model.joiner(encoder_out[None, :, None], decoder_out[:, None])[0]
    logp = logits.double().log_softmax(-1)
    frames, positions = logp.shape[:2]
    alpha = torch.full((frames, positions), -torch.inf, dtype=torch.float64)
    alpha[0, 0] = 0
    for t in range(frames):
        for u in range(positions):
            ways = [alpha[t, u]]
            if t:
                ways.append(alpha[t - 1, u] + logp[t - 1, u, blank])
            if u:
                ways.append(alpha[t, u - 1] + logp[t, u - 1, labels[u - 1]])
            alpha[t, u] = torch.logsumexp(torch.stack(ways), 0)
    return -(alpha[-1, -1] + logp[-1, -1, blank])


# Losses


@torch.no_grad()
def test_losses_are_those_of_torch_and_of_all_alignments(model, batch, features):
    """At most five label positions: pruning leaves none out."""
    out = heard(model, features)
    lens, count = out.encoder_out_lens, sum(map(len, Y))
    ctc = torch.nn.functional.ctc_loss(
        out.ctc_logits.log_softmax(-1).transpose(0, 1),
        torch.tensor([label for y in Y for label in y]),
        lens,
        torch.tensor([len(y) for y in Y]),
        reduction="sum",
    )
    rows = zip(out.encoder_out, lens, Y, strict=True)
    transducer = sum(naive_transducer_loss(model, row[:n], y) for row, n, y in rows)
    found = score_heads(model, [batch], Sp())
    assert found.ctc_loss == pytest.approx(float(ctc) / count, rel=1e-5)
    assert found.transducer_loss == pytest.approx(float(transducer) / count, rel=1e-5)


def test_batches_count_by_their_tokens_and_words(model, batch):
    x, x_lens, y = batch
    parts = [(x[i : i + 1, : x_lens[i]], x_lens[i : i + 1], [y[i]]) for i in range(3)]
    calls = []
    found = score_heads(model, parts, Sp(), advance=lambda: calls.append(0))
    whole = score_heads(model, [batch], Sp())
    assert vars(found) == pytest.approx(vars(whole), rel=1e-4) and len(calls) == 3


@pytest.mark.parametrize("blank_id", [0, 6])
def test_the_blank_of_the_model(make_model, batch, features, blank_id):
    model = make_model(seed=2, blank_id=blank_id).eval()
    out = heard(model, features)
    expected = torch.nn.functional.ctc_loss(
        out.ctc_logits.detach().log_softmax(-1).transpose(0, 1),
        torch.tensor([label for y in Y for label in y]),
        out.encoder_out_lens,
        torch.tensor([len(y) for y in Y]),
        blank=blank_id,
        reduction="sum",
    )
    found = score_heads(model, [batch], Sp(), blank_id)
    assert found.ctc_loss == pytest.approx(float(expected) / 8, rel=1e-5)


# Words


def test_word_error_rates_by_hand(model, batch, monkeypatch):
    said = [[3, 9, 4], [5, 5, 5], []]  # a deletion; two insertions; three deletions
    monkeypatch.setattr(scores, "ctc_greedy", lambda *args: said)
    right = SimpleNamespace(hypotheses=[Hypothesis(tokens) for tokens in Y])
    monkeypatch.setattr(scores, "GreedySearch", lambda model: lambda *args: right)
    found = score_heads(model, [batch], Sp())
    assert found.ctc_wer == 100 * 6 / 8 and found.transducer_wer == 0


@torch.no_grad()
def test_word_error_rates_are_those_of_greedy_search(model, batch, features):
    model.joiner.output_linear.bias[0] -= 3
    out = heard(model, features)
    lens = out.encoder_out_lens
    hyps = (
        ctc_greedy(out.ctc_logits, lens),
        transducer_greedy(model, out.encoder_out, lens),
    )
    found = score_heads(model, [batch], Sp())
    for said, wer in zip(hyps, (found.ctc_wer, found.transducer_wer), strict=True):
        errors = sum(naive_errors(a, b) for a, b in zip(Y, said, strict=True))
        assert wer == pytest.approx(100 * errors / 8) and any(said)


def test_a_real_tokenizer_takes_silence(make_model, features, bpe_models):
    """Nothing said in any utterance, or in the first."""
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor(model_file=str(bpe_models.a))
    y = sp.encode(["zero one", "two", "seven"], out_type=int)
    model = make_model(seed=2, vocab_size=25).eval()
    with torch.no_grad():
        model.joiner.output_linear.bias[0] += 1e4
        model.ctc_output[1].bias[0] += 1e4
    x, x_lens = features[0], torch.tensor([61, 61, 61])
    found = score_heads(model, [(x, x_lens, y)], sp)
    assert found.ctc_wer == found.transducer_wer == 100.0


@pytest.mark.parametrize("batches", [0, 1])
def test_where_no_words_are_there_is_no_rate(model, batch, batches):
    """No cuts at all, or transcripts whose labels make no word."""
    found = score_heads(model, [batch] * batches, Sp(silent=range(11)))
    assert found.ctc_wer is None and found.transducer_wer is None
    assert (found.ctc_loss is None) == (found.transducer_loss is None) == (not batches)


# Heads


def test_a_head_that_is_not_there_has_no_values(make_model, batch):
    found = score_heads(make_model(use_transducer=False).eval(), [batch], Sp())
    assert found.transducer_loss is None and found.transducer_wer is None
    assert found.ctc_loss > 0 and found.ctc_wer is not None
    found = score_heads(make_model(use_ctc=False).eval(), [batch], Sp())
    assert found.ctc_loss is None and found.ctc_wer is None
    assert found.transducer_loss > 0 and found.transducer_wer is not None


# The model as it was


@pytest.mark.parametrize("fault", [False, True])
def test_the_model_is_left_as_found(make_model, batch, fault):
    shape = {"causal": True, "chunk_size": "4,8", "left_context_frames": "16"}
    model = make_model(seed=2, **shape).train()
    model.joiner.eval()

    def state():
        return SimpleNamespace(
            flags=[m.training for m in model.modules()],
            hooks=sum(len(m._forward_hooks) for m in model.modules()),
            chunks=model.encoder.chunk_size,
            randoms=(random.getstate(), torch.get_rng_state().tolist()),
            gradients=[p.grad for p in model.parameters()],
        )

    before = state()
    x, x_lens, y = batch
    batches = [batch, (x[:, :8], x_lens.clamp(max=8), y)][: 1 + fault]
    if fault:
        with pytest.raises(KDError, match="8 feature frames"):
            score_heads(model, batches, Sp())
    else:
        first, again = (score_heads(model, batches, Sp()) for _ in range(2))
        assert first == again  # no dropout, and one chunk size
    assert state() == before

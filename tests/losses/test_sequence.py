"""Losses of n-best lists: naive double loops, the plain losses, padding, refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icefall_kd.errors import KDError
from icefall_kd.losses.sequence import (
    nbest_ctc_loss,
    nbest_transducer_loss,
    nbest_weights,
)

INF, NAN = math.inf, math.nan


def grads_of(value, inputs):
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


def naive_weights(scores, temperature):
    powers = [math.exp(s / temperature) for s in scores]
    return [p / sum(powers) for p in powers]


def naive_sum(loss, nbest, fits, temperature):
    """Utterance by utterance, hypothesis by hypothesis."""
    total = 0.0
    for n, hypotheses in enumerate(nbest):
        kept = [(y, s) for y, s in hypotheses if fits(n, y)]
        weights = naive_weights([s for _, s in kept], temperature)
        for (y, _), w in zip(kept, weights):
            total = total + w * loss(n, y)
    return total


# Weights


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_weights_are_the_normalised_probabilities_and_sum_to_1(temperature):
    scores = [-1.2, -0.3, -4.0, -0.3]
    weights = nbest_weights(scores, temperature=temperature)
    expected = torch.tensor(naive_weights(scores, temperature), dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize("scores", [[-9000.0, -9001.0], [-1e308, 1e308], [-700.0]])
def test_weights_of_extreme_scores_are_finite_and_sum_to_1(scores, temperature):
    weights = nbest_weights(scores, temperature=temperature)
    assert torch.isfinite(weights).all() and float(weights.sum()) == pytest.approx(1)


def test_a_constant_on_all_scores_changes_no_weight():
    torch.testing.assert_close(nbest_weights([0, -1, -2]), nbest_weights([-8, -9, -10]))


def test_no_scores_give_no_weights():
    assert nbest_weights([]).shape == (0,)


@pytest.mark.parametrize("score", [NAN, INF, -INF])
def test_a_score_that_is_not_finite_is_refused(score):
    with pytest.raises(KDError, match="scores of an n-best list are .*finite"):
        nbest_weights([-1.0, score])


# CTC


def naive_ctc(log_probs, labels, blank_id):
    """-log P of one utterance, by the forward recursion over blanks and labels."""
    if not len(log_probs):
        return log_probs.sum()
    states = [blank_id]
    for k in labels:
        states += [k, blank_id]
    alpha = {0: log_probs[0, states[0]]}
    if labels:
        alpha[1] = log_probs[0, states[1]]
    for frame in log_probs[1:]:
        new = {}
        for i, k in enumerate(states):
            sources = [i, i - 1]
            if i > 1 and k != blank_id and k != states[i - 2]:
                sources.append(i - 2)
            reached = [alpha[j] for j in sources if j in alpha]
            if reached:
                new[i] = torch.stack(reached).logsumexp(0) + frame[k]
        alpha = new
    ends = [alpha[i] for i in {len(states) - 1, len(states) - 2} if i in alpha]
    return -torch.stack(ends).logsumexp(0)


def frames_for(labels):
    return len(labels) + sum(a == b for a, b in zip(labels, labels[1:]))


def twin_of_ctc(logits, lengths, nbest, blank_id=0, temperature=1.0):
    return naive_sum(
        lambda n, y: naive_ctc(
            logits[n, : lengths[n]].log_softmax(-1), list(y), blank_id
        ),
        nbest,
        lambda n, y: frames_for(y) <= lengths[n],
        temperature,
    )


def ctc_batch(seed=0, n=4, t=7, v=5, blank_id=0, dtype=torch.float64):
    """Logits, lengths, and lists of 0 to 3 hypotheses of 0 to 5 tokens."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, t, v, generator=g, dtype=torch.float64)
    lengths = torch.randint(0, t + 1, (n,), generator=g)
    labels = [k for k in range(v) if k != blank_id]

    def draw(high):
        return int(torch.randint(0, high, (1,), generator=g))

    nbest = [
        [
            ([labels[draw(v - 1)] for _ in range(draw(6))], -5.0 * draw(100) / 100)
            for _ in range(draw(4))
        ]
        for _ in range(n)
    ]
    return logits.to(dtype).requires_grad_(), lengths, nbest


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 4),
    t=st.integers(1, 8),
    v=st.integers(2, 6),
    blank=st.booleans(),
    temperature=st.floats(0.3, 10),
)
def test_ctc_equals_the_naive_double_loop(seed, n, t, v, blank, temperature):
    blank_id = v - 1 if blank else 0
    logits, lengths, nbest = ctc_batch(seed, n, t, v, blank_id)
    value = nbest_ctc_loss(
        logits, nbest, lengths, blank_id=blank_id, temperature=temperature
    )
    expected = twin_of_ctc(logits, lengths, nbest, blank_id, temperature)
    expected = expected + 0 * logits.sum()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        grads_of(value, [logits]), grads_of(expected, [logits]), rtol=1e-6, atol=1e-9
    )


def test_ctc_gradcheck():
    logits, _, _ = ctc_batch(n=2, t=4, v=4)
    nbest = [[([1, 2], -0.5), ([], -1.0), ([3, 3], -0.2)], [([2], 0.0)]]
    lengths = torch.tensor([4, 3])
    assert torch.autograd.gradcheck(
        lambda x: nbest_ctc_loss(x, nbest, lengths, blank_id=0, temperature=2.0),
        (logits,),
    )


def test_one_hypothesis_gives_the_plain_ctc_loss():
    logits = ctc_batch(n=3, t=9, v=6)[0]
    lengths, y = torch.tensor([9, 5, 7]), [[1, 1, 4], [5], [2, 3, 2, 5]]
    found = nbest_ctc_loss(logits, [[(labels, -3.0)] for labels in y], lengths)
    expected = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        torch.tensor([k for labels in y for k in labels]),
        lengths,
        torch.tensor([len(labels) for labels in y]),
        reduction="sum",
    )
    torch.testing.assert_close(found, expected)


def test_ctc_hypotheses_that_do_not_fit_leave_their_weight_to_the_others():
    logits = ctc_batch(n=2, t=5, v=4)[0]
    lengths = torch.tensor([3, 0])
    fit = [([1, 2, 1], -1.0), ([], -2.0)]
    # Three tokens of which two repeat need five frames.
    more = [([1, 2, 1, 2], 0.0), ([2, 2, 2], 0.0)]
    found = nbest_ctc_loss(logits, [more[:1] + fit + more[1:], [([], 0.0)]], lengths)
    expected = nbest_ctc_loss(logits, [fit, []], lengths)
    torch.testing.assert_close(found, expected)
    assert torch.isfinite(found) and found > 0
    exact = nbest_ctc_loss(logits, [[([2, 2, 2], 0.0)], []], torch.tensor([5, 0]))
    assert exact > 0


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_ctc_does_not_read_padding(value):
    logits, lengths, nbest = ctc_batch(seed=3)
    assert (lengths < 7).sum() > 1
    expected = nbest_ctc_loss(logits, nbest, lengths)
    (expected_grad,) = grads_of(expected, [logits])
    padding = torch.arange(7) >= lengths.unsqueeze(1)
    dirty = logits.detach().masked_fill(padding.unsqueeze(-1), value)
    dirty = torch.nn.functional.pad(dirty, (0, 0, 0, 2), value=value).requires_grad_()
    found = nbest_ctc_loss(dirty, nbest, lengths)
    (grad,) = grads_of(found, [dirty])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grad[:, :7], expected_grad)
    assert grad[:, :7][padding].eq(0).all() and grad[:, 7:].eq(0).all()


def test_ctc_of_no_hypotheses_is_0_with_zero_gradient():
    logits, lengths, _ = ctc_batch()
    for nbest in ([[]] * 4, [[([1] * 9, 0.0)], [], [], []]):
        value = nbest_ctc_loss(logits, nbest, lengths)
        (grad,) = torch.autograd.grad(value, logits)
        assert value == 0 and grad.eq(0).all()


def test_empty_hypotheses_alone_are_all_blanks():
    logits, _, _ = ctc_batch(n=1, t=6)
    found = nbest_ctc_loss(logits, [[([], -1.0)]], torch.tensor([5]))
    torch.testing.assert_close(found, -logits.log_softmax(-1)[0, :5, 0].sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ctc_of_half_types_is_computed_in_float32(dtype):
    logits, lengths, nbest = ctc_batch(seed=5, dtype=dtype)
    expected = nbest_ctc_loss(logits.float(), nbest, lengths)
    assert expected > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nbest_ctc_loss(logits, nbest, lengths)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, logits)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0


# The transducer


@pytest.fixture
def quiet_model(make_model):
    """A model whose decoder has no balancers: these change gradients at random."""

    def make(seed):
        model = make_model(seed=seed).eval()
        model.decoder.balancer = model.decoder.balancer2 = torch.nn.Identity()
        return model

    return make


@pytest.fixture
def student(quiet_model):
    """A model in float64; its encoder isn't asked."""
    return quiet_model(seed=2).double()


@pytest.fixture
def heard():
    """Encoder output of three utterances, and lists for them."""
    g = torch.Generator().manual_seed(4)
    encoder_out = torch.randn(3, 9, 24, generator=g, dtype=torch.float64)
    nbest = [
        [([3, 4, 3, 3, 7, 2, 9], -0.4), ([3, 4], -1.4), ([], -0.2)],
        [],
        [([5], -2.0), ([5, 6, 1, 8], -0.3), ([1] * 8, -0.1), ([10, 10, 2], -7.0)],
    ]
    return encoder_out.requires_grad_(), nbest, torch.tensor([9, 4, 7])


def parts_of(model):
    modules = (
        model.decoder,
        model.joiner,
        model.simple_am_proj,
        model.simple_lm_proj,
    )
    return [p for m in modules for p in m.parameters()]


def naive_rnnt(log_probs, labels, blank_id=0):
    """-log P over all paths through (T, U + 1, V), in any order of arcs."""
    alpha = {(0, 0): log_probs.new_zeros(())}
    frames, size = log_probs.shape[:2]
    for t in range(frames):
        for u in range(size):
            reached = []
            if t and (t - 1, u) in alpha:
                reached.append(alpha[t - 1, u] + log_probs[t - 1, u, blank_id])
            if u:
                reached.append(alpha[t, u - 1] + log_probs[t, u - 1, labels[u - 1]])
            if reached:
                alpha[t, u] = torch.stack(reached).logsumexp(0)
    return -(alpha[frames - 1, size - 1] + log_probs[-1, -1, blank_id])


def full_loss(model, encoder_out, labels, simple_scale):
    """Of one utterance, over the whole lattice."""
    decoder_out = model.decoder(torch.tensor([[0, *labels]]))[0]
    simple = model.simple_am_proj(encoder_out).unsqueeze(1)
    simple = simple + model.simple_lm_proj(decoder_out)
    h = model.joiner.encoder_proj(encoder_out).unsqueeze(1)
    h = (h + model.joiner.decoder_proj(decoder_out)).tanh()
    joint = model.joiner.output_linear(h)
    simple, joint = (naive_rnnt(x.log_softmax(-1), labels) for x in (simple, joint))
    return joint + simple_scale * simple


def recipe_loss(model, encoder_out, labels, prune_range, simple_scale):
    """Of one utterance, as the recipe computes it."""
    simple, pruned = model.forward_transducer(
        encoder_out.unsqueeze(0),
        torch.tensor([len(encoder_out)]),
        [list(labels)],
        prune_range=prune_range,
    )
    return pruned + simple_scale * simple


def naive_transducer(loss, heard, temperature):
    encoder_out, nbest, lens = heard
    return naive_sum(
        lambda n, y: loss(encoder_out[n, : lens[n]], y),
        nbest,
        lambda n, y: 0 < len(y) <= lens[n],
        temperature,
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("simple_scale", [0.5, 0.0])
def test_the_transducer_equals_the_naive_double_loop_over_full_lattices(
    student, heard, simple_scale, temperature
):
    inputs = [heard[0], *parts_of(student)]
    found = nbest_transducer_loss(
        student,
        *heard,
        temperature=temperature,
        prune_range=8,
        simple_scale=simple_scale,
    )
    expected = naive_transducer(
        lambda x, y: full_loss(student, x, y, simple_scale), heard, temperature
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        grads_of(found, inputs), grads_of(expected, inputs), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("prune_range", [2, 4])
def test_the_transducer_equals_the_recipes_pruned_loss_in_a_double_loop(
    quiet_model, heard, prune_range
):
    model = quiet_model(seed=2)
    encoder_out, nbest, lens = heard
    heard = (encoder_out.detach().float().requires_grad_(), nbest, lens)
    inputs = [heard[0], *parts_of(model)]
    found = nbest_transducer_loss(
        model, *heard, temperature=2.0, prune_range=prune_range, simple_scale=0.3
    )
    expected = naive_transducer(
        lambda x, y: recipe_loss(model, x, y, prune_range, 0.3), heard, 2.0
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grads_of(found, inputs), grads_of(expected, inputs), rtol=1e-4, atol=1e-4
    )


def test_one_hypothesis_gives_the_recipes_own_loss(make_model, features):
    model = make_model(seed=1).eval()
    with torch.no_grad():
        encoder_out, lens = model.forward_encoder(*features)
    y = [[3, 4, 3, 8, 9, 2], [5, 6], [7]]
    simple, pruned = model.forward_transducer(encoder_out, lens, y, prune_range=5)
    found = nbest_transducer_loss(model, encoder_out, [[(k, -1.0)] for k in y], lens)
    torch.testing.assert_close(found, pruned + 0.5 * simple)


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_the_transducer_does_not_read_padding(student, heard, value):
    encoder_out, nbest, lens = heard
    expected = nbest_transducer_loss(student, *heard)
    (expected_grad,) = grads_of(expected, [encoder_out])
    padding = torch.arange(9) >= lens.unsqueeze(1)
    dirty = encoder_out.detach().masked_fill(padding.unsqueeze(-1), value)
    dirty = torch.nn.functional.pad(dirty, (0, 0, 0, 2), value=value).requires_grad_()
    found = nbest_transducer_loss(student, dirty, nbest, lens)
    inputs = [dirty, *parts_of(student)]
    grad, *others = grads_of(found, inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grad[:, :9], expected_grad)
    assert grad[:, :9][padding].eq(0).all() and grad[:, 9:].eq(0).all()
    assert all(torch.isfinite(g).all() for g in others)


def test_transducer_hypotheses_that_do_not_fit_leave_their_weight_to_the_others(
    student, heard
):
    encoder_out, nbest, lens = heard
    fit = [[h for h in hyps if 0 < len(h[0]) < 8] for hyps in nbest]
    assert [len(x) for x in fit] == [2, 0, 3]
    found = nbest_transducer_loss(student, encoder_out, nbest, lens)
    expected = nbest_transducer_loss(student, encoder_out, fit, lens)
    torch.testing.assert_close(found, expected)
    # As many tokens as frames fit.
    assert (
        nbest_transducer_loss(student, encoder_out, [[], [], [([1] * 7, 0.0)]], lens)
        > 0
    )


def test_the_transducer_of_no_hypotheses_is_0_with_zero_gradient(student, heard):
    encoder_out, _, lens = heard
    for nbest in ([[], [], []], [[([], 0.0)], [([1] * 5, 0.0)], []]):
        value = nbest_transducer_loss(student, encoder_out, nbest, lens)
        (grad,) = torch.autograd.grad(value, encoder_out)
        assert value == 0 and grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transducer_within_autocast_is_float32_finite_and_near(
    make_model, heard, dtype
):
    model = make_model(seed=2).eval()
    encoder_out, nbest, lens = heard
    expected = nbest_transducer_loss(model, encoder_out.float(), nbest, lens)
    encoder_out = encoder_out.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nbest_transducer_loss(model, encoder_out, nbest, lens)
        nothing = nbest_transducer_loss(model, encoder_out, [[], [], []], lens)
    assert found.dtype == nothing.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)
    grads = grads_of(found, [encoder_out, *parts_of(model)])
    assert all(torch.isfinite(g).all() for g in grads) and grads[0].abs().max() > 0
    outside = nbest_transducer_loss(model, encoder_out, nbest, lens)
    torch.testing.assert_close(outside, expected, rtol=0.02, atol=0.1)


# Refusals


def refused(match, loss, *args, **options):
    with pytest.raises(KDError, match=match) as e:
        loss(*args, **options)
    assert "\n" not in str(e.value)


@pytest.fixture(params=["ctc", "transducer"])
def call(request, make_model):
    """Either loss, of a student of 11 symbols, and frames that fit it."""
    x = torch.zeros(2, 5, 24 if request.param == "transducer" else 11)
    if request.param == "ctc":
        return nbest_ctc_loss, x
    model = make_model(seed=2)
    return lambda *args, **options: nbest_transducer_loss(model, *args, **options), x


@pytest.mark.parametrize("token", [11, -1, 0])
def test_tokens_that_the_student_lacks_are_refused(call, token):
    loss, x = call
    nbest = [[], [([3], 0.0), ([4, token], -1.0)]]
    message = f"utterance 1 has the token {token}, and the student's are 0 to 10"
    refused(message, loss, x, nbest, torch.tensor([5, 5]))


def test_bad_input_is_refused(call):
    loss, x = call
    lens, nbest = torch.tensor([5, 4]), [[([3], 0.0)], [([4], -1.0)]]
    refused("lists of 1 utterances and the batch has 2", loss, x, nbest[:1], lens)
    for temperature in (0, -1.0, NAN):
        refused("temperature.? is", loss, x, nbest, lens, temperature=temperature)
    refused("lengths go up to 6", loss, x, nbest, torch.tensor([5, 6]))
    refused("have shape", loss, x[0], nbest, lens)
    refused("finite", loss, x, [[([3], NAN)], []], lens)
    for value in (NAN, INF):
        bad = x.clone()
        bad[1, 3, 2] = value
        refused(r"shape \(2, 5, \d\d\), are not finite", loss, bad, nbest, lens)


def test_a_transducer_loss_refuses_what_it_cannot_do(make_model):
    x, lens = torch.zeros(1, 5, 24), torch.tensor([5])
    refused(
        "prune_range` is 1",
        nbest_transducer_loss,
        make_model(),
        x,
        [[([3, 4], 0.0)]],
        lens,
        prune_range=1,
    )
    model = make_model(use_transducer=False, use_ctc=True)
    refused("AsrModel has no decoder", nbest_transducer_loss, model, x, [[]], lens)

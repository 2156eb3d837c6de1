"""Forms of transducer KD: naive twins, the equal pair, padding, dtypes, draws, one head
alone, the full lattice."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joiner_cases import (
    ALL,
    INF,
    NAN,
    ROWWISE,
    case,
    in_dtype,
    kl,
    naive,
    value_and_grads,
)

from icefall_kd.losses.nodes import nodes_of
from icefall_kd.losses.transducer import (
    nodes_kd_loss,
    total_kd_loss,
    transducer_kd_loss,
)
from icefall_kd.tap import ModelTap
from icefall_kd.types import SparseDistribution


@pytest.mark.parametrize("form", ALL)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 3),
    t=st.integers(1, 5),
    u=st.integers(0, 3),
    v=st.integers(2, 7),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    occupancy=st.booleans(),
)
def test_equals_the_naive_twin(form, seed, n, t, u, v, temperature, occupancy):
    c = case(seed, n, t, u, v, kept=0.8)
    if not len(c.nodes):
        return
    found = value_and_grads(c.loss(form, temperature, occupancy), c.inputs)
    expected = value_and_grads(naive(c, form, temperature, occupancy), c.inputs)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", ALL)
def test_gradcheck(form):
    c = case(n=2, t=3, u=2, v=4)
    leaves = (c.encoder_out, c.decoder_out, c.ctc)
    assert torch.autograd.gradcheck(
        lambda e, d, z: replace(c, encoder_out=e, decoder_out=d, ctc=z).loss(form, 2.0),
        leaves,
    )


@pytest.mark.parametrize("form", ALL)
def test_a_student_that_equals_its_teacher_has_zero_loss_and_gradient(form):
    c = case()
    own = c.student().logits().detach()
    c = replace(c, nodes=replace(c.nodes, teacher=own), teacher_ctc=c.ctc.detach())
    value, grads = value_and_grads(c.loss(form, 2.0), c.inputs)
    assert abs(float(value)) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in grads)


@pytest.mark.parametrize("form", ALL)
def test_nan_in_padding_changes_neither_value_nor_gradient(form):
    c = case()
    expected = value_and_grads(c.loss(form), c.inputs)

    def spoilt(x, index):
        """NaN wherever no node stands, and in three frames or labels more."""
        used = torch.zeros(x.shape[:2], dtype=torch.bool)
        used[c.nodes.row, index] = True
        x = x.detach().masked_fill(~used.unsqueeze(-1), NAN)
        return torch.nn.functional.pad(x, (0, 0, 0, 3), value=NAN).requires_grad_()

    frame, position = c.nodes.frame, c.nodes.position
    padded = replace(
        c,
        encoder_out=spoilt(c.encoder_out, frame),
        decoder_out=spoilt(c.decoder_out, position),
        ctc=spoilt(c.ctc, frame),
        teacher_ctc=spoilt(c.teacher_ctc, frame).detach(),
    )
    value, grads = value_and_grads(padded.loss(form), padded.inputs)
    cut = [g[:, : x.size(1)] if g.ndim == 3 else g for g, x in zip(grads, c.inputs)]
    torch.testing.assert_close((value, cut), expected)
    rest = [g[:, x.size(1) :] for g, x in zip(grads, c.inputs) if g.ndim == 3]
    assert all(g.eq(0).all() for g in rest)


@pytest.mark.parametrize("form", ALL)
def test_no_nodes_give_0_with_zero_gradient(form):
    c = case()
    c = replace(c, nodes=c.nodes.select(torch.zeros(0, dtype=torch.int64)))
    value, grads = value_and_grads(c.loss(form), c.inputs)
    assert value == 0 and all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_symbols_that_the_teacher_rules_out_leave_the_loss_finite(form, dtype):
    c = in_dtype(case(dtype=torch.float32), dtype)
    teacher = c.nodes.teacher.clone()
    teacher[:, 2] = -INF  # a label of some nodes, and for good in every mean
    teacher[::2, 0] = -INF  # blank
    ctc = c.teacher_ctc.clone()
    ctc[..., 3] = -INF
    c = replace(c, nodes=replace(c.nodes, teacher=teacher), teacher_ctc=ctc)
    value, grads = value_and_grads(c.loss(form), c.inputs)
    assert torch.isfinite(value) and value > 0
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_student_is_close_to_float32(form, dtype):
    wide = case(dtype=torch.float32)
    expected, _ = value_and_grads(wide.loss(form), wide.inputs)
    c = in_dtype(wide, dtype)
    try:
        c.joiner.encoder_proj(c.encoder_out)
    except RuntimeError:
        pytest.skip("this torch has no float16 layers on a CPU")
    value, grads = value_and_grads(c.loss(form), c.inputs)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=5e-2, atol=0)
    assert all(torch.isfinite(g).all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("form", ALL)
def test_autocast_leaves_the_loss_in_float32(form):
    wide = case(dtype=torch.float32)
    expected = value_and_grads(wide.loss(form), wide.inputs)
    student = wide.student()
    assert student.states.dtype == torch.float32  # made: autocast has the loss alone
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone, value = wide.loss(form, student=student), wide.loss(form)
    assert alone.dtype == value.dtype == torch.float32
    torch.testing.assert_close(value_and_grads(alone, wide.inputs), expected)
    value, grads = value_and_grads(value, wide.inputs)
    torch.testing.assert_close(value, expected[0], rtol=5e-2, atol=0)
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("form", ROWWISE)
def test_a_sparse_teacher_of_all_symbols_gives_the_dense_loss(form):
    c = case()
    log_probs = (c.nodes.teacher / 2).log_softmax(-1)
    order = log_probs.argsort(-1)
    tail = torch.full((len(order),), -INF)
    kept = SparseDistribution(order, log_probs.gather(1, order), tail)
    kept = replace(c, nodes=replace(c.nodes, teacher=kept))
    results = [value_and_grads(x.loss(form, 2.0), x.inputs) for x in (c, kept)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_total_of_one_head_alone_is_that_heads_loss(share):
    c = case()
    teacher_ctc = c.teacher_ctc.clone()
    teacher_ctc[:, :, 1] = -INF if share == 0 else 0.0  # 0 * -inf is no NaN
    found = total_kd_loss(
        c.student(), c.ctc, teacher_ctc, temperature=2.0, ctc_share=share
    )
    if share == 0:
        expected = c.loss("mean_u", 2.0)
    else:
        frames = set(zip(c.nodes.row.tolist(), c.nodes.frame.tolist()))
        expected = sum(kl(teacher_ctc[f], c.ctc[f], 2.0) for f in frames)
    torch.testing.assert_close(found, expected)


# Draws


@pytest.mark.parametrize("occupancy", [True, False])
def test_draws_are_the_nodes_loss_in_expectation(occupancy):
    c = case(seed=3)
    student = c.student()
    expected = float(
        nodes_kd_loss(student, node_weighting="occupancy" if occupancy else "equal")
    )
    g = torch.Generator().manual_seed(1)
    draws = torch.stack(
        [
            nodes_kd_loss(
                student,
                temperature=1.0,
                form="sampled_u",
                generator=g,
                node_weighting="occupancy" if occupancy else "equal",
            ).detach()
            for _ in range(2000)
        ]
    )
    error = float(draws.std()) / math.sqrt(len(draws))
    assert 0 < error < 0.02 * expected
    assert abs(float(draws.mean()) - expected) < 4 * error


def test_draws_repeat_with_their_generator_and_follow_torchs_seed():
    c = case()
    values = [float(c.loss("sampled_u", seed=seed)) for seed in (1, 1, 2, 3)]
    assert values[0] == values[1] and len(set(values)) == 3
    torch.manual_seed(4)
    first = nodes_kd_loss(c.student(), form="sampled_u")
    torch.manual_seed(4)
    assert nodes_kd_loss(c.student(), form="sampled_u") == first


# Lattices of a real model

Y = [[3, 4, 3], [5, 6], [7]]


def full_logits(model, features):
    """(N, T, U + 1, V), by the joiner's own forward, and the lengths."""
    with ModelTap(model) as hook:
        out = hook.encode(*features)
    y = torch.tensor([[0, *row, *[0] * (3 - len(row))] for row in Y])
    decoder_out = model.eval().decoder(y).detach()
    states = out.encoder_out, out.encoder_out_lens, decoder_out
    pair = out.encoder_out.unsqueeze(2), decoder_out.unsqueeze(1)
    pair = [x.expand(-1, out.encoder_out.size(1), 4, -1) for x in pair]
    return states, model.joiner(*pair).detach()


@pytest.mark.parametrize("s_range", [4, 9])
@pytest.mark.parametrize("form", ["nodes", "collapsed", "mean_u"])
def test_a_range_over_all_labels_gives_the_full_lattices_loss(
    make_model, features, lattice_of, s_range, form, monkeypatch
):
    monkeypatch.setattr("icefall_kd.lattice.LEAST_OCCUPANCY", 0.0)
    student = make_model(seed=2)
    states, logits = full_logits(student, features)
    _, taught = full_logits(make_model(seed=1), features)
    nodes = nodes_of(lattice_of(Y, 1, s_range))
    found = transducer_kd_loss(
        student.joiner,
        states[0],
        states[2],
        nodes,
        states[1],
        form=form,
        node_weighting="equal",
    )
    expected = 0.0
    for n, (t, y) in enumerate(zip(states[1].tolist(), Y)):
        p, q = taught[n, :t, : len(y) + 1], logits[n, :t, : len(y) + 1]
        if form == "mean_u":
            p, q = p.mean(1, keepdim=True), q.mean(1, keepdim=True)
        for i in range(t):
            for j in range(p.size(1)):
                classes = [0] + y[j : j + 1] if form == "collapsed" else None
                expected += float(kl(p[i, j], q[i, j], 1.0, classes))
    assert float(found) == pytest.approx(expected, rel=1e-4)
    pruned = transducer_kd_loss(
        student.joiner,
        states[0],
        states[2],
        nodes_of(lattice_of(Y, 1, 2)),
        states[1],
        form=form,
        node_weighting="equal",
    )
    assert float(pruned) != pytest.approx(expected, rel=1e-3)

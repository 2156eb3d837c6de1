"""Forms of transducer KD: naive twins, the equal pair, padding, dtypes, one joiner
evaluation for all, draws, the best path, the full lattice."""

import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icefall_kd.errors import KDError
from icefall_kd.losses.nodes import nodes_of
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.losses.transducer import (
    FORMS,
    nodes_kd_loss,
    total_kd_loss,
    transducer_kd_loss,
)
from icefall_kd.tap import ModelTap
from icefall_kd.types import Nodes, SparseDistribution

# Forms in which whether a node emits has a weight of its own.
BLANK_WEIGHTS = {
    "nodes without blank": ("nodes", 0.0),
    "nodes, blank 3 times": ("nodes", 3.0),
    "sampled_u without blank": ("sampled_u", 0.0),
    "sampled_u, blank 0.3 times": ("sampled_u", 0.3),
}
ALL = (*FORMS, "total", *BLANK_WEIGHTS)
ROWWISE = ("nodes", "collapsed", "sampled_u", *BLANK_WEIGHTS)  # take a sparse teacher
SHARE = 0.3
INF, NAN = math.inf, math.nan


class Joiner(torch.nn.Module):
    def __init__(self, v):
        super().__init__()
        self.encoder_proj = torch.nn.Linear(3, 4)
        self.decoder_proj = torch.nn.Linear(2, 4)
        self.output_linear = torch.nn.Linear(4, v)


@dataclass
class Case:
    joiner: Joiner
    encoder_out: torch.Tensor
    lens: torch.Tensor
    decoder_out: torch.Tensor
    nodes: Nodes
    ctc: torch.Tensor
    teacher_ctc: torch.Tensor

    @property
    def inputs(self):
        return [self.encoder_out, self.decoder_out, *self.joiner.parameters(), self.ctc]

    def student(self):
        return StudentNodes(
            self.joiner, self.encoder_out, self.decoder_out, self.nodes, self.lens
        )

    def loss(self, form, temperature=1.0, occupancy=True, seed=5, student=None):
        student = student or self.student()
        if form == "total":
            ctc = self.ctc, self.teacher_ctc
            return total_kd_loss(
                student, *ctc, temperature=temperature, ctc_share=SHARE
            )
        g = torch.Generator().manual_seed(seed)
        form, blank_weight = BLANK_WEIGHTS.get(form, (form, 1.0))
        return nodes_kd_loss(
            student,
            temperature=temperature,
            form=form,
            blank_weight=blank_weight,
            generator=g,
            node_weighting="occupancy" if occupancy else "equal",
        )


def case(seed=0, n=3, t=5, u=3, v=6, dtype=torch.float64, kept=0.7):
    """Utterances of up to t frames and u labels; some of all (t, u) are nodes."""
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, t + 1, (n,), generator=g)
    labels = torch.randint(0, u + 1, (n,), generator=g)
    symbols = torch.randint(1, v, (n, u + 1), generator=g)
    there = torch.rand(n, t, u + 1, generator=g) < kept
    there &= torch.arange(t)[:, None] < lens[:, None, None]
    there &= torch.arange(u + 1) <= labels[:, None, None]
    row, frame, position = there.nonzero(as_tuple=True)
    nodes = Nodes(
        row,
        frame,
        position,
        symbols[row, position].masked_fill(position == labels[row], -1),
        torch.rand(len(row), generator=g, dtype=torch.float64).to(dtype),
        2 * torch.randn(len(row), v, generator=g, dtype=torch.float64).to(dtype),
    )
    torch.manual_seed(seed)
    joiner = Joiner(v).to(dtype)
    shapes = ((n, t, 3), (n, u + 1, 2), (n, t, v), (n, t, v))
    x, y, ctc, teacher_ctc = (
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes
    )
    leaves = (x.requires_grad_(), lens, y.requires_grad_(), nodes)
    return Case(joiner, *leaves, ctc.requires_grad_(), teacher_ctc)


def moved(given, dtype):
    """The same student in another type; the teacher stays."""
    torch.manual_seed(0)
    joiner = Joiner(given.joiner.output_linear.out_features)
    joiner.load_state_dict(given.joiner.state_dict())
    leaves = {
        f: getattr(given, f).detach().to(dtype).requires_grad_()
        for f in ("encoder_out", "decoder_out", "ctc")
    }
    return replace(given, joiner=joiner.to(dtype), **leaves)


def value_and_grads(value, inputs):
    # An input that a form doesn't read has no gradient.
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    none = [torch.zeros_like(x) for x in inputs]
    return value.detach(), [z if g is None else g for g, z in zip(grads, none)]


def kl(teacher, student, temperature, classes=None, blank_weight=1.0):
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    if blank_weight != 1:
        parts = [torch.stack((x[0], x[1:].sum())) for x in (p, q)]
        of_blank = (parts[0] * (parts[0] / parts[1]).log()).sum()
        r, s = (x[1:] / x[1:].sum() for x in (q, p))
        of_symbols = p[1:].sum() * (s * (s / r).log()).sum()
        return temperature**2 * (blank_weight * of_blank + of_symbols)
    if classes is not None:
        rest = [i for i in range(len(p)) if i not in classes]
        p, q = (
            torch.stack([*x[classes], *[x[rest].sum()] * bool(rest)]) for x in (p, q)
        )
    return temperature**2 * (p * (p / q).log()).sum()


def naive(c, form, temperature=1.0, occupancy=True, seed=5):
    """Node by node, frame by frame."""
    form, blank_weight = BLANK_WEIGHTS.get(form, (form, 1.0))
    h = [
        c.joiner.encoder_proj(c.encoder_out[n, t])
        + c.joiner.decoder_proj(c.decoder_out[n, u])
        for n, t, u in zip(c.nodes.row, c.nodes.frame, c.nodes.position)
    ]
    logits = [c.joiner.output_linear(x.tanh()) for x in h]
    taught, total = c.nodes.teacher, 0.0
    weights = c.nodes.occupancy if occupancy else torch.ones(len(h))
    frames = {}
    for r, where in enumerate(zip(c.nodes.row.tolist(), c.nodes.frame.tolist())):
        frames.setdefault(where, []).append(r)
    chance = torch.rand(
        len(frames),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    for i, ((n, t), mine) in enumerate(sorted(frames.items())):
        if form in ("mean_u", "total"):
            p = taught[mine].mean(0)
            q = torch.stack([logits[r] for r in mine]).mean(0)
            if form == "total":
                p = SHARE * c.teacher_ctc[n, t] + (1 - SHARE) * p
                q = SHARE * c.ctc[n, t] + (1 - SHARE) * q
            total = total + kl(p, q, temperature)
        elif form == "sampled_u":
            mass = weights[mine].double().cumsum(0)
            k = int((mass <= chance[i] * mass[-1]).sum())
            total = total + mass[-1] * kl(
                taught[mine[k]],
                logits[mine[k]],
                temperature,
                blank_weight=blank_weight,
            )
        else:
            for r in mine:
                label = int(c.nodes.label[r])
                classes = None if form == "nodes" else [0] + [label] * (label >= 0)
                total = total + weights[r] * kl(
                    taught[r], logits[r], temperature, classes, blank_weight
                )
    return total


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
    c = moved(case(dtype=torch.float32), dtype)
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
    c = moved(wide, dtype)
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


# One evaluation of the joiner


def test_several_losses_evaluate_the_joiner_once():
    c, calls = case(), Counter()
    for name, module in c.joiner.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    student = c.student()
    values = [nodes_kd_loss(student, form=form) for form in FORMS]
    assert calls == {"encoder_proj": 1, "decoder_proj": 1}  # no logits yet
    student.logits()
    again = [nodes_kd_loss(student, form=form) for form in FORMS[:3]]
    assert student.logits() is student.logits()
    assert set(calls.values()) == {1} and len(calls) == 3
    torch.testing.assert_close(again, values[:3])


@pytest.mark.parametrize("made", [True, False])
def test_logits_and_fused_layer_give_one_gradient(made):
    c = case()
    student = c.student()
    if made:
        student.logits()
    weights = c.nodes.occupancy
    found = value_and_grads(
        student.kl(c.nodes.teacher, temperature=2.0, weights=weights), c.inputs
    )
    torch.testing.assert_close(found, value_and_grads(c.loss("nodes", 2.0), c.inputs))


@pytest.mark.parametrize("asked", ["nothing", "states", "logits"])
def test_a_selection_is_the_student_at_these_nodes(asked):
    c, index = case(), torch.tensor([4, 0, 2])
    student = c.student()
    if asked != "nothing":
        assert len(student.states) == len(c.nodes)
    if asked == "logits":
        student.logits()
    some = student.select(index)
    torch.testing.assert_close(some.logits(), c.student().logits()[index])
    assert torch.equal(some.nodes.teacher, c.nodes.teacher[index])
    assert len(student.nodes) == len(c.nodes)


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


def test_the_joiner_is_asked_at_the_drawn_nodes_alone():
    c = case()
    student, some = c.student(), []
    select = student.select
    student.select = lambda index: some.append(select(index)) or some[0]
    nodes_kd_loss(student, form="sampled_u").backward()
    frames = set(zip(c.nodes.row.tolist(), c.nodes.frame.tolist()))
    assert len(some[0].states) == len(frames) < len(c.nodes)
    assert student._states is None
    drawn = zip(some[0].nodes.row.tolist(), some[0].nodes.frame.tolist())
    assert sorted(drawn) == sorted(frames)


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


# Refusals


def refused(match, c, form="nodes", **options):
    with pytest.raises(KDError, match=match) as e:
        c.loss(form, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("form", ["mean_u", "total"])
def test_a_sparse_teacher_has_no_mean_of_logits(form):
    c = case()
    kept = SparseDistribution(
        c.nodes.label.clamp(min=0)[:, None],
        torch.full((len(c.nodes), 1), -1.0),
        torch.full((len(c.nodes),), -0.4),
    )
    c = replace(c, nodes=replace(c.nodes, teacher=kept))
    refused(f"form {form} .* has 1 a node: store it as dense", c, form)


def test_total_refuses_ctc_outputs_that_do_not_fit():
    c = case()
    few = SparseDistribution(*(torch.zeros(3, 5, 2) for _ in range(3)))
    refused("have 2 a frame: store them as dense", replace(c, teacher_ctc=few), ALL[4])
    other = replace(c, teacher_ctc=torch.zeros(3, 5, 7))
    refused("teacher's CTC head has 7 tokens and the student's joiner 6", other, ALL[4])
    other = replace(c, ctc=torch.zeros(3, 5, 5))
    refused("student's CTC head has 5 tokens", other, ALL[4])
    last = int(c.nodes.frame.max())
    short = replace(c, teacher_ctc=c.teacher_ctc[:, :last])
    refused(
        rf"frame {last}, and the teacher's CTC output .*\(3, {last}, 6", short, ALL[4]
    )
    refused("temperature.? is 0", c, ALL[4], temperature=0)
    with pytest.raises(KDError, match="ctc_share. is 1.5"):
        total_kd_loss(c.student(), c.ctc, c.teacher_ctc, temperature=1.0, ctc_share=1.5)


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


@pytest.mark.parametrize("form", ALL)
def test_nan_in_the_student_is_refused_by_name(form):
    c = case()
    spoilt = c.encoder_out.detach().clone()
    spoilt[c.nodes.row[0], c.nodes.frame[0], 1] = NAN
    c = replace(c, encoder_out=spoilt)
    # One frame alone, so that every form reads it.
    c = replace(c, nodes=c.nodes.select(torch.tensor([0])))
    refused(r"student's joiner states of shape \(1, 4\) have NaN", c, form)


def test_nan_in_logits_is_refused_by_name():
    c = case()
    with torch.no_grad():
        c.joiner.output_linear.bias[2] = NAN
    with pytest.raises(KDError, match=rf"joiner logits of shape \({len(c.nodes)}, 6\)"):
        c.student().logits()
    c = case()
    spoilt = replace(c, ctc=torch.full_like(c.ctc, NAN))
    refused("CTC logits at the lattice's frames of shape", spoilt, "total")

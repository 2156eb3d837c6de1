"""Transducer KD: naive twins, lattices of a real model, stored nodes, refusals."""

import dataclasses

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.losses.nodes import collapse
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.losses.transducer import nodes_kd_loss, transducer_kd_loss
from icefall_kd.types import SparseDistribution

BLANKS = [0, 4]


class Joiner(torch.nn.Module):
    def __init__(self, c=5, d=4, j=6, v=7):
        super().__init__()
        self.encoder_proj = torch.nn.Linear(c, j)
        self.decoder_proj = torch.nn.Linear(d, j)
        self.output_linear = torch.nn.Linear(j, v)


@pytest.fixture
def joiner():
    torch.manual_seed(0)
    return Joiner().double()


@pytest.fixture
def states():
    """Encoder output of 5 frames, 5 and 4 valid; decoder output of 3 labels."""
    g = torch.Generator().manual_seed(1)
    shapes = ((2, 5, 5), (2, 4, 4))
    encoder_out, decoder_out = (
        torch.randn(s, generator=g, dtype=torch.float64).requires_grad_()
        for s in shapes
    )
    return encoder_out, torch.tensor([5, 4]), decoder_out


def sparse_of(nodes, k, temperature):
    log_probs = (nodes.teacher / temperature).log_softmax(-1)
    top, indices = log_probs.topk(k, -1)
    tail = log_probs.scatter(1, indices, -torch.inf).logsumexp(-1)
    return dataclasses.replace(nodes, teacher=SparseDistribution(indices, top, tail))


def naive(
    joiner,
    states,
    nodes,
    temperature,
    form,
    blank_id=0,
    node_weighting="occupancy",
    blank_weight=1.0,
):
    """Node by node, class by class; in two parts where blank has a weight."""
    encoder_out, _, decoder_out = states
    total = 0.0
    for r in range(len(nodes)):
        n, t, u = int(nodes.row[r]), int(nodes.frame[r]), int(nodes.position[r])
        h = joiner.encoder_proj(encoder_out[n, t]) + joiner.decoder_proj(
            decoder_out[n, u]
        )
        q = (joiner.output_linear(h.tanh()) / temperature).softmax(-1)
        p = (nodes.teacher[r] / temperature).softmax(-1)
        if form == "collapsed":
            alone = [blank_id] + [int(nodes.label[r])] * bool(nodes.label[r] >= 0)
            rest = [i for i in range(7) if i not in alone]
            p, q = (
                torch.stack([*(x[i] for i in alone), x[rest].sum()]) for x in (p, q)
            )
        weight = nodes.occupancy[r] if node_weighting == "occupancy" else 1.0
        kl = (p * (p / q).log()).sum()
        if blank_weight != 1:
            (b, b_q), symbols = (p[blank_id], q[blank_id]), torch.arange(7) != blank_id
            p, q = p[symbols] / (1 - b), q[symbols] / (1 - b_q)
            of_blank = b * (b / b_q).log() + (1 - b) * ((1 - b) / (1 - b_q)).log()
            kl = blank_weight * of_blank + (1 - b) * (p * (p / q).log()).sum()
        total = total + weight * temperature**2 * kl
    return total


def value_and_grads(value, inputs):
    return value.detach(), torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("blank_id", BLANKS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("node_weighting", ["occupancy", "equal"])
@pytest.mark.parametrize("form", ["nodes", "collapsed"])
def test_equals_the_naive_twin(
    joiner, states, nodes, form, temperature, node_weighting, blank_id
):
    inputs = (states[0], states[2], *joiner.parameters())
    options = dict(form=form, node_weighting=node_weighting, blank_id=blank_id)
    found = transducer_kd_loss(
        joiner,
        states[0],
        states[2],
        nodes,
        states[1],
        temperature=temperature,
        **options,
    )
    expected = naive(joiner, states, nodes, temperature, **options)
    torch.testing.assert_close(
        value_and_grads(found, inputs), value_and_grads(expected, inputs)
    )


@pytest.mark.parametrize("blank_id", BLANKS)
@pytest.mark.parametrize("blank_weight", [0.0, 0.3, 2])
def test_a_weight_of_blank_equals_the_naive_twin(
    joiner, states, nodes, blank_weight, blank_id
):
    """Also where the logits are computed already, and of a sparse teacher of all."""
    inputs = (states[0], states[2], *joiner.parameters())
    options = dict(blank_weight=blank_weight, blank_id=blank_id)
    twin = naive(joiner, states, nodes, 2.5, "nodes", **options)
    expected = value_and_grads(twin, inputs)
    for given in (nodes, sparse_of(nodes, 7, 2.5)):
        for keeps_logits in (False, True):
            student = StudentNodes(joiner, states[0], states[2], given, states[1])
            assert not keeps_logits or student.logits().size(1) == 7
            found = nodes_kd_loss(student, temperature=2.5, **options)
            torch.testing.assert_close(value_and_grads(found, inputs), expected)


def test_without_a_weight_of_blank_a_student_may_emit_when_it_likes(
    joiner, states, nodes
):
    """One that is wrong in blank alone learns nothing, and in the symbols something."""
    h = joiner.encoder_proj(states[0])[nodes.row, nodes.frame]
    h = (h + joiner.decoder_proj(states[2])[nodes.row, nodes.position]).tanh()
    teacher = joiner.output_linear(h).detach()
    teacher[:, 0] += torch.arange(5.0) - 2
    late = dataclasses.replace(nodes, teacher=teacher)
    args = (joiner, states[0], states[2])
    value = transducer_kd_loss(*args, late, states[1], blank_weight=0)
    grads = torch.autograd.grad(value, (states[0], states[2], *joiner.parameters()))
    assert abs(float(value.detach())) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in grads)
    assert transducer_kd_loss(*args, late, states[1]) > 0.01
    assert transducer_kd_loss(*args, nodes, states[1], blank_weight=0) > 0.01


@pytest.mark.parametrize("blank_id", BLANKS)
@pytest.mark.parametrize("form", ["nodes", "collapsed"])
def test_a_sparse_teacher_of_all_symbols_gives_the_dense_loss(
    joiner, states, nodes, form, blank_id
):
    inputs = (states[0], states[2], *joiner.parameters())
    results = [
        value_and_grads(
            transducer_kd_loss(
                joiner,
                states[0],
                states[2],
                given,
                states[1],
                temperature=2.0,
                form=form,
                blank_id=blank_id,
            ),
            inputs,
        )
        for given in (nodes, sparse_of(nodes, 7, 2.0))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("blank_id", BLANKS)
@pytest.mark.parametrize("k", [1, 3])
def test_collapsed_sparse_rows_are_distributions_and_coarser_than_dense(
    joiner, states, nodes, k, blank_id
):
    given = sparse_of(nodes, k, 1.0)
    found = collapse(given, blank_id).teacher
    mass = found.log_probs.exp().sum(-1) + found.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))
    values = [
        transducer_kd_loss(
            joiner,
            states[0],
            states[2],
            x,
            states[1],
            form="collapsed",
            blank_id=blank_id,
        )
        for x in (given, nodes)
    ]
    assert 0 <= values[0] <= values[1] + 1e-9


def test_gradcheck(joiner, states, nodes):
    encoder_out, lens, decoder_out = states
    assert torch.autograd.gradcheck(
        lambda e, d: transducer_kd_loss(joiner, e, d, nodes, lens, temperature=2.0),
        (encoder_out, decoder_out),
    )


@pytest.mark.parametrize(
    "options", [{}, {"form": "collapsed"}, {"blank_weight": 0.3}], ids=str
)
def test_an_equal_pair_gives_0_with_zero_gradient(joiner, states, nodes, options):
    encoder_out, lens, decoder_out = states
    h = joiner.encoder_proj(encoder_out)[nodes.row, nodes.frame]
    h = (h + joiner.decoder_proj(decoder_out)[nodes.row, nodes.position]).tanh()
    equal = dataclasses.replace(nodes, teacher=joiner.output_linear(h).detach())
    value = transducer_kd_loss(
        joiner, states[0], states[2], equal, states[1], **options
    )
    grads = torch.autograd.grad(value, (encoder_out, decoder_out, *joiner.parameters()))
    assert abs(float(value.detach())) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in grads)


def test_more_padding_changes_nothing(joiner, states, nodes):
    encoder_out, lens, decoder_out = states
    expected = transducer_kd_loss(joiner, states[0], states[2], nodes, states[1])
    encoder_out = torch.nn.functional.pad(encoder_out, (0, 0, 0, 3), value=torch.nan)
    decoder_out = torch.nn.functional.pad(decoder_out, (0, 0, 0, 2), value=torch.nan)
    encoder_out = encoder_out.detach().requires_grad_()
    found = transducer_kd_loss(joiner, encoder_out, decoder_out, nodes, lens)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert encoder_out.grad[:, 5:].eq(0).all()


def test_no_nodes_give_0_with_zero_gradient(joiner, states, nodes):
    none = nodes.select(torch.zeros(0, dtype=torch.int64))
    value = transducer_kd_loss(joiner, states[0], states[2], none, states[1])
    value.backward()
    assert value == 0 and states[0].grad.eq(0).all()
    assert joiner.output_linear.weight.grad.eq(0).all()


# Refusals


def refused(joiner, states, nodes, match, **options):
    with pytest.raises(KDError, match=match) as e:
        transducer_kd_loss(joiner, states[0], states[2], nodes, states[1], **options)
    assert "\n" not in str(e.value)


def test_nodes_outside_the_student_are_refused(joiner, states, nodes):
    def changed(**changes):
        return dataclasses.replace(nodes, **changes)

    far = torch.tensor([0, 5, 3, 2, 0])
    refused(joiner, states, changed(frame=far), "frame 5, and the student has 5")
    padded = torch.tensor([0, 4, 4, 2, 0])
    refused(joiner, states, changed(frame=padded), "beyond the student's .5, 4.")
    high = torch.tensor([0, 1, 2, 4, 1])
    refused(joiner, states, changed(position=high), "label position 4")
    row = torch.tensor([0, 0, 1, 1, 2])
    refused(joiner, states, changed(row=row), "utterance 2")


def test_another_vocabulary_is_refused(joiner, states, nodes):
    other = dataclasses.replace(nodes, teacher=torch.zeros(5, 8))
    refused(joiner, states, other, "joiner has 7 tokens and the teacher's lattice 8")
    kept = SparseDistribution(
        torch.full((5, 1), 7), torch.zeros(5, 1), torch.full((5,), -torch.inf)
    )
    refused(joiner, states, dataclasses.replace(nodes, teacher=kept), "7 tokens.* 8")


def test_bad_options_are_refused(joiner, states, nodes):
    refused(joiner, states, nodes, "form` is 'full'", form="full")
    refused(joiner, states, nodes, "node_weighting` is 'all'", node_weighting="all")
    refused(joiner, states, nodes, "temperature.? is 0", temperature=0)
    for weight in (-0.5, float("inf"), float("nan"), "1"):
        refused(joiner, states, nodes, "blank_weight` is", blank_weight=weight)
    for form in ("collapsed", "mean_u"):
        match = f"blank_weight` is 0 and `form` {form}"
        refused(joiner, states, nodes, match, form=form, blank_weight=0)

"""full_sum_kd_loss: all alignments counted one by one, the equal pair, padding, no
complete path, dtypes, the engine's own losses, refusals."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.lattice import path_sums
from icefall_kd.losses.full_sum import full_sum_kd_loss
from icefall_kd.losses.nodes import collapse, nodes_of, shift
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.losses.transducer import nodes_kd_loss
from icefall_kd.rnnt import get_engine
from icefall_kd.tap import ModelTap
from icefall_kd.types import Nodes, SparseDistribution

INF, NAN = math.inf, math.nan
V = 5
FAR, NEAR = 3.0, 0.05  # scales of logits: distances of above and below 1 nat


class Joiner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_proj = torch.nn.Linear(3, 4)
        self.decoder_proj = torch.nn.Linear(2, 4)
        self.output_linear = torch.nn.Linear(4, V)


def joiner_of(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Joiner().to(dtype)


def lattice(seed=0, sizes=((4, 3), (1, 1), (3, 2)), width=9, scale=FAR, blank_id=0):
    """Nodes of utterances of (T, U), in a band of ``width`` labels a frame, and the
    student's encoder and decoder output with their lengths."""
    g = torch.Generator().manual_seed(seed)
    where, labels = [], []
    for n, (t, u) in enumerate(sizes):
        y = [(blank_id + i) % V for i in torch.randint(1, V, (u,), generator=g)]
        y = [int(x) for x in y] + [-1]
        for i in range(t):
            first = min(max(0, u + 1 - width), round(i * u / max(1, t - 1)))
            for j in range(first, min(u + 1, first + width)):
                where.append((n, i, j))
                labels.append(y[j])
    row, frame, position = torch.tensor(where).unbind(1)
    teacher = torch.randn(len(where), V, generator=g, dtype=torch.float64)
    occupancy = torch.ones(len(where), dtype=torch.float64)
    label = torch.tensor(labels)
    nodes = Nodes(row, frame, position, label, occupancy, scale * teacher)
    t, u = (max(x) for x in zip(*sizes))
    encoder_out = torch.randn(len(sizes), t, 3, generator=g, dtype=torch.float64)
    decoder_out = torch.randn(len(sizes), u + 1, 2, generator=g, dtype=torch.float64)
    lens = torch.tensor([x for x, _ in sizes])
    states = (encoder_out.requires_grad_(), lens, decoder_out.requires_grad_())
    return states, nodes


def sparse_of(nodes, k):
    log_probs = nodes.teacher.log_softmax(-1)
    top, indices = log_probs.topk(k, -1)
    tail = log_probs.scatter(1, indices, -INF).logsumexp(-1)
    return replace(nodes, teacher=SparseDistribution(indices, top, tail))


def loss(joiner, states, nodes, blank_id=0, form="two-sided"):
    student = StudentNodes(joiner, states[0], states[2], nodes, states[1])
    return full_sum_kd_loss(student, form=form, blank_id=blank_id)


def value_and_grads(value, joiner, states):
    inputs = (states[0], states[2], *joiner.parameters())
    return value.detach(), torch.autograd.grad(value, inputs)


def alignments(t, u):
    """All orders of u labels and t blanks that end in a blank: (frame, position, label)
    for each arc."""
    for labels in itertools.combinations(range(t + u - 1), u):
        i = j = 0
        arcs = []
        for step in range(t + u):
            arcs.append((i, j, step in labels))
            i, j = (i, j + 1) if step in labels else (i + 1, j)
        yield arcs


def naive(joiner, states, nodes, blank_id=0, kept=None, form="two-sided"):
    """Alignment by alignment; ``kept`` (R, V), bool: symbols that a path may take."""
    encoder_out, lens, decoder_out = states
    h = joiner.encoder_proj(encoder_out)[nodes.row, nodes.frame]
    h = h + joiner.decoder_proj(decoder_out)[nodes.row, nodes.position]
    log_q = joiner.output_linear(h.tanh()).log_softmax(-1)
    log_p = nodes.teacher.log_softmax(-1)
    at = {
        (int(n), int(t), int(u)): r
        for r, (n, t, u) in enumerate(zip(nodes.row, nodes.frame, nodes.position))
    }
    distances = []
    for n in nodes.row.unique().tolist():
        u_n = int(nodes.position[nodes.row == n].max())
        scores = []
        for arcs in alignments(int(lens[n]), u_n):
            rows = [at.get((n, i, j)) for i, j, _ in arcs]
            if None in rows:
                continue
            ids = [
                int(nodes.label[r]) if a[2] else blank_id for r, a in zip(rows, arcs)
            ]
            if kept is None or all(kept[r, i] for r, i in zip(rows, ids)):
                scores.append((log_p[rows, ids].sum(), log_q[rows, ids].sum()))
        if scores:
            p, q = (torch.stack(x).logsumexp(0) for x in zip(*scores))
            d = (q - p).abs() if form == "two-sided" else (p - q).clamp(min=0)
            distances.append(d**2 / 2 if d <= 1 else d - 0.5)
    return sum(distances, torch.zeros((), dtype=torch.float64)), distances


@pytest.mark.parametrize("blank_id", [0, 3])
@pytest.mark.parametrize("width", [2, 3, 9])
@pytest.mark.parametrize("scale", [FAR, NEAR])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_sum_over_all_alignments(seed, width, scale, blank_id):
    joiner = joiner_of(seed)
    states, nodes = lattice(seed, width=width, scale=scale, blank_id=blank_id)
    expected, distances = naive(joiner, states, nodes, blank_id)
    assert len(distances) == 3 and all(d > 0 for d in distances)
    found = loss(joiner, states, nodes, blank_id)
    torch.testing.assert_close(
        value_and_grads(found, joiner, states),
        value_and_grads(expected, joiner, states),
    )


def test_distances_are_squared_when_near_and_absolute_when_far():
    """The cases above see both branches."""
    near, far = 0, 0
    for seed in range(3):
        for scale in (FAR, NEAR):
            _, distances = naive(joiner_of(seed), *lattice(seed, scale=scale))
            near += sum(bool(d < 0.5) for d in distances)
            far += sum(bool(d > 0.5) for d in distances)
    assert near >= 3 and far >= 3


@pytest.mark.parametrize("width", [2, 9])
@pytest.mark.parametrize("scale", [FAR, NEAR])
def test_one_sided_equals_a_sum_over_all_alignments(width, scale):
    counts = {True: 0, False: 0}
    for seed in range(4):
        joiner = joiner_of(seed)
        states, nodes = lattice(seed, width=width, scale=scale)
        expected, distances = naive(joiner, states, nodes, form="one-sided")
        for d in distances:
            counts[bool(d > 0)] += 1
        found = loss(joiner, states, nodes, form="one-sided")
        torch.testing.assert_close(
            value_and_grads(found, joiner, states),
            value_and_grads(expected, joiner, states),
        )
    assert all(counts.values())  # both sides were seen


def test_an_utterance_with_a_worse_teacher_teaches_nothing_one_sided():
    """Each utterance alone: it has its two-sided loss, or none at all."""
    joiner = joiner_of()
    states, nodes = lattice(sizes=((4, 3), (5, 2), (3, 2), (4, 1)))
    taught = []
    for n in range(4):
        alone = nodes.select((nodes.row == n).nonzero().squeeze(1))
        both = value_and_grads(loss(joiner, states, alone), joiner, states)
        one = loss(joiner, states, alone, form="one-sided")
        value, grads = value_and_grads(one, joiner, states)
        taught.append(bool(value > 0))
        if value > 0:
            torch.testing.assert_close((value, grads), both)
        else:
            assert both[0] > 0 and all(g.eq(0).all() for g in grads)
    assert len(set(taught)) == 2


def test_another_form_is_refused():
    states, nodes = lattice()
    with pytest.raises(KDError, match="`form` is 'left', .* two-sided, one-sided"):
        loss(joiner_of(), states, nodes, form="left")


@pytest.mark.parametrize("form", ["two-sided", "one-sided"])
def test_gradcheck(form):
    joiner = joiner_of()
    (encoder_out, lens, decoder_out), nodes = lattice(sizes=((3, 2), (2, 1)), width=2)
    assert torch.autograd.gradcheck(
        lambda e, d: loss(joiner, (e, lens, d), nodes, form=form),
        (encoder_out, decoder_out),
    )


def test_a_second_backward_gives_the_same_gradient_again():
    joiner = joiner_of()
    states, nodes = lattice()
    value = 3 * loss(joiner, states, nodes)
    first = torch.autograd.grad(value, states[0], retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(value, states[0])[0], first)


@pytest.mark.parametrize("form", ["two-sided", "one-sided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_that_equals_its_teacher_has_zero_loss_and_gradient(dtype, form):
    joiner = joiner_of(dtype=dtype)
    states, nodes = lattice()
    states = tuple(x.detach().to(dtype) if x.ndim == 3 else x for x in states)
    states = tuple(x.requires_grad_() if x.ndim == 3 else x for x in states)
    own = StudentNodes(joiner, states[0], states[2], nodes, states[1]).logits().detach()
    for teacher in (own + 2.0, own.log_softmax(-1)):  # a constant does not matter
        equal = replace(nodes, teacher=teacher)
        found = loss(joiner, states, equal, form=form)
        value, grads = value_and_grads(found, joiner, states)
        small = 1e-12 if dtype == torch.float64 else 1e-5
        assert float(value) < small
        assert all(g.abs().max() < small for g in grads)


def test_nan_in_padding_and_more_of_it_change_nothing():
    joiner = joiner_of()
    states, nodes = lattice()
    expected = value_and_grads(loss(joiner, states, nodes), joiner, states)

    def spoilt(x, index):
        used = torch.zeros(x.shape[:2], dtype=torch.bool)
        used[nodes.row, index] = True
        x = x.detach().masked_fill(~used.unsqueeze(-1), NAN)
        return torch.nn.functional.pad(x, (0, 0, 0, 2), value=NAN).requires_grad_()

    padded = (
        spoilt(states[0], nodes.frame),
        states[1],
        spoilt(states[2], nodes.position),
    )
    value, grads = value_and_grads(loss(joiner, padded, nodes), joiner, padded)
    torch.testing.assert_close(value, expected[0])
    assert grads[0][:, 4:].eq(0).all() and grads[1][:, 4:].eq(0).all()
    grads = (grads[0][:, :4], grads[1][:, :4], *grads[2:])
    torch.testing.assert_close(grads, expected[1])


def test_rows_without_a_lattice_and_the_order_of_nodes_do_not_matter():
    joiner = joiner_of()
    states, nodes = lattice()
    some = nodes.select((nodes.row != 1).nonzero().squeeze(1).flip(0))
    expected, _ = naive(joiner, states, some)
    found = loss(joiner, states, some)
    torch.testing.assert_close(
        value_and_grads(found, joiner, states),
        value_and_grads(expected, joiner, states),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nodes_give_0_with_zero_gradient(dtype):
    joiner = joiner_of(dtype=dtype)
    states, nodes = lattice()
    states = tuple(
        x.detach().to(dtype).requires_grad_() if x.ndim == 3 else x for x in states
    )
    none = nodes.select(torch.zeros(0, dtype=torch.int64))
    value, grads = value_and_grads(loss(joiner, states, none), joiner, states)
    assert value == 0 and value.dtype == dtype
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("how", ["node", "label", "blank"])
def test_an_utterance_without_a_complete_path_counts_0(how):
    joiner = joiner_of()
    states, nodes = lattice()
    if how == "node":  # all of frame 1 of row 0 but the lattice's first and last
        cut = nodes.select(((nodes.row != 0) | (nodes.frame != 1)).nonzero().squeeze(1))
    else:
        teacher = nodes.teacher.clone()
        at = (nodes.row == 0) & (nodes.position == 1)
        at = at if how == "label" else (nodes.row == 0) & (nodes.frame == 3)
        symbol = nodes.label[at].clamp(min=0) if how == "label" else 0
        teacher[at, symbol] = -INF
        cut = replace(nodes, teacher=teacher)
    value, grads = value_and_grads(loss(joiner, states, cut), joiner, states)
    others = nodes.select((nodes.row != 0).nonzero().squeeze(1))
    expected, _ = naive(joiner, states, others)
    torch.testing.assert_close(
        (value, grads), value_and_grads(expected, joiner, states)
    )
    alone = cut.select((cut.row == 0).nonzero().squeeze(1))
    value, grads = value_and_grads(loss(joiner, states, alone), joiner, states)
    assert value == 0 and all(g.eq(0).all() for g in grads)


def test_arcs_of_a_lattice_without_a_complete_path_are_not_taken():
    """The engines say that some are."""
    _, nodes = lattice()
    arcs = collapse(nodes, 0).teacher.log_probs.clone()
    arcs[(nodes.row == 0) & (nodes.frame == 2), 1] = -INF
    boundary = torch.tensor([[0, 0, 3, 4], [0, 0, 1, 1], [0, 0, 2, 3]])
    sums, taken = path_sums(arcs, nodes.row, nodes.frame, nodes.position, boundary)
    assert sums[0] == -INF and torch.isfinite(sums[1:]).all()
    assert taken[nodes.row == 0].eq(0).all()
    steps = [taken[nodes.row == n].sum() for n in (1, 2)]  # T_n + U_n arcs
    torch.testing.assert_close(torch.stack(steps), steps[0].new_tensor([2.0, 5.0]))


# Sparse teachers


def test_a_sparse_teacher_of_all_symbols_gives_the_dense_loss():
    joiner = joiner_of()
    states, nodes = lattice()
    results = [
        value_and_grads(loss(joiner, states, x), joiner, states)
        for x in (nodes, sparse_of(nodes, V), collapse(nodes, 0))
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_paths_by_arcs_that_the_teacher_did_not_keep_are_left_out_of_both_sums(seed, k):
    joiner = joiner_of(seed)
    states, nodes = lattice(seed, sizes=((4, 1), (3, 1)))
    given = sparse_of(nodes, k)
    kept = torch.zeros(len(nodes), V, dtype=torch.bool)
    kept = kept.scatter(1, given.teacher.indices, True)
    expected, distances = naive(joiner, states, nodes, kept=kept)
    found = loss(joiner, states, given)
    assert distances  # some path is left
    assert float(found) != pytest.approx(float(naive(joiner, states, nodes)[0]))
    torch.testing.assert_close(
        value_and_grads(found, joiner, states),
        value_and_grads(expected, joiner, states),
    )


# Types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_student_is_close_to_float32(dtype):
    states, nodes = lattice()
    expected = float(loss(joiner_of(), states, nodes))
    joiner = joiner_of().to(dtype)
    states = tuple(
        x.detach().to(dtype).requires_grad_() if x.ndim == 3 else x for x in states
    )
    try:
        joiner.encoder_proj(states[0])
    except RuntimeError:
        pytest.skip("this torch has no float16 layers on a CPU")
    value, grads = value_and_grads(loss(joiner, states, nodes), joiner, states)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(expected, rel=0.03)
    assert all(torch.isfinite(g).all() for g in grads) and grads[0].abs().max() > 0


def test_autocast_leaves_the_loss_in_float32():
    joiner = joiner_of(dtype=torch.float32)
    states, nodes = lattice()
    states = tuple(
        x.detach().float().requires_grad_() if x.ndim == 3 else x for x in states
    )
    student = StudentNodes(joiner, states[0], states[2], nodes, states[1])
    student.logits()  # as they come, so that the loss alone is within autocast
    expected = value_and_grads(full_sum_kd_loss(student), joiner, states)
    student = StudentNodes(joiner, states[0], states[2], nodes, states[1])
    student.logits()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = full_sum_kd_loss(student)
        whole = loss(joiner, states, nodes)
    assert value.dtype == whole.dtype == torch.float32
    torch.testing.assert_close(value_and_grads(value, joiner, states), expected)
    value, grads = value_and_grads(whole, joiner, states)
    assert float(value) == pytest.approx(float(expected[0]), rel=0.03)
    assert all(torch.isfinite(g).all() for g in grads)


# Lattices of a real model


@pytest.mark.parametrize("s_range", [2, 4])
def test_the_sums_are_the_engines_pruned_loss(
    make_model, features, s_range, monkeypatch
):
    monkeypatch.setattr("icefall_kd.lattice.LEAST_OCCUPANCY", 0.0)  # of all nodes
    y = [[3, 4, 3], [5, 6], [7]]
    with ModelTap(make_model(seed=1)) as hook:
        found = hook.lattice(hook.encode(*features), y, s_range)
    expected = get_engine().rnnt_loss_pruned(
        logits=found.logits,
        symbols=found.labels,
        ranges=found.ranges,
        termination_symbol=0,
        boundary=found.boundary,
        reduction="none",
    )
    nodes = nodes_of(found)
    arcs = collapse(nodes, 0).teacher.log_probs
    at = nodes.row, nodes.frame, nodes.position, found.boundary
    sums, taken = path_sums(arcs, *at)
    torch.testing.assert_close(-sums, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taken.sum(1), nodes.occupancy, rtol=1e-4, atol=1e-4)


def test_the_full_sum_shares_the_joiner_with_other_losses():
    joiner = joiner_of()
    states, nodes = lattice()
    calls = []
    for module in joiner.children():
        module.register_forward_hook(lambda m, *_: calls.append(m))
    student = StudentNodes(joiner, states[0], states[2], nodes, states[1])
    both = full_sum_kd_loss(student) + nodes_kd_loss(student)
    assert len(calls) == 3
    alone = loss(joiner, states, nodes)
    alone = alone + nodes_kd_loss(
        StudentNodes(joiner, states[0], states[2], nodes, states[1])
    )
    torch.testing.assert_close(
        value_and_grads(both, joiner, states), value_and_grads(alone, joiner, states)
    )


# Refusals


def refused(match, joiner, states, nodes):
    with pytest.raises(KDError, match=match) as e:
        loss(joiner, states, nodes)
    assert "\n" not in str(e.value)


def test_shifted_nodes_are_refused():
    states, nodes = lattice()
    late = shift(nodes, 1, states[1])
    refused(
        "row 0 has nodes from frame 1 to 3 and .* 4 frames", joiner_of(), states, late
    )


def test_a_student_of_more_frames_is_refused():
    (encoder_out, lens, decoder_out), nodes = lattice()
    states = encoder_out, torch.tensor([4, 1, 4]), decoder_out
    refused(
        "row 2 has nodes from frame 0 to 2 and .* 4 frames", joiner_of(), states, nodes
    )


def test_nan_in_the_student_is_refused_by_name():
    states, nodes = lattice()
    spoilt = states[0].detach().clone()
    spoilt[2, 1] = NAN
    match = rf"joiner states of shape \({len(nodes)}, 4\) have NaN"
    refused(match, joiner_of(), (spoilt, *states[1:]), nodes)
    joiner = joiner_of()
    with torch.no_grad():
        joiner.output_linear.weight[1, 1] = NAN
    refused(rf"joiner logits of shape \({len(nodes)}, 5\)", joiner, states, nodes)

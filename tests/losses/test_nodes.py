"""The nodes of lattices and of stores: which they are, a path's, and shifted ones."""

import dataclasses

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.kinds.lattice import LatticeCodec
from icefall_kd.lattice import best_path, passed_nodes
from icefall_kd.losses.nodes import nodes_of, path_nodes, shift, stored_nodes
from icefall_kd.losses.transducer import transducer_kd_loss
from icefall_kd.tap import ModelTap
from icefall_kd.types import PrunedLattice

Y = [[3, 4, 3], [5, 6], [7]]  # labels of the three utterances of a batch


def test_a_shift_moves_nodes_and_drops_those_beyond_the_end(nodes):
    lengths = torch.tensor([5, 4])
    shifted = shift(nodes, 1, lengths)
    assert shifted.row.tolist() == [0, 1, 1] and shifted.frame.tolist() == [1, 3, 1]
    assert torch.equal(shifted.teacher, nodes.teacher[[0, 3, 4]])
    with pytest.raises(KDError, match="shift is -1"):
        shift(nodes, -1, lengths)


@pytest.fixture
def pair(make_model, features):
    """A student and the lattices of a teacher, on the same batch."""
    with ModelTap(make_model(seed=1)) as hook:
        teacher = hook.lattice(hook.encode(*features), Y, 3)
    model = make_model(seed=2)
    with ModelTap(model) as hook:
        out = hook.encode(*features)
        student = hook.lattice(out, Y, ranges=teacher.ranges)
    sos = torch.nn.functional.pad(teacher.labels, (1, 0))
    decoder_out = model.decoder(sos).detach()
    return model, (out.encoder_out, out.encoder_out_lens, decoder_out), student, teacher


@pytest.mark.parametrize("node_weighting", ["occupancy", "equal"])
def test_nodes_give_the_loss_of_the_whole_lattice(pair, node_weighting):
    model, states, student, teacher = pair
    nodes = nodes_of(teacher)
    found = transducer_kd_loss(
        model.joiner,
        states[0],
        states[2],
        nodes,
        states[1],
        temperature=2.0,
        node_weighting=node_weighting,
    ).detach()
    logits, taught = (x.logits.double() / 2.0 for x in (student, teacher))
    log_p, log_q = taught.log_softmax(-1), logits.log_softmax(-1)
    kl = 2.0**2 * (log_p.exp() * (log_p - log_q)).sum(-1)  # (N, T, S)
    weights = teacher.occupancy if node_weighting == "occupancy" else 1.0
    passed = passed_nodes(teacher.occupancy)
    expected = (kl * weights)[passed].sum().float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def all_of(t, u):
    return [(i, j) for i in range(t) for j in range(u)]


def test_a_range_over_all_labels_gives_the_full_lattice(make_model, features):
    """Pruned equals full where s_range covers U: every (t, u) is there once."""
    with ModelTap(make_model(seed=1)) as hook:
        out = hook.encode(*features)
        lattice = hook.lattice(out, Y, 4)
    nodes = nodes_of(lattice)
    for row, labels in enumerate(Y):
        mine = nodes.row == row
        t, u = int(out.encoder_out_lens[row]), len(labels) + 1
        found = set(zip(nodes.frame[mine].tolist(), nodes.position[mine].tolist()))
        passed = {(i, j): float(lattice.occupancy[row, i, j]) for i, j in all_of(t, u)}
        # Of the last frame only the last label's node has an arc that ends a path,
        # yet all of them may be passed.
        assert min(passed.values()) > 0
        assert sum(passed.values()) == pytest.approx(t + len(labels), rel=1e-4)
        assert found == {node for node, p in passed.items() if p > 1 / 510}
    assert 0 < len(nodes) < int((lattice.occupancy > 0).sum())


def test_stored_nodes_are_the_lattices_nodes(pair):
    _, _, _, teacher = pair
    codec = LatticeCodec.parse("dense", 0)
    stored = []
    for i in range(3):
        one = PrunedLattice(
            *(getattr(teacher, f.name)[i : i + 1] for f in dataclasses.fields(teacher))
        )
        stored.append(codec.decode(codec.encode(one), teacher.logits.size(-1)))
    found, nodes = stored_nodes(stored), nodes_of(teacher)
    for name in ("row", "frame", "position", "label"):
        assert torch.equal(getattr(found, name), getattr(nodes, name)), name
    assert (found.occupancy - nodes.occupancy).abs().max() < 0.51 / 255
    log_probs = nodes.teacher.log_softmax(-1)
    torch.testing.assert_close(found.teacher, log_probs, rtol=2**-9, atol=2**-7)
    some = stored_nodes([None, stored[1], None])
    assert some.row.unique().tolist() == [1]
    assert stored_nodes([None, None]) is None


def test_sparse_lattices_of_several_widths_are_joined(pair):
    _, _, _, teacher = pair
    stored = []
    for i, k in enumerate((1, 5)):
        codec = LatticeCodec.parse(f"top:{k}", 0)
        one = PrunedLattice(
            *(getattr(teacher, f.name)[i : i + 1] for f in dataclasses.fields(teacher))
        )
        stored.append(codec.decode(codec.encode(one), teacher.logits.size(-1)))
    found = stored_nodes(stored).teacher
    begin = 0
    for one in stored:
        rows = slice(begin, begin + len(one.nodes.indices))
        begin, width = rows.stop, one.nodes.indices.size(1)
        assert torch.equal(found.indices[rows, :width], one.nodes.indices)
        assert torch.equal(found.log_probs[rows, :width], one.nodes.log_probs)
        assert torch.equal(found.log_tail[rows], one.nodes.log_tail)
        assert found.log_probs[rows, width:].eq(-torch.inf).all()
    # Next label and blank beside five others.
    assert begin == len(found.indices) and found.indices.size(1) == 7


def test_path_nodes_are_the_best_alignment_and_count_1(lattice_of):
    lattice = lattice_of(Y, 1, 3)
    nodes, on_path = path_nodes(lattice, 0), best_path(lattice, 0)
    assert nodes.occupancy.eq(1).all()
    t, u = lattice.boundary[:, 3], lattice.boundary[:, 2]
    assert nodes.row.bincount().tolist() == (t + u).tolist()
    n, frame, s = on_path.nonzero(as_tuple=True)
    assert torch.equal(nodes.frame, frame) and torch.equal(nodes.row, n)
    assert torch.equal(nodes.position, lattice.ranges[n, frame, s])
    assert torch.equal(nodes.teacher, lattice.logits[n, frame, s])
    for row, y in enumerate(Y):  # a path goes on by a label or a blank
        at = nodes.row == row
        frame, position = nodes.frame[at], nodes.position[at]
        steps = (frame + position).tolist()
        assert steps == list(range(int(t[row]) + len(y)))
        following = [*y, -1]
        assert nodes.label[at].tolist() == [following[p] for p in position.tolist()]


def test_path_nodes_are_those_of_a_path_store(lattice_of):
    lattice = lattice_of(Y, 1, 3)
    codec = LatticeCodec.parse("path:dense", 0)
    stored = []
    for i in range(3):
        one = PrunedLattice(
            *(getattr(lattice, f.name)[i : i + 1] for f in dataclasses.fields(lattice))
        )
        stored.append(codec.decode(codec.encode(one), lattice.logits.size(-1)))
    found, expected = stored_nodes(stored), path_nodes(lattice, 0)
    for name in ("row", "frame", "position", "label", "occupancy"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name

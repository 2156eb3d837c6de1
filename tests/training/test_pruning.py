"""Teacher-guided pruning: whose ranges the recipe's loss takes, and what is kept."""

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.losses.nodes import stored_nodes
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.losses.transducer import nodes_kd_loss
from icefall_kd.rnnt import get_engine
from icefall_kd.tap import ModelTap
from icefall_kd.training.pruning import FUNCTION, TeacherRanges
from icefall_kd.types import LatticeTargets, Targets

Y = [[3, 4, 3], [5, 6], [7]]


def stored(lattice, skip=()):
    """What a store would give of each row."""
    rows = []
    for i, (_, _, u, t) in enumerate(lattice.boundary.tolist()):
        occupancy = lattice.occupancy[i, :t]
        some = occupancy > 0
        row = LatticeTargets(
            lattice.ranges[i, :t],
            lattice.labels[i, :u],
            occupancy,
            lattice.logits[i, :t][some],
        )
        rows.append(None if i in skip else row)
    return rows


@pytest.fixture
def taught(make_model, features):
    """A teacher's targets on the batch of ``features``."""

    def make(skip=(), s_range=3):
        with ModelTap(make_model(seed=1)) as hook:
            said = hook.encode(*features)
            lattice = hook.lattice(said, Y, s_range)
        lattices = stored(lattice, skip)
        return Targets(said.encoder_out_lens, parts={"lattice": lattices}), lattice

    return make


@pytest.fixture
def guided():
    opened = []

    def open_(model):
        opened.append(TeacherRanges(model))
        return opened[-1]

    yield open_
    for ranges in opened:
        ranges.close()


def forward(model, features, ranges, targets, prune_range=3):
    """The recipe's pruned loss on a batch with these targets, or none."""
    ranges.begin(targets)
    losses = model(x=features[0], x_lens=features[1], y=Y, prune_range=prune_range)
    return losses[1]


def test_the_pruned_loss_stands_on_the_teachers_ranges(
    make_model, features, taught, guided
):
    targets, lattice = taught()
    model = make_model(seed=2).eval()
    ranges = guided(model)
    loss = forward(model, features, ranges, targets)
    found, logits = ranges.take()
    for i, (_, _, _, t) in enumerate(lattice.boundary.tolist()):
        assert torch.equal(found[i, :t], lattice.ranges[i, :t])
    by_hand = get_engine().rnnt_loss_pruned(
        logits=logits.float(),
        symbols=lattice.labels,
        ranges=found,
        termination_symbol=0,
        boundary=lattice.boundary,
        reduction="sum",
    )
    torch.testing.assert_close(loss, by_hand)
    assert torch.isfinite(loss)


def test_the_ranges_matter(make_model, features, taught, guided):
    """Else the test above could not fail."""
    model = make_model(seed=2).eval()
    own = model(x=features[0], x_lens=features[1], y=Y, prune_range=3)[1]
    ranges = guided(model)
    assert not torch.isclose(own, forward(model, features, ranges, taught()[0]))


def test_rows_without_a_lattice_keep_their_own(make_model, features, taught, guided):
    model = make_model(seed=2).eval()
    ranges = guided(model)
    whole = forward(model, features, ranges, taught()[0])
    all_rows, _ = ranges.take()
    part = forward(model, features, ranges, taught(skip=(0,))[0])
    found, _ = ranges.take()
    assert torch.equal(found[1:], all_rows[1:]) and not torch.isclose(whole, part)


def test_a_batch_without_targets_and_validation_keep_their_own(
    make_model, features, taught, guided
):
    model = make_model(seed=2).eval()
    own = model(x=features[0], x_lens=features[1], y=Y, prune_range=3)[1]
    ranges = guided(model)
    assert torch.equal(own, forward(model, features, ranges, None))
    assert ranges.take() == (None, None)
    with torch.no_grad():
        assert torch.equal(own, forward(model, features, ranges, taught()[0]))


def test_another_models_lattice_in_between_is_left_alone(
    make_model, features, taught, guided
):
    """An online teacher asks the same engine."""
    model, teacher = make_model(seed=2).eval(), make_model(seed=3)
    ranges = guided(model)
    forward(model, features, ranges, taught()[0])
    with ModelTap(teacher) as hook:
        asked = hook.lattice(hook.encode(*features), Y, 3)
    ranges.close()
    with ModelTap(teacher) as hook:
        expected = hook.lattice(hook.encode(*features), Y, 3)
    assert torch.equal(asked.ranges, expected.ranges)


def test_the_lattices_kl_needs_no_second_pass(make_model, features, taught, guided):
    targets, _ = taught()
    model = make_model(seed=2).eval()
    ranges = guided(model)
    hook = ModelTap(model, with_ctc=False, with_decoder=True)
    forward(model, features, ranges, targets)
    out, kept = hook.take(), ranges.take()
    nodes = stored_nodes(targets.parts["lattice"])

    def kl(logits):
        parts = (out.encoder_out, out.decoder_out, nodes, out.encoder_out_lens)
        asked = StudentNodes(model.joiner, *parts)
        if logits is not None:
            asked.take_logits(*logits)
        value = nodes_kd_loss(asked)
        wanted = list(model.joiner.parameters())
        return value, torch.autograd.grad(value, wanted, retain_graph=True)

    (value, grads), (again, others) = kl(kept), kl(None)
    assert value > 0.1
    torch.testing.assert_close(value, again)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    calls = []
    model.joiner.output_linear.register_forward_hook(lambda *_: calls.append(1))
    kl(kept)
    assert not calls


def test_a_lattice_that_lacks_a_node_is_asked_again(make_model, features, taught):
    targets, lattice = taught()
    model = make_model(seed=2).eval()
    with ModelTap(model) as hook:
        out = hook.encode(*features)
        decoder_out = model.decoder(torch.nn.functional.pad(lattice.labels, (1, 0)))
    nodes = stored_nodes(targets.parts["lattice"])
    asked = StudentNodes(
        model.joiner, out.encoder_out, decoder_out, nodes, out.encoder_out_lens
    )
    asked.take_logits(lattice.ranges[..., :1], lattice.logits[..., :1, :])
    assert asked._logits is None and torch.isfinite(nodes_kd_loss(asked))


def test_a_pass_that_failed_leaves_nothing_to_the_next(
    make_model, features, taught, guided
):
    """The recipe's CTC head fails, when the joiner was asked already."""

    def fail(*args):
        raise ZeroDivisionError

    targets, _ = taught()
    model = make_model(seed=2).eval()
    ranges = guided(model)
    handle = model.ctc_output.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        forward(model, features, ranges, targets)
    handle.remove()
    with torch.no_grad():
        model.joiner.output_linear.bias += torch.arange(11.0)
    forward(model, features, ranges, targets)
    logits = ranges.take()[1]
    forward(model, features, ranges, targets)
    assert torch.equal(logits, ranges.take()[1])
    with pytest.raises(ZeroDivisionError):
        handle = model.ctc_output.register_forward_pre_hook(fail)
        forward(model, features, ranges, targets)
    handle.remove()
    forward(model, features, ranges, None)  # its own ranges
    assert ranges.take() == (None, None)


def test_the_engine_gets_its_function_back(make_model, features, taught, guided):
    def is_replaced():
        return getattr(get_engine(), FUNCTION) is not before

    before, model = getattr(get_engine(), FUNCTION), make_model(seed=2)
    ranges = guided(model)
    assert not is_replaced()
    targets, _ = taught()
    ranges.begin(None)
    assert not is_replaced()
    ranges.begin(targets)
    assert is_replaced()
    ranges.close()
    assert not is_replaced() and not model.joiner._forward_hooks
    forward(model, features, ranges, targets)
    assert not is_replaced()
    ranges.take()
    assert not model.joiner._forward_hooks


def test_a_recipe_that_does_not_begin_its_batches_is_refused(make_model, guided):
    with pytest.raises(KDError, match="does not call kd.begin.*icefall-kd plug"):
        guided(make_model()).take()


def test_wider_lattices_than_the_students_are_refused(
    make_model, features, taught, guided
):
    model = make_model(seed=2).eval()
    ranges = guided(model)
    with pytest.raises(KDError, match="3 wide and --prune-range is 2"):
        forward(model, features, ranges, taught()[0], prune_range=2)


def test_narrower_lattices_are_widened(make_model, features, taught, guided):
    targets, lattice = taught(s_range=2)
    model = make_model(seed=2).eval()
    ranges = guided(model)
    assert torch.isfinite(forward(model, features, ranges, targets))
    found, _ = ranges.take()
    t = int(lattice.boundary[0, 3])
    assert found.size(2) == 3 and int(found.max()) <= 3
    inside = (lattice.ranges[0, :t, :, None] == found[0, :t, None]).any(-1)
    assert inside.all()  # no node of the teacher's is lost


def test_lattices_of_other_cuts_are_refused(make_model, features, taught, guided):
    targets, _ = taught()
    targets.parts["lattice"][1] = targets.parts["lattice"][2]
    model = make_model(seed=2).eval()
    ranges = guided(model)
    with pytest.raises(KDError, match="row 1 .* 2 labels.*teacher's lattice .* and 1"):
        forward(model, features, ranges, targets)

"""ModelTap on real models: what it reads, and that it leaves no trace."""

import copy
import dataclasses
import itertools
import random

import pytest
import torch

from icefall_kd import ModelTap
from icefall_kd.errors import KDError
from icefall_kd.kinds.lattice import LatticeCodec
from icefall_kd.losses.nodes import nodes_of, path_nodes, stored_nodes
from icefall_kd.types import PrunedLattice

LOG_EPS = -15.94  # icefall's padding


def forward(model, x, x_lens):
    """The model's own training step."""
    y = [[3, 4, 3], [5, 6], [7]]
    simple, pruned, ctc, *_ = model(x=x, x_lens=x_lens, y=y, prune_range=3)
    return simple + pruned + ctc


def hooks_of(model):
    return [
        n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks
    ]


# What it reads


def test_logits_are_before_log_softmax(make_model, features):
    model = make_model().eval()
    with ModelTap(model) as hook:
        out = hook.encode(*features)
    with torch.no_grad():
        log_probs = model.ctc_output(out.encoder_out)
    assert torch.equal(out.ctc_logits.log_softmax(-1), log_probs)
    assert out.ctc_logits.logsumexp(-1).abs().min() > 1e-3  # not normalised yet


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_transducer": False}, {"downsampling_factor": "1,4", "num_heads": "2,8"}],
)
def test_encode_is_the_models_own_forward_pass(
    make_model, features, encoder_frames, changes
):
    """Where no utterance is padded; padded ones are as alone, see below."""
    model = make_model(**changes)
    model.train()
    x, x_lens = features[0], torch.tensor([61, 61, 61])
    with ModelTap(model) as hook:
        out = hook.encode(x, x_lens)
    model.eval()
    with torch.no_grad():
        encoder_out, lens = model.forward_encoder(x, x_lens)
        logits = model.ctc_output[1](encoder_out)
    assert torch.equal(out.encoder_out, encoder_out)
    assert torch.equal(out.ctc_logits, logits)
    assert out.encoder_out_lens.tolist() == lens.tolist()
    assert lens.tolist() == [encoder_frames(n) for n in x_lens.tolist()]
    assert not out.ctc_logits.requires_grad


def test_take_is_what_the_models_forward_pass_gave(make_model, features):
    model = make_model().eval()
    with ModelTap(model) as hook, torch.no_grad():
        forward(model, *features)
        out = hook.take()
        encoder_out, lens = model.forward_encoder(*features)
        logits = model.ctc_output[1](encoder_out)
    assert torch.equal(out.encoder_out, encoder_out)
    assert torch.equal(out.ctc_logits, logits)
    assert torch.equal(out.encoder_out_lens, lens)


def test_the_last_forward_pass_counts(make_model, features):
    x, x_lens = features
    model = make_model().eval()
    with ModelTap(model) as hook, torch.no_grad():
        forward(model, x, x_lens)
        forward(model, x.flip(0), x_lens.flip(0))
        last = hook.take()
        encoder_out, _ = model.forward_encoder(x.flip(0), x_lens.flip(0))
        assert torch.equal(last.ctc_logits, model.ctc_output[1](encoder_out))


def test_an_encoder_pass_without_the_head_has_no_logits(make_model, features):
    model = make_model().eval()
    with ModelTap(model) as hook, torch.no_grad():
        forward(model, *features)
        model.forward_encoder(*features)
        assert hook.take().ctc_logits is None  # not those of the pass before


def test_gradients_flow_through_take(make_model, features):
    model = make_model().train()
    with ModelTap(model) as hook:
        forward(model, *features)
        out = hook.take()
    out.ctc_logits.square().sum().backward()
    for module in (model.encoder_embed.out, model.ctc_output[1]):
        assert module.weight.grad.abs().max() > 0
    assert model.joiner.output_linear.weight.grad is None


def test_the_gradient_of_taken_logits_is_that_of_the_models_own(make_model, features):
    model = make_model().eval()

    def grad(logits):
        return torch.autograd.grad(logits.square().sum(), list(parameters))

    parameters = [model.encoder_embed.out.weight, model.ctc_output[1].weight]
    with ModelTap(model) as hook:
        random.seed(5)  # Zipformer's balancers draw numbers for the backward pass
        forward(model, *features)
        taken = grad(hook.take().ctc_logits)
        random.seed(5)
        own = grad(model.ctc_output[1](model.forward_encoder(*features)[0]))
    for a, b in zip(taken, own, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 1e-3


# Batches with padding


STACKS = [
    {},
    {"downsampling_factor": "1,4"},
    {"downsampling_factor": "2,8"},
    {"downsampling_factor": "3,5"},
    pytest.param(
        {"causal": True, "chunk_size": "8,-1", "left_context_frames": "16,-1"},
        marks=pytest.mark.xfail(
            strict=True,
            reason="causal convolutions scale an edge by the batch's length",
        ),
    ),
]


@pytest.mark.parametrize("padding", [LOG_EPS, 1e4])
@pytest.mark.parametrize("changes", STACKS, ids="1,2 1,4 2,8 3,5 causal".split())
def test_an_utterance_of_a_batch_is_as_alone(make_model, features, changes, padding):
    """At odd lengths that no stack's downsampling divides."""
    model = make_model(**changes)
    x = 2 * features[0] - 6
    for seed, lens in enumerate([(61, 42, 23), (60, 39, 9), (61, 37, 10)]):
        lens = torch.tensor(lens)
        batch = (x.flip(2) if seed % 2 else x.clone())[:, : int(lens.max())]
        for row, n in zip(batch, lens.tolist(), strict=True):
            row[n:] = padding
        with ModelTap(model, layers=(0, 1)) as hook:
            together = hook.encode(batch, lens)
            for i, n in enumerate(lens.tolist()):
                alone = hook.encode(batch[i : i + 1, :n], lens[i : i + 1])
                t = int(alone.encoder_out_lens)
                assert int(together.encoder_out_lens[i]) == t
                for a, b in [
                    (together.encoder_out, alone.encoder_out),
                    (together.ctc_logits, alone.ctc_logits),
                ]:
                    torch.testing.assert_close(a[i, :t], b[0], rtol=1e-4, atol=2e-5)
                for k in (0, 1):
                    a, b = together.hidden[k][i], alone.hidden[k][0]
                    torch.testing.assert_close(a[: len(b)], b, rtol=1e-4, atol=2e-5)


def test_the_models_own_pass_lets_padding_in(make_model, features):
    """What the test above would not find if encode() left the model alone."""
    model = make_model().eval()
    x, lens = features[0].clone(), features[1]
    x[1, 42:] = LOG_EPS
    with torch.no_grad(), ModelTap(model) as hook:
        own, own_lens = model.forward_encoder(x, lens)
        asked = hook.encode(x, lens).encoder_out
    t = int(own_lens[1])
    assert (own[1, :t] - asked[1, :t]).abs().max() > 1e-2


def test_encode_takes_its_own_taps_off(make_model, features):
    model = make_model()
    with ModelTap(model) as hook:
        before = hooks_of(model)
        hook.encode(*features)
        assert hooks_of(model) == before
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            hook.encode(features[0][..., :9], features[1])
        assert hooks_of(model) == before


# Hidden stacks


def test_hidden_stacks_are_those_of_the_forward_pass(make_model, features):
    model = make_model().eval()
    seen = []
    for stack in model.encoder.encoders:
        stack.register_forward_hook(lambda m, args, out: seen.append(out))
    x, lens = features[0], torch.tensor([61, 61, 61])
    with ModelTap(model, layers=(1, 0)) as hook:
        out = hook.encode(x, lens)
    assert set(out.hidden) == {0, 1} and len(seen) == 2
    for i in (0, 1):
        assert torch.equal(out.hidden[i], seen[i].permute(1, 0, 2))
        assert out.hidden[i].shape == (3, 27, (16, 24)[i])  # at 50 Hz


def test_gradients_flow_through_hidden_stacks(make_model, features):
    model = make_model().train()
    with ModelTap(model, layers=[0]) as hook:
        forward(model, *features)
        out = hook.take()
        forward(model, *features)
        assert hook.take().hidden[0] is not out.hidden[0]
    assert set(out.hidden) == {0}
    out.hidden[0].square().sum().backward()
    assert model.encoder_embed.out.weight.grad.abs().max() > 0
    assert model.ctc_output[1].weight.grad is None


def test_no_hidden_stack_unless_asked(make_model, features):
    with ModelTap(make_model()) as hook:
        assert hook.encode(*features).hidden == {}


@pytest.mark.parametrize("index", [2, -1])
def test_a_stack_that_is_not_there_is_refused(make_model, index):
    model = make_model()
    with pytest.raises(KDError, match=f"stack {index}, .* 2 stacks: give 0 to 1"):
        ModelTap(model, layers=[0, index])
    assert hooks_of(model) == []


# Models with one head


def test_a_transducer_without_ctc_head_gives_its_encoder(make_model, features):
    model = make_model(use_ctc=False)
    with ModelTap(model, layers=[1], with_ctc=False) as hook:
        out = hook.encode(*features)
        assert hook.lattice(out, [[3, 4, 3], [5, 6], [7]], 3).logits.ndim == 4
    assert out.ctc_logits is None and out.encoder_out.shape == (3, 14, 24)
    assert out.hidden[1].shape == (3, 27, 24)
    assert hooks_of(model) == []


def test_a_ctc_model_without_transducer_gives_no_lattice(make_model, features):
    with ModelTap(make_model(use_transducer=False)) as hook:
        out = hook.encode(*features)
        assert out.ctc_logits.shape == (3, 14, 11)
        with pytest.raises(KDError, match="AsrModel has no .*transducer head"):
            hook.lattice(out, [[3], [5], [7]])


# The causal model


def test_a_causal_model_is_heard_the_same_each_time(make_model, features):
    """Its training pass draws a chunk size; encode() takes the widest."""
    model = make_model(causal=True, chunk_size="4,8,-1", left_context_frames="8,16,-1")
    widest = make_model(causal=True, chunk_size="-1", left_context_frames="-1")
    found = []
    for m in (model, model, model, widest):
        with ModelTap(m) as hook:
            found.append(hook.encode(*features).ctc_logits)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert tuple(model.encoder.chunk_size) == (4, 8, -1)
    assert tuple(model.encoder.left_context_frames) == (8, 16, -1)


# Lattices


Y = [[3, 4, 3], [5, 6], [7]]


def lattice_of(model, features, y=Y, s_range=3):
    with ModelTap(model) as hook:
        return hook.lattice(hook.encode(*features), y, s_range)


@pytest.mark.parametrize("s_range", [2, 3, 4, 9])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_occupancy_sums_to_frames_and_labels(make_model, features, s_range, scale):
    model = make_model()
    with torch.no_grad():
        model.joiner.output_linear.weight.mul_(scale)
    found = lattice_of(model, features, s_range=s_range)
    expected = [float(t + len(y)) for t, y in zip([14, 9, 4], Y, strict=True)]
    assert found.boundary.tolist() == [
        [0, 0, len(y), t] for t, y in zip([14, 9, 4], Y, strict=True)
    ]
    torch.testing.assert_close(
        found.occupancy.sum((1, 2)), torch.tensor(expected), rtol=1e-4, atol=1e-3
    )
    assert found.occupancy.min() >= -1e-5 and found.occupancy.max() <= 1 + 1e-4
    # Every frame is left once, and the first and last node are on every path.
    torch.testing.assert_close(found.occupancy[:, 0, 0], torch.ones(3))
    frames = torch.arange(14) < torch.tensor([[14], [9], [4]])
    assert found.occupancy.sum(2)[frames].min() >= 1 - 1e-4
    assert found.occupancy.sum(2)[~frames].abs().max() == 0


def paths(t, u):
    """All orders of t blanks and u labels that end in a blank, as lists of nodes."""
    for labels in itertools.combinations(range(t + u - 1), u):
        at_t = at_u = 0
        nodes = []
        for step in range(t + u):
            nodes.append((at_t, at_u))
            if step in labels:
                at_u += 1
            else:
                at_t += 1
        yield nodes, labels


def test_occupancy_is_that_of_all_paths_of_a_full_lattice(make_model):
    """9 to 21 feature frames give 1 to 4 frames: few enough paths to count."""
    x = torch.randn(3, 23, 20, generator=torch.Generator().manual_seed(4))
    lens = torch.tensor([23, 19, 11])
    found = lattice_of(make_model(), (x, lens), s_range=4)
    assert found.logits.shape == (3, 4, 4, 11)
    assert torch.equal(found.ranges, torch.arange(4).expand(3, 4, 4))
    for n, (t, y) in enumerate(zip([4, 3, 1], Y, strict=True)):
        log_probs = found.logits[n].double().log_softmax(-1)
        total, passed = 0.0, torch.zeros(4, 4, dtype=torch.float64)
        for nodes, labels in paths(t, len(y)):
            weight = 0.0
            for step, (i, j) in enumerate(nodes):
                weight += log_probs[i, j, y[j] if step in labels else 0]
            total += weight.exp()
            for i, j in nodes:
                passed[i, j] += weight.exp()
        torch.testing.assert_close(
            found.occupancy[n].double(), passed / total, rtol=1e-4, atol=1e-5
        )


def test_a_range_of_all_labels_makes_the_full_lattice(make_model, features):
    model = make_model()
    full = lattice_of(model, features, s_range=4)
    more = lattice_of(model, features, s_range=50)
    for name in ("ranges", "logits", "occupancy"):
        assert torch.equal(getattr(full, name), getattr(more, name))


def test_a_lattice_that_no_path_gets_through_has_no_nodes(make_model, features):
    """Row 1's ranges jump by more than a frame can; the others' don't."""
    y = [[3, 4, 3], [5, 6], [7]]
    with ModelTap(make_model()) as hook:
        out = hook.encode(*features)
        whole = hook.lattice(out, y, 2)
        cut = whole.ranges.clone()
        cut[1, :4], cut[1, 4:] = torch.tensor([0, 1]), torch.tensor([2, 3])
        found = hook.lattice(out, y, ranges=cut)
    assert found.occupancy[1].eq(0).all()
    for row in (0, 2):
        assert torch.equal(found.occupancy[row], whole.occupancy[row])
    assert set(nodes_of(found).row.tolist()) == {0, 2}
    assert set(path_nodes(found, 0).row.tolist()) == {0, 2}
    for name in ("dense", "adaptive:.9:4", "collapsed", "path:top:1"):
        one = PrunedLattice(
            *(getattr(found, f.name)[1:2] for f in dataclasses.fields(found))
        )
        codec = LatticeCodec.parse(name, 0)
        stored = codec.decode(codec.encode(one), 11)
        assert len(stored_nodes([stored])) == 0


def test_lattice_logits_are_the_joiners(make_model, features):
    model = make_model().eval()
    with ModelTap(model) as hook, torch.no_grad():
        out = hook.encode(*features)
        found = hook.lattice(out, Y, 2)
        decoder_out = model.decoder(torch.tensor([[0, *Y[0]]]))[0]
        for t, s in [(0, 0), (5, 1), (13, 1)]:
            u = int(found.ranges[0, t, s])
            expected = model.joiner(out.encoder_out[0, t], decoder_out[u])
            torch.testing.assert_close(found.logits[0, t, s], expected)


@pytest.mark.parametrize("s_range", [2, 3])
def test_the_ranges_are_those_of_the_recipes_loss(
    make_model, features, s_range, monkeypatch
):
    from zipformer.modules import model as zipformer_model

    model = make_model().eval()
    seen = []
    engine = zipformer_model.k2
    original = engine.get_rnnt_prune_ranges

    def spy(**options):
        seen.append(original(**options))
        return seen[-1]

    with ModelTap(model) as hook, torch.no_grad():
        out = hook.encode(*features)
        monkeypatch.setattr(engine, "get_rnnt_prune_ranges", spy)
        model.forward_transducer(
            out.encoder_out, out.encoder_out_lens, Y, prune_range=s_range
        )
        monkeypatch.undo()
        found = hook.lattice(out, Y, s_range)
    assert len(seen) == 1 and torch.equal(found.ranges, seen[0])
    assert found.labels.tolist() == [[3, 4, 3], [5, 6, 0], [7, 0, 0]]


def test_a_lattice_of_a_batch_is_that_of_each_utterance(make_model, features):
    """All nodes of the full lattice that the utterance alone has."""
    model = make_model()
    x, lens = features
    together = lattice_of(model, features, s_range=4)
    for i, y in enumerate(Y):
        n = int(lens[i])
        alone = lattice_of(model, (x[i : i + 1, :n], lens[i : i + 1]), [y], len(y) + 1)
        t, s = alone.occupancy.shape[1:]
        torch.testing.assert_close(
            together.occupancy[i, :t, :s], alone.occupancy[0], rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            together.logits[i, :t, :s], alone.logits[0], rtol=1e-4, atol=1e-4
        )


def test_an_utterance_without_labels_is_refused(make_model, features):
    """The engines take no utterance without labels."""
    with pytest.raises(KDError, match="label"):
        lattice_of(make_model(), features, [[3, 4], [], [7]], 3)


def test_labels_of_another_number_of_utterances_are_refused(make_model, features):
    with pytest.raises(KDError, match="labels of 2 utterances and frames of 3"):
        lattice_of(make_model(), features, Y[:2])


def test_a_lattice_leaves_random_states_and_flags_as_found(make_model, features):
    model = make_model().train()
    model.decoder.eval()
    random.seed(7)
    torch.manual_seed(7)
    flags = {n: m.training for n, m in model.named_modules()}
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    lattice_of(model, features)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(p.grad is None for p in model.parameters())


def test_a_cut_too_short_for_one_frame_is_refused(make_model, features):
    x, _ = features
    with ModelTap(make_model()) as hook, pytest.raises(KDError):
        hook.encode(x, torch.tensor([61, 8, 5]))


# No trace


class Draw:
    """Draws random numbers when the encoder runs, as a causal model does."""

    def __call__(self, module, args):
        random.random()
        torch.rand(1)


@pytest.mark.parametrize("fail", [False, True])
def test_encode_leaves_random_states_and_flags_as_found(make_model, features, fail):
    model = make_model(causal=True, chunk_size="8,16", left_context_frames="16,32")
    model.encoder.register_forward_pre_hook(Draw())
    model.train()
    model.encoder.encoders[0].eval()  # a mixed model stays mixed
    model.ctc_output[0].eval()
    random.seed(7)
    torch.manual_seed(7)
    flags = {n: m.training for n, m in model.named_modules()}
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    x, x_lens = features
    with ModelTap(model) as hook:
        if fail:
            with pytest.raises((AssertionError, RuntimeError, ValueError)):
                hook.encode(x[..., :9], x_lens)
        else:
            hook.encode(x, x_lens)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert True in flags.values() and False in flags.values()
    assert random.getstate() == python_state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_encode_does_not_change_parameters_or_gradients(make_model, features):
    model = make_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with ModelTap(model) as hook:
        hook.encode(*features)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_tapped_model_trains_as_an_untapped_one(make_model, features):
    losses = []
    for tapped in (False, True):
        model = make_model().train()
        hook = ModelTap(model) if tapped else None
        random.seed(3)
        torch.manual_seed(3)
        loss = forward(model, *features)
        loss.backward()
        losses.append((loss.item(), model.encoder_embed.out.weight.grad))
        if hook:
            hook.close()
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_close_takes_the_hooks_off(make_model, features):
    model = make_model()
    hook = ModelTap(model)
    assert hooks_of(model) == ["", "encoder", "ctc_output.1"]
    hook.encode(*features)
    hook.close()
    assert hooks_of(model) == []
    hook.close()  # twice does no harm


def test_the_context_closes_on_an_error(make_model):
    model = make_model()
    with pytest.raises(ZeroDivisionError), ModelTap(model):
        _ = 1 / 0
    assert hooks_of(model) == []


def test_close_leaves_the_hooks_of_others(make_model, features):
    model = make_model()
    other = ModelTap(model)
    ModelTap(model).close()
    assert other.encode(*features).ctc_logits.shape == (3, 14, 11)
    other.close()


def test_close_forgets_a_forward_pass(make_model, features):
    model = make_model().eval()
    hook = ModelTap(model)
    with torch.no_grad():
        forward(model, *features)
    hook.close()
    with pytest.raises(KDError, match="no forward pass"):
        hook.take()


# Passes that fail, and passes that lack a part


def fail(*args):
    raise ZeroDivisionError


@pytest.mark.parametrize("at", ["encoder_embed", "encoder", "ctc_output", "joiner"])
def test_a_forward_pass_that_fails_is_refused_and_forgotten(make_model, features, at):
    model = make_model().train()
    with ModelTap(model, layers=[0], with_decoder=True) as hook:
        forward(model, *features)  # an earlier one that nobody took
        handle = model.get_submodule(at).register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            forward(model, *features)
        handle.remove()
        with pytest.raises(KDError, match="failed before its end.*run the model again"):
            hook.take()
        with pytest.raises(KDError, match="has made no forward pass"):
            hook.take()
        forward(model, *features)
        assert hook.take().decoder_out is not None


@pytest.mark.parametrize("at", ["encoder_embed", "encoder", "ctc_output.1"])
def test_an_encode_that_fails_leaves_nothing(make_model, features, at):
    model = make_model()
    with ModelTap(model, layers=[0]) as hook:
        handle = model.get_submodule(at).register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            hook.encode(*features)
        handle.remove()
        with pytest.raises(KDError, match="has made no forward pass"):
            hook.take()


def test_a_pass_without_decoder_or_head_has_nothing_of_an_earlier_one(
    make_model, features
):
    model = make_model().eval()
    x, x_lens = features
    with ModelTap(model, with_decoder=True) as hook, torch.no_grad():
        forward(model, x, x_lens)
        model.forward_encoder(x, x_lens)  # by hand
        out = hook.take()
        assert out.decoder_out is out.labels is out.ctc_logits is None
        forward(model, x, x_lens)
        model.use_transducer = False
        model(x=x, x_lens=x_lens, y=[[3], [5], [7]])
        out = hook.take()
        assert out.decoder_out is out.labels is None
        assert out.ctc_logits is not None


def test_a_head_that_is_asked_behind_take_leaves_nothing(make_model, features):
    """As the loss of n-best lists asks the decoder."""
    model = make_model().eval()
    with ModelTap(model, with_decoder=True) as hook:
        forward(model, *features)
        out = hook.take()
        model.decoder(torch.tensor([[0, 9]]))
        model.ctc_output(out.encoder_out)
        assert hook._outputs == {}


# Copies


def test_a_tapped_model_can_be_copied_after_a_forward_pass(make_model, features):
    model = make_model().train()
    with ModelTap(model) as hook:
        forward(model, *features)
        twin = copy.deepcopy(model)
        out = hook.take()
    assert out.ctc_logits.requires_grad
    for (name, a), b in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    model.eval()
    twin.eval()
    with torch.no_grad():
        assert torch.equal(forward(model, *features), forward(twin, *features))


def test_a_copys_forward_pass_is_not_taken_for_the_models_own(make_model, features):
    model = make_model().eval()
    with ModelTap(model) as hook, torch.no_grad():
        twin = copy.deepcopy(model)
        forward(twin, *features)
        with pytest.raises(KDError, match="no forward pass"):
            hook.take()


# Refusals


def test_take_before_a_forward_pass_is_refused(make_model):
    with ModelTap(make_model()) as hook:
        with pytest.raises(KDError, match="no forward pass .* run the model first"):
            hook.take()


def test_take_twice_is_refused(make_model, features):
    model = make_model().eval()
    with ModelTap(model) as hook, torch.no_grad():
        forward(model, *features)
        hook.take()
        with pytest.raises(KDError, match="since the last take"):
            hook.take()


def test_encode_does_not_leave_a_pass_to_take(make_model, features):
    with ModelTap(make_model()) as hook:
        hook.encode(*features)
        with pytest.raises(KDError):
            hook.take()


def test_a_model_without_ctc_head_is_refused(make_model):
    model = make_model(use_ctc=False)
    with pytest.raises(KDError, match="AsrModel has no CTC head .* `use_ctc` 1"):
        ModelTap(model)
    assert hooks_of(model) == []


def test_another_model_is_refused():
    with pytest.raises(KDError, match="Linear has no submodule 'encoder'"):
        ModelTap(torch.nn.Linear(2, 2))


def test_a_model_under_ddp_is_tapped_within(make_model, features, process_group):
    model = make_model()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    with ModelTap(ddp) as hook, ModelTap(model) as plain:
        asked = hook.encode(*features)
        assert torch.equal(asked.ctc_logits, plain.encode(*features).ctc_logits)
        model.eval()
        with torch.no_grad():
            forward(ddp, *features)
        assert hook.take().ctc_logits.shape == (3, 14, 11)
    assert hooks_of(model) == []


def test_a_lattice_of_more_labels_than_frames_is_refused(make_model, features):
    with ModelTap(make_model()) as hook:
        out = hook.encode(*features)
        t = int(out.encoder_out_lens[1])
        y = [[3], [5] * (t + 1), [7]]
        with pytest.raises(KDError, match=f"utterance 1 .* {t + 1} labels and {t} fr"):
            hook.lattice(out, y)
        y[1] = [5] * t
        assert hook.lattice(out, y).labels.size(1) == t


def test_a_batch_that_cr_ctc_doubles_is_taken_doubled(make_model, features):
    """Each utterance twice, with other dropout each time; encode() hears it once."""
    model = make_model().train()
    x, x_lens = features
    hook = ModelTap(model, layers=[1], with_decoder=True)
    torch.manual_seed(0)
    model(
        x=x,
        x_lens=x_lens,
        y=[[3, 4, 3], [5, 6], [7]],
        prune_range=3,
        use_cr_ctc=True,
    )
    out = hook.take()
    for rows in (out.ctc_logits, out.hidden[1], out.decoder_out, out.labels):
        assert len(rows) == 6
    assert torch.equal(out.encoder_out_lens[:3], out.encoder_out_lens[3:])
    assert torch.equal(out.labels[:3], out.labels[3:])
    assert not torch.equal(out.ctc_logits[:3], out.ctc_logits[3:])
    assert len(hook.encode(x, x_lens).ctc_logits) == 3 and model.training


def test_autocast_gives_the_same_within_its_precision(make_model, features):
    with ModelTap(make_model()) as hook:
        expected = hook.encode(*features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = hook.encode(*features)
            lattice = hook.lattice(found, [[3, 4, 3], [5, 6], [7]], 3)
    assert torch.equal(found.encoder_out_lens, expected.encoder_out_lens)
    a, b = (x.ctc_logits.float().softmax(-1) for x in (found, expected))
    for row, n in enumerate(found.encoder_out_lens):
        torch.testing.assert_close(a[row, :n], b[row, :n], rtol=0, atol=0.05)
    total = lattice.occupancy.sum((1, 2))
    labels = torch.tensor([3, 2, 1])
    torch.testing.assert_close(total, (found.encoder_out_lens + labels).float())


def test_the_decoders_output_is_that_of_the_models_own_pass(make_model, features):
    model = make_model().eval()
    hook = ModelTap(model, with_decoder=True)
    y = [[3, 4, 3], [5, 6], [7]]
    model(x=features[0], x_lens=features[1], y=y, prune_range=3)
    out = hook.take()
    assert out.labels.tolist() == [[0, 3, 4, 3], [0, 5, 6, 0], [0, 7, 0, 0]]
    assert torch.equal(out.decoder_out, model.decoder(out.labels))
    assert out.decoder_out.requires_grad


# The older Zipformer, whose encoder has its front end inside


class OldEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.front = torch.nn.Linear(80, 6)

    def forward(self, x, x_lens):
        lens = ((x_lens - 7) // 2 + 1) // 2
        return self.front(x)[:, 5 : 5 + 4 * int(lens.max()) : 4], lens


class OldModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = OldEncoder()
        self.ctc_output = torch.nn.Sequential(
            torch.nn.Dropout(0.1), torch.nn.Linear(6, 11), torch.nn.LogSoftmax(-1)
        )

    def forward(self, x, x_lens):
        out, lens = self.encoder(x, x_lens)
        return self.ctc_output(out), lens


def test_an_older_model_is_tapped_in_training_and_asked_as_a_teacher():
    torch.manual_seed(2)
    model = OldModel().eval()
    x, lens = torch.randn(2, 47, 80), torch.tensor([47, 33])
    hook = ModelTap(model)
    log_probs, out_lens = model(x, lens)
    taken = hook.take()
    torch.testing.assert_close(taken.ctc_logits.log_softmax(-1), log_probs)
    assert taken.ctc_logits.requires_grad and torch.equal(
        taken.encoder_out_lens, out_lens
    )
    assert taken.encoder_out.shape == (2, 10, 6) and taken.hidden_lens is None
    model.train()
    asked = hook.encode(x, lens)
    assert torch.equal(asked.ctc_logits, taken.ctc_logits) and model.training
    assert not asked.ctc_logits.requires_grad


def test_stacks_of_an_older_model_are_refused():
    with pytest.raises(KDError, match="stack 1.*older Zipformer.*give out"):
        ModelTap(OldModel(), layers=[1])
    ModelTap(OldModel(), layers=["out"]).close()


# The simple joiner


def test_the_simple_joiners_acoustic_half_is_that_of_the_forward_pass(
    make_model, features
):
    """encode() gives the same, and no other module runs a second time."""
    model = make_model().eval()
    calls = []
    model.simple_am_proj.register_forward_hook(lambda m, args, out: calls.append(out))
    with ModelTap(model, with_simple=True) as hook:
        forward(model, *features)
        out = hook.take()
        assert out.simple_logits is calls[0] and len(calls) == 1
        own = hook.encode(*features)
    expected = model.simple_am_proj(own.encoder_out)
    assert torch.equal(own.simple_logits, expected)
    assert not own.simple_logits.requires_grad


def test_gradients_flow_through_the_simple_joiner(make_model, features):
    model = make_model().train()
    with ModelTap(model, with_simple=True) as hook:
        forward(model, *features)
        hook.take().simple_logits.square().sum().backward()
    assert model.simple_am_proj.weight.grad.abs().max() > 0
    assert model.encoder_embed.out.weight.grad.abs().max() > 0
    assert model.simple_lm_proj.weight.grad is None


def test_no_simple_logits_unless_asked(make_model, features):
    model = make_model()
    with ModelTap(model) as hook:
        assert hook.encode(*features).simple_logits is None
        forward(model, *features)
        assert hook.take().simple_logits is None


def test_a_model_without_transducer_has_no_simple_joiner(make_model):
    model = make_model(use_transducer=False)
    with pytest.raises(KDError, match="AsrModel has no .*its simple joiner needs"):
        ModelTap(model, with_simple=True)
    assert hooks_of(model) == []

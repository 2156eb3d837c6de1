"""Hidden layers side by side: pairs, projectors, codes, and what is learned between."""

import copy

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import hidden_rows
from icefall_kd.losses.hidden import hidden_kd_loss
from icefall_kd.terms import HiddenTerm
from icefall_kd.terms.hidden import parse_layers
from icefall_kd.terms.inputs import TermInputs
from icefall_kd.types import EncoderOut, Targets


def student(c=5, t=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    lens = torch.tensor([t, t - 3])
    return EncoderOut(
        encoder_out=torch.randn(2, t, c, generator=g, requires_grad=True),
        encoder_out_lens=lens,
        hidden={2: torch.randn(2, 2 * t, c + 1, generator=g, requires_grad=True)},
        hidden_lens=2 * lens,
    )


def teacher(layers, t=7, seed=1):
    """Targets with layers of the widths that ``layers`` names."""
    g = torch.Generator().manual_seed(seed)
    hidden = {
        name: torch.randn(2, t, 1 if name == "out" else 2, c, generator=g)
        for name, c in layers.items()
    }
    return Targets(torch.tensor([t, t - 3]), parts={"hidden": hidden})


def hidden_term(layers="out", distance="mse", lr=1e-3):
    return HiddenTerm(1.0, layers, distance, lr)


def value(term, said, heard):
    term.prepare(said, heard)
    return term.value(TermInputs(said, heard))[0]


def test_the_term_is_the_sum_over_pairs():
    said, heard = student(), teacher({"out": 5, 3: 6})
    term = hidden_term("out:out,3:2", "cosine")
    expected = hidden_kd_loss(
        hidden_rows(said, "out"),
        heard.parts["hidden"]["out"],
        heard.lens,
        distance="cosine",
    ) + hidden_kd_loss(
        hidden_rows(said, 2), heard.parts["hidden"][3], heard.lens, distance="cosine"
    )
    torch.testing.assert_close(value(term, said, heard), expected)
    assert list(term.projectors.modules.parameters()) == [] and expected > 1


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_student_that_equals_its_teacher_has_zero_loss_and_gradient(kind):
    said = student()
    rows = {"out": hidden_rows(said, "out").detach()}
    heard = Targets(said.encoder_out_lens, parts={"hidden": rows})
    loss = value(hidden_term("out", kind), said, heard)
    loss.backward()
    assert loss == 0 and said.encoder_out.grad.abs().max() == 0


def test_a_projector_begins_with_the_teachers_first_channels():
    said, heard = student(c=5), teacher({"out": 8})
    term = hidden_term("out")
    x = torch.cat((said.encoder_out, torch.zeros(2, 7, 3)), -1).unsqueeze(2)
    expected = hidden_kd_loss(x, heard.parts["hidden"]["out"], heard.lens)
    torch.testing.assert_close(value(term, said, heard), expected)


def test_a_projector_learns_from_the_backward_pass_before():
    said, heard = student(), teacher({"out": 8})
    term = hidden_term("out", lr=0.05)
    losses = []
    for _ in range(40):
        term.projectors.step()
        loss = value(term, said, heard)
        loss.backward()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_the_random_state_is_left_alone():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    value(hidden_term("out"), student(), teacher({"out": 8}))
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.parametrize("factor", [1.0, 512.0, 0.25])
def test_neither_weight_nor_loss_scale_reach_the_projectors_gradient(factor):
    said, heard = student(), teacher({"out": 8})
    term = hidden_term("out")
    (factor * value(term, said, heard)).backward()
    assert term.projectors.reduce()
    (weight, bias) = term.projectors.modules.parameters()
    other = hidden_term("out")
    value(other, said, heard).backward()
    torch.testing.assert_close(
        weight.grad, next(other.projectors.modules.parameters()).grad
    )
    assert bias.grad.abs().max() > 0


@pytest.mark.parametrize("codes", [False, True])
def test_passes_of_several_weights_add_up_as_unweighted_ones(codes):
    """As with accumulation, while the weight moves and the loss scale with it."""

    def batch(seed):
        said, heard = student(seed=seed), teacher({"out": 8}, seed=seed + 9)
        if codes:
            g = torch.Generator().manual_seed(seed)
            heard.parts["hidden"] = {
                "out": torch.randint(256, (2, 7, 1, 4), generator=g)
            }
        return said, heard

    if codes:
        pytest.importorskip("multi_quantization")
    batches = [batch(seed) for seed in range(3)]

    def run(weights, together=False):
        term = hidden_term("out")
        terms = []
        for (said, heard), weight in zip(batches, weights):
            said.encoder_out.grad = None
            terms.append(weight * value(term, said, heard))
            if not together:
                terms.pop().backward()
        if together:
            sum(terms).backward()
        assert term.projectors.reduce()
        ours = [p.grad for p in term.projectors.modules.parameters()]
        return ours, [said.encoder_out.grad for said, _ in batches]

    expected, students = run([1.0, 1.0, 1.0])
    for weights in ([0.5, 0.1, 2.0], [65536.0, 32768.0, 1e-3]):
        for together in (False, True):
            found, moved = run(weights, together)
            torch.testing.assert_close(found, expected)
            scaled = [w * g for w, g in zip(weights, students)]
            torch.testing.assert_close(moved, scaled, rtol=1e-5, atol=1e-6)
    without, moved = run([1.0, 0.0, 1.0])
    assert moved[1].abs().max() == 0
    assert not all(map(torch.equal, without, expected))


def test_an_infinite_scale_is_not_learned_from():
    said, heard = student(), teacher({"out": 8})
    term = hidden_term("out")
    (torch.inf * value(term, said, heard)).backward()
    assert not term.projectors.reduce()


def test_an_overflow_is_not_learned_from():
    said, heard = student(), teacher({"out": 8})
    term = hidden_term("out")
    value(term, said, heard).backward()
    before = [p.detach().clone() for p in term.projectors.modules.parameters()]
    next(term.projectors.modules.parameters()).grad[0, 0] = torch.inf
    term.projectors.step()
    assert all(
        torch.equal(a, b) for a, b in zip(before, term.projectors.modules.parameters())
    )
    assert all(p.grad is None for p in term.projectors.modules.parameters())


def test_a_batch_without_layers_has_a_zero_term_with_its_graph():
    said, heard = student(), teacher({"out": 8})
    term = hidden_term("out")
    term.projectors.read_widths(heard.parts["hidden"])
    loss = value(term, said, Targets(heard.lens))
    loss.backward()
    assert loss == 0 and said.encoder_out.grad.abs().max() == 0
    term.projectors.step()  # with nothing to learn
    assert len(list(term.projectors.modules.parameters())) == 2


def test_frames_outside_the_mask_do_not_count():
    said, heard = student(), teacher({"out": 8})
    term = hidden_term("out")
    expected = value(term, said, heard)
    heard.parts["hidden"]["out"][1, 4:] = torch.nan
    with torch.no_grad():
        said.encoder_out[1, 4:] = 1e3
    torch.testing.assert_close(value(term, said, heard), expected)


def test_codes_are_predicted_by_their_cross_entropy():
    pytest.importorskip("multi_quantization")
    said = student(c=5)
    codes = torch.randint(256, (2, 7, 1, 4), generator=torch.Generator().manual_seed(3))
    heard = Targets(said.encoder_out_lens, parts={"hidden": {"out": codes}})
    term = hidden_term("out", lr=0.05)
    losses = []
    for _ in range(30):
        term.projectors.step()
        loss = value(term, said, heard)
        loss.backward()
        losses.append(float(loss))
    n = float(heard.mask.sum())
    chance = float(torch.tensor(256.0).log())
    assert 0.5 * chance < losses[0] / n < 3 * chance and losses[-1] < 0.2 * losses[0]
    assert said.encoder_out.grad[1, 4:].abs().max() == 0
    assert said.encoder_out.grad.abs().max() > 0


def test_what_was_learned_goes_on():
    said, heard = student(), teacher({"out": 8})
    term = hidden_term("out", lr=0.05)
    for _ in range(3):
        value(term, said, heard).backward()
        term.projectors.step()
    other = hidden_term("out", lr=0.05)
    other.projectors.load_state_dict(copy.deepcopy(term.projectors.state_dict()))
    torch.testing.assert_close(value(other, said, heard), value(term, said, heard))
    for x in (term, other):
        value(x, said, heard).backward()
        x.projectors.step()
    torch.testing.assert_close(value(other, said, heard), value(term, said, heard))


def test_projectors_of_other_layers_are_refused():
    term = hidden_term("out")
    term.projectors.load_state_dict(
        {"modules": {"3-2.weight": torch.zeros(1)}, "optimizer": {}}
    )
    with pytest.raises(KDError, match="remove kd.pt"):
        value(term, student(), teacher({"out": 8}))


@pytest.mark.parametrize(
    "text, pairs",
    [
        ("out", [("out", "out")]),
        ("3:2,out:out", [(3, 2), ("out", "out")]),
        ("1, 2:0", [(1, 1), (2, 0)]),
    ],
)
def test_pairs_are_read(text, pairs):
    assert parse_layers(text) == pairs


@pytest.mark.parametrize(
    "text, words",
    [
        ("a:b", "give pairs TEACHER:STUDENT"),
        ("1:-1", "give pairs"),
        ("", "give pairs"),
        ("1:out", "25 frames a second"),
        ("1:2,1:2", "twice"),
    ],
)
def test_what_is_no_pair_is_refused(text, words):
    with pytest.raises(KDError, match=words):
        parse_layers(text)


def test_a_layer_that_the_targets_lack_is_refused():
    term = hidden_term("4:2")
    with pytest.raises(KDError, match="keep layers \\['3'\\] .* not 4.*--keep-hidden"):
        value(term, student(), teacher({3: 6}))


def test_an_unknown_distance_is_refused():
    with pytest.raises(KDError, match="`HiddenTerm.distance` .* one of mse, cosine"):
        hidden_term("out", "l1")

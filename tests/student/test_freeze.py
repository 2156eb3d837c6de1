"""Frozen parts keep every bit, whatever the optimizer does, and thaw as they stood."""

import copy
import logging
import random
from types import SimpleNamespace

import pytest
import torch
from calm_model import calm
from torch import nn
from zipformer.modules.optim import ScaledAdam
from zipformer.utils import get_parameter_groups_with_lrs

from icefall_kd.errors import KDError
from icefall_kd.student.freeze import Freezer

PARTS = {
    "encoder_embed": "encoder_embed.",
    "encoder": "encoder.",
    "encoder.0": "encoder.encoders.0.",
    "encoder.1": "encoder.encoders.1.",
    "encoder.encoders.1": "encoder.encoders.1.",
    "encoder.1.encoder.layers.2": "encoder.encoders.1.encoder.layers.2.",
    "decoder": "decoder.",
    "joiner.output_linear": "joiner.output_linear.",
    "simple_am_proj": "simple_am_proj.",
    "ctc_output": "ctc_output.",
}


class Toy(nn.Module):
    """A model in whose parts the optimizer's special cases can be put."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(3, 3)
        self.odd = nn.ParameterDict({"matrix": torch.randn(5, 3)})
        self.odd["scalar"] = nn.Parameter(torch.tensor([0.5]))
        self.twin = nn.Parameter(torch.randn(5, 3))  # one state for both in ScaledAdam
        self.above = nn.Linear(5, 3)

    def forward(self, x):
        x = self.below(x)
        x = x @ self.odd["matrix"].t() * self.odd["scalar"] + x @ self.twin.t()
        return self.above(x)


def bits(module):
    """The parameters as they are in memory: 0 and -0 differ."""
    return {
        n: p.detach().clone().view(torch.int32) for n, p in module.named_parameters()
    }


def same(a, b):
    assert a.keys() == b.keys() and a
    return [torch.equal(a[n], b[n]) for n in a]


def make_optimizer(model, lr=0.02):
    groups = get_parameter_groups_with_lrs(model, lr=lr, include_names=True)
    return ScaledAdam(groups, lr=lr, clipping_scale=2.0)


def steps(model, optimizer, number, scaler=None, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        loss = model(torch.randn(7, 3, generator=generator)).square().sum()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


def loss_of(model, features):
    x, x_lens = features
    y = [[3, 4, 3], [5, 6], [7]]
    simple, pruned, ctc, *_ = model(x=x, x_lens=x_lens, y=y, prune_range=3)
    return 0.5 * simple + pruned + 0.2 * ctc


# Names


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_a_submodule_and_all_in_it(make_model, part):
    model = make_model()
    Freezer(model, part).update(0.0)
    for name, p in model.named_parameters():
        assert p.requires_grad != name.startswith(PARTS[part]), name


@pytest.mark.parametrize(
    "spec, words",
    [
        ("encoder.2", "'encoder.2'"),
        ("decoder frontend:2", "'frontend'"),
        ("decoder.embedding.weight", "'decoder.embedding.weight'"),  # no submodule
        ("ctc_output.0", "'ctc_output.0'"),  # dropout: no parameters
        ("encoder.0,decoder", "'encoder.0,decoder'"),
        ("module.decoder", "'module.decoder'"),
        (":2", "''"),
    ],
)
def test_a_part_that_there_is_not_is_refused(make_model, spec, words):
    with pytest.raises(KDError) as e:
        Freezer(make_model(), spec)
    said = str(e.value)
    assert words in said and "\n" not in said
    assert (
        "encoder_embed, encoder, decoder, joiner, simple_am_proj, simple_lm_proj, "
        "ctc_output, encoder.0, encoder.1, or" in said
    )


@pytest.mark.parametrize(
    "spec, words",
    [
        ("decoder:-1", "decoder:-1"),
        ("decoder:nan", "decoder:nan"),
        ("decoder:inf", "decoder:inf"),
        ("decoder:", "decoder:,"),
        ("decoder:two", "decoder:two"),
        ("decoder:1:2", "decoder:1:2"),
        ("decoder joiner decoder:2", "decoder twice, as decoder and decoder:2"),
        ("encoder.0 encoder.encoders.0", "encoder.encoders.0 twice"),
        ("encoder encoder.1:2", "encoder.encoders.1, which lies inside encoder,"),
        ("encoder.1.encoder.layers.0 encoder", "lies inside encoder,"),
    ],
)
def test_what_can_not_be_meant_is_refused(make_model, spec, words):
    model = make_model()
    with pytest.raises(KDError) as e:
        Freezer(model, spec)
    assert words in str(e.value) and "\n" not in str(e.value)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_nothing_left_to_train_is_refused(make_model):
    model = make_model()
    whole = "encoder_embed encoder decoder joiner simple_am_proj simple_lm_proj"
    Freezer(model, whole)  # the CTC head trains
    for spec in (whole + " ctc_output", whole + " ctc_output:1"):
        with pytest.raises(KDError, match="no parameter to train"):
            Freezer(model, spec)
    Freezer(model, whole + " ctc_output:1", epoch=1.0)
    for p in model.ctc_output.parameters():
        p.requires_grad_(False)
    with pytest.raises(KDError, match="no parameter to train"):
        Freezer(model, whole)


def test_ddp_that_waits_for_all_gradients_is_refused(process_group):
    ddp = nn.parallel.DistributedDataParallel
    with pytest.raises(KDError, match="find_unused_parameters=True"):
        Freezer(ddp(Toy()), "below")
    Freezer(ddp(Toy(), find_unused_parameters=True), "below")


# ScaledAdam


def as_trained(model):
    pass


def large(model):
    model.odd["matrix"].data.mul_(4.0)  # its rms is above 3


def far(model):
    model.odd["scalar"].data.fill_(12.0)  # beyond 10


def minus_zero(model):
    model.odd["matrix"].data[1, 2] = -0.0


@pytest.mark.parametrize("momentum", [0, 9], ids=["no-momentum", "momentum"])
@pytest.mark.parametrize("case", [as_trained, large, far, minus_zero])
def test_frozen_parts_keep_every_bit_under_scaled_adam(case, momentum):
    model = Toy()
    case(model)
    optimizer = make_optimizer(model)
    steps(model, optimizer, momentum)
    case(model)
    freezer, before = Freezer(model, "odd"), bits(model)
    freezer.update(0.0)
    steps(model, optimizer, 13)
    after = bits(model)
    for name, kept in zip(before, same(before, after), strict=True):
        assert kept == name.startswith("odd."), name


def test_the_gradient_of_the_batch_before_does_not_move_a_frozen_part():
    model = Toy()
    optimizer = make_optimizer(model)
    model(torch.ones(2, 3)).sum().backward()
    waiting = dict(model.odd.named_parameters())
    freezer, before = Freezer(model, "odd"), bits(model.odd)
    freezer.update(0.0)
    assert all(p.grad is None for p in waiting.values())
    optimizer.step()
    assert all(same(before, bits(model.odd)))


def test_a_part_thaws_where_it_stood_and_moves_from_there_on():
    """Its parameters were moved in the optimizer meanwhile."""
    model = Toy()
    large(model)
    optimizer = make_optimizer(model)
    steps(model, optimizer, 5)
    large(model)
    parameters = dict(model.odd.named_parameters())
    freezer, before = Freezer(model, "below odd:1.5"), bits(model)
    assert freezer.update(0.0) == []
    steps(model, optimizer, 9)
    assert freezer.update(1.4999) == []
    assert not torch.equal(parameters["matrix"].view(torch.int32), before["odd.matrix"])
    (part,) = freezer.update(1.5)
    assert str(part) == "odd:1.5" and freezer.pending == []
    assert all(same({n: before["odd." + n] for n in parameters}, bits(model.odd)))
    for name, p in model.odd.named_parameters():
        assert p is parameters[name] and p.requires_grad and p.grad is None
    steps(model, optimizer, 1)
    assert not any(same({n: before["odd." + n] for n in parameters}, bits(model.odd)))
    assert freezer.update(0.0) == []  # and is not frozen again
    assert model.odd["matrix"].requires_grad
    assert all(same({"w": before["below.weight"]}, {"w": bits(model)["below.weight"]}))


def test_what_never_was_frozen_trains_bit_for_bit_as_it_would():
    """With a part that gets no gradient anyway."""
    found = []
    for spec in ("", "unused"):
        model = Toy()
        model.unused = nn.Linear(3, 3)
        freezer, optimizer = Freezer(model, spec), make_optimizer(model)
        freezer.update(0.0)
        steps(model, optimizer, 11)
        found.append(bits(model))
    assert all(same(*found))


@pytest.mark.parametrize("before, after", [("odd", ""), ("", "odd"), ("odd", "below")])
def test_the_optimizers_states_load_whatever_is_frozen(before, after):
    models = []
    for spec in (before, after):
        model = Toy()
        freezer, optimizer = Freezer(model, spec), make_optimizer(model)
        freezer.update(0.0)
        steps(model, optimizer, 6)
        models.append((model, optimizer))
    (first, states), (second, optimizer) = models
    second.load_state_dict(first.state_dict())
    optimizer.load_state_dict(copy.deepcopy(states.state_dict()))
    known = bits(second)
    steps(second, optimizer, 3)
    for name, kept in zip(known, same(known, bits(second)), strict=True):
        assert kept == bool(after and name.startswith(after)), name


def test_the_optimizer_may_be_built_after_the_freezer():
    """As a recipe does; it then has all parameters, and a part that thaws moves."""
    model = Toy()
    parameters = list(model.parameters())
    freezer = Freezer(model, "odd:1")
    optimizer = make_optimizer(model)
    freezer.update(0.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in parameters}
    freezer.update(1.0)
    before = bits(model.odd)
    steps(model, optimizer, 1)
    assert not any(same(before, bits(model.odd)))


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch before 2.3")
def test_a_grad_scaler_finds_its_infs_without_the_frozen_gradients():
    model = Toy()
    freezer, optimizer = Freezer(model, "odd:1"), make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    freezer.update(0.0)
    before = bits(model)
    steps(model, optimizer, 2, scaler)
    assert scaler.get_scale() == 8.0
    kept = same(before, bits(model))
    assert kept == [name.startswith("odd.") for name in before]
    model.above.bias.register_hook(lambda grad: grad * float("inf"))
    before = bits(model)
    steps(model, optimizer, 1, scaler)
    assert scaler.get_scale() == 4.0 and all(same(before, bits(model)))


# Models


def test_the_checkpoint_has_the_same_keys_in_the_same_order(make_model):
    model, plain = make_model(), make_model()
    freezer = Freezer(model, "encoder_embed encoder.1 decoder:1")
    freezer.update(0.0)
    for _ in range(2):
        assert list(model.state_dict()) == list(plain.state_dict())
        for name, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        freezer.update(1.0)
    make_model(seed=4).load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("spec", ["encoder.1", "encoder_embed encoder.0", "decoder"])
def test_the_gradients_of_the_rest_are_those_without_freezing(
    make_model, features, spec
):
    found = []
    for freeze in ("", spec):
        random.seed(0)
        model = calm(make_model(), training=False).double()
        Freezer(model, freeze).update(0.0)
        loss = loss_of(model, (features[0].double(), features[1]))
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, grads), (frozen_loss, frozen_grads) = found
    assert frozen_loss.item() == pytest.approx(loss.item(), rel=1e-9)
    prefixes = tuple(PARTS[part] for part in spec.split())
    for name, grad in grads.items():
        if name.startswith(prefixes):
            assert frozen_grads[name] is None, name
        elif grad is None:  # a parameter of training mode alone
            assert frozen_grads[name] is None, name
        else:
            bound = 1e-6 * float(grad.abs().max())
            assert torch.allclose(grad, frozen_grads[name], rtol=0, atol=bound), name


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("", [True, True, True]),
        ("encoder_embed", [False, True, True]),
        ("encoder_embed encoder.0", [False, False, True]),
        ("encoder.0", [True, True, True]),  # the front-end below it trains
        ("encoder_embed encoder", [False, False, False]),
    ],
)
def test_nothing_goes_backward_below_what_trains(make_model, features, spec, expected):
    model, seen = make_model().train(), []
    for module in (model.encoder_embed, *model.encoder.encoders):
        module.register_forward_hook(
            lambda m, args, out: seen.append(
                (out[0] if isinstance(out, tuple) else out).requires_grad
            )
        )
    Freezer(model, spec).update(0.0)
    loss = loss_of(model, features)
    assert seen == expected and loss.requires_grad
    loss.backward()


def test_what_the_recipe_froze_stays_frozen(make_model):
    """An adapter recipe trains its adapters alone."""
    model = make_model()
    for name, p in model.named_parameters():
        p.requires_grad_("bypass" in name)
    parameters = dict(model.named_parameters())
    freezer = Freezer(model, "encoder.0:1 decoder:1")
    freezer.update(0.0)
    assert not any(p.requires_grad for p in model.encoder.encoders[0].parameters())
    for name, p in model.named_parameters():
        thaws = (
            name.startswith(("encoder.encoders.0.", "decoder.")) and "bypass" in name
        )
        assert (p is parameters[name]) != thaws, name
    assert len(freezer.update(1.0)) == 2
    for name, p in model.named_parameters():
        assert p is parameters[name] and p.requires_grad == ("bypass" in name), name


def test_a_parameter_of_two_modules_stays_one():
    model = Toy()
    model.other = nn.Linear(3, 3)
    model.other.weight = shared = model.below.weight
    freezer = Freezer(model, "below:1")
    freezer.update(0.0)
    assert model.other.weight is model.below.weight is not shared
    assert model.other.bias.requires_grad and not model.other.weight.requires_grad
    freezer.update(1.0)
    assert model.other.weight is model.below.weight is shared


def test_a_copy_of_a_frozen_model_is_frozen_on_its_own():
    model = Toy()
    freezer = Freezer(model, "odd:1")
    freezer.update(0.0)
    other = copy.deepcopy(model)
    freezer.update(1.0)
    assert model.odd["matrix"].requires_grad and not other.odd["matrix"].requires_grad


# Times


def test_parts_thaw_one_by_one_and_the_last_stays(make_model):
    model = make_model()
    freezer = Freezer(model, "decoder:2 encoder_embed encoder.0:0.5 joiner:2")
    assert freezer.pending == [0.5, 2, 2]
    thawed = {e: [p.name for p in freezer.update(e)] for e in (0, 0.49, 0.6, 1, 2.5, 9)}
    assert {e: names for e, names in thawed.items() if names} == {
        0.6: ["encoder.encoders.0"],
        2.5: ["decoder", "joiner"],
    }
    assert not any(p.requires_grad for p in model.encoder_embed.parameters())


def test_what_thawed_before_a_training_goes_on_stays_thawed(make_model):
    spec = "encoder_embed decoder:2 encoder.0:2.5 joiner:3 ctc_output:0"
    freezer = Freezer(make_model(), spec, epoch=2.0, thawed=["encoder.encoders.0:2.5"])
    assert [str(p) for p in freezer.parts] == ["encoder_embed", "joiner:3"]
    other_time = Freezer(make_model(), "encoder.0:4", thawed=["encoder.encoders.0:2.5"])
    assert other_time.pending == [4.0]
    to_the_end = Freezer(make_model(), "encoder.0", 9.0, ["encoder.encoders.0"])
    assert [str(p) for p in to_the_end.parts] == ["encoder.encoders.0"]


def test_the_log_says_what_is_frozen_and_what_thaws(make_model, caplog):
    model = make_model()
    caplog.set_level(logging.INFO)
    freezer = Freezer(model, "encoder.0 decoder:1.5")
    freezer.update(0.0)
    numbers = SimpleNamespace(
        stack=sum(p.numel() for p in model.encoder.encoders[0].parameters()),
        decoder=sum(p.numel() for p in model.decoder.parameters()),
    )
    assert caplog.messages == [
        f"Frozen: encoder.encoders.0 ({numbers.stack} parameters, to the end of this "
        f"training); decoder ({numbers.decoder} parameters, until epoch 1.5 of this "
        "training)"
    ]
    freezer.update(1.0)
    freezer.update(1.75)
    assert caplog.messages[1:] == [
        f"Thawed after 1.75 epochs: decoder ({numbers.decoder} parameters)"
    ]


def test_closing_thaws_what_is_frozen():
    model = Toy()
    parameters = list(model.parameters())
    freezer = Freezer(model, "odd below:3")
    freezer.update(0.0)
    freezer.close()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.requires_grad for p in parameters)

"""The account of what stands out in a model's linear layers."""

import pytest
import torch
from torch.nn import functional as F

from icefall_kd.errors import KDError
from icefall_kd.rounding import exported_linears, round_activation, round_weight
from icefall_kd.student.outliers import account_of_outliers, table


def batch_of(lengths=(41, 37), seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), 20, generator=generator)
    return x, torch.tensor(lengths), [[3, 4, 3], [5]][: len(lengths)]


@pytest.fixture
def model(make_model):
    return make_model().eval()


def by_name(model, batches):
    return {a.name: a for a in account_of_outliers(model, batches)}


def test_each_rounded_layer_has_an_account_and_the_worst_is_first(model):
    accounts = account_of_outliers(model, [batch_of()])
    assert {a.name for a in accounts} == {n for n, _ in exported_linears(model)}
    errors = [a.error for a in accounts]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0


def test_the_figures_of_a_layer_are_those_of_their_definitions(model):
    layer, seen = model.encoder.encoders[0].layers[0].feed_forward2.in_proj, []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = by_name(model, [batch_of((41,))])
    handle.remove()
    account = found["encoder.encoders.0.layers.0.feed_forward2.in_proj"]
    (x,), weight = seen, layer.weight.detach()
    rms = weight.square().mean().sqrt()
    assert account.weight_peak == pytest.approx(float(weight.abs().max() / rms))
    rows = weight.abs().amax(1)
    assert account.weight_spread == pytest.approx(float(rows.max() / rows.median()))
    span = (x.max().clamp(min=0) - x.min().clamp(max=0)) / x.square().mean().sqrt()
    assert account.activation_peak == pytest.approx(float(span), rel=1e-5)
    product = F.linear(x, weight)
    for name, rounded in (
        ("weight_error", F.linear(x, round_weight(weight))),
        ("row_error", F.linear(x, round_weight(weight, by_row=True))),
        ("activation_error", F.linear(round_activation(x), weight)),
    ):
        error = (rounded - product).square().sum((0, 1))
        share = (error / product.square().sum((0, 1))).median()
        assert getattr(account, name) == pytest.approx(float(share), rel=1e-3)


def test_an_outlier_in_a_weight_shows_and_a_scale_for_each_row_heals_it(model):
    before = by_name(model, [batch_of()])
    name = "encoder.encoders.0.layers.0.self_attn1.in_proj"
    layer = dict(exported_linears(model))[name]
    with torch.no_grad():
        layer.weight[0] *= 64
        layer.bias[0] *= 64
        model.get_submodule(name[:-8]).out_proj.weight[:, 0] /= 64
    after = by_name(model, [batch_of()])
    assert after[name].weight_spread > 20 * before[name].weight_spread
    out = name.replace("in_proj", "out_proj")
    assert after[out].activation_peak > before[out].activation_peak
    assert after[out].activation_error > 10 * before[out].activation_error
    assert after[name].weight_error > 100 * before[name].weight_error
    assert after[name].row_error < 2 * before[name].row_error


def test_an_utterance_is_measured_alone(model):
    x, lens, labels = batch_of()
    alone = [
        (x[i : i + 1, :n], lens[i : i + 1], labels[i : i + 1])
        for i, n in enumerate(lens.tolist())
    ]
    together, apart = by_name(model, [(x, lens, labels)]), by_name(model, alone)
    assert together == apart


def test_nothing_of_the_model_changes(model):
    before = {n: p.clone() for n, p in model.state_dict().items()}
    account_of_outliers(model, [batch_of()])
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_without_an_utterance_it_is_refused(model):
    with pytest.raises(KDError, match="no utterances"):
        account_of_outliers(model, [])


def test_the_table_ends_with_the_mean_of_all_layers(model):
    accounts = account_of_outliers(model, [batch_of()])
    rows = table(accounts, 3)
    assert [r["name"] for r in rows[:3]] == [a.name for a in accounts[:3]]
    mean = sum(a.weight_peak for a in accounts) / len(accounts)
    assert rows[3]["weight_peak"] == pytest.approx(mean)

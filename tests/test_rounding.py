"""Linear layers that compute as onnxruntime's int8 model of them."""

import copy
import math
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from torch import nn
from torch.nn import functional as F

from icefall_kd.rounding import (
    CHANNEL,
    SCALES,
    TENSOR,
    RoundedLinears,
    exported_linears,
    factors,
    linear_input,
    round_activation,
    round_weight,
)


def int8_session(weight, bias, path, gemm, scales=TENSOR):
    """What quantize_dynamic makes of a linear layer, in onnxruntime."""
    out, width = weight.shape
    sizes = ["n", "t", width][gemm:], ["n", "t", out][gemm:]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
        for name, size in zip("xy", sizes)
    )
    matrix = weight if gemm else weight.T
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(matrix.detach().numpy()), "w"),
        numpy_helper.from_array(bias.detach().numpy(), "b"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], "product"),
        helper.make_node("Add", ["b", "product"], ["y"], "sum"),
    ]
    if gemm:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)]
    graph = helper.make_graph(nodes, "linear", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    quantize_dynamic(
        model,
        str(path),
        op_types_to_quantize=["MatMul"],
        per_channel=scales == CHANNEL,
    )
    options = onnxruntime.SessionOptions()
    # The product of U8 and S8 overflows 16 bits on processors without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    return lambda values: torch.from_numpy(session.run(None, {"x": values.numpy()})[0])


def with_values(x, values):
    return x.flatten().index_copy(0, torch.arange(len(values)), values).view_as(x)


INPUTS = {
    "both signs": lambda x: x,
    "one large value": lambda x: with_values(x, torch.tensor([300.0])),
    "above zero alone": lambda x: x.abs() + 2,
    "below zero alone": lambda x: -x.abs() - 2,
    "zeros": torch.zeros_like,
    "one sign and zero": F.relu,
    "ties": lambda x: with_values(x.clamp(-1, 1), torch.tensor([0.0, 254.5, 0.5, 1.5])),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("scales", SCALES)
def test_a_rounded_layer_is_onnxruntimes(tmp_path, kind, gemm, scales):
    torch.manual_seed(len(kind))
    layer = nn.Linear(37, 11)
    with torch.no_grad():
        layer.weight[3] *= 50  # a scale of its own matters
        layer.weight[5] = 0.0
    path = tmp_path / "int8.onnx"
    run = int8_session(layer.weight, layer.bias, path, gemm, scales)
    x = INPUTS[kind](torch.randn(*((3, 5) if not gemm else (13,)), 37))
    weight = round_weight(layer.weight, by_row=scales == CHANNEL)
    rounded = F.linear(round_activation(x), weight, layer.bias)
    expected = run(x)
    size = expected.abs().max()
    assert (rounded - expected).abs().max() <= 2e-6 * size
    if kind != "zeros":  # rounding is what it is about
        assert (layer(x) - expected).abs().max() > 1e-4 * size


def test_a_weight_of_zeros_and_one_of_one_value_stay():
    for weight in (torch.zeros(3, 5), torch.full((3, 5), -0.3)):
        assert torch.allclose(round_weight(weight), weight, rtol=1e-7)


def test_a_weight_has_one_scale_of_127_steps():
    weight = torch.tensor([[1.27, 0.004, -0.016], [-0.255, 0.0, 0.026]])
    expected = torch.tensor([[1.27, 0.0, -0.02], [-0.26, 0.0, 0.03]])
    rounded = round_weight(weight)
    # -25.5 is a tie in decimals alone
    assert torch.allclose(rounded[0], expected[0], atol=1e-6)
    assert torch.allclose((rounded / 0.01).round() * 0.01, rounded, atol=1e-6)


def test_each_row_of_a_weight_is_rounded_alone_where_it_is_asked_for():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(6))
    weight[2] *= 100
    by_row = round_weight(weight, by_row=True)
    assert torch.equal(by_row, torch.cat([round_weight(row[None]) for row in weight]))
    assert (by_row - weight)[3].norm() < 0.1 * (round_weight(weight) - weight)[3].norm()


def test_rows_have_ranges_of_their_own_where_they_are_asked_for():
    x = torch.randn(4, 7, 9, generator=torch.Generator().manual_seed(1))
    x[1, 2] *= 1000
    by_row = round_activation(x, (0, 1))
    alone = torch.stack([round_activation(r) for r in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(by_row, alone)
    assert not torch.equal(by_row, round_activation(x))


@pytest.mark.parametrize("batch", [0, 1])
def test_utterances_have_ranges_of_their_own_where_they_are_asked_for(batch):
    x = torch.randn(4, 7, 9, generator=torch.Generator().manual_seed(1))
    x[1, 2] *= 1000
    by_utterance = round_activation(x, (batch,))
    alone = torch.stack([round_activation(u) for u in x.unbind(batch)], batch)
    assert torch.equal(by_utterance, alone)
    assert not torch.equal(by_utterance, round_activation(x))


@pytest.mark.parametrize("function", [round_weight, round_activation])
def test_the_gradient_is_straight_through(function):
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 7, dtype=torch.float64)
    rounded = function(x)
    assert not torch.equal(rounded, x)
    rounded.backward(grad)
    assert torch.equal(x.grad, grad)


def test_the_gradient_of_a_layer_is_that_at_the_rounded_values():
    torch.manual_seed(2)
    x = torch.randn(3, 5, requires_grad=True)
    weight = torch.randn(7, 5, requires_grad=True)
    grad = torch.randn(3, 7)
    F.linear(round_activation(x), round_weight(weight)).backward(grad)
    assert torch.allclose(x.grad, grad @ round_weight(weight))
    assert torch.allclose(weight.grad, grad.t() @ round_activation(x))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_leave_the_others_as_they_are(bad):
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(3))
    x[0] = 0.0
    spoilt = x.clone()
    spoilt[0, 4] = bad
    rounded = round_activation(spoilt)
    assert torch.equal(rounded[0, 4], spoilt[0, 4]) or math.isnan(bad)
    assert not torch.isfinite(rounded[0, 4])
    rounded[0, 4] = 0.0
    assert torch.equal(rounded, round_activation(x))
    by_row = round_activation(spoilt, (0,))
    assert torch.equal(by_row[1:], round_activation(x, (0,))[1:])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (3, 0)])
def test_nothing_is_rounded_of_an_empty_batch(shape):
    x = torch.zeros(shape, requires_grad=True)
    assert round_activation(x).shape == shape
    assert round_activation(x, range(x.dim() - 1)).shape == shape
    assert round_weight(x).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_rounded_in_float32(dtype):
    """The scale of a range of 60000 is far from float16's, and its sum beyond it."""
    x = torch.tensor([[60000.0, -60000.0, 470.6, 0.0]], dtype=dtype)
    rounded = round_activation(x)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, round_activation(x.float()).to(dtype))
    assert round_weight(x).dtype == dtype
    assert torch.equal(round_weight(x), round_weight(x.float()).to(dtype))


# A model


def encode(model, seed=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 41, 20, generator=generator)
    torch.manual_seed(seed)
    return model.forward_encoder(x, torch.tensor([41, 37]))[0]


@pytest.fixture
def calm_model(make_model):
    return make_model().eval()  # without dropout, chunks and balancers


def test_the_layers_are_those_that_an_export_rounds(calm_model):
    names = [name for name, _ in exported_linears(calm_model)]
    assert len(names) == len(set(names))
    assert {"encoder_embed.out", "ctc_output.1", "joiner.output_linear"} <= set(names)
    layer = "encoder.encoders.0.layers.0."
    of_layer = {n[len(layer) :] for n in names if n.startswith(layer)}
    attention = {"self_attn_weights.in_proj", "self_attn_weights.linear_pos"}
    others = {f"self_attn{i}.{j}_proj" for i in "12" for j in ("in", "out")}
    others |= {f"feed_forward{i}.{j}_proj" for i in "123" for j in ("in", "out")}
    others |= {f"conv_module{i}.{j}_proj" for i in "12" for j in ("in", "out")}
    assert attention | others <= of_layer
    assert not [n for n in names if n.startswith("simple_")]


def test_off_computes_the_same_bits_and_on_does_not(calm_model):
    before = encode(calm_model)
    is_on = [False]
    rounded = RoundedLinears(calm_model, lambda: is_on[0])
    assert torch.equal(encode(calm_model), before)
    is_on[0] = True
    assert not torch.equal(encode(calm_model), before)
    rounded.close()
    assert torch.equal(encode(calm_model), before)
    assert not [m for m in calm_model.modules() if "forward" in vars(m)]


def test_an_utterance_is_rounded_in_a_batch_as_alone(calm_model):
    x = torch.randn(2, 41, 20, generator=torch.Generator().manual_seed(8))
    x[1] *= 8.0  # a range of both would round the first one coarsely
    lens = torch.tensor([41, 41])
    exact = calm_model.forward_encoder(x[:1], lens[:1])[0]
    rounded = RoundedLinears(calm_model, lambda: True)
    together = calm_model.forward_encoder(x, lens)[0][:1]
    alone = calm_model.forward_encoder(x[:1], lens[:1])[0]
    rounded.close()
    # The products of two batches differ in the last bits, which a tie makes a step.
    assert (together - alone).norm() < 0.1 * (alone - exact).norm()


@pytest.mark.parametrize("scales", SCALES)
def test_every_layer_has_the_scales_that_are_asked_for(calm_model, scales):
    linears = RoundedLinears(calm_model, lambda: True, scales)
    for _, layer in exported_linears(calm_model):
        _, weight = factors(layer, torch.randn(2, layer.weight.size(1)))
        assert torch.equal(weight, round_weight(layer.weight, scales == CHANNEL))
    linears.close()


def test_a_state_dict_has_the_same_keys_and_parameters(calm_model):
    before = calm_model.state_dict()
    parameters = list(calm_model.parameters())
    rounded = RoundedLinears(calm_model, lambda: True)
    encode(calm_model)
    after = calm_model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(a is b for a, b in zip(parameters, calm_model.parameters()))
    rounded.close()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copy_of_the_model_does_not_round(calm_model, copied):
    before = encode(calm_model)
    rounded = RoundedLinears(calm_model, lambda: True)
    twin = copied(calm_model)
    assert torch.equal(encode(twin), before)
    assert not torch.equal(encode(calm_model), before)
    rounded.close()


def test_the_layer_with_an_activation_computes_as_its_own(calm_model):
    layers = [
        layer
        for _, layer in exported_linears(calm_model)
        if not isinstance(layer, nn.Linear)
    ]
    assert {layer.activation for layer in layers} == {"SwooshL", "SwooshR"}
    for layer in layers:
        x = 9 * torch.randn(3, 2, layer.weight.size(1))
        y = F.linear(linear_input(layer, x), layer.weight, layer.bias)
        assert torch.allclose(y, layer(x), atol=1e-5)


def test_dropout_is_that_of_the_layer_itself(calm_model):
    layer = next(
        layer
        for _, layer in exported_linears(calm_model)
        if not isinstance(layer, nn.Linear) and layer.dropout_shared_dim is not None
    )
    del layer.dropout_p  # a submodule, a schedule
    layer.dropout_p = 0.4
    x = torch.randn(50, 3, layer.weight.size(1), generator=torch.Generator())
    undropped = linear_input(layer, x)
    layer.train()
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    dropped = linear_input(layer, x)
    y = F.linear(dropped, layer.weight, layer.bias)
    assert torch.allclose(y, expected, atol=1e-5)
    assert not torch.allclose(dropped, undropped)

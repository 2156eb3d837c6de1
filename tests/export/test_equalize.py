"""Models whose channels are of like size, with the same output."""

import copy

import pytest
import torch

from icefall_kd.export.equalize import equalize
from icefall_kd.rounding import RoundedLinears


def encode(model):
    x = torch.randn(2, 57, 20, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.forward_encoder(x, torch.tensor([57, 51]))[0]


def spoil(model, factor=512.0):
    """Make one channel of each pair large, and leave the output as it is."""

    def scale(layer, row, by):
        layer.weight[row] *= by
        layer.bias[row] *= by

    with torch.no_grad():
        for module in model.encoder.modules():
            kind = type(module).__name__
            if kind == "SelfAttention":
                scale(module.in_proj, 1, factor)
                module.out_proj.weight[:, 1] /= factor
            elif kind == "NonlinAttention":
                scale(module.in_proj, module.hidden_channels, factor)
                scale(module.in_proj, 2 * module.hidden_channels, 1 / factor)
            elif kind == "ConvolutionModule":
                scale(module.in_proj, 0, factor)
                for m in module.depthwise_conv.modules():
                    if hasattr(m, "weight"):
                        m.weight[0] /= factor
            elif kind == "RelPositionMultiheadAttentionWeights":
                keys = module.num_heads * module.query_head_dim
                scale(module.in_proj, 0, factor)
                scale(module.in_proj, keys, 1 / factor)
                scale(module.in_proj, 2 * keys, factor)
                module.linear_pos.weight[0] /= factor


@pytest.fixture(params=[False, True], ids=["offline", "causal"])
def model(request, make_model):
    if request.param:
        return make_model(causal=True, chunk_size="8", left_context_frames="16").eval()
    return make_model().eval()


def test_the_output_stays_as_it_is(model):
    before, parameters = encode(model), copy.deepcopy(model.state_dict())
    layers = sum(type(m).__name__ == "SelfAttention" for m in model.modules()) // 2
    assert equalize(model) == 6 * layers
    assert (encode(model) - before).abs().max() < 2e-5 * before.abs().max()
    changed = [n for n, p in model.state_dict().items() if (p != parameters[n]).any()]
    assert any("conv_module2.depthwise_conv" in name for name in changed)
    assert any("linear_pos" in name for name in changed)


def test_int8_rounds_a_model_with_outliers_as_one_without(model):
    exact = encode(model)
    errors = []
    for prepare in (lambda m: None, spoil, lambda m: (spoil(m), equalize(m))):
        other = copy.deepcopy(model)
        prepare(other)
        rounded = RoundedLinears(other, lambda: True)
        errors.append(float((encode(other) - exact).norm()))
        rounded.close()
    plain, spoilt, equalized = errors
    assert spoilt > 3 * plain
    assert equalized < 1.5 * plain


def test_both_sides_of_a_pair_have_the_same_size(model):
    spoil(model)
    equalize(model)
    for module in model.encoder.modules():
        kind = type(module).__name__
        if kind == "SelfAttention":
            made = module.in_proj.weight.abs().amax(1)
            assert torch.allclose(made, module.out_proj.weight.abs().amax(0))
        elif kind == "RelPositionMultiheadAttentionWeights":
            keys = module.num_heads * module.query_head_dim
            made = module.in_proj.weight.abs().amax(1)
            assert torch.allclose(made[:keys], made[keys : 2 * keys])
            positions = module.linear_pos.weight.abs().amax(1)
            assert torch.allclose(made[2 * keys :], positions)
        elif kind == "ConvolutionModule":
            made = module.in_proj.weight.abs().amax(1)[: len(module.out_proj.weight)]
            assert torch.allclose(made, made[0].expand_as(made))


def test_channels_of_zeros_stay_finite(model):
    with torch.no_grad():
        for module in model.encoder.modules():
            if type(module).__name__ == "SelfAttention":
                module.in_proj.weight[0] = 0.0
                module.in_proj.bias[0] = 0.0
    before = encode(model)
    equalize(model)
    assert (encode(model) - before).abs().max() < 2e-5 * before.abs().max()

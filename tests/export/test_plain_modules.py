"""The modules for one length compute what the recipe's compute."""

import copy

import pytest
import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.export.plain_modules import Valid, plain_copy
from icefall_kd.zipformer import encoder_frames, stack_frames

LENGTH = 61


def alone(model, x):
    """The encoder output of an utterance by the recipe's own modules."""
    with torch.no_grad():
        return model.forward_encoder(x, torch.tensor([x.size(1)]))[0]


def plain_output(model, x, length, masked=True):
    """The same by the plain modules for ``length``, behind which lie large numbers."""
    valid = Valid()
    plain = plain_copy(model, stack_frames(length), valid)
    if masked:
        mask = x.new_zeros(1, stack_frames(length))
        mask[:, : stack_frames(x.size(1))] = 1.0
        valid.set(mask)
    padded = nn.functional.pad(x, (0, 0, 0, length - x.size(1)), value=5.0)
    with torch.no_grad():
        out, lengths = plain.encoder_embed(padded, torch.tensor([length]))
        out, _ = plain.encoder(out.permute(1, 0, 2), lengths)
    return out.permute(1, 0, 2)[:, : encoder_frames(x.size(1))]


@pytest.fixture(scope="module", params=[False, True], ids=["offline", "causal"])
def model(request, make_model):
    model = make_model(
        causal=request.param,
        downsampling_factor="1,4",
        cnn_module_kernel="7,9",
        num_encoder_layers="1,2",
        chunk_size="-1",
        left_context_frames="-1",
    )
    return model.double().eval()


@pytest.fixture
def utterance():
    return torch.randn(
        1, LENGTH, 20, generator=torch.Generator().manual_seed(3)
    ).double()


@pytest.mark.parametrize("frames", [61, 60, 59, 47, 30, 11, 9])
def test_an_utterance_of_any_length_comes_out_as_alone(model, utterance, frames):
    x = utterance[:, :frames]
    difference = plain_output(model, x, LENGTH) - alone(model, x)
    assert difference.abs().max() <= 1e-7


@pytest.mark.parametrize("length", [9, 11, 13, 64])
def test_every_length_of_the_form_is_right(model, utterance, length):
    x = utterance[:, :length]
    difference = plain_output(model, x, length) - alone(model, x)
    assert difference.abs().max() <= 1e-7


def test_without_a_mask_the_padding_is_heard_and_a_full_utterance_is_right(
    model, utterance
):
    full = plain_output(model, utterance, LENGTH, masked=False)
    assert (full - alone(model, utterance)).abs().max() <= 1e-7
    x = utterance[:, :40]
    short = plain_output(model, x, LENGTH, masked=False)
    assert (short - alone(model, x)).abs().max() > 1e-2


def test_the_model_and_its_classes_stay_as_they_are(model, utterance):
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    forwards = [type(module).forward for module in model.modules()]
    out = alone(model, utterance)
    plain_output(model, utterance, LENGTH)
    assert [type(module) for module in model.modules()] == kinds
    assert [type(module).forward for module in model.modules()] == forwards
    assert not any("forward" in vars(module) for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(alone(model, utterance), out)


def test_a_model_without_a_part_of_the_zipformer_is_refused(make_model):
    model = make_model(num_encoder_layers="1,1")
    del model.encoder_embed.convnext
    with pytest.raises(KDError, match="has no encoder_embed.convnext.depthwise_conv"):
        plain_copy(model, 20, Valid())


def test_a_layer_that_convolves_otherwise_is_refused(make_model):
    model = make_model(num_encoder_layers="1,1")
    model.encoder.encoders[0].layers[0].conv_module2.depthwise_conv = nn.Identity()
    with pytest.raises(KDError, match="convolves by Identity"):
        plain_copy(model, 20, Valid())

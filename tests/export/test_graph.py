"""The parts that take the places of a recipe's modules compute the same."""

import pytest
import torch
from exporting import encoded

from icefall_kd.errors import KDError
from icefall_kd.export.graph import EncoderAlone, OfflineEncoder, exportable, less_mean
from icefall_kd.model_state import as_if_alone
from icefall_kd.zipformer import stack_frames

SHORT = {"num_encoder_layers": "1,1", "feature_dim": 20}


@pytest.fixture
def causal(make_model):
    changes = {"causal": True, "chunk_size": "-1", "left_context_frames": "-1"}
    return make_model(**SHORT, **changes).eval()


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [9, 11, 60, 2300])
def test_an_exportable_model_encodes_as_its_own(make_model, num_frames):
    """2300 feature frames are more than the 1000 stack frames of the recipe's table."""
    model = make_model(**SHORT).eval()
    encoder = OfflineEncoder(exportable(model), torch.nn.Identity(), False)
    x, x_lens = torch.randn(1, num_frames, 20), torch.tensor([num_frames])
    expected, lens = encoded(model, x, x_lens)
    out, out_lens = encoder(x, x_lens)
    assert out_lens.tolist() == lens.tolist()
    assert torch.allclose(out, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [9, 13, 17, 61])
def test_a_causal_model_hears_utterances_shorter_than_its_kernel(causal, num_frames):
    encoder = OfflineEncoder(exportable(causal), torch.nn.Identity(), False)
    x, x_lens = torch.randn(1, num_frames, 20), torch.tensor([num_frames])
    expected, _ = encoded(causal, x, x_lens)
    assert torch.allclose(encoder(x, x_lens)[0], expected, atol=1e-5)


@torch.no_grad()
def test_no_utterance_of_a_batch_changes_because_of_the_others(make_model, features):
    model = make_model(**SHORT).eval()
    encoder = OfflineEncoder(exportable(model), torch.nn.Identity(), True)
    x, x_lens = features
    out, lens = EncoderAlone(encoder)(x, x_lens)
    in_batch, _ = encoder(x, x_lens)
    for i, (n, m) in enumerate(zip(x_lens, lens)):
        alone, _ = encoder(x[i : i + 1, :n], n[None])
        assert torch.allclose(out[i, :m], alone[0], atol=1e-5)
    # Else the recipe's own batches would do.
    assert not torch.allclose(in_batch[2, : lens[2]], out[2, : lens[2]], atol=1e-3)


def test_the_mean_is_that_of_valid_frames():
    x = torch.randn(2, 7, 3) + 5
    out = less_mean(x, torch.tensor([7, 4]), silence=-3.0)
    assert torch.allclose(out[0], x[0] - x[0].mean(0), atol=1e-6)
    assert torch.allclose(out[1, :4], x[1, :4] - x[1, :4].mean(0), atol=1e-6)
    assert (out[1, 4:] == -3).all()


@torch.no_grad()
def test_the_graph_takes_the_mean_off(make_model):
    model = make_model(**SHORT).eval()
    encoder = OfflineEncoder(exportable(model), torch.nn.Identity(), True)
    x, x_lens = torch.randn(1, 40, 20), torch.tensor([40])
    expected, _ = encoded(model, x - x.mean(1, keepdim=True), x_lens)
    assert torch.allclose(encoder(x + 7, x_lens)[0], expected, atol=1e-4)


@torch.no_grad()
def test_the_model_and_its_classes_stay_as_they_are(make_model):
    model = make_model(**SHORT).eval()
    x, x_lens = torch.randn(1, 50, 20), torch.tensor([50])
    names = [(name, type(m)) for name, m in model.named_modules()]
    forwards = {type(m): type(m).forward for m in model.modules()}
    before = encoded(model, x, x_lens)[0]
    copy = exportable(model)
    with as_if_alone(copy, stack_frames(x_lens)):
        OfflineEncoder(copy, torch.nn.Identity(), False)(x, x_lens)
    for p in copy.parameters():
        p.zero_()
    assert [(name, type(m)) for name, m in model.named_modules()] == names
    assert {type(m): type(m).forward for m in model.modules()} == forwards
    assert torch.equal(encoded(model, x, x_lens)[0], before)


def test_another_model_is_refused():
    with pytest.raises(KDError, match="no encoder_embed, and the Zipformer's"):
        exportable(torch.nn.Linear(2, 2))

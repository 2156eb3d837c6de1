"""What is known of the recipes' models: frames and heads."""

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.zipformer import (
    MIN_FRAMES,
    ctc_linear,
    encoder_frames,
    has_ctc,
    has_transducer,
    require_transducer,
    stack_frames,
)


def test_frames_are_those_of_the_model(make_model):
    model = make_model().eval()
    for n in (MIN_FRAMES, 10, 11, 12, 13, 42, 61):
        x, x_lens = torch.zeros(1, n, 20), torch.tensor([n])
        with torch.no_grad():
            _, inner_lens = model.encoder_embed(x, x_lens)
            _, lens = model.forward_encoder(x, x_lens)
        assert stack_frames(n) == int(inner_lens) and encoder_frames(n) == int(lens)
    assert encoder_frames(MIN_FRAMES) == 1 and encoder_frames(MIN_FRAMES - 1) == 0


@pytest.mark.parametrize(
    "ctc, transducer", [(True, True), (True, False), (False, True)]
)
def test_heads_are_told_apart(make_model, ctc, transducer):
    model = make_model(use_ctc=ctc, use_transducer=transducer)
    assert has_ctc(model) is ctc and has_transducer(model) is transducer


def test_ctc_linear_is_the_layer_before_log_softmax(make_model):
    model = make_model()
    assert ctc_linear(model) is model.ctc_output[1]
    with pytest.raises(KDError, match="AsrModel has no CTC head .* `use_ctc` 1"):
        ctc_linear(make_model(use_ctc=False))


def test_a_model_without_a_part_of_the_transducer_is_refused(make_model):
    model = make_model()
    require_transducer(model, "a lattice", "distil the CTC head alone")
    model.simple_lm_proj = None
    with pytest.raises(KDError, match="no simple_lm_proj, and a lattice .*CTC head"):
        require_transducer(model, "a lattice", "distil the CTC head alone")

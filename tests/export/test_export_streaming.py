"""A causal model's file says chunk by chunk what torch says."""

import numpy as np
import pytest
import torch
from exporting import encoded

from icefall_kd.errors import KDError
from icefall_kd.export.build import Wanted, check_form, chunk_encoder
from icefall_kd.export.check import sherpa_can
from icefall_kd.export.features import FeatureSettings
from icefall_kd.export.graph import exportable
from icefall_kd.export.sides import onnx_side
from icefall_kd.export.streaming import (
    ChunkEncoder,
    chunks_of,
    padded,
    torch_step,
    write_streaming,
)
from icefall_kd.teacher.spec import LoadedTeacher

SIZES = {"chunk_size": "8", "left_context_frames": "16"}
CAUSAL = {"causal": True, "num_encoder_layers": "1,1", "cnn_module_kernel": "7,5"}


@pytest.fixture(scope="module")
def causal(make_model, make_settings):
    model = make_model(**CAUSAL, **SIZES).eval()
    return LoadedTeacher("exp", model, make_settings(**CAUSAL, **SIZES))


def test_a_chunk_is_what_the_recipe_streams(causal):
    """All but the last chunks are those of the whole utterance under the chunk mask."""
    chunks = chunk_encoder(causal)
    x = torch.randn(1, 29 + 16 * 5, 20)
    rows = chunks.encode(torch_step(chunks), x.numpy())
    assert len(rows) == 6 * 4
    whole, _ = encoded(causal.model, x, torch.tensor([x.size(1)]))
    assert np.abs(rows[:20] - whole[0, :20].numpy()).max() < 1e-4


@pytest.mark.parametrize("part", ["encoder", "model"])
def test_the_file_says_what_torch_says(causal, tmp_path, part):
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    path = tmp_path / "a.onnx"
    write_streaming(exportable(causal.model), causal.settings, part, path, 13)
    head = causal.model.joiner.encoder_proj
    if part == "model":
        head = causal.model.ctc_output
    chunks = ChunkEncoder(causal.model, head).eval()
    side = onnx_side("fp32", {part: path}, chunks)
    x = np.random.default_rng(1).normal(size=(1, 29 + 16 * 4, 20)).astype(np.float32)
    found = (side.encode or side.log_probs)(x)
    expected = chunks.encode(torch_step(chunks), x)
    assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-4
    session = ort.InferenceSession(str(path))
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["T"], metadata["decode_chunk_len"]) == ("29", "16")
    assert metadata["left_context_len"] == "16,8"
    assert metadata["cnn_module_kernels"] == "7,5"
    names = [value.name for value in session.get_inputs()]
    assert names[:2] == ["x", "cached_key_0"] and names[-1] == "processed_lens"


def test_one_chunk_size_is_needed():
    with pytest.raises(
        KDError, match="--chunk-size is 16,32 in training, and a causal"
    ):
        chunks_of({"chunk_size": "16,32", "left_context_frames": "64"})
    with pytest.raises(KDError, match="--left-context-frames is -1, and a stream's"):
        chunks_of({"chunk_size": "16", "left_context_frames": "-1"})
    whole = {"chunk_size": "-1", "left_context_frames": "64,128"}
    assert chunks_of(whole) == (-1, -1)


def test_features_that_need_the_end_are_not_streamed(causal):
    wanted = Wanted(("onnx",), ("ctc",))
    mean = FeatureSettings(8000, 20, "utterance")
    with pytest.raises(KDError, match="its model can't be streamed: give --chunk-size"):
        check_form(causal.settings, wanted, mean)
    check_form({**causal.settings, "chunk_size": "-1"}, wanted, mean)


@pytest.mark.parametrize("length", [1, 2000, 2320, 5000, 7777])
def test_audio_lies_in_whole_chunks(length):
    audio = padded(np.ones(length, dtype=np.float32), 8000, 29)
    assert audio[:length].all() and not audio[length:].any()
    frames = len(audio) // 80
    chunks = (frames - 29) // 16
    assert 0 < (frames - 29) % 16 < 15  # a frame more or less is nothing
    assert 29 + 16 * chunks >= length / 80


def test_sherpa_is_asked_for_what_it_can_read(causal):
    chunks = chunk_encoder(causal)
    assert sherpa_can("ctc", None) and sherpa_can("transducer", chunks)
    assert not sherpa_can("ctc", chunks)  # 20 Mel bins
    chunks.encoder_embed.out_width, width = 19, chunks.encoder_embed.out_width
    assert sherpa_can("ctc", chunks)
    chunks.encoder_embed.out_width = width

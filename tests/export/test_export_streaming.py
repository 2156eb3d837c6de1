"""A causal model's file says chunk by chunk what torch says."""

import wave

import numpy as np
import pytest
import torch
from exporting import encoded

from icefall_kd.decode.streaming import StreamingEncoder
from icefall_kd.errors import KDError
from icefall_kd.export.build import Wanted, check_form, chunk_encoder
from icefall_kd.export.check import sherpa_can
from icefall_kd.export.features import FeatureSettings
from icefall_kd.export.files import write_offline
from icefall_kd.export.folder import write_tokens
from icefall_kd.export.graph import exportable
from icefall_kd.export.sherpa import recognize
from icefall_kd.export.sides import onnx_side
from icefall_kd.export.streaming import (
    ChunkEncoder,
    chunks_of,
    padded,
    torch_step,
    write_streaming,
)
from icefall_kd.teacher.spec import LoadedTeacher
from icefall_kd.transcripts.recognizer import Method

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
    wanted = Wanted(("torchscript",), ("ctc",))
    with pytest.raises(KDError, match="--forms has torchscript, and a stream"):
        check_form(causal.settings, wanted, FeatureSettings(8000, 20))


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


# sherpa-onnx, from wav files. It streams CTC models of 80 Mel bins alone.

RATE, BINS, SECONDS = 16000, 80, (0.9, 1.7, 2.6, 3.3, 4.1, 5.0)
NAMES = ["<blk>", *(f"<{i}>" for i in range(1, 25))]


def write_wav(path, seconds, seed):
    """Noise whose loudness and colour change four times a second."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(round(4 * seconds)):
        noise = rng.normal(size=RATE // 4)
        kernel = rng.normal(size=rng.integers(1, 40))
        piece = np.convolve(noise, kernel / np.abs(kernel).sum(), "same")
        pieces.append(piece * 10 ** rng.uniform(2.5, 4.2))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        samples = np.concatenate(pieces).clip(-32768, 32767)
        file.writeframes(samples.astype("<i2").tobytes())


def read_wav(path):
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.float32) / 32768


@torch.no_grad()
def make_talkative(model, rows):
    """Untrained heads say one token always; these say another one in most frames.

    Args:
      model: Is changed.
      rows: (T, C), some encoder output.
    """
    linear = model.ctc_output[1]
    linear.bias -= linear(rows).mean(0)
    linear.bias[0] += linear(rows).std()
    joiner = model.joiner
    context = model.decoder(torch.zeros(1, 2, dtype=torch.int64), need_pad=False)
    logits = joiner(rows, context[:, 0].expand(len(rows), -1))
    joiner.output_linear.bias -= logits.mean(0)
    joiner.output_linear.bias[0] += logits.std()


@pytest.fixture(scope="module")
def talkative(make_model, make_settings, tmp_path_factory):
    """A causal model of 80 Mel bins, its files, and utterances as wav files."""
    pytest.importorskip("onnx")
    pytest.importorskip("sherpa_onnx")
    folder = tmp_path_factory.mktemp("talkative")
    changes = {**CAUSAL, **SIZES, "feature_dim": BINS, "vocab_size": 25}
    model, settings = make_model(**changes).eval(), make_settings(**changes)
    features = FeatureSettings(RATE, BINS)
    wavs = [folder / f"{i}.wav" for i in range(len(SECONDS))]
    for i, seconds in enumerate(SECONDS):
        write_wav(wavs[i], seconds, i)
    heard = torch.from_numpy(features.of_samples(read_wav(wavs[-1])[None]))
    chunks = list(StreamingEncoder(model)(heard))
    make_talkative(model, torch.cat(chunks, 1)[0])
    copy = exportable(model)
    for part in ("encoder", "model"):
        write_streaming(copy, settings, part, folder / f"{part}.onnx", 13)
    for part in ("decoder", "joiner"):
        options = {"takes_mean": False, "opset": 13}
        write_offline(copy, settings, part, folder / f"{part}.onnx", **options)
    write_tokens(folder / "tokens.txt", NAMES)
    return model, features, wavs


def simulated(model, head, features, samples):
    """The tokens of our streaming simulation, of all whole chunks."""
    encoder = StreamingEncoder(model)
    array = features.of_samples(samples[None])
    num_frames = 2 * encoder.chunk_size + 13
    whole = (len(array) - num_frames) // (2 * encoder.chunk_size) + 1
    out = torch.cat(list(encoder(torch.from_numpy(array))), 1)
    out = out[:, : whole * encoder.chunk_size // 2]
    method = Method("ctc-greedy-search" if head == "ctc" else "greedy_search")
    found = method.search(model, 0)(out, torch.tensor([out.size(1)]))
    return [NAMES[token] for token in found.hypotheses[0].tokens]


@pytest.mark.slow
@pytest.mark.parametrize(
    "head, parts",
    [("transducer", ("encoder", "decoder", "joiner")), ("ctc", ("model",))],
)
def test_sherpa_onnx_streams_from_wav_files_what_the_simulation_finds(
    talkative, tmp_path, head, parts
):
    model, features, wavs = talkative
    files = {part: wavs[0].with_name(f"{part}.onnx") for part in parts}
    tokens = wavs[0].with_name("tokens.txt")
    audio = [padded(read_wav(path), RATE, 29) for path in wavs]
    settings = features.as_dict()
    found = recognize(files, tokens, settings, audio, tmp_path, streams=True)["tokens"]
    expected = [simulated(model, head, features, samples) for samples in audio]
    assert found == expected
    # It can fail: the utterances have tokens, and not the same ones.
    assert all(len(set(row)) > 2 for row in expected)
    assert len({tuple(row) for row in expected}) == len(wavs)

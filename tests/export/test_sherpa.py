"""sherpa-onnx finds in wav files, with files of ours, what torch finds.

It streams CTC models of 80 Mel bins alone.
"""

import wave

import numpy as np
import pytest
import torch
from exporting import encoded

from icefall_kd.decode.streaming import StreamingEncoder
from icefall_kd.export.features import FeatureSettings
from icefall_kd.export.files import write_offline
from icefall_kd.export.folder import write_tokens
from icefall_kd.export.graph import exportable
from icefall_kd.export.sherpa import recognize
from icefall_kd.export.streaming import padded, write_streaming
from icefall_kd.transcripts.recognizer import Method

CAUSAL = {
    "causal": True,
    "num_encoder_layers": "1,1",
    "cnn_module_kernel": "7,5",
    "chunk_size": "8",
    "left_context_frames": "16",
}
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
    joiner = model.joiner
    joiner.decoder_proj.weight *= 0.1  # what was found before matters less
    context = model.decoder(torch.zeros(1, 2, dtype=torch.int64), need_pad=False)
    contexts = context[:, 0].expand(len(rows), -1)
    for linear, logits in (
        (model.ctc_output[1], lambda: model.ctc_output[1](rows)),
        (joiner.output_linear, lambda: joiner(rows, contexts)),
    ):
        linear.bias -= logits().mean(0)
        linear.bias[0] += logits().std()


@pytest.fixture(scope="module", params=["streaming", "whole"])
def talkative(request, make_model, make_settings, tmp_path_factory):
    """A model of 80 Mel bins, causal or not, its files, and utterances as wav files."""
    pytest.importorskip("onnx")
    pytest.importorskip("sherpa_onnx")
    folder = tmp_path_factory.mktemp("talkative")
    changes = {"feature_dim": BINS, "vocab_size": 25}
    if request.param == "streaming":
        changes.update(CAUSAL)
    model, settings = make_model(**changes).eval(), make_settings(**changes)
    wavs = [folder / f"{i}.wav" for i in range(len(SECONDS))]
    for i, seconds in enumerate(SECONDS):
        write_wav(wavs[i], seconds, i)
    make_talkative(model, encoder_out(model, read_wav(wavs[-1]))[0])
    copy, options = exportable(model), {"takes_mean": False, "opset": 13}
    for part in ("encoder", "model", "decoder", "joiner"):
        path = folder / f"{part}.onnx"
        if part in ("encoder", "model") and request.param == "streaming":
            write_streaming(copy, settings, part, path, 13)
        else:
            write_offline(copy, settings, part, path, **options)
    write_tokens(folder / "tokens.txt", NAMES)
    return model, wavs


@torch.no_grad()
def encoder_out(model, samples):
    """Of torch (1, T, C); of a causal model our streaming simulation's whole chunks."""
    x = torch.from_numpy(FeatureSettings(RATE, BINS).of_samples(samples[None]))
    if not model.encoder.causal:
        return encoded(model, x[None], torch.tensor([len(x)]))[0]
    encoder = StreamingEncoder(model)
    shift = 2 * encoder.chunk_size
    chunks = (len(x) - shift - 13) // shift + 1
    return torch.cat(list(encoder(x)), 1)[:, : chunks * shift // 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, parts",
    [
        ("greedy_search", ("encoder", "decoder", "joiner")),
        ("ctc-greedy-search", ("model",)),
    ],
)
def test_sherpa_onnx_finds_in_wav_files_what_torch_finds(
    talkative, tmp_path, method, parts
):
    model, wavs = talkative
    streams = model.encoder.causal
    files = {part: wavs[0].with_name(f"{part}.onnx") for part in parts}
    audio = [read_wav(path) for path in wavs]
    if streams:
        audio = [padded(samples, RATE, 29) for samples in audio]
    features = FeatureSettings(RATE, BINS).as_dict()
    tokens = wavs[0].with_name("tokens.txt")
    found = recognize(files, tokens, features, audio, tmp_path, streams=streams)
    search, expected = Method(method).search(model, 0), []
    for samples in audio:
        out = encoder_out(model, samples)
        (hypothesis,) = search(out, torch.tensor([out.size(1)])).hypotheses
        expected.append([NAMES[token] for token in hypothesis.tokens])
    assert found["tokens"] == expected
    # It can fail: the utterances have tokens, of several kinds, and not the same ones.
    assert all(expected) and len({t for row in expected for t in row}) > 3
    assert len({tuple(row) for row in expected}) == len(wavs)

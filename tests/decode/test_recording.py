"""Audio and features of a recording, chunk by chunk, are those of the whole."""

import numpy as np
import pytest
import torch
from lhotse import Fbank, FbankConfig, MonoCut, Recording

from icefall_kd import KDError
from icefall_kd.decode.recording import (
    OVERLAP,
    audio_chunks,
    feature_chunks,
    load_audio,
)

RATE = 8000


def extractor(**changes):
    config = dict(sampling_rate=RATE, num_filters=20, dither=0.0, snip_edges=False)
    return Fbank(FbankConfig(**{**config, **changes}))


def samples(count, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.normal(size=count)).astype(np.float32)


def chunks_of(array, size):
    return [array[:, i : i + size] for i in range(0, array.shape[1], size)]


@pytest.mark.parametrize("count", [400, 4039, 4799, 4800, 4801, 8847, 20001])
@pytest.mark.parametrize("snip_edges", [False, True])
def test_features_are_those_of_the_whole(count, snip_edges):
    maker = extractor(snip_edges=snip_edges)
    audio = samples(count)[None]
    expected = maker.extract(audio, RATE)
    parts = list(feature_chunks(chunks_of(audio, 733), maker, RATE, seconds=0.5))
    assert all(len(part) <= 50 + OVERLAP + 1 for part in parts)
    np.testing.assert_allclose(torch.cat(parts), expected, rtol=0, atol=1e-4)


def test_audio_may_be_flat():
    audio = samples(9001)
    flat = torch.cat(list(feature_chunks([audio], extractor(), RATE, 0.5)))
    rows = torch.cat(list(feature_chunks([audio[None]], extractor(), RATE, 0.5)))
    assert torch.equal(flat, rows)


def test_several_channels_are_refused():
    with pytest.raises(KDError, match="2 channels, and a model hears one"):
        list(feature_chunks([samples(2000).reshape(2, -1)], extractor(), RATE))


def test_audio_shorter_than_a_window_is_refused():
    with pytest.raises(KDError, match="lasts 0.006 s, and features need 0.030 s"):
        list(feature_chunks([samples(50)], extractor(), RATE))


def test_no_audio_has_no_features():
    assert list(feature_chunks([], extractor(), RATE)) == []
    assert list(feature_chunks([samples(0)], extractor(), RATE)) == []


@pytest.mark.parametrize("seconds", [0.25, 1.0, 10.0])
def test_a_cut_is_read_sample_by_sample_once(tmp_path, seconds):
    import soundfile

    path = tmp_path / "a.wav"
    soundfile.write(path, samples(2 * RATE + 17), RATE, subtype="FLOAT")
    whole = Recording.from_file(path)
    cut = MonoCut("a", start=0.5, duration=1.3, channel=0, recording=whole)
    parts = list(audio_chunks(cut, seconds))
    assert len(parts) == -(-1.3 // seconds)
    assert np.array_equal(np.concatenate(parts, axis=1), cut.load_audio())


@pytest.mark.parametrize("end", [0, 100])
def test_audio_that_can_not_be_read_is_refused_by_its_cut(tmp_path, end):
    """Also where it ends within the cut."""
    import soundfile

    path = tmp_path / "a.wav"
    soundfile.write(path, samples(2 * RATE), RATE, subtype="FLOAT")
    whole = Recording.from_file(path)
    cut = MonoCut("cut 1", start=0.5, duration=1.3, channel=0, recording=whole)
    path.write_bytes(path.read_bytes()[:end])
    for read in (load_audio, lambda cut: list(audio_chunks(cut, 0.5))):
        with pytest.raises(
            KDError, match="^the audio of cut cut 1 can't be read .*mend"
        ):
            read(cut)

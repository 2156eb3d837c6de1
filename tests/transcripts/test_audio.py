"""Features that are computed from audio, as one call of lhotse's Fbank has them."""

import numpy as np
import pytest
import torch
from lhotse import Fbank, FbankConfig, MonoCut, Recording, SupervisionSegment
from lhotse.utils import LOG_EPSILON

from icefall_kd.targets.batches import DumpBatch
from icefall_kd.transcripts import audio
from icefall_kd.transcripts.audio import AudioReader

RATE, BINS = 8000, 20


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """13 s and some samples of noise."""
    import soundfile

    path = tmp_path_factory.mktemp("audio") / "a.wav"
    noise = 0.1 * np.random.default_rng(1).normal(size=13 * RATE + 17)
    soundfile.write(path, noise.astype(np.float32), RATE, subtype="FLOAT")
    return Recording.from_file(path)


def cut_of(recording, start, num_samples):
    duration = num_samples / RATE
    supervision = SupervisionSegment("a", recording.id, 0, duration, text="ein")
    return MonoCut(
        f"{start}-{num_samples}", start, duration, 0, [supervision], recording=recording
    )


# Of odd lengths, of a whole number of frames, shorter than a window or hardly longer.
CUTS = [(0, 104017), (1.5, 80000), (0.25, 83), (2, 199), (3, 239), (3, 241), (7, 4039)]


def test_features_are_lhotses_to_the_bit(recording):
    cuts = [cut_of(recording, *place) for place in CUTS]
    batch = DumpBatch(cuts, None)
    same, x, lens = AudioReader(BINS, RATE, "")[batch]
    assert same is batch and x.shape == (len(cuts), 1300, BINS)
    extractor = Fbank(FbankConfig(num_mel_bins=BINS, sampling_rate=RATE))
    for cut, row, n in zip(cuts, x, lens.tolist()):
        if cut.num_samples < 240:  # 0.03 s: no model takes so little
            assert n == 0
        else:
            expected = torch.as_tensor(extractor.extract(cut.load_audio(), RATE))
            assert n == len(expected) == round(cut.duration * 100)
            assert torch.equal(row[:n], expected)
        assert (row[n:] == torch.tensor(LOG_EPSILON)).all()


def test_features_of_a_long_cut_are_computed_part_by_part(recording, monkeypatch):
    batch = DumpBatch([cut_of(recording, 0.5, 96000)], None)
    reader = AudioReader(BINS, RATE, "")
    _, expected, _ = reader[batch]
    monkeypatch.setattr(audio, "AT_ONCE", 2.0)
    extract, lengths = reader.extractor.extract, []

    def counted(samples, rate):
        lengths.append(samples.shape[1])
        return extract(samples, rate)

    monkeypatch.setattr(reader.extractor, "extract", counted)
    _, x, lens = reader[batch]
    assert lens.tolist() == [1200] and len(lengths) == 6 and max(lengths) < 2.3 * RATE
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)

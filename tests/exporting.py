"""For tests of exported files: cuts with audio, and what the recipe's model says."""

import wave

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def speak(tmp_path_factory):
    """A cut of so many feature frames of noise, with audio and stored features."""
    from lhotse import (
        Fbank,
        FbankConfig,
        Features,
        MonoCut,
        Recording,
        SupervisionSegment,
    )
    from lhotse.features.io import NumpyFilesWriter

    folder = tmp_path_factory.mktemp("speech")

    def make(cut_id, num_frames, mean="none", text="ein", **options):
        rng = np.random.default_rng(sum(cut_id.encode()) + num_frames)
        samples = np.cumsum(rng.normal(size=80 * num_frames)) * 40
        samples = (samples - samples.mean()).clip(-3e4, 3e4).astype("<i2")
        path = folder / f"{cut_id}.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(samples.tobytes())
        recording = Recording.from_file(path, recording_id=cut_id)
        config = {"num_mel_bins": 20, "sampling_rate": 8000, **options}
        audio = samples.astype(np.float32)[None] / 32768
        array = np.asarray(Fbank(FbankConfig(**config)).extract(audio, 8000))
        if mean == "utterance":
            array = array - array.mean(axis=0)
        writer = NumpyFilesWriter(folder / f"feats-{mean}-{len(options)}")
        features = Features(
            type="kaldi-fbank",
            num_frames=len(array),
            num_features=20,
            frame_shift=0.01,
            sampling_rate=8000,
            start=0.0,
            duration=recording.duration,
            storage_type=writer.name,
            storage_path=str(writer.storage_path),
            storage_key=writer.write(f"{cut_id}-{num_frames}", array),
            recording_id=cut_id,
            channels=0,
        )
        supervision = SupervisionSegment(
            id=cut_id,
            recording_id=cut_id,
            start=0,
            duration=recording.duration,
            text=text,
        )
        return MonoCut(
            id=cut_id,
            start=0.0,
            duration=recording.duration,
            channel=0,
            features=features,
            recording=recording,
            supervisions=[supervision],
        )

    return make


@torch.no_grad()
def encoded(model, x, x_lens):
    """The recipe's own encoder output (N, T, C) and lengths, in eval mode."""
    x, x_lens = model.encoder_embed(x, x_lens)
    padding = torch.arange(x.size(1)) >= x_lens.unsqueeze(1)
    x, x_lens = model.encoder(x.permute(1, 0, 2), x_lens, padding)
    return x.permute(1, 0, 2), x_lens

"""Audio of the digits and commands recipes: 16-bit mono wav, coloured noise, levels.

Samples are float64 in [-1, 1) of shape (num_samples,). A ``rate`` is in Hz.
"""

import io
import wave
from functools import lru_cache
from pathlib import Path
from typing import Sequence, Tuple

import numpy as np

from icefall_kd import KDError

SAMPLING_RATE = 8000  # of the digits; the commands have 16000
SNR_RANGE = (0.0, 15.0)  # dB, over the whole utterance
MARGIN_RANGE = (0.1, 0.2)  # seconds of silence at either end
MAX_PAUSE = 0.25  # seconds between two digits
GAIN_RANGE = (-3.0, 3.0)  # dB, of one digit against the others
SPEED_RANGE = (0.9, 1.1)  # of training utterances; pitch and formants go with it


def read_wav(path: Path, rate: int = SAMPLING_RATE) -> np.ndarray:
    """Return the samples of the wav file ``path``, 16-bit mono at ``rate``."""
    try:
        with wave.open(str(path), "rb") as f:
            form = f.getframerate(), f.getsampwidth(), f.getnchannels()
            num_samples = f.getnframes()
            data = f.readframes(num_samples)
    except (wave.Error, EOFError) as e:
        raise KDError(f"{path} is not a wav file ({e}), replace or remove it") from e
    if form != (rate, 2, 1):
        raise KDError(
            f"{path} has {form[0]} Hz, {8 * form[1]} bits and {form[2]} channel(s) "
            f"where {rate} Hz, 16 bits and 1 channel are needed, convert or remove it"
        )
    if len(data) < 2:
        raise KDError(f"{path} holds 0 samples, replace or remove it")
    if len(data) < 2 * num_samples:
        raise KDError(
            f"{path} is cut short: it holds {len(data) // 2} samples and its header "
            f"names {num_samples}, copy it again"
        )
    return np.frombuffer(data, dtype="<i2").astype(np.float64) / 32768


def write_wav(path: Path, samples: np.ndarray, rate: int = SAMPLING_RATE) -> None:
    """Write ``samples`` at ``rate`` to ``path``; those out of range are clipped."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setframerate(rate)
        f.setsampwidth(2)
        f.setnchannels(1)
        pcm = np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2")
        f.writeframes(pcm.tobytes())
    path.write_bytes(buffer.getvalue())


def power(samples: np.ndarray) -> float:
    """Return the mean square of ``samples``."""
    return float(np.mean(samples**2))


def level(samples: np.ndarray, rate: int = SAMPLING_RATE) -> float:
    """Return the root mean square of the loudest 0.1 s of ``samples`` at ``rate``.

    So silence around speech does not change it.
    """
    window = min(rate // 10, samples.size)
    energy = np.concatenate([[0.0], np.cumsum(samples**2)])
    return float(np.sqrt(max(np.max(energy[window:] - energy[:-window]), 0) / window))


def silence(seconds: float, rate: int = SAMPLING_RATE) -> np.ndarray:
    """Return ``seconds`` of zeros at ``rate``."""
    return np.zeros(int(round(seconds * rate)))


def trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Cut off what is before and after the speech in ``samples`` at ``rate``.

    Speech begins and ends where a window of 20 ms is within 35 dB of the loudest one,
    and twice as loud as the quietest tenth. 40 ms are kept at either side. All is kept
    where nothing is twice as loud.
    """
    hop, margin = rate // 100, rate // 25
    windows = np.lib.stride_tricks.sliding_window_view(samples, 2 * hop)[::hop]
    loudness = np.sqrt(np.mean(windows**2, axis=1))
    least = max(loudness.max() * 10 ** (-35 / 20), 2 * np.percentile(loudness, 10))
    if least > loudness.max():
        return samples
    loud = np.flatnonzero(loudness >= least)
    begin = max(loud[0] * hop - margin, 0)
    return samples[begin : (loud[-1] + 2) * hop + margin]


def join_words(
    recordings: Sequence[np.ndarray],
    rng: np.random.Generator,
    rate: int = SAMPLING_RATE,
) -> np.ndarray:
    """Join ``recordings`` with pauses; each is brought to one level, give or take 3 dB.

    ``rng`` draws the pauses and levels. All are at ``rate``.
    """
    parts = []
    for i, samples in enumerate(recordings):
        if i > 0:
            parts.append(silence(rng.uniform(0, MAX_PAUSE), rate))
        gain_db = rng.uniform(*GAIN_RANGE)
        parts.append(samples * 10 ** (gain_db / 20) / level(samples, rate))
    return np.concatenate(parts)


@lru_cache
def get_resampler(old_rate: int, new_rate: int):
    """Return a transform from ``old_rate`` to ``new_rate``, both in Hz."""
    import torch
    import torchaudio

    torch.set_num_threads(1)
    # The filter takes longer to make than to use; the transform keeps it.
    return torchaudio.transforms.Resample(old_rate, new_rate, dtype=torch.float64)


def resample(samples: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """Return ``samples`` of ``old_rate`` at ``new_rate``, both in Hz."""
    import torch

    return get_resampler(old_rate, new_rate)(torch.from_numpy(samples)).numpy()


def change_speed(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Play ``samples`` at a speed that ``rng`` draws, to stand for more speakers."""
    low, high = np.log(SPEED_RANGE)
    percent = int(round(100 * np.exp(rng.uniform(low, high))))
    return resample(samples, percent, 100)


def add_margins(
    samples: np.ndarray, rng: np.random.Generator, rate: int = SAMPLING_RATE
) -> np.ndarray:
    """Put silence before and after ``samples``, each of a length that ``rng`` draws."""
    before, after = rng.uniform(*MARGIN_RANGE, size=2)
    return np.concatenate([silence(before, rate), samples, silence(after, rate)])


def coloured_noise(
    num_samples: int, rng: np.random.Generator, rate: int = SAMPLING_RATE
) -> np.ndarray:
    """Noise of power 1: amplitude f^-a, a uniform from 0 (white) to 1 (brown), with
    mains hum in every other one."""
    num_fft = 1 << (num_samples - 1).bit_length()
    frequency = np.fft.rfftfreq(num_fft, 1 / rate)
    tilt = np.maximum(frequency, 50.0) ** -rng.uniform(0, 1)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(num_fft)) * tilt, num_fft)
    noise = noise[:num_samples] / np.sqrt(power(noise[:num_samples]))
    if rng.random() < 0.5:
        time = np.arange(num_samples) / rate
        mains = rng.uniform(49, 61)
        hum = sum(
            np.sin(2 * np.pi * (k * mains * time + rng.random())) / k
            for k in range(1, 6)
        )
        noise += hum * np.sqrt(10 ** (rng.uniform(-10, 3) / 10) / power(hum))
        noise /= np.sqrt(power(noise))
    return noise


def add_noise(
    speech: np.ndarray, rng: np.random.Generator, rate: int = SAMPLING_RATE
) -> Tuple[np.ndarray, float]:
    """Return ``speech`` with noise that ``rng`` draws, and the ratio of both in dB."""
    snr = rng.uniform(*SNR_RANGE)
    noise = coloured_noise(speech.size, rng, rate)
    return speech + noise * np.sqrt(power(speech) / 10 ** (snr / 10)), snr


def finish_utterance(
    speech: np.ndarray, rng: np.random.Generator, rate: int = SAMPLING_RATE
) -> Tuple[np.ndarray, float]:
    """Give ``speech`` margins, noise and a peak of -1 to -10 dB, all drawn by ``rng``.

    Returns:
      The samples, and the signal-to-noise ratio in dB.
    """
    samples, snr = add_noise(add_margins(speech, rng, rate), rng, rate)
    peak_db = rng.uniform(-10, -1)
    return samples * 10 ** (peak_db / 20) / np.max(np.abs(samples)), snr

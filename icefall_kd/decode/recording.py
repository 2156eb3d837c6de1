"""Audio and features of a recording, read chunk by chunk."""

from typing import Any, Iterable, Iterator

import numpy as np
import torch

from icefall_kd.decode.windows import overlapping
from icefall_kd.errors import KDError, first_line, require

SECONDS = 10.0  # of audio in a chunk
OVERLAP = 10  # feature frames at both ends, more than a window of the extractor


def audio_chunks(cut: Any, seconds: float = SECONDS) -> Iterator[np.ndarray]:
    """Read the audio of a cut, some seconds at a time.

    Args:
      cut: A Lhotse cut with a recording.
      seconds: Seconds in a chunk, a whole number of samples.

    Yields:
      (1, samples), float32.

    Raises:
      KDError: audio that can't be read.
    """
    begin, rate = 0.0, cut.sampling_rate
    while round((cut.duration - begin) * rate) > 0:
        part = cut.truncate(
            offset=begin,
            duration=min(seconds, cut.duration - begin),
            preserve_id=True,
        )
        yield load_audio(part)
        begin += seconds


def load_audio(cut: Any) -> np.ndarray:
    """Read the audio of a cut.

    Args:
      cut: A Lhotse cut with a recording.

    Returns:
      (channels, samples), float32.

    Raises:
      KDError: audio that can't be read.
    """
    try:
        return cut.load_audio()
    except MemoryError:
        raise
    except Exception as e:  # lhotse and what reads for it raise what they like
        raise KDError(
            f"the audio of cut {cut.id} can't be read ({first_line(e)}): mend the "
            "file, or leave the cut out"
        ) from None


def least_samples(extractor: Any, sampling_rate: int) -> int:
    """The fewest samples that have features: more than a window of an extractor.

    Args:
      extractor: One of Lhotse's, with ``frame_shift``.
      sampling_rate: Of the audio, in Hz.
    """
    return 3 * round(extractor.frame_shift * sampling_rate)


def feature_chunks(
    audio: Iterable[np.ndarray],
    extractor: Any,
    sampling_rate: int,
    seconds: float = SECONDS,
) -> Iterator[torch.Tensor]:
    """Make the features of a recording, chunk by chunk.

    They are what the extractor makes of the whole, as each frame depends on the samples
    near it alone; a torch of before 2.0 may round a frame near a chunk's end
    differently. A recipe that takes the mean of an utterance off does that later.

    Args:
      audio: (1, samples) or (samples,) each, one behind the other.
      extractor: One of Lhotse's, with ``extract`` and ``frame_shift``.
      sampling_rate: Of the audio and the extractor, in Hz.
      seconds: Seconds of audio whose features are made at once.

    Yields:
      (T, F) each.

    Raises:
      KDError: Several channels, or less audio than a frame needs.
    """
    shift = round(extractor.frame_shift * sampling_rate)
    frames = round(seconds / extractor.frame_shift)
    blocks = overlapping(_samples(audio), frames, OVERLAP, shift, 0, 1)
    for rows, left, is_last in blocks:
        require(
            left or len(rows) >= least_samples(extractor, sampling_rate),
            f"the recording lasts {len(rows) / sampling_rate:.3f} s, and features need "
            f"{3 * extractor.frame_shift:.3f} s: leave it out",
        )
        features = extractor.extract(np.ascontiguousarray(rows[None]), sampling_rate)
        features = torch.as_tensor(np.asarray(features))
        yield features[left:] if is_last else features[left : left + frames]


def _samples(audio: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for chunk in audio:
        channels = len(chunk) if chunk.ndim > 1 else 1
        require(
            channels == 1,
            f"the audio has {channels} channels, and a model hears one: choose a "
            "channel, or mix them",
        )
        if chunk.size:
            yield chunk.reshape(-1)

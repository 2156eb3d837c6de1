"""The features of a batch of cuts: stored ones, or lhotse's Fbank of the audio."""

from typing import List, Tuple

import torch
from lhotse import Fbank, FbankConfig
from lhotse.cut import Cut
from lhotse.utils import LOG_EPSILON, supervision_to_frames
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.decode.recording import feature_chunks, least_samples, load_audio
from icefall_kd.memory import enough_memory
from icefall_kd.targets.batches import DumpBatch

# Seconds of audio whose features are computed at once; utterances are hardly longer.
AT_ONCE = 60.0


class AudioReader(torch.utils.data.Dataset):
    """Computes the features of a batch, as icefall does with ``--on-the-fly-feats``.

    Args:
      num_features: Mel bins in a frame.
      sampling_rate: Samples a second of the audio.
      remedy: What helps where memory runs out.
    """

    def __init__(self, num_features: int, sampling_rate: int, remedy: str) -> None:
        config = FbankConfig(num_mel_bins=num_features, sampling_rate=sampling_rate)
        self.extractor, self.num_features = Fbank(config), num_features
        self.remedy = remedy

    def __getitem__(
        self, batch: DumpBatch
    ) -> Tuple[DumpBatch, torch.Tensor, torch.Tensor]:
        """The batch, its features (N, T, F), and its lengths (N,) in feature frames."""
        with enough_memory(f"computing the features of {batch}", self.remedy):
            rows = [self._features(cut) for cut in batch.cuts]
            lens = [self._frames(cut, len(x)) for cut, x in zip(batch.cuts, rows)]
            x = pad_sequence(rows, batch_first=True, padding_value=LOG_EPSILON)
            return batch, x, torch.tensor(lens, dtype=torch.int32)

    def _features(self, cut: Cut) -> torch.Tensor:
        rate = cut.sampling_rate
        if cut.num_samples < least_samples(self.extractor, rate):
            return torch.zeros(0, self.num_features)
        chunks = feature_chunks([load_audio(cut)], self.extractor, rate, AT_ONCE)
        return torch.cat(list(chunks))

    def _frames(self, cut: Cut, num_frames: int) -> int:
        """As many frames as the supervision has, from the cut's first on."""
        if not num_frames or len(cut.supervisions) != 1:
            return num_frames
        _, frames = supervision_to_frames(
            cut.supervisions[0],
            self.extractor.frame_shift,
            cut.sampling_rate,
            max_frames=num_frames,
        )
        return max(0, frames)


def lengths_in_batch(lens: torch.Tensor, least: int) -> List[int]:
    """The rows of a batch that are long enough for a model.

    Args:
      lens: (N,), feature frames.
      least: The fewest feature frames that a model takes.

    Returns:
      Indices of rows.
    """
    return [i for i, n in enumerate(lens.tolist()) if n >= least]

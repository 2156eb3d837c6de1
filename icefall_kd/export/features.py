"""What a recipe's features are, found out from cuts that have both them and audio.

A runtime such as sherpa-onnx computes the features itself, log Mel filter banks as
Kaldi does. Whether a recipe's are those, and whether it takes the mean of each
utterance off them, no checkpoint and no manifest says. So they are compared.
"""

from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterator, Tuple

import numpy as np
from lhotse import Fbank, FbankConfig
from lhotse.cut import Cut, MonoCut

from icefall_kd.errors import KDError, require
from icefall_kd.targets.cuts import ManifestCuts

NONE, UTTERANCE = "none", "utterance"
COMPARED = 5  # cuts
# Mean absolute differences of log energies: features that lilcom made smaller differ by
# up to 0.02 from what they were, those of another filter bank by tenths at least.
SAME = 0.05
REMEDY = "give cuts of the recipe that have both stored features and audio"


@dataclass(frozen=True)
class FeatureSettings:
    """How a reader of the files computes features from samples in [-1, 1].

    Args:
      sampling_rate: Samples a second.
      num_mel_bins: Features in a frame.
      mean: "utterance" where the mean of each utterance is taken off, which the graph
        of the encoder does; "none" where it is not.
      frame_length: Seconds.
      frame_shift: Seconds.
      dither: Of the samples.
      snip_edges: Whether the first and last frame lie within the audio.
      low_freq: Hz, the lower end of the first filter.
      high_freq: Hz, the upper end of the last; at most 0: so much below half of the
        sampling rate.
    """

    sampling_rate: int
    num_mel_bins: int
    mean: str = NONE
    frame_length: float = 0.025
    frame_shift: float = 0.01
    dither: float = 0.0
    snip_edges: bool = False
    low_freq: float = 20.0
    high_freq: float = -400.0

    def as_dict(self) -> Dict[str, Any]:
        """As metadata.json has it."""
        return {"type": "fbank", **asdict(self)}

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "FeatureSettings":
        """Read what :meth:`as_dict` wrote.

        Args:
          values: The dictionary.

        Raises:
          KDError: Values that are no such settings.
        """
        try:
            values = {k: v for k, v in values.items() if k != "type"}
            return cls(**values)
        except (TypeError, AttributeError) as e:
            raise KDError(
                f"metadata.json has features that can't be read ({e}): export again"
            ) from None

    def compute(self, cut: Cut) -> np.ndarray:
        """The features (T, F) of a cut's audio, before the mean is taken off.

        Args:
          cut: A cut with audio.
        """
        return self.of_samples(cut.load_audio())

    def of_samples(self, samples: np.ndarray) -> np.ndarray:
        """The features (T, F) of samples, before the mean is taken off.

        Args:
          samples: (1, T), in [-1, 1].
        """
        config = FbankConfig(
            sampling_rate=self.sampling_rate,
            num_mel_bins=self.num_mel_bins,
            frame_length=self.frame_length,
            frame_shift=self.frame_shift,
            dither=self.dither,
            snip_edges=self.snip_edges,
            low_freq=self.low_freq,
            high_freq=self.high_freq,
        )
        return np.asarray(Fbank(config).extract(samples, self.sampling_rate))


def features_of(path: str, num_features: int, on_the_fly: bool) -> FeatureSettings:
    """Find out what the features of cuts are.

    Args:
      path: A manifest of cuts.
      num_features: Features in a frame that the model takes.
      on_the_fly: Whether the recipe computes lhotse's Fbank of the audio in training,
        without normalisation; then nothing is compared.

    Raises:
      KDError: Cuts without features or audio, or features that no reader can compute.
    """
    cuts = [cut for cut, _ in zip(comparable(path, on_the_fly), range(COMPARED))]
    require(
        cuts,
        f"{path} has no cut of one channel with "
        f"{'audio' if on_the_fly else 'stored features and audio'}, by which the "
        f"recipe's features are known: {REMEDY}",
    )
    settings = FeatureSettings(int(cuts[0].sampling_rate), num_features)
    if on_the_fly:
        return settings
    means = [whose_mean(settings, cut) for cut in cuts]
    for cut, mean in zip(cuts, means):
        require(
            mean == means[0],
            f"the features of the cuts {cuts[0].id} and {cut.id} of {path} were made "
            f"in two ways (mean {means[0]} and {mean}): {REMEDY} and were made in one",
        )
    return FeatureSettings(settings.sampling_rate, num_features, means[0])


def comparable(path: str, on_the_fly: bool) -> Iterator[MonoCut]:
    """Yield the cuts whose features can be computed from their audio again.

    Args:
      path: A manifest of cuts.
      on_the_fly: Whether they need no stored features.
    """
    for cut in ManifestCuts(path):
        if isinstance(cut, MonoCut) and cut.has_recording:
            if on_the_fly or cut.has_features:
                yield cut


def whose_mean(settings: FeatureSettings, cut: Cut) -> str:
    """How the stored features of a cut were normalised.

    Args:
      settings: How features are computed.
      cut: A cut with features and audio.

    Returns:
      "none" or "utterance".

    Raises:
      KDError: They are neither those of ``settings`` nor these less their mean.
    """
    stored, computed = stored_and_computed(settings, cut)
    difference = stored - computed
    if np.abs(difference).mean() < SAME:
        return NONE
    without_mean = difference - difference.mean(axis=0)
    if np.abs(without_mean).mean() < SAME and np.abs(stored.mean(axis=0)).max() < SAME:
        return UTTERANCE
    raise KDError(
        f"the stored features of the cut {cut.id} are not the log Mel filter bank of "
        f"its audio that is exported for (they differ by "
        f"{np.abs(difference).mean():.2f} in the mean, and by "
        f"{np.abs(without_mean).mean():.2f} without the mean of the utterance; "
        f"{described(settings)}), so no reader of the files could compute them: train "
        "on such features, or on these less the mean of each utterance"
    )


def described(settings: FeatureSettings) -> str:
    """A few words on how features are computed.

    Args:
      settings: The settings.
    """
    return (
        f"{settings.num_mel_bins} bins at {settings.sampling_rate} Hz, dither "
        f"{settings.dither:g}, from {settings.low_freq:g} to {settings.high_freq:g} Hz"
    )


def stored_and_computed(
    settings: FeatureSettings, cut: Cut
) -> Tuple[np.ndarray, np.ndarray]:
    """The stored features of a cut, and those of its audio, as many frames of each.

    Args:
      settings: How features are computed.
      cut: A cut with features and audio.

    Raises:
      KDError: Audio or features that can't be read, or of other sizes.
    """
    try:
        stored = np.asarray(cut.load_features())
        computed = settings.compute(cut)
    except Exception as e:  # whatever lhotse and its backends raise
        raise KDError(
            f"the audio or the features of the cut {cut.id} can't be read "
            f"({type(e).__name__}: {' '.join(str(e).split())[:150]}): {REMEDY}"
        ) from None
    require(
        stored.shape[1] == computed.shape[1],
        f"the cut {cut.id} has {stored.shape[1]} features a frame and the model takes "
        f"{computed.shape[1]}: give the cuts that it was trained on",
    )
    num_frames = min(len(stored), len(computed))
    return stored[:num_frames], computed[:num_frames]

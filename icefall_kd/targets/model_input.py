"""The feature frames of a cut that a model's input has: in training, and in a dump."""

from typing import Sequence, Tuple

import torch
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.dataset.collation import collate_features
from lhotse.utils import supervision_to_frames

from icefall_kd.errors import KDError
from icefall_kd.zipformer import MIN_FRAMES

SLACK = 2e-3  # seconds, as in lhotse's validate_for_asr


def input_frames(cut: Cut) -> int:
    """Return how many feature frames of a cut are a recipe's input.

    A batch of lhotse's ``K2SpeechRecognitionDataset`` has the features of the whole
    cut, and icefall takes its ``supervisions["num_frames"]`` for their number, wherever
    in the cut the supervision begins. So the input is the cut's first frames, as many
    as the supervision has, and the whole cut where it has no supervision.

    Args:
      cut: The cut.
    """
    if len(cut.supervisions) != 1:
        return cut.num_frames
    (supervision,) = cut.supervisions
    _, frames = supervision_to_frames(
        supervision, cut.frame_shift, cut.sampling_rate, max_frames=cut.num_frames
    )
    return max(0, frames)


def collate_input(cuts: Sequence[Cut]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Read and pad stored features.

    Args:
      cuts: N cuts.

    Returns:
      (N, T, F) features, and (N,), the number of feature frames of each cut.
    """
    x, x_lens = collate_features(CutSet.from_cuts(cuts))
    lens = torch.tensor([input_frames(cut) for cut in cuts], dtype=x_lens.dtype)
    return x[:, : int(lens.max())], lens


def why_unusable(cut: Cut) -> str:
    """Return why a cut can't be a teacher's input, as the rest of a sentence.

    Such a cut goes without targets; one that no recipe could train on is refused, see
    :func:`check_supervision`.

    Args:
      cut: The cut.

    Returns:
      The reason; "" where there is none.
    """
    if not isinstance(cut, MonoCut):
        return (
            f"is a {type(cut).__name__} and must be a MonoCut: dump the teacher before "
            "mixing, padding or appending"
        )
    frames = input_frames(cut)
    if frames < MIN_FRAMES:
        return f"has {frames} feature frames and the teacher needs {MIN_FRAMES}"
    return ""


def check_supervision(cut: Cut) -> None:
    """Refuse a cut that no recipe can train on for its supervisions.

    A batch has one text for a row, and lhotse's dataset refuses a supervision that
    reaches beyond its cut.

    Args:
      cut: The cut.

    Raises:
      KDError: no supervision, several, or one beyond the cut.
    """
    count = len(cut.supervisions)
    if count != 1:
        remedy = (
            "cut it up with `lhotse cut trim-to-supervisions`"
            if count
            else "give it one, with or without a text, or leave the cut out"
        )
        raise KDError(
            f"the cut {cut.id} has {count} supervisions, and a recipe trains on cuts "
            f"of one: {remedy}"
        )
    (supervision,) = cut.supervisions
    if supervision.start < -SLACK or supervision.end > cut.duration + SLACK:
        raise KDError(
            f"the supervision of cut {cut.id} spans {supervision.start:g} to "
            f"{supervision.end:g} s of its {cut.duration:g} s, and lhotse's dataset "
            "takes none beyond a cut: shorten it, or leave the cut out"
        )

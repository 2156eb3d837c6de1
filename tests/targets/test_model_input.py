"""What a teacher hears of a cut is what lhotse's dataset gives a recipe of it."""

import pytest
import torch
from lhotse import CutSet
from lhotse.cut import MixedCut
from lhotse.dataset import K2SpeechRecognitionDataset

from icefall_kd.errors import KDError
from icefall_kd.targets.model_input import (
    check_supervision,
    collate_input,
    input_frames,
    why_unusable,
)


@pytest.fixture
def make(make_cut):
    """A cut whose supervision has another start and end."""

    def make(cut_id, num_frames, start=0.0, duration=None):
        cut = make_cut(cut_id, num_frames)
        (supervision,) = cut.supervisions
        supervision.start = start
        if duration is not None:
            supervision.duration = duration
        return cut

    return make


@pytest.mark.parametrize(
    "start, duration, frames",
    [
        (0.0, 0.93, 93),
        (0.0, 0.61, 61),
        (0.25, 0.61, 61),
        (0.5, 0.4315, 43),
        (0.0, 0.9315, 93),
        (0.0, 0.614, 61),
        (0.0, 0.92501, 93),
    ],
    ids="whole short late end beyond down up".split(),
)
def test_as_many_frames_as_the_dataset_says(make, start, duration, frames):
    cuts = CutSet.from_cuts([make("a", 93, start, duration), make("b", 100)])
    supervisions = K2SpeechRecognitionDataset(return_cuts=True)[cuts]["supervisions"]
    given = {
        cut.id: n
        for cut, n in zip(supervisions["cut"], supervisions["num_frames"].tolist())
    }
    assert given == {"a": frames, "b": 100}
    assert {cut.id: input_frames(cut) for cut in cuts} == given


def test_a_batch_ends_with_the_last_frame_that_is_heard(make):
    cuts = [make("a", 93, 0.0, 0.61), make("b", 47)]
    x, x_lens = collate_input(cuts)
    assert x.shape == (2, 61, 20) and x_lens.tolist() == [61, 47]
    for row, cut, n in zip(x, cuts, (61, 47)):
        assert torch.equal(row[:n], torch.from_numpy(cut.load_features()[:n]))


def test_without_one_supervision_all_frames_are_heard(make):
    cut = make("a", 93, 0.0, 0.61)
    assert input_frames(cut.drop_supervisions()) == 93
    cut.supervisions = 2 * cut.supervisions
    assert input_frames(cut) == 93


def test_why_a_cut_is_not_heard(make, multi_cut):
    assert why_unusable(make("a", 9)) == ""
    assert why_unusable(make("a", 8)) == "has 8 feature frames and the teacher needs 9"
    short = make("a", 93, 0.0, 0.05)
    assert why_unusable(short) == "has 5 feature frames and the teacher needs 9"
    assert "is a MultiCut and must be a MonoCut" in why_unusable(multi_cut("m", 61))
    mixed = make("a", 61).pad(duration=2.0)
    assert isinstance(mixed, MixedCut) and "is a MixedCut" in why_unusable(mixed)


def test_a_cut_has_one_supervision(make):
    cut = make("a", 61)
    check_supervision(cut)
    with pytest.raises(KDError, match="cut a has 0 supervisions.*or leave the cut out"):
        check_supervision(cut.drop_supervisions())
    cut.supervisions = 2 * cut.supervisions
    with pytest.raises(KDError, match="cut a has 2 supervisions.*trim-to-supervisions"):
        check_supervision(cut)


@pytest.mark.parametrize("start, duration", [(0.0, 0.95), (0.5, 0.45), (-0.1, 0.5)])
def test_a_supervision_is_within_its_cut(make, start, duration):
    cut = make("a", 93, start, duration)
    with pytest.raises(KDError, match="supervision of cut a spans .* of its 0.93 s"):
        check_supervision(cut)
    with pytest.raises(AssertionError):
        K2SpeechRecognitionDataset()[CutSet.from_cuts([cut])]

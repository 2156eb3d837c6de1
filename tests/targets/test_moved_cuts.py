"""Cuts whose time was moved after their targets were made: refused, or as they were."""

import pytest
import torch

from icefall_kd import JointKDLoss
from icefall_kd.errors import KDError
from icefall_kd.targets.reading import collate_targets
from icefall_kd.terms import CtcTerm
from icefall_kd.types import EncoderOut


def refuse(cut, encoder_frames):
    """Read the targets, and join them with what a student gives on the cut."""
    targets = collate_targets([cut])
    n = encoder_frames(round(cut.duration * 100))
    student = EncoderOut(
        torch.zeros(1, n, 6), torch.tensor([n]), torch.zeros(1, n, 11).requires_grad_()
    )
    JointKDLoss([CtcTerm()])(torch.zeros((), requires_grad=True), student, targets)


@pytest.mark.parametrize("num_frames", [90, 61, 33, 19, 9])
@pytest.mark.parametrize("factor", [1.1, 0.9, 1.02])
@pytest.mark.parametrize("kind", ["perturb_speed", "perturb_tempo"])
def test_another_speed_is_refused(
    make_cut, make_store, encoder_frames, num_frames, factor, kind
):
    """Of a cut of one frame too, where the number of frames would tell nothing."""
    (cut,) = make_store([make_cut("c1", num_frames)])
    refuse(cut, encoder_frames)  # as it was dumped: nothing to refuse
    with pytest.raises(KDError, match="speed or tempo was changed.*icefall-kd dump"):
        refuse(getattr(cut, kind)(factor), encoder_frames)


@pytest.mark.parametrize(
    "change",
    [
        lambda cut: cut.truncate(duration=0.3).perturb_speed(1.1),
        lambda cut: cut.perturb_speed(1.1).truncate(duration=0.3),
        lambda cut: cut.pad(duration=2.0).perturb_tempo(0.9),
        lambda cut: cut.perturb_speed(0.9).append(cut),
    ],
    ids="part-then-speed speed-then-part padded concatenated".split(),
)
def test_another_speed_is_refused_within_a_chain(cuts, change):
    with pytest.raises(KDError, match="speed or tempo was changed"):
        collate_targets([change(cuts["c2"])])


@pytest.fixture
def within(make_cut, make_store):
    """A cut in the middle of its recording."""
    cut = make_cut("c1", 61, start=1.5)
    cut.recording.num_samples *= 3
    cut.recording.duration *= 3
    cut.features = None
    original = make_cut("c1", 61, start=1.5)
    original.recording = cut.recording
    return make_store([original])[0].drop_features()


@pytest.mark.parametrize("direction", ["left", "right", "both"])
def test_a_cut_extended_beyond_its_targets_is_refused(within, direction):
    longer = within.extend_by(duration=0.5, direction=direction, preserve_id=True)
    with pytest.raises(KDError, match="cut c1 spans .* and its targets 1.5 to 2.11 s"):
        collate_targets([longer])


@pytest.mark.parametrize("start", [1.2, 1.7, 3.0])
def test_a_cut_that_starts_elsewhere_is_refused(within, start):
    within.start = start
    with pytest.raises(KDError, match=f"spans {start} to .* of its recording"):
        collate_targets([within])


def test_what_a_cut_was_extended_by_can_be_taken_off(within, stored_form, make_cut):
    back = within.extend_by(duration=0.5, direction="both").truncate(
        offset=0.5, duration=0.61
    )
    expected = stored_form(make_cut("c1", 61))
    assert torch.equal(collate_targets([back]).parts["ctc"][0], expected)


@pytest.mark.parametrize("rate", [16000, 11025, 44100, 6000])
def test_another_sampling_rate_does_not_matter(cuts, stored, rate):
    targets = collate_targets([cuts["c3"].resample(rate)])
    assert torch.equal(targets.parts["ctc"][0], stored(cuts["c3"]))


@pytest.mark.parametrize("start", [0.0, 7.25])
def test_a_cut_without_its_recording_is_read(make_cut, make_store, stored, start):
    """Its features last as long as the cut, and its recording did longer."""
    (cut,) = make_store([make_cut("c1", 61, start=start)])
    targets = collate_targets([cut.drop_recording()])
    assert torch.equal(targets.parts["ctc"][0], stored(cut))


def test_a_mixed_cut_without_targets_is_refused(noise):
    with pytest.raises(KDError, match="has no targets"):
        collate_targets([noise.pad(duration=2.0)])


def test_volume_does_not_matter(cuts, stored):
    expected = stored(cuts["c3"])
    louder = cuts["c3"].perturb_volume(2.0)
    assert torch.equal(collate_targets([louder]).parts["ctc"][0], expected)

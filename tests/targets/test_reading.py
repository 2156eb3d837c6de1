"""Targets of a batch: each row has its own cut's, where its time lies."""

import pytest
import torch
from lhotse.cut import MixedCut

from icefall_kd.errors import KDError
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import Pointer
from icefall_kd.types import SparseDistribution


def test_a_cut_that_starts_late(make_cut, make_store, stored):
    (cut,) = make_store([make_cut("late", 61, start=7.25)])
    targets = collate_targets([cut])
    assert torch.equal(targets.parts["ctc"][0], stored(cut))


# Mixed cuts


@pytest.mark.parametrize(
    "mix",
    [
        lambda cut, noise: cut.pad(duration=2.0),
        lambda cut, noise: cut.mix(noise, snr=10),
        lambda cut, noise: cut.mix(noise, snr=10, offset_other_by=0.3),
        lambda cut, noise: noise.mix(cut, snr=-10),  # the noise is the first track
        lambda cut, noise: cut.append(noise),
        lambda cut, noise: cut.append(noise).pad(duration=5.0),
        lambda cut, noise: cut.pad(duration=2.0).mix(noise, snr=10),
    ],
    ids="padded mixed late-noise noise-first appended append-pad pad-mix".split(),
)
def test_targets_at_the_start_of_a_mixed_cut_are_read(cuts, noise, stored, mix):
    mixed = mix(cuts["c3"], noise)
    assert isinstance(mixed, MixedCut)
    targets = collate_targets([mixed])
    assert torch.equal(targets.parts["ctc"][0], stored(cuts["c3"]))
    assert targets.lens.tolist() == [14] and targets.mask.all()
    assert targets.whole.tolist() == [True]


@pytest.mark.parametrize(
    "mix, at",
    [
        (lambda cut, noise: noise.append(cut), 38),  # 1.5 s, half up
        (lambda cut, noise: noise.mix(cut, snr=10, offset_other_by=0.3), 8),
        (lambda cut, noise: noise.mix(cut, snr=10, offset_other_by=0.01), 0),
        (lambda cut, noise: cut.pad(duration=2.0, direction="left"), 35),
        (lambda cut, noise: cut.pad(duration=2.01, direction="both"), 18),
    ],
    ids="noise-before late soon left-padded both-padded".split(),
)
def test_targets_within_a_mixed_cut_are_at_its_place(cuts, noise, stored, mix, at):
    targets = collate_targets([mix(cuts["c3"], noise)])
    n = at + 14
    assert targets.lens.tolist() == [n] and targets.whole.tolist() == [False]
    assert targets.mask[0].tolist() == [False] * at + [True] * 14
    assert torch.equal(targets.parts["ctc"][0, at:], stored(cuts["c3"]))


@pytest.mark.parametrize("gap", [0.0, 0.5])
def test_concatenated_cuts_have_the_targets_of_both(cuts, stored, gap):
    """61 feature frames are 14 of the encoder; the next cut begins at 0.61 s."""
    first = cuts["c3"].pad(duration=0.61 + gap) if gap else cuts["c3"]
    targets = collate_targets([first.append(cuts["c1"]), cuts["c2"]])
    at = 15 if gap == 0 else 28
    assert targets.lens.tolist() == [at + 7, 21]
    spoken = [True] * 14 + [False] * (at - 14) + [True] * 7
    assert targets.mask[0].tolist() == spoken + [False] * (
        targets.mask.size(1) - at - 7
    )
    assert torch.equal(targets.parts["ctc"][0, :14], stored(cuts["c3"]))
    assert torch.equal(targets.parts["ctc"][0, at : at + 7], stored(cuts["c1"]))
    assert targets.whole.tolist() == [False, True]


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.45])
def test_two_who_speak_at_once_are_refused(cuts, offset):
    mixed = cuts["c3"].mix(cuts["c1"], snr=10, offset_other_by=offset)
    with pytest.raises(KDError, match="mixes two cuts whose targets overlap at"):
        collate_targets([cuts["c2"], mixed])


# Parts of cuts


@pytest.mark.parametrize(
    "offset, duration, first, last",
    [
        (0.0, 0.5, 0, 13),
        (0.4, 0.5, 10, 21),  # the encoder has 21 frames of 0.9 s
        (0.02, 0.1, 1, 4),  # half up: 0.5 and 2.5 frames
        (0.019, 0.099, 0, 2),
        (0.3, 0.005, 8, 9),  # never none
    ],
)
def test_a_truncated_cut_has_the_frames_it_kept(
    cuts, stored, offset, duration, first, last
):
    part = cuts["c2"].truncate(offset=offset, duration=duration)
    targets = collate_targets([part])
    assert torch.equal(targets.parts["ctc"][0], stored(cuts["c2"])[first:last])
    assert targets.lens.tolist() == [last - first]
    assert targets.whole.tolist() == [False] and targets.mask.all()


def test_a_truncated_late_cut_is_read_from_its_own_start(make_cut, make_store, stored):
    (cut,) = make_store([make_cut("late", 61, start=7.25)])
    part = cut.truncate(offset=0.2, duration=0.2)
    assert torch.equal(collate_targets([part]).parts["ctc"][0], stored(cut)[5:10])


def test_windows_tile_the_targets(cuts, stored):
    windows = list(cuts["c2"].cut_into_windows(0.24))
    read = [collate_targets([w]).parts["ctc"][0] for w in windows]
    assert [len(r) for r in read] == [6, 6, 6, 3]
    assert torch.equal(torch.cat(read), stored(cuts["c2"]))


# Missing and damaged targets


def test_a_cut_without_targets_has_the_hard_loss_where_told(cuts, make_cut, stored):
    batch = [make_cut("b1", 61), cuts["c1"], make_cut("b2", 33).pad(duration=1.0)]
    targets = collate_targets(batch, missing="hard")
    assert targets.lens.tolist() == [0, 7, 0]
    assert targets.whole.tolist() == [False, True, False]
    assert targets.mask.sum(1).tolist() == [0, 7, 0]
    assert torch.equal(targets.parts["ctc"][1], stored(cuts["c1"]))
    bare = collate_targets([batch[0]], missing="hard")
    assert bare.lens.tolist() == [0] and bare.mask.shape == (1, 0)


def test_hard_does_not_excuse_time_that_moved_or_damage(cuts, tmp_path):
    with pytest.raises(KDError, match="speed or tempo"):
        collate_targets([cuts["c1"].perturb_speed(1.1)], missing="hard")
    path = tmp_path / "kd" / "targets.bin"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(KDError, match="damaged"):
        collate_targets([cuts["c1"]], missing="hard")


def test_the_rest_of_a_damaged_store_is_read(cuts, tmp_path, stored):
    path = tmp_path / "kd" / "targets.bin"
    data = bytearray(path.read_bytes())
    pointer = Pointer.of_cut(cuts["c3"])
    data[pointer.offset : pointer.offset + pointer.size] = b"\0" * pointer.size
    path.write_bytes(data)
    targets = collate_targets([cuts["c1"], cuts["c2"]])
    assert torch.equal(targets.parts["ctc"][1], stored(cuts["c2"]))
    with pytest.raises(KDError, match="targets of cut c3 in .* damaged"):
        collate_targets([cuts["c3"]])


# Sparse stores


def test_sparse_targets_of_a_batch_are_padded(make_cut, make_store, read_targets):
    """Each cut has a width of its own, that of its frame with most symbols."""
    lengths = {"c1": 33, "c2": 90, "c3": 61, "c4": 12, "c5": 62}
    cuts = make_store([make_cut(n, k) for n, k in lengths.items()], ctc="adaptive:.8:9")
    found = collate_targets(list(cuts))
    assert isinstance(found.parts["ctc"], SparseDistribution)
    widths = {read_targets(c).indices.size(1) for c in cuts}
    assert len(widths) > 1 and found.parts["ctc"].indices.size(2) == max(widths)
    for i, cut in enumerate(cuts):
        own = read_targets(cut)
        n, k = own.indices.shape
        assert torch.equal(found.parts["ctc"].indices[i, :n, :k], own.indices)
        torch.testing.assert_close(
            found.parts["ctc"].log_probs[i, :n, :k], own.log_probs
        )
        assert (found.parts["ctc"].log_probs[i, :n, k:] == -torch.inf).all()
        torch.testing.assert_close(found.parts["ctc"].log_tail[i, :n], own.log_tail)
    student = torch.randn(5, 21, 11, generator=torch.Generator().manual_seed(0))
    from icefall_kd import ctc_kd_loss

    together = ctc_kd_loss(
        student, found.parts["ctc"], found.lens, temperature=1.0, mask=found.mask
    )
    alone = 0.0
    for i, cut in enumerate(cuts):
        one = collate_targets([cut])
        n = int(one.lens)
        alone += ctc_kd_loss(student[i : i + 1, :n], one.parts["ctc"], one.lens)
    torch.testing.assert_close(together, alone)

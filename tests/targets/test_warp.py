"""Targets that follow SpecAugment's time warp."""

import random

import numpy as np
import pytest
import torch
from lhotse.dataset import SpecAugment, signal_transforms

from icefall_kd.targets.warp import WarpRecord, first_center
from icefall_kd.types import SparseDistribution, Targets


@pytest.fixture(autouse=True)
def seed():
    random.seed(3)
    np.random.seed(3)


def warping(factor=30, **options):
    options = {"p": 1.0, "num_feature_masks": 0, "num_frame_masks": 1, **options}
    return SpecAugment(time_warp_factor=factor, **options)


def frames(n):
    return ((n - 7) // 2 + 1) // 2


def numbered(lens, segments=None):
    """Features and targets that both say which feature frame they stand at."""
    x = torch.zeros(len(lens), max(lens), 3)
    x[:] = torch.arange(max(lens))[None, :, None]
    t = torch.tensor([frames(n) for n in lens])
    rows = (4.0 * torch.arange(int(t.max())) + 5).expand(len(lens), -1)
    hidden = {"out": rows[..., None, None].clone()}
    targets = Targets(t, parts={"ctc": rows.unsqueeze(2).clone(), "hidden": hidden})
    whole = [[i, 0, n] for i, n in enumerate(lens)]
    return x, torch.tensor(segments or whole), targets


def heard(x, row, n):
    """What the features say at the middle of each encoder frame."""
    at = 4 * torch.arange(n) + 5
    return x[row, at.clamp(max=x.size(1) - 1), 0]


def test_targets_stand_where_the_features_went():
    lens = [151, 197, 124]
    x, segments, targets = numbered(lens)
    record = WarpRecord(warping(frames_mask_size=1))
    warped = record(x, segments)
    assert len(record.warps) == 3
    found = record.move(targets)
    moved = 0.0
    for row, n in enumerate(found.lens.tolist()):
        says, source = found.parts["ctc"][row, :n, 0], heard(warped, row, n)
        # Half a frame of the encoder, and what bicubic edges add.
        assert (says - source)[1:-1].abs().max() <= 2.6
        moved = max(
            moved, float((targets.parts["ctc"][row, :n, 0] - source).abs().max())
        )
        assert torch.equal(found.parts["hidden"]["out"][row, :n, 0, 0], says)
    assert moved > 10  # which would be the error without


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("factor, center", [(2, 4), (4, 5), (6, 6), (8, 7)])
def test_any_number_of_feature_frames_an_encoder_frame_is_followed(
    factor, center, given
):
    """The centers by hand: of 50 Hz frames around 4, 6, 8 ... half a factor's mean."""
    assert first_center(factor) == center
    n = 500
    x = torch.arange(float(n))[None, :, None].expand(1, n, 3).clone()
    t = (n - 7) // 2 // (factor // 2)
    middles = factor * torch.arange(t) + center
    parts = {"ctc": middles[None, :, None].float()}
    targets = Targets(torch.tensor([t]), parts=parts)
    record = WarpRecord(warping(80, frames_mask_size=1))
    warped = record(x, torch.tensor([[0, 0, n]]))[0, :, 0]
    found = record.move(targets, *[factor] * given).parts["ctc"][0, :, 0]
    source = warped[middles]
    # Half a frame of the encoder, and what bicubic edges add.
    assert (found - source)[2:-2].abs().max() <= factor / 2 + 1
    assert (middles - source).abs().max() > 20  # which would be the error without


def test_the_features_are_those_that_lhotse_makes():
    x, segments, _ = numbered([151, 197, 124])
    x += torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for augment in (
        warping(num_feature_masks=2),
        WarpRecord(warping(num_feature_masks=2)),
    ):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        found.append(augment(x.clone(), segments))
    assert torch.equal(*found)
    assert signal_transforms.time_warp.__module__.startswith("lhotse")


def test_parts_of_a_row_move_apart():
    x, segments, targets = numbered([301], [[0, 20, 121], [0, 141, 133]])
    record = WarpRecord(warping(frames_mask_size=1))
    warped = record(x, segments)
    assert sorted(first for _, first, _ in record.warps) == [20, 141]
    says = record.move(targets).parts["ctc"][0, :, 0]
    n = int(targets.lens[0])
    source = heard(warped, 0, n)
    edge = [abs(5 + 4 * j - e) < 8 for j in range(n) for e in (20,)]
    for e in (141, 274):
        edge = [a or abs(5 + 4 * j - e) < 8 for j, a in enumerate(edge)]
    inside = ~torch.tensor(edge)
    assert (says - source)[inside].abs().max() <= 2.6
    assert torch.equal(
        says[:3], targets.parts["ctc"][0, :3, 0]
    )  # before the first of them


def test_masks_and_sparse_targets_move_too():
    x, segments, targets = numbered([151, 97])
    n = targets.mask.size(1)
    number = torch.arange(n).expand(2, -1)
    targets.parts["ctc"] = SparseDistribution(
        number.unsqueeze(2).clone(), torch.zeros(2, n, 1), torch.zeros(2, n)
    )
    targets.mask[0, 5] = False
    record = WarpRecord(warping())
    record(x, segments)
    found = record.move(targets)
    assert torch.equal(
        found.mask, targets.mask.gather(1, found.parts["ctc"].indices[..., 0])
    )
    assert found.lens is targets.lens and found.whole is targets.whole


def test_nothing_moves_where_nothing_is_warped():
    x, segments, targets = numbered([151, 15])
    record = WarpRecord(warping(p=0.0))
    record(x, segments)
    assert torch.equal(record.move(targets).parts["ctc"], targets.parts["ctc"])
    record = WarpRecord(warping(factor=80))  # too long for these
    record(x, segments)
    assert torch.equal(record.move(targets).parts["ctc"], targets.parts["ctc"])


def test_a_batch_forgets_the_one_before():
    x, segments, targets = numbered([151, 197])
    record = WarpRecord(warping())
    record(x, segments)
    record.augment.p = 0.0
    record(x, segments)
    assert torch.equal(record.move(targets).parts["ctc"], targets.parts["ctc"])

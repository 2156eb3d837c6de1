"""TargetDataset: each row's targets are those of its own cut, or there is a refusal."""

import numpy as np
import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from torch.utils.data import DataLoader

from icefall_kd.errors import KDError
from icefall_kd.targets import TargetDataset
from icefall_kd.targets.dataset import map_tokens, resample_frames, store_fingerprint
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD
from icefall_kd.types import SparseDistribution, Targets

# Rows


def check_batch(batch, cuts, stored):
    """Find each row's cut by its features; compare the targets."""
    inputs, targets = batch["inputs"], batch["kd_targets"]
    assert len(targets.parts["ctc"]) == len(targets.lens) == len(inputs)
    assert bool(targets.whole.all())
    frames = torch.arange(targets.mask.size(1))
    assert torch.equal(targets.mask, frames < targets.lens[:, None])
    seen = set()
    for row, logits, length in zip(
        inputs, targets.parts["ctc"], targets.lens, strict=True
    ):
        (cut,) = (
            c
            for c in cuts
            if np.array_equal(row[: c.num_frames].numpy(), c.load_features())
        )
        expected = stored(cut)
        assert int(length) == len(expected)
        assert torch.equal(logits[: len(expected)], expected)
        seen.add(cut.id)
    return seen


def test_rows_line_up_with_the_inputs(cuts, stored):
    batch = TargetDataset(K2SpeechRecognitionDataset())[cuts]
    assert check_batch(batch, cuts, stored) == set(cuts.ids)
    found = [c.id for c in batch["supervisions"]["cut"]]
    assert found == ["c2", "c5", "c3", "c1", "c4"] != list(cuts.ids)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rows_line_up_in_a_data_loader(cuts, stored, num_workers):
    loader = DataLoader(
        TargetDataset(K2SpeechRecognitionDataset()),
        sampler=SimpleCutSampler(cuts, max_duration=1.6, shuffle=True),
        batch_size=None,
        num_workers=num_workers,
    )
    seen = [check_batch(batch, cuts, stored) for batch in loader]
    assert len(seen) > 1 and set.union(*seen) == set(cuts.ids)


def test_rows_line_up_where_a_transform_reorders(cuts, stored):
    dataset = K2SpeechRecognitionDataset(
        cut_transforms=[lambda c: CutSet.from_cuts(reversed(list(c.drop_recordings())))]
    )
    assert check_batch(TargetDataset(dataset)[cuts], cuts, stored) == set(cuts.ids)


def test_the_batch_is_otherwise_that_of_the_dataset(cuts):
    plain = K2SpeechRecognitionDataset(return_cuts=True)[cuts]
    batch = TargetDataset(K2SpeechRecognitionDataset(return_cuts=True))[cuts]
    assert set(batch) == {*plain, "kd_targets"}
    assert torch.equal(batch["inputs"], plain["inputs"])
    assert batch["supervisions"]["text"] == plain["supervisions"]["text"]


def test_a_batch_logs_nothing(cuts, caplog):
    TargetDataset(K2SpeechRecognitionDataset())[cuts]
    assert caplog.messages == []


def test_targets_have_the_students_lengths(cuts, make_model):
    batch = TargetDataset(K2SpeechRecognitionDataset())[cuts]
    model = make_model().eval()
    with torch.no_grad():
        _, lens = model.forward_encoder(
            batch["inputs"], batch["supervisions"]["num_frames"]
        )
    assert lens.tolist() == batch["kd_targets"].lens.tolist()


def test_return_cuts_is_switched_on(cuts):
    dataset = K2SpeechRecognitionDataset(return_cuts=False)
    assert "kd_targets" in TargetDataset(dataset)[cuts]


def test_a_dataset_that_keeps_its_cuts_is_refused():
    with pytest.raises(KDError, match="TensorDataset has no return_cuts"):
        TargetDataset(torch.utils.data.TensorDataset(torch.zeros(1)))


def test_padding_is_masked(cuts, stored):
    targets = collate_targets([cuts["c4"], cuts["c2"]])
    n = int(targets.lens[0])
    assert targets.parts["ctc"].shape == (2, int(targets.lens[1]), 11)
    assert targets.parts["ctc"].dtype == torch.float32
    assert torch.equal(targets.parts["ctc"][0, :n], stored(cuts["c4"]))
    assert targets.mask[0].tolist() == [True] * n + [False] * (21 - n)
    assert torch.isfinite(targets.parts["ctc"]).all()


def test_a_batch_mixed_with_noise(cuts, noise, stored):
    dataset = K2SpeechRecognitionDataset(
        cut_transforms=[
            lambda c: CutSet.from_cuts(
                x.mix(noise, snr=20, preserve_id="left").pad(duration=2.0) for x in c
            )
        ]
    )
    batch = TargetDataset(dataset)[cuts]
    rows = zip(
        batch["supervisions"]["cut"], batch["kd_targets"].parts["ctc"], strict=True
    )
    for cut, logits in rows:
        track = cut.tracks[0].cut
        expected = stored(track)
        assert torch.equal(logits[: len(expected)], expected)
    assert sorted(batch["kd_targets"].lens.tolist()) == [1, 7, 14, 14, 21]


# Missing and damaged targets


def test_cuts_without_targets_are_counted(cuts, make_cut):
    bare = [make_cut("b1", 33), make_cut("b2", 33)]
    mixed = [cuts["c1"], bare[0], cuts["c2"], bare[1], cuts["c3"]]
    with pytest.raises(KDError, match="2 of 5 training cuts have no targets") as e:
        store_fingerprint(CutSet.from_cuts(mixed))
    assert "b1 the first" in str(e.value) and "b2" not in str(e.value)
    assert "icefall-kd dump" in str(e.value) and "all --kd weights at 0" in str(e.value)


def test_a_cut_without_targets_in_a_batch_is_refused(cuts, make_cut):
    batch = CutSet.from_cuts([cuts["c1"], make_cut("b1", 33)])
    with pytest.raises(KDError, match="cut b1 has no targets.*icefall-kd dump"):
        TargetDataset(K2SpeechRecognitionDataset())[batch]


def test_a_cut_with_other_custom_fields_has_no_targets(make_cut):
    cut = make_cut("b1", 33)
    cut.custom = {"age": 3, FIELD: None}
    with pytest.raises(KDError, match="1 of 1 training cuts"):
        store_fingerprint([cut])


def test_no_cuts_are_refused():
    with pytest.raises(KDError, match="no training cuts"):
        store_fingerprint([])


def test_hard_takes_a_store_of_some_cuts(cuts, make_cut, make_fingerprint):
    some = [cuts["c1"], make_cut("b1", 33)]
    assert store_fingerprint(some, "hard")[0] == make_fingerprint()
    with pytest.raises(KDError, match="1 of 1 training cuts have no targets"):
        store_fingerprint(some[1:], "hard")


def test_a_policy_that_is_none_is_refused():
    with pytest.raises(KDError, match="missing is 'soft'.*refuse.*hard"):
        TargetDataset(K2SpeechRecognitionDataset(), missing="soft")


def test_a_dataset_passes_its_policy_on(cuts, make_cut):
    batch = CutSet.from_cuts([cuts["c1"], make_cut("b1", 61)])
    found = TargetDataset(K2SpeechRecognitionDataset(), "hard")[batch]["kd_targets"]
    assert found.lens.tolist() == [0, 7]  # the longer cut is the first row


# Other frame rates and symbols


def frame_targets(lens=(9, 5)):
    """Targets whose first symbol says which frame they are of."""
    ctc = torch.zeros(2, max(lens), 3)
    ctc[..., 0] = torch.arange(max(lens))
    return Targets(torch.tensor(lens), parts={"ctc": ctc})


@pytest.mark.parametrize(
    "wanted, frames",
    [
        (0.02, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]),
        (0.08, [1, 3, 5, 7]),
        (0.06, [0, 2, 3, 5, 6, 8]),
        (0.03, [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8]),
    ],
)
def test_a_students_frame_has_what_is_spoken_at_its_middle(wanted, frames):
    found = resample_frames(frame_targets(), 0.04, wanted)
    assert found.parts["ctc"][0, :, 0].tolist() == frames
    assert found.lens.tolist() == [len(frames), int(5 * 0.04 / wanted + 1e-9)]
    assert not found.whole.any()


@pytest.mark.parametrize("mine", [1, 2, 3, 4, 5, 6, 8, 12, 16])
@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 6, 8, 12, 16])
def test_rounding_loses_no_frame(mine, wanted):
    """Feature frames of 10 ms an encoder frame; as whole numbers have it."""
    lens = torch.tensor([1, 3, 59, 60, 299])
    ctc = torch.arange(299.0)[None, :, None].repeat(5, 1, 1)
    targets = Targets(lens, parts={"ctc": ctc})
    found = resample_frames(targets, mine * 0.01, wanted * 0.01)
    assert found.lens.tolist() == [n * mine // wanted for n in lens.tolist()]
    frames = found.parts["ctc"][0, :, 0].tolist()
    middles = [(2 * j + 1) * wanted // (2 * mine) for j in range(299 * mine // wanted)]
    assert frames == middles


def test_the_rounding_of_times_leaves_a_cut_whole(make_cut, make_store):
    """Sums of times differ from what was written in the last bit."""
    (cut,) = make_store([make_cut("c1", 47, start=0.3)])
    cut.start = 0.1 + 0.2  # 0.30000000000000004
    assert collate_targets([cut]).whole.all()
    cut.duration -= 0.01
    assert not collate_targets([cut]).whole.any()


def test_the_mask_goes_with_the_frames():
    targets = frame_targets()
    targets.mask[0, 3:5] = False
    found = resample_frames(targets, 0.04, 0.02)
    spoken = [f not in (3, 4) for f in range(9) for _ in range(2)]
    assert found.mask[0].tolist() == spoken
    assert found.mask[1].tolist() == [True] * 10 + [False] * 8


def test_the_same_frame_rate_changes_nothing():
    targets = frame_targets()
    assert resample_frames(targets, 0.04, 0.04) is targets


def test_sparse_targets_take_another_frame_rate():
    g = torch.Generator().manual_seed(0)
    sparse = SparseDistribution(
        torch.randint(0, 9, (2, 9, 3), generator=g),
        torch.randn(2, 9, 3, generator=g),
        torch.randn(2, 9, generator=g),
    )
    targets = Targets(torch.tensor([9, 5]), parts={"ctc": sparse})
    found = resample_frames(targets, 0.04, 0.08).parts["ctc"]
    at = [1, 3, 5, 7]
    assert torch.equal(found.indices, sparse.indices[:, at])
    assert torch.equal(found.log_probs, sparse.log_probs[:, at])
    assert torch.equal(found.log_tail, sparse.log_tail[:, at])


def test_a_dataset_gives_the_students_frame_rate(cuts, stored):
    dataset = TargetDataset(K2SpeechRecognitionDataset(), frame_shift=0.02)
    found = dataset[CutSet.from_cuts([cuts["c3"]])]["kd_targets"]
    expected = stored(cuts["c3"]).repeat_interleave(2, 0)
    assert torch.equal(found.parts["ctc"][0], expected) and found.lens.tolist() == [28]


def symbols_of(*to):
    return torch.tensor(to)


def test_symbols_are_reordered():
    g = torch.Generator().manual_seed(0)
    ctc = torch.randn(2, 5, 4, generator=g).log_softmax(-1)
    targets = Targets(torch.tensor([5, 3]), parts={"ctc": ctc})
    found = map_tokens(targets, symbols_of(2, 0, 3, 1))
    for old, new in enumerate([2, 0, 3, 1]):
        assert torch.equal(found.parts["ctc"][..., new], ctc[..., old])
    assert found.mask is targets.mask and found.lens is targets.lens


def test_symbols_that_become_one_add_up():
    g = torch.Generator().manual_seed(0)
    ctc = torch.randn(2, 5, 4, generator=g).log_softmax(-1)
    targets = Targets(torch.tensor([5, 3]), parts={"ctc": ctc})
    found = map_tokens(targets, symbols_of(1, 0, 1, 2)).parts["ctc"]
    p, q = ctc.exp(), found.exp()
    assert found.shape == (2, 5, 3)
    torch.testing.assert_close(q[..., 0], p[..., 1])
    torch.testing.assert_close(q[..., 1], p[..., 0] + p[..., 2])
    torch.testing.assert_close(q[..., 2], p[..., 3])


def test_sparse_symbols_are_reordered_and_not_merged():
    sparse = SparseDistribution(
        torch.tensor([[[3, 0]]]), torch.tensor([[[-0.2, -3.0]]]), torch.tensor([[-2.0]])
    )
    targets = Targets(torch.tensor([1]), parts={"ctc": sparse})
    found = map_tokens(targets, symbols_of(2, 0, 3, 1)).parts["ctc"]
    assert found.indices.tolist() == [[[1, 2]]]
    assert torch.equal(found.log_probs, sparse.log_probs)
    with pytest.raises(KDError, match="4 tokens .* become 3 .*as dense"):
        map_tokens(targets, symbols_of(1, 0, 1, 2))


def test_a_dataset_maps_symbols(cuts, stored):
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    dataset = TargetDataset(K2SpeechRecognitionDataset(), token_ids=order)
    found = dataset[CutSet.from_cuts([cuts["c3"]])]["kd_targets"].parts["ctc"][0]
    assert torch.equal(found[:, order], stored(cuts["c3"]))


# Stores


def test_the_stores_fingerprint_is_found(cuts, make_fingerprint):
    assert store_fingerprint(cuts)[0] == make_fingerprint()


def test_two_stores_of_one_teacher_are_one(make_cut, make_store, make_fingerprint):
    a = make_store([make_cut("c1", 33)], "a")
    b = make_store([make_cut("c2", 33)], "b")
    assert store_fingerprint([*a, *b])[0] == make_fingerprint()


def test_stores_of_two_teachers_are_refused(make_cut, make_store):
    a = make_store([make_cut("c1", 33)], "a")
    b = make_store([make_cut("c2", 33)], "b", teacher="b" * 64)
    with pytest.raises(KDError, match="made with teacher") as e:
        store_fingerprint([*a, *b])
    assert "a" * 64 in str(e.value) and "b" * 64 in str(e.value)


def test_a_store_without_fingerprint_is_refused(cuts, tmp_path):
    (tmp_path / "kd" / "fingerprint.json").unlink()
    with pytest.raises(KDError, match="has no fingerprint.json"):
        store_fingerprint(cuts)


def test_mixed_cuts_that_carry_targets_have_them(cuts, noise, make_fingerprint):
    mixed = [cuts["c1"].pad(duration=2.0), cuts["c2"].mix(noise, snr=10)]
    assert store_fingerprint(mixed)[0] == make_fingerprint()


def test_the_store_is_read_lazily(cuts, tmp_path, make_fingerprint):
    lazy = CutSet.from_jsonl_lazy(tmp_path / "kd.jsonl.gz")
    assert store_fingerprint(lazy)[0] == make_fingerprint()
    assert len(load_manifest(tmp_path / "kd.jsonl.gz")) == len(cuts)


@pytest.mark.parametrize("symbols", [[0, 2, 2], [0, 3, 1], [0, -1, 1]])
def test_a_map_that_leaves_symbols_out_is_refused(symbols):
    targets = Targets(torch.tensor([2]), parts={"ctc": torch.zeros(1, 2, 3)})
    with pytest.raises(KDError, match="all of them must occur"):
        map_tokens(targets, torch.tensor(symbols))

"""KDDataset: each row's targets are those of its own cut, or there is a refusal."""

import numpy as np
import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.cut import MixedCut
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from torch.utils.data import DataLoader

from icefall_kd import JointKDLoss
from icefall_kd.errors import KDError
from icefall_kd.targets import KDDataset
from icefall_kd.targets.dataset import collate_targets, store_fingerprint
from icefall_kd.targets.writer import FIELD
from icefall_kd.types import EncoderOut

# Not in the order of their durations.
LENGTHS = {"c1": 33, "c2": 90, "c3": 61, "c4": 12, "c5": 62}


def lhotse_before(*version):
    import lhotse

    found = lhotse.__version__.split(".")[:2]
    return tuple(int(n) for n in found) < version


@pytest.fixture
def cuts(make_cut, make_store):
    """Cuts that carry targets."""
    return make_store([make_cut(name, n) for name, n in LENGTHS.items()])


@pytest.fixture
def stored(make_logits):
    """What a reader finds of a cut: float16 log-probabilities, as float32."""
    return lambda cut: make_logits(cut).log_softmax(-1).half().float()


def array_of(cuts, cut_id, tmp_path):
    """The file that holds a cut's targets."""
    array = cuts[cut_id].custom[FIELD].array
    return tmp_path / "kd" / array.storage_key


# Rows


def check_batch(batch, cuts, stored):
    """Find each row's cut by its features; compare the targets."""
    inputs, targets = batch["inputs"], batch["kd_targets"]
    assert len(targets.ctc_logits) == len(targets.lens) == len(inputs)
    seen = set()
    for row, logits, length in zip(
        inputs, targets.ctc_logits, targets.lens, strict=True
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
    batch = KDDataset(K2SpeechRecognitionDataset())[cuts]
    assert check_batch(batch, cuts, stored) == set(LENGTHS)
    found = [c.id for c in batch["supervisions"]["cut"]]
    assert found == ["c2", "c5", "c3", "c1", "c4"] != list(LENGTHS)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rows_line_up_in_a_data_loader(cuts, stored, num_workers):
    loader = DataLoader(
        KDDataset(K2SpeechRecognitionDataset()),
        sampler=SimpleCutSampler(cuts, max_duration=1.6, shuffle=True),
        batch_size=None,
        num_workers=num_workers,
    )
    seen = [check_batch(batch, cuts, stored) for batch in loader]
    assert len(seen) > 1 and set.union(*seen) == set(LENGTHS)


def test_rows_line_up_where_a_transform_reorders(cuts, stored):
    dataset = K2SpeechRecognitionDataset(
        cut_transforms=[lambda c: CutSet.from_cuts(reversed(list(c.drop_recordings())))]
    )
    assert check_batch(KDDataset(dataset)[cuts], cuts, stored) == set(LENGTHS)


def test_the_batch_is_otherwise_that_of_the_dataset(cuts):
    plain = K2SpeechRecognitionDataset(return_cuts=True)[cuts]
    batch = KDDataset(K2SpeechRecognitionDataset(return_cuts=True))[cuts]
    assert set(batch) == {*plain, "kd_targets"}
    assert torch.equal(batch["inputs"], plain["inputs"])
    assert batch["supervisions"]["text"] == plain["supervisions"]["text"]


def test_a_batch_logs_nothing(cuts, caplog):
    KDDataset(K2SpeechRecognitionDataset())[cuts]
    assert caplog.messages == []


def test_targets_have_the_students_lengths(cuts, make_model):
    batch = KDDataset(K2SpeechRecognitionDataset())[cuts]
    model = make_model().eval()
    with torch.no_grad():
        _, lens = model.forward_encoder(
            batch["inputs"], batch["supervisions"]["num_frames"]
        )
    assert lens.tolist() == batch["kd_targets"].lens.tolist()


def test_return_cuts_is_switched_on(cuts):
    dataset = K2SpeechRecognitionDataset(return_cuts=False)
    assert "kd_targets" in KDDataset(dataset)[cuts]


def test_a_dataset_that_keeps_its_cuts_is_refused():
    with pytest.raises(KDError, match="TensorDataset has no return_cuts"):
        KDDataset(torch.utils.data.TensorDataset(torch.zeros(1)))


def test_padding_is_uniform(cuts, stored):
    targets = collate_targets([cuts["c4"], cuts["c2"]])
    n = int(targets.lens[0])
    assert targets.ctc_logits.shape == (2, int(targets.lens[1]), 11)
    assert targets.ctc_logits.dtype == torch.float32
    assert torch.equal(targets.ctc_logits[0, :n], stored(cuts["c4"]))
    rest = targets.ctc_logits[0, n:].softmax(-1)
    torch.testing.assert_close(rest, torch.full_like(rest, 1 / 11))


def test_a_cut_that_starts_late(make_cut, make_store, stored):
    (cut,) = make_store([make_cut("late", 61, start=7.25)])
    targets = collate_targets([cut])
    assert torch.equal(targets.ctc_logits[0], stored(cut))


# Mixed cuts


@pytest.fixture
def noise(make_cut):
    cut = make_cut("noise", 150)
    cut.supervisions = []
    return cut


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
    assert torch.equal(targets.ctc_logits[0], stored(cuts["c3"]))
    assert targets.lens.tolist() == [14]


@pytest.mark.parametrize(
    "mix",
    [
        lambda cut, other, noise: noise.append(cut),
        lambda cut, other, noise: noise.mix(cut, snr=10, offset_other_by=0.3),
        lambda cut, other, noise: cut.pad(duration=2.0, direction="left"),
        lambda cut, other, noise: cut.append(other),
        lambda cut, other, noise: cut.mix(other, snr=10),
    ],
    ids="noise-before late left-padded concatenated two".split(),
)
def test_other_mixed_cuts_are_refused(cuts, noise, mix):
    mixed = mix(cuts["c3"], cuts["c1"], noise)
    with pytest.raises(KDError, match="is a MixedCut whose targets don't") as e:
        collate_targets([cuts["c2"], mixed])
    assert mixed.id in str(e.value) and "icefall-kd dump" in str(e.value)


def test_a_batch_mixed_with_noise(cuts, noise, stored):
    dataset = K2SpeechRecognitionDataset(
        cut_transforms=[
            lambda c: CutSet.from_cuts(
                x.mix(noise, snr=20, preserve_id="left").pad(duration=2.0) for x in c
            )
        ]
    )
    batch = KDDataset(dataset)[cuts]
    rows = zip(
        batch["supervisions"]["cut"], batch["kd_targets"].ctc_logits, strict=True
    )
    for cut, logits in rows:
        track = cut.tracks[0].cut
        expected = stored(track)
        assert torch.equal(logits[: len(expected)], expected)
    assert sorted(batch["kd_targets"].lens.tolist()) == [1, 7, 14, 14, 21]


# Cuts that were changed after their targets were made


def refuse(cut, encoder_frames):
    """Read the targets, and join them with what a student gives on the cut."""
    targets = collate_targets([cut])
    n = encoder_frames(round(cut.duration * 100))
    student = EncoderOut(
        torch.zeros(1, n, 6), torch.tensor([n]), torch.zeros(1, n, 11).requires_grad_()
    )
    JointKDLoss()(torch.zeros((), requires_grad=True), student, targets)


UNSCALED = pytest.mark.xfail(
    strict=True, reason="dataset.py: a short cut's targets keep their length"
)


@pytest.mark.parametrize(
    "num_frames", [90, 61, 33, pytest.param(19, marks=UNSCALED, id="19")]
)
@pytest.mark.parametrize("kind", ["perturb_speed", "perturb_tempo"])
def test_another_speed_is_refused(
    make_cut, make_store, encoder_frames, num_frames, kind
):
    (cut,) = make_store([make_cut("c1", num_frames)])
    refuse(cut, encoder_frames)  # as it was dumped: nothing to refuse
    with pytest.raises(KDError, match="icefall-kd dump"):
        refuse(getattr(cut, kind)(1.1), encoder_frames)


@pytest.mark.parametrize("kind", ["perturb_speed", "perturb_tempo"])
def test_a_slower_speed_is_refused(cuts, encoder_frames, kind):
    with pytest.raises(KDError, match="changed after the targets were made"):
        refuse(getattr(cuts["c2"], kind)(0.9), encoder_frames)


def test_a_truncated_cut_is_refused(cuts, encoder_frames):
    with pytest.raises(KDError, match="changed after the targets were made"):
        refuse(cuts["c2"].truncate(duration=0.5), encoder_frames)


@pytest.fixture
def extended(make_cut, make_store):
    """Lhotse leaves None where a cut was extended beyond its targets."""
    (cut,) = make_store([make_cut("c1", 61)])
    cut.recording.num_samples *= 3
    cut.recording.duration *= 3
    return cut.extend_by(duration=0.5, direction="right", preserve_id=True)


def test_a_cut_extended_beyond_its_targets_is_refused(extended):
    with pytest.raises(KDError, match="c1"):
        collate_targets([extended])


def test_a_cut_extended_beyond_its_targets_counts_as_missing(extended):
    with pytest.raises(KDError, match="1 of 1 training cuts have no targets"):
        store_fingerprint([extended])


def test_a_mixed_cut_without_targets_is_refused(noise):
    with pytest.raises(KDError, match="has no targets"):
        collate_targets([noise.pad(duration=2.0)])


def test_volume_does_not_matter(cuts, stored):
    expected = stored(cuts["c3"])
    louder = cuts["c3"].perturb_volume(2.0)
    assert torch.equal(collate_targets([louder]).ctc_logits[0], expected)


# Missing and damaged targets


def test_cuts_without_targets_are_counted(cuts, make_cut):
    bare = [make_cut("b1", 33), make_cut("b2", 33)]
    mixed = [cuts["c1"], bare[0], cuts["c2"], bare[1], cuts["c3"]]
    with pytest.raises(KDError, match="2 of 5 training cuts have no targets") as e:
        store_fingerprint(CutSet.from_cuts(mixed))
    assert "b1 the first" in str(e.value) and "b2" not in str(e.value)
    assert "icefall-kd dump" in str(e.value) and "--kd-ctc-weight 0" in str(e.value)


def test_a_cut_without_targets_in_a_batch_is_refused(cuts, make_cut):
    batch = CutSet.from_cuts([cuts["c1"], make_cut("b1", 33)])
    with pytest.raises(KDError, match="cut b1 has no targets.*icefall-kd dump"):
        KDDataset(K2SpeechRecognitionDataset())[batch]


def test_a_cut_with_other_custom_fields_has_no_targets(make_cut):
    cut = make_cut("b1", 33)
    cut.custom = {"age": 3}
    with pytest.raises(KDError, match="1 of 1 training cuts"):
        store_fingerprint([cut])


def test_no_cuts_are_refused():
    with pytest.raises(KDError, match="no training cuts"):
        store_fingerprint([])


def header_only(data):
    return data[:128]


@pytest.mark.parametrize(
    "damage",
    [
        None,
        header_only,
        lambda data: data[:-20],
        lambda data: data[:30],
        lambda data: b"not an array",
        lambda data: b"\0" * len(data),
        lambda data: b"",
    ],
    ids="removed header torn head text zeros empty".split(),
)
def test_an_array_that_cannot_be_read_is_refused(cuts, tmp_path, damage):
    path = array_of(cuts, "c3", tmp_path)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KDError, match="targets of cut c3 can't be read") as e:
        KDDataset(K2SpeechRecognitionDataset())[cuts]
    assert str(path) in str(e.value) and "--overwrite" in str(e.value)
    assert "\n" not in str(e.value)


def test_the_rest_of_a_damaged_store_is_read(cuts, tmp_path, stored):
    array_of(cuts, "c3", tmp_path).unlink()
    targets = collate_targets([cuts["c1"], cuts["c2"]])
    assert torch.equal(targets.ctc_logits[1], stored(cuts["c2"]))


# Stores


def test_the_stores_fingerprint_is_found(cuts, make_fingerprint):
    assert store_fingerprint(cuts) == make_fingerprint()


def test_two_stores_of_one_teacher_are_one(make_cut, make_store, make_fingerprint):
    a = make_store([make_cut("c1", 33)], "a")
    b = make_store([make_cut("c2", 33)], "b")
    assert store_fingerprint([*a, *b]) == make_fingerprint()


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
    assert store_fingerprint(mixed) == make_fingerprint()


def test_the_store_is_read_lazily(cuts, tmp_path, make_fingerprint):
    lazy = CutSet.from_jsonl_lazy(tmp_path / "kd.jsonl.gz")
    assert store_fingerprint(lazy) == make_fingerprint()
    assert len(load_manifest(tmp_path / "kd.jsonl.gz")) == len(LENGTHS)

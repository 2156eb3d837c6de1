"""--kd-time-warp: SpecAugment's time warp is off, or targets follow it."""

import logging

import pytest
import torch
from lhotse import CutSet, fix_random_seed
from lhotse.dataset import K2SpeechRecognitionDataset, SpecAugment

from icefall_kd.errors import KDError
from icefall_kd.targets import TargetDataset, TargetWriter
from icefall_kd.targets.warp import WarpRecord
from icefall_kd.training import session


@pytest.fixture
def cuts(make_cut, make_store):
    return make_store([make_cut("c1", 347), make_cut("c2", 261)])


class Other(torch.nn.Identity):
    def forward(self, x, supervision_segments=None):
        return x


def dataset():
    return K2SpeechRecognitionDataset(
        input_transforms=[Other(), SpecAugment(time_warp_factor=80, p=1.0)]
    )


def attach(model, params):
    session.attach(params, model)
    return session.current().distillation


def test_it_is_off_unless_asked_and_the_log_says_so(
    make_model, make_params, cuts, caplog
):
    params = make_params(enable_spec_aug=True)
    with caplog.at_level(logging.WARNING):
        attach(make_model(), params)
    assert "time warp (--spec-aug-time-warp-factor 80) is switched off" in caplog.text
    bare = dataset()
    wrapped = session.wrap_dataset(bare, cuts)
    assert bare.input_transforms[1].time_warp_factor == 0
    assert wrapped[cuts]["kd_targets"].whole.all()


def test_targets_follow_it_where_asked(make_model, make_params, cuts):
    torch.manual_seed(1)
    attach(make_model(), make_params(enable_spec_aug=True, kd_time_warp="follow"))
    bare = dataset()
    wrapped = session.wrap_dataset(bare, cuts)
    record = bare.input_transforms[1]
    assert isinstance(record, WarpRecord) and record.augment.time_warp_factor == 80
    still = TargetDataset(K2SpeechRecognitionDataset())[cuts]["kd_targets"]
    moved = False
    for _ in range(5):
        targets = wrapped[cuts]["kd_targets"]
        assert torch.equal(targets.lens, still.lens)
        assert torch.equal(targets.parts["ctc"], record.move(still).parts["ctc"])
        moved |= not torch.equal(targets.parts["ctc"], still.parts["ctc"])
    assert moved


@pytest.mark.parametrize("wanted", [None, 0.04])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_encoders_frames_are_those_of_the_store_or_the_student(
    make_cut, make_fingerprint, tmp_path, factor, wanted
):
    """A teacher of any subsampling, and targets that a student takes at 40 ms."""
    cut, shift = make_cut("c1", 347), factor / 100
    fingerprint = make_fingerprint(subsampling_factor=factor, frame_shift=shift)
    with TargetWriter(tmp_path / "kd.jsonl", tmp_path / "kd", fingerprint) as writer:
        generator = torch.Generator().manual_seed(1)
        writer.write(cut, torch.randn(340 // factor, 11, generator=generator))
    cuts = CutSet.from_file(tmp_path / "kd.jsonl").to_eager()
    still = TargetDataset(K2SpeechRecognitionDataset(), frame_shift=wanted)
    still = still[cuts]["kd_targets"]
    record = WarpRecord(SpecAugment(time_warp_factor=80, p=1.0))
    fix_random_seed(1)  # a warp by next to nothing moves no target
    bare = K2SpeechRecognitionDataset(input_transforms=[record])
    moving = TargetDataset(bare, frame_shift=wanted, time_warp=record)
    targets = moving[cuts]["kd_targets"]
    expected = record.move(still, 4 if wanted else factor)
    assert torch.equal(targets.parts["ctc"], expected.parts["ctc"])
    assert not torch.equal(targets.parts["ctc"], still.parts["ctc"])
    assert not torch.equal(targets.parts["ctc"], record.move(still, 3).parts["ctc"])


def test_cr_ctcs_own_time_warp_is_switched_off(make_model, make_params, caplog):
    params = make_params(use_cr_ctc=True)  # it warps in the model, by this setting
    with caplog.at_level(logging.WARNING):
        attach(make_model(), params)
    assert params["spec_aug_time_warp_factor"] == 0
    assert "is switched off" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_spec_aug": False},
        {"enable_spec_aug": True, "spec_aug_time_warp_factor": 0},
        {"enable_spec_aug": True, "spec_aug_time_warp_factor": -1},
        {"enable_spec_aug": True, "spec_aug_time_warp_factor": None},
        {"enable_spec_aug": True, "ctc": 0.0, "kd_nbest_weight": 1.0},
        {"use_cr_ctc": True, "ctc": 0.0, "kd_nbest_weight": 1.0},
    ],
)
@pytest.mark.parametrize("kind", ["off", "follow"])
def test_nothing_is_done_where_no_targets_move(
    make_model, make_params, caplog, changes, kind
):
    params = make_params(**changes, kd_time_warp=kind)
    before = dict(params)
    with caplog.at_level(logging.WARNING):
        found = attach(make_model(), params)
    assert "time warp" not in caplog.text and dict(params) == before
    bare = dataset()
    assert found.time_warp.apply(bare) is bare
    assert type(bare.input_transforms[1]) is SpecAugment
    assert bare.input_transforms[1].time_warp_factor == 80


def test_a_teacher_in_the_training_process_hears_the_warped_features(
    make_model, online, caplog
):
    with caplog.at_level(logging.WARNING):
        found = attach(make_model(vocab_size=25), online(enable_spec_aug=True))
    assert not found.time_warp.applies and "time warp" not in caplog.text


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"use_cr_ctc": True}, "the model itself warps"),
        ({"kd_rnnt_weight": 1.0}, "lattices can't be moved"),
        ({"kd_full_sum_weight": 1.0}, "lattices can't be moved"),
    ],
)
def test_what_can_not_follow_is_refused(make_model, make_params, changes, words):
    params = make_params(enable_spec_aug=True, kd_time_warp="follow", **changes)
    with pytest.raises(KDError, match=f"{words}.*--kd-time-warp off") as e:
        session.attach(params, make_model())
    assert "\n" not in str(e.value)


def test_a_cache_can_not_follow(make_model, online, tmp_path):
    params = online(
        enable_spec_aug=True, kd_time_warp="follow", kd_teacher_cache_dir=str(tmp_path)
    )
    with pytest.raises(KDError, match="--kd-teacher-cache-dir.*--kd-time-warp off"):
        session.attach(params, make_model(vocab_size=25))


def test_another_word_is_refused(make_model, make_params):
    with pytest.raises(KDError, match="--kd-time-warp is on, and must be one of off"):
        session.attach(make_params(kd_time_warp="on"), make_model())


@pytest.mark.parametrize("transforms", [None, [torch.nn.Identity()]])
def test_a_dataset_that_hides_its_augmentation_is_refused(
    make_model, make_params, cuts, transforms
):
    attach(make_model(), make_params(enable_spec_aug=True))
    with pytest.raises(KDError, match="no SpecAugment.*--spec-aug-time-warp-factor 0"):
        session.wrap_dataset(
            K2SpeechRecognitionDataset(input_transforms=transforms), cuts
        )

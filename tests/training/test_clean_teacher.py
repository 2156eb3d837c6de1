"""--kd-teacher-clean: an online teacher hears what stored targets are of."""

import atexit
import random

import pytest
import torch
from calm_model import calm
from lhotse import CutSet, Fbank, FbankConfig, fix_random_seed
from lhotse.dataset import K2SpeechRecognitionDataset, OnTheFlyFeatures, SpecAugment
from torch.utils.data import DataLoader
from zipformer.utils import MetricsTracker

from icefall_kd.errors import KDError
from icefall_kd.targets import TargetDataset, TargetWriter
from icefall_kd.targets.clean import CLEAN, WARPS, CleanFeatures
from icefall_kd.targets.warp import WarpRecord
from icefall_kd.tokens import load_tokenizer
from icefall_kd.training import session
from icefall_kd.training.online import online_teacher

LENGTHS = {"c1": 347, "c2": 261, "c3": 97}
TEXTS = {"c1": "zero one two three", "c2": "two four", "c3": "six"}
HIDDEN = {"kd_hidden_weight": 1.0, "kd_hidden_layers": "out,0:1"}


def augmented(*transforms, **options):
    augment = SpecAugment(time_warp_factor=80, p=1.0)
    return K2SpeechRecognitionDataset(
        input_transforms=[*transforms, augment], **options
    )


@pytest.fixture
def online(online, bpe_models):
    """Params of a student with SpecAugment, taught online."""
    return lambda **changes: online(
        **{
            "ctc": 1.0,
            "bpe_model": str(bpe_models.a),
            "enable_spec_aug": True,
            **changes,
        }
    )


@pytest.fixture
def stored(cuts, online, make_fingerprint, tmp_path):
    """The cuts with the targets of the online teacher."""
    teacher, _ = online_teacher(online(), layers=["out", 0])
    fingerprint = make_fingerprint(vocab_size=25, hidden="out:half,0:half")
    manifest = tmp_path / "kd.jsonl.gz"
    with TargetWriter(manifest, tmp_path / "kd", fingerprint) as writer:
        for cut in cuts:
            x = torch.from_numpy(cut.load_features())[None]
            targets = teacher.targets(x, torch.tensor([x.size(1)]))
            hidden = {k: v[0] for k, v in targets.parts["hidden"].items()}
            writer.write(cut, targets.parts["ctc"][0], hidden=hidden)
    return CutSet.from_file(manifest).to_eager()


def as_stored(settings):
    return {**settings, "kd_teacher_exp_dir": "", "kd_teacher_clean": False}


@pytest.fixture
def step(bpe_models):
    """One batch of a session: the batch, the targets and what is logged."""
    sp = load_tokenizer(bpe_models.a)

    def run(model, params, cuts, seed=1, double=False):
        session.attach(params, model)
        dataset = session.wrap_dataset(augmented(), cuts)
        fix_random_seed(seed)
        batch = dataset[cuts]
        random.seed(0)
        torch.manual_seed(0)
        supervisions, info = batch["supervisions"], MetricsTracker()
        x, lens = batch["inputs"], supervisions["num_frames"]
        y = sp.encode(supervisions["text"], out_type=int)
        if double:  # as CR-CTC does
            x, lens, y = torch.cat([x, x]), torch.cat([lens, lens]), y + y
        recipe = model(x=x, x_lens=lens, y=y, prune_range=3)[1].sum()
        distillation = session.current().distillation
        found, of_batch = [], distillation._targets

        def targets(*args):
            found.append(of_batch(*args))
            return found[0]

        distillation._targets = targets
        loss = session.joint_loss(recipe, info, model, batch)
        model.zero_grad()
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return batch, found[0], dict(info), torch.cat(grads)

    return run


def assert_same(asked, read):
    assert torch.equal(asked[0]["inputs"], read[0]["inputs"])
    targets, expected = asked[1], read[1]
    assert torch.equal(targets.mask, expected.mask)
    rows = targets.mask
    torch.testing.assert_close(
        targets.parts["ctc"][rows], expected.parts["ctc"][rows], rtol=2e-3, atol=2e-3
    )
    for layer, hidden in targets.parts.get("hidden", {}).items():
        other = expected.parts["hidden"][layer]
        torch.testing.assert_close(hidden[rows], other[rows], rtol=2e-3, atol=2e-3)
    assert asked[2].keys() == read[2].keys()
    for name, value in asked[2].items():
        assert value > 0 and read[2][name] == pytest.approx(value, rel=2e-3), name
    assert (asked[3] - read[3]).norm() < 2e-3 * asked[3].norm()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("time_warp", ["off", "follow"])
@pytest.mark.parametrize("terms", [{}, HIDDEN])
def test_clean_targets_are_those_of_a_store(
    make_model, online, cuts, stored, step, time_warp, terms, double
):
    """While the student hears the same masks, and the same time warp or none."""
    settings = online(kd_teacher_clean=True, kd_time_warp=time_warp, **terms)
    asked = step(calm(make_model(vocab_size=25)), settings, cuts, double=double)
    model = calm(make_model(vocab_size=25))
    read = step(model, as_stored(settings), stored, double=double)
    assert_same(asked, read)
    clean = K2SpeechRecognitionDataset()[cuts]["inputs"]
    assert torch.equal(asked[0][CLEAN], clean)
    assert not torch.equal(asked[0]["inputs"], clean)
    assert CLEAN not in read[0]
    warps = asked[0].get(WARPS)
    assert bool(warps) == (time_warp == "follow")


def test_a_warp_moves_the_clean_targets(make_model, online, cuts, stored, step):
    still = TargetDataset(K2SpeechRecognitionDataset())[stored]["kd_targets"]
    settings = online(kd_teacher_clean=True, kd_time_warp="follow")
    moved = 0
    for seed in range(4):
        model = calm(make_model(vocab_size=25))
        targets = step(model, settings, cuts, seed)[1]
        apart = (targets.parts["ctc"] - still.parts["ctc"]).abs() > 0.1
        moved += bool(apart[still.mask].any())
    assert moved


def test_without_it_the_teacher_hears_the_masks(make_model, online, cuts, stored, step):
    settings = online()
    batch, targets, _, _ = step(calm(make_model(vocab_size=25)), settings, cuts)
    assert CLEAN not in batch and WARPS not in batch
    still = TargetDataset(K2SpeechRecognitionDataset())[stored]["kd_targets"]
    apart = (targets.parts["ctc"] - still.parts["ctc"]).abs() > 0.1
    assert apart[still.mask].any()


def test_the_masks_are_those_that_would_be_without_it(make_model, online, cuts, step):
    """Keeping features draws no random number."""
    flags = {"spec_aug_time_warp_factor": 0}
    batches = [
        step(calm(make_model(vocab_size=25)), online(**flags, kd_teacher_clean=c), cuts)
        for c in (False, True)
    ]
    assert torch.equal(batches[0][0]["inputs"], batches[1][0]["inputs"])


def test_a_worker_hands_them_on(make_model, online, cuts, stored):
    settings = online(kd_teacher_clean=True, kd_time_warp="follow")
    session.attach(settings, make_model(vocab_size=25))
    dataset = session.wrap_dataset(augmented(), cuts)
    loader = DataLoader(dataset, sampler=[cuts], batch_size=None, num_workers=1)
    (batch,) = loader
    clean = K2SpeechRecognitionDataset()[cuts]["inputs"]
    assert torch.equal(batch[CLEAN], clean) and len(batch[WARPS]) == 3
    row, first, source = batch[WARPS][0]
    assert (row, first) == (0, 0) and source.shape == (347,)


# The dataset


class InPlace(torch.nn.Module):
    def forward(self, x, supervision_segments=None):
        return x.fill_(7.0)


def test_a_transform_in_place_does_not_reach_the_copy(cuts):
    clean = K2SpeechRecognitionDataset()[cuts]["inputs"]
    batch = CleanFeatures(augmented(InPlace()))[cuts]
    assert torch.equal(batch[CLEAN], clean)
    assert (batch["inputs"] == 7.0).float().mean() > 0.3


def test_a_dataset_without_transforms_is_clean_already(cuts):
    batch = CleanFeatures(K2SpeechRecognitionDataset())[cuts]
    assert torch.equal(batch[CLEAN], batch["inputs"])


class CountingFbank(Fbank):
    calls = 0

    def extract_batch(self, *args, **kwargs):
        CountingFbank.calls += 1
        return super().extract_batch(*args, **kwargs)


@pytest.fixture
def spoken(tmp_path):
    """Cuts with audio and no features."""
    import numpy as np
    import soundfile
    from lhotse import MonoCut, Recording, SupervisionSegment

    found = []
    for i, seconds in enumerate((1.5, 1.1)):
        path = tmp_path / f"{i}.wav"
        noise = np.random.default_rng(i).normal(size=int(8000 * seconds)) / 10
        soundfile.write(path, noise, 8000)
        supervision = SupervisionSegment(f"s{i}", f"s{i}", 0, seconds, text="six")
        recording = Recording.from_file(path, recording_id=f"s{i}")
        cut = MonoCut(f"s{i}", 0, seconds, 0, [supervision], recording=recording)
        found.append(cut)
    return CutSet.from_cuts(found)


def test_features_that_are_computed_on_the_fly_are_computed_once(spoken):
    extractor = CountingFbank(FbankConfig(sampling_rate=8000, num_mel_bins=20))
    plain = K2SpeechRecognitionDataset(input_strategy=OnTheFlyFeatures(extractor))
    clean = plain[spoken]["inputs"]
    CountingFbank.calls = 0
    strategy = OnTheFlyFeatures(extractor)
    batch = CleanFeatures(augmented(input_strategy=strategy))[spoken]
    calls = CountingFbank.calls
    plain[spoken]
    assert CountingFbank.calls == 2 * calls > 0
    torch.testing.assert_close(batch[CLEAN], clean)
    assert not torch.equal(batch["inputs"], clean)


def test_what_happens_to_the_cuts_is_in_both(cuts):
    def shorter(cuts):
        return CutSet.from_cuts([cut for cut in cuts if cut.id != "c1"])

    batch = CleanFeatures(augmented(cut_transforms=[shorter]))[cuts]
    assert batch[CLEAN].shape == batch["inputs"].shape == (2, 261, 20)


# What is refused, and what needs nothing


def test_a_dataset_that_hides_its_transforms_is_refused():
    class Other(torch.utils.data.Dataset):
        return_cuts = False

    words = "Other\\) has no input_transforms.* --kd-teacher-clean false"
    with pytest.raises(KDError, match=words):
        CleanFeatures(Other())


def test_stored_targets_need_no_clean_teacher(make_params, make_model):
    words = "--kd-teacher-clean is true and there is no teacher .* --kd-teacher-exp-dir"
    with pytest.raises(KDError, match=words) as e:
        session.attach(make_params(kd_teacher_clean=True), make_model())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["kd_rnnt_weight", "kd_full_sum_weight"])
def test_lattices_can_not_follow_a_time_warp(make_model, online, name):
    settings = online(kd_teacher_clean=True, kd_time_warp="follow", **{name: 1.0})
    with pytest.raises(KDError, match="lattices can't be moved.*--kd-time-warp off"):
        session.attach(settings, make_model(vocab_size=25))
    settings["kd_time_warp"] = "off"
    session.attach(settings, make_model(vocab_size=25))


def test_a_data_module_that_is_not_plugged_is_refused(
    make_model, online, cuts, bpe_models
):
    model = calm(make_model(vocab_size=25))
    session.attach(online(kd_teacher_clean=True), model)
    dataset = augmented()
    dataset.return_cuts = True
    batch = dataset[cuts]
    lens = batch["supervisions"]["num_frames"]
    loss = model(x=batch["inputs"], x_lens=lens, y=[[3], [4], [5]], prune_range=3)[1]
    words = "no kd_clean_inputs, which --kd-teacher-clean needs: .* wrap_dataset"
    with pytest.raises(KDError, match=words):
        session.joint_loss(loss.sum(), MetricsTracker(), model, batch)


@pytest.mark.parametrize("clean", [False, True])
def test_a_cache_holds_clean_targets_in_any_case(
    make_model, online, cuts, stored, step, tmp_path, monkeypatch, clean
):
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    settings = online(
        kd_teacher_clean=clean, kd_teacher_cache_dir=str(tmp_path / "cache")
    )
    still = TargetDataset(K2SpeechRecognitionDataset())[stored]["kd_targets"]
    for seed in (1, 2):
        model = calm(make_model(vocab_size=25))
        batch, targets, _, _ = step(model, settings, cuts, seed)
        assert CLEAN not in batch and WARPS not in batch
        torch.testing.assert_close(
            targets.parts["ctc"][still.mask],
            still.parts["ctc"][still.mask],
            rtol=2e-3,
            atol=2e-3,
        )
        session.detach()


def test_with_cr_ctc_the_batch_is_clean_and_the_models_warp_is_off(
    make_model, online, cuts
):
    """Its SpecAugment is in the model: the dataset has none."""
    settings = online(kd_teacher_clean=True, use_cr_ctc=True, enable_spec_aug=False)
    session.attach(settings, make_model(vocab_size=25))
    assert settings["spec_aug_time_warp_factor"] == 0
    batch = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)[cuts]
    assert torch.equal(batch[CLEAN], batch["inputs"]) and WARPS not in batch


def test_a_record_of_warps_stays_what_it_was(stored):
    """WarpRecord.move and what travels in a batch are one."""
    dataset = augmented()
    record = WarpRecord(dataset.input_transforms[0])
    dataset.input_transforms = [record]
    fix_random_seed(3)
    batch = CleanFeatures(dataset, record)[stored]
    assert batch[WARPS] is record.warps and len(record.warps) == 3

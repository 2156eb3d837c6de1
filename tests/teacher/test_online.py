"""Teachers in the training process: what they say, store, and leave untouched."""

import random

import pytest
import torch
from lhotse import load_manifest
from lhotse.dataset.collation import collate_features

from icefall_kd import LogitWriter, TeacherHook
from icefall_kd.errors import KDError
from icefall_kd.targets.dataset import collate_targets
from icefall_kd.teacher import CachingTeacher, OnlineTeacher


def test_one_teacher_says_what_its_hook_reads(make_model, features):
    model = make_model(seed=1)
    with TeacherHook(model) as hook:
        out = hook.encode(*features)
    targets = OnlineTeacher([model]).targets(*features)
    torch.testing.assert_close(targets.ctc, out.ctc_logits.log_softmax(-1))
    assert targets.lens.tolist() == out.encoder_out_lens.tolist()
    assert targets.whole.all() and not targets.ctc.requires_grad


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_several_teachers_are_averaged_as_probabilities(make_model, features, weights):
    models = [make_model(seed=1), make_model(seed=2)]
    each = [OnlineTeacher([m]).targets(*features).ctc.exp() for m in models]
    w = torch.tensor(weights or [1.0, 1.0])
    expected = (w[0] * each[0] + w[1] * each[1]) / w.sum()
    found = OnlineTeacher(models, weights).targets(*features).ctc.exp()
    torch.testing.assert_close(found, expected)


def test_a_teacher_is_chosen_for_each_cut(make_model, features, make_cut):
    models = [make_model(seed=1), make_model(seed=2)]
    each = [OnlineTeacher([m]).targets(*features).ctc for m in models]
    cuts = [make_cut(name, 33) for name in ("a", "b", "c")]
    teacher = OnlineTeacher(models, choose=lambda cut: int(cut.id == "b"))
    found = teacher.targets(*features, cuts).ctc
    for row, which in enumerate((0, 1, 0)):
        expected = each[which][row]  # normalised once less
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)


def test_random_states_and_the_teachers_parameters_are_left_alone(make_model, features):
    model = make_model().train()
    teacher = OnlineTeacher([model])
    random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), torch.rand(2)
    random.seed(3)
    torch.manual_seed(3)
    teacher.targets(*features)
    assert random.random() == expected[0] and torch.equal(torch.rand(2), expected[1])
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "n, options, match",
    [
        (0, {}, "no teacher"),
        (2, {"weights": [1.0]}, "for 2 teachers"),
        (1, {"weights": [0.0]}, "above 0"),
        (1, {"weights": [1.0], "choose": len}, "both given"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(make_model, n, options, match):
    with pytest.raises(KDError, match=match):
        OnlineTeacher([make_model() for _ in range(n)], **options)


def test_teachers_of_different_vocabularies_are_refused(make_model, features):
    teacher = OnlineTeacher([make_model(), make_model(vocab_size=13)])
    with pytest.raises(KDError, match=r"\[11, 13\] symbols"):
        teacher.targets(*features)


@pytest.mark.parametrize("choose", [lambda cut: 5, lambda cut: -1])
def test_a_choice_of_no_teacher_is_refused(make_model, features, make_cut, choose):
    cuts = [make_cut(name, 33) for name in "abc"]
    with pytest.raises(KDError, match="chosen for cut a is .*give 0 to 0"):
        OnlineTeacher([make_model()], choose=choose).targets(*features, cuts)


# With a cache


class Counting(OnlineTeacher):
    heard = 0

    def targets(self, x, x_lens, cuts=None):
        self.heard += len(x)
        return super().targets(x, x_lens, cuts)


@pytest.fixture
def cuts(make_cut):
    return [make_cut(f"c{n}", n) for n in (61, 33, 90)]


@pytest.fixture
def opened(tmp_path, make_fingerprint):
    return lambda: LogitWriter(
        tmp_path / "kd.jsonl.gz", tmp_path / "kd", make_fingerprint()
    )


CPU = torch.device("cpu")


def test_each_cut_is_asked_once_and_read_from_then_on(make_model, cuts, opened):
    teacher = Counting([make_model()])
    cache = CachingTeacher(teacher, opened())
    first = cache.targets(cuts[:2], CPU)
    assert teacher.heard == 2
    again = cache.targets(cuts, CPU)
    assert teacher.heard == 3
    assert torch.equal(again.ctc[0, : first.lens[0]], first.ctc[0, : first.lens[0]])
    x, x_lens = collate_features(_cut_set(cuts))
    online = teacher.targets(x, x_lens)
    assert again.lens.tolist() == online.lens.tolist()
    for row, n in enumerate(again.lens.tolist()):
        torch.testing.assert_close(
            again.ctc[row, :n], online.ctc[row, :n], rtol=2e-3, atol=2e-3
        )


def test_a_cache_goes_on_where_an_earlier_training_stopped(make_model, cuts, opened):
    teacher = Counting([make_model()])
    with_cache = CachingTeacher(teacher, opened())
    expected = with_cache.targets(cuts, CPU)
    with_cache.writer.close()
    resumed = CachingTeacher(teacher, opened())
    found = resumed.targets(cuts, CPU)
    assert teacher.heard == 3
    assert torch.equal(found.ctc, expected.ctc)


def test_a_finished_cache_is_a_store_like_any_other(make_model, cuts, opened, tmp_path):
    cache = CachingTeacher(OnlineTeacher([make_model()]), opened())
    expected = cache.targets(cuts, CPU)
    cache.writer.finish()
    stored = load_manifest(tmp_path / "kd.jsonl.gz")
    found = collate_targets([stored[c.id] for c in cuts])
    assert torch.equal(found.ctc, expected.ctc)


def test_noise_is_not_heard(make_model, cuts, opened, make_cut):
    noise = make_cut("noise", 150)
    noise.supervisions = []
    mixed = [c.mix(noise, snr=10, preserve_id="left") for c in cuts]
    plain = CachingTeacher(OnlineTeacher([make_model()]), opened())
    expected = plain.targets(cuts, CPU)
    found = plain.targets(mixed, CPU)
    assert torch.equal(found.ctc, expected.ctc)


def test_a_cut_of_two_speakers_is_refused(make_model, cuts, opened):
    cache = CachingTeacher(OnlineTeacher([make_model()]), opened())
    with pytest.raises(KDError, match="made of 2 cuts with speech"):
        cache.targets([cuts[0].append(cuts[1])], CPU)


def test_a_cut_without_features_is_refused(make_model, cuts, opened):
    cache = CachingTeacher(OnlineTeacher([make_model()]), opened())
    with pytest.raises(KDError, match="c61 has no stored features"):
        cache.targets([cuts[0].drop_features()], CPU)


def _cut_set(cuts):
    from lhotse import CutSet

    return CutSet.from_cuts(cuts)

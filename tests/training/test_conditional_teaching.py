"""--kd-condition in a session: stored and online teachers, students of either head."""

import logging

import pytest
import torch
import torch.nn.functional as F
from calm_model import calm
from lhotse import CutSet
from lhotse.dataset import K2SpeechRecognitionDataset
from zipformer.utils import MetricsTracker

from icefall_kd.errors import KDError
from icefall_kd.targets import TargetWriter
from icefall_kd.targets.reading import collate_targets
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.training import session
from icefall_kd.training.online import online_teacher

TEXTS = {"c1": "zero one", "c2": "two", "c3": "six"}
LENGTHS = {"c1": 121, "c2": 97, "c3": 73}
HEARD = {**TEXTS, "c2": "two two"}  # by a teacher that is wrong once
ALONE = {"use_transducer": False, "use_ctc": True}


@pytest.fixture
def stored(cuts, make_fingerprint, encoder_frames, tmp_path, sp):
    """The cuts with the targets of a teacher that hears ``HEARD``."""

    def make(ctc="dense"):
        fingerprint = make_fingerprint(ctc=ctc, vocab_size=25)
        manifest = tmp_path / "kd.jsonl.gz"
        with TargetWriter(manifest, tmp_path / "kd", fingerprint) as writer:
            for cut in cuts:
                path = [0] * encoder_frames(cut.num_frames)
                labels = sp.encode(HEARD[cut.id])
                path[1 : 1 + 2 * len(labels) : 2] = labels
                writer.write(cut, 8.0 * F.one_hot(torch.tensor(path), 25))
        return CutSet.from_file(manifest).to_eager()

    return make


@pytest.fixture
def params(make_params, bpe_models):
    return lambda **changes: make_params(
        **{
            "ctc": 1.0,
            "temperature": 1.0,
            "vocab_size": 25,
            "bpe_model": str(bpe_models.a),
            **changes,
        }
    )


@pytest.fixture
def step(sp):
    """One batch of a session: what is logged, on the scale of the log."""

    def run(model, params, cuts, double=False):
        session.attach(params, model)
        batch = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)[cuts]
        supervisions, info = batch["supervisions"], MetricsTracker()
        x, lens = batch["inputs"], supervisions["num_frames"]
        y = sp.encode(supervisions["text"], out_type=int)
        if double:  # as CR-CTC does
            x, lens, y = torch.cat([x, x]), torch.cat([lens, lens]), y + y
        losses = model(x=x, x_lens=lens, y=y, prune_range=3)
        recipe = sum(loss.sum() for loss in losses if loss is not None)
        loss = session.joint_loss(recipe, info, model, batch)
        assert loss.isfinite()
        loss.backward()
        frames = float((supervisions["num_frames"] // 4).sum())
        return {name: value / frames for name, value in info.items()}

    return run


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("head", ["both", "CTC alone"])
@pytest.mark.parametrize("form", ["dense", "adaptive:.999:8"])
def test_the_rows_whose_teacher_is_right_teach(
    make_model, params, stored, step, head, form, double
):
    model = calm(make_model(vocab_size=25, **(ALONE if head != "both" else {})))
    cuts = stored(form)
    found = step(model, params(kd_condition="right"), cuts, double)
    assert found["kd_taught"] == pytest.approx(2 / 3)
    everything = step(model, params(), cuts, double)
    assert "kd_taught" not in everything
    assert found["kd_frames"] < everything["kd_frames"]


@pytest.mark.parametrize("head", ["both", "CTC alone"])
def test_a_teacher_that_is_sure_is_better_than_a_student_that_begins(
    make_model, params, stored, step, head
):
    model = calm(make_model(vocab_size=25, **(ALONE if head != "both" else {})))
    found = step(model, params(kd_condition="better"), stored())
    assert found["kd_taught"] >= 2 / 3 - 1e-6


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("condition", ["right", "better"])
def test_stored_and_online_targets_choose_the_same_rows(
    make_model,
    online,
    params,
    cuts,
    make_fingerprint,
    step,
    tmp_path,
    condition,
    double,
    bpe_models,
):
    settings = {"kd_condition": condition, "bpe_model": str(bpe_models.a)}
    settings = online(ctc=1.0, temperature=1.0, **settings)
    teacher, _ = online_teacher(settings)
    assert isinstance(teacher, Teacher)
    fingerprint = make_fingerprint(vocab_size=25)
    manifest = tmp_path / "online.jsonl.gz"
    with TargetWriter(manifest, tmp_path / "online", fingerprint) as writer:
        for cut in cuts:
            x = torch.from_numpy(cut.load_features())[None]
            out = teacher.targets(x, torch.tensor([x.size(1)]))
            writer.write(cut, out.parts["ctc"][0])
    with_targets = CutSet.from_file(manifest).to_eager()
    shares = []
    for seed in (0, 2, 3, 4):  # 1 is the teacher itself
        model = calm(make_model(seed=seed, vocab_size=25))
        asked = step(model, settings, cuts, double)
        read = step(model, params(kd_condition=condition), with_targets, double)
        assert asked["kd_taught"] == pytest.approx(read["kd_taught"])
        assert asked["kd_ctc_loss"] == pytest.approx(read["kd_ctc_loss"], rel=1e-3)
        shares.append(asked["kd_taught"])
    assert condition == "right" or 0 < sum(shares) < len(shares)


def test_cuts_without_a_transcript_always_teach(make_model, params, stored, step):
    cuts = CutSet.from_cuts(
        cut.map_supervisions(lambda s: s.transform_text(lambda _: ""))
        for cut in stored()
    )
    found = step(calm(make_model(vocab_size=25)), params(kd_condition="right"), cuts)
    assert found["kd_taught"] == pytest.approx(1.0)


def test_cuts_without_targets_teach_nobody(make_model, params, stored, step, cuts):
    with_targets = stored()
    mixture = CutSet.from_cuts([cuts["c1"], with_targets["c2"], with_targets["c3"]])
    settings = params(kd_condition="right", kd_missing="hard")
    found = step(calm(make_model(vocab_size=25)), settings, mixture)
    assert found["kd_taught"] == pytest.approx(1 / 3)  # c3


def test_a_part_of_a_cut_is_not_its_transcript(make_model, params, stored, step):
    cuts = stored()
    part = cuts["c1"].truncate(duration=0.35)
    part.supervisions = [s.trim(0.35) for s in part.supervisions]
    mixture = CutSet.from_cuts([part, cuts["c3"]])
    model = calm(make_model(vocab_size=25))
    found = step(model, params(kd_condition="right"), mixture)
    assert found["kd_taught"] == pytest.approx(1 / 2)
    targets = collate_targets([part])
    assert targets.mask.any() and not targets.whole.any()


def test_validation_has_no_condition(make_model, params, stored, caplog):
    cuts, model = stored(), calm(make_model(vocab_size=25))
    with caplog.at_level(logging.INFO):
        session.attach(params(kd_condition="right"), model)
    assert "of utterances where the teacher is right" in caplog.text
    batch = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)[cuts]
    info, y = MetricsTracker(), [[3, 4], [5], [6]]
    with torch.no_grad():
        lens = batch["supervisions"]["num_frames"]
        losses = model(x=batch["inputs"], x_lens=lens, y=y, prune_range=3)
        session.joint_loss(losses[1].sum(), info, model, batch)
    assert "kd_taught" not in info and "kd_ctc_blank_share" not in info


@pytest.mark.parametrize(
    "changes, model, words",
    [
        ({"kd_condition": "wrong"}, {}, "--kd-condition is 'wrong': give one of none"),
        (
            {
                "kd_condition": "better",
                "ctc": 0.0,
                "kd_hidden_weight": 1.0,
                "kd_hidden_layers": "out",
            },
            {"use_ctc": False},
            "--kd-condition is better and the student has no CTC head",
        ),
        (
            {"kd_condition": "right", "ctc": 0.0, "kd_nbest_weight": 1.0},
            {},
            "--kd-condition is right and no term reads .* --kd-ctc-weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_option(
    make_model, params, changes, model, words
):
    with pytest.raises(KDError, match=words) as e:
        session.attach(params(**changes), make_model(vocab_size=25, **model))
    assert "\n" not in str(e.value) and "`" not in str(e.value)


def test_a_cache_of_draws_is_refused(make_model, online, tmp_path):
    settings = online(
        kd_condition="right",
        kd_teacher_cache_dir=str(tmp_path / "kd"),
        kd_teacher_keep="sampled:12",
    )
    words = "--kd-condition is right .* kept as sampled:12, random draws"
    with pytest.raises(KDError, match=words):
        session.attach(settings, make_model(vocab_size=25))


def test_a_store_without_ctc_targets_is_refused(make_model, params, with_lattices):
    cuts = with_lattices("dense")
    settings = params(ctc=0.0, kd_rnnt_weight=1.0, kd_condition="right", vocab_size=11)
    settings["bpe_model"] = ""
    session.attach(settings, make_model())
    words = "--kd-condition is right .* keeps no CTC targets.* --keep dense"
    with pytest.raises(KDError, match=words):
        session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)

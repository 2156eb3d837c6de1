"""Each term in a session: from stores, online teachers and lists on the cuts."""

import atexit
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
from calm_model import calm
from lhotse import CutSet
from lhotse.dataset import K2SpeechRecognitionDataset
from zipformer.utils import MetricsTracker

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import hash_file, hidden_rows, save_quantizer
from icefall_kd.kinds.nbest import write_nbest
from icefall_kd.losses.frames import ctc_diagnostics
from icefall_kd.losses.sequence import nbest_ctc_loss, nbest_transducer_loss
from icefall_kd.tap import ModelTap
from icefall_kd.targets import TargetWriter
from icefall_kd.targets.stand_in import StandInTranscripts, stand_in
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.tokens import load_tokenizer
from icefall_kd.training import session
from icefall_kd.types import EncoderOut

WIDE = {"encoder_dim": "20,32", "encoder_unmasked_dim": "12,16"}  # a teacher's
TEXTS = {"c1": "zero one", "c2": "two", "c3": "six z"}
LENGTHS = {"c1": 61, "c2": 47, "c3": 33}
FRAMES = 14 + 10 + 7
TERMS = ("ctc", "rnnt", "full_sum", "hidden", "nbest")
ALL = {f"kd_{name}_weight": 0.5 for name in TERMS[1:]}


@pytest.fixture
def student(make_model):
    return lambda **changes: calm(make_model(vocab_size=25, **changes))


@pytest.fixture
def params(make_params, bpe_models):
    """Of a student of 25 symbols, all weights 0 unless told."""

    def make(**changes):
        settings = {"ctc": 0.0, "vocab_size": 25, "bpe_model": str(bpe_models.a)}
        return make_params(**{**settings, **changes})

    return make


@pytest.fixture
def online(online, bpe_models):
    return lambda **changes: online(**{"bpe_model": str(bpe_models.a), **changes})


@pytest.fixture
def store(make_model, make_fingerprint, cuts, tmp_path, sp):
    """Store what a wider teacher says of the cuts; return these."""

    def make(cuts=cuts, quantizers=(), **kept):
        kept = {"ctc": "dense", "vocab_size": 25, **kept}
        if kept.get("lattice"):
            kept["s_range"] = 4
        fingerprint = make_fingerprint(**kept)
        folder = tmp_path / "kd"
        for layer, path in quantizers:
            folder.mkdir(exist_ok=True)
            (folder / f"quantizer.{layer}.pt").write_bytes(path.read_bytes())
        manifest = tmp_path / "kd.jsonl.gz"
        teacher = make_model(seed=7, vocab_size=25, **WIDE)
        with (
            TargetWriter(manifest, folder, fingerprint) as writer,
            ModelTap(teacher, layers=[0, 1]) as hook,
        ):
            for cut in cuts:
                x = torch.from_numpy(cut.load_features())[None]
                out = hook.encode(x, torch.tensor([x.size(1)]))
                lattice = None
                if fingerprint.lattice:
                    y = sp.encode(cut.supervisions[0].text)
                    lattice = hook.lattice(out, [y], 4)
                hidden = {i: hidden_rows(out, i)[0] for i in ("out", 0, 1)}
                writer.write(cut, out.ctc_logits[0], lattice=lattice, hidden=hidden)
        return CutSet.from_file(manifest).to_eager()

    return make


@pytest.fixture
def step(sp):
    """One step of a recipe's compute_loss."""

    def run(model, batch):
        supervisions, info = batch["supervisions"], MetricsTracker()
        losses = model(
            x=batch["inputs"],
            x_lens=supervisions["num_frames"],
            y=sp.encode(supervisions["text"], out_type=int),
            prune_range=3,
        )
        recipe = sum(w * x.sum() for w, x in zip((0.5, 1.0, 0.2), losses))
        loss = session.joint_loss(recipe, info, model, batch)
        return SimpleNamespace(loss=loss, info=dict(info), recipe=float(recipe))

    return run


def wrap(cuts):
    return session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)


@pytest.fixture
def train(step):
    """Attach, and train on one batch: what was logged of each step."""

    def run(model, params, cuts, steps=1):
        random.seed(0)
        torch.manual_seed(0)
        session.attach(params, model)
        batch = wrap(cuts)[cuts]
        optimizer = torch.optim.Adam(getattr(model, "module", model).parameters(), 3e-3)
        found = []
        for _ in range(steps):
            done = step(model, batch)
            optimizer.zero_grad()
            done.loss.backward()
            optimizer.step()
            found.append(done.info)
        return found

    return run


def part_of(cut, duration):
    """The beginning of a cut; lhotse wants its supervision to end there too."""
    cut = cut.truncate(duration=duration)
    cut.supervisions = [s.trim(duration) for s in cut.supervisions]
    return cut


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def one_sentence(e):
    assert "\n" not in str(e.value)
    return str(e.value)


# All terms at once


def test_all_terms_are_learned_from_one_store(student, params, store, step, cuts, sp):
    cuts = store(lattice="dense", hidden="out:half,0:half")
    cuts = CutSet.from_cuts(write_nbest(c, [(TEXTS[c.id], -0.5)]) for c in cuts)
    model = student()
    weights = dict(zip(TERMS, (0.7, 0.3, 0.2, 0.6, 0.4)))
    kd = {f"kd_{name}_weight": w for name, w in weights.items()}
    session.attach(params(**kd, kd_hidden_layers="out,0:1"), model)
    batch = wrap(cuts)[cuts]
    done = step(model, batch)
    assert set(done.info) == {
        *(f"kd_{name}_loss" for name in TERMS),
        *("kd_frames", "kd_rnnt_frames", "kd_full_sum_frames", "kd_hidden_frames"),
        "kd_nbest_frames",
    }
    assert all(v > 0.05 for v in done.info.values())
    assert all(v == FRAMES for k, v in done.info.items() if "frames" in k)
    expected = 0.3 * done.recipe
    expected += sum(w * done.info[f"kd_{n}_loss"] for n, w in weights.items())
    assert float(done.loss) == pytest.approx(expected, rel=1e-5)
    grads = gradients(model, done.loss)
    for part in ("encoder_embed", "encoder", "decoder", "joiner", "ctc_output"):
        assert any(g.abs().max() > 0 for n, g in grads.items() if n.startswith(part))


def test_an_online_teacher_gives_all_terms(student, online, cuts, step, sp):
    cuts = CutSet.from_cuts(write_nbest(c, [(TEXTS[c.id], 0.0)]) for c in cuts)
    model = student()
    session.attach(online(**ALL, kd_hidden_layers="out,0:1"), model)
    done = step(model, wrap(cuts)[cuts])
    assert len(done.info) == 10 and all(v > 0.05 for v in done.info.values())
    gradients(model, done.loss)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_equals_its_online_teacher_has_zero_terms(
    online, cuts, step, teacher_exp, make_model, temperature
):
    """One utterance, so that no padding comes in between."""
    cuts = CutSet.from_cuts([cuts["c1"]])
    model = make_model(vocab_size=25)
    model.load_state_dict(teacher_exp.models["epoch-2"].state_dict())
    calm(model).requires_grad_(True)
    changes = {**ALL, "kd_nbest_weight": 0.0, "kd_hidden_layers": "out,1"}
    changes |= {"hard": 0.0, "temperature": temperature}
    session.attach(online(**changes), model)
    done = step(model, wrap(cuts)[cuts])
    for name in TERMS[:-1]:
        assert abs(done.info[f"kd_{name}_loss"]) < 1e-4, name
    grads = gradients(model, done.loss)
    assert max(float(g.abs().max()) for g in grads.values()) < 2e-3
    # The same, a little moved, has terms and gradients.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    done = step(model, wrap(cuts)[cuts])
    for name in TERMS[:-1]:
        assert done.info[f"kd_{name}_loss"] > 1e-3, name
    grads = gradients(model, done.loss)
    assert max(float(g.abs().max()) for g in grads.values()) > 0.1


def test_every_batch_of_a_session_has_the_same_keys(
    student, params, store, step, make_cut
):
    """icefall adds them up over processes; see MetricsTracker.reduce."""
    some = store(lattice="collapsed", hidden="out:half")
    cuts = [*some, make_cut("b1", 47), make_cut("b2", 33), make_cut("b3", 61, text="")]
    cuts[0] = write_nbest(cuts[0], [("one", -1.0)])
    cuts[-1] = write_nbest(cuts[-1], [("one", -1.0)])
    model = student()
    settings = {"ctc": "0:1,1:0.5", "temperature": 1.0, "kd_hidden_layers": "out"}
    settings |= {"kd_missing": "hard", "kd_schedule": "warmup", "num_epochs": 10}
    given = params(**ALL, **settings)
    session.attach(given, model)
    dataset, found = wrap(CutSet.from_cuts(cuts)), []
    shorter = part_of(cuts[0], 0.4)
    for epoch in (1, 2, 9):
        given.cur_epoch = epoch
        for rows in (cuts[:3], cuts[3:5], cuts[5:], [shorter], [cuts[1], cuts[3]]):
            done = step(model, dataset[CutSet.from_cuts(rows)])
            done.loss.backward()
            found.append(done.info)
    assert all(list(info) == list(found[0]) for info in found) and len(found[0]) == 20
    first, bare, untranscribed, part, _ = found[-5:]
    assert all(first[f"kd_{name}_loss"] > 0.01 for name in TERMS)
    assert all(v == 0 for k, v in bare.items() if k.endswith("_loss"))
    assert untranscribed["kd_hard_frames"] == 0 and untranscribed["kd_nbest_loss"] > 0
    assert bare["kd_hard_frames"] == 11 + 8
    assert part["kd_hidden_loss"] > 0 and part["kd_rnnt_loss"] == 0  # not whole
    assert all(v == 0 for k, v in found[0].items() if k.endswith("_loss"))  # warm-up


# Hidden layers


def projectors():
    return session.current().distillation.joint.projectors.modules


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_stored_hidden_layers_are_learned_through_projectors(
    student, params, store, train, kind
):
    cuts, model = store(ctc="", hidden="out:half,0:half"), student()
    names = list(model.state_dict())
    settings = {"hard": 0.0, "kd_hidden_weight": 0.2, "kd_hidden_layers": "out,0:1"}
    settings |= {"kd_hidden_distance": kind, "kd_hidden_projector_lr": 3e-2}
    found = train(model, params(**settings), cuts, steps=12)
    assert set(found[0]) == {"kd_hidden_loss", "kd_hidden_frames"}
    assert found[0]["kd_hidden_frames"] == FRAMES
    losses = [info["kd_hidden_loss"] for info in found]
    assert losses[-1] < 0.75 * losses[0]
    shapes = {n: tuple(p.shape) for n, p in projectors().named_parameters()}
    assert shapes == {
        "out-out.weight": (32, 24),
        "out-out.bias": (32,),
        "0-1.weight": (20, 24),
        "0-1.bias": (20,),
    }
    assert all(
        not torch.equal(p, torch.eye(*p.shape)) if p.ndim == 2 else p.abs().max() > 0
        for p in projectors().parameters()
    )
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("rate, moved", [(1e-3, True), (0.0, False)])
def test_the_projectors_rate_is_its_own(student, params, store, train, rate, moved):
    cuts, model = store(ctc="", hidden="out:half"), student()
    settings = {"kd_hidden_weight": 0.2, "kd_hidden_layers": "out"}
    train(model, params(**settings, kd_hidden_projector_lr=rate), cuts, steps=3)
    (weight, _) = projectors().parameters()
    assert torch.equal(weight, torch.eye(32, 24)) != moved


def test_stored_codes_are_learned(student, params, store, train, tmp_path):
    package = pytest.importorskip("multi_quantization")
    torch.manual_seed(3)
    save_quantizer(package.Quantizer(32, 256, 4).eval(), tmp_path / "q.pt")
    form = f"out:mvq:4:{hash_file(tmp_path / 'q.pt')}"
    cuts = store(ctc="", hidden=form, quantizers=[("out", tmp_path / "q.pt")])
    model = student()
    names = list(model.state_dict())
    settings = {"hard": 0.0, "kd_hidden_weight": 0.2, "kd_hidden_layers": "out"}
    found = train(
        model, params(**settings, kd_hidden_projector_lr=3e-2), cuts, steps=12
    )
    losses = [info["kd_hidden_loss"] for info in found]
    assert losses[0] / FRAMES > 2 and losses[-1] < 0.6 * losses[0]
    assert list(model.state_dict()) == names


def test_an_online_teachers_hidden_layers_are_learned(student, online, cuts, train, sp):
    model = student(encoder_dim="12,20", encoder_unmasked_dim="8,12")
    settings = {"ctc": 0.0, "hard": 0.0, "kd_hidden_weight": 0.2}
    settings |= {"kd_hidden_layers": "out,0:1", "kd_hidden_projector_lr": 3e-2}
    given = online(**settings)
    found = train(model, given, cuts, steps=12)
    losses = [info["kd_hidden_loss"] for info in found]
    assert losses[-1] < 0.75 * losses[0]
    assert sorted(projectors()) == ["0-1", "out-out"]


def test_no_projector_is_in_ddps_state(student, params, store, train, process_group):
    cuts, model = store(ctc="", hidden="out:half"), student()
    names = list(model.state_dict())
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    ddp.training = True
    settings = {"kd_hidden_weight": 0.2, "kd_hidden_layers": "out"}
    train(ddp, params(**settings), cuts, steps=3)
    assert len(list(projectors().parameters())) == 2
    assert list(ddp.state_dict()) == [f"module.{name}" for name in names]
    assert list(model.state_dict()) == names
    (weight, _) = projectors().parameters()
    assert not torch.equal(weight, torch.eye(32, 24))


@pytest.mark.parametrize(
    "kept, layers, words",
    [
        ({}, "out", "keeps no hidden layers, .*: dump with --keep-hidden out:half"),
        (
            {"hidden": "out:half"},
            "1",
            "keeps the layers out:half and not 1, .*--keep-hidden 1:half",
        ),
        (
            {"hidden": "0:half,1:half"},
            "1,out",
            "keeps the layers 0:half,1:half and not out",
        ),
    ],
)
def test_a_store_without_the_layer_is_refused_before_training(
    student, params, store, kept, layers, words
):
    cuts = store(**kept)
    session.attach(params(kd_hidden_weight=1.0, kd_hidden_layers=layers), student())
    with pytest.raises(KDError, match=words) as e:
        wrap(cuts)
    one_sentence(e)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kd_hidden_weight": 1.0}, "--kd-hidden-layers, such as out:out"),
        ({"kd_hidden_weight": 1.0, "kd_hidden_layers": "out:5"}, "50"),
        ({"kd_hidden_weight": 1.0, "kd_hidden_layers": "1:5"}, "the hidden layer is"),
        (
            {
                "kd_hidden_weight": 1.0,
                "kd_hidden_layers": "1",
                "kd_hidden_distance": "l1",
            },
            "--kd-hidden-distance",
        ),
    ],
)
def test_layers_that_cannot_be_are_refused_at_once(student, params, changes, words):
    with pytest.raises(KDError, match=words) as e:
        session.attach(params(**changes), student())
    one_sentence(e)


# Heads that the student lacks


@pytest.mark.parametrize(
    "lacks, options, gone, stays",
    [
        ("ctc", {}, {"ctc": "CTC head"}, {"rnnt", "full_sum", "hidden"}),
        (
            "transducer",
            {},
            {"rnnt": "transducer", "full_sum": "transducer"},
            {"ctc", "hidden"},
        ),
        (
            "ctc",
            {"kd_rnnt_form": "total"},
            {"ctc": "CTC head", "rnnt": "CTC head"},
            {"full_sum", "hidden"},
        ),
    ],
)
def test_terms_of_heads_that_lack_go_and_the_others_go_on(
    student, params, store, step, caplog, lacks, options, gone, stays
):
    model = student(**{f"use_{lacks}": False})
    weights = {**ALL, "kd_nbest_weight": 0.0, "ctc": 0.5}
    with caplog.at_level("WARNING"):
        session.attach(params(**weights, **options, kd_hidden_layers="out"), model)
    found = {r.message for r in caplog.records}
    assert found == {
        f"The term kd_{name}_loss is off: the student has no {head} "
        f"(--use-{'ctc' if head == 'CTC head' else 'transducer'} 1)"
        for name, head in gone.items()
    }
    kept = {"hidden": "out:half", "lattice": "dense"}
    cuts = store(**({**kept, "ctc": ""} if lacks == "ctc" else kept))
    done = step(model, wrap(cuts)[cuts])
    assert {k for k in done.info if k.endswith("_loss")} == {
        f"kd_{name}_loss" for name in stays
    }
    assert all(v > 0 for v in done.info.values())
    done.loss.backward()


@pytest.mark.parametrize(
    "lacks, changes, words",
    [
        ("ctc", {"ctc": 1.0}, "--kd-ctc-weight .* no CTC head .--use-ctc 1"),
        (
            "transducer",
            {"kd_rnnt_weight": 1.0},
            "--kd-rnnt-weight .*--use-transducer 1",
        ),
        (
            "transducer",
            {"kd_rnnt_weight": 1.0, "kd_full_sum_weight": 1.0},
            "--kd-full-sum-weight .* no transducer",
        ),
        (
            "ctc",
            {"kd_rnnt_weight": 1.0, "kd_rnnt_form": "total"},
            "--kd-rnnt-weight .* no CTC head .--use-ctc 1",
        ),
    ],
)
def test_where_no_term_is_left_the_student_is_refused(
    student, params, lacks, changes, words
):
    model = student(**{f"use_{lacks}": False})
    with pytest.raises(KDError, match=words) as e:
        session.attach(params(**changes), model)
    one_sentence(e)
    assert not any(m._forward_hooks for m in model.modules())


# N-best lists


HYPOTHESES = {
    "c1": [("zero one", -0.2), ("zero nine", -1.7)],
    "c2": [],
    "c3": [("six z", -0.1), ("", -3.0)],
}


def with_lists(cuts):
    return CutSet.from_cuts(write_nbest(cut, HYPOTHESES[cut.id]) for cut in cuts)


def lists_of(sp, cuts=("c1", "c2", "c3")):
    return [[(sp.encode(text), s) for text, s in HYPOTHESES[name]] for name in cuts]


@pytest.fixture
def seen():
    """What the session took of the student's last forward pass."""
    found = []

    def watch():
        tap = session.current().distillation.tap
        take = tap.take
        tap.take = lambda: found.append(take()) or found[-1]
        return found

    return watch


@pytest.mark.parametrize("lacks", [None, "ctc", "transducer"])
def test_nbest_lists_need_no_store_and_teach_both_heads(
    student, params, cuts, step, sp, seen, lacks
):
    model = student(**({f"use_{lacks}": False} if lacks else {}))
    session.attach(params(kd_nbest_weight=0.5), model)
    found = seen()
    cuts = with_lists(cuts)
    done = step(model, wrap(cuts)[cuts])
    out, expected = found[0], 0.0
    if lacks != "ctc":
        expected += nbest_ctc_loss(out.ctc_logits, lists_of(sp), out.encoder_out_lens)
    if lacks != "transducer":
        expected += nbest_transducer_loss(
            model, out.encoder_out, lists_of(sp), out.encoder_out_lens
        )
    assert done.info == {
        "kd_nbest_loss": pytest.approx(float(expected), rel=1e-5),
        "kd_nbest_frames": 14 + 7,
    }
    assert expected > 1
    assert float(done.loss) == pytest.approx(
        0.3 * done.recipe + 0.5 * float(expected), rel=1e-5
    )


def test_lists_go_with_their_cuts_whatever_the_order(
    student, params, cuts, step, sp, seen
):
    """The dataset sorts by duration; and parts of a cut have no list."""
    cuts = list(with_lists(cuts))
    cuts = [cuts[2], part_of(cuts[0], 0.3), cuts[0].pad(duration=0.7)]
    session.attach(params(kd_nbest_weight=0.5), student())
    batch = wrap(CutSet.from_cuts(cuts))[CutSet.from_cuts(cuts)]
    first, second, third = session.current().distillation.nbest_lists(batch)
    (one, _, three) = lists_of(sp)
    assert (first, second, third) == (one, three, [])  # by duration


def test_lists_and_targets_are_learned_together(student, params, store, cuts, step):
    cuts, model = with_lists(store()), student()
    session.attach(params(ctc=0.7, kd_nbest_weight=0.5), model)
    done = step(model, wrap(cuts)[cuts])
    assert done.info["kd_ctc_loss"] > 1 and done.info["kd_nbest_loss"] > 1
    assert (done.info["kd_frames"], done.info["kd_nbest_frames"]) == (FRAMES, 21)


def test_a_curve_that_stays_at_0_asks_for_no_store(student, params, cuts, step):
    session.attach(params(ctc="0:0,5:0", kd_nbest_weight=0.5), student())
    assert "kd_targets" not in wrap(cuts)[cuts]


def test_an_online_teacher_that_no_term_asks_is_not_loaded(
    student, online, cuts, step, sp, tmp_path
):
    given = online(ctc=0.0, kd_nbest_weight=0.5, kd_teacher_exp_dir=str(tmp_path))
    model = student()
    session.attach(given, model)
    cuts = with_lists(cuts)
    assert step(model, wrap(cuts)[cuts]).info["kd_nbest_loss"] > 1


def test_lists_need_a_bpe_model(student, params, cuts, step):
    cuts, model = with_lists(cuts), student()
    session.attach(params(kd_nbest_weight=0.5, bpe_model=None), model)
    with pytest.raises(KDError, match="--bpe-model"):
        step(model, wrap(cuts)[cuts])


# What is logged


def test_moving_weights_are_logged_times_frames(student, params, store, step):
    cuts, model = store(), student()
    settings = {"ctc": "0:1,2:0", "hard": "0:0.5,1:1", "num_epochs": 4}
    given = params(**settings)
    session.attach(given, model)
    batch = wrap(cuts)[cuts]
    frames = 15 + 11 + 8  # as icefall counts them
    for epoch, ctc, hard in ((1, 1.0, 0.5), (2, 0.5, 1.0), (4, 0.0, 1.0)):
        given.cur_epoch = epoch
        info = step(model, batch).info
        assert info["kd_ctc_weight"] == pytest.approx(ctc * frames)
        assert info["kd_hard_weight"] == pytest.approx(hard * frames)
        assert (info["kd_ctc_loss"] > 0) == (ctc > 0)
    given.cur_epoch = 2
    assert session.current().clock.cuts_per_epoch == 3
    found = [step(model, batch).info["kd_ctc_weight"] / frames for _ in range(2)]
    assert found == [pytest.approx(0.5), pytest.approx(0.0)]  # an epoch is one batch


def test_what_is_logged_is_the_weight_once_icefall_divides_it(
    student, params, store, step
):
    cuts, model = store(), student()
    session.attach(params(ctc=1.0, kd_last_epochs=1.0, num_epochs=4), model)
    batch = wrap(cuts)[cuts]
    info = MetricsTracker()
    info.update(step(model, batch).info)
    factor = session.current().distillation.params["subsampling_factor"]
    info["frames"] = int((batch["supervisions"]["num_frames"] // factor).sum())
    normal = dict(info.norm_items())
    assert normal["kd_ctc_weight"] == normal["kd_hard_weight"] / 0.3 == 1.0


def test_weights_that_stay_are_not_logged(student, params, store, step):
    cuts, model = store(), student()
    session.attach(params(ctc=1.0), model)
    assert set(step(model, wrap(cuts)[cuts]).info) == {"kd_ctc_loss", "kd_frames"}


@pytest.mark.parametrize("changes", [{"ctc": 1.0}, {"kd_nbest_weight": 1.0}])
def test_validation_says_how_blank_and_peaky_the_ctc_head_is(
    student, params, cuts, step, seen, changes
):
    model = student()
    session.attach(params(**changes), model)
    with torch.no_grad():
        model.ctc_output[1].bias[0] += 3.0  # some utterances are all blank now
    found = seen()
    model.training = False
    with torch.no_grad():
        done = step(model, K2SpeechRecognitionDataset()[cuts])
    (out,) = found
    expected = ctc_diagnostics(out.ctc_logits, out.encoder_out_lens)
    assert done.info == {f"kd_{name}": value for name, value in expected.items()}
    assert set(done.info) == {"kd_all_blank", "kd_peakiness"}
    assert float(done.loss) == done.recipe


def test_validation_of_a_student_whose_ctc_head_is_not_asked(student, params, step):
    model = student()
    session.attach(params(kd_rnnt_weight=1.0), model)
    model.training = False
    with torch.no_grad():
        batch = {"inputs": torch.zeros(1, 30, 20)}
        batch["supervisions"] = {"text": ["z"], "num_frames": torch.tensor([30])}
        assert step(model, batch).info == {}


# Batches without transcripts


@pytest.fixture
def untranscribed(cuts):
    """The cuts, in one of the ways that lhotse has for no transcript."""

    def make(text, cuts=cuts, ids=LENGTHS):
        found = []
        for cut in cuts:
            cut = cut.with_id(cut.id)
            if cut.id in ids:
                (old,) = cut.supervisions
                cut.supervisions = [old.map(lambda s: s)]
                cut.supervisions[0].text = text
            found.append(cut)
        return CutSet.from_cuts(found)

    return make


@pytest.mark.parametrize("text", [None, "", "  "])
def test_batches_without_transcripts_have_the_kd_terms_alone(
    student, params, store, step, sp, untranscribed, text
):
    cuts = untranscribed(text, store())
    found = []
    for hard in (0.0, 1.0, 50.0):
        model = student()
        session.attach(params(ctc=1.0, hard=hard), model)
        batch = wrap(cuts)[cuts]
        assert batch["kd_transcribed"].tolist() == 3 * [False]
        done = step(model, batch)
        assert done.recipe > 1  # the recipe's own losses ran
        assert float(done.loss) == pytest.approx(done.info["kd_ctc_loss"])
        assert done.info["kd_hard_frames"] == 0
        found.append(gradients(model, done.loss))
        assert found[0].keys() == found[-1].keys()
    assert found[0]["joiner.output_linear.weight"].abs().max() == 0
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)
        torch.testing.assert_close(found[2][name], grad)
    texts = [s.text for c in batch["supervisions"]["cut"] for s in c.supervisions]
    assert not any((t or "").strip() for t in texts)  # the cuts stay as they are
    assert [c.supervisions[0].text for c in cuts] == [text] * 3


def test_transcribed_batches_of_such_a_training_are_as_ever(
    student, params, store, step, untranscribed
):
    cuts, model = untranscribed(None, store(), ids=("c3",)), student()
    session.attach(params(ctc=1.0), model)
    dataset = wrap(cuts)
    rows = CutSet.from_cuts([cuts["c1"], cuts["c2"]])
    batch = dataset[rows]
    assert batch["supervisions"]["text"] == ["zero one", "two"]
    done = step(model, batch)
    assert done.info["kd_hard_frames"] == 15 + 11
    expected = 0.3 * done.recipe + done.info["kd_ctc_loss"]
    assert float(done.loss) == pytest.approx(expected, rel=1e-5)


def test_a_training_with_all_transcripts_has_no_stand_ins(student, params, store):
    cuts = store()
    session.attach(params(ctc=1.0), student())
    assert "kd_transcribed" not in wrap(cuts)[cuts]


def test_what_stands_in_is_a_label_and_no_blank(sp, bpe_models):
    text = stand_in(sp, 0)
    (label,) = sp.encode(text)
    assert label > 2  # blank, sos/eos, unk
    other = stand_in(load_tokenizer(bpe_models.ab), label)
    assert label not in load_tokenizer(bpe_models.ab).encode(other)

    class Nothing:
        get_piece_size = staticmethod(lambda: 1)
        decode = staticmethod(lambda ids: "x")
        encode = staticmethod(lambda text: [0])
        unk_id = staticmethod(lambda: 2)

    with pytest.raises(KDError, match="make no transcript"):
        stand_in(Nothing, 0)


def test_without_a_bpe_model_nothing_stands_in(student, params, store, untranscribed):
    cuts = untranscribed(None, store())
    session.attach(params(ctc=1.0, bpe_model=None), student())
    with pytest.raises(KDError, match="--bpe-model") as e:
        wrap(cuts)
    one_sentence(e)


def test_an_online_teacher_teaches_without_transcripts(
    student, online, step, sp, untranscribed
):
    """Whose cuts nobody counted."""
    cuts, model = untranscribed(None), student()
    session.attach(online(kd_rnnt_weight=0.5), model)
    batch = wrap(cuts)[cuts]
    done = step(model, batch)
    assert done.info["kd_ctc_loss"] > 1
    assert (done.info["kd_rnnt_loss"], done.info["kd_rnnt_frames"]) == (0, 0)
    assert float(done.loss) == pytest.approx(0.7 * done.info["kd_ctc_loss"], rel=1e-5)
    gradients(model, done.loss)
    session.attach(online(bpe_model=None), model)
    with pytest.raises(KDError, match="c[123] has no transcript.*--bpe-model"):
        wrap(cuts)[cuts]


def test_lists_are_learned_without_transcripts(
    student, params, step, untranscribed, sp
):
    cuts, model = with_lists(untranscribed("")), student()
    session.attach(params(kd_nbest_weight=1.0), model)
    done = step(model, wrap(cuts)[cuts])
    assert done.info["kd_nbest_loss"] > 1 and done.info["kd_hard_frames"] == 0
    assert float(done.loss) == pytest.approx(done.info["kd_nbest_loss"])


def test_a_cache_keeps_no_stand_in_as_a_transcript(
    student, online, step, untranscribed, tmp_path, monkeypatch
):
    monkeypatch.setattr(atexit, "register", lambda *call: None)
    cuts, model = untranscribed(None), student()
    session.attach(online(kd_teacher_cache_dir=str(tmp_path / "on")), model)
    done = step(model, wrap(cuts)[cuts])
    assert done.info["kd_ctc_loss"] > 1
    writer = session.current().distillation.online.cache.writer
    writer.finish()
    texts = [c.supervisions[0].text for c in CutSet.from_file(writer.manifest)]
    assert len(texts) == 3 and not any(texts)


def test_what_wraps_the_dataset_goes_to_worker_processes(
    student, params, store, untranscribed
):
    cuts = untranscribed(None, store())
    session.attach(params(ctc=1.0), student())
    dataset = wrap(cuts)
    assert isinstance(dataset, StandInTranscripts)
    batch = pickle.loads(pickle.dumps(dataset))[cuts]
    torch.testing.assert_close(
        batch["kd_targets"].parts["ctc"], dataset[cuts]["kd_targets"].parts["ctc"]
    )
    assert batch["supervisions"]["text"] == dataset[cuts]["supervisions"]["text"]


# Lattices


@pytest.mark.parametrize(
    "lattice, temperature, fits",
    [
        ("top:3@2", 2.0, False),
        ("adaptive:0.99:9@2", 1.0, False),
        ("top:25", 2.0, True),
        ("collapsed", 2.0, True),
        ("dense", 2.0, True),
    ],
)
def test_the_full_sum_needs_lattices_at_temperature_1(
    student, params, store, step, lattice, temperature, fits
):
    """Whatever the temperature of the other terms."""
    cuts, model = store(lattice=lattice), student()
    settings = {"ctc": 0.7, "temperature": temperature, "kd_full_sum_weight": 0.5}
    session.attach(params(**settings), model)
    if fits:
        assert step(model, wrap(cuts)[cuts]).info["kd_full_sum_loss"] > 0
        return
    with pytest.raises(
        KDError, match="kd_full_sum_loss .*temperature 1, .*--kd-temperature"
    ) as e:
        wrap(cuts)
    assert lattice in one_sentence(e) and "--keep-lattice dense" in str(e.value)


def test_a_collapsed_store_serves_the_lattices_kl_at_its_temperature_alone(
    student, params, store
):
    cuts = store(lattice="collapsed")
    settings = {"kd_rnnt_weight": 0.5, "kd_full_sum_weight": 0.5}
    session.attach(params(**settings, temperature=2.0), student())
    with pytest.raises(KDError, match="--kd-temperature 1"):
        wrap(cuts)
    session.attach(params(**settings, temperature=1.0), student())
    wrap(cuts)


@pytest.mark.parametrize("name", ["rnnt", "full_sum"])
def test_lattices_that_would_be_lost_on_the_way_are_refused(
    student, params, store, name
):
    """Targets of another frame rate are resampled, and lattices can't be."""
    cuts = store(lattice="dense", frame_shift=0.02, subsampling_factor=2)
    session.attach(params(ctc=1.0, **{f"kd_{name}_weight": 1.0}), student())
    flag = f"--kd-{name.replace('_', '-')}-weight"
    with pytest.raises(KDError, match=f"frame rates .*lattices .*{flag} to 0$") as e:
        wrap(cuts)
    one_sentence(e)
    session.attach(params(ctc=1.0), student())
    assert wrap(cuts).frame_shift == 0.04


def test_lattices_of_symbols_in_another_order_are_refused(
    make_model, params, store, tmp_path, sp, make_cut, bpe_models
):
    from icefall_kd.tokens import hash_tokens, token_names, write_token_names

    names = token_names(sp)
    other = [*names[:3], *reversed(names[3:])]
    cuts = store(lattice="dense", tokens=hash_tokens(other))
    write_token_names(tmp_path / "kd", other)
    model = calm(make_model(vocab_size=25))
    session.attach(params(ctc=1.0, kd_rnnt_weight=1.0), model)
    with pytest.raises(KDError, match="orders of tokens .*lattices") as e:
        wrap(cuts)
    one_sentence(e)
    session.attach(params(ctc=1.0), model)
    assert wrap(cuts).token_ids is not None


@pytest.fixture
def asked(online, cuts, student, sp, monkeypatch):
    """The nodes that a session's online teacher gives, by its options."""

    def ask(**changes):
        found = []
        targets = Teacher.targets

        def watch(*args, **options):
            found.append(targets(*args, **options))
            return found[-1]

        with monkeypatch.context() as patch:
            patch.setattr(Teacher, "targets", watch)
            session.attach(online(ctc=0.0, kd_rnnt_weight=0.5, **changes), student())
            batch = wrap(cuts)[cuts]
            labels = [sp.encode(text) for text in batch["supervisions"]["text"]]
            rows = [torch.tensor([0, *y]) for y in labels]  # as the decoder gets them
            heard = EncoderOut(
                torch.zeros(0),
                torch.zeros(0),
                labels=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            )
            session.current().distillation.online.targets(
                batch, heard, torch.device("cpu")
            )
        (said,) = found
        return said

    return ask


def test_an_online_lattice_is_pruned_or_full_or_a_path(asked, sp):
    labels = {name: len(sp.encode(text)) for name, text in TEXTS.items()}
    frames = dict(zip(TEXTS, (14, 10, 7)))
    pruned, full, path = (
        asked(kd_teacher_s_range=2),
        asked(kd_teacher_s_range=0),
        asked(kd_teacher_path_only=True),
    )
    for row, name in enumerate(TEXTS):
        t, u = frames[name], labels[name]
        nodes = [
            said.parts["nodes"].select(said.parts["nodes"].row == row)
            for said in (pruned, full)
        ]
        counts = [n.frame.bincount(minlength=t) for n in nodes]
        assert counts[0].max() == 2 < u + 1
        assert counts[1].max() == u + 1 and len(nodes[1]) > len(nodes[0])
        for n in nodes:
            assert float(n.occupancy.sum()) == pytest.approx(t + u, rel=1e-3)
        best = path.parts["nodes"].select(path.parts["nodes"].row == row)
        assert len(best) == t + u and best.occupancy.eq(1).all()
        ends = [(int(best.frame[i]), int(best.position[i])) for i in (0, -1)]
        assert ends == [(0, 0), (t - 1, u)]
    assert pruned.parts.get("ctc") is None and not pruned.parts.get(
        "hidden"
    )  # nobody asked


def test_a_path_of_the_full_lattice_is_the_best_of_all(asked, monkeypatch):
    """Its nodes are among those that the teacher's paths pass."""
    monkeypatch.setattr("icefall_kd.lattice.LEAST_OCCUPANCY", 0.0)  # keep all nodes
    full, path = asked(kd_teacher_s_range=0), asked(
        kd_teacher_s_range=0, kd_teacher_path_only=True
    )
    passed = {
        (int(r), int(t), int(u)): float(o)
        for r, t, u, o in zip(
            full.parts["nodes"].row,
            full.parts["nodes"].frame,
            full.parts["nodes"].position,
            full.parts["nodes"].occupancy,
        )
    }
    on_path = list(
        zip(*(x.tolist() for x in (path.parts["nodes"].row, path.parts["nodes"].frame)))
    )
    found = [
        passed[(r, t, int(u))]
        for (r, t), u in zip(on_path, path.parts["nodes"].position)
    ]
    assert sum(found) / len(found) > sum(passed.values()) / len(passed)


@pytest.mark.parametrize(
    "changes",
    [
        {"kd_teacher_s_range": 0},
        {"kd_teacher_path_only": True},
        {"kd_rnnt_form": "total"},
    ],
)
def test_a_student_learns_from_each_online_lattice(
    student, online, cuts, train, sp, changes
):
    settings = {"ctc": 0.0, "hard": 0.0, "kd_rnnt_weight": 0.5, **changes}
    given = online(**settings, kd_full_sum_weight=0.1)
    found = train(student(), given, cuts, steps=8)
    assert found[0]["kd_rnnt_frames"] == FRAMES
    for name in ("rnnt", "full_sum"):
        assert found[-1][f"kd_{name}_loss"] < 0.9 * found[0][f"kd_{name}_loss"], name


@pytest.mark.parametrize(
    "changes, words",
    [({"ctc": 1.0}, "no term reads lattices"), ({"kd_nbest_weight": 1.0}, "no term")],
)
def test_ranges_without_lattices_are_refused_before_the_model_is_tapped(
    student, params, changes, words
):
    model = student()
    with pytest.raises(KDError, match=f"--kd-stored-ranges true .*{words}") as e:
        session.attach(params(**changes, kd_stored_ranges=True), model)
    one_sentence(e)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("s_range", [1, -1])
def test_a_lattice_that_no_path_gets_through_is_refused(student, online, s_range):
    with pytest.raises(
        KDError, match=f"--kd-teacher-s-range is {s_range}.*or 0 for all"
    ):
        session.attach(online(kd_teacher_s_range=s_range), student())


@pytest.mark.parametrize("name", ["rnnt", "full_sum", "hidden"])
def test_a_cache_keeps_no_more_than_ctc_targets(student, online, tmp_path, name):
    changes = {f"kd_{name}_weight": 0.5, "kd_hidden_layers": "out"}
    with pytest.raises(KDError, match=f"--kd-{name.replace('_', '-')}-weight") as e:
        session.attach(online(kd_teacher_cache_dir=str(tmp_path), **changes), student())
    one_sentence(e)


# A teacher of its own


def test_a_teacher_says_what_it_is_asked_for(make_model, features):
    model = make_model(seed=1)
    y = [[3, 4, 3], [5, 6], [7]]
    with ModelTap(model, layers=[1]) as hook:
        out = hook.encode(*features)
    found = Teacher([model], layers=["out", 1], with_ctc=False).targets(*features, y=y)
    assert found.parts.get("ctc") is None and sorted(
        map(str, found.parts["hidden"])
    ) == ["1", "out"]
    for layer in ("out", 1):
        torch.testing.assert_close(
            found.parts["hidden"][layer], hidden_rows(out, layer)
        )
        assert not found.parts["hidden"][layer].requires_grad
    assert found.mask.sum(1).tolist() == found.lens.tolist()
    assert (
        found.parts.get("nodes") is not None
        and not found.parts["nodes"].teacher.requires_grad
    )
    assert Teacher([model]).targets(*features).parts.get("nodes") is None


def test_hidden_layers_of_several_teachers_are_refused(make_model, online, student):
    models = [make_model(seed=1), make_model(seed=2)]
    with pytest.raises(KDError, match="2 teachers, and hidden layers"):
        Teacher(models, layers=["out"])
    folder = online().kd_teacher_exp_dir
    changes = {"kd_hidden_weight": 1.0, "kd_hidden_layers": "out"}
    given = online(**changes, kd_teacher_exp_dir=f"{folder},{folder}")
    with pytest.raises(KDError, match="2 teachers, and hidden layers"):
        session.attach(given, student())

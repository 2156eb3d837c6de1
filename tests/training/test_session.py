"""What a plugged recipe calls: nothing happens when KD is off, the formula when on."""

import atexit
import copy
import random
import shutil

import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.dataset import K2SpeechRecognitionDataset
from torch.utils.data import DataLoader
from zipformer.utils import MetricsTracker

from icefall_kd.errors import KDError
from icefall_kd.tap import ModelTap
from icefall_kd.targets import Fingerprint, TargetDataset, places
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import Pointer, read_fingerprint
from icefall_kd.tokens import hash_tokens, load_tokenizer, token_names
from icefall_kd.training import session
from icefall_kd.zipformer import ctc_linear


@pytest.fixture
def cuts(make_cut, make_store):
    """Cuts that carry targets."""
    return make_store([make_cut("c1", 47), make_cut("c2", 61), make_cut("c3", 33)])


def hooks_of(model):
    return [n for n, m in model.named_modules() if m._forward_hooks]


def recipe_loss(model, batch):
    """The recipe's loss: what its compute_loss has before kd.joint_loss."""
    simple, pruned, ctc, *_ = model(
        x=batch["inputs"],
        x_lens=batch["supervisions"]["num_frames"],
        y=[[3, 4, 3], [5, 6], [7]],
        prune_range=3,
    )
    return 0.5 * simple + pruned + 0.2 * ctc


def kd_batch(cuts):
    return TargetDataset(K2SpeechRecognitionDataset())[cuts]


# KD off


class Untouchable:
    """Cuts that nobody may look at."""

    def __iter__(self):
        raise AssertionError("the cuts were read")


def test_off_leaves_everything_as_it_is(make_model, make_params, cuts):
    model = make_model().train()
    session.attach(make_params(ctc=0.0), model)
    assert hooks_of(model) == []
    dataset = K2SpeechRecognitionDataset()
    assert session.wrap_dataset(dataset, Untouchable()) is dataset
    assert dataset.return_cuts is False
    batch, info = dataset[cuts], MetricsTracker()
    loss = recipe_loss(model, batch)
    assert session.joint_loss(loss, info, model, batch) is loss
    assert dict(info) == {}


def test_off_gives_bit_identical_training(make_model, make_params, cuts):
    batch, found = K2SpeechRecognitionDataset()[cuts], []
    for plugged in (False, True):
        model = make_model().train()
        random.seed(1)
        torch.manual_seed(1)
        if plugged:
            session.attach(make_params(ctc=0.0), model)
        loss = recipe_loss(model, batch)
        if plugged:
            loss = session.joint_loss(loss, MetricsTracker(), model, batch)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_off_accepts_what_only_kd_refuses(make_model, make_params):
    off = make_params(ctc=0.0, use_cr_ctc=True, enable_spec_aug=True)
    session.attach(off, make_model(use_ctc=False))


def test_without_attach_nothing_happens():
    loss = torch.zeros(())
    assert session.joint_loss(loss, None, None, None) is loss
    assert session.wrap_dataset("dataset", Untouchable()) == "dataset"


# KD on


def kd_by_hand(naive_kd, read_targets, logits, batch, temperature):
    """T^2 KL in float64, row by row, from the targets of the rows' cuts."""
    total = 0.0
    for row, cut in zip(
        logits.detach().double(), batch["supervisions"]["cut"], strict=True
    ):
        teacher = read_targets(cut).double()
        n = len(teacher)
        total += naive_kd(row[None, :n], teacher[None], torch.tensor([n]), temperature)
    return float(total)


@pytest.mark.parametrize("ctc, hard, temperature", [(0.7, 0.3, 2.0), (2.0, 0.0, 1.0)])
def test_the_loss_equals_the_formula_by_hand(
    make_model, make_params, cuts, naive_kd, read_targets, ctc, hard, temperature
):
    model = make_model().train()
    session.attach(make_params(ctc, hard, temperature), model)
    seen = []
    ctc_linear(model).register_forward_hook(lambda m, args, out: seen.append(out))
    dataset = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    batch, info = dataset[cuts], MetricsTracker()
    loss = recipe_loss(model, batch)
    joint = session.joint_loss(loss, info, model, batch)
    assert len(seen) == 1
    kd = kd_by_hand(naive_kd, read_targets, seen[0], batch, temperature)
    assert kd > 1 and abs(kd - loss.item()) > 1
    assert joint.item() == pytest.approx(hard * loss.item() + ctc * kd, rel=1e-5)
    assert info["kd_ctc_loss"] == pytest.approx(kd, rel=1e-5)
    assert set(info) == {"kd_ctc_loss", "kd_frames"}
    assert info["kd_frames"] == int(batch["kd_targets"].lens.sum())
    joint.backward()
    assert model.encoder_embed.out.weight.grad.abs().max() > 0


def test_a_store_that_moved_with_its_manifest_is_found(
    make_model, make_params, cuts, tmp_path
):
    """By --manifest-dir; a worker that is a new process finds it too."""
    before = kd_batch(cuts)["kd_targets"]
    places.forget()
    read_fingerprint.cache_clear()
    (tmp_path / "nvme").mkdir()
    (tmp_path / "kd").rename(tmp_path / "nvme" / "kd")
    for folder, found in (("", False), (tmp_path / "nvme", True)):
        session.attach(make_params(manifest_dir=folder), make_model().train())
        if not found:
            with pytest.raises(KDError, match="no fingerprint.json.*repoint"):
                session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
            continue
        dataset = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
        loader = DataLoader(
            dataset,
            sampler=[cuts],
            batch_size=None,
            num_workers=1,
            multiprocessing_context="spawn",
        )
        (batch,) = loader
        assert torch.equal(batch["kd_targets"].parts["ctc"], before.parts["ctc"])


def test_a_pure_kd_loss_reaches_the_ctc_head_only(make_model, make_params, cuts):
    model = make_model().train()
    session.attach(make_params(1.0, 0.0), model)
    batch = kd_batch(cuts)
    loss = session.joint_loss(recipe_loss(model, batch), MetricsTracker(), model, batch)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads["ctc_output.1.weight"].abs().max() > 0
    assert grads["encoder_embed.out.weight"].abs().max() > 0
    assert grads["joiner.output_linear.weight"].abs().max() == 0


def test_kd_training_lowers_the_kd_loss(make_model, make_params, cuts):
    torch.manual_seed(0)
    random.seed(0)
    model = make_model().train()
    session.attach(make_params(1.0, 0.0), model)
    batch = kd_batch(cuts)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        info = MetricsTracker()
        loss = recipe_loss(model, batch)
        loss = session.joint_loss(loss, info, model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(info["kd_ctc_loss"])
    assert min(losses[-2:]) < 0.8 * losses[0]


def test_validation_keeps_the_recipes_loss(make_model, make_params, cuts):
    model = make_model()
    session.attach(make_params(), model)
    batch = K2SpeechRecognitionDataset()[cuts]  # a validation batch has no targets
    model.eval()
    with torch.no_grad():
        loss, info = recipe_loss(model, batch), MetricsTracker()
        assert session.joint_loss(loss, info, model, batch) is loss
    assert not loss.requires_grad
    assert set(info) == {"kd_all_blank", "kd_peakiness"}  # of the CTC head
    model.train()  # and training goes on
    info.clear()
    batch = kd_batch(cuts)
    joint = session.joint_loss(recipe_loss(model, batch), info, model, batch)
    assert joint.requires_grad and set(info) == {"kd_ctc_loss", "kd_frames"}


def test_no_key_is_added_to_the_checkpoint(make_model, make_params, cuts):
    model = make_model().train()
    params = make_params()
    names, settings = list(model.state_dict()), dict(params)
    session.attach(params, model)
    batch = kd_batch(cuts)
    loss = session.joint_loss(recipe_loss(model, batch), MetricsTracker(), model, batch)
    loss.backward()
    assert list(model.state_dict()) == names and params == settings


def test_attaching_again_replaces_the_session(make_model, make_params):
    first, second = make_model(), make_model()
    session.attach(make_params(), first)
    session.attach(make_params(), second)
    assert hooks_of(first) == [] and len(hooks_of(second)) == 3
    session.attach(make_params(ctc=0.0), second)
    assert hooks_of(second) == []


def test_a_session_can_wait_while_another_training_takes_its_turn(
    make_model, make_params, cuts
):
    model = make_model().train()
    session.attach(make_params(), model)
    attached, batch = session.current(), kd_batch(cuts)
    session.resume(None)
    loss = recipe_loss(model, batch)
    assert session.joint_loss(loss, MetricsTracker(), model, batch) is loss
    session.resume(attached)
    assert session.joint_loss(loss, MetricsTracker(), model, batch) is not loss
    session.detach()
    assert session.current() is None and hooks_of(model) == []


def test_a_model_under_ddp(make_model, make_params, cuts, process_group):
    model = make_model().train()
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    session.attach(make_params(), ddp)
    batch, info = kd_batch(cuts), MetricsTracker()
    loss = session.joint_loss(recipe_loss(ddp, batch), info, ddp, batch)
    loss.backward()
    assert info["kd_ctc_loss"] > 0
    assert model.ctc_output[1].weight.grad.abs().max() > 0


def test_a_model_that_did_not_run_is_refused(make_model, make_params, cuts):
    model = make_model().train()
    session.attach(make_params(), model)
    with pytest.raises(KDError, match="no forward pass"):
        session.joint_loss(torch.zeros(()), MetricsTracker(), model, kd_batch(cuts))


def test_a_training_batch_without_targets_is_refused(make_model, make_params, cuts):
    model = make_model().train()
    session.attach(make_params(), model)
    batch = K2SpeechRecognitionDataset(return_cuts=True)[cuts]  # not wrapped
    loss = recipe_loss(model, batch)
    with pytest.raises(KDError, match="wrap_dataset"):
        session.joint_loss(loss, MetricsTracker(), model, batch)


@pytest.mark.parametrize("trains", [True, False])
def test_a_model_in_eval_mode_is_distilled_where_it_trains(
    make_model, make_params, cuts, trains
):
    """Recipes with adapters and LoRA put all in eval mode, and train what is theirs."""
    model, info = make_model().eval(), MetricsTracker()
    session.attach(make_params(), model)
    dataset = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    batch = dataset[cuts]
    with torch.set_grad_enabled(trains):
        loss = recipe_loss(model, batch)
    joint = session.joint_loss(loss, info, model, batch)
    assert ("kd_ctc_loss" in info) == trains == (joint is not loss)


# Refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ctc": -1.0}, "--kd-ctc-weight"),
        ({"ctc": float("nan")}, "--kd-ctc-weight"),
        ({"hard": -0.1}, "--kd-hard-weight"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
    ids="weight nan hard temperature".split(),
)
def test_what_does_not_fit_is_refused(make_model, make_params, changes, words):
    model = make_model()
    with pytest.raises(KDError) as e:
        session.attach(make_params(**changes), model)
    assert words in str(e.value) and "\n" not in str(e.value)
    assert hooks_of(model) == []
    loss = torch.zeros(())
    assert session.joint_loss(loss, None, model, None) is loss  # no half session


@pytest.mark.parametrize("warp", [0, -1, None])
def test_masks_without_time_warp_are_taken(make_model, make_params, warp):
    params = make_params(enable_spec_aug=True, spec_aug_time_warp_factor=warp)
    model = make_model()
    session.attach(params, model)
    assert len(hooks_of(model)) == 3


def test_a_recipe_without_the_augmentation_options(make_model, make_params):
    params = make_params()
    for name in ("enable_spec_aug", "spec_aug_time_warp_factor", "use_cr_ctc"):
        del params[name]
    session.attach(params, make_model())


def test_a_student_without_ctc_head_is_refused(make_model, make_params):
    with pytest.raises(KDError, match="no CTC head.*--use-ctc 1"):
        session.attach(make_params(), make_model(use_ctc=False))


def test_cuts_without_targets_are_refused(make_model, make_params, make_cut, cuts):
    session.attach(make_params(), make_model())
    with pytest.raises(KDError, match="1 of 4 training cuts.*b1 the first"):
        session.wrap_dataset(K2SpeechRecognitionDataset(), [*cuts, make_cut("b1", 33)])


@pytest.mark.parametrize(
    "store, both",
    [
        ({"vocab_size": 9}, ("11 tokens", "teacher's 9")),
        ({"blank_id": 4}, ("blank id is 0", "teacher's 4")),
    ],
    ids=["vocabulary", "blank"],
)
def test_a_teacher_of_other_symbols_is_refused(
    make_model, make_params, make_cut, make_store, store, both
):
    cuts = make_store([make_cut("c1", 47)], **store)
    session.attach(make_params(), make_model())
    with pytest.raises(KDError, match="--bpe-model") as e:
        session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    assert all(words in str(e.value) for words in both)


def test_a_teacher_of_other_tokens_is_refused(
    make_model, make_params, make_cut, make_store, bpe_models
):
    cuts = make_store(
        [make_cut("c1", 47)],
        tokens=hash_tokens(token_names(load_tokenizer(bpe_models.a))),
    )
    fits = make_params(bpe_model=str(bpe_models.a))
    session.attach(fits, make_model())
    assert isinstance(
        session.wrap_dataset(K2SpeechRecognitionDataset(), cuts), TargetDataset
    )
    session.attach(make_params(bpe_model=str(bpe_models.b)), make_model())
    with pytest.raises(KDError, match="tokens .* are not the teacher's") as e:
        session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    assert hash_tokens(token_names(load_tokenizer(bpe_models.b)))[:8] in str(e.value)


# Lhotse warns of each cut that a batch holds; see test_dataset.py.
WORKER = """
import logging, sys
logging.basicConfig(level="ERROR")
from lhotse import load_manifest
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from torch.utils.data import DataLoader
from icefall_kd.errors import install_excepthook
from icefall_kd.targets import TargetDataset

install_excepthook()  # as session.attach() does
sampler = SimpleCutSampler(load_manifest(sys.argv[1]), max_duration=100)
dataset = TargetDataset(K2SpeechRecognitionDataset())
for batch in DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=1):
    print("a batch")
"""


def test_a_workers_refusal_ends_training_with_one_sentence(cuts, run_python, tmp_path):
    (tmp_path / "kd" / "targets.bin").unlink()
    done = run_python(WORKER, tmp_path / "kd.jsonl.gz")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("icefall_kd: error: the targets of cut c")
    assert str(tmp_path / "kd" / "targets.bin") in line and "can't be read" in line


def test_damage_that_a_worker_finds_ends_training_with_one_sentence(
    cuts, run_python, tmp_path
):
    records = tmp_path / "kd" / "targets.bin"
    data = bytearray(records.read_bytes())
    data[cuts["c2"].custom["kd_targets"]["offset"] + 7] ^= 1
    records.write_bytes(data)
    done = run_python(WORKER, tmp_path / "kd.jsonl.gz")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("icefall_kd: error: the targets of cut c2 in ")
    assert str(records) in line and "damaged" in line
    assert "Traceback" not in done.stderr


def test_an_error_outside_the_sessions_functions_names_options_too(run_python):
    code = (
        "import argparse\n"
        "from icefall_kd.errors import KDError\n"
        "from icefall_kd.training import session\n"
        "session.add_arguments(argparse.ArgumentParser())\n"
        "raise KDError('`missing` is x and `HiddenTerm.layers` is y')\n"
    )
    done = run_python(code)
    line = "icefall_kd: error: --kd-missing is x and --kd-hidden-layers is y\n"
    assert (done.returncode, done.stderr) == (1, line)


# Sparse stores, and cuts without targets


def test_a_sparse_store_of_the_losss_temperature_is_taken(
    make_model, make_params, make_cut, make_store
):
    cuts = make_store([make_cut("c1", 47), make_cut("c2", 61)], ctc="top:4@2")
    model = make_model().train()
    session.attach(make_params(), model)
    dataset = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    batch, info = dataset[cuts], MetricsTracker()
    x, lens = batch["inputs"], batch["supervisions"]["num_frames"]
    simple, pruned, ctc, *_ = model(x=x, x_lens=lens, y=[[3, 4], [5]], prune_range=2)
    loss = session.joint_loss(simple + pruned + ctc, info, model, batch)
    loss.backward()
    assert info["kd_ctc_loss"] > 0 and info["kd_frames"] == 14 + 10


@pytest.mark.parametrize("ctc, own", [("top:4", "1"), ("adaptive:.9:5@3", "3")])
def test_a_sparse_store_of_another_temperature_is_refused(
    make_model, make_params, make_cut, make_store, ctc, own
):
    cuts = make_store([make_cut("c1", 47)], ctc=ctc)
    session.attach(make_params(), make_model())
    with pytest.raises(KDError, match=f"--kd-temperature {own}") as e:
        session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    assert "loss is at 2" in str(e.value) and "\n" not in str(e.value)


def test_cuts_without_targets_train_by_the_hard_loss_where_told(
    make_model, make_params, make_cut, cuts
):
    model = make_model().train()
    session.attach(make_params(kd_missing="hard"), model)
    some = [cuts["c1"], make_cut("b1", 61), cuts["c3"]]
    dataset = session.wrap_dataset(K2SpeechRecognitionDataset(), some)
    batch, info = dataset[CutSet.from_cuts(some)], MetricsTracker()
    session.joint_loss(recipe_loss(model, batch), info, model, batch).backward()
    assert info["kd_frames"] == 10 + 7 and info["kd_ctc_loss"] > 0

    bare = CutSet.from_cuts([make_cut(f"b{i}", 61) for i in range(3)])
    batch, info = dataset[bare], MetricsTracker()
    loss = recipe_loss(model, batch)
    joint = session.joint_loss(loss, info, model, batch)
    assert joint.item() == pytest.approx(0.3 * loss.item(), rel=1e-6)
    assert dict(info) == {"kd_ctc_loss": 0.0, "kd_frames": 0.0}


def test_no_targets_at_all_are_refused_even_so(make_model, make_params, make_cut):
    session.attach(make_params(kd_missing="hard"), make_model())
    with pytest.raises(KDError, match="2 of 2 training cuts have no targets"):
        session.wrap_dataset(
            K2SpeechRecognitionDataset(), [make_cut("b1", 33), make_cut("b2", 33)]
        )


# A teacher in the training process


def online_step(model, cuts):
    """The terms of one training step, and the CTC layer's gradient."""
    dataset = K2SpeechRecognitionDataset()
    batch, info = session.wrap_dataset(dataset, Untouchable())[cuts], MetricsTracker()
    loss = session.joint_loss(recipe_loss(model, batch), info, model, batch)
    loss.backward()
    return dict(info), ctc_linear(model).weight.grad


def test_an_online_teacher_needs_no_store(make_model, online, make_cut, teacher_exp):
    cuts = CutSet.from_cuts(
        [make_cut("c1", 47), make_cut("c2", 61), make_cut("c3", 33)]
    )
    model = make_model(vocab_size=25).train()
    session.attach(online(hard=0.0), model)
    info, grad = online_step(model, cuts)
    assert info["kd_ctc_loss"] > 0.1 and grad.abs().max() > 0
    assert info["kd_frames"] == 10 + 14 + 7


def test_an_online_teacher_teaches_itself_nothing(online, make_cut, teacher_exp):
    """One utterance, so that no padding comes in between."""
    cuts = CutSet.from_cuts([make_cut("c1", 61)])
    model = copy.deepcopy(teacher_exp.models["epoch-2"]).eval()
    session.attach(online(), model)
    batch = session.wrap_dataset(K2SpeechRecognitionDataset(), Untouchable())[cuts]
    with torch.no_grad():
        model(
            x=batch["inputs"],
            x_lens=batch["supervisions"]["num_frames"],
            y=[[3]],
            prune_range=3,
        )
        model.training = True  # joint_loss asks; its modules stay in eval mode
        info = MetricsTracker()
        session.joint_loss(torch.zeros(()), info, model, batch)
    assert abs(info["kd_ctc_loss"]) < 1e-4


def test_a_cache_is_filled_and_read(make_model, online, make_cut, tmp_path):
    cuts = CutSet.from_cuts(
        [make_cut("c1", 47), make_cut("c2", 61), make_cut("c3", 33)]
    )
    model = make_model(vocab_size=25).train()
    session.attach(
        online(hard=0.0, kd_teacher_cache_dir=str(tmp_path / "cache")), model
    )
    first, _ = online_step(model, cuts)
    written = (tmp_path / "cache" / "targets.bin").stat().st_size
    online_step(model, cuts)
    assert (tmp_path / "cache" / "targets.bin").stat().st_size == written > 0
    assert first["kd_frames"] == 31


@pytest.fixture
def at_exit(monkeypatch):
    """What is to be called at the end of the process, and is not."""
    calls = []
    monkeypatch.setattr(atexit, "register", lambda *call: calls.append(call))
    return calls


@pytest.fixture
def cached(make_model, online, make_cut, tmp_path, at_exit):
    """Train a step with a cache; return what the process would call at its end."""

    def step(**changes):
        cuts = CutSet.from_cuts(
            [make_cut("c1", 47), make_cut("c2", 61), make_cut("c3", 33)]
        )
        model = make_model(vocab_size=25).train()
        folder = str(tmp_path / "cache")
        session.attach(online(hard=0.0, kd_teacher_cache_dir=folder, **changes), model)
        info, _ = online_step(model, cuts)
        assert info["kd_ctc_loss"] > 0 and info["kd_frames"] == 31
        (call,) = at_exit
        return call

    return step


def test_a_finished_training_leaves_the_caches_manifest(
    cached, tmp_path, teacher_exp, caplog
):
    finish, *args = cached()
    path = tmp_path / "cache" / "cuts.jsonl.gz"
    assert not path.exists()
    with caplog.at_level("INFO"):
        finish(*args)
    assert f"{path}: 3 cuts with the teacher's targets" in caplog.text
    found = {c.id: c for c in load_manifest(path)}
    assert sorted(found) == ["c1", "c2", "c3"]
    with ModelTap(teacher_exp.models["epoch-2"].requires_grad_(False)) as hook:
        for cut in found.values():
            x = torch.from_numpy(cut.load_features())[None]
            logits = hook.encode(x, torch.tensor([x.size(1)])).ctc_logits[0]
            targets = collate_targets([cut], kinds=["ctc"]).parts["ctc"][0]
            torch.testing.assert_close(
                targets, logits.log_softmax(-1), rtol=2**-9, atol=1e-3
            )
    assert [p.name for p in (tmp_path / "cache").glob("*partial")] == []
    # And it can be trained on.
    batch = kd_batch(CutSet.from_cuts(found.values()))
    assert batch["kd_targets"].lens.tolist() == [14, 10, 7]


def test_a_cache_that_was_finished_is_gone_on_with(cached, at_exit, tmp_path):
    finish, *args = cached()
    finish(*args)
    size = (tmp_path / "cache" / "targets.bin").stat().st_size
    at_exit.clear()
    finish, *args = cached()
    finish(*args)
    assert (tmp_path / "cache" / "targets.bin").stat().st_size == size
    assert len(list(load_manifest(tmp_path / "cache" / "cuts.jsonl.gz"))) == 3


def test_a_cache_has_the_simple_targets_too_if_their_term_reads_them(
    cached, at_exit, tmp_path, teacher_exp
):
    finish, *args = cached(kd_simple_weight=0.5)
    finish(*args)
    model = teacher_exp.models["epoch-2"].requires_grad_(False)
    for cut in load_manifest(tmp_path / "cache" / "cuts.jsonl.gz"):
        with ModelTap(model, with_simple=True) as hook:
            x = torch.from_numpy(cut.load_features())[None]
            logits = hook.encode(x, torch.tensor([x.size(1)])).simple_logits[0]
        parts = collate_targets([cut]).parts
        assert set(parts) == {"ctc", "simple"}
        torch.testing.assert_close(
            parts["simple"][0], logits.log_softmax(-1), rtol=2**-9, atol=1e-3
        )
    at_exit.clear()
    with pytest.raises(KDError, match="made with simple 'dense' and .* has ''"):
        cached()


def test_a_cache_whose_disk_failed_says_so_at_the_end(cached, tmp_path, caplog):
    finish, *args = cached()
    shutil.rmtree(tmp_path / "cache")
    finish(*args)
    (record,) = (r for r in caplog.records if r.levelname == "ERROR")
    assert "No such file" in record.message and "\n" not in record.message
    assert str(tmp_path / "cache") in record.message


def test_each_process_of_ddp_leaves_a_manifest(
    cached, process_group, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    finish, *args = cached()
    finish(*args)
    names = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert names == [
        "cuts.job-1-of-2.jsonl.gz",
        "fingerprint.json",
        "targets.1-of-2.bin",
    ]
    found = load_manifest(tmp_path / "cache" / "cuts.job-1-of-2.jsonl.gz")
    assert sorted(c.id for c in found) == ["c1", "c2", "c3"]


@pytest.mark.parametrize("keep, temperature", [("top:3", 1.0), ("top:3@2", 2.0)])
def test_a_cache_keeps_the_form_that_was_told(
    cached, tmp_path, keep, temperature, teacher_exp
):
    finish, *args = cached(kd_teacher_keep=keep, temperature=temperature)
    finish(*args)
    fingerprint = Fingerprint.read(tmp_path / "cache")
    assert fingerprint.ctc == keep
    codec = fingerprint.kinds["ctc"].codec
    assert (codec.entries, codec.temperature) == (3, temperature)
    teacher = teacher_exp.models["epoch-2"].requires_grad_(False)
    with ModelTap(teacher) as hook:
        for cut in load_manifest(tmp_path / "cache" / "cuts.jsonl.gz"):
            x = torch.from_numpy(cut.load_features())[None]
            logits = hook.encode(x, torch.tensor([x.size(1)])).ctc_logits[0]
            rows = (logits / temperature).log_softmax(-1)
            data, frames = Pointer.of_cut(cut).read()["ctc"], Pointer.of_cut(cut).frames
            found = codec.decode([data], [frames], 25)
            assert found.indices.shape == (len(rows), 3)
            expected = rows.gather(1, found.indices)
            torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=0.02)
            best = rows.topk(3).indices.sort().values
            assert torch.equal(found.indices.sort().values, best)


@pytest.mark.parametrize(
    "keep, temperature", [("top:3", 2.0), ("adaptive:.9:5", 2.0), ("top:3@2", 1.0)]
)
def test_a_sparse_cache_of_another_temperature_is_refused(
    make_model, online, tmp_path, at_exit, keep, temperature
):
    model = make_model(vocab_size=25)
    changes = {"kd_teacher_keep": keep, "temperature": temperature}
    with pytest.raises(KDError, match="--kd-temperature") as e:
        session.attach(
            online(kd_teacher_cache_dir=str(tmp_path / "cache"), **changes), model
        )
    assert f"loss is at {temperature:g}" in str(e.value)
    assert "\n" not in str(e.value)
    assert hooks_of(model) == [] and at_exit == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("keep", ["topp:3", "none", "", "top:0"])
def test_a_form_that_no_cache_keeps_is_refused(
    make_model, online, tmp_path, at_exit, keep
):
    model = make_model(vocab_size=25)
    with pytest.raises(KDError):
        session.attach(
            online(kd_teacher_cache_dir=str(tmp_path / "cache"), kd_teacher_keep=keep),
            model,
        )
    assert hooks_of(model) == []


def test_a_dense_cache_serves_any_temperature(cached, tmp_path):
    finish, *args = cached(temperature=3.0)
    finish(*args)
    assert Fingerprint.read(tmp_path / "cache").ctc == "dense"


def test_a_teacher_of_another_vocabulary_is_refused(make_model, online):
    with pytest.raises(KDError, match="student's vocab_size is 11 and .* is 25"):
        session.attach(online(vocab_size=11), make_model())


def test_a_cache_without_a_teacher_is_refused(make_model, make_params):
    with pytest.raises(KDError, match="there is no teacher to run"):
        session.attach(make_params(kd_teacher_cache_dir="x"), make_model())


# The transducer's term


def rnnt_step(model, make_params, cuts, **changes):
    """One training step with stored lattices; the labels are those of recipe_loss."""
    session.attach(make_params(ctc=0.0, kd_rnnt_weight=0.5, **changes), model)
    dataset = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    batch, info = dataset[cuts], MetricsTracker()
    session.begin(batch)
    loss = session.joint_loss(recipe_loss(model, batch), info, model, batch)
    loss.backward()
    return dict(info)


@pytest.mark.parametrize(
    "lattice, changes",
    [
        ("dense", {}),
        ("adaptive:0.99:9@2", {}),
        ("collapsed", {"temperature": 1.0}),
        ("path:dense", {"kd_rnnt_shift": 1}),
    ],
)
def test_stored_lattices_teach_the_transducer(
    make_model, make_params, with_lattices, lattice, changes
):
    model = make_model().train()
    info = rnnt_step(model, make_params, with_lattices(lattice), **changes)
    assert info["kd_rnnt_loss"] > 0.1 and "kd_ctc_loss" not in info
    assert model.joiner.output_linear.weight.grad.abs().max() > 0


def test_the_teachers_ranges_save_the_second_pass_of_the_joiner(
    make_model, make_params, with_lattices
):
    cuts, found = with_lattices("dense"), {}
    for guided in (0, 1):
        model, calls = make_model().train(), []
        layer = model.joiner.output_linear
        layer.register_forward_hook(lambda *_, c=calls: c.append(1))
        random.seed(1)
        torch.manual_seed(1)
        changes = {"kd_stored_ranges": guided, "kd_full_sum_weight": 0.1}
        info = rnnt_step(model, make_params, cuts, temperature=1.0, **changes)
        found[guided] = info["kd_rnnt_loss"], info["kd_full_sum_loss"], len(calls)
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-4)
    assert (found[0][2], found[1][2]) == (2, 1) and found[1][0] > 0.1


def test_the_teachers_ranges_want_stored_lattices(make_model, make_params, online):
    with pytest.raises(KDError, match="no term reads lattices.*--keep-lattice"):
        session.attach(make_params(kd_stored_ranges=True), make_model())
    params = online(ctc=0.0, kd_rnnt_weight=1.0, kd_stored_ranges=True)
    with pytest.raises(KDError, match="the teacher runs in the training process"):
        session.attach(params, make_model(vocab_size=25))


@pytest.mark.parametrize(
    "lattice, changes, match",
    [
        ("collapsed", {}, "--kd-temperature 1, or .* form dense"),
        ("top:3", {}, "--kd-temperature 1, or dump them in the form dense"),
        ("collapsed", {"kd_rnnt_form": "mean_u", "temperature": 1.0}, "means over all"),
        ("top:3@2", {"kd_rnnt_form": "mean_u"}, "as top:3@2, .* means over all"),
        ("dense", {"kd_ctc_weight": 1.0}, "keeps no CTC targets.*--keep dense"),
    ],
)
def test_lattices_that_do_not_fit_the_loss_are_refused(
    make_model, make_params, with_lattices, lattice, changes, match
):
    cuts = with_lattices(lattice)
    with pytest.raises(KDError, match=match):
        rnnt_step(make_model().train(), make_params, cuts, **changes)


def test_a_store_without_lattices_is_refused(make_model, make_params, cuts):
    with pytest.raises(KDError, match="keeps no lattices.*--keep-lattice collapsed"):
        rnnt_step(make_model().train(), make_params, cuts)


def test_an_online_teacher_teaches_the_transducer(
    make_model, online, make_cut, teacher_exp
):
    """The labels of its lattice are those of the batch's texts."""
    sp = load_tokenizer(teacher_exp.bpe_model)
    texts = ["ab ba", "b", "a"]
    cuts = []
    for name, n, text in zip("abc", (61, 47, 33), texts):
        cut = make_cut(name, n)
        (supervision,) = cut.supervisions
        supervision.text = text
        cuts.append(cut)
    model = make_model(vocab_size=25).train()
    params = online(
        ctc=0.0,
        kd_rnnt_weight=0.5,
        bpe_model=str(teacher_exp.bpe_model),
        kd_teacher_s_range=3,
    )
    session.attach(params, model)
    dataset = session.wrap_dataset(K2SpeechRecognitionDataset(), Untouchable())
    batch, info = dataset[CutSet.from_cuts(cuts)], MetricsTracker()
    supervisions = batch["supervisions"]
    simple, pruned, ctc, *_ = model(
        x=batch["inputs"],
        x_lens=supervisions["num_frames"],
        y=sp.encode(supervisions["text"], out_type=int),
        prune_range=3,
    )
    loss = session.joint_loss(simple + pruned + ctc, info, model, batch)
    loss.backward()
    assert info["kd_rnnt_loss"] > 0.1
    assert model.decoder.embedding.weight.grad.abs().max() > 0


# Cuts at the edges


@pytest.fixture
def long_cuts(make_cut):
    """Cuts of which the second is longer than its supervision, and not the longest."""
    cuts = [make_cut("c1", 150), make_cut("c2", 93), make_cut("c3", 33)]
    cuts[1].supervisions[0].duration = 0.61
    return cuts


def test_student_and_stored_teacher_hear_as_many_frames(
    make_model, make_params, long_cuts, make_fingerprint, tmp_path
):
    from icefall_kd.targets import TargetWriter
    from icefall_kd.targets.model_input import collate_input

    manifest = tmp_path / "kd.jsonl.gz"
    with (
        TargetWriter(manifest, tmp_path / "kd", make_fingerprint()) as writer,
        ModelTap(make_model(seed=5)) as hook,
    ):
        for cut in long_cuts:
            writer.write(cut, hook.encode(*collate_input([cut])).ctc_logits[0])
    cuts = load_manifest(manifest).to_eager()
    model = make_model().train()
    session.attach(make_params(), model)
    dataset = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    batch, info = dataset[cuts], MetricsTracker()
    assert batch["kd_targets"].lens.tolist() == [36, 14, 7]
    loss = session.joint_loss(recipe_loss(model, batch), info, model, batch)
    assert torch.isfinite(loss) and info["kd_frames"] == 36 + 14 + 7


@pytest.mark.parametrize("count, remedy", [(0, "give it one"), (2, "trim-to-superv")])
@pytest.mark.parametrize("where", ["start", "batch"])
def test_a_cut_of_no_supervision_or_two_is_refused(
    make_model, make_params, online, cuts, bpe_models, count, remedy, where
):
    """At the start; of an online teacher, which reads no cuts there, in its batch."""
    cuts = cuts.to_eager()
    cuts["c2"].supervisions = count * cuts["c2"].supervisions
    said = f"the cut c2 has {count} supervisions.*{remedy}"
    dataset = K2SpeechRecognitionDataset()
    if where == "start":
        session.attach(make_params(), make_model())
        with pytest.raises(KDError, match=said):
            session.wrap_dataset(dataset, cuts)
        return
    params = online(bpe_model=str(bpe_models.a))
    session.attach(params, make_model(vocab_size=25))
    dataset = session.wrap_dataset(dataset, cuts)
    with pytest.raises(KDError, match=said):
        dataset[CutSet.from_cuts([cuts["c2"]])]

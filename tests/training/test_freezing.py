"""--kd-freeze in a recipe's training, in one process and in two."""

import argparse
import copy
import os
import pickle
import random
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from calm_model import calm
from lhotse.dataset import K2SpeechRecognitionDataset
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel as DDP
from zipformer.bin.train import get_model
from zipformer.modules import model as zipformer_model
from zipformer.modules.optim import ScaledAdam
from zipformer.utils import MetricsTracker, get_parameter_groups_with_lrs

from icefall_kd.errors import KDError
from icefall_kd.rnnt import get_engine
from icefall_kd.targets import TargetDataset
from icefall_kd.training import session
from icefall_kd.training.clock import EpochClock

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "digits" / "ASR" / "zipformer"
TOO_LONG = timedelta(seconds=600)  # a process that waits for ever fails by then
ALL = slice(0, 4)


def bits(tensors):
    """Floats as they are in memory: 0 and -0 differ."""
    return {n: x.detach().clone().view(torch.int32) for n, x in tensors}


def equal(a, b, prefix):
    """Which tensors of a part are equal, bit for bit."""
    found = {torch.equal(a[n], b[n]) for n in a if n.startswith(prefix)}
    assert found
    return found


def recipe_loss(model, batch):
    simple, pruned, ctc, *_ = model(
        x=batch["inputs"],
        x_lens=batch["supervisions"]["num_frames"],
        y=[[3, 4, 3], [5, 6], [7]],
        prune_range=3,
    )
    return 0.5 * simple + pruned + 0.2 * ctc


class Untouchable:
    """Cuts that nobody may look at."""

    def __iter__(self):
        raise AssertionError("the cuts were read")


# A session


@pytest.fixture
def cuts(make_cut, make_store):
    """Cuts that carry targets."""
    return make_store([make_cut("c1", 47), make_cut("c2", 61), make_cut("c3", 33)])


def test_without_the_option_nothing_is_built(make_model, make_params, monkeypatch):
    monkeypatch.setattr(EpochClock, "__init__", Untouchable.__iter__)
    model = make_model()
    session.attach(make_params(ctc=0.0), model)
    assert session.current() is None
    assert not model._forward_pre_hooks


def test_parts_freeze_without_distillation(make_model, make_params, cuts):
    model = make_model().train()
    session.attach(make_params(ctc=0.0, kd_freeze="encoder_embed decoder:2"), model)
    assert session.current().distillation is None
    dataset = K2SpeechRecognitionDataset()
    assert session.wrap_dataset(dataset, Untouchable()) is dataset  # whole epochs
    batch, info = dataset[cuts], MetricsTracker()
    loss = recipe_loss(model, batch)
    assert session.joint_loss(loss, info, model, batch) is loss
    assert dict(info) == {} and not [m for m in model.modules() if m._forward_hooks]
    loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert "joiner.output_linear.weight" in grads
    assert not [n for n in grads if n.startswith(("encoder_embed", "decoder"))]


def test_parts_freeze_with_the_first_training_batch_and_not_before(
    make_model, make_params, cuts
):
    """The recipe builds its optimizer, and may leave out what takes no gradient."""
    model = make_model().eval()
    parameters = list(model.parameters())
    session.attach(make_params(ctc=0.0, kd_freeze="decoder"), model)
    assert all(p.requires_grad for p in model.parameters())
    batch = K2SpeechRecognitionDataset()[cuts]
    with torch.no_grad():
        loss = recipe_loss(model, batch)
        session.joint_loss(loss, MetricsTracker(), model, batch)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.train()
    recipe_loss(model, batch)
    assert not any(p.requires_grad for p in model.decoder.parameters())


def test_with_distillation_batches_are_counted_once(make_model, make_params, cuts):
    """3 of 3 cuts are the epoch: with a count of 6, or of 0, all of this shifts."""
    model = make_model().train()
    params = make_params(
        ctc=0.5, kd_freeze="decoder:1.5", cur_epoch=1, num_epochs=3, batch_idx_train=0
    )
    session.attach(params, model)
    clock, freezing = session.current().clock, session.current().freezing
    assert freezing.clock is clock
    session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    assert clock.cuts_per_epoch == 3
    clock.cuts_per_epoch = 9
    batch, trains = TargetDataset(K2SpeechRecognitionDataset())[cuts], []
    for epoch in (1, 1, 1, 2, 2, 2):
        params.cur_epoch, info = epoch, MetricsTracker()
        params.batch_idx_train += 1
        loss = recipe_loss(model, batch)
        trains.append(model.decoder.embedding.weight.requires_grad)
        session.joint_loss(loss, info, model, batch).backward()
        assert info["kd_ctc_loss"] > 0
    assert trains == 5 * [False] + [True]
    assert clock.cuts_seen == 9 and freezing.thawed == {"decoder:1.5": 6}


def test_for_a_part_of_an_epoch_the_cuts_are_counted(make_model, make_params, cuts):
    session.attach(make_params(ctc=0.0, kd_freeze="decoder:0.5"), make_model())
    dataset = K2SpeechRecognitionDataset()
    assert session.wrap_dataset(dataset, cuts) is dataset
    assert session.current().clock.cuts_per_epoch == 3


def test_batches_before_the_first_epoch_thaw_nothing(make_model, make_params, cuts):
    """icefall tries the largest batches first."""
    model = make_model().train()
    params = make_params(ctc=0.0, kd_freeze="decoder:0.5 joiner:1", start_epoch=1)
    session.attach(params, model)
    session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
    batch = K2SpeechRecognitionDataset()[cuts]
    for _ in range(3):
        loss = recipe_loss(model, batch)
        session.joint_loss(loss, MetricsTracker(), model, batch).backward()
        assert not any(p.requires_grad for p in model.decoder.parameters())
    params["cur_epoch"] = 2
    recipe_loss(model, batch)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "ctc, words", [(0.0, "frontend"), (0.5, "frontend"), (-1.0, "decoder")]
)
def test_a_refusal_leaves_nothing_behind(make_model, make_params, ctc, words):
    model = make_model()
    with pytest.raises(KDError, match=words if ctc >= 0 else "--kd-ctc-weight"):
        session.attach(make_params(ctc=ctc, kd_freeze=words), model)
    assert session.current() is None
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert all(p.requires_grad for p in model.parameters())


def test_attaching_again_thaws_what_was_frozen(make_model, make_params, cuts):
    model = make_model().train()
    parameters = list(model.parameters())
    session.attach(make_params(ctc=0.0, kd_freeze="decoder"), model)
    recipe_loss(model, K2SpeechRecognitionDataset()[cuts])
    assert not all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    session.attach(make_params(ctc=0.0), model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert session.current() is None and not model._forward_pre_hooks


def test_a_copy_of_the_model_runs_and_freezes_nothing(make_model, make_params, cuts):
    model = make_model().train()
    session.attach(make_params(ctc=0.0, kd_freeze="decoder:1"), model)
    batch = K2SpeechRecognitionDataset()[cuts]
    recipe_loss(model, batch)
    assert recipe_loss(copy.deepcopy(model), batch) > 0
    assert session.current().freezing.freezer.model is model


# The digits recipe's own training


class Loader:
    """Ten cuts in five batches, the same in each epoch."""

    def __init__(self, dataset, cuts, done):
        self.dataset, self.cuts, self.sampler, self.done = dataset, cuts, self, done

    def set_epoch(self, epoch):
        pass

    def state_dict(self):
        return {"done": self.done}

    def __iter__(self):
        while self.done < 5:
            self.done += 1
            yield self.dataset[self.cuts.subset(first=2 * self.done).subset(last=2)]
        self.done = 0


@pytest.fixture
def train_recipe(make_cut, make_settings, bpe_models, tmp_path, monkeypatch):
    """Run the recipe's train.py; return all checkpoints of its folder."""
    from lhotse import CutSet

    words = ("one", "two", "zero")
    cuts = CutSet.from_cuts(
        make_cut(f"c{i}", 53 + 3 * i, text=words[i % 3]) for i in range(10)
    )
    monkeypatch.syspath_prepend(str(RECIPE))
    import train

    class Data:
        def __init__(self, args):
            pass

        def train_cuts(self):
            return cuts

        def dev_cuts(self):
            return cuts.subset(first=1)

        def train_dataloaders(self, cuts, sampler_state_dict=None):
            dataset = K2SpeechRecognitionDataset(return_cuts=True)
            done = (sampler_state_dict or {"done": 0})["done"]
            return Loader(session.wrap_dataset(dataset, cuts), cuts, done % 5)

        def valid_dataloaders(self, cuts):
            return [K2SpeechRecognitionDataset(return_cuts=True)[cuts]]

    monkeypatch.setattr(train, "AsrDataModule", Data)
    monkeypatch.setattr(train, "setup_logger", lambda path: None)
    exp = tmp_path / "exp"
    exp.mkdir()

    def run(*options):
        args = train.get_parser().parse_args([*options, "--exp-dir", str(exp)])
        small = {k: v for k, v in make_settings().items() if hasattr(args, k)}
        given = {o[2:].replace("-", "_") for o in options[::2]}
        vars(args).update({k: v for k, v in small.items() if k not in given})
        args.bpe_model, args.tensorboard, args.num_threads = str(bpe_models.a), 0, 1
        args.average_period, args.max_duration = 5, 2
        train.run(0, 1, args)
        return checkpoints()

    def checkpoints():
        found = {}
        for path in exp.glob("*-[0-9]*.pt"):
            saved = torch.load(path, map_location="cpu", weights_only=False)
            found[path.stem] = SimpleNamespace(**saved)
        return found

    run.exp = exp
    return run


def parts(checkpoint):
    return bits((n, x) for n, x in checkpoint.model.items() if x.dtype == torch.float32)


def test_50_steps_of_the_recipe_leave_frozen_parts_as_they_began(train_recipe):
    """The joiner thaws in the seventh epoch: 6 of 10 cuts are done before step 34."""
    saved = train_recipe(
        *("--kd-freeze", "encoder_embed encoder.0 decoder:4 joiner:6.5"),
        *("--num-epochs", "10", "--save-every-n", "1", "--keep-last-k", "60"),
    )
    assert len(saved) == 60 and saved["epoch-10"].batch_idx_train == 50
    after = [parts(saved[f"checkpoint-{step}"]) for step in range(1, 51)]
    for step, now in enumerate(after[1:], 2):
        for prefix, last in (
            ("encoder_embed.", 50),
            ("encoder.encoders.0.", 50),
            ("decoder.", 20),
            ("joiner.", 33),
        ):
            moved = False in equal(after[step - 2], now, prefix)
            assert moved == (step > last), (prefix, step)
        assert False in equal(after[step - 2], now, "encoder.encoders.1.")
        assert False in equal(after[step - 2], now, "ctc_output.")
    kept = torch.load(train_recipe.exp / "kd.pt")
    assert kept["first_epoch"] == 1
    assert kept["thawed"] == {"decoder:4": 21, "joiner:6.5": 34}


def test_averaged_models_have_frozen_parts_up_to_rounding(train_recipe):
    """icefall's average multiplies float32 values, so the last bits may differ."""
    from zipformer.utils import average_checkpoints_with_averaged_model as average

    frozen = "encoder_embed."
    saved = train_recipe("--kd-freeze", "encoder_embed", "--num-epochs", "4")
    paths = [str(train_recipe.exp / f"epoch-{n}.pt") for n in (2, 4)]
    for averaged, bound in (
        (saved["epoch-4"].model_avg, 3e-7),
        (average(*paths), 1e-6),
    ):
        for name, value in saved["epoch-1"].model.items():
            if name.startswith(frozen):
                assert torch.allclose(averaged[name].float(), value, bound, 0), name
    trained = "encoder.encoders.1.encoder.layers.0.norm.bias"
    assert not torch.allclose(
        saved["epoch-4"].model_avg[trained].float(),
        saved["epoch-1"].model[trained],
        1e-4,
    )


def test_a_training_goes_on_with_what_thawed(train_recipe):
    """The decoder thaws before step 4, in a training from step 3 as well."""
    options = ("--kd-freeze", "encoder_embed decoder:0.5", "--save-every-n", "1")
    train_recipe(*options, "--num-epochs", "1")
    assert torch.load(train_recipe.exp / "kd.pt")["thawed"] == {"decoder:0.5": 4}
    saved = train_recipe(*options, "--num-epochs", "1", "--start-batch", "4")
    before, after = parts(saved["checkpoint-4"]), parts(saved["checkpoint-5"])
    assert False in equal(before, after, "decoder.")
    assert equal(before, after, "encoder_embed.") == {True}
    saved = train_recipe(*options, "--num-epochs", "2", "--start-batch", "3")
    before, after = parts(saved["checkpoint-3"]), parts(saved["checkpoint-4"])
    assert False in equal(before, after, "decoder.")
    assert torch.load(train_recipe.exp / "kd.pt")["thawed"] == {"decoder:0.5": 4}
    saved = train_recipe(*options, "--num-epochs", "3", "--start-epoch", "3")
    before, after = parts(saved["epoch-2"]), parts(saved["epoch-3"])
    assert False in equal(before, after, "decoder.")
    assert equal(before, after, "encoder_embed.") == {True}
    assert saved["epoch-3"].batch_idx_train == 15


def test_a_part_may_freeze_where_a_training_goes_on_and_thaw_again(train_recipe):
    """The optimizer's momentum of the first epoch would move it."""
    train_recipe("--num-epochs", "1")
    saved = train_recipe(
        *("--kd-freeze", "encoder_embed decoder:1"),
        *("--num-epochs", "3", "--start-epoch", "2"),
    )
    one, two, three = (parts(saved[f"epoch-{n}"]) for n in (1, 2, 3))
    assert equal(one, two, "encoder_embed.") == equal(one, three, "encoder_embed.")
    assert equal(one, three, "encoder_embed.") == {True}
    assert equal(one, two, "decoder.") == {True}
    assert False in equal(one, three, "decoder.")
    saved = train_recipe("--num-epochs", "4", "--start-epoch", "4")
    assert False in equal(one, parts(saved["epoch-4"]), "encoder_embed.")


# Two processes


def build(given):
    zipformer_model.k2 = get_engine()
    model = get_model(given.settings)
    model.load_state_dict(given.state)
    return model.double()


def supervised(given, rows):
    """A batch as a recipe has it, and what its model takes."""
    x_lens = given.x_lens[rows]
    batch = {"supervisions": {"text": [""] * len(x_lens), "num_frames": x_lens}}
    return batch, {"x": given.x[rows], "x_lens": x_lens, "y": given.y[rows]}


def of_model(model, inputs):
    simple, pruned, ctc, *_ = model(**inputs, prune_range=3)
    return 0.5 * simple + pruned + 0.2 * ctc


def learn(given, rows=ALL, parallel=False):
    """The gradients of a batch in the first epoch, and in the second one."""
    model, params = calm(build(given)), copy.deepcopy(given.params)
    wrapped = DDP(model, find_unused_parameters=True) if parallel else model
    session.attach(params, wrapped)
    found = []
    for params["cur_epoch"] in (1, 2):
        batch, inputs = supervised(given, rows)
        loss = of_model(wrapped, inputs)
        session.joint_loss(loss, MetricsTracker(), wrapped, batch).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
        for p in model.parameters():
            p.grad = None
    session.attach(dict(params, kd_freeze=""), wrapped)
    return found


def train_apart(given, rank):
    """12 batches of the recipe, of one cut in one process and three in the other."""
    random.seed(rank)
    torch.manual_seed(rank)
    model, params = build(given).float().train(), copy.deepcopy(given.params)
    params["kd_freeze"] = "encoder_embed decoder:0.5 joiner:1 encoder.0:1.25"
    wrapped = DDP(model, find_unused_parameters=True)
    session.attach(params, wrapped)
    session.current().clock.cuts_per_epoch = 16
    groups = get_parameter_groups_with_lrs(wrapped, lr=0.02, include_names=True)
    optimizer = ScaledAdam(groups, lr=0.02, clipping_scale=2.0)
    batch, inputs = supervised(given, (slice(0, 1), slice(1, 4))[rank])
    inputs["x"] = inputs["x"].float()
    before, trains = bits(model.named_parameters()), []
    for step in range(12):
        params["cur_epoch"] = 1 + step // 8
        params["batch_idx_train"] = step + 1
        loss = of_model(wrapped, inputs)
        session.joint_loss(loss, MetricsTracker(), wrapped, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        trains.append(
            {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
            | {n[:18] for n, p in model.named_parameters() if p.requires_grad}
        )
    after = bits(model.named_parameters())
    session.attach(dict(params, kd_freeze=""), wrapped)
    return {"trains": trains, "before": before, "after": after}


def process(rank, given, folder):
    given = pickle.loads(given)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    group = {"init_method": f"file://{folder}/group", "timeout": TOO_LONG}
    dist.init_process_group("gloo", rank=rank, world_size=2, **group)
    rows = slice(2 * rank, 2 * rank + 2)
    found = {
        "gradients": learn(given, rows, parallel=True),
        "trained": train_apart(given, rank),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def given(make_model, make_settings):
    """A batch of four and a student, of which half is frozen."""
    parser = argparse.ArgumentParser()
    session.add_arguments(parser)
    frozen = "encoder.0 decoder:1 joiner:1"
    kd = vars(parser.parse_args(["--kd-freeze", frozen]))
    x = torch.randn(4, 61, 20, generator=torch.Generator().manual_seed(1)).double()
    return SimpleNamespace(
        x=x,
        x_lens=torch.tensor([61, 42, 35, 61]),  # both halves are padded to 61
        y=[[3, 4, 3], [5, 6], [7], [4, 8, 2]],
        settings=make_settings(),
        params=make_settings(**kd, cur_epoch=1, start_epoch=1, num_epochs=2),
        state=make_model(seed=2).state_dict(),
    )


@pytest.fixture(scope="module")
def two(given, tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(process, (pickle.dumps(given), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_have_the_gradients_of_one_before_and_after_a_thaw(given, two):
    """DDP takes the mean over processes of gradients of sums: half the sum."""
    one = learn(given)
    thawing = ("decoder.", "joiner.")
    for frozen, found in (((*thawing, "encoder.encoders.0."), 0), (thawing, 1)):
        for name, grad in one[found].items():
            for of_rank in two:
                other = of_rank["gradients"][found][name]
                if grad is None:
                    assert other is None, name
                else:
                    bound = 1e-6 * float(grad.abs().max())
                    assert torch.allclose(2 * other, grad, rtol=0, atol=bound), name
            if name.startswith("encoder.encoders.0.") or not found:
                assert grad is None or not name.startswith(frozen), name
    for name in one[0]:
        if name.startswith(thawing):
            assert one[0][name] is None and one[1][name].abs().max() > 0, name


def test_processes_thaw_in_the_same_batch_and_stay_together(two):
    """Of 16 cuts one counts 2 a batch and the other 6: the first one's count holds."""
    first, second = (found["trained"] for found in two)
    assert first["trains"] == second["trains"]
    for part, begin in (
        ("decoder", 4),
        ("joiner", 8),
        ("encoder.encoders.0", 10),
        ("encoder_embed", 12),
    ):
        trained = [part in names for names in first["trains"]]
        assert trained == begin * [False] + (12 - begin) * [True], part
    for name, value in first["after"].items():
        assert torch.equal(value, second["after"][name]), name
    for found in (first, second):
        assert equal(found["before"], found["after"], "encoder_embed.") == {True}
        assert False in equal(found["before"], found["after"], "encoder.encoders.0.")

"""Two processes with half of a batch each learn what one learns of the whole batch."""

import argparse
import os
import pickle
import random
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from calm_model import calm
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel as DDP
from zipformer.bin.train import get_model
from zipformer.modules import model as zipformer_model
from zipformer.utils import MetricsTracker

from icefall_kd import JointKDLoss, ModelTap
from icefall_kd.errors import KDError
from icefall_kd.rnnt import get_engine
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.terms import (
    CtcTerm,
    FullSumTerm,
    HiddenTerm,
    NbestTerm,
    SimpleTerm,
    TransducerTerm,
)
from icefall_kd.training import session
from icefall_kd.types import Targets

LAYERS = "out,0:1"  # of other widths than the student's: each has a projector
TERMS = ("ctc", "simple", "rnnt", "full_sum", "hidden", "nbest")
WEIGHTS = dict(zip(TERMS, (0.7, 0.5, 0.3, 0.2, 0.6, 0.4)))
FALLING = "0:0.9,0.5:0"  # 0.9 where an epoch begins, 0 from its middle on
SEEN = (0.0, 0.6)  # epochs that each process takes to be done
ALL = slice(0, 4)
TOO_LONG = timedelta(seconds=600)  # a process that waits for ever fails by then


def rows_of(rank):
    """The rows of the batch of four that a process has."""
    return slice(2 * rank, 2 * rank + 2)


def part(targets, rows):
    """The targets of some rows of a batch."""
    parts = targets.parts
    nodes = parts.get("nodes")
    if nodes is not None:
        nodes = nodes.select((nodes.row >= rows.start) & (nodes.row < rows.stop))
        nodes = replace(nodes, row=nodes.row - rows.start)
    return Targets(
        targets.lens[rows],
        targets.mask[rows],
        targets.whole[rows],
        {
            "ctc": parts["ctc"][rows],
            "simple": parts["simple"][rows],
            "nodes": nodes if nodes is not None and len(nodes) else None,
            "hidden": {layer: x[rows] for layer, x in parts["hidden"].items()},
            "nbest": parts["nbest"][rows],
        },
    )


def without_the_second_half(targets):
    """The teacher said nothing of it: NaN stands there."""
    parts = targets.parts
    targets = replace(
        targets,
        lens=targets.lens * torch.tensor([1, 1, 0, 0]),
        mask=targets.mask & torch.tensor([True, True, False, False])[:, None],
        whole=torch.tensor([True, True, False, False]),
        parts={
            "ctc": parts["ctc"].clone(),
            "simple": parts["simple"].clone(),
            "nodes": parts["nodes"].select(parts["nodes"].row < 2),
            "hidden": {layer: x.clone() for layer, x in parts["hidden"].items()},
            "nbest": [*parts["nbest"][:2], [], []],
        },
    )
    parts = targets.parts
    for x in (parts["ctc"], parts["simple"], *parts["hidden"].values()):
        x[2:] = torch.nan
    return targets


def nothing():
    """Targets of two cuts that have none, as the data module collates them."""
    no = torch.tensor([False, False])
    lens, mask = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 0) > 0
    return Targets(lens, mask, no, {"nbest": []})


def build(given):
    """The student; in float64, so that the order of a sum is below what is compared."""
    zipformer_model.k2 = get_engine()
    model = get_model(given.settings)
    model.load_state_dict(given.state)
    return model.double()


def recipe_loss(model, batch):
    simple, pruned, ctc, *_ = model(**batch, prune_range=3)
    return 0.5 * simple + pruned + 0.2 * ctc


def learn(given, targets, weights, rows=ALL, epoch=0.0, parallel=False):
    """The gradients of one batch, and what was logged of it."""
    model = calm(build(given), training=False)
    hidden = HiddenTerm(weights.get("hidden", 0.0), LAYERS)
    projectors = hidden.projectors
    projectors.read_widths(given.targets.parts["hidden"])
    terms = [
        CtcTerm(weights.get("ctc", 0.0), temperature=2.0),
        SimpleTerm(weights.get("simple", 0.0), temperature=2.0),
        TransducerTerm(weights.get("rnnt", 0.0), temperature=2.0),
        FullSumTerm(weights.get("full_sum", 0.0)),
        hidden,
        NbestTerm(weights.get("nbest", 0.0)),
    ]
    joint = JointKDLoss(terms, hard_weight=0.3)
    wrapped = DDP(model, find_unused_parameters=True) if parallel else model
    hook = ModelTap(model, hidden.student_layers, with_decoder=True, with_simple=True)
    batch = {"x": given.x[rows], "x_lens": given.x_lens[rows], "y": given.y[rows]}
    loss = recipe_loss(wrapped, batch)
    loss, info = joint(loss, hook.take(), targets, model, epoch=epoch)
    loss.backward()
    projectors.reduce()
    return {
        "model": {n: p.grad for n, p in model.named_parameters()},
        "projectors": {n: p.grad for n, p in projectors.modules.named_parameters()},
        "info": info,
        "keys": [*wrapped.state_dict()],
    }


def train(given, rank):
    """Six batches of the recipe, of one cut in one process and three in the other."""
    random.seed(rank)
    torch.manual_seed(rank)
    model = build(given).train()
    wrapped = DDP(model, find_unused_parameters=True)
    session.attach(given.params, wrapped)
    session.current().clock.cuts_per_epoch = 12
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rows = (slice(0, 1), slice(1, 4))[rank]
    batch = {"x": given.x[rows], "x_lens": given.x_lens[rows], "y": given.y[rows]}
    supervisions = {"text": [""] * len(batch["y"]), "num_frames": batch["x_lens"]}
    kd_batch = {"supervisions": supervisions, "kd_targets": part(given.targets, rows)}
    infos = []
    for _ in range(6):
        info = MetricsTracker()
        loss = recipe_loss(wrapped, batch)
        loss = session.joint_loss(loss, info, wrapped, kd_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        infos.append(dict(info))
    hidden = session.current().distillation.joint.projectors
    hidden.step()
    return {
        "infos": infos,
        "model": {n: p.detach() for n, p in model.named_parameters()},
        "projectors": {n: p.detach() for n, p in hidden.modules.named_parameters()},
    }


def process(rank, given, folder):
    given = pickle.loads(given)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    group = {"init_method": f"file://{folder}/group", "timeout": TOO_LONG}
    dist.init_process_group("gloo", rank=rank, world_size=2, **group)
    rows = rows_of(rank)
    some, falling = part(given.targets, rows), dict.fromkeys(TERMS, FALLING)
    found = {
        "all": learn(given, some, WEIGHTS, rows, parallel=True),
        "bare": learn(given, nothing() if rank else some, WEIGHTS, rows, parallel=True),
        "weights": learn(given, some, falling, rows, SEEN[rank], parallel=True),
        "trained": train(given, rank),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def given(make_model, make_settings):
    """A batch, what a teacher says on it, and a student."""
    x = torch.randn(4, 61, 20, generator=torch.Generator().manual_seed(1)).double()
    x_lens = torch.tensor([61, 42, 35, 61])  # both halves are padded to 61
    y = [[3, 4, 3], [5, 6], [7], [4, 8, 2]]
    wide = {"encoder_dim": "20,32", "encoder_unmasked_dim": "12,16"}
    teacher = Teacher([make_model(seed=1, **wide)], layers=["out", 0], with_simple=True)
    targets = teacher.targets(x.float(), x_lens, y=y, s_range=3)
    targets.parts["nbest"] = [
        [(y[0], -1.0), ([3, 4], -1.5)],
        [([5], -0.3)],
        [],
        [(y[3], -2.0)],
    ]
    parser = argparse.ArgumentParser()
    session.add_arguments(parser)
    words = ["--kd-hard-weight=0"]
    words += [f"--kd-{n.replace('_', '-')}-weight={FALLING}" for n in TERMS[:-1]]
    kd = vars(parser.parse_args([*words, "--kd-hidden-layers", LAYERS]))
    return SimpleNamespace(
        x=x,
        x_lens=x_lens,
        y=y,
        targets=targets,
        settings=make_settings(),
        params=make_settings(**kd, cur_epoch=1, enable_spec_aug=False),
        state=make_model(seed=2).state_dict(),
    )


@pytest.fixture(scope="module")
def two(given, tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(process, (pickle.dumps(given), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def compare(found, expected, factor=2):
    """DDP takes the mean over processes of gradients of sums: half the sum."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:  # a parameter of training mode alone
            assert found[name] is None, name
            continue
        bound = 1e-6 * float(grad.abs().max())
        assert torch.allclose(factor * found[name], grad, rtol=0, atol=bound), name


def test_two_halves_have_the_gradients_of_the_whole_batch(given, two):
    one = learn(given, given.targets, WEIGHTS)
    for of_rank in two:
        compare(of_rank["all"]["model"], one["model"])
        compare(of_rank["all"]["projectors"], one["projectors"])
    for name, value in one["info"].items():
        assert value > 0.1
        parts = sum(of_rank["all"]["info"][name] for of_rank in two)
        assert parts == pytest.approx(value, rel=1e-6), name


def test_a_process_without_targets_changes_nothing(given, two):
    """Neither for the other one, which has them, nor for itself."""
    one = learn(given, without_the_second_half(given.targets), WEIGHTS)
    for of_rank in two:
        compare(of_rank["bare"]["model"], one["model"])
        compare(of_rank["bare"]["projectors"], one["projectors"])
    assert two[0]["bare"]["info"] == two[0]["all"]["info"]
    assert set(two[1]["bare"]["info"].values()) == {0.0}


def test_a_weight_may_be_0_in_one_process_alone(given, two):
    falling, one = dict.fromkeys(TERMS, FALLING), []
    for rank in (0, 1):
        rows = rows_of(rank)
        some = part(given.targets, rows)
        one.append(learn(given, some, falling, rows, SEEN[rank]))
    values = [found["weights"]["info"].values() for found in two]
    assert min(values[0]) > 0.1 and max(values[1]) == 0
    for found in two:
        for kind in ("model", "projectors"):
            other = one[1][kind]
            sums = {
                n: g if g is None else g + other[n] for n, g in one[0][kind].items()
            }
            compare(found["weights"][kind], sums)


def test_processes_that_see_an_epoch_go_by_at_other_speeds_stay_together(given, two):
    first, second = (found["trained"] for found in two)
    for name in TERMS[:-1]:
        key = f"kd_{name}_weight"
        assert [info[key] > 0 for info in first["infos"]] == 3 * [True] + 3 * [False]
        assert [info[key] > 0 for info in second["infos"]] == [True] + 5 * [False]
    for kind in ("model", "projectors"):
        assert first[kind].keys() == second[kind].keys()
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), name
    for name, value in first["projectors"].items():
        begin = torch.zeros_like(value) if "bias" in name else torch.eye(*value.shape)
        assert not torch.equal(value, begin.to(value)), name


def test_no_checkpoint_has_a_key_of_a_projector(given, two):
    one = learn(given, given.targets, WEIGHTS)
    assert sorted(one["projectors"]) == [
        f"{pair}.{kind}" for pair in ("0-1", "out-out") for kind in ("bias", "weight")
    ]
    assert one["keys"] == [*given.state]
    for found in two:
        assert found["all"]["keys"] == [f"module.{name}" for name in given.state]


def test_a_process_whose_projectors_have_no_widths_is_refused(
    process_group, monkeypatch
):
    """The others would wait for its gradients for ever."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    hidden = HiddenTerm(layers=LAYERS)
    with pytest.raises(KDError, match="read_widths"):
        hidden.prepare(None, nothing())

"""Training with all terms on in half precision: no step is lost to distillation."""

import argparse
import math
import random
from types import SimpleNamespace

import pytest
import torch
from zipformer.bin.train import set_batch_count
from zipformer.modules.optim import ScaledAdam
from zipformer.modules.scaling import ActivationDropoutAndLinear
from zipformer.utils import MetricsTracker, get_parameter_groups_with_lrs

from icefall_kd.rnnt import get_engine
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.training import session

pytestmark = pytest.mark.slow

STEPS = 300
TERMS = ("ctc", "simple", "rnnt", "full_sum", "hidden")
LAYERS = "out,0:1"  # stack 1 is wider than stack 0, so that it has a projector
WORDS = [f"--kd-{name.replace('_', '-')}-weight=0.5" for name in TERMS]
WORDS += ["--kd-hidden-layers", LAYERS, "--kd-temperature=2"]
GradScaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)


def batches():
    """Four of three utterances."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for n in (61, 55, 49, 67):
        x = torch.randn(3, n, 20, generator=generator)
        x_lens = torch.tensor([n, n - 11, n - 26])
        y = torch.randint(2, 11, (6,), generator=generator).tolist()
        made.append({"x": x, "x_lens": x_lens, "y": [y[:3], y[3:5], y[5:]]})
    return made


def has_cuda(engine):
    found = engine.with_cuda  # a function in fast_rnnt, a number in k2
    return bool(found() if callable(found) else found)


def finite(tensors):
    return all(bool(torch.isfinite(x).all()) for x in tensors)


def step_of(model, batch, device, dtype):
    """One batch's loss in autocast, and its terms."""
    x, x_lens = batch["x"].to(device), batch["x_lens"].to(device)
    supervisions = {"text": [""] * len(x), "num_frames": x_lens}
    kd_batch = {"supervisions": supervisions, "kd_targets": batch.get("targets")}
    info = MetricsTracker()
    with torch.autocast(device, dtype=dtype):
        simple, pruned, ctc, *_ = model(x=x, x_lens=x_lens, y=batch["y"], prune_range=3)
        loss = 0.5 * simple + pruned + 0.2 * ctc
        loss = session.joint_loss(loss, info, model, kd_batch)
    return loss, dict(info)


def train(model, params, batches, device="cpu", dtype=torch.bfloat16):
    """Train as the recipe does; say what was logged and which steps were skipped."""
    random.seed(0)
    torch.manual_seed(0)
    model.to(device).train()
    if device == "cpu":  # its own backward pass takes half precision on a GPU alone
        for module in model.modules():
            if isinstance(module, ActivationDropoutAndLinear):
                module.eval()
    session.attach(params, model)
    groups = get_parameter_groups_with_lrs(model, lr=0.045, include_names=True)
    optimizer = ScaledAdam(groups, lr=0.045, clipping_scale=2.0)
    scaler = GradScaler(enabled=dtype == torch.float16, init_scale=1.0)
    found = SimpleNamespace(infos=[], losses=[], skipped=[])
    for step in range(STEPS):
        set_batch_count(model, step)
        loss, info = step_of(model, batches[step % len(batches)], device, dtype)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        parameters = list(model.parameters())
        if finite(p.grad for p in parameters if p.grad is not None):
            scaler.step(optimizer)
        else:
            found.skipped.append(step)
        scaler.update()
        optimizer.zero_grad()
        if params["kd_hidden_weight"]:
            projectors = session.current().distillation.joint.projectors
            parameters += projectors.modules.parameters()
        assert finite(parameters), step
        found.losses.append(float(loss))
        found.infos.append(info)
    return found


@pytest.fixture
def both(make_model, make_settings):
    """A run without distillation, and one that has the first one's model as teacher."""

    def run(**options):
        parser = argparse.ArgumentParser()
        session.add_arguments(parser)
        off, on = (
            make_settings(**vars(parser.parse_args(words)), enable_spec_aug=False)
            for words in ([], WORDS)
        )
        teacher, made = make_model(seed=2), batches()
        without = train(teacher, off, made, **options)
        asked = Teacher([teacher.cpu()], layers=["out", 0], with_simple=True)
        taught = [{**b, "targets": asked.targets(**b, s_range=3)} for b in made]
        return without, train(make_model(seed=2), on, taught, **options)

    return run


def check(without, with_kd):
    assert set(with_kd.skipped) <= set(without.skipped)
    for found in (without, with_kd):
        assert len(found.losses) == STEPS and all(map(math.isfinite, found.losses))
    for name in TERMS:  # over the same batches
        values = [info[f"kd_{name}_loss"] for info in with_kd.infos]
        assert sum(values[-4:]) < 0.5 * sum(values[:4]), name


def test_300_steps_in_bf16_lose_none_to_distillation(both):
    without, with_kd = both()
    check(without, with_kd)
    assert without.skipped == []


def test_300_steps_in_fp16_lose_none_to_distillation(both):
    if not torch.cuda.is_available():
        pytest.skip("fp16 needs a GPU")
    if not has_cuda(get_engine()):
        pytest.skip(f"{get_engine().__name__} was built without CUDA")
    check(*both(device="cuda", dtype=torch.float16))

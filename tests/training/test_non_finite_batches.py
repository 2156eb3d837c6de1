"""A batch that is not finite is, with distillation, what it is in the recipe."""

import math
import random

import pytest
import torch
from zipformer.modules.optim import ScaledAdam
from zipformer.utils import MetricsTracker, get_parameter_groups_with_lrs

from icefall_kd.teacher.teacher import Teacher
from icefall_kd.training import session

TERMS = ("ctc", "rnnt", "full_sum", "hidden")
STEPS = 4
POISONED = 1  # this step's features make the student's output NaN
Scaler = getattr(torch.amp, "GradScaler", None)  # of a CPU too, from torch 2.3 on

needs_scaler = pytest.mark.skipif(Scaler is None, reason="needs torch 2.3's GradScaler")


def train(model, params, batch, targets):
    """A few steps; which of them the scaler skipped, and what was logged."""
    random.seed(0)
    torch.manual_seed(0)
    model.train()
    session.attach(params, model)
    groups = get_parameter_groups_with_lrs(model, lr=0.045, include_names=True)
    optimizer = ScaledAdam(groups, lr=0.045, clipping_scale=2.0)
    scaler = Scaler("cpu", init_scale=1.0)
    skipped, infos = [], []
    for step in range(STEPS):
        x = batch["x"].clone()
        if step == POISONED:
            x[1, 5] = math.inf
        before = [p.detach().clone() for p in model.parameters()]
        simple, pruned, ctc, *_ = model(x=x, **{k: batch[k] for k in ("x_lens", "y")})
        loss = 0.5 * simple + pruned + 0.2 * ctc
        supervisions = {"text": ["a"] * len(x), "num_frames": batch["x_lens"]}
        info = MetricsTracker()
        kd_batch = {"supervisions": supervisions, "kd_targets": targets}
        loss = session.joint_loss(loss, info, model, kd_batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        infos.append(dict(info))
        if all(torch.equal(a, b) for a, b in zip(before, model.parameters())):
            skipped.append(step)
        assert all(torch.isfinite(p).all() for p in model.parameters())
    return skipped, infos


@needs_scaler
def test_the_scaler_skips_its_step_and_training_goes_on(
    make_model, make_params, features, caplog
):
    x, x_lens = features
    batch = {"x": x, "x_lens": x_lens, "y": [[3, 4, 3], [5, 6], [7]]}
    teacher = Teacher([make_model(seed=2)], layers=["out"])
    targets = teacher.targets(**batch, s_range=3)
    off = make_params(ctc=0.0)
    assert train(make_model(seed=3), off, batch, targets)[0] == [POISONED]
    on = {f"kd_{name}_weight": "0.5" for name in TERMS}
    params = make_params(ctc="0.5", **on, kd_hidden_layers="out:out")
    caplog.clear()
    skipped, infos = train(make_model(seed=3), params, batch, targets)
    assert skipped == [POISONED]
    for name in TERMS:
        values = [info[f"kd_{name}_loss"] for info in infos]
        assert values[POISONED] == 0
        assert all(v > 0 for step, v in enumerate(values) if step != POISONED)
    warnings = [m for m in caplog.messages if "left out of this batch" in m]
    assert len(warnings) == 1 and "(1 so far were not finite)" in warnings[0]

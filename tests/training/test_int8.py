"""--kd-int8-from in a recipe's training."""

import logging
import random

import pytest
import torch
import torch.distributed as dist
from lhotse.dataset import K2SpeechRecognitionDataset
from torch.nn.parallel import DistributedDataParallel as DDP
from zipformer.utils import MetricsTracker

from icefall_kd import rounding
from icefall_kd.errors import KDError
from icefall_kd.rounding import SCALES, TENSOR, RoundedLinears
from icefall_kd.targets import TargetDataset
from icefall_kd.training import session


@pytest.fixture
def cuts(make_cut, make_store):
    """Cuts that carry targets."""
    return make_store([make_cut("c1", 47), make_cut("c2", 61), make_cut("c3", 33)])


def loss_of(model, batch, seed=1):
    """The recipe's loss, with the same dropout at each call."""
    random.seed(seed)
    torch.manual_seed(seed)
    simple, pruned, ctc, *_ = model(
        x=batch["inputs"],
        x_lens=batch["supervisions"]["num_frames"],
        y=[[3, 4, 3], [5, 6], [7]],
        prune_range=3,
    )
    return 0.5 * simple + pruned + 0.2 * ctc


def rounded_loss(model, batch, scales=TENSOR):
    linears = RoundedLinears(model, lambda: True, scales)
    loss = loss_of(model, batch)
    linears.close()
    return loss


def test_without_distillation_the_recipes_own_loss_is_that_of_the_rounded_model(
    make_model, make_params, cuts
):
    model, batch = make_model().train(), K2SpeechRecognitionDataset()[cuts]
    plain, expected = loss_of(model, batch), rounded_loss(model, batch)
    session.attach(make_params(ctc=0.0, kd_int8_from="0"), model)
    loss = session.joint_loss(loss_of(model, batch), MetricsTracker(), model, batch)
    assert torch.equal(loss, expected) and not torch.equal(loss, plain)
    loss.backward()
    grads = [p.grad for p in model.joiner.parameters()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads)
    session.detach()
    assert torch.equal(loss_of(model, batch), plain)
    assert not model._forward_pre_hooks


def test_weights_have_the_scales_of_the_option(make_model, make_params, cuts):
    model, batch = make_model().train(), K2SpeechRecognitionDataset()[cuts]
    expected = [rounded_loss(model, batch, scales) for scales in SCALES]
    assert not torch.equal(*expected)
    for scales, loss in zip(SCALES, expected):
        params = make_params(ctc=0.0, kd_int8_from="0", kd_int8_scales=scales)
        session.attach(params, model)
        assert torch.equal(loss_of(model, batch), loss)


def test_scales_that_are_not_known_are_refused(make_model, make_params):
    params = make_params(ctc=0.0, kd_int8_from="0", kd_int8_scales="row")
    with pytest.raises(KDError, match="--kd-int8-scales is 'row', and must be tensor"):
        session.attach(params, make_model())


def test_the_terms_see_the_rounded_student(make_model, make_params, cuts):
    model = make_model().train()
    batch = TargetDataset(K2SpeechRecognitionDataset())[cuts]
    terms = []
    for epochs in ("", "0"):
        session.attach(make_params(ctc=0.7, kd_int8_from=epochs), model)
        info = MetricsTracker()
        session.joint_loss(loss_of(model, batch), info, model, batch).backward()
        terms.append(info["kd_ctc_loss"])
        session.detach()
    assert terms[0] != terms[1] and terms[0] == pytest.approx(terms[1], rel=0.1)


@pytest.mark.parametrize("form", ["nodes", "mean_u"])
def test_the_transducers_nodes_are_of_the_rounded_joiner(
    make_model, make_params, with_lattices, monkeypatch, form
):
    model, cuts = make_model().train(), with_lattices("dense")
    batch, rounded = TargetDataset(K2SpeechRecognitionDataset())[cuts], []
    round_weight = rounding.round_weight
    monkeypatch.setattr(
        rounding,
        "round_weight",
        lambda w, *by_row: rounded.append(w) or round_weight(w, *by_row),
    )
    params = make_params(ctc=0.0, kd_rnnt_weight=1.0, kd_rnnt_form=form)
    session.attach(dict(params, kd_int8_from="0"), model)
    loss = loss_of(model, batch)
    rounded.clear()
    session.joint_loss(loss, MetricsTracker(), model, batch)
    for layer in model.joiner.children():
        assert any(weight is layer.weight for weight in rounded)


def test_in_ddp_the_gradients_are_those_of_the_model_alone(
    make_model, make_params, cuts, tmp_path
):
    batch, grads = K2SpeechRecognitionDataset()[cuts], []
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1
    )
    try:
        for wrap in (lambda m: m, lambda m: DDP(m, find_unused_parameters=True)):
            model = make_model().train()
            wrapped = wrap(model)
            session.attach(make_params(ctc=0.0, kd_int8_from="0"), wrapped)
            loss_of(wrapped, batch).backward()
            named = model.named_parameters()
            grads.append({n: p.grad for n, p in named if p.grad is not None})
    finally:
        dist.destroy_process_group()
    assert "encoder_embed.out.weight" in grads[0]
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_validation_stays_in_float32(make_model, make_params, cuts):
    model, batch = make_model().eval(), K2SpeechRecognitionDataset()[cuts]
    with torch.no_grad():
        plain = loss_of(model, batch)
    session.attach(make_params(ctc=0.0, kd_int8_from="0"), model)
    assert not torch.equal(loss_of(model, batch), plain)
    with torch.no_grad():
        assert torch.equal(loss_of(model, batch), plain)


def test_it_begins_after_so_many_epochs(make_model, make_params, cuts, caplog):
    caplog.set_level(logging.INFO)
    model, dataset = make_model().train(), K2SpeechRecognitionDataset()
    params = make_params(ctc=0.0, kd_int8_from="1.5", start_epoch=1, num_epochs=3)
    session.attach(params, model)
    session.wrap_dataset(dataset, cuts.repeat(2))
    batch, rounds = dataset[cuts], []
    for epoch in (1, 2, 3):
        params["cur_epoch"] = epoch
        for _ in range(2):
            loss = loss_of(model, batch)
            with torch.no_grad():
                rounds.append(not torch.equal(loss, loss_of(model, batch)))
            session.joint_loss(loss, MetricsTracker(), model, batch)
    assert rounds == [False, False, False, True, True, True]
    begun = [r.message for r in caplog.records if "linear layers" in r.message]
    assert len(begun) == 1 and begun[0].startswith("From 1.5 epochs on")


def test_a_training_that_goes_on_counts_from_its_first_epoch(
    make_model, make_params, cuts, tmp_path
):
    rounds = []
    for first in (1, 3):
        params = make_params(ctc=0.0, kd_int8_from="2", exp_dir=tmp_path)
        params.update(start_epoch=first, num_epochs=3, batch_idx_train=first)
        model, dataset = make_model().train(), K2SpeechRecognitionDataset()
        session.attach(params, model)
        params["cur_epoch"] = first
        batch = dataset[cuts]
        loss = loss_of(model, batch)
        with torch.no_grad():
            rounds.append(not torch.equal(loss, loss_of(model, batch)))
        session.joint_loss(loss, MetricsTracker(), model, batch)
        session.current().checkpoint.save()
        session.detach()
    assert rounds == [False, True]


def test_off_gives_the_same_bits_and_touches_no_layer(make_model, make_params, cuts):
    model = make_model().train()
    batch = TargetDataset(K2SpeechRecognitionDataset())[cuts]
    before = loss_of(model, batch)
    session.attach(make_params(ctc=0.7), model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert torch.equal(loss_of(model, batch), before)


def test_a_checkpoint_has_the_same_keys(make_model, make_params):
    model = make_model()
    before = list(model.state_dict())
    session.attach(make_params(ctc=0.0, kd_int8_from="0"), model)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("epochs", ["soon", "-1", "nan", "inf", "1,5"])
def test_what_is_no_number_of_epochs_is_refused(make_model, make_params, epochs):
    model = make_model()
    with pytest.raises(KDError, match=f"--kd-int8-from is '{epochs}', and must be"):
        session.attach(make_params(ctc=0.0, kd_int8_from=epochs), model)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_a_model_without_linear_layers_is_refused(make_params):
    class Other(torch.nn.Module):
        pass

    with pytest.raises(KDError, match="Other has no linear layer that an int8 export"):
        session.attach(make_params(ctc=0.0, kd_int8_from="0"), Other())


def test_within_autocast_losses_and_gradients_are_finite(make_model, make_params, cuts):
    model = make_model().train()
    batch = TargetDataset(K2SpeechRecognitionDataset())[cuts]
    session.attach(make_params(ctc=0.7, kd_int8_from="0"), model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, batch)
        loss = session.joint_loss(loss, MetricsTracker(), model, batch)
    loss.backward()
    assert loss.isfinite()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)

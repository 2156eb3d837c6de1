"""What the digits recipe's training does at an epoch's borders."""

import sys

import pytest
import torch
from zipformer.modules.scaling import Whiten

from icefall_kd.errors import KDError


@pytest.fixture
def checkpoint(recipe):
    """The recipe's module of checkpoints."""
    return sys.modules[recipe.save_checkpoint.__module__]


def test_an_epoch_begins_with_what_a_training_has_that_goes_on(recipe, make_model):
    """No checkpoint keeps how often each activation is looked at."""
    fresh, trained = make_model(), make_model()
    names = [name for name, m in trained.named_modules() if isinstance(m, Whiten)]
    assert names
    for name in names:
        module = trained.get_submodule(name)
        assert module.min_prob < module.max_prob
        module.prob = module.min_prob
    recipe.forget_metrics(trained)
    for name in names:
        prob = fresh.get_submodule(name).prob
        assert trained.get_submodule(name).prob == prob


def test_a_checkpoint_takes_its_place_when_it_is_whole(
    checkpoint, tmp_path, monkeypatch
):
    path = tmp_path / "epoch-1.pt"
    path.write_text("of before")

    def half(filename, **states):
        filename.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_checkpoint_impl", half)
    states = [torch.nn.Linear(1, 1), None, None, None]
    sampler = type("Sampler", (), {"state_dict": dict})()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(path, {}, *states, sampler, None)
    assert path.read_text() == "of before" and list(tmp_path.iterdir()) == [path]


def test_a_students_flags_have_the_front_end_of_its_checkpoint(recipe):
    from icefall_kd.teacher.recipe import flags_of, model_names

    defaults = model_names(recipe)
    flags = flags_of({**defaults, "embed_channels": "4,8,16"}, defaults)
    assert flags == "--embed-channels 4,8,16"
    parsed = recipe.get_parser().parse_args(flags.split())
    assert parsed.embed_channels == "4,8,16"
    assert flags_of({"encoder_dim": defaults["encoder_dim"]}, defaults) == ""


def params_of(recipe, *words):
    return recipe.AttributeDict(vars(recipe.get_parser().parse_args(words)))


def test_another_average_period_is_refused_when_dev_cuts_are_to_be_decoded(
    recipe, checkpoint
):
    params = params_of(recipe, "--patience", "1", "--average-period", "2")
    with pytest.raises(KDError, match="is 2, and .* had 10: give --average-period 10"):
        checkpoint.check_average_period(params, {"average_period": 10})
    checkpoint.check_average_period(params, {"average_period": 2})
    checkpoint.check_average_period(params, {})
    params.patience = 0
    checkpoint.check_average_period(params, {"average_period": 10})


def test_cr_ctc_has_the_masks_that_a_training_makes_once(recipe):
    masks = recipe.get_spec_augment(params_of(recipe, "--time-mask-ratio", "2"))
    assert (masks.num_frame_masks, masks.max_frames_mask_fraction) == (4, 0.3)
    inputs = recipe.cr_ctc_inputs(masks, torch.tensor([5, 7]))
    assert inputs["spec_augment"] is masks
    assert inputs["supervision_segments"].tolist() == [[0, 0, 5], [1, 0, 7]]

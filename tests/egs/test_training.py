"""What the digits recipe's training does at an epoch's borders."""

import pytest
import torch


def test_an_epoch_begins_with_what_a_training_has_that_goes_on(recipe, make_model):
    """No checkpoint keeps how often each activation is looked at."""
    fresh, trained = make_model(), make_model()
    names = [
        name for name, m in trained.named_modules() if isinstance(m, recipe.Whiten)
    ]
    assert names
    for name in names:
        module = trained.get_submodule(name)
        assert module.min_prob < module.max_prob
        module.prob = module.min_prob
    recipe.forget_metrics(trained)
    for name in names:
        prob = fresh.get_submodule(name).prob
        assert trained.get_submodule(name).prob == prob


def test_a_checkpoint_takes_its_place_when_it_is_whole(recipe, tmp_path, monkeypatch):
    path = tmp_path / "epoch-1.pt"
    path.write_text("of before")

    def half(filename, **states):
        filename.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "save_checkpoint_impl", half)
    states = [torch.nn.Linear(1, 1), None, None, None]
    sampler = type("Sampler", (), {"state_dict": dict})()
    with pytest.raises(KeyboardInterrupt):
        recipe.save_checkpoint(path, {}, *states, sampler, None)
    assert path.read_text() == "of before" and list(tmp_path.iterdir()) == [path]


def test_a_students_flags_have_the_front_end_of_its_checkpoint(recipe):
    from icefall_kd.teacher.recipe import flags_of, model_names

    defaults = model_names(recipe)
    flags = flags_of({**defaults, "embed_channels": "4,8,16"}, defaults)
    assert flags == "--embed-channels 4,8,16"
    parsed = recipe.get_parser().parse_args(flags.split())
    assert parsed.embed_channels == "4,8,16"
    assert flags_of({"encoder_dim": defaults["encoder_dim"]}, defaults) == ""

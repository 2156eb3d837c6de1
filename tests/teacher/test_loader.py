"""Models rebuilt from the digits recipe's own checkpoints."""

import sys
import types

import pytest
import torch

from icefall_kd import ModelTap
from icefall_kd.errors import KDError
from icefall_kd.teacher.checkpoints import checkpoint_files, load_checkpoint
from icefall_kd.teacher.loader import load_recipe_model, settings_of
from icefall_kd.teacher.recipe import import_train


def outputs(model, features):
    with ModelTap(model) as hook:
        return hook.encode(*features).ctc_logits


def assert_same(model, expected, features):
    """All parameters to the bit; what several threads make of them, up to rounding."""
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    torch.testing.assert_close(outputs(model, features), outputs(expected, features))


@pytest.fixture
def load(teacher_exp):
    def load_model(folder=teacher_exp.folder, recipe=teacher_exp.recipe, **options):
        return load_recipe_model(recipe, folder, **options)

    return load_model


@pytest.fixture
def exp(teacher_exp, tmp_path):
    """A folder with copies of the two epochs, to be damaged."""
    folder = tmp_path / "exp"
    folder.mkdir()
    for name in ("epoch-1.pt", "epoch-2.pt"):
        (folder / name).write_bytes((teacher_exp.folder / name).read_bytes())
    return folder


def changed(path, **changes):
    """Write a checkpoint again with some entries changed; None leaves one out."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    checkpoint.update(changes)
    torch.save({k: v for k, v in checkpoint.items() if v is not None}, path)


# What is rebuilt


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_checkpoint_is_rebuilt_with_the_same_outputs(
    load, teacher_exp, features, epoch
):
    model, settings = load(epoch=epoch)
    expected = teacher_exp.models[f"epoch-{epoch}"]
    assert_same(model, expected, features)
    assert not any(m.training for m in model.modules())
    assert settings["encoder_dim"] == "16,24" and settings["vocab_size"] == 25
    assert settings["feature_dim"] == 20  # the recipe's default is 40


def test_a_checkpoint_of_an_iteration(load, teacher_exp, features):
    model, _ = load(iteration=12)  # the newest up to it
    expected = teacher_exp.models["checkpoint-10"]
    assert_same(model, expected, features)


def test_settings_are_the_recipes_params(load, teacher_exp):
    _, settings = load(epoch=2)
    assert settings["batch_idx_train"] == 20
    for name in ("model", "model_avg", "optimizer", "scheduler", "sampler"):
        assert name not in settings
    for name in ("encoder_dim", "num_heads", "blank_id", "average_period"):
        assert settings[name] == teacher_exp.settings[name]


def states(models, *names):
    return [models[n].state_dict() for n in names]


def test_two_checkpoints_are_averaged(load, teacher_exp):
    model, _ = load(epoch=2, avg=2)
    first, second = states(teacher_exp.models, "epoch-1", "epoch-2")
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2)


def test_the_averaged_model_between_two_checkpoints(load, teacher_exp):
    """(model_end * end - model_start * start) / (end - start), in steps."""
    model, _ = load(epoch=2, avg=1, use_averaged_model=True)
    start, end = states(teacher_exp.averaged, "epoch-1", "epoch-2")
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            expected = (20 * end[name] - 10 * start[name]) / (20 - 10)
            torch.testing.assert_close(
                value.double(), expected.double(), rtol=1e-4, atol=1e-5
            )


def test_the_averaged_model_between_iterations(load, teacher_exp):
    model, _ = load(iteration=20, avg=1, use_averaged_model=True)
    start, end = states(teacher_exp.averaged, "checkpoint-10", "checkpoint-20")
    name = "ctc_output.1.weight"
    expected = (20 * end[name] - 10 * start[name]) / 10
    torch.testing.assert_close(
        model.state_dict()[name].double(), expected.double(), rtol=1e-4, atol=1e-5
    )


# Which files


@pytest.fixture
def folder(tmp_path):
    for name in ("epoch-8", "epoch-9", "epoch-10", "best-valid-loss"):
        (tmp_path / f"{name}.pt").touch()
    for n in (900, 1000, 1100, 10000):
        (tmp_path / f"checkpoint-{n}.pt").touch()
    return tmp_path


@pytest.mark.parametrize(
    "epoch, iteration, avg, averaged, expected",
    [
        (10, 0, 1, False, ["epoch-10"]),
        (10, 0, 3, False, ["epoch-8", "epoch-9", "epoch-10"]),
        (10, 0, 2, True, ["epoch-8", "epoch-10"]),
        (0, 1100, 1, False, ["checkpoint-1100"]),
        (0, 9999, 2, False, ["checkpoint-1000", "checkpoint-1100"]),
        (0, 1100, 2, True, ["checkpoint-900", "checkpoint-1100"]),
        (10, 1000, 1, False, ["checkpoint-1000"]),  # --iter goes before --epoch
    ],
)
def test_files_are_those_icefall_takes(
    folder, epoch, iteration, avg, averaged, expected
):
    files = checkpoint_files(folder, epoch, iteration, avg, averaged)
    assert files == [folder / f"{name}.pt" for name in expected]


def test_a_missing_epoch_is_refused(folder):
    with pytest.raises(KDError, match="beside epoch-9.pt; .*`use_averaged_model` 0"):
        checkpoint_files(folder, 9, 0, 2, True)
    with pytest.raises(KDError, match="epoch-11.pt does not exist.*`epoch`"):
        checkpoint_files(folder, 11, 0, 1, True)
    with pytest.raises(KDError, match="epoch-11.pt does not exist"):
        checkpoint_files(folder, 11, 0, 1, False)


def test_too_few_iterations_are_refused(folder):
    with pytest.raises(KDError, match="has 2 checkpoint.*`avg` 2 need 3"):
        checkpoint_files(folder, 0, 1000, 2, True)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("epoch, iteration", [(10, 0), (0, 1100)])
def test_an_average_of_nothing_is_refused(folder, epoch, iteration, averaged):
    with pytest.raises(KDError, match="`avg`"):
        checkpoint_files(folder, epoch, iteration, 0, averaged)


# The recipe's module


FUNCTIONS = "def get_params(): ...\ndef get_model(params): ...\n"


def test_each_folder_gives_its_own_train(tmp_path):
    names = []
    for name in ("a", "b", "a"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(f"NAME = {name!r}\n{FUNCTIONS}")
        names.append(import_train(folder).NAME)
    assert names == ["a", "b", "a"]


def test_train_imports_what_stands_beside_it(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "asr_datamodule.py").write_text(f"NAME = {name!r}\n")
        (folder / "train.py").write_text(
            f"from asr_datamodule import NAME\n{FUNCTIONS}"
        )
        assert import_train(folder).NAME == name


def test_train_is_imported_once(recipe, teacher_exp):
    assert import_train(teacher_exp.recipe) is recipe


def test_a_folder_without_train_is_refused(tmp_path):
    with pytest.raises(KDError, match="holds no train.py.*`recipe`"):
        import_train(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "def broken(:\n",
        "import a_module_that_nobody_has\n",
        "NAME = 1\n",
        "def get_params():\n    return {}\n",
    ],
    ids="syntax import nothing no-get-model".split(),
)
def test_a_recipe_of_unknown_shape_is_refused(load, tmp_path, text):
    (tmp_path / "train.py").write_text(text)
    with pytest.raises(KDError, match="train.py"):
        load(recipe=tmp_path, epoch=1)


# Checkpoints that can't be used


def test_a_missing_checkpoint_is_refused(load):
    with pytest.raises(KDError, match="epoch-3.pt does not exist.*`exp_dir`"):
        load(epoch=3)


def torn(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "damage",
    [torn, lambda data: b"", lambda data: b"no checkpoint"],
    ids="torn empty text".split(),
)
def test_a_damaged_checkpoint_is_refused(load, exp, damage):
    path = exp / "epoch-2.pt"
    path.write_bytes(damage(path.read_bytes()))
    for averaged in (False, True):
        with pytest.raises(KDError, match="can't be read") as e:
            load(exp, epoch=2, use_averaged_model=averaged)
        assert str(path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("options", [{"use_averaged_model": True}, {"avg": 2}])
def test_a_damaged_first_checkpoint_is_refused(load, exp, options):
    path = exp / "epoch-1.pt"
    path.write_bytes(torn(path.read_bytes()))
    with pytest.raises(KDError, match="epoch-1.pt can't be read"):
        load(exp, epoch=2, **options)


@pytest.mark.parametrize("name", ["encoder_dim", "vocab_size"])
def test_a_checkpoint_without_settings_is_refused(load, exp, name):
    changed(exp / "epoch-2.pt", **{name: None})
    with pytest.raises(KDError, match="no model settings") as e:
        load(exp, epoch=2)
    assert "epoch-2.pt" in str(e.value) and "epoch-N.pt" in str(e.value)


def test_bare_parameters_are_refused(load, exp, teacher_exp):
    torch.save(teacher_exp.models["epoch-2"].state_dict(), exp / "epoch-2.pt")
    with pytest.raises(KDError, match="no model settings"):
        load(exp, epoch=2)


@pytest.mark.parametrize("kind", ["list", "no-model", "other-model"])
def test_a_checkpoint_of_another_kind_is_refused(load, exp, kind):
    path = exp / "epoch-2.pt"
    if kind == "list":
        torch.save([1, 2], path)
    elif kind == "no-model":
        changed(path, model=None)
    else:
        changed(path, joiner_dim=24)
    with pytest.raises(KDError, match="epoch-2.pt"):
        load(exp, epoch=2)


def test_a_checkpoint_without_average_is_refused(load, exp):
    changed(exp / "epoch-1.pt", model_avg=None)
    with pytest.raises(KDError, match="`use_averaged_model` 0"):
        load(exp, epoch=2, use_averaged_model=True)


def test_an_average_of_two_periods_is_refused_where_icefall_has_no_step_of_it(
    load, exp
):
    """icefall counts by the first one's period: 10 and 19 are one step of 10."""
    changed(exp / "epoch-2.pt", average_period=2, batch_idx_train=19)
    with pytest.raises(KDError, match="not averaged between .* .every 10 steps."):
        load(exp, epoch=2, use_averaged_model=True)


def test_settings_need_a_model(tmp_path, recipe):
    with pytest.raises(KDError, match="no model settings.*give `bpe_model`"):
        settings_of({"model": {}}, tmp_path / "epoch-1.pt", recipe)


def test_an_odd_checkpoint_says_what_went_wrong(tmp_path):
    with pytest.raises(KDError, match=r"can't be read \(\w+\)"):
        load_checkpoint(tmp_path)


def test_the_recipe_that_is_running_is_not_imported_again(monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('imported again')\n")
    running = types.ModuleType("__main__")
    running.__file__ = str(tmp_path / "train.py")
    monkeypatch.setitem(sys.modules, "__main__", running)
    assert import_train(tmp_path) is running


def test_a_recipe_that_sets_threads_on_import_leaves_them_as_they_are(tmp_path):
    """As icefall's do; torch aborts where its threads run already."""
    code = "import torch\ntorch.set_num_threads(3)\ntorch.set_num_interop_threads(1)\n"
    code += "get_params = get_model = lambda *args: None\n"
    (tmp_path / "train.py").write_text(code)
    before = torch.get_num_threads()
    torch.ones(300, 300).matmul(torch.ones(300, 300))
    import_train(tmp_path)
    assert torch.get_num_threads() == before != 3

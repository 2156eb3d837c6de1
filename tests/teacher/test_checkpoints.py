"""The checkpoints that are taken: those of icefall's decode.py, and no other."""

import sys

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.teacher.checkpoints import averaging_module, checkpoint_files
from icefall_kd.teacher.loader import load_recipe_model

# What people leave beside checkpoints; none of them is one.
COPIES = [
    "checkpoint-150 (copy).pt",
    "checkpoint-150-old.pt",
    "checkpoint-best.pt",
    "checkpoint-120.5.pt",
    "checkpoint-.pt",
    "checkpoint--140.pt",
    "checkpoint-140.pt.bak",
    "checkpoint-140.pt.tmp",
    "epoch-150 (copy).pt",
    "best-valid-loss.pt",
    "my-checkpoint-140.pt",
]


@pytest.fixture
def exp(tmp_path):
    """The names of three checkpoints, and copies of theirs."""
    for name in (*(f"checkpoint-{n}.pt" for n in (50, 100, 150)), *COPIES):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def taken(exp, iteration, avg, averaged):
    files = checkpoint_files(exp, 0, iteration, avg, averaged)
    assert all(path.parent == exp for path in files)
    return [path.name for path in files]


@pytest.mark.parametrize(
    "iteration, avg, averaged, steps",
    [
        (150, 2, False, [100, 150]),
        (150, 1, False, [150]),
        (149, 2, False, [50, 100]),
        (150, 3, False, [50, 100, 150]),
        (150, 2, True, [50, 150]),
        (999, 1, True, [100, 150]),
    ],
)
def test_copies_beside_checkpoints_are_no_checkpoints(
    exp, iteration, avg, averaged, steps
):
    names = [f"checkpoint-{n}.pt" for n in steps]
    assert taken(exp, iteration, avg, averaged) == names


def test_those_are_taken_that_icefalls_own_function_finds(exp):
    """Whatever its pattern makes of a name; where there is none, so is refused."""
    for name in ("checkpoint-140-pt.pt", "checkpoint-145.pt.pt", "checkpoint-0130.pt"):
        (exp / name).write_bytes(b"")
    found = averaging_module().find_checkpoints(exp, iteration=-148)
    assert taken(exp, 148, len(found), False) == [
        path.rpartition("/")[2] for path in reversed(found)
    ]
    with pytest.raises(KDError, match=f"has {len(found)} checkpoint-N.pt up to 148"):
        taken(exp, 148, len(found) + 1, False)


def test_a_copy_does_not_change_the_teacher(teacher_exp, tmp_path):
    names = ("checkpoint-10.pt", "checkpoint-20.pt")
    for name in names:
        (tmp_path / name).write_bytes((teacher_exp.folder / name).read_bytes())
    other = (teacher_exp.folder / "checkpoint-5.pt").read_bytes()
    (tmp_path / "checkpoint-20-old.pt").write_bytes(other)
    model, _ = load_recipe_model(teacher_exp.recipe, tmp_path, iteration=20, avg=2)
    first, second = (teacher_exp.models[name[:-3]].state_dict() for name in names)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2)


def test_several_checkpoints_are_added_up_in_the_order_of_decode_py(teacher_exp):
    """Newest first for --iter, as icefall's find_checkpoints gives them."""
    module = averaging_module()
    files = module.find_checkpoints(teacher_exp.folder, iteration=-20)
    expected = module.average_checkpoints(files)
    model, _ = load_recipe_model(
        teacher_exp.recipe, teacher_exp.folder, iteration=20, avg=3
    )
    assert len(files) == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_an_icefall_that_fails_on_import_is_one_sentence(tmp_path, monkeypatch):
    package = tmp_path / "icefall"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libk2.so: no such file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("icefall", "icefall.checkpoint"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(KDError, match=r"icefall.* \(OSError: libk2.so: no such file\)"):
        averaging_module()


def test_neither_an_epoch_nor_an_iteration_is_refused_by_their_names(tmp_path):
    with pytest.raises(KDError, match="epoch-0.pt .*: give `epoch` or `iteration`$"):
        checkpoint_files(tmp_path, epoch=0, iteration=0, avg=1, averaged=False)

"""``icefall-kd plug``: working copies, what becomes of them, and every refusal."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from toy_recipe import (
    DATA,
    DECODE,
    STUBS,
    TRAIN,
    UTILS,
    as_formerly_plugged,
    data_of,
    plugged,
    refused,
    replaced,
    train_of,
    wrapped,
)

from icefall_kd.cli import cli
from icefall_kd.plug import plug as plugging
from icefall_kd.plug.copies import diff, make_plan
from icefall_kd.plug.plug import FOREIGN, PLUGGED, RECORD, STALE, examine, plug, undo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path):
    """A recipe as icefall has them: links to what other recipes share."""
    shared = tmp_path / "shared_recipe"
    folder = tmp_path / "zipformer"
    shared.mkdir()
    folder.mkdir()
    (shared / "asr_datamodule.py").write_text(DATA)
    (shared / "export.py").write_text(DECODE)
    (shared / "model.py").write_text("class Model:\n    pass\n")
    (folder / "train.py").write_text(TRAIN)
    (folder / "train.py").chmod(0o755)
    (folder / "decode.py").write_text(DECODE)
    (folder / "pretrained.py").write_text("import decode\n")
    (folder / "utils.py").write_text(UTILS)
    (folder / "README.md").write_text("A toy.\n")
    (folder / "nohup.out").write_text("a log\n")
    for name in ("asr_datamodule.py", "export.py", "model.py"):
        (folder / name).symlink_to(f"../shared_recipe/{name}")
    (folder / "gone.py").symlink_to("../shared_recipe/gone.py")
    (folder / "exp").mkdir()
    (folder / "exp" / "epoch-1.pt").write_text("somebody's")
    (tmp_path / "stubs").mkdir()
    for name, text in STUBS.items():
        path = tmp_path / "stubs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return SimpleNamespace(
        folder=folder, shared=shared, new=tmp_path / "zipformer_kd", tmp=tmp_path
    )


def snapshot(*folders):
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def command(*words):
    done = CliRunner().invoke(cli, ["plug", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_working_copy(recipe):
    before = snapshot(recipe.folder, recipe.shared)
    plan = plug(recipe.folder, recipe.new)
    assert snapshot(recipe.folder, recipe.shared) == before
    assert list(plan.plugged) == ["train.py", "asr_datamodule.py"]
    assert list(plan.copied) == ["decode.py", "export.py", "pretrained.py"]
    assert plan.linked == ["README.md", "model.py", "utils.py"]
    found = sorted(p.name for p in recipe.new.iterdir())
    assert found == sorted([RECORD, *plan.plugged, *plan.copied, *plan.linked])
    assert (recipe.new / "train.py").read_text() == plugged(TRAIN)
    assert (recipe.new / "asr_datamodule.py").read_text() == wrapped(DATA)
    assert not any((recipe.new / n).is_symlink() for n in plan.plugged)
    assert os.readlink(recipe.new / "model.py") == "../zipformer/model.py"
    assert (recipe.new / "model.py").read_text() == "class Model:\n    pass\n"
    assert os.access(recipe.new / "train.py", os.X_OK)
    assert not list(recipe.tmp.glob(".tmp*"))


@pytest.mark.parametrize("name", ["decode.py", "export.py"])
def test_scripts_find_the_new_train(recipe, name):
    """Run as a user runs them: export.py is a link in the recipe."""
    plug(recipe.folder, recipe.new)
    env = {**os.environ, "PYTHONPATH": str(recipe.tmp / "stubs")}

    def run(folder):
        words = [sys.executable, folder / name]
        return subprocess.run(words, capture_output=True, text=True, env=env)

    done = run(recipe.new)
    assert done.returncode == 0, done.stderr
    expected = [str(recipe.new / n) for n in ("train.py", "asr_datamodule.py")]
    assert done.stdout.split() == expected
    (recipe.new / "export.py").unlink()  # what a link does instead
    (recipe.new / "export.py").symlink_to("../zipformer/export.py")
    if name == "export.py":
        assert "zipformer_kd" not in run(recipe.new).stdout


def test_the_new_train_knows_the_arguments(recipe):
    plug(recipe.folder, recipe.new)
    env = {**os.environ, "PYTHONPATH": str(recipe.tmp / "stubs")}
    for folder, known in ((recipe.folder, False), (recipe.new, True)):
        words = [sys.executable, folder / "train.py", "--help"]
        done = subprocess.run(words, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert ("--kd-ctc-weight" in done.stdout) is known


def test_a_script_that_would_not_find_its_names_stays_a_link(recipe):
    text = replaced(DECODE, "import get_params", "import get_params, normalize_text")
    (recipe.shared / "export.py").write_text(text)
    (recipe.shared / "train.py").write_text("normalize_text = get_params = None\n")
    plan = plug(recipe.folder, recipe.new)
    assert os.readlink(recipe.new / "export.py") == "../zipformer/export.py"
    assert "export.py stays a link" in plan.notes[0]
    assert "train.normalize_text" in plan.notes[0]
    assert examine(recipe.new).state == PLUGGED


def test_a_linked_script_that_lacks_a_module_stays_a_link(recipe):
    (recipe.shared / "export.py").write_text("import train\nimport converter\n")
    (recipe.shared / "converter.py").write_text("")
    plan = plug(recipe.folder, recipe.new)
    assert (recipe.new / "export.py").is_symlink()
    assert "it wants converter," in plan.notes[0]


def test_a_linked_script_may_take_functions_variables_and_imports(recipe):
    text = "from train import SIZE, argparse, get_params, MetricsTracker\n"
    (recipe.shared / "export.py").write_text(text)
    (recipe.shared / "train.py").write_text("")
    plan = plug(recipe.folder, recipe.new)
    assert "export.py" in plan.copied and plan.notes == []


def test_a_script_of_the_recipe_itself_is_copied_whatever_it_imports(recipe):
    (recipe.folder / "decode.py").write_text("from train import made_by_exec\n")
    plan = plug(recipe.folder, recipe.new)
    assert "decode.py" in plan.copied and plan.notes == []


def test_every_training_script_is_plugged(recipe):
    for name in ("finetune.py", "train_bbpe.py"):
        (recipe.folder / name).write_text(TRAIN)
    (recipe.folder / "train_utils.py").write_text("import train\n")
    plan = plug(recipe.folder, recipe.new)
    assert list(plan.plugged) == [
        "finetune.py",
        "train.py",
        "train_bbpe.py",
        "asr_datamodule.py",
    ]
    assert "train_utils.py" in plan.copied


def test_a_recipe_with_only_a_finetune_py(recipe):
    (recipe.folder / "train.py").rename(recipe.folder / "finetune.py")
    (recipe.folder / "decode.py").write_text("from finetune import get_params\n")
    plan = plug(recipe.folder, recipe.new)
    assert list(plan.plugged) == ["finetune.py", "asr_datamodule.py"]
    assert "decode.py" in plan.copied


def test_leave_out(recipe):
    (recipe.folder / "train_old.py").write_text("def compute_loss(:\n")
    sentence = refused(
        lambda: plug(recipe.folder, recipe.new), "train_old.py (line 1)", "`leave_out`"
    )
    assert "not valid Python" in sentence
    output = command(recipe.folder, recipe.new).output
    assert output.endswith("or leave it as it is by --leave-out train_old.py\n")
    assert not recipe.new.exists()
    plan = plug(recipe.folder, recipe.new, ["train_old.py"])
    assert "train_old.py" in plan.linked
    assert examine(recipe.new).state == PLUGGED
    assert plug(recipe.folder, recipe.new, ["train_old.py"]) is None
    refused(lambda: plug(recipe.folder, recipe.new, ["x.py"]), "x.py", "no such file")


def test_folders_of_program_are_linked_and_others_not(recipe):
    (recipe.folder / "local").mkdir()
    (recipe.folder / "local" / "tool.py").write_text("")
    (recipe.folder / "__pycache__").mkdir()
    (recipe.folder / "__pycache__" / "a.py").write_text("")
    plug(recipe.folder, recipe.new)
    assert os.readlink(recipe.new / "local") == "../zipformer/local"
    assert not (recipe.new / "exp").exists()
    assert not (recipe.new / "__pycache__").exists()


def test_a_copy_elsewhere_and_of_a_relative_folder(recipe, monkeypatch):
    (recipe.tmp / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(recipe.folder)
    plug(".", "../a/b/kd")
    new = recipe.tmp / "a" / "b" / "kd"
    assert (new / "model.py").resolve() == recipe.shared / "model.py"
    assert examine("../a/b/kd", ".").state == PLUGGED


def test_an_empty_folder_is_filled(recipe):
    recipe.new.mkdir()
    plug(recipe.folder, recipe.new)
    assert examine(recipe.new).state == PLUGGED


def test_plugging_again_changes_nothing(recipe):
    plug(recipe.folder, recipe.new)
    before = snapshot(recipe.new)
    assert plug(recipe.folder, recipe.new) is None
    assert snapshot(recipe.new) == before
    again = recipe.tmp / "again"
    plan = plug(recipe.new, again)
    for name in plan.plugged:
        assert (again / name).read_bytes() == (recipe.new / name).read_bytes()


def test_undo_gives_back_the_bytes_and_plug_puts_the_lines_in_again(recipe):
    plan = plug(recipe.folder, recipe.new)
    before = snapshot(recipe.new)
    assert undo(recipe.new) == ["asr_datamodule.py", "train.py"]
    for name in (*plan.plugged, *plan.copied):
        assert (recipe.new / name).read_bytes() == (recipe.folder / name).read_bytes()
    assert os.access(recipe.new / "train.py", os.X_OK)
    assert examine(recipe.new).state == FOREIGN
    assert undo(recipe.new) == []
    assert plug(recipe.folder, recipe.new) is not None
    assert snapshot(recipe.new) == before
    assert not list(recipe.tmp.rglob(".tmp*"))


def test_undo_keeps_what_was_changed_by_hand(recipe):
    plug(recipe.folder, recipe.new)
    path = recipe.new / "train.py"
    path.write_text(replaced(path.read_text(), "SIZE = 3", "SIZE = 4"))
    report = examine(recipe.new)
    assert (report.state, report.edited) == (PLUGGED, ["train.py"])
    undo(recipe.new)
    assert path.read_text() == train_of(("SIZE = 3", "SIZE = 4"))
    refused(lambda: plug(recipe.folder, recipe.new), "train.py was changed by hand")
    assert path.read_text() == train_of(("SIZE = 3", "SIZE = 4"))


def test_a_model_of_the_users_own_outlives_undo_and_plug(recipe):
    plug(recipe.folder, recipe.new)
    undo(recipe.new)
    (recipe.new / "model.py").unlink()
    (recipe.new / "model.py").write_text("mine\n")
    plug(recipe.folder, recipe.new)
    assert (recipe.new / "model.py").read_text() == "mine\n"
    assert examine(recipe.new).state == PLUGGED


def test_undo_leaves_a_script_that_uses_icefall_kd_itself(recipe):
    own = "from icefall_kd.teacher import loader\nimport train\nloader.go()\n"
    (recipe.folder / "decode.py").write_text(own)
    plug(recipe.folder, recipe.new)
    assert undo(recipe.new) == ["asr_datamodule.py", "train.py"]
    assert (recipe.new / "decode.py").read_text() == own
    assert examine(recipe.new).state == FOREIGN
    assert plug(recipe.folder, recipe.new) is not None


def test_states(recipe):
    assert examine(recipe.folder).state == FOREIGN
    plug(recipe.folder, recipe.new)
    assert examine(recipe.new).state == PLUGGED
    assert examine(recipe.new, recipe.folder).state == PLUGGED
    (recipe.folder / "train.py").write_text(train_of(("SIZE = 3", "SIZE = 5")))
    report = examine(recipe.new)
    assert report.state == STALE
    assert report.reasons == [f"{recipe.folder / 'train.py'} has changed since"]
    refused(lambda: plug(recipe.folder, recipe.new), "has changed since", "--undo")
    undo(recipe.new)
    plug(recipe.folder, recipe.new)
    assert "SIZE = 5" in (recipe.new / "train.py").read_text()
    assert examine(recipe.new).state == PLUGGED


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: (r.shared / "asr_datamodule.py").write_text(DATA + "\n"), "changed"),
        (lambda r: (r.folder / "decode.py").write_text("import train\n"), "changed"),
        (lambda r: (r.folder / "new.py").write_text(""), "new.py is missing here"),
        (lambda r: (r.folder / "new.py").write_text("import train"), "new.py has cha"),
        (
            lambda r: (r.folder / "train.py").write_text("("),
            "can't be plugged any more",
        ),
        (lambda r: shutil.rmtree(r.folder), "does not exist"),
        (lambda r: (r.new / "train.py").unlink(), "train.py is gone"),
        (lambda r: (r.new / "train.py").write_text(TRAIN), "train.py has lost its"),
        (lambda r: (r.new / "asr_datamodule.py").write_text("("), "not valid Python"),
        (
            lambda r: (r.new / "train.py").write_text(
                replaced(plugged(TRAIN), "kd.attach(params", "kd.start(params")
            ),
            "carries other lines",
        ),
    ],
)
def test_stale(recipe, change, reason):
    plug(recipe.folder, recipe.new)
    change(recipe)
    report = examine(recipe.new)
    assert report.state == STALE
    assert any(reason in r for r in report.reasons), report.reasons


@pytest.fixture
def former(recipe):
    """A working copy that a former version made."""
    plug(recipe.folder, recipe.new)
    for name in ("train.py", "asr_datamodule.py"):
        path = recipe.new / name
        path.write_text(as_formerly_plugged(path.read_text()))
    return recipe.new


def test_a_copy_that_a_former_version_plugged_is_stale(recipe, former):
    done = command("--check", former)
    assert done.exit_code == 3
    assert "stale" in done.output and "icefall-kd plug --undo" in done.output
    assert "plug it again" in done.output and "`leave_out`" not in done.output
    done = command(recipe.folder, former)
    assert done.exit_code == 1
    assert f"icefall-kd plug --undo {former}" in done.output
    assert command("--undo", former).exit_code == 0
    for name in ("train.py", "asr_datamodule.py"):
        assert (former / name).read_bytes() == (recipe.folder / name).read_bytes()
    assert command(recipe.folder, former).exit_code == 0
    assert examine(former).state == PLUGGED


@pytest.mark.parametrize("name", ["train.py", "decode.py"])
def test_running_a_copy_of_a_former_version_ends_with_one_sentence(
    recipe, former, name
):
    stubs = recipe.tmp / "stubs"  # of torch, which the toy's data module imports
    shutil.rmtree(stubs / "icefall_kd")
    env = {**os.environ, "PYTHONPATH": f"{stubs}{os.pathsep}{ROOT}"}
    words = [sys.executable, former / name]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("icefall_kd: error: ") and "icefall-kd plug --undo" in line
    assert "import icefall_kd.recipe: run" in line


def test_a_recipe_plugged_by_hand(recipe):
    (recipe.folder / "train.py").write_text(plugged(TRAIN))
    report = examine(recipe.folder)
    assert (report.state, len(report.reasons)) == (STALE, 1)  # half of it
    assert "asr_datamodule.py" in report.reasons[0]
    (recipe.shared / "asr_datamodule.py").write_text(wrapped(DATA))
    assert examine(recipe.folder).state == PLUGGED
    refused(lambda: undo(recipe.folder), RECORD, "by hand")
    assert (recipe.shared / "asr_datamodule.py").read_text() == wrapped(DATA)


def test_the_digits_recipe_is_plugged():
    assert examine(ROOT / "egs" / "digits" / "ASR" / "zipformer").state == PLUGGED


# --- refusals of a folder ------------------------------------------------------------


def nothing_written(recipe, *parts, new=None, leave_out=()):
    before = snapshot(recipe.tmp)
    folders = sorted(recipe.tmp.rglob("*"))
    sentence = refused(
        lambda: plug(recipe.folder, new or recipe.new, leave_out), *parts
    )
    assert snapshot(recipe.tmp) == before
    assert sorted(recipe.tmp.rglob("*")) == folders
    return sentence


def test_unknown_shapes_write_nothing(recipe):
    (recipe.folder / "train.py").write_text(
        train_of(("    return loss, info", "    return loss"))
    )
    sentence = nothing_written(recipe, "train.py (line ", "(loss, info)")
    assert "leave_out" not in sentence  # nothing would be left
    (recipe.folder / "train.py").write_text("import os\n\nos.abort()\n")
    nothing_written(recipe, "train.py (line ", "functions get_parser")
    (recipe.folder / "train.py").write_text("import os\n\ndef run(:\n")
    nothing_written(recipe, "train.py (line 3)", "not valid Python")
    (recipe.folder / "train.py").write_text(TRAIN)
    (recipe.shared / "asr_datamodule.py").write_text(
        data_of(("class ToyDataModule", "class Other"))
    )
    nothing_written(recipe, "asr_datamodule.py (line ", "ToyDataModule")


def test_a_recipe_plugged_by_another_version_is_refused(recipe):
    other = replaced(plugged(TRAIN), "kd.attach(params, model)", "kd.start(params)")
    (recipe.folder / "train.py").write_text(other)
    nothing_written(recipe, "carries other lines of icefall_kd", "take them out")


def test_a_copy_plugged_by_another_version_is_refused_undone_and_plugged(recipe):
    plug(recipe.folder, recipe.new)
    path = recipe.new / "train.py"
    other = replaced(plugged(TRAIN), "kd.attach(params, model)", "kd.start(params)")
    path.write_text(other)
    nothing_written(recipe, "carries other lines of icefall_kd", "--undo")
    undo(recipe.new)
    plug(recipe.folder, recipe.new)
    assert path.read_text() == plugged(TRAIN)


def test_no_recipe(recipe):
    empty = recipe.tmp / "empty"
    empty.mkdir()
    for folder, part in (
        (empty, "holds no train.py"),
        (recipe.tmp / "nowhere", "does not exist"),
        (recipe.folder / "train.py", "is a file"),
    ):
        for call in (make_plan, examine, undo):
            if (call, folder) != (undo, empty):
                refused(lambda call=call, folder=folder: call(folder), part)
    refused(lambda: undo(empty), RECORD)


def test_what_is_in_the_way(recipe):
    recipe.new.mkdir()
    (recipe.new / "mine.txt").write_text("x")
    nothing_written(recipe, "exists", "give another folder")
    shutil.rmtree(recipe.new)
    recipe.new.write_text("a file")
    nothing_written(recipe, "exists", "give another folder")
    recipe.new.unlink()
    recipe.new.symlink_to("nowhere")
    nothing_written(recipe, "exists", "give another folder")


def test_folders_in_each_other(recipe):
    for new in (recipe.folder, recipe.folder / "kd", recipe.tmp):
        nothing_written(recipe, "must not lie in each other", new=new)
    nothing_written(recipe, "is no folder", new=recipe.tmp / "a" / "kd")


def test_a_copy_of_another_recipe(recipe):
    other = recipe.tmp / "zipformer_b"
    shutil.copytree(recipe.folder, other, symlinks=True)
    plug(other, recipe.new)
    nothing_written(recipe, "zipformer_b", "mend one of the two folders")
    refused(lambda: examine(recipe.new, recipe.folder), "is a working copy of")
    refused(lambda: undo(recipe.new, recipe.folder), "is a working copy of")


def test_another_leave_out_is_no_news(recipe):
    (recipe.folder / "train_b.py").write_text(TRAIN)
    plug(recipe.folder, recipe.new)
    nothing_written(recipe, "`leave_out` nothing", leave_out=["train_b.py"])


def test_a_linked_train_is_refused(recipe):
    (recipe.shared / "train.py").write_text(TRAIN)
    (recipe.folder / "train.py").unlink()
    (recipe.folder / "train.py").symlink_to("../shared_recipe/train.py")
    nothing_written(recipe, "is a link to", "plug that recipe")


def test_a_data_module_that_is_elsewhere(recipe):
    text = train_of(("from asr_datamodule import", "from local.corpus import"))
    (recipe.folder / "train.py").write_text(text)
    line = text.splitlines().index("from local.corpus import ToyDataModule") + 1
    nothing_written(recipe, f"train.py (line {line})", "local.corpus")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"recipe": "..", "version": "1", "leave_out": [], "plugged": [], '
        '"files": {"../shared_recipe/model.py": ""}}',
        '{"recipe": "..", "version": "1", "leave_out": [], '
        '"plugged": ["../shared_recipe/model.py"], "files": {}}',
    ],
)
def test_a_damaged_record(recipe, text):
    plug(recipe.folder, recipe.new)
    (recipe.new / RECORD).write_text(text)
    for call in (examine, undo):
        refused(lambda call=call: call(recipe.new), RECORD, "is damaged")


def test_undo_does_not_write_through_a_link(recipe):
    plug(recipe.folder, recipe.new)
    (recipe.shared / "asr_datamodule.py").write_text(wrapped(DATA))
    (recipe.new / "asr_datamodule.py").unlink()
    (recipe.new / "asr_datamodule.py").symlink_to("../shared_recipe/asr_datamodule.py")
    before = snapshot(recipe.tmp)
    refused(lambda: undo(recipe.new), "has become a link")
    assert snapshot(recipe.tmp) == before


def _with_file_size(limit, function):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        return function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(recipe):
    """The system itself refuses to write past 1 kB of a file."""
    before = snapshot(recipe.tmp)
    with pytest.raises(OSError):
        _with_file_size(1000, lambda: plug(recipe.folder, recipe.new))
    assert snapshot(recipe.tmp) == before
    assert not recipe.new.exists() and not list(recipe.tmp.glob(".tmp*"))


def test_a_full_disk_leaves_a_plugged_copy_as_it_was(recipe):
    plug(recipe.folder, recipe.new)
    before = snapshot(recipe.tmp)
    with pytest.raises(OSError):
        _with_file_size(1000, lambda: undo(recipe.new))
    assert snapshot(recipe.tmp) == before
    undo(recipe.new)
    before = snapshot(recipe.tmp)
    with pytest.raises(OSError):
        _with_file_size(1000, lambda: plug(recipe.folder, recipe.new))
    assert snapshot(recipe.tmp) == before


def test_an_unwritable_place(recipe, monkeypatch):
    """As root may write anywhere, the system call is replaced."""

    def deny(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(plugging.Path, "mkdir", deny)
    before = snapshot(recipe.tmp)
    done = command(recipe.folder, recipe.new)
    assert done.exit_code == 1
    assert "Permission denied" in done.output
    assert snapshot(recipe.tmp) == before


# --- the command ---------------------------------------------------------------------


def applied(recipe, patch):
    """A copy of the recipe with a patch applied by git."""
    work = recipe.tmp / "work"
    (recipe.folder / "gone.py").unlink()
    shutil.copytree(recipe.folder, work)
    patch = patch.replace(f"{recipe.folder}/", "").replace(f"{recipe.new}/", "")
    words = ["git", "apply", "-p0", "-"]
    subprocess.run(words, input=patch.encode(), cwd=work, check=True)
    return work


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_diff_is_a_patch_that_gives_the_same_files(recipe, ending):
    text = TRAIN.replace("\n", ending)
    (recipe.folder / "train.py").write_bytes(text.encode())
    before = snapshot(recipe.tmp)
    done = command(recipe.folder, recipe.new, "--diff")
    assert done.exit_code == 0
    assert snapshot(recipe.tmp) == before
    work = applied(recipe, done.stdout_bytes.decode())
    assert (work / "train.py").read_bytes() == plugged(text).encode()
    assert (work / "asr_datamodule.py").read_text() == wrapped(DATA)


def test_diff_without_a_last_newline(recipe):
    i, j = TRAIN.index("def get_parser"), TRAIN.index("def get_params")
    text = (TRAIN[:i] + TRAIN[j:] + TRAIN[i:j]).rstrip()
    (recipe.folder / "train.py").write_text(text)
    patch = diff(make_plan(recipe.folder), recipe.new).decode()
    assert "\n\\ No newline at end of file\n" in patch
    assert (applied(recipe, patch) / "train.py").read_text() == plugged(text)


def test_the_command_from_plug_to_undo(recipe):
    done = command(recipe.folder, recipe.new)
    assert done.exit_code == 0, done.output
    assert "train.py (+5), asr_datamodule.py (+2)" in done.output
    assert "decode.py, export.py, pretrained.py" in done.output
    assert "--exp-dir" in done.output
    done = command(recipe.folder, recipe.new)
    assert (done.exit_code, "nothing to do" in done.output) == (0, True)
    done = command("--check", recipe.new)
    assert (done.exit_code, done.output) == (0, f"{recipe.new}: plugged\n")
    assert command("--check", recipe.folder, recipe.new).exit_code == 0
    done = command("--check", recipe.folder)
    assert (done.exit_code, "foreign" in done.output) == (4, True)
    (recipe.folder / "decode.py").write_text("import train\n")
    done = command("--check", recipe.new)
    assert (done.exit_code, "stale" in done.output) == (3, True)
    done = command("--undo", recipe.new)
    assert (done.exit_code, "train.py" in done.output) == (0, True)
    assert (recipe.new / "train.py").read_text() == TRAIN
    assert "were out already" in command("--undo", recipe.folder, recipe.new).output
    assert command("--check", recipe.new).exit_code == 4


@pytest.mark.parametrize(
    "words, part",
    [
        (["{recipe}"], "zipformer_kd"),
        (["{recipe}", "{new}", "--check", "--undo"], "--check and --undo"),
        (["{recipe}", "{new}", "--check", "--leave-out", "a.py"], "--leave-out"),
        (["--undo", "{recipe}"], RECORD),
        (["--check", "{new}"], "does not exist"),
        (["{new}", "{recipe}"], "does not exist"),
    ],
)
def test_refusals_of_the_command(recipe, words, part):
    before = snapshot(recipe.tmp)
    words = [w.format(recipe=recipe.folder, new=recipe.new) for w in words]
    done = command(*words)
    assert done.exit_code == 1
    assert done.output.startswith("icefall_kd: error: ")
    assert part in done.output and done.output.count("\n") == 1
    assert snapshot(recipe.tmp) == before


def test_plug_loads_neither_torch_nor_k2(recipe):
    code = (
        "import sys\n"
        "from icefall_kd.plug.plug import plug\n"
        f"plug({str(recipe.folder)!r}, {str(recipe.new)!r})\n"
        "print([m for m in ('torch', 'k2', 'lhotse', 'libcst') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

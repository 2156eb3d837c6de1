"""Experiment folders whose names have commas: one teacher, in every command."""

import shutil

import pytest
from lhotse import CutSet

from icefall_kd.errors import KDError
from icefall_kd.teacher.spec import TeacherSpec
from icefall_kd.training.options import all_options

# The defaults of the options of training.
KD = {option.dest: option.default for option in all_options()}


def folders_of(exp_dir):
    return TeacherSpec("", exp_dir).folders()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    def make(*names):
        for name in names:
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path)

    return make


def test_a_folder_that_is_there_is_one_teacher(folders):
    folders("exp,lr0.045")
    assert folders_of("exp,lr0.045") == ["exp,lr0.045"]
    assert TeacherSpec("", "exp,lr0.045").one_folder("doctor") == "exp,lr0.045"


def test_other_names_with_commas_are_several(folders):
    folders("a", "b")
    assert folders_of("a,b") == ["a", "b"]
    assert folders_of("a,none") == ["a", "none"]
    assert folders_of("none") == ["none"]


def test_a_name_that_means_both_is_refused(folders):
    folders("a", "b", "a,b")
    with pytest.raises(KDError, match="a,b is a folder, and so are a and b"):
        folders_of("a,b")


@pytest.mark.parametrize("text", ["a,", ",a", "a,,b"])
def test_an_empty_name_is_refused(folders, text):
    folders("a", "b")
    with pytest.raises(KDError, match="has an empty name between its commas"):
        folders_of(text)


def test_a_refusal_names_the_option_that_was_given(folders):
    from icefall_kd.training.online import online_teacher

    folders("a", "b", "a,b")
    for text in ("a,,b", "a,b"):
        with pytest.raises(KDError, match="^`exp_dir` "):
            folders_of(text)
        with pytest.raises(KDError, match="^--kd-teacher-exp-dir "):
            online_teacher({**KD, "kd_teacher_exp_dir": text})


@pytest.fixture
def comma_words(teacher_exp, tmp_path):
    """The teacher's options, from a folder with a comma and a colon in its name."""
    folder = tmp_path / "exp,lr0.045:2024 b"
    folder.mkdir()
    shutil.copy(teacher_exp.folder / "epoch-2.pt", folder)
    return [
        *("--recipe", teacher_exp.recipe, "--exp-dir", folder),
        *("--epoch", 2, "--use-averaged-model", 0),
    ]


def test_every_command_takes_it(
    invoke, comma_words, in_cuts, tmp_path, read_targets, teacher_exp
):
    out, plain = tmp_path / "out.jsonl.gz", tmp_path / "plain.jsonl.gz"
    words = ["--num-threads", 1]
    assert invoke("dump", in_cuts, out, *comma_words, *words).code == 0
    usual = [*comma_words]
    usual[3] = teacher_exp.folder
    assert invoke("dump", in_cuts, plain, *usual, *words).code == 0
    for a, b in zip(CutSet.from_file(out), CutSet.from_file(plain)):
        assert read_targets(a).equal(read_targets(b))
    assert invoke("doctor", *comma_words, "--cuts", out).code == 0
    student = tmp_path / "s,t:u v"
    words = ["--student-dir", student, "--set", "joiner-dim=12"]
    done = invoke("student", *comma_words, *words)
    assert done.code == 0 and f"--exp-dir '{student}'" in done.out
    done = invoke("doctor", *comma_words, "--student-dir", student)
    assert done.code == 0 and "its flags fit it" in done.out


@pytest.mark.parametrize("command", ["doctor", "student"])
def test_a_command_of_one_teacher_refuses_two(
    invoke, command, teacher_exp, another_exp, tmp_path
):
    both = f"{teacher_exp.folder},{another_exp()[0]}"
    words = ["--recipe", teacher_exp.recipe, "--exp-dir", both, "--epoch", 2]
    if command == "student":
        words += ["--student-dir", tmp_path / "student"]
    done = invoke(command, *words)
    assert done.code == 1 and len(done.err) == 1
    assert "names 2 teachers" in done.err[0] and f"{command} takes one" in done.err[0]


def test_a_teacher_in_the_training_process_may_have_a_comma(
    teacher_exp, comma_words, tmp_path
):
    from icefall_kd.training.online import online_teacher

    params = {
        **KD,
        "kd_teacher_exp_dir": str(comma_words[3]),
        "kd_teacher_recipe": str(teacher_exp.recipe),
        "kd_teacher_epoch": 2,
        "kd_teacher_use_averaged_model": False,
        "vocab_size": 25,
        "blank_id": 0,
    }
    teacher, _ = online_teacher(params)
    assert len(teacher.taps) == 1

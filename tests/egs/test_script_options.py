"""Numbers and switches of the shell scripts of digits and commands, before any work."""

import re
import subprocess
from pathlib import Path

import pytest

EGS = Path(__file__).resolve().parents[2] / "egs"
RECIPE = EGS / "digits" / "ASR"
SCRIPTS = ("run", "run_fsdd", "run_ablation", "run_slices", "run_streaming")


def options_of(script):
    """The options of a script whose defaults are numbers, or lists of them."""
    head = (RECIPE / f"{script}.sh").read_text().split("\nhelp_message=")[0]
    names = re.findall(r'^(\w+)="?\d[\d ]*"?(?: .*)?$', head, re.M)
    return [(script, "--" + name.replace("_", "-")) for name in names]


OPTIONS = [pair for script in SCRIPTS for pair in options_of(script)]


@pytest.fixture
def refusal(tmp_path):
    """The sentence by which a script refuses, its work folder being as it was."""
    work = tmp_path / "work"
    (work / "exp").mkdir(parents=True)
    for stage in range(10):
        (work / "exp" / f".{stage}.done").touch()
    (work / "exp" / ".settings").write_text("those of before")

    def contents():
        return {p: p.is_file() and p.read_bytes() for p in work.rglob("*")}

    def run(script, *words, recipe=RECIPE):
        before = contents()
        done = subprocess.run(
            [str(recipe / f"{script}.sh"), "--work-dir", str(work), *words],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 1 and done.stdout == ""
        assert contents() == before
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{script}.sh: error: ")
        return line

    return run


def test_all_scripts_have_numbers_to_check():
    assert {script for script, _ in OPTIONS} == set(SCRIPTS)
    assert {o for s, o in OPTIONS if s == "run_fsdd"} == {"--num-jobs", "--seeds"}
    assert len([o for s, o in OPTIONS if s == "run"]) == 14


@pytest.mark.parametrize("value", ["x", "-1", "08", "1.5", "", "9" * 20])
@pytest.mark.parametrize("script, option", OPTIONS)
def test_what_is_no_whole_number_is_refused(refusal, script, option, value):
    redo = ["--redo", "true", "--stage", "7"] if script == "run" else []
    said = refusal(script, *redo, option, value)
    assert f"{option} is '{value}', and must be " in said and "whole number" in said


@pytest.mark.parametrize("option", [o for s, o in OPTIONS if s == "run"])
def test_the_commands_recipe_refuses_them_too(refusal, option):
    said = refusal("run", option, "x", recipe=EGS / "commands" / "ASR")
    assert f"{option} is 'x', and must be a whole number from" in said


@pytest.mark.parametrize(
    "script, option, value, least",
    [
        ("run", "--teacher-epochs", "1", 2),
        ("run", "--student-epochs", "0", 1),
        ("run", "--long-factor", "0", 1),
        ("run", "--avg", "0", 1),
        ("run_fsdd", "--num-jobs", "0", 1),
        ("run_ablation", "--half-step", "5", 6),
        ("run_slices", "--every", "0", 1),
        ("run_streaming", "--num-jobs", "0", 1),
    ],
)
def test_a_number_that_is_too_small_is_refused(refusal, script, option, value, least):
    said = refusal(script, option, value)
    assert f"{option} is '{value}', and must be a whole number from {least} " in said


@pytest.mark.parametrize("value", ["1 x", "1,2", "1 02", " "])
@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_seeds_are_whole_numbers_with_spaces_between_them(refusal, script, value):
    said = refusal(script, "--seeds", value)
    assert f"--seeds is '{value}', and must be one or more whole numbers" in said


@pytest.mark.parametrize("value", ["yes", "", "True"])
def test_redo_is_true_or_false(refusal, value):
    said = refusal("run", "--redo", value)
    assert said.endswith(f"--redo is '{value}', and must be true or false")


@pytest.mark.parametrize("seeds", ["7", "0 1  999999999", " 3 4 "])
def test_good_numbers_are_not_refused(refusal, seeds):
    words = ["--num-jobs", "3", "--seeds", seeds]
    assert "has no targets" in refusal("run_streaming", *words)
    words = ["--stage", "10", "--redo", "true", "--seed", "0", "--num-threads", "0"]
    words += ["--corpus", "x"]  # which is looked at behind the numbers
    assert "is 'x', and must be espeak or fsdd" in refusal("run", *words)

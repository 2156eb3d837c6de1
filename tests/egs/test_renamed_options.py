"""Options of the scripts that have a new name: the old one is refused and names it."""

import re
import subprocess
from pathlib import Path

import pytest

EGS = Path(__file__).resolve().parents[2] / "egs"
SCRIPTS = sorted([*(EGS / "digits" / "ASR").glob("run*.sh"), *EGS.glob("*/ASR/kd.sh")])


def renamed(script):
    """The former and the present names of a script's options."""
    text = re.search(r'^renamed="([^"]*)"', script.read_text(), re.M)
    return [pair.split(":") for pair in text[1].split()] if text else []


PAIRS = [(script, *pair) for script in SCRIPTS for pair in renamed(script)]


def option(name):
    return "--" + name.replace("_", "-")


def test_both_kinds_of_scripts_have_renamed_options():
    assert {script.name for script, *_ in PAIRS} >= {"kd.sh", "run.sh", "run_fsdd.sh"}


@pytest.mark.parametrize("script, old, new", PAIRS, ids=lambda x: getattr(x, "name", x))
def test_an_old_name_is_refused_by_one_sentence_with_the_new_one(script, old, new):
    done = subprocess.run(
        [script, option(old), "1"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"the option {option(old)} is now called {option(new)}")


@pytest.mark.parametrize("script, old, new", PAIRS, ids=lambda x: getattr(x, "name", x))
def test_help_lists_the_new_name_alone(script, old, new):
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    names = re.findall(r"^  (--[a-z-]+) ", done.stdout, re.M)
    assert option(new) in names and option(old) not in names


@pytest.mark.parametrize(
    "old, new", [pair[1:] for pair in PAIRS if pair[0].name == "kd.sh"]
)
def test_an_old_name_in_a_file_of_options_is_refused(kd, calls, tmp_path, old, new):
    (tmp_path / "my.sh").write_text(f"{old}=3\n")
    done = kd(config="my.sh")
    assert done.returncode == 1 and calls() == []
    (line,) = done.stderr.splitlines()
    assert line == f"kd.sh: error: my.sh sets {old}, which is now called {new}"


def test_an_old_name_in_the_environment_is_no_option(kd, calls, monkeypatch):
    monkeypatch.setenv("nj", "8")
    assert kd(stop_stage=1).returncode == 0

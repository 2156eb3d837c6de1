"""The experiments of the commands recipe: what they refuse, and their reports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "commands" / "ASR"
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
METHODS = ("ctc-greedy-search", "greedy_search")


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture
def experiments(work):
    def run(*words):
        command = [RECIPE / "run_experiments.sh", "--work-dir", work, *words]
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, env=ENV
        )

    return run


def refusal(done):
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("run_experiments.sh: error: ")
    return line


@pytest.mark.parametrize(
    "words, said",
    [
        (["--runs", "none kid"], "--runs names kid, and conf/runs.txt has"),
        (["--runs", " "], "--runs is empty"),
        (["--runs", "none kd none"], "--runs names none twice"),
        (["--sizes", "s m"], "--sizes names m, and must be of s and xs"),
        (["--sizes", ""], "--sizes is empty"),
        (["--runs", "kd slices"], "--runs names slices, whose students start from"),
        (["--runs", "slices-kd", "--sizes", "xs"], "and --sizes names xs, whose heads"),
        (["--seeds", "1 1 2"], "--seeds names 1 twice"),
        (["--seeds", "1 x"], "--seeds is '1 x', and must be"),
        (["--test", "yes"], "--test is 'yes', and must be true or false"),
        (["--stage", "0"], "--stage is '0', and must be"),
        (["--stage", "2"], "has no teacher with targets: run stage 1"),
        (["--stage", "3"], "has no teacher with targets: run stage 1"),
    ],
)
def test_bad_options_are_refused_before_any_work(experiments, work, words, said):
    assert said in refusal(experiments(*words))
    assert not work.exists()


def decoded(folder, rate, test_set="dev"):
    """The files of a training to the end, its best epoch 3, decoded with both heads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "best-epoch").write_text("3\n")
    for method in METHODS:
        results = folder / method
        results.mkdir(exist_ok=True)
        name = f"wer-summary-{test_set}-epoch-3-avg-2-use-averaged-model.txt"
        (results / name).write_text(f"settings\tWER\n{method}\t{rate:.2f}\n")
        (folder / f".{test_set}.{method}.3").touch()


@pytest.fixture
def trained(work):
    """A teacher, and students of one size without KD and with it, of two seeds."""
    (work / "base" / "data" / "fbank").mkdir(parents=True)
    decoded(work / "base" / "exp" / "teacher", 5.0)
    (work / "base" / "exp" / ".5.done").touch()
    for name, rate in (("none", 20.0), ("kd", 10.0)):
        for seed in (1, 2):
            decoded(work / "exp" / f"{name}-s" / f"seed-{seed}", rate + seed)
    return ["--stage", "3", "--runs", " none kd", "--sizes", "s", "--seeds", "1 2"]


def test_the_report_has_the_teacher_and_the_mean_of_each_runs_seeds(
    experiments, work, trained
):
    done = experiments(*trained)
    assert done.returncode == 0, done.stderr
    text = (work / "report-s" / "report.md").read_text()
    assert 'Compared: "kd" with "none"' in text
    for method in METHODS:
        assert f"| {method} | dev | 5.00 | 21.50 | 11.50 |" in text


@pytest.mark.parametrize(
    "words, missing, said",
    [
        (["--seeds", "1 2 3"], "none-s/seed-3", "on dev: run stage 2"),
        (["--sizes", "xs"], "none-xs/seed-1", "on dev: run stage 2"),
        (["--runs", "none cr-ctc"], "cr-ctc-s/seed-1", "on dev: run stage 2"),
        (["--test", "true"], "none-s/seed-1", "on test: run stage 2"),
    ],
)
def test_a_report_on_what_is_not_trained_is_refused(
    experiments, work, trained, words, missing, said
):
    line = refusal(experiments(*trained, *words))
    assert str(work / "exp" / missing) in line and said in line
    assert not list(work.glob("report-*"))


def test_a_training_that_goes_on_after_its_decoding_is_not_reported(
    experiments, work, trained
):
    (work / "exp/kd-s/seed-2/best-epoch").write_text("4\n")
    assert "kd-s/seed-2 is not trained to the end" in refusal(experiments(*trained))

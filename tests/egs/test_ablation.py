"""The ablation's table and script: what they read, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "digits" / "ASR"


@pytest.fixture
def results(tmp_path):
    """Two seeds of a teacher, a student and one variant."""
    for seed, shift in (("1", 0.0), ("2", 2.0)):
        exp = tmp_path / f"seed-{seed}-random" / "exp"
        exp.mkdir(parents=True)
        rows = [
            {"model": m, "params": 1, "steps": 6, "ctc_wer": w + shift}
            for m, w in (("teacher", 10.0), ("student", 30.0))
        ]
        for row in rows:
            row["transducer_wer"] = row["ctc_wer"] + 10
        (exp / "summary.json").write_text(json.dumps(rows))
        for method, wer in (("ctc-greedy-search", 15.0), ("greedy_search", 30.0)):
            folder = tmp_path / f"ablation/seed-{seed}/exp-ctc" / method
            folder.mkdir(parents=True)
            for checkpoint, more in (("epoch-4", 0.0), ("iter-9", 20.0)):
                name = f"wer-summary-test-{checkpoint}-avg-1-use-averaged-model.txt"
                text = f"settings\tWER\n{method}\t{wer + more + shift}\n"
                (folder / name).write_text(text)
    return tmp_path


def table(work_dir, *words):
    script = RECIPE / "local" / "ablation_table.py"
    command = [sys.executable, str(script), "--work-dir", str(work_dir), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_table_has_means_seeds_and_the_share_of_the_gap(results):
    words = ("--seeds", "1 2", "--variants", "ctc", "--half-step", "9")
    done = table(results, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "| ctc | **16.00** (15.00, 17.00) | 75 % | **31.00** (30.00, 32.00) | 50 % | "
        "36.00, 51.00 |"
    )


def test_a_run_that_is_missing_is_named(results):
    done = table(results, "--seeds", "1 2", "--variants", "ctc rnnt")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "let run_ablation.sh finish" in done.stderr


def test_a_variant_that_there_is_not_is_refused_before_any_work(tmp_path):
    script = RECIPE / "run_ablation.sh"
    command = [str(script), "--work-dir", str(tmp_path / "work"), "--variants", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "there is no variant x" in done.stderr
    assert not (tmp_path / "work").exists()

"""The benchmarks find what they import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = sorted(ROOT.glob("benchmarks/*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_starts(path, tmp_path):
    done = subprocess.run(
        [sys.executable, path, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


def run_gpu_script(*words, **variables):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "benchmarks" / "decode_gpu.sh", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, **variables},
    )


def test_the_script_for_a_gpu_says_in_a_sentence_that_there_is_none(tmp_path):
    out = tmp_path / "out"
    done = run_gpu_script(out, "--exp-dir", "exp", CUDA_VISIBLE_DEVICES="")
    said = "decode_gpu.sh: there is no GPU here, so nothing was measured\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    assert not out.exists()


def test_the_script_for_a_gpu_shows_its_usage_without_options(tmp_path):
    done = run_gpu_script(tmp_path / "out")
    assert done.returncode == 1 and "OPTIONS are those of both" in done.stderr


def test_the_script_for_a_gpu_passes_its_options_on(tmp_path):
    out = tmp_path / "out"
    done = run_gpu_script(out, "--epoch", "many", DEVICE="cpu")
    assert done.returncode == 0
    assert done.stderr.count("argument --epoch: invalid int value: 'many'") == 2
    for table in ("decode", "shortcuts"):
        assert f"{table}.py ended without a result" in done.stderr

"""Shell scripts that are called by a symbolic link, or from PATH."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    *(f"egs/digits/ASR/run{name}.sh" for name in ("", "_fsdd", "_ablation", "_slices")),
    "egs/commands/ASR/run.sh",
    "egs/librispeech/ASR/kd.sh",
    "tools/make_env.sh",
    "tools/make_k2_env.sh",
]


@pytest.mark.parametrize("called", ["link", "PATH"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_linked_script_finds_what_lies_beside_it(tmp_path, script, called):
    link = tmp_path / "my tools" / "linked"
    link.parent.mkdir()
    link.symlink_to(ROOT / script)
    path = f"{link.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [link if called == "link" else "linked", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "Usage" in done.stdout
    assert list(tmp_path.iterdir()) == [link.parent]


def test_find_python_says_the_same_by_a_link(tmp_path):
    link = tmp_path / "find"
    link.symlink_to(ROOT / "tools" / "find_python.sh")
    commands = [link, "3.99"], [ROOT / "tools" / "find_python.sh", "3.99"]
    first, second = (
        subprocess.run(c, capture_output=True, text=True, cwd=tmp_path)
        for c in commands
    )
    assert first.returncode == second.returncode == 1
    assert first.stderr == second.stderr and "No working Python 3.99" in first.stderr

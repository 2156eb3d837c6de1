"""``tools/plug_table.py``, on a miniature of icefall with its history."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_recipe import DATA, TRAIN, UTILS, replaced

ROOT = Path(__file__).resolve().parents[2]


def git(folder, *words):
    names = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", folder, *names, *words], check=True)


@pytest.fixture
def icefall(tmp_path):
    """Two recipes, one of them with two revisions, and a link."""
    root = tmp_path / "icefall"
    one = root / "egs" / "librispeech" / "ASR" / "zipformer"
    two = root / "egs" / "aishell" / "ASR" / "zipformer"
    link = root / "egs" / "speechio" / "ASR" / "zipformer"
    for folder in (one, two, link):
        folder.mkdir(parents=True)
    git(root, "init", "-q")
    for text in (replaced(TRAIN, "losses[:3]", "losses[:2]"), TRAIN):
        (one / "train.py").write_text(text)
        (one / "asr_datamodule.py").write_text(DATA)
        (one / "utils.py").write_text(UTILS)
        git(root, "add", "-A")
        git(root, "commit", "-qm", "a revision")
    (two / "train.py").write_text(TRAIN)
    (two / "train_char.py").write_text(replaced(TRAIN, "return loss, info", "return 1"))
    (two / "asr_datamodule.py").symlink_to(
        "../../../librispeech/ASR/zipformer/asr_datamodule.py"
    )
    (link / "train.py").symlink_to("../../../aishell/ASR/zipformer/train.py")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "more recipes")
    return root


def test_the_table(icefall, tmp_path):
    words = [sys.executable, ROOT / "tools" / "plug_table.py", "--icefall", icefall]
    words += ["--json", tmp_path / "table.json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 plugged, and 1 link" in done.stdout
    assert "2 of 2 plugged" in done.stdout
    table = json.loads((tmp_path / "table.json").read_text())
    found = {r["file"]: (r["result"], r["lines"]) for r in table["recipes"]}
    assert found == {
        "egs/aishell/ASR/zipformer/train.py": ("plugged", 5),
        "egs/aishell/ASR/zipformer/train_char.py": ("refused", 0),
        "egs/librispeech/ASR/zipformer/train.py": ("plugged", 5),
        "egs/speechio/ASR/zipformer/train.py": ("refused", 0),
    }
    why = [r["why"] for r in table["recipes"]]
    assert why[0] == why[2] == ""
    assert "(loss, info)" in why[1]
    assert "is a link to" in why[3]
    status = ["git", "-C", icefall, "status", "--porcelain"]
    done = subprocess.run(status, capture_output=True, text=True, check=True)
    assert done.stdout == ""

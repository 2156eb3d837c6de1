"""A place where ``kd.sh`` runs, with stand-ins of all that it calls."""

import json
import os
import subprocess
import sys

import pytest
from kd_stand_ins import SCRIPT, SCRIPTS, TOOL


@pytest.fixture
def place(tmp_path):
    asr = tmp_path / "icefall" / "egs" / "corpus" / "ASR"
    (asr / "zipformer" / "exp").mkdir(parents=True)
    (asr / "data" / "fbank" / "split").mkdir(parents=True)
    for name in ("train", "dev", "test", "split/a.1", "split/a.2", "split/a.3"):
        (asr / "data" / "fbank" / f"{name}.jsonl.gz").write_text(name)
    (tmp_path / "bin").mkdir()
    text = TOOL.format(python=sys.executable, calls=tmp_path / "calls")
    for path in [
        tmp_path / "bin" / "icefall-kd",
        *(asr / "zipformer" / f"{name}.py" for name in SCRIPTS),
    ]:
        more = '\n# "--context-size"\n' if path.name != "ctc_decode.py" else ""
        path.write_text(text + more)
        path.chmod(0o755)
    return asr


@pytest.fixture
def kd(place, tmp_path):
    defaults = {
        "--asr-dir": place,
        "--train-manifests": "train.jsonl.gz",
        "--test-manifests": "test.jsonl.gz",
        "--first-epochs": 1,
        "--kd-epochs": 2,
        "--last-epochs": 1,
        "--avg": 2,
        "--python": sys.executable,
    }

    def run(*words, script=SCRIPT, **changes):
        options = {**defaults}
        for name, value in changes.items():
            options["--" + name.replace("_", "-")] = value
        command = [script, *words]
        for name, value in options.items():
            command += [name, value]
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [str(c) for c in command],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
            cwd=tmp_path,
        )
        return done

    return run


@pytest.fixture
def calls(tmp_path):
    def read():
        path = tmp_path / "calls"
        rows = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(row) for row in rows]

    return read

"""``kd.sh`` to be stopped: icefall and ``icefall-kd`` are stand-ins that take time.

A checkpoint of a stand-in tells from which one before it was trained, and is written as
torch writes it: a zip archive, piece by piece, under its own name.
"""

import os
import re
import sys
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "egs" / "librispeech" / "ASR" / "kd.sh"

TOOL = """#!{python}
# "--context-size"
import hashlib, io, shutil, sys, time, zipfile
from pathlib import Path
name, words = Path(sys.argv[0]).name, sys.argv[1:]
FLAGS = "--use-ctc True --context-size 1"
def given(option):
    return words[words.index(option) + 1]
def checkpoint(path, text):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("words", text)
    data = data.getvalue()
    with open(path, "wb") as file:
        for i in range(0, len(data), 30):
            file.write(data[i : i + 30])
            file.flush()
            time.sleep(0.01)
def slowly(path, text):
    time.sleep(0.05)
    temporary = path.with_name("." + path.name)
    temporary.write_text(text)
    temporary.replace(path)
print(name, *words[:1], "begins", flush=True)
if name == "icefall-kd" and words[0] == "doctor":
    if "--write-flags" in words:
        Path(given("--write-flags")).write_text(FLAGS + "\\n")
elif name == "icefall-kd" and words[0] == "plug":
    ignored = shutil.ignore_patterns("exp")
    shutil.copytree(words[1], words[2], dirs_exist_ok=True, ignore=ignored)
elif name == "icefall-kd" and words[0] == "dump":
    out = Path([w for w in words if w.endswith(".jsonl.gz")][1])
    if "--num-jobs" in words:
        out = out.with_name(out.name + ".job-" + given("--job"))
    slowly(out, "targets")
elif name == "icefall-kd" and words[0] == "combine":
    slowly(Path(words[-1]), "targets")
elif name == "icefall-kd" and words[0] == "student":
    folder = Path(given("--student-dir"))
    folder.mkdir(parents=True, exist_ok=True)
    slowly(folder / "student_flags", "--encoder-dim 8,8 " + FLAGS)
    slowly(folder / "student.pt", "start")
    checkpoint(folder / ".epoch-1.pt", "start")
    (folder / ".epoch-1.pt").replace(folder / "epoch-1.pt")
elif name == "train.py":
    folder, first = Path(given("--exp-dir")), int(given("--start-epoch"))
    before = zipfile.ZipFile(folder / f"epoch-{{first - 1}}.pt").read("words")
    for e in range(first, int(given("--num-epochs")) + 1):
        kd = b" with distillation" if "--kd-config" in words else b" on hard labels"
        before = hashlib.sha256(before + kd).hexdigest().encode()
        time.sleep(0.05)
        checkpoint(folder / f"epoch-{{e}}.pt", before)
        print(folder.name, "has done epoch", e, flush=True)
elif name in ("decode.py", "ctc_decode.py"):
    folder = Path(given("--exp-dir")) / given("--decoding-method")
    folder.mkdir(parents=True, exist_ok=True)
    slowly(folder / "wer-summary-test.txt", "0.00")
print(name, "ends", flush=True)
"""
SCRIPTS = "train decode ctc_decode"


def prepare(folder: Path) -> None:
    asr = folder / "icefall" / "egs" / "corpus" / "ASR"
    (asr / "zipformer" / "exp").mkdir(parents=True)
    (asr / "zipformer" / "exp" / "epoch-30.pt").touch()
    (asr / "data" / "fbank").mkdir(parents=True)
    for name in ("train", "dev", "test"):
        (asr / "data" / "fbank" / f"{name}.jsonl.gz").write_bytes(b"")
    (folder / "bin").mkdir()
    text = TOOL.format(python=sys.executable)
    paths = [asr / "zipformer" / f"{name}.py" for name in SCRIPTS.split()]
    for path in [folder / "bin" / "icefall-kd", *paths]:
        path.write_text(text)
        path.chmod(0o755)


def command(folder: Path) -> List[str]:
    words = [str(SCRIPT), "--asr-dir", str(folder / "icefall/egs/corpus/ASR")]
    words += ["--train-manifests", "train.jsonl.gz", "--python", sys.executable]
    words += ["--test-manifests", "test.jsonl.gz"]
    for name, value in {"first": 2, "kd": 2, "last": 1}.items():
        words += [f"--{name}-epochs", str(value)]
    return [*words, "--avg", "2", "--num-jobs", "2"]


def env(folder: Path) -> Dict[str, str]:
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def done_twice(folder: Path, output: str) -> List[str]:
    """Epochs whose training came to its end more than once."""
    done = re.findall(r"(\S+ has done epoch \d+)", output)
    return sorted({line for line in done if done.count(line) > 1})

"""Stand-ins for icefall's scripts and ``icefall-kd``, which write down their calls."""

from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "egs" / "librispeech" / "ASR" / "kd.sh"

SCRIPTS = (
    "train decode ctc_decode export export-onnx export-onnx-ctc export-onnx-streaming "
    "export-onnx-streaming-ctc"
).split()

TOOL = """#!{python}
import json, shutil, sys, zipfile
from pathlib import Path
name, words = Path(sys.argv[0]).name, sys.argv[1:]
with open("{calls}", "a") as f:
    f.write(json.dumps([name, *words]) + "\\n")
def given(option):
    return words[words.index(option) + 1]
def checkpoint(path, text):  # a zip archive, as torch writes it
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("words", text)
def flags_of(model):
    path = Path("{calls}").with_name(model)
    return path.read_text() if path.exists() else "--use-ctc True --context-size 1"
if name == "icefall-kd" and words[0] == "doctor":
    if "--write-flags" in words:
        Path(given("--write-flags")).write_text(flags_of("teacher") + "\\n")
elif name == "icefall-kd" and words[0] == "plug":
    shutil.copytree(words[1], words[2], dirs_exist_ok=True)
elif name == "icefall-kd" and words[0] == "dump":
    jobs = given("--num-jobs") if "--num-jobs" in words else "1"
    out = [w for w in words if w.endswith(".jsonl.gz")][1]
    if jobs == "1":
        Path(out).write_text("targets")
elif name == "icefall-kd" and words[0] in ("label", "filter"):
    out = [w for w in words if w.endswith(".jsonl.gz")][1]
    if "--job" not in words or given("--job") == "0":
        Path(out).write_text(" ".join(words))
elif name == "icefall-kd" and words[0] == "mix":
    Path(words[1]).write_text("mixed")
elif name == "icefall-kd" and words[0] == "combine":
    Path(words[-1]).write_text("targets")
elif name == "icefall-kd" and words[0] == "student":
    folder = Path(given("--student-dir"))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint(folder / "epoch-1.pt", "start")
    (folder / "student_flags").write_text("--encoder-dim 8,8 " + flags_of("student"))
elif name == "icefall-kd" and words[0] == "export":
    sys.exit(Path("{calls}").with_name("stop").exists())
elif name == "train.py":
    for e in range(int(given("--start-epoch")), int(given("--num-epochs")) + 1):
        if Path("{calls}").with_name("stop").exists() and e == 4:
            sys.exit(1)
        checkpoint(Path(given("--exp-dir")) / f"epoch-{{e}}.pt", " ".join(words))
elif name in ("decode.py", "ctc_decode.py") or words[0] == "decode":
    folder = Path(given("--exp-dir")) / given("--decoding-method")
    folder.mkdir(parents=True, exist_ok=True)
"""

# A launcher that is called as Kaldi's are: OPTION VALUE ... JOB=1:N LOG COMMAND ....
# Like them it hands words to a shell without quotes, in an environment with PATH alone.
LAUNCHER = """#!{python}
import os, re, subprocess, sys
words = sys.argv[1:]
options = []
while words[0].startswith("-"):
    options += [words.pop(0), words.pop(0)]
first, last = map(int, re.fullmatch("JOB=([0-9]+):([0-9]+)", words.pop(0)).groups())
assert first == 1 <= last and "JOB" in words[0]
with open("{launches}", "a") as f:
    f.write(f"{{' '.join(options)}} {{last}} {{' '.join(words)}}\\n")
jobs = []
for number in range(first, last + 1):
    log, *command = [word.replace("JOB", str(number)) for word in words]
    shell = ["bash", "-c", f"( {{' '.join(command)}} ) > {{log}} 2>&1"]
    env = {{"PATH": os.environ["PATH"]}}
    jobs.append(subprocess.Popen(shell, env=env))
sys.exit(any([job.wait() for job in jobs]))
"""


def given(call, option):
    return call[call.index(option) + 1]


def trained(rows):
    """Folder, epochs and whether distillation was on, of each training."""
    return [
        (
            Path(given(r, "--exp-dir")).name,
            int(given(r, "--start-epoch")),
            int(given(r, "--num-epochs")),
            "--kd-config" in r,
        )
        for r in rows
        if r[0] == "train.py"
    ]

"""The commands that are stopped, in miniature, and how their results are compared."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List

import commands_of_tones
import stop_kd_script

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "egs" / "digits" / "ASR"
TINY = {
    "num-train": 120,
    "num-dev": 8,
    "num-test": 8,
    "teacher-epochs": 3,
    "student-epochs": 2,
    "num-threads": 1,
}
# Its trainings go on until the dev WER, which a file has of each epoch, says no.
TO_THE_END = {**commands_of_tones.TINY, "teacher-epochs": 4, "student-epochs": 3}
# Told when they were made, or how long something took.
UNLIKE = re.compile(
    r"(^|/)(log|tensorboard)/|(^|/)log-|summary\.md$|\.lock$|(^|/)\.\d\.|__pycache__"
)


@dataclass
class Scenario:
    """A command that works in a folder of its own."""

    name: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], List[str]]
    env: Callable[[Path], Dict[str, str]] = lambda folder: ENV
    cwd: Path = ROOT
    done_twice: Callable[[Path, str], List[str]] = lambda folder, output: []


ENV = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}

# Comparison


def _numbers(value, digest) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        for key in value:
            digest.update(str(key).encode())
            _numbers(value[key], digest)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _numbers(one, digest)
    else:
        digest.update(repr(value).encode())


def _of_checkpoint(path: Path) -> bytes:
    """Of what a training goes on with; no paths, no times."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as e:  # torch raises many kinds for half a file
        return f"can't be read: {e}".encode()
    # The sampler counts batches since it was made: an epoch takes up none of that.
    names = "model model_avg optimizer scheduler hidden first_epoch"
    digest = hashlib.sha256()
    for name in [
        *names.split(),
        *sorted(k for k in state if "best" in k or "idx" in k),
    ]:
        _numbers(state.get(name), digest)
    return digest.digest()


def _content(path: Path, folder: Path) -> bytes:
    if path.is_symlink():
        return os.readlink(path).replace(str(folder), "FOLDER").encode()
    if path.suffix == ".pt" and not zipfile.is_zipfile(path):
        return b"half a checkpoint"
    if path.suffix == ".pt" and "data.pkl" in str(zipfile.ZipFile(path).namelist()):
        return _of_checkpoint(path)
    if path.suffix == ".pt":  # a stand-in's
        return zipfile.ZipFile(path).read("words")
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as e:
            return f"can't be read: {e}".encode()
    if path.name == "summary.json":
        rows = [{**row, "rtf": 0} for row in json.loads(data)]
        data = json.dumps(rows).encode()
    if path.name == "parity.json":
        values = json.loads(data)
        values["forms"] = [{**row, "rtf": 0} for row in values["forms"]]
        data = json.dumps(values).encode()
    if path.name == "parity.md":  # of parity.json
        data = b""
    if path.name == "dev-wer.csv":
        rows = [line.split(b",") for line in data.splitlines()]
        data = repr([row[:2] + row[3:] for row in rows]).encode()  # no seconds
    return data.replace(bytes(folder), b"FOLDER")


def tree(folder: Path) -> Dict[str, str]:
    """A hash of each file below ``folder``, whose own name does not count."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (path.is_file() or path.is_symlink()) and not UNLIKE.search(name):
            found[name] = hashlib.sha256(_content(path, folder)).hexdigest()[:12]
    return found


# The recipes of digits and commands


def run_sh(recipe: str, folder: Path, first: int, last: int) -> List[str]:
    """A recipe's stages ``first`` to ``last``."""
    words = [str(DIGITS.parents[1] / recipe / "ASR" / "run.sh"), "--work-dir", folder]
    for name, value in (TINY if recipe == "digits" else TO_THE_END).items():
        words += [f"--{name}", value]
    return [*map(str, words), "--stage", str(first), "--stop-stage", str(last)]


def make_base(recipe: str, base: Path) -> None:
    """A whole recipe, whose work folder other scenarios start from."""
    command = run_sh(recipe, base, 0, 9)
    if recipe == "commands":
        clone = base.with_name(f"{base.name}-clone")
        shutil.rmtree(clone, ignore_errors=True)
        command += ["--corpus-dir", str(commands_of_tones.make_clone(clone))]
    done = subprocess.run(command, env={**os.environ, **ENV}, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"the recipe fails in {base}")


def epochs_begun(folder: Path, output: str) -> List[str]:
    """Epochs that began more often than a stop explains."""
    begun: Dict[str, int] = {}
    for path in folder.glob("exp/*/log/log-train-*"):
        for epoch in re.findall(r"Epoch (\d+), batch 0,", path.read_text()):
            name = f"{path.parts[-3]} epoch {epoch}"
            begun[name] = begun.get(name, 0) + 1
    models = {name.split()[0] for name, n in begun.items() if n > 1}
    repeated = sum(n - 1 for n in begun.values())
    return [f"{name}: {n}" for name, n in begun.items()] * (repeated > len(models))


def stages(recipe: str, base: Path, first: int, last: int) -> Scenario:
    def prepare(folder: Path) -> None:
        if first == 1:
            (folder / "exp").mkdir(parents=True)
            for name in (".0.done", ".settings"):
                shutil.copy(base / "exp" / name, folder / "exp" / name)
            return
        audio = shutil.ignore_patterns("audio")
        shutil.copytree(base, folder, symlinks=True, ignore=audio)
        for n in range(first, 11):
            (folder / "exp" / f".{n}.done").unlink(missing_ok=True)
            for mark in folder.glob(f"exp/.{n}.*"):
                mark.unlink()
        if first <= 4:
            for path in folder.glob("exp/*/log/log-train-*"):
                path.unlink()

    return Scenario(
        f"{recipe} {first}-{last}",
        prepare,
        lambda folder: run_sh(recipe, folder, first, last),
        done_twice=epochs_begun,
    )


# icefall-kd

# Stretches of 30 s in place of 1000 s, so that a miniature has several.
PROGRAM = """
import sys
from icefall_kd.cli import main
if sys.argv[1] == "dump":
    import icefall_kd.targets.batches as batches
    batches.STRETCH = 30.0
main()
"""


def commands(base: Path) -> List[Scenario]:
    bpe = base / "data/lang_bpe_54/bpe.model"
    fbank = base / "data/fbank/cuts_train.jsonl.gz"
    stored = base / "data/kd/cuts_train.jsonl.gz"
    teacher = ["--recipe", DIGITS / "zipformer", "--exp-dir", base / "exp/teacher"]
    teacher += ["--epoch", 3, "--avg", 1, "--bpe-model", bpe]
    kept = ["--keep-lattice", "dense", "--keep-hidden", "out:half"]
    kept += ["--num-threads", 1, "--max-duration", 30]

    def program(*words) -> List[str]:
        return [sys.executable, "-c", PROGRAM, *map(str, words)]

    def dump(folder: Path, *words) -> List[str]:
        return program(
            "dump", *teacher, *kept, *words, fbank, folder / "train.jsonl.gz"
        )

    def two_jobs(folder: Path) -> List[str]:
        job = dump(folder, "--num-jobs", 2, "--job")
        job[-2:-2] = ['"$1"']
        text = f". {DIGITS}/shared/stoppable.sh; job() {{ run "
        text += " ".join(w if w == '"$1"' else f"'{w}'" for w in job)
        text += "; }; in_background job 0; other=$!; job 1; wait $other"
        return ["bash", "-euc", text]

    def with_jobs(folder: Path) -> None:
        folder.mkdir(parents=True)
        subprocess.run(two_jobs(folder), check=True, env={**os.environ, **ENV})
        (folder / "train.jsonl.gz").unlink()

    def with_shar(folder: Path) -> None:
        from lhotse import CutSet

        (folder / "shar").mkdir(parents=True)
        cuts = CutSet.from_file(stored).to_eager()
        cuts = [c.drop_recording() for c in cuts]
        CutSet.from_cuts(cuts).to_shar(
            folder / "shar", {"features": "numpy"}, shard_size=10, verbose=False
        )
        gz = folder / "shar.jsonl.gz"
        shutil.copy(stored, gz)

    def with_recipe(folder: Path) -> None:
        folder.mkdir(parents=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(DIGITS / "zipformer", folder / "zipformer", ignore=ignored)
        for name in ("train.py", "asr_datamodule.py"):
            path = folder / "zipformer" / name
            lines = path.read_text().splitlines(keepends=True)
            bare = [x for x in lines if not re.search(r"\bkd\.|\bas kd\b", x)]
            path.write_text("".join(bare))

    make = Path.mkdir
    models = [f"{name}={base / 'exp' / name}" for name in ("teacher", "student-kd")]
    return [
        Scenario("dump", make, dump),
        Scenario("dump two jobs", make, two_jobs),
        Scenario(
            "combine",
            with_jobs,
            lambda f: program("combine", "--num-jobs", 2, fbank, f / "train.jsonl.gz"),
        ),
        Scenario(
            "quantizer",
            make,
            lambda f: program(
                "quantizer", *teacher, "--layer", "out", "--num-codebooks", 2
            )
            + ["--num-vectors", "900", "--iters", "20", str(fbank), str(f / "q.pt")],
        ),
        Scenario(
            "student",
            make,
            lambda f: program("student", *teacher, "--student-dir", f / "student")
            + ["--set", "num-encoder-layers=1,1,1", "--layers", "important"]
            + ["--cuts", str(fbank), "--num-cuts", "24"],
        ),
        Scenario(
            "shar",
            with_shar,
            lambda f: program("shar", f / "shar.jsonl.gz", f / "shar"),
        ),
        Scenario(
            "plug",
            with_recipe,
            lambda f: program("plug", f / "zipformer", f / "zipformer_kd"),
        ),
        Scenario(
            "report",
            make,
            lambda f: program("report", "--model", models[0], "--model", models[1])
            + ["--targets", str(stored), str(f / "report")],
        ),
    ]


def kd_sh() -> Scenario:
    return Scenario(
        "kd.sh",
        stop_kd_script.prepare,
        stop_kd_script.command,
        stop_kd_script.env,
        done_twice=stop_kd_script.done_twice,
    )


def scenarios(base: Path, only: List[str]) -> List[Scenario]:
    """Those of these names, or all; the base is made if they need it."""
    trained = base.with_name(f"{base.name}-commands")
    of_digits = [(1, 3), (4, 4), (5, 5), (6, 7), (8, 10)]
    groups = {
        base: [*commands(base), *(stages("digits", base, *s) for s in of_digits)],
        trained: [stages("commands", trained, *s) for s in [(4, 4), (6, 7)]],
    }
    found = [kd_sh(), *(s for group in groups.values() for s in group)]
    unknown = set(only) - {s.name for s in found}
    if unknown:
        raise SystemExit(
            f"--only has {sorted(unknown)}, and the commands are "
            f"{', '.join(s.name for s in found)}: name some of these"
        )
    found = [s for s in found if not only or s.name in only]
    for folder, group in groups.items():
        needed = any(s in found for s in group)
        if needed and not (folder / "exp" / ".9.done").exists():
            make_base("digits" if folder == base else "commands", folder)
    return found

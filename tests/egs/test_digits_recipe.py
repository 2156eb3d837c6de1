"""The whole digits recipe in miniature, as a user runs it."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from icefall_kd import load_model

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "digits" / "ASR"
TINY = {
    "num-train": 240,
    "num-dev": 8,
    "num-test": 12,
    "teacher-epochs": 2,
    "student-epochs": 2,
    "num-threads": 1,
    "untranscribed-speakers": "none",
}

# The scripts find the Python that runs the tests.
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "TORCHDYNAMO_DISABLE": "1",
}

pytestmark = pytest.mark.recipe


def words_of(work_dir, *words, **options):
    command = ["egs/digits/ASR/run.sh", "--work-dir", str(work_dir)]
    for name, value in {**TINY, **options}.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    return command + [str(w) for w in words]


def run_sh(work_dir, *words, **options):
    command = words_of(work_dir, *words, **options)
    root = RECIPE.parents[2]  # as the README calls it
    return subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=root)


def train_py(script, data, *words):
    return subprocess.run(
        [
            sys.executable,
            str(script),
            "--bpe-model",
            str(data / "lang_bpe_54/bpe.model"),
        ]
        + ["--num-threads", "1", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=RECIPE,
        env=ENV,
    )


def refused(done, *words):
    """One sentence on stderr with all of ``words`` in it, and exit status 1."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    said = [x for x in done.stderr.splitlines() if "error: " in x]
    assert len(said) == 1, done.stderr
    for word in words:
        assert word in said[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The recipe's folder of data and results, made stage by stage up to the table."""
    folder = tmp_path_factory.mktemp("digits")
    for stage in range(10):
        done = run_sh(folder, "--stage", stage, "--stop-stage", stage)
        assert done.returncode == 0, f"stage {stage}\n{done.stdout}\n{done.stderr}"
    return folder


def test_the_table_has_the_three_models_with_all_figures(work):
    rows = json.loads((work / "exp/summary.json").read_text())
    assert [r["model"] for r in rows] == ["teacher", "student", "student-kd"]
    for row in rows:
        assert row["params"] > 0 and row["rtf"] > 0 and row["seed"] == 42
        assert 0 <= row["ctc_wer"] and 0 <= row["transducer_wer"]
    teacher, student, distilled = rows
    assert student["params"] == distilled["params"] < teacher["params"] / 3
    assert student["steps"] == distilled["steps"] > 0
    assert "| student-kd |" in (work / "exp/summary.md").read_text()


def test_every_wer_in_the_table_is_that_of_the_result_files(work):
    for row in json.loads((work / "exp/summary.json").read_text()):
        for key, method in (
            ("ctc_wer", "ctc-greedy-search"),
            ("transducer_wer", "greedy_search"),
        ):
            (path,) = (work / "exp" / row["model"] / method).glob("errs-test-*.txt")
            line = path.read_text().splitlines()[0]
            wer, errors, words = re.match(
                r"%WER ([\d.]+)% \[(\d+) / (\d+),", line
            ).groups()
            assert float(wer) == row[key]
            assert float(wer) == pytest.approx(100 * int(errors) / int(words), abs=0.01)


def test_wers_have_intervals_and_distillation_a_ratio(work):
    rows = json.loads((work / "exp/summary.json").read_text())
    table = (work / "exp/summary.md").read_text()
    for head in ("ctc_wer", "transducer_wer"):
        for row in rows:
            low, high = row[f"{head}_interval"]
            assert low <= row[head] <= high
            assert f"{row[head]:.2f} [{low:.2f}, {high:.2f}]" in table
        assert not {f"{head}_ratio"} & {*rows[0], *rows[1]}
        ratio, low, high, p = rows[2][f"{head}_ratio"]
        assert ratio == pytest.approx(rows[2][head] / rows[1][head], rel=2e-3)
        assert low <= ratio <= high and 0 < p <= 1
    bars = (work / "exp/summary.txt").read_text().splitlines()
    assert len(bars) == 8
    lengths = {line.count("█"): float(line.split()[1]) for line in bars if "█" in line}
    longest = max(lengths)
    assert longest == 50 and lengths[longest] == max(lengths.values())
    for length, wer in lengths.items():
        assert length == round(50 * wer / lengths[longest])


def test_work_that_is_done_is_not_done_again(work):
    before = (work / "exp/teacher/epoch-1.pt").stat().st_mtime_ns
    done = run_sh(work, "--stop-stage", 9)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 10
    assert (work / "exp/teacher/epoch-1.pt").stat().st_mtime_ns == before
    assert "| student-kd |" in done.stdout
    assert "To try next" in done.stdout


def test_a_stage_asked_for_again_is_done_again_and_later_ones_are_due(work, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(work, copy)
    before = (copy / "exp/student/epoch-1.pt").stat().st_mtime_ns
    # The manifests name features by the path they were made with.
    done = run_sh(copy, "--stage", 6, "--stop-stage", 6, "--redo", "true")
    assert done.returncode == 0, done.stderr
    assert (copy / "exp/student/epoch-1.pt").stat().st_mtime_ns > before
    refused(run_sh(copy, "--stage", 8, "--stop-stage", 8), "needs stage 7")


def test_other_settings_in_the_same_folder_are_refused(work):
    refused(run_sh(work, seed=7), "other settings", "seed=7", "--work-dir")


def stopped_sh(work_dir, file, number, *words):
    """Run the recipe, and stop all of it as soon as a file is there."""
    process = subprocess.Popen(
        words_of(work_dir, *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENV,
        cwd=RECIPE.parents[2],
        start_new_session=True,
    )
    while not file.exists():
        assert process.poll() is None, "it ended before"
        time.sleep(0.005)
    os.killpg(process.pid, number)
    assert process.wait(600) != 0


def same_parameters(a, b):
    a, b = (torch.load(path, weights_only=False) for path in (a, b))
    assert a["batch_idx_train"] == b["batch_idx_train"]
    for part in ("model", "model_avg"):
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), (part, name)


@pytest.fixture
def half_done(work, tmp_path):
    """A copy of the work folder, in which stage N and what follows is not done."""

    def copy(stage):
        folder = tmp_path / "copy"
        shutil.copytree(work, folder)
        for n in range(stage, 11):
            for mark in folder.glob(f"exp/.{n}.*"):
                mark.unlink()
        return folder

    return copy


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_teacher_that_was_stopped_goes_on_at_its_next_epoch(work, half_done, number):
    copy = half_done(4)
    teacher, stage = copy / "exp/teacher", ("--stage", 4, "--stop-stage", 4)
    stopped_sh(copy, copy / "exp/.4.begun", number, *stage)
    assert not (teacher / "epoch-1.pt").exists()  # of the run before
    stopped_sh(copy, teacher / "epoch-1.pt", number, *stage)
    first = (teacher / "epoch-1.pt").stat().st_mtime_ns
    done = run_sh(copy, *stage)
    assert done.returncode == 0, done.stderr
    assert "goes on where it was stopped" in done.stdout
    assert "training from epoch 2 to 2" in done.stdout
    assert (teacher / "epoch-1.pt").stat().st_mtime_ns == first
    for n in (1, 2):
        path = f"exp/teacher/epoch-{n}.pt"
        same_parameters(work / path, copy / path)
    assert not list(copy.rglob(".tmp*"))


@pytest.mark.slow
def test_students_that_were_stopped_go_on_with_projectors_and_all(work, half_done):
    copy = half_done(7)
    student, stage = copy / "exp/student-kd", ("--stage", 7, "--stop-stage", 7)
    (student / "epoch-2.pt").unlink()
    # Right behind a checkpoint, before any other batch.
    stopped_sh(copy, student / "epoch-2.pt", signal.SIGKILL, *stage)
    assert not (student / "epoch-3.pt").exists()
    done = run_sh(copy, *stage)
    assert done.returncode == 0, done.stderr
    assert "student-kd: training from epoch 3 to 3" in done.stdout
    for name in ("student", "student-kd"):
        same_parameters(
            work / f"exp/{name}/epoch-3.pt", copy / f"exp/{name}/epoch-3.pt"
        )
    projectors, again = (
        torch.load(f / "exp/student-kd/kd.pt")["newest"]["hidden"]["modules"]
        for f in (work, copy)
    )
    assert projectors.keys() == again.keys()
    assert all(torch.equal(projectors[k], again[k]) for k in projectors)


@pytest.mark.slow
def test_a_redo_that_was_stopped_is_not_begun_anew(work, half_done):
    copy = half_done(10)
    words = ("--stage", 6, "--stop-stage", 7, "--redo", "true")
    stopped_sh(copy, copy / "exp/.7.begun", signal.SIGTERM, *words)
    start = (copy / "exp/student/epoch-1.pt").stat().st_mtime_ns
    done = run_sh(copy, *words)
    assert done.returncode == 0, done.stderr
    assert "Stage 6: student: done before" in done.stdout
    assert (copy / "exp/student/epoch-1.pt").stat().st_mtime_ns == start
    assert not (copy / "exp/.redo").exists()
    done = run_sh(copy, "--stage", 6, "--stop-stage", 6, "--redo", "true")
    assert (copy / "exp/student/epoch-1.pt").stat().st_mtime_ns > start


@pytest.fixture
def without_sherpa(tmp_path):
    """An environment whose Python can't import sherpa_onnx."""
    package = tmp_path / "no" / "sherpa_onnx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not installed')")
    paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
    return {**ENV, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.slow
def test_without_sherpa_onnx_the_last_stage_is_left_out(work, without_sherpa):
    before = sorted((work / "exp").rglob("*"))
    words = words_of(work, "--stage", 9)
    options = {"capture_output": True, "text": True, "cwd": RECIPE.parents[2]}
    done = subprocess.run(words, env=without_sherpa, **options)
    assert done.returncode == 0, done.stderr
    assert "Stage 10: export: left out" in done.stdout
    assert "pip install onnx onnxruntime sherpa-onnx" in done.stdout
    assert "| student-kd |" in done.stdout
    words = words_of(work, "--stage", 10)
    done = subprocess.run(words, env=without_sherpa, **options)
    refused(done, "stage 10", "pip install onnx onnxruntime sherpa-onnx")
    assert sorted((work / "exp").rglob("*")) == before


@pytest.mark.slow
def test_the_last_stage_runs_the_student_in_sherpa_onnx(work, tmp_path):
    """From audio, with both heads: what torch says."""
    pytest.importorskip("sherpa_onnx")
    copy = tmp_path / "copy"
    shutil.copytree(work, copy)
    done = run_sh(copy, "--stage", 10)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| sherpa-onnx fp32 | ctc |" in done.stdout
    folder = copy / "exp/student-kd/export"
    result = json.loads((folder / "parity.json").read_text())
    rows = {(row["form"], row["head"]): row for row in result["forms"]}
    for head in ("transducer", "ctc"):
        for form in ("torch", "fp32", "sherpa-onnx fp32"):
            row = rows[form, head]
            assert row["same"] == row["cuts"] == TINY["num-test"], (form, head)
    assert not list(folder.glob("*.failed"))
    # Done is done, and other flags are other settings.
    assert "Stage 10: export" in run_sh(copy, "--stage", 10).stdout
    flags = ("--stage", 10, "--export-flags", "--forms torchscript,onnx")
    refused(run_sh(copy, *flags), "other settings", "--forms torchscript,onnx")
    # Files that are not the student's are replaced when the stage is done again.
    (folder / "tokens.txt").write_text("nothing")
    done = run_sh(copy, *flags, "--redo", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| torchscript | ctc |" in (folder / "parity.md").read_text()


@pytest.mark.slow
def test_settings_bind_no_folder_that_has_no_results(tmp_path):
    nothing = ["--corpus", "fsdd", "--corpus-dir", "/nowhere"]
    for seed in (1, 2):
        done = run_sh(tmp_path, *nothing, "--seed", seed, "--stop-stage", 1)
        refused(done, "/nowhere")


def test_a_released_teacher_is_the_averaged_one_in_half_precision(work, tmp_path):
    script = RECIPE / "local" / "release_teacher.py"
    exp, lang = work / "exp/teacher", work / "data/lang_bpe_54"
    released = tmp_path / "exp"

    def release(lang_dir):
        words = ["--exp-dir", exp, "--epoch", 2, "--lang-dir", lang_dir]
        words += ["--output-dir", released]
        command = [sys.executable, str(script), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=ENV)

    refused(release(tmp_path), "has no bpe.model", "run stage 3")
    assert not list(tmp_path.iterdir())
    assert release(lang).returncode == 0
    subprocess.run(
        ["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=released, check=True
    )
    shutil.copy(released / "pretrained.pt", released / "epoch-99.pt")
    recipe = RECIPE / "zipformer"
    model, settings = load_model(recipe, exp, 2, avg=1, use_averaged_model=True)
    half, same = load_model(recipe, released, 99, avg=1, use_averaged_model=False)
    assert same["vocab_size"] == settings["vocab_size"]
    for name, value in model.state_dict().items():
        rounded = value.half().float() if value.is_floating_point() else value
        assert torch.equal(half.state_dict()[name], rounded), name


def test_the_distilled_checkpoint_has_exactly_the_keys_of_the_plain_one(work):
    plain, distilled = (
        torch.load(work / f"exp/{name}/epoch-2.pt", weights_only=False)
        for name in ("student", "student-kd")
    )
    assert plain.keys() == distilled.keys()
    for part in ("model", "model_avg"):
        assert plain[part].keys() == distilled[part].keys()
    same = [
        torch.equal(plain["model"][k], distilled["model"][k]) for k in plain["model"]
    ]
    assert not all(same)


def test_the_distilled_student_logged_its_kd_term(work):
    (log,) = (work / "exp/student-kd/log").glob("log-train-*")
    assert re.search(
        r"loss\[kd_ctc_loss=[\d.]+, kd_frames=[\d.]+, "
        r"kd_rnnt_loss=[\d.]+, kd_rnnt_frames=[\d.]+, "
        r"kd_hidden_loss=[\d.]+, kd_hidden_frames=[\d.]+, loss=",
        log.read_text(),
    )
    (log,) = (work / "exp/student/log").glob("log-train-*")
    assert "kd_ctc_loss=" not in log.read_text()


def without_kd_lines(folder):
    """A copy of the recipe's scripts without the lines that name kd."""
    folder.mkdir()
    removed = 0
    for name in ("train.py", "asr_datamodule.py"):
        lines = (RECIPE / "zipformer" / name).read_text().splitlines(keepends=True)
        kept = [x for x in lines if not re.search(r"\bkd\.|\bas kd\b", x)]
        removed += len(lines) - len(kept)
        (folder / name).write_text("".join(kept))
    assert removed == 7  # five in train.py, two in the data module
    for path in (RECIPE / "zipformer").glob("*.py"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder / "train.py"


def logged_losses(exp_dir):
    (log,) = (exp_dir / "log").glob("log-train-*")
    lines = [x for x in log.read_text().splitlines() if "loss=" in x]
    return [x.split("] ", 1)[1] for x in lines]


def test_with_kd_weight_zero_losses_and_parameters_are_those_of_the_plain_recipe(
    work, tmp_path
):
    plain = without_kd_lines(tmp_path / "plain")
    results = []
    for script, words in (
        (plain, []),
        (RECIPE / "zipformer/train.py", ["--kd-ctc-weight", "0"]),
    ):
        exp_dir = tmp_path / f"exp{len(results)}"
        shutil.copytree(work / "exp/student", exp_dir, ignore=lambda *_: ["log"])
        flags = (exp_dir / "student_flags").read_text().split()
        words += ["--manifest-dir", work / "data/kd", "--start-epoch", 2, *flags]
        done = train_py(
            script, work / "data", "--exp-dir", exp_dir, "--num-epochs", 2, *words
        )
        assert done.returncode == 0, done.stderr
        model = torch.load(exp_dir / "epoch-2.pt", weights_only=False)["model"]
        results.append((logged_losses(exp_dir), model))
    (losses, model), (kd_losses, kd_model) = results
    assert len(losses) >= 2
    assert [re.sub(r"^.*?Epoch", "Epoch", x) for x in losses] == [
        re.sub(r"^.*?Epoch", "Epoch", x) for x in kd_losses
    ]
    assert all(torch.equal(model[k], kd_model[k]) for k in model)


# A process imports all, which takes most of the time, once for several command lines.
# Each has a process of its own, forked from it, and says all in a file.
TRAIN_EACH = """
import json, os, sys
sys.path.insert(0, "zipformer")
import torch, train
if hasattr(torch, "compile"):
    import torch._dynamo  # as the model's functions do
for number, words in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        said = os.open(f"{sys.argv[2]}/{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.argv = ["train.py", "--num-threads", "1", *words]
        sys.exit(train.main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture
def train_each(tmp_path):
    """Run train.py with several command lines; return how each ended."""

    def run(lines):
        (tmp_path / "said").mkdir()
        words = json.dumps([list(map(str, line)) for line in lines])
        command = [sys.executable, "-c", TRAIN_EACH, words, tmp_path / "said"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=RECIPE, env=ENV
        )
        assert done.returncode == 0, done.stderr
        said = [(tmp_path / "said" / str(i)).read_text() for i in range(len(lines))]
        return [
            subprocess.CompletedProcess(line, int(status), "", text)
            for line, status, text in zip(lines, done.stdout.split(), said)
        ]

    return run


OUT_OF_RANGE = [
    (["--kd-ctc-weight", "-1"], ["--kd-ctc-weight is -1"]),
    (["--kd-ctc-weight", "1", "--kd-hard-weight", "nan"], ["--kd-hard-weight is nan"]),
    (["--kd-ctc-weight", "1", "--kd-temperature", "0"], ["temperature", "0"]),
    (["--kd-ctc-weight", "1", "--kd-time-warp", "on"], ["--kd-time-warp is on"]),
    (["--manifest-dir", "nowhere"], ["nowhere", "--manifest-dir"]),
]


def test_options_out_of_range_are_refused_in_one_sentence(work, tmp_path, train_each):
    exp, data = tmp_path / "exp", work / "data"
    common = ["--bpe-model", data / "lang_bpe_54/bpe.model", "--exp-dir", exp]
    common += ["--manifest-dir", data / "kd"]
    ended = train_each([[*common, *words] for words, _ in OUT_OF_RANGE])
    for done, (_, said) in zip(ended, OUT_OF_RANGE, strict=True):
        refused(done, *said)
    assert not list(exp.glob("*.pt"))


def changed_manifests(work, folder, change):
    """A copy of data/kd whose first training cut was changed; the cut's id."""
    shutil.copytree(work / "data/kd", folder)
    path = folder / "cuts_train.jsonl.gz"
    with gzip.open(path, "rt") as f:
        cuts = [json.loads(line) for line in f]
    change(cuts[0])
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(c) + "\n" for c in cuts)
    return cuts[0]["id"]


BAD_CUTS = [  # with the weight of KD
    (lambda c: c.update(supervisions=[]), "0 supervisions", 1),
    (lambda c: c["supervisions"][0].update(text=" "), "empty text", 0),
    (lambda c: c["supervisions"][0].update(text="NINE " * 60), "tokens", 1),
    (lambda c: c["custom"].clear(), "1 of 240 training cuts have no targets", 1),
]


def test_bad_cuts_are_refused_in_one_sentence(work, tmp_path, train_each):
    exp, bpe_model = tmp_path / "exp", work / "data/lang_bpe_54/bpe.model"
    common = ["--bpe-model", bpe_model, "--exp-dir", exp]
    lines, ids = [], []
    for i, (change, _, weight) in enumerate(BAD_CUTS):
        ids.append(changed_manifests(work, tmp_path / f"kd-{i}", change))
        words = ["--manifest-dir", tmp_path / f"kd-{i}", "--kd-ctc-weight", weight]
        lines.append([*common, *words])
    ended = train_each(lines)
    for done, cut_id, (_, said, _) in zip(ended, ids, BAD_CUTS, strict=True):
        refused(done, cut_id, said)
    assert not list(exp.glob("*.pt"))


def test_a_bpe_model_of_another_size_is_refused(work, tmp_path):
    done = subprocess.run(
        [sys.executable, str(RECIPE / "local/train_bpe_model.py"), "--vocab-size", "26"]
        + ["--lang-dir", str(tmp_path / "data/lang_bpe_54")]
        + ["--manifest", str(work / "data/manifests/cuts_train.jsonl.gz")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = ["--manifest-dir", work / "data/kd", "--exp-dir", tmp_path / "exp"]
    words += ["--kd-ctc-weight", "1"]
    done = train_py(RECIPE / "zipformer/train.py", tmp_path / "data", *words)
    refused(done, "26 tokens", "54", "--bpe-model")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--corpus", "fsdd"], ["--corpus-dir"]),
        (["--corpus", "librispeech"], ["librispeech", "espeak or fsdd"]),
        (["--corpus", "commands", "--corpus-dir", "x"], ["commands", "espeak or fsdd"]),
        (["--teacher-set", "joiner-dim=8 joiner"], ["--teacher-set", "'joiner'"]),
        (["--patience", "2", "--long-factor", "2"], ["--patience 2", "--long-factor"]),
        (["--no-such-option", "1"], ["--no-such-option"]),
        (
            ["--corpus", "fsdd", "--corpus-dir", "/nowhere", "--stop-stage", "1"],
            ["/no"],
        ),
    ],
)
def test_run_sh_refuses_bad_options(tmp_path, words, said):
    refused(run_sh(tmp_path, *words), *said)
    assert not list(tmp_path.glob("data/manifests/*"))

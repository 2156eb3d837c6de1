"""The recipe of Arabic commands in miniature, on tones in place of speech.

All of these are slow: the digits recipe, whose scripts it shares, runs by default.
"""

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
from commands_of_tones import RECIPE, TINY, TRAIN, make_clone

ROOT = RECIPE.parents[2]
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "TORCHDYNAMO_DISABLE": "1",
}

pytestmark = [pytest.mark.recipe, pytest.mark.slow]


def words_of(work_dir, *words, **options):
    command = [str(RECIPE / "run.sh"), "--work-dir", str(work_dir)]
    for name, value in {**TINY, **options}.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    return command + [str(w) for w in words]


def run_sh(work_dir, *words, **options):
    command = words_of(work_dir, *words, **options)
    return subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=ROOT)


def run_well(work_dir, *words, **options):
    done = run_sh(work_dir, *words, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def refused(done, *words):
    """One sentence on stderr with all of ``words`` in it, and exit status 1."""
    assert done.returncode == 1, done.stdout + done.stderr
    (said,) = [x for x in done.stderr.splitlines() if "error: " in x]
    for word in words:
        assert word in said


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory, clone):
    """The work folder of a run up to the tokens."""
    folder = tmp_path_factory.mktemp("begun")
    run_well(folder, corpus_dir=clone, stop_stage=3)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory, clone):
    """The work folder of a whole run."""
    folder = tmp_path_factory.mktemp("commands")
    run_well(folder, corpus_dir=clone)
    return folder


@pytest.fixture
def copy_until(work, tmp_path):
    """A copy of the work folder, in which stage N and what follows is not done."""

    def copy(stage):
        folder = tmp_path / "copy"
        shutil.copytree(work, folder)
        for n in range(stage, 11):
            for mark in folder.glob(f"exp/.{n}.*"):
                mark.unlink()
        return folder

    return copy


def cuts_of(path):
    with gzip.open(path, "rt") as f:
        return [json.loads(line) for line in f]


def rows_of(folder):
    """The rows of dev-wer.csv without the seconds."""
    lines = (folder / "dev-wer.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    return [row[:2] + row[3:] for row in rows]


def same_training(a, b, last):
    assert rows_of(a) == rows_of(b)
    assert (a / "best-epoch").read_text() == (b / "best-epoch").read_text()
    a, b = (torch.load(f / f"epoch-{last}.pt", weights_only=False) for f in (a, b))
    assert a["batch_idx_train"] == b["batch_idx_train"]
    for part in ("model", "model_avg"):
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), (part, name)


def test_the_table_has_the_best_epochs_of_three_trainings(work):
    rows = json.loads((work / "exp/summary.json").read_text())
    assert [r["model"] for r in rows] == ["teacher", "student", "student-kd"]
    assert rows[1]["params"] == rows[2]["params"] < rows[0]["params"]
    for row in rows:
        folder = work / "exp" / row["model"]
        best = int((folder / "best-epoch").read_text())
        mean = {int(r[0]): float(r[2]) + float(r[3]) for r in rows_of(folder)}
        assert best == min(mean, key=mean.get) and best >= 2
        last = torch.load(folder / f"epoch-{best}.pt", weights_only=False)
        assert row["steps"] == last["batch_idx_train"]
        assert last["sample_rate"] == 16000 and last["avg"] == 2


def test_seconds_are_those_of_training_in_the_checkpoint(work):
    for name in ("teacher", "student", "student-kd"):
        lines = (work / f"exp/{name}/dev-wer.csv").read_text().splitlines()[1:]
        before = 0.0
        for epoch, _, seconds, *_ in (line.split(",") for line in lines):
            path = work / f"exp/{name}/epoch-{epoch}.pt"
            saved = torch.load(path, weights_only=False)["train_seconds"]
            assert before < saved and float(seconds) == round(saved, 1)
            before = saved
    # A student's first checkpoint was made from its teacher's settings.
    first = torch.load(work / "exp/student/epoch-1.pt", weights_only=False)
    assert first["batch_idx_train"] == 0


def test_a_run_that_is_done_does_nothing(work, clone):
    before = (work / "exp/student-kd/dev-wer.csv").stat().st_mtime_ns
    done = run_well(work, corpus_dir=clone)
    stages = re.findall(r"Stage (\d+): .*: (done before|left out)", done.stdout)
    # The last one is left out where sherpa-onnx is not installed.
    assert [int(number) for number, _ in stages] == list(range(11))
    assert {what for _, what in stages[:10]} == {"done before"}
    assert (work / "exp/student-kd/dev-wer.csv").stat().st_mtime_ns == before
    assert "--long-factor" not in done.stdout and "fsdd" not in done.stdout


@pytest.mark.parametrize(
    "name, value",
    [("patience", 2), ("avg", 1), ("num_untranscribed", 9), ("corpus_seed", 7)]
    + [("train_flags", ""), ("dump_flags", "--keep ctc"), ("teacher_set", "a=1")],
)
def test_other_settings_in_the_same_folder_are_refused(begun, clone, name, value):
    done = run_sh(begun, corpus_dir=clone, **{name: value})
    refused(done, "other settings", f"{name}={value}", "--work-dir")


def test_students_that_were_killed_go_on_and_end_the_same(work, clone, copy_until):
    copy = copy_until(7)
    for name in ("student", "student-kd"):
        for path in (copy / "exp" / name).iterdir():
            if path.name not in ("epoch-1.pt", "student_flags"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = ("--stage", 7, "--stop-stage", 7)
    process = subprocess.Popen(
        words_of(copy, *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENV,
        cwd=ROOT,
        start_new_session=True,
    )
    # Between the checkpoint and the row of dev-wer.csv.
    while not (copy / "exp/student-kd/epoch-2.pt").exists():
        assert process.poll() is None, "it ended before"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(600) != 0
    assert not (copy / "exp/student-kd/dev-wer.csv").exists()
    done = run_well(copy, *words)
    assert "student-kd: training from epoch 3 to 3" in done.stdout
    for name in ("student", "student-kd"):
        same_training(work / "exp" / name, copy / "exp" / name, 3)


def test_the_student_says_in_sherpa_onnx_what_torch_says(work):
    pytest.importorskip("sherpa_onnx")
    path = work / "exp/student-kd/export/parity.json"
    rows = json.loads(path.read_text("utf8"))["forms"]
    of_sherpa = [row for row in rows if row["form"] == "sherpa-onnx fp32"]
    assert {row["head"] for row in of_sherpa} == {"transducer", "ctc"}
    for row in of_sherpa:
        assert row["same"] == row["cuts"] == int(TINY["num-test"])


def train_py(folder, data, *words):
    return subprocess.run(
        [sys.executable, str(RECIPE / "zipformer/train.py"), "--exp-dir", str(folder)]
        + ["--bpe-model", str(data / "lang_bpe_28/bpe.model"), "--avg", "2"]
        + ["--manifest-dir", str(data / "fbank"), "--num-threads", "1"]
        + [str(w) for w in words],
        capture_output=True,
        text=True,
        cwd=RECIPE,
        env=ENV,
    )


def test_a_training_with_patience_decodes_dev_after_each_epoch_from_the_second(
    begun, tmp_path
):
    flags = TINY["train-flags"].split()
    for setting in TINY["teacher-set"].split():
        name, _, value = setting.partition("=")
        flags += [f"--{name}", value]
    words = [*flags, "--patience", 1, "--num-epochs", 2, "--sample-rate", 16000]
    done = train_py(tmp_path, begun / "data", *words)
    assert done.returncode == 0 and "Epoch 2: dev WER" in done.stderr, done.stderr
    (row,) = rows_of(tmp_path)
    steps = torch.load(tmp_path / "epoch-2.pt", weights_only=False)["batch_idx_train"]
    assert row[:2] == ["2", str(steps)] and (tmp_path / "best-epoch").is_file()
    # Another period has no average with the checkpoints of before.
    words += ["--start-epoch", 3, "--num-epochs", 3, "--average-period", 3]
    done = train_py(tmp_path, begun / "data", *words)
    refused(done, "--average-period is 3", "give --average-period 2")
    assert not (tmp_path / "epoch-3.pt").exists()


def test_a_training_that_is_over_does_nothing_when_started_again(begun, tmp_path):
    folder = tmp_path / "over"
    folder.mkdir()
    text = "epoch,steps,seconds,ctc,transducer\n2,9,1.0,50.00,60.00\n"
    text += "3,18,2.0,51.00,60.00\n"
    (folder / "dev-wer.csv").write_text(text)
    words = ["--patience", 1, "--start-epoch", 4, "--num-epochs", 9]
    done = train_py(folder, begun / "data", *words)
    assert done.returncode == 0 and "Over: no better WER for 1 epochs" in done.stderr
    assert {p.name for p in folder.iterdir()} == {"dev-wer.csv", "log"}
    assert (folder / "dev-wer.csv").read_text() == text


def test_cuts_too_few_for_a_batch_are_refused(begun, tmp_path):
    done = train_py(tmp_path, begun / "data", "--max-duration", 5000)
    refused(done, "--max-duration 5000", "0 batches")
    assert not list(tmp_path.glob("*.pt"))


def test_a_damaged_dev_wer_is_refused_before_any_training(begun, tmp_path):
    (tmp_path / "dev-wer.csv").write_text("epoch,steps\n1,2\n")
    done = train_py(tmp_path, begun / "data", "--patience", 1, "--num-epochs", 2)
    refused(done, "dev-wer.csv is damaged")
    assert not list(tmp_path.glob("*.pt"))


def test_speakers_without_transcripts_are_in_no_train_cut_beside_a_teacher_of_all(
    work, clone, tmp_path
):
    folder, teacher = tmp_path / "speakers", {"teacher_work_dir": work}
    options = {**teacher, "untranscribed_speakers": "00000002,00000009"}
    done = run_sh(folder, corpus_dir=clone, vocab_size=29, **teacher)
    refused(done, "lang_bpe_29 has no bpe.model", "--vocab-size")
    run_well(folder, corpus_dir=clone, stop_stage=2, **options)
    fbank = folder / "data" / "fbank"
    speakers = {
        split: {c["supervisions"][0]["speaker"] for c in cuts_of(path)}
        for split, path in (
            (s, fbank / f"cuts_{s}.jsonl.gz") for s in ("train", "train-untranscribed")
        )
    }
    without = {"00000002", "00000009"}
    assert speakers["train"] == set(TRAIN) - without
    assert speakers["train-untranscribed"] == without


def test_a_teacher_whose_training_is_not_over_is_refused(work, clone, copy_until):
    copy = copy_until(4)
    done = run_sh(copy.parent / "new", corpus_dir=clone, teacher_work_dir=copy)
    refused(done, str(copy), "not trained to the end")
    (copy / "exp/teacher/best-epoch").unlink()
    (copy / "exp/teacher/epoch-2.pt").unlink()
    done = run_sh(copy.parent / "new", corpus_dir=clone, teacher_work_dir=copy)
    refused(done, "has no epoch-2.pt")
    assert not (copy.parent / "new" / "exp").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ([], ["--corpus commands needs --corpus-dir"]),
        (["--corpus", "fsdd"], ["the corpus is 'fsdd', and must be commands"]),
        (
            ["--corpus-dir", "/nowhere", "--stop-stage", "1"],
            ["/nowhere has no train.csv"],
        ),
        (
            ["--corpus-dir", "x", "--long-factor", "2"],
            ["--patience 1", "--long-factor 2"],
        ),
        (["--corpus-dir", "x", "--teacher-set", "a=1 b"], ["--teacher-set has 'b'"]),
    ],
)
def test_run_sh_refuses_bad_options(tmp_path, words, said):
    refused(run_sh(tmp_path, *words), *said)
    assert not list(tmp_path.glob("data/manifests/*"))

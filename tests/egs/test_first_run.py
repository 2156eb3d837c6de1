"""The first run: the released teacher, and voices without transcripts."""

import gzip
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from test_digits_recipe import ENV, RECIPE, refused

ROOT = RECIPE.parents[2]
RELEASED = RECIPE / "pretrained"
# No option that the teacher depends on.
SMALL = {"num-train": 60, "num-dev": 4, "num-test": 10, "student-epochs": 1}

pytestmark = pytest.mark.recipe


def first(work_dir, *words, recipe=RECIPE, **options):
    command = [str(recipe / "run.sh"), "--work-dir", str(work_dir)]
    for name, value in {**SMALL, **options}.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    command += ["--num-threads", "1", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=ROOT)


def script(name, *words):
    return subprocess.run(
        [sys.executable, str(RECIPE / "local" / name), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=RECIPE,
        env=ENV,
    )


def cuts_of(path):
    with gzip.open(path, "rt") as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The work folder of a first run up to the targets."""
    folder = tmp_path_factory.mktemp("first")
    done = first(folder, "--stop-stage", 5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The teacher is that of pretrained/" in done.stdout
    return folder


def test_the_released_teacher_has_at_most_5_mb_and_its_checksums():
    sizes = [path.stat().st_size for path in RELEASED.iterdir()]
    assert sum(sizes) <= 5_000_000
    subprocess.run(
        ["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=RELEASED, check=True
    )


def test_the_released_teacher_has_no_states_and_no_paths():
    states = torch.load(RELEASED / "pretrained.pt", weights_only=True)
    assert all(
        value.dtype == torch.float16
        for value in states["model"].values()
        if value.is_floating_point()
    )
    assert states["seed"] == 42 and states["batch_idx_train"] > 1000
    assert not {"optimizer", "scheduler", "sampler", "model_avg"} & set(states)
    assert not any("/" in str(v) for k, v in states.items() if k != "model")


def test_the_first_run_trains_no_teacher(begun):
    assert [p.name for p in (begun / "exp/teacher").glob("*.pt")] == ["epoch-99.pt"]
    (bpe,) = (begun / "data").glob("lang_bpe_54/bpe.model")
    assert bpe.read_bytes() == (RELEASED / "bpe.model").read_bytes()


def test_four_of_five_voices_have_the_teachers_transcripts_alone(begun):
    fbank = begun / "data/fbank"
    whole = {c["id"]: c for c in cuts_of(fbank / "cuts_train.jsonl.gz")}
    with_text = cuts_of(fbank / "cuts_train-transcribed.jsonl.gz")
    without = cuts_of(fbank / "cuts_train-untranscribed.jsonl.gz")
    assert {c["id"] for c in with_text + without} == set(whole)
    assert len(with_text) + len(without) == len(whole) == 60

    def voices(cuts):
        return {c["supervisions"][0]["speaker"].split("_", 1)[1] for c in cuts}

    assert not voices(with_text) & voices(without)
    assert 3 < len(voices(without)) / len(voices(with_text)) < 5
    assert all(c == whole[c["id"]] for c in with_text)
    assert all("text" not in c["supervisions"][0] for c in without)
    said = cuts_of(fbank / "cuts_train-labelled.jsonl.gz")
    right = sum(
        c["supervisions"][0]["text"] == whole[c["id"]]["supervisions"][0]["text"]
        for c in said
    )
    # The teacher has heard these voices, and its transcripts are not the true ones.
    assert 0.5 < right / len(said) < 1
    targets = cuts_of(begun / "data/kd/cuts_train-labelled.jsonl.gz")
    assert {c["id"] for c in targets} == {c["id"] for c in said}


def test_a_teacher_of_other_options_is_trained(tmp_path):
    options = {"train_teacher": "false", "teacher_epochs": 2}
    refused(first(tmp_path, **options), "--train-teacher is false", "--teacher-epochs")
    refused(first(tmp_path, train_teacher="no"), "--train-teacher is no", "auto, true")
    refused(
        first(tmp_path, untranscribed_speakers="f1"),
        "--untranscribed-speakers is f1",
        "most or none",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_released_teacher_is_refused(begun, tmp_path):
    recipe = tmp_path / "egs/digits/ASR"
    shutil.copytree(RECIPE, recipe, ignore=shutil.ignore_patterns("work*", "exp"))
    with open(recipe / "pretrained/pretrained.pt", "r+b") as f:
        f.seek(1000)
        f.write(b"damage")
    work = tmp_path / "work"
    shutil.copytree(begun, work)
    for mark in (work / "exp").glob(".[45].*"):
        mark.unlink()
    done = first(work, "--stage", 4, "--stop-stage", 4, recipe=recipe)
    refused(done, "pretrained/ is not as it was released", "git checkout")
    assert not list((work / "exp/teacher").glob("*.pt"))


def test_one_voice_can_not_be_split(begun, tmp_path):
    cuts = cuts_of(begun / "data/fbank/cuts_train.jsonl.gz")
    path = tmp_path / "cuts_train.jsonl.gz"
    with gzip.open(path, "wt") as f:
        f.write(json.dumps(cuts[0]) + "\n")
    refused(
        script("hide_transcripts.py", "--manifest", path), "has 1 voice", "at least 2"
    )
    refused(
        script("hide_transcripts.py", "--manifest", tmp_path / "x"), "does not exist"
    )
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_how_long_it_takes_grows_with_steps_and_epochs():
    settings = "encoder-dim=32,32,32 encoder-unmasked-dim=32,32,32 joiner-dim=64"

    def minutes(*words):
        done = script("how_long.py", "--student-set", settings, *words)
        assert done.returncode == 0, done.stderr
        step, total, stages = re.fullmatch(
            r"A step of the student's training takes ([\d.]+) s here, so all stages "
            r"take about (\d+) minutes \((.*)\)\n",
            done.stdout,
        ).groups()
        assert float(step) > 0
        return (
            float(step),
            int(total),
            dict(
                re.fullmatch(r"(.*) (\d+)", part).groups()
                for part in stages.split(", ")
            ),
        )

    step, total, stages = minutes("--num-utterances", 160000, "--student-epochs", 3)
    assert "teacher" not in stages
    assert abs(total - sum(map(int, stages.values()))) <= len(stages)
    # Both in steps, as the machine may be busier now.
    step2, total2, stages = minutes(
        *("--num-utterances", 160000, "--student-epochs", 3, "--teacher-epochs", 10)
    )
    assert int(stages["teacher"]) > 0 and total2 / step2 > 1.2 * total / step


@pytest.mark.slow
def test_the_whole_first_run_ends_with_intervals_and_a_picture(tmp_path):
    work = tmp_path / "work"
    done = first(work, num_train=900)  # of which 180 have transcripts
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((work / "exp/summary.json").read_text())
    assert [r["model"] for r in rows] == ["teacher", "student", "student-kd"]
    steps = torch.load(RELEASED / "pretrained.pt", weights_only=True)
    assert rows[0]["steps"] == steps["batch_idx_train"]
    for row in rows:
        for head in ("ctc_wer", "transducer_wer"):
            low, high = row[f"{head}_interval"]
            assert low <= row[head] <= high
    assert len(rows[2]["ctc_wer_ratio"]) == 4 and "ctc_wer_ratio" not in rows[1]
    table = (work / "exp/summary.md").read_text()
    assert "95 % intervals" in table and table in done.stdout
    assert "about" in done.stdout.split("Stage 6")[0]

"""``icefall-kd forecast``: what it prints and writes, and all refusals."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from lhotse import CutSet

from icefall_kd.forecast import measure as measure_module
from icefall_kd.forecast.measures import Interval, measures_of
from icefall_kd.forecast.verdict import decide
from icefall_kd.student.scores import score_heads

TEXTS = {"c1": "zero one", "c2": "seven", "c3": "two", "c4": "nine one"}
LENGTHS = {"c1": 47, "c2": 90, "c3": 61, "c4": 53}
NARROW = {"encoder_dim": "8,12", "encoder_unmasked_dim": "8,8", "joiner_dim": 12}


@pytest.fixture
def write_cuts(make_cut, tmp_path):
    def write(name, **options):
        path, text = tmp_path / f"{name}.jsonl.gz", options.pop("text", None)
        texts = {i: TEXTS[i] if text is None else text for i in TEXTS}
        cuts = [make_cut(i, n, text=texts[i], **options) for i, n in LENGTHS.items()]
        CutSet.from_cuts(cuts).to_file(path)
        return path

    return write


@pytest.fixture
def student_dir(teacher_exp, make_model, tmp_path):
    """As `icefall-kd student` writes it: parameters and settings, and no optimizer."""
    return write_epochs(teacher_exp, make_model, tmp_path / "student", [1], False)


def write_epochs(teacher_exp, make_model, folder, epochs, trained=True, **changes):
    folder.mkdir()
    checkpoint = torch.load(teacher_exp.folder / "epoch-2.pt", weights_only=False)
    changes = {"vocab_size": 25, **NARROW, **changes}
    for epoch in epochs:
        model = make_model(seed=20 + epoch, **changes)
        values = {**checkpoint, **changes, "model": model.state_dict()}
        values.pop("model_avg")
        if not trained:
            values.pop("optimizer")
        torch.save(values, folder / f"epoch-{epoch}.pt")
    return folder


@pytest.fixture
def baseline_dir(teacher_exp, make_model, tmp_path):
    return write_epochs(teacher_exp, make_model, tmp_path / "no-kd", [2, 3, 4])


@pytest.fixture
def words(teacher_words, bpe_models, write_cuts):
    cuts = write_cuts("dev")

    def make(*more, cuts=cuts):
        return [
            *("forecast", *teacher_words, "--bpe-model", bpe_models.a),
            *("--cuts", cuts, *more),
        ]

    return make


# What it says


def test_it_prints_measures_and_a_verdict_and_writes_both(
    invoke, words, student_dir, baseline_dir, tmp_path, loaded_once
):
    path = tmp_path / "forecast.json"
    done = invoke(
        *words("--student-dir", student_dir, "--baseline-dir", baseline_dir),
        *("--json", path),
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("4 cuts of ") and " with 6 words. " in lines[0]
    names = [line.partition("  ")[0] for line in lines]
    for name in ("teacher", "student before training", "student, epoch 4"):
        assert any(n.rstrip(" *") == name for n in names), name
    values = json.loads(path.read_text())
    measures = measures_of(values["measures"])
    verdict = decide(measures)
    assert values["verdict"]["answer"] == verdict.answer
    # Both are random models: they get all words wrong.
    assert verdict.answer == "no" and "wrong on too many words" in done.out
    assert [m.epoch for m in measures.epochs] == [2, 3, 4]
    assert "Not averaged over an epoch" in done.out
    assert any(line.startswith("CTC  ") for line in lines)
    assert any(line.startswith("lattice  ") for line in lines)


def test_the_teacher_s_row_has_what_the_student_command_would_print(
    words, invoke, student_dir, teacher, bpe_models, tmp_path, teacher_exp
):
    from icefall_kd.student.cuts import read_batches
    from icefall_kd.tokens import load_tokenizer

    path = tmp_path / "forecast.json"
    assert invoke(*words("--student-dir", student_dir, "--json", path)).code == 0
    heads = json.loads(path.read_text())["measures"]["teacher"]["heads"]
    sp = load_tokenizer(bpe_models.a)
    cuts = str(tmp_path / "dev.jsonl.gz")
    batches = read_batches(cuts, 300, teacher_exp.settings, sp)
    scores = score_heads(teacher, batches, sp)
    for head in ("ctc", "transducer"):
        assert heads[head]["loss"] == pytest.approx(getattr(scores, f"{head}_loss"))
        assert heads[head]["wer"]["value"] == getattr(scores, f"{head}_wer")


def test_the_start_is_found_in_the_folder_of_the_training(
    invoke, words, student_dir, baseline_dir, loaded_once
):
    shutil.copy(student_dir / "epoch-1.pt", baseline_dir)
    done = invoke(*words("--baseline-dir", baseline_dir, "--baseline-epochs", 2))
    assert done.code == 0
    assert "student before training" in done.out
    assert "student, epoch 1" not in done.out and "student, epoch 2" not in done.out
    assert "student, epoch 3" in done.out and "student, epoch 4" in done.out


def test_training_cuts_are_counted_by_their_transcripts(
    invoke, words, baseline_dir, write_cuts, loaded_once, tmp_path
):
    more = ["--train-cuts", write_cuts("a"), "--train-cuts", write_cuts("b", text="")]
    path = tmp_path / "forecast.json"
    done = invoke(*words("--baseline-dir", baseline_dir, *more, "--json", path))
    assert done.code == 0
    assert "Training cuts: 0.00 hours with transcripts and 0.00 without." in done.out
    values = json.loads(path.read_text())
    hours = sum(LENGTHS.values()) / 100 / 3600
    assert values["measures"]["transcribed"] == pytest.approx(hours)
    assert values["measures"]["untranscribed"] == pytest.approx(hours)
    assert values["verdict"]["situation"] == "untranscribed"


# Refusals


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "give --baseline-dir, the experiment folder"),
        (["--baseline-dir", "nowhere"], "the folder nowhere does not exist: give "),
        (["--difference", "100"], "--difference is 100, and must be a number"),
        (["--num-cuts", "0"], "--num-cuts is 0, and must be a whole number"),
        (
            ["--baseline-dir", ".", "--json", "no/such/file"],
            "--json no/such/file can't be written, as ",
        ),
    ],
)
def test_bad_options(refused, words, loaded_once, more, message):
    assert message in refused(*words(*more))


def test_several_teachers(refused, words, baseline_dir, teacher_exp):
    several = ["--exp-dir", f"{teacher_exp.folder},b"]
    message = refused(*words("--baseline-dir", baseline_dir, *several))
    assert "names 2 teachers" in message and "forecast takes one" in message


def test_a_folder_without_epochs(refused, words, student_dir, tmp_path, loaded_once):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", student_dir):
        message = refused(*words("--baseline-dir", folder))
        assert f"{folder} has no epoch-N.pt of a training: give --baseline" in message


def test_a_training_that_was_distilled(refused, words, baseline_dir, loaded_once):
    log = baseline_dir / "log"
    log.mkdir()
    line = "2025-03-04 08:00:00,000 INFO [train.py:1] {'kd_ctc_weight': 1.0}\n"
    (log / "log-train-2025-03-04-08-00-00").write_text(line)
    message = refused(*words("--baseline-dir", baseline_dir))
    assert "was distilled: give --baseline-dir one without distillation" in message


def test_a_student_folder_of_a_training(
    refused, words, teacher_exp, make_model, tmp_path, loaded_once
):
    folder = write_epochs(teacher_exp, make_model, tmp_path / "trained", [1])
    message = refused(*words("--student-dir", folder))
    assert "epoch-1.pt is of an epoch of training and no student before it" in message
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(*words("--student-dir", empty))
    assert f"{empty} has no epoch-1.pt: give --student-dir the folder" in message


def test_a_student_of_another_teacher(
    refused, words, teacher_exp, make_model, tmp_path, loaded_once
):
    make = (teacher_exp, make_model)
    start = write_epochs(*make, tmp_path / "other", [1], False, vocab_size=26)
    message = refused(*words("--student-dir", start))
    assert "has vocab_size 26 and the teacher in" in message
    trained = write_epochs(*make, tmp_path / "others", [2], vocab_size=26)
    message = refused(*words("--baseline-dir", trained))
    assert "has vocab_size 26 and the teacher in" in message


def test_a_training_of_another_student(
    refused, words, student_dir, teacher_exp, make_model, tmp_path, loaded_once
):
    changes = {"encoder_dim": "8,16"}
    larger = write_epochs(teacher_exp, make_model, tmp_path / "o", [2], **changes)
    message = refused(*words("--student-dir", student_dir, "--baseline-dir", larger))
    assert "of one student" in message and "parameters" in message


def test_cuts_that_do_not_fit(refused, words, baseline_dir, write_cuts, loaded_once):
    more = ["--baseline-dir", baseline_dir]
    wide = write_cuts("wide", num_features=40)
    message = refused(*words(*more, cuts=wide))
    assert "40 features a frame and the teacher takes 20" in message
    silent = write_cuts("silent", text="")
    message = refused(*words(*more, cuts=silent))
    assert "has no transcript, and the measure of a student needs one" in message
    message = refused(*words(*more, "--train-cuts", silent))
    assert "silent.jsonl.gz has a transcript: give --train-cuts the" in message
    message = refused(*words(*more, "--train-cuts", wide))
    assert "40 features a frame and the teacher takes 20" in message


def test_other_tokens(refused, words, baseline_dir, bpe_models, loaded_once):
    more = ["--baseline-dir", baseline_dir, "--bpe-model", bpe_models.larger]
    assert "26" in refused(*words(*more))
    assert "give --bpe-model" in refused(*words(*more[:3], ""))


def test_too_few_words_for_a_difference(
    refused_after_work, words, baseline_dir, monkeypatch
):
    """The models' gap is not 0, so that resampled gaps differ."""
    gaps = {"ctc": Interval(0.3, 0.1, 0.5)}
    measure = measure_module.measure
    monkeypatch.setattr(
        measure_module, "measure", lambda *args: replace(measure(*args), gaps=gaps)
    )
    more = ["--baseline-dir", baseline_dir, "--difference", 0.001]
    message = refused_after_work(*words(*more))
    assert "the 6 words of --cuts show a difference" in message
    assert "--difference is 0.001 %: give about" in message
    assert "words, with more cuts or --num-cuts, or a larger --difference" in message


@pytest.fixture
def refused_after_work(invoke, loaded_once):
    """As ``refused``, with a progress bar before the sentence."""

    def run(*words):
        done = invoke(*words)
        assert (done.code, done.out) == (1, "")
        assert done.err[-1].startswith("icefall_kd: error: ")
        return done.err[-1]

    return run

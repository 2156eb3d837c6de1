"""icefall-kd cascade, and a decoding in which the student answers first."""

import csv
import json
import math

import pytest
import torch
from lhotse import CutSet

pytest.importorskip("kaldialign")
pytest.importorskip("matplotlib")

STEM = "epoch-2_avg-1_context-2_max-sym-per-frame-1"


@pytest.fixture(scope="session")
def experiments(teacher_exp, tmp_path_factory):
    """A student and a teacher: untrained models with less of blank."""
    folders = []
    for name, less in (("student", 1.2), ("teacher", 2.0)):
        folder = tmp_path_factory.mktemp(name)
        checkpoint = torch.load(teacher_exp.folder / "epoch-2.pt", weights_only=False)
        checkpoint["model"]["joiner.output_linear.bias"][0] -= less
        torch.save(checkpoint, folder / "epoch-2.pt")
        folders.append(folder)
    return folders


@pytest.fixture
def cuts(make_cut, tmp_path):
    path = tmp_path / "cuts_dev.jsonl"
    made = [make_cut(f"c{i}", 30 + 7 * i, text="ein z ein") for i in range(9)]
    CutSet.from_cuts(made).to_file(path)
    return path


@pytest.fixture
def decode(invoke, teacher_words, teacher_exp, cuts, tmp_path):
    """Decode by a model; its journal, and what the command said."""

    def run(exp, name, *more, run=invoke):
        words = [
            *("decode", *teacher_words, "--exp-dir", exp),
            *("--bpe-model", teacher_exp.bpe_model, "--cuts", cuts),
            *("--res-dir", tmp_path / name, "--num-threads", 1, "--num-workers", 0),
        ]
        done = run(*words, *more)
        if run is invoke:
            assert done.code == 0, done
            (path,) = (tmp_path / name).glob("utterances-*")
            return path, done
        return done

    return run


@pytest.fixture
def both(decode, experiments):
    return [decode(exp, name)[0] for exp, name in zip(experiments, ("s", "t"))]


@pytest.fixture
def cascade_words(both, tmp_path):
    def words(*more):
        student, teacher = both
        files = ("--student", student, "--teacher", teacher)
        # Measured seconds are others in each run.
        cost = ("--cost", "multiply-adds")
        return ("cascade", tmp_path / "out", *files, *cost, *more)

    return words


def tokens_of(path):
    lines = path.read_text("utf8").splitlines()[1:]
    return {u["id"]: u["tokens"] for x in lines for u in json.loads(x)["utterances"]}


def test_the_teacher_answers_below_the_threshold_and_the_student_above(
    invoke, decode, both, cascade_words, experiments, tmp_path
):
    assert invoke(*cascade_words("--max-cost", 5)).code == 0
    path = tmp_path / "out" / "cascade.json"
    chosen = json.loads(path.read_text("utf8"))
    with open(tmp_path / "out" / "cascade.csv") as f:
        points = [p for p in csv.DictReader(f) if p["measure"] == chosen["measure"]]
    # A threshold that asks for some: it need not be the best.
    chosen["threshold"] = float(points[4]["threshold"])
    path.write_text(json.dumps(chosen))
    words = ("--cascade", path, "--answers", both[0])
    journal, done = decode(experiments[1], "c", *words)
    asked, student, teacher = map(tokens_of, (journal, *both))
    assert len(asked) == int(points[4]["asked"]) and 0 < len(asked) < 9
    assert all(asked[i] == teacher[i] for i in asked)
    assert f"{len(asked)} cuts decoded by the teacher, by" in done.out
    (summary,) = (tmp_path / "c").glob("decoding-*")
    summary = json.loads(summary.read_text("utf8"))
    # The rate is that of the curve's point.
    expected = float(points[4]["percent"])
    assert summary["percent"]["WER"] == pytest.approx(expected, abs=1e-3)
    (recogs,) = (tmp_path / "c").glob("recogs-*")
    assert recogs.read_text("utf8").count("hyp=") == 9
    seconds = json.loads(
        (both[0].parent / f"decoding-dev-{STEM}.json").read_text("utf8")
    )["seconds"]["encoder"]
    assert summary["seconds"]["encoder"] > seconds  # and the teacher's
    again = decode(experiments[1], "c", *words)[0]
    assert tokens_of(again) == asked


def test_the_files_have_the_curve_of_each_measure(invoke, cascade_words, tmp_path):
    done = invoke(*cascade_words())
    assert done.code == 0, done
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        f"cascade.{x}" for x in ("csv", "json", "svg", "txt")
    ]
    assert (out / "cascade.txt").read_text("utf8").strip() in done.out
    assert (out / "cascade.svg").read_text("utf8").startswith("<svg")
    with open(out / "cascade.csv") as f:
        rows = list(csv.DictReader(f))
    for name in ("token", "worst-token", "frame", "path", "heads"):
        curve = [row for row in rows if row["measure"] == name]
        # Two equal models: all of the teacher's cost beside the student's.
        assert float(curve[0]["cost"]) == pytest.approx(1, abs=1e-4)
        assert float(curve[-1]["cost"]) == pytest.approx(2, abs=1e-4)
        assert name in done.out


def test_the_cost_may_be_the_seconds_that_were_measured(
    invoke, cascade_words, tmp_path
):
    done = invoke(*cascade_words("--cost", "seconds"))
    assert done.code == 0, done
    assert "Error rates in percent by cost, seconds;" in done.out
    chosen = json.loads((tmp_path / "out" / "cascade.json").read_text("utf8"))
    assert chosen["cost"] == "seconds" and chosen["expected"]["cost"] > 0


def test_a_wish_that_no_threshold_fulfils_is_refused(refused, cascade_words):
    sentence = refused(*cascade_words("--max-cost", 0.0001))
    assert "--max-cost is 0.0001, and the student alone costs" in sentence
    sentence = refused(*cascade_words("--max-rate", 0))
    assert "--max-rate is 0, and the lowest error rate of the cascade is" in sentence
    sentence = refused(*cascade_words("--max-rate", 1, "--max-cost", 1))
    assert "both given" in sentence


def test_decodings_of_other_cuts_are_refused(
    refused, cascade_words, decode, experiments, make_cut, tmp_path
):
    path = tmp_path / "others.jsonl"
    CutSet.from_cuts([make_cut("x", 50), make_cut("y", 60)]).to_file(path)
    more = ("--cuts", path, "--test-set", "dev")
    others, _ = decode(experiments[0], "others", *more)
    sentence = refused(*cascade_words("--student", others))
    assert "have other utterances or references" in sentence
    others.with_name(f"errs-dev-{STEM}.txt").unlink()
    sentence = refused(*cascade_words("--student", others))
    assert "there is no" in sentence and "again, to its end" in sentence
    sentence = refused(*cascade_words("--student", tmp_path / "no-such"))
    assert "can't be read" in sentence


def test_answers_and_models_that_are_not_the_cascades_are_refused(
    invoke, refused, decode, both, cascade_words, experiments, make_cut, tmp_path
):
    assert invoke(*cascade_words()).code == 0
    path = tmp_path / "out" / "cascade.json"
    student, teacher = both
    words = ("--cascade", path, "--answers", student)

    def no(exp, *more):
        return decode(exp, "c", *more, run=refused)

    assert "for another teacher" in no(experiments[0], *words)
    of_ctc = ("--decoding-method", "ctc-greedy-search")
    assert "or another search than this one" in no(experiments[1], *words, *of_ctc)
    padded = ("--causal-padding", 0)
    assert "or another search than this one" in no(experiments[1], *words, *padded)
    words = ("--cascade", path, "--answers", teacher)
    assert "is of another student" in no(experiments[1], *words)
    assert "go together" in no(experiments[1], "--cascade", path)
    others = tmp_path / "others.jsonl"
    CutSet.from_cuts([make_cut("x", 50)]).to_file(others)
    words = ("--cascade", path, "--answers", student, "--cuts", others)
    assert "is of another manifest" in no(experiments[1], *words)
    path.write_text("{}")
    words = ("--cascade", path, "--answers", student)
    assert "is no threshold" in no(experiments[1], *words)


def test_a_student_without_ctc_head_has_the_measures_of_its_tokens(
    invoke, refused, cascade_words, decode, another_exp, experiments, both
):
    folder, _ = another_exp(use_ctc=False)
    journal, _ = decode(folder, "no-ctc")
    words = cascade_words("--student", journal)
    done = invoke(*words)
    assert done.code == 0 and "worst-token" in done.out and "frame" not in done.out
    assert "--measure is heads, and the student's" in refused(
        *words, "--measure", "heads"
    )
    assert math.isfinite(
        json.loads((words[1] / "cascade.json").read_text("utf8"))["threshold"]
    )

"""``kd.sh --unlabelled-manifests``: what is asked of icefall_kd, and in which order."""

import pytest
from kd_stand_ins import given, trained

BARE = {"unlabelled_manifests": "split/a.1.jsonl.gz split/a.2.jsonl.gz"}


def manifests_of(row):
    return [w for w in row if w.endswith(".jsonl.gz")]


def test_speech_is_labelled_filtered_dumped_and_mixed_in(kd, calls, place):
    done = kd(**BARE, mix_weights="3 1 1", label_flags="--max-duration 100")
    assert done.returncode == 0, done.stderr
    rows = calls()
    commands = [r[1] for r in rows if r[0] == "icefall-kd"]
    stage_2 = "label label filter filter dump dump dump mix".split()
    assert commands[: len(stage_2) + 2] == ["doctor", "plug", *stage_2]
    by_name = {
        name: [r for r in rows if r[1] == name] for name in ("label", "filter", "dump")
    }
    names = [f"split/a.{i}.jsonl.gz" for i in (1, 2)]
    assert [manifests_of(r) for r in by_name["label"]] == [
        [f"data/fbank/{n}", f"data/kd/labels/{n}"] for n in names
    ]
    assert {given(r, "--max-duration") for r in by_name["label"]} == {"100"}
    assert [manifests_of(r) for r in by_name["filter"]] == [
        [f"data/kd/labels/{n}", f"data/kd/kept/{n}"] for n in names
    ]
    assert {given(r, "--max-repeats") for r in by_name["filter"]} == {"4"}
    assert [manifests_of(r) for r in by_name["dump"]] == [
        ["data/fbank/train.jsonl.gz", "data/kd/parts/train.jsonl.gz"],
        *([f"data/kd/kept/{n}", f"data/kd/parts/{n}"] for n in names),
    ]
    (mix,) = [r for r in rows if r[1] == "mix"]
    parts = [f"data/kd/parts/{n}" for n in ("train.jsonl.gz", *names)]
    assert manifests_of(mix) == ["data/kd/train.jsonl.gz", *parts]
    assert [mix[i + 1] for i, w in enumerate(mix) if w == "--weight"] == ["3", "1", "1"]
    assert (place / "data/kd/train.jsonl.gz").read_text() == "mixed"
    assert trained(rows)[1] == ("kd", 3, 4, True)


def test_jobs_share_the_labels_and_take_the_dumps_in_turn(kd, calls):
    done = kd(stage=1, stop_stage=2, num_jobs=2, **BARE)
    assert done.returncode == 0, done.stderr
    rows = calls()
    labels = [r for r in rows if r[1] == "label"]
    assert sorted(given(r, "--job") for r in labels) == ["0", "0", "1", "1"]
    assert sum(r[1] == "dump" for r in rows) == 3
    assert kd(stage=3, stop_stage=3, num_jobs=2, **BARE).returncode == 0


def test_a_teacher_without_a_transducer_labels_by_its_ctc_head(kd, calls, tmp_path):
    (tmp_path / "teacher").write_text("--use-ctc True --use-transducer False")
    assert kd(stop_stage=2, **BARE).returncode == 0
    (label, _) = [r for r in calls() if r[1] == "label"]
    assert given(label, "--decoding-method") == "ctc-greedy-search"


def test_targets_of_what_another_filter_kept_are_made_anew(kd, place):
    assert kd(stop_stage=2, **BARE).returncode == 0
    record = place / "data/kd/parts/split/a.1_kd" / "records"
    record.parent.mkdir()
    record.touch()
    assert kd(stage=2, stop_stage=2, **BARE).returncode == 0
    assert record.exists()
    flags = "--max-repeats 2"
    assert kd(stage=2, stop_stage=2, filter_flags=flags, **BARE).returncode == 0
    assert not record.exists()
    assert (place / "data/kd/parts/split/a.1.jsonl.gz").read_text() == "targets"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"unlabelled_manifests": "none.jsonl.gz"}, "--unlabelled-manifests"),
        ({"unlabelled_manifests": "train.jsonl.gz"}, "name it in one"),
        ({**BARE, "mix_weights": "3 1"}, "give 3 numbers"),
        ({**BARE, "num_jobs": 2, "job": 0}, "--num-jobs alone"),
        ({**BARE, "stage": 3}, "run stage 2 with them"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(kd, calls, changes, words):
    assert kd(stop_stage=2).returncode == 0
    calls()
    done = kd(**changes)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any(r[1] in ("label", "dump", "student") for r in calls())


def test_students_of_another_mixture_are_not_mixed_up(kd, calls):
    assert kd(stop_stage=4, **BARE).returncode == 0
    done = kd(stage=5, filter_flags="--max-repeats 2", **BARE)
    assert done.returncode == 1 and "mixture" in done.stderr

"""``kd.sh``: what it asks of icefall and of icefall_kd, stage by stage.

Both are stand-ins here, which write down how they are called.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kd_stand_ins import SCRIPT, given, trained

EXPORTED = {
    "--exp-dir": "zipformer_kd/exp-s/kd",
    "--epoch": "5",
    "--avg": "2",
    "--encoder-dim": "8,8",
    "--bpe-model": "data/lang_bpe_500/bpe.model",
    "--export-dir": "zipformer_kd/exp-s/kd/export",
    "--forms": "torchscript,onnx",
    "--check": "data/fbank/test.jsonl.gz",
    "--num-cuts": "200",
}


def test_all_stages_one_after_the_other(kd, calls, place):
    done = kd()
    assert done.returncode == 0, done.stderr
    rows = calls()
    commands = [r[1] for r in rows if r[0] == "icefall-kd"]
    assert commands == "doctor plug dump student doctor export report report".split()
    assert trained(rows) == [
        ("start", 2, 2, False),
        ("kd", 3, 4, True),
        ("kd", 5, 5, False),
        ("no-kd", 3, 5, False),
    ]
    for r in rows:
        if r[0] == "train.py":
            assert given(r, "--manifest-dir") == "data/kd"
            assert given(r, "--encoder-dim") == "8,8"
            assert given(r, "--use-ctc") == "True"
    decoded = [
        (Path(given(r, "--exp-dir")).name, r[0], given(r, "--epoch"), given(r, "--avg"))
        for r in rows
        if "decode" in r[0]
    ]
    scripts = ("decode.py", "decode.py", "ctc_decode.py")
    assert decoded == [
        (*m, e, a)
        for name, e, a in (("exp", "30", "9"), ("kd", "5", "2"), ("no-kd", "5", "2"))
        for m in ((name, s) for s in scripts)
    ]
    for r in rows:  # by the recipe itself, which knows nothing of distillation
        if r[0] in scripts:
            assert not any("kd-" in w.split("/")[0] for w in r)
            # A parser that lacks it doesn't get it.
            assert ("--context-size" in r) == (r[0] != "ctc_decode.py")
            student = given(r, "--exp-dir") != "zipformer/exp"
            assert ("--encoder-dim" in r) == student
            assert not any("chunk" in w or "left-context" in w for w in r)
    (exported,) = [r for r in rows if r[:2] == ["icefall-kd", "export"]]
    for option, value in EXPORTED.items():
        assert given(exported, option) == value
    # What is not distilled is read from where it stands.
    link = place / "data" / "kd" / "dev.jsonl.gz"
    assert link.is_symlink() and link.read_text() == "dev"
    assert not (place / "data" / "kd" / "train.jsonl.gz").is_symlink()


def test_icefall_kd_decodes_the_test_manifests_beside_the_recipes_scripts(
    kd, calls, place
):
    for name in ("a", "b"):
        (place / "data" / "fbank" / f"{name}.jsonl.gz").write_text(name)
    decode = "decode.py:greedy_search icefall-kd:greedy_search"
    options = {"decode": f"{decode} icefall-kd:ctc-greedy-search", "baseline": "false"}
    done = kd(**options, test_manifests="a.jsonl.gz b.jsonl.gz", unit="CER")
    assert done.returncode == 0, done.stderr
    everything = calls()
    rows = [r for r in everything if r[:2] == ["icefall-kd", "decode"]]
    folders = ("zipformer/exp", "zipformer_kd/exp-s/kd")
    assert [
        tuple(given(r, f"--{x}") for x in ("exp-dir", "decoding-method", "cuts"))
        for r in rows
    ] == [
        (folder, method, f"data/fbank/{name}.jsonl.gz")
        for folder in folders
        for method in ("greedy_search", "ctc-greedy-search")
        for name in ("a", "b")
    ]
    assert {given(r, "--unit") for r in rows} == {"CER"}
    assert {given(r, "--epoch") for r in rows} == {"30", "5"}
    assert sum(r[0] == "decode.py" for r in everything) == 2
    assert kd("--stage", 8, **options, test_manifests="a.jsonl.gz").returncode == 0
    assert not any("decode" in " ".join(r[:2]) for r in calls())


def test_a_missing_test_manifest_is_refused_before_the_training(kd, calls):
    done = kd(decode="icefall-kd:greedy_search", test_manifests="no.jsonl.gz")
    assert done.returncode == 1
    assert "has no no.jsonl.gz: give --test-manifests" in done.stderr
    assert not any(r[0] == "train.py" for r in calls())


def test_a_second_run_does_nothing_again(kd, calls):
    assert kd().returncode == 0
    calls()
    done = kd()
    assert done.returncode == 0, done.stderr
    again = [r[:2] for r in calls()]
    assert {r[1] for r in again} == {"doctor", "plug", "dump", "export", "report"}
    assert "has its epoch 5" in done.stdout and "greedy_search is done" in done.stdout


def test_training_goes_on_at_the_epoch_where_it_stopped(kd, calls, tmp_path):
    (tmp_path / "stop").touch()
    assert kd().returncode != 0
    assert trained(calls())[-1] == ("kd", 3, 4, True)
    (tmp_path / "stop").unlink()
    assert kd(stage=3).returncode == 0
    assert trained(calls())[0] == ("kd", 4, 4, True)


def test_students_of_other_settings_are_not_mixed_up(kd, calls):
    assert kd(stop_stage=4).returncode == 0
    calls()
    for changes in ({"student": "3m"}, {"kd_epochs": 9}, {"kd_flags": "--kd-x 1"}):
        done = kd(exp_dir="zipformer_kd/exp-s", **changes)
        assert (
            done.returncode == 1 and "holds students of other settings" in done.stderr
        )
        assert len(done.stderr.splitlines()) == 1
        assert {r[1] for r in calls()} <= {"doctor"}
    assert kd(stage=8, stop_stage=8, kd_epochs=2).returncode == 0


def test_one_manifest_is_shared_by_jobs(kd, calls, place):
    done = kd(stage=1, stop_stage=2, num_jobs=3)
    assert done.returncode == 0, done.stderr
    dumps = [r for r in calls() if r[1] == "dump"]
    assert sorted(given(r, "--job") for r in dumps) == ["0", "1", "2"]
    assert {given(r, "--num-jobs") for r in dumps} == {"3"}
    done = kd(stage=3, stop_stage=3, num_jobs=3)
    assert done.returncode == 0 and calls()[0][:4] == [
        "icefall-kd",
        "combine",
        "--num-jobs",
        "3",
    ]


def test_several_manifests_are_taken_in_turn(kd, calls, place):
    changes = {"train_manifests": "split/a.*.jsonl.gz", "num_jobs": 2}
    for job, own in (("0", ["a.1", "a.3"]), ("1", ["a.2"])):
        done = kd(stage=1, stop_stage=2, job=job, **changes)
        assert done.returncode == 0, done.stderr
        dumps = [r for r in calls() if r[1] == "dump"]
        assert ["--num-jobs" in r for r in dumps] == [False] * len(own)
        ins = [[w for w in r if w.endswith(".gz")][0] for r in dumps]
        assert ins == [f"data/fbank/split/{name}.jsonl.gz" for name in own]
    assert (place / "data/kd/split/a.2.jsonl.gz").read_text() == "targets"
    assert (place / "data/kd/train.jsonl.gz").is_symlink()


def test_no_baseline_and_no_hidden_layers(kd, calls):
    assert kd(baseline="false", keep_hidden="").returncode == 0
    rows = calls()
    assert "no-kd" not in [t[0] for t in trained(rows)]
    (dump,) = (r for r in rows if r[1] == "dump")
    assert "--keep-hidden" not in dump and "--keep-simple" not in dump
    report = [r for r in rows if r[1] == "report"][0]
    assert not any("without KD" in w for w in report)


def test_the_simple_joiners_targets_are_kept_if_told(kd, calls):
    assert kd(baseline="false", keep_simple="top:8").returncode == 0
    (dump,) = (r for r in calls() if r[1] == "dump")
    assert dump[dump.index("--keep-simple") + 1] == "top:8"


@pytest.mark.parametrize("name", ["aishell", "gigaspeech", "wenetspeech"])
def test_other_recipes_are_a_file(kd, calls, place, tmp_path, name):
    manifests = {
        "aishell": "aishell_cuts_train",
        "gigaspeech": "gigaspeech_XL_split/gigaspeech_cuts_XL.0001",
        "wenetspeech": "cuts_L_fixed",
    }
    path = place / "data" / "fbank" / f"{manifests[name]}.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_text("cuts")
    for model in ("teacher", "student"):  # of these recipes: a transducer alone
        (tmp_path / model).write_text("--context-size 1")
    command = [SCRIPT, "--config", f"conf/{name}.sh", "--asr-dir", place]
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*map(str, command), "--stop-stage", "5", "--python", sys.executable],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    rows = calls()
    assert [f"data/kd/{manifests[name]}.jsonl.gz" in r for r in rows if r[1] == "dump"]
    assert trained(rows)[-1][3] and "--use-ctc" not in rows[-1]
    (dump,) = (r for r in rows if r[1] == "dump")
    assert given(dump, "--keep") == "none" and "--keep-lattice" in dump


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"asr_dir": ""}, "--asr-dir is missing"),
        ({"recipe": "zapformer"}, "has no folder zapformer"),
        ({"train_manifests": "other.jsonl.gz"}, "has no other.jsonl.gz"),
        ({"manifest_dir": "data/none"}, "data/none has no train.jsonl.gz"),
        ({"kd_config": "conf/none.yaml"}, "the file conf/none.yaml does not exist"),
        ({"config": "none.sh"}, "the file none.sh does not exist"),
        ({"avg": 5}, "has 4 epochs to average"),
        ({"avg": 0}, "give 1 to 4"),
        ({"kd_epochs": 0}, "must be a whole number from 1"),
        ({"kd_epochs": "many"}, "is 'many', and must be a whole number"),
        ({"baseline": "yes"}, "must be true or false"),
        ({"stage": 3, "stop_stage": 3}, "there are no targets"),
        ({"stage": 2, "stop_stage": 2}, "run stage 1 first"),
        ({"colour": "red"}, "there is no option --colour"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(kd, calls, changes, words):
    done = kd(**changes)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any(r[0] == "train.py" for r in calls())


def test_stages_that_need_others_say_so(kd, calls):
    assert kd(stop_stage=3).returncode == 0
    done = kd(stage=5, stop_stage=5)
    assert done.returncode == 1 and "has no epoch-2.pt: run stages 3 and 4" in (
        done.stderr
    )
    assert kd(stage=4, stop_stage=4).returncode == 0
    done = kd(stage=6, stop_stage=6)
    assert done.returncode == 1 and "kd has no epoch-4.pt: run the stages before" in (
        done.stderr
    )
    assert kd(stage=7, stop_stage=7).returncode == 0


def test_help_lists_stages_and_options(kd):
    done = kd("--help")
    assert done.returncode == 0
    for words in (
        "Stages: 0 checks",
        "--teacher-epoch 30",
        "--num-jobs 1",
        "10 report",
    ):
        assert words in done.stdout


def test_a_manifest_may_be_distilled_after_another(kd, calls, place):
    """What the first run linked is no manifest with targets."""
    assert kd(stage=1, stop_stage=2).returncode == 0
    link = place / "data" / "kd" / "split" / "a.1.jsonl.gz"
    assert link.is_symlink()
    changes = {"train_manifests": "split/a.1.jsonl.gz", "exp_dir": "other"}
    done = kd(stage=3, stop_stage=3, **changes)
    assert done.returncode == 1 and "has no targets: run stage 2 first" in done.stderr
    assert kd(stage=2, stop_stage=3, **changes).returncode == 0
    assert not link.is_symlink() and link.read_text() == "targets"
    assert (
        place / "data" / "fbank" / "split" / "a.1.jsonl.gz"
    ).read_text() == "split/a.1"


def test_what_makes_training_fit_a_machine_may_change(kd, calls):
    flags = "--full-libri 0 --max-duration {} --num-workers {}"
    assert kd(stop_stage=4, train_flags=flags.format(1000, 2)).returncode == 0
    done = kd(stage=5, stop_stage=5, train_flags=flags.format(500, 4))
    assert done.returncode == 0, done.stderr
    assert given(calls()[-1], "--max-duration") == "500"
    done = kd(stage=5, stop_stage=5, train_flags="--full-libri 1 --max-duration 500")
    assert done.returncode == 1 and "other settings" in done.stderr


def test_flags_may_have_several_lines_and_folders_a_slash(kd, calls, place):
    done = kd(
        recipe="zipformer/",
        kd_flags="--kd-temperature 2\n  --kd-freeze encoder",
        stop_stage=5,
    )
    assert done.returncode == 0, done.stderr
    last = calls()[-1]
    assert given(last, "--kd-temperature") == "2"
    assert given(last, "--kd-freeze") == "encoder"
    assert (place / "zipformer_kd").is_dir() and not (place / "zipformer/_kd").exists()


def test_jobs_share_the_gpus_that_are_given(kd, calls, monkeypatch, tmp_path, place):
    tool = tmp_path / "bin" / "icefall-kd"
    text = tool.read_text().replace(
        "[name, *words]",
        "[name, *words, __import__('os').environ.get('CUDA_VISIBLE_DEVICES')]",
    )
    tool.write_text(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert kd(stage=1, stop_stage=2, num_jobs=3).returncode == 0
    dumps = {given(r, "--job"): r[-1] for r in calls() if r[1] == "dump"}
    assert dumps == {"0": "4", "1": "5", "2": "4"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"stage": "two"}, "--stage is 'two'"),
        ({"num_jobs": 0}, "--num-jobs is '0'"),
        ({"num_jobs": 2, "job": 2}, "give --job 0 to 1"),
        ({"job": "x"}, "--job is x"),
    ],
    ids=str,
)
def test_numbers_are_checked(kd, calls, changes, words):
    done = kd(**changes)
    assert done.returncode == 1 and words in done.stderr and calls() == []

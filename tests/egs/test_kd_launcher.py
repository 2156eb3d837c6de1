"""``kd.sh --cmd``: jobs by a launcher that is called as Kaldi's are."""

import sys

import pytest
from kd_stand_ins import LAUNCHER, given

BARE = {"unlabelled_manifests": "split/a.1.jsonl.gz"}


@pytest.fixture
def launches(tmp_path):
    """The calls of ``launcher``, which is on the PATH: [options, number, command]."""
    record = tmp_path / "launches"
    path = tmp_path / "bin" / "launcher"
    path.write_text(LAUNCHER.format(python=sys.executable, launches=record))
    path.chmod(0o755)

    def read():
        rows = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return rows

    return read


def jobs(rows, name):
    return sorted(given(r, "--job") for r in rows if r[1] == name)


def test_its_jobs_are_those_of_processes_here(kd, calls, launches, place):
    """The same calls of icefall-kd and of the recipe, in number and in words."""
    options = {"num_jobs": 3, "mix_weights": "3 1", **BARE}
    options["label_flags"] = "--blank-penalty '0.5'"
    assert kd(**options, targets_dir="data/here").returncode == 0
    here = calls()
    for mark in place.glob("zipformer/exp/*/.*.done"):
        mark.unlink()  # the teacher is to be decoded again
    done = kd(
        **options, cmd="launcher --gpu 1", targets_dir="data/kd", exp_dir="other/exp"
    )
    assert done.returncode == 0, done.stderr
    assert launches() == [
        "--gpu 1 3 data/kd/log/label.JOB.log bash data/kd/log/label.sh JOB",
        "--gpu 1 3 data/kd/log/dump.JOB.log bash data/kd/log/dump.sh JOB",
        "--gpu 1 9 other/exp/log/decode.JOB.log bash other/exp/log/decode.sh JOB",
    ]
    there = calls()
    assert jobs(there, "label") == ["0", "1", "2"]

    def plain(row):
        text = " ".join(row).replace("data/here", "data/kd")
        return text.replace("zipformer_kd/exp-s", "other/exp")

    assert sorted(map(plain, here)) == sorted(map(plain, there))


def test_a_job_that_failed_is_named_and_alone_done_again(
    kd, calls, launches, place, tmp_path
):
    options = {"cmd": "launcher", "decode": "icefall-kd:greedy_search"}
    tool = tmp_path / "bin" / "icefall-kd"
    whole = tool.read_text()
    stop = "if 'decode' in words and 'zipformer/exp' in words: sys.exit('no memory')\n"
    tool.write_text(whole.replace("def given", stop + "def given", 1))
    done = kd(**options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "zipformer_kd/exp-s/log/decode.*.log" in line
    log = place / "zipformer_kd" / "exp-s" / "log" / "decode.1.log"
    assert "no memory" in log.read_text()
    tool.write_text(whole)
    launches(), calls()
    assert kd(**options).returncode == 0
    assert [row.split()[0] for row in launches()] == ["1", "1"]
    decoded = [r for r in calls() if r[:2] == ["icefall-kd", "decode"]]
    assert [given(r, "--exp-dir") for r in decoded] == ["zipformer/exp"]


def test_jobs_on_one_machine_take_its_gpus_in_turn(
    kd, calls, launches, tmp_path, place
):
    tool = tmp_path / "bin" / "icefall-kd"
    gpu = "__import__('os').environ.get('CUDA_VISIBLE_DEVICES')"
    tool.write_text(
        tool.read_text().replace("[name, *words]", f"[name, *words, {gpu}]")
    )
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/usr/bin/env bash\nprintf '4\\n5\\n'\n")
    smi.chmod(0o755)
    assert kd(stage=1, stop_stage=2, num_jobs=3, cmd="launcher").returncode == 0
    dumps = {given(r, "--job"): r[-1] for r in calls() if r[1] == "dump"}
    assert dumps == {"0": "4", "1": "5", "2": "4"}


def test_a_relative_path_and_a_config_file_are_those_of_the_caller(
    kd, calls, launches, tmp_path, place
):
    (tmp_path / "my own.sh").write_text("keep_simple='top:8'\ncmd=launcher\n")
    changes = {"asr_dir": place.relative_to(tmp_path), "config": "my own.sh"}
    done = kd(stop_stage=2, num_jobs=2, **changes)
    assert done.returncode == 0, done.stderr
    rows = [r for r in calls() if r[1] == "dump"]
    assert jobs(rows, "dump") == ["0", "1"]
    assert {given(r, "--keep-simple") for r in rows} == {"top:8"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"cmd": "none.pl --gpu 1"}, "there is no such program"),
        ({"cmd": "launcher", "num_jobs": 2, "job": 0}, "give one of the two"),
        ({"cmd": "launcher", "targets_dir": "my data"}, "leave --cmd out"),
        ({"cmd": "launcher", "targets_dir": "data/JOBS"}, "leave --cmd out"),
        ({"cmd": "launcher", "exp_dir": "$HOME"}, "leave --cmd out"),
        ({"cmd": "'launcher"}, "without its second one"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(kd, calls, launches, changes, words):
    done = kd(**changes)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not calls() and not launches()

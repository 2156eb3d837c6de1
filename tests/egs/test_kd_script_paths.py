"""``kd.sh`` where paths have spaces, commas, colons, quotes, dollars and stars."""

import os
import shlex

import pytest
from kd_stand_ins import SCRIPT, given

ODD = "a b,c=0.5;'d' \"e\" $HOME `f` [g]* #h (i) & é"


@pytest.fixture
def odd_place(place, tmp_path):
    """icefall in a folder of an odd name."""
    icefall = tmp_path / ODD
    place.parents[2].rename(icefall)
    return icefall / "egs" / "corpus" / "ASR"


def test_every_path_may_have_any_character(kd, calls, odd_place, tmp_path):
    asr = odd_place
    (asr / "zipformer").rename(asr / f"zip {ODD}")
    (asr / f"zip {ODD}" / "exp").rename(asr / f"exp:{ODD}")
    (asr / "data" / "fbank").rename(asr / f"fbank:{ODD}")
    (tmp_path / ODD / "my kd's.yaml").write_text("ctc-weight: 1\n")
    lang = asr / f"lang {ODD}"
    lang.mkdir()
    settings = tmp_path / "my settings.sh"
    settings.write_text(f"recipe={shlex.quote(f'zip {ODD}')}\n")
    changes = {
        "asr_dir": asr,
        "config": settings,
        "teacher_exp_dir": f"exp:{ODD}",
        "manifest_dir": f"fbank:{ODD}",
        "targets_dir": f"kd:{ODD}",
        "exp_dir": f"students:{ODD}",
        "kd_config": tmp_path / ODD / "my kd's.yaml",
        "tokens": f"--bpe-model {shlex.quote(str(lang / 'bpe.model'))}",
        "tokens_file": lang / "tokens.txt",
    }
    done = kd(**changes)
    assert done.returncode == 0, done.stderr
    rows = calls()
    for row in rows:
        for option in ("--bpe-model", "--tokens", "--lang-dir", "--kd-config"):
            if option in row:
                path = given(row, option)
                assert path in (
                    str(lang / "bpe.model"),
                    str(lang / "tokens.txt"),
                    str(lang),
                    str(changes["kd_config"]),
                )
        if "--recipe" in row:
            assert given(row, "--recipe") == f"./zip {ODD}"
            folder = f"students:{ODD}/kd" if row[1] == "export" else f"exp:{ODD}"
            assert given(row, "--exp-dir") == folder
        elif row[0] == "train.py":
            assert given(row, "--manifest-dir") == f"kd:{ODD}"
            assert given(row, "--exp-dir").startswith(f"students:{ODD}/")
    (dump,) = [r for r in rows if r[1] == "dump"]
    assert f"fbank:{ODD}/train.jsonl.gz" in dump and f"kd:{ODD}/train.jsonl.gz" in dump
    words = [given(r, "--kd") for r in rows if "--kd" in r]
    assert [shlex.split(w)[1] for w in words] == [str(changes["kd_config"])]
    assert sum("decode" in r[0] for r in rows) == 9  # three models, three methods
    (report,) = [r for r in rows if r[1] == "report" and given(r, "--lang") == "en"]
    assert f"teacher=exp:{ODD}" in report
    assert f"with KD=students:{ODD}/kd" in report


@pytest.mark.parametrize("name", ["exp,lr0.045", "exp:2024", "exp 1", "exp=1"])
def test_a_teachers_folder_is_one_word(kd, calls, place, name):
    (place / "zipformer" / "exp").rename(place / "zipformer" / name)
    done = kd(teacher_exp_dir=f"zipformer/{name}", exp_dir=f"zipformer_kd/{name}")
    assert done.returncode == 0, done.stderr
    decoded = [r for r in calls() if "decode" in r[0]]
    assert [given(r, "--exp-dir") for r in decoded[::3]] == [
        f"zipformer/{name}",
        f"zipformer_kd/{name}/kd",
        f"zipformer_kd/{name}/no-kd",
    ]
    assert {given(r, "--epoch") for r in decoded[:3]} == {"30"}


def test_a_manifests_name_may_have_a_space(kd, calls, place):
    fbank = place / "data" / "fbank"
    (fbank / "my train.jsonl.gz").write_text("my")
    (fbank / "b[1].jsonl.gz").write_text("b")
    names = "'my train.jsonl.gz' b[1].jsonl.gz split/a.*.jsonl.gz"
    assert kd(stop_stage=2, train_manifests=names).returncode == 0
    made = [r[-1] for r in calls() if r[1] == "dump"]
    assert made == [
        "data/kd/my train.jsonl.gz",
        "data/kd/b[1].jsonl.gz",
        *(f"data/kd/split/a.{i}.jsonl.gz" for i in (1, 2, 3)),
    ]


def test_slashes_at_the_end_are_left_out(kd, calls):
    changes = {
        "recipe": "zipformer/",
        "teacher_exp_dir": "zipformer/exp//",
        "targets_dir": "data/kd/",
        "exp_dir": "zipformer_kd/exp/",
        "manifest_dir": "data/fbank/",
    }
    assert kd(**changes).returncode == 0
    assert not any("//" in word or word.endswith("/") for r in calls() for word in r)


@pytest.mark.parametrize(
    "option", ["exp_dir", "targets_dir", "teacher_exp_dir", "asr_dir"]
)
def test_a_path_that_looks_like_an_option_is_refused(kd, calls, option):
    done = kd(**{option: "-x"})
    assert done.returncode == 1 and calls() == []
    (line,) = done.stderr.splitlines()
    name = option.replace("_", "-")
    assert f"--{name} is '-x'" in line and "give ./-x" in line


def test_icefall_behind_a_colon_is_refused(kd, calls, place, tmp_path):
    place.parents[2].rename(tmp_path / "a:b")
    done = kd(asr_dir=tmp_path / "a:b" / "egs" / "corpus" / "ASR")
    assert done.returncode == 1 and calls() == []
    (line,) = done.stderr.splitlines()
    assert "a:b has a colon" in line and "PYTHONPATH" in line


@pytest.mark.parametrize("how", ["link", "PATH", "link of a link"])
def test_kd_sh_is_called_from_anywhere(kd, calls, tmp_path, how, monkeypatch):
    link = tmp_path / "my tools" / "distil"
    link.parent.mkdir()
    target = SCRIPT
    if how == "link of a link":
        target = tmp_path / "first"
        target.symlink_to(SCRIPT)
    link.symlink_to(target)
    script = link
    if how == "PATH":
        monkeypatch.setenv("PATH", f"{link.parent}{os.pathsep}{os.environ['PATH']}")
        script = "distil"
    done = kd(script=script)
    assert done.returncode == 0, done.stderr
    configs = {given(r, "--kd-config") for r in calls() if "--kd-config" in r}
    assert configs == {str(SCRIPT.parent / "conf" / "kd.yaml")}
    assert "--teacher-epoch 30" in kd("--help", script=script).stdout

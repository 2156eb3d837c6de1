"""Every --kd-* option, on the command line and in the file, with bad values."""

import argparse
import json
import os
import re
import sys
from types import SimpleNamespace
from typing import Dict, Iterator, List, Sequence, Tuple

import pytest
from fuzzing import (
    BAD_VALUES,
    NOT_UTF8,
    Run,
    changes,
    check_refusal,
    command_line,
    run,
    tree,
)
from lhotse.dataset import K2SpeechRecognitionDataset

from icefall_kd.errors import KDError
from icefall_kd.training import session
from icefall_kd.training.options import all_options

LONG = "9" * 5000
EXTRA = {
    "ctc-weight": ("1:1,0:1", "0:nan,1:1", "0:1,1", "1:1:1", "0:1,,", "0:-1,1:1", LONG),
    "hidden-layers": ("²", "1:2:3", "9", "out:1", "1:1,1:1", LONG),
    "freeze": ("encoder.9", "decoder:nan", "decoder:-1", "decoder decoder", "out"),
    "int8-from": ("-1", "nan", "inf", "1,5", "true", LONG),
    "teacher-keep": ("top:0", "dense@2", f"top:{LONG}", "adaptive:2:9", "none"),
    "teacher-exp-dir": ("EXP,", ",EXP", "EXP,no-such"),
}
# What must stand beside an option for it to be looked at.
CTC = {"ctc-weight": "1"}
ONLINE = {
    **CTC,
    "teacher-exp-dir": "EXP",
    "teacher-epoch": "2",
    "teacher-use-averaged-model": "0",
    "teacher-recipe": "RECIPE",
}
BESIDE: Dict[str, Dict[str, str]] = {
    "hidden-weight": {**CTC, "hidden-layers": "1"},
    "hidden-layers": {"hidden-weight": "1"},
    "hidden-distance": {"hidden-weight": "1", "hidden-layers": "1"},
    "hidden-projector-lr": {"hidden-weight": "1", "hidden-layers": "1"},
    "int8-scales": {"int8-from": "0"},
    "teacher-keep": {**ONLINE, "teacher-cache-dir": "cache"},
    **dict.fromkeys(
        (
            "teacher-epoch",
            "teacher-iter",
            "teacher-avg",
            "teacher-use-averaged-model",
            "teacher-bpe-model",
            "teacher-model-flags",
            "teacher-recipe",
            "teacher-s-range",
            "teacher-path-only",
            "teacher-clean",
        )
        + ("teacher-cache-dir", "teacher-exp-dir"),
        ONLINE,
    ),
}


@pytest.fixture
def toy(teacher_exp, make_model, make_settings, make_cut, make_store, tmp_path):
    """What a plugged recipe does until its first batch, without the training."""
    model = make_model(vocab_size=25)
    cuts = make_store([make_cut("c1", 47)], vocab_size=25)
    names = {"EXP": str(teacher_exp.folder), "RECIPE": str(teacher_exp.recipe)}

    def main() -> None:
        parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False)
        try:
            session.add_arguments(parser)
            params = make_settings(vocab_size=25, kd_teacher_use_averaged_model=False)
            params.update(exp_dir=tmp_path / "exp", num_epochs=3, bpe_model="")
            params.update(enable_spec_aug=False, spec_aug_time_warp_factor=80)
            params.update(vars(parser.parse_args()))
            session.attach(params, model)
            session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)
        except KDError as e:  # as install_excepthook() has it
            print(f"icefall_kd: error: {e.sentence}", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            session.detach()

    return SimpleNamespace(main=main, names=names)


NUMBERS = ("0", "1.5", "2147483648", "1" + 20 * "0")
# What a training begins with, odd as it is. An empty text is none.
ACCEPTED: Dict[str, Sequence[str]] = {
    "ctc-weight": NUMBERS,
    "simple-weight": ("0",),
    "rnnt-weight": ("0",),
    "full-sum-weight": ("0",),
    "hidden-weight": ("0",),
    "nbest-weight": NUMBERS,
    "hard-weight": NUMBERS,
    "temperature": NUMBERS[1:],
    "ctc-delay": ("0",),
    "ctc-symbol-weight": NUMBERS,
    "rnnt-blank-weight": NUMBERS,
    "rnnt-shift": ("0",),
    "stored-ranges": ("0",),
    "last-epochs": ("0", "1.5"),
    "freeze": ("", " "),
    "int8-from": ("", *NUMBERS),
    "teacher-exp-dir": ("",),
    "teacher-iter": ("0",),
    "teacher-use-averaged-model": ("0",),
    "teacher-bpe-model": ("",),
    "teacher-model-flags": ("", " "),
    "teacher-s-range": ("0",),
    "teacher-path-only": ("0",),
    "teacher-clean": ("0",),
    "teacher-cache-dir": tuple(
        {*BAD_VALUES} - {NOT_UTF8, LONG, "x" * 300, "a-file", "a-file/x"}
    ),
}


def cases() -> Iterator[Tuple[str, str]]:
    """Each option with each bad value."""
    for name in (option.name for option in all_options()):
        for value in (*BAD_VALUES, *EXTRA.get(name, ())):
            yield name, value


def judge(name: str, value: str, done: Run, left: str) -> str:
    """What is wrong with how a training began; "" for nothing."""
    accepted = value in ACCEPTED.get(name, ())
    if done.status == 0 and not done.fault:
        return left or ("" if accepted else "accepted")
    fault = "refused, and stands in ACCEPTED" if accepted else ""
    return "; ".join(filter(None, (fault, check_refusal(done), left)))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with a file and a folder to be taken for the other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-file").write_text("no manifest\n")
    return tmp_path


def faults_of(toy, place, words_of) -> List[str]:
    """What goes wrong with the words that ``words_of`` makes of each case."""
    faults = []
    for name, value in cases():
        options = {**BESIDE.get(name, CTC), name: value}
        words = words_of(options, toy.names)
        before = tree(place)
        with command_line("train.py", *words):
            done = run(toy.main)
        left = changes(before, tree(place))
        fault = judge(name, value, done, left and f"changed: {left}")
        if fault:
            faults.append(f"{name} {value!r:.100}: {fault:.500}")
    return faults


def put(value: str, names: Dict[str, str]) -> str:
    """``value`` with the real folders in place of their names."""
    return re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[0]], value)


def test_a_bad_value_on_the_command_line_is_refused_in_one_sentence(toy, place):
    def words_of(options, names):
        return [f"--kd-{name}={put(value, names)}" for name, value in options.items()]

    faults = faults_of(toy, place, words_of)
    assert not faults, "\n".join(faults)


def test_a_bad_value_in_the_file_is_refused_in_one_sentence(toy, place):
    file = place / "kd.yaml"
    file.touch()

    def words_of(options, names):
        text = "".join(
            f"{name}: {json.dumps(put(value, names), ensure_ascii=False)}\n"
            for name, value in options.items()
        )
        file.write_bytes(os.fsencode(text))
        return ["--kd-config", str(file)]

    faults = faults_of(toy, place, words_of)
    assert not faults, "\n".join(faults)

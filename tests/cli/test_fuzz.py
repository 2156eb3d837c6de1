"""Every option of every command, with values that it can't use.

Commands and options are read off the click objects, so a new option is tried without
anybody doing anything. A value that is refused is refused in one sentence, with status
1 or 2, and leaves every file as it was; a value that works stands in ACCEPTED.
"""

import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, Iterator, List, Sequence

import click
import pytest
from bad_lines import (
    ACCEPTED,
    ACCEPTED_TOGETHER,
    BASE,
    EXTRA,
    FLAG_VALUES,
    FOR_NUMBERS,
    FOR_TEXTS,
    KNOWN,
    TOGETHER,
)
from fuzzing import BAD_VALUES, NOT_UTF8, Run, changes, check_refusal, run, tree
from lhotse import CutSet

from icefall_kd.cli import cli
from icefall_kd.cli.options import Count, Number, Place, Text, YesNo
from icefall_kd.export import build
from icefall_kd.labels.pseudo_label import PseudoLabel, put
from icefall_kd.teacher import loader

COMMANDS = cli.leaves()
PAIRS = 15  # of two bad values, for each command
LENGTHS = {"c1": 47, "c2": 33}
NEEDS = {
    "quantizer": "multi_quantization",
    "report": "matplotlib",
    "decode": "kaldialign",
    "cascade": "matplotlib",
    **{name: "matplotlib" for name in COMMANDS if name.startswith("plot ")},
    "label": "kaldialign",
    "filter": "kaldialign",
    "export": "onnx",
}


@dataclass
class Case:
    """A command line, and the values in it that were put there to fail."""

    command: str
    bad: Dict[str, str]
    words: List[str]


def words_of(command: click.Command, values: Dict[str, str]) -> List[str]:
    words, arguments = [], []
    for param in command.params:
        value = values.get(param.name)
        if value is None:
            continue
        if isinstance(param, click.Argument):
            arguments.append(value)
        elif getattr(param, "is_flag", False):
            words.append(param.opts[0] + value)
        else:
            words.append(f"{param.opts[0]}={value}")
    # Behind --, an argument may begin with a hyphen.
    return [*words, *(["--"] if arguments else []), *arguments]


def bad_values(param: click.Parameter) -> Sequence[str]:
    if getattr(param, "is_flag", False):
        return FLAG_VALUES
    if isinstance(param.type, Place):
        return [v for v in BAD_VALUES if v not in FOR_TEXTS]
    if isinstance(param.type, Text):
        return [v for v in BAD_VALUES if v not in FOR_NUMBERS]
    return BAD_VALUES


def cases_of(name: str) -> Iterator[Case]:
    """Each parameter with each bad value, without one, and some pairs of bad ones."""
    command, base = COMMANDS[name], BASE[name]

    def case(bad: Dict[str, str]) -> Case:
        return Case(name, bad, [*name.split(), *words_of(command, {**base, **bad})])

    for param in command.params:
        for value in (*bad_values(param), *EXTRA.get((name, param.name), ())):
            yield case({param.name: value})
        option = param.opts[0]
        if option.startswith("--") and not getattr(param, "is_flag", False):
            words = [*name.split(), *words_of(command, base), option]
            yield Case(name, {param.name: "<no value>"}, words)
        if param.required:
            rest = {k: v for k, v in base.items() if k != param.name}
            words = [*name.split(), *words_of(command, rest)]
            yield Case(name, {param.name: "<left out>"}, words)
    for word in ("--nonsense", "--nonsense=1", "-z", "--" + NOT_UTF8, "more"):
        words = [*name.split(), *words_of(command, base), word]
        yield Case(name, {"unknown": word}, words)
    for of, bad in TOGETHER:
        if of == name:
            yield case(bad)
    draw = random.Random(name)
    for _ in range(PAIRS):
        a, b = draw.sample(command.params, 2)
        yield case({p.name: draw.choice(bad_values(p)) for p in (a, b)})


LOG = (
    "2025-03-04 08:00:00,000 INFO [train.py:1] Number of model parameters: 9\n"
    "2025-03-04 08:00:01,000 INFO [train.py:1] Epoch 1, batch 0, loss[loss=1.5, over "
    "40.00 frames. ], tot_loss[loss=1.5, over 40.00 frames. ], batch size: 5\n"
)


def write_experiment(folder: Path) -> None:
    """The training log and the error rate that icefall's scripts leave."""
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "log-train-2025-03-04-05-06-07").write_text(LOG)
    (folder / "greedy_search").mkdir()
    summary = folder / "greedy_search" / "wer-summary-test-clean-epoch-3-avg-1.txt"
    summary.write_text("settings\tWER\ngreedy_search\t5.25\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory, teacher_exp, make_cut_in):
    """A folder with what all commands need, and a copy of it as it was made."""
    work = tmp_path_factory.mktemp("fuzz") / "work"
    names = {
        "RECIPE": str(teacher_exp.recipe),
        "EXP": str(teacher_exp.folder),
        "BPE": str(teacher_exp.bpe_model),
    }
    # Of a decoding's files.
    names["STEM"] = "epoch-2_avg-1_context-2_max-sym-per-frame-1"
    (work / "a-folder").mkdir(parents=True)
    (work / "a-file").write_text("no manifest\n")
    before = os.getcwd()
    os.chdir(work)
    make_cut = make_cut_in(Path("."))
    cuts = CutSet.from_cuts(make_cut(i, n) for i, n in LENGTHS.items())
    cuts.to_file("in.jsonl.gz")
    label = PseudoLabel("ein", {"token": -0.1}, "ein")
    labelled = (put(cut, label, {"teacher": "t", "settings": {}}) for cut in cuts)
    CutSet.from_cuts(labelled).to_file("labelled.jsonl.gz")
    (work / "fbank").mkdir()
    cuts.to_file("fbank/cuts_test-clean.jsonl.gz")
    (work / "shar").mkdir()
    cuts.to_shar("shar", fields={"features": "numpy"}, warn_unused_fields=False)
    write_experiment(work / "exp")
    shutil.copytree(teacher_exp.recipe, work / "toy")
    base = BASE["dump"]
    for values in (
        {**base, "out_cuts": "kd.jsonl.gz"},
        {**base, "out_cuts": "of-shar.jsonl.gz", "in_cuts": "shar"},
        {**base, "out_cuts": "jobs.jsonl.gz", "num_jobs": "2", "job": "0"},
        {**base, "out_cuts": "jobs.jsonl.gz", "num_jobs": "2", "job": "1"},
        {**BASE["student"], "student_dir": "student"},
        {**BASE["decode"], "res_dir": "decoded"},
    ):
        name = "student" if "student_dir" in values else "dump"
        name = "decode" if "res_dir" in values else name
        words = [*name.split(), *words_of(COMMANDS[name], values)]
        done = icefall_kd(words, names)
        assert done.status == 0 and not done.fault, done
    kept = work.with_name("kept")
    shutil.copytree(work, kept, symlinks=True)
    yield SimpleNamespace(work=work, kept=kept, names=names, exp=teacher_exp.folder)
    os.chdir(before)


def icefall_kd(words: List[str], names: Dict[str, str]) -> Run:
    pattern = rf"\b({'|'.join(names)})\b"
    words = [re.sub(pattern, lambda match: names[match[0]], w) for w in words]
    return run(lambda: cli(words, prog_name="icefall-kd"))


@pytest.fixture
def models_once(monkeypatch):
    """Read each checkpoint, and build each model, once: the rest runs as it is."""
    build, load = loader._model_of, loader.load_checkpoint
    built, loaded = {}, {}

    def model_of(train, params, path):
        if path not in built:
            built[path] = build(train, params, path)
        return built[path]

    def load_checkpoint(path):
        if path not in loaded:
            loaded[path] = load(path)
        return dict(loaded[path])

    monkeypatch.setattr(loader, "_model_of", model_of)
    monkeypatch.setattr(loader, "load_checkpoint", load_checkpoint)


@pytest.fixture
def nothing_traced(monkeypatch):
    """An export writes files without the graph, whose tracing takes seconds."""

    def write(model, settings, part, path, **options):
        path.write_bytes(b"")

    monkeypatch.setattr(build, "write_offline", write)
    monkeypatch.setattr(build, "inputs_and_outputs", lambda path: {})


def judge(case: Case, done: Run, left: str) -> str:
    """What is wrong with how a case ended; "" for nothing."""
    if done.status == 0 and not done.fault:
        return "" if is_accepted(case) else "accepted"
    fault = "refused, and stands in ACCEPTED" if is_accepted(case) else ""
    return "; ".join(filter(None, (fault, check_refusal(done), left)))


def is_accepted(case: Case) -> bool:
    if (case.command, case.bad) in ACCEPTED_TOGETHER:
        return True
    values = ACCEPTED.get(case.command, {})
    return all(value in values.get(name, ()) for name, value in case.bad.items())


def is_known(case: Case) -> bool:
    return any(
        value in KNOWN.get((case.command, name), ((), ""))[0]
        for name, value in case.bad.items()
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_value_is_refused_in_one_sentence_and_leaves_nothing(
    world, models_once, nothing_traced, name
):
    if name in NEEDS:  # without it, all is refused
        pytest.importorskip(NEEDS[name])
    folders = (world.work, world.exp)
    before = tree(*folders)
    faults = []
    for case in cases_of(name):
        done = icefall_kd(case.words, world.names)
        after = tree(*folders)
        left = changes(before, after)
        fault = judge(case, done, left and f"changed: {left}")
        if fault and not is_known(case):
            faults.append(f"{case.bad!r:.200}: {fault:.500}")
        if left:
            shutil.rmtree(world.work)
            shutil.copytree(world.kept, world.work, symlinks=True)
            os.chdir(world.work)
            before = tree(*folders)
    assert not faults, "\n".join(faults)


def test_there_are_a_thousand_cases_and_more(capsys):
    count = sum(1 for name in COMMANDS for _ in cases_of(name))
    with capsys.disabled():
        print(f"\n{count} command lines with bad values")
    assert count >= 1000


def test_every_command_has_a_line_that_works_and_every_value_a_type_with_bounds():
    assert set(BASE) == set(COMMANDS)
    for name, command in COMMANDS.items():
        for param in command.params:
            if getattr(param, "is_flag", False) or param.name == "model_flags":
                continue
            kinds = (Count, Number, Place, Text, YesNo, click.Choice)
            assert isinstance(param.type, kinds), (name, param.name)


def test_what_is_accepted_or_known_is_tried():
    """A list that names nothing that is there would hide what it once meant."""
    for name, accepted in ACCEPTED.items():
        for param, values in accepted.items():
            tried = [case.bad[param] for case in cases_of(name) if param in case.bad]
            assert set(values) <= set(tried), (name, param)
    for (name, param), (values, reason) in KNOWN.items():
        tried = [case.bad[param] for case in cases_of(name) if param in case.bad]
        assert reason and set(values) <= set(tried), (name, param)

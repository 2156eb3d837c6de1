"""Every option of the scripts of digits and commands, with values that they can't use.

Each script's line is one that it refuses at its end, for the files that it names: so
each case is a refusal, of one sentence, that leaves nothing.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from fuzzing import BAD_VALUES, changes, check_refusal, command_line, run, tree

EGS = Path(__file__).resolve().parents[2] / "egs"
FOLDERS = {
    path.stem: path.parent
    for path in EGS.glob("*/ASR/local/*.py")
    if not path.is_symlink()
    and "run_script(main)" in path.read_text().split("\n__name__")[-1]
}
LOCAL = set(FOLDERS.values())
# What stands in for a value of this kind where one is required.
VALUES = {Path: "a-file", int: "1", str: "x", None: "x"}
# Where the defaults would make a corpus.
NOWHERE = ["--audio-dir", "a-file/x", "--output-dir", "a-file/x"]
BASE = {
    "prepare_espeak": NOWHERE,
    "prepare_fsdd": NOWHERE,
    "prepare_commands": NOWHERE,
    "make_table": ["x:1"],
}


class Parsed(BaseException):
    """Raised in place of parsing, with the parser."""


@pytest.fixture
def load(monkeypatch):
    """A script's module, and its parser."""

    def stop(parser, *_, **__):
        raise Parsed(parser)

    def load_script(name: str) -> Tuple[Any, argparse.ArgumentParser]:
        monkeypatch.syspath_prepend(FOLDERS[name])
        module = importlib.import_module(name)
        with monkeypatch.context() as patched:
            patched.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Parsed) as parsed:
                module.main()
        return module, parsed.value.args[0]

    # Other tests patch those that they have imported, so these are put back.
    before = local_modules()
    for name in before:
        del sys.modules[name]
    yield load_script
    for name in local_modules():
        del sys.modules[name]
    sys.modules.update(before)


def local_modules() -> Dict[str, Any]:
    """The scripts that are imported now, by name."""
    return {
        name: module
        for name, module in sys.modules.items()
        if Path(getattr(module, "__file__", None) or "/").parent in LOCAL
    }


def lines_of(name: str, parser: argparse.ArgumentParser) -> Iterator[Tuple[str, List]]:
    """Command lines, each with what was put there to fail."""
    base: Dict[str, List[str]] = {"": BASE.get(name, [])}
    for action in parser._actions:
        if action.required and not (name == "make_table" and action.dest == "models"):
            base[action.dest] = [*action.option_strings[:1], VALUES[action.type]]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        for value in BAD_VALUES:
            if action.option_strings:
                line = [*base.values(), [f"{action.option_strings[0]}={value}"]]
            elif value.startswith("-"):
                continue
            else:
                dest = "" if name == "make_table" else action.dest
                line = [*{**base, dest: [value]}.values()]
            yield f"{action.dest}={value!r:.50}", [w for part in line for w in part]
    if len(base) > 1:
        yield "no words", []
    yield "an unknown option", ["--nonsense"]


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_script_refuses_in_one_sentence_and_leaves_nothing(
    load, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-file").write_text("no manifest\n")
    module, parser = load(name)
    before, faults = tree(tmp_path), []
    for case, words in lines_of(name, parser):
        with command_line(f"{name}.py", *words):
            done = run(lambda: module.run_script(module.main))
        left = changes(before, tree(tmp_path))
        fault = check_refusal(done) or (left and f"changed: {left}")
        if fault:
            faults.append(f"{case}: {fault:.400}")
            before = tree(tmp_path)
    assert not faults, "\n".join(faults)

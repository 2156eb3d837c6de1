"""The help of each subcommand: its defaults, and an example that its parser takes."""

import re
import shlex

import click
import pytest

from icefall_kd.cli import MODULES, cli
from icefall_kd.cli.amounts import free_space, size_of, speech
from icefall_kd.cli.options import MODEL_FLAGS


def commands():
    """The words and the command of each subcommand, those of groups too."""
    for name in sorted(MODULES):
        command = cli.get_command(None, name)
        if isinstance(command, click.Group):
            for kind in command.list_commands(None):
                yield ["icefall-kd", name, kind], command.get_command(None, kind)
        else:
            yield ["icefall-kd", name], command


@pytest.fixture(params=list(commands()), ids=lambda param: "-".join(param[0]))
def words_and_command(request):
    return request.param


@pytest.fixture
def command(words_and_command):
    return words_and_command[1]


def help_of(command):
    context = click.Context(command, info_name=command.name, show_default=True)
    with context:
        return command.get_help(context)


def lines_of(example):
    """The words of each command line of an example, and those after `icefall-kd X`."""
    for line in example.replace("\\\n", " ").strip().splitlines():
        yield shlex.split(line)


def test_each_option_with_a_default_shows_it(command):
    context = click.Context(command, info_name=command.name, show_default=True)
    for param in command.params:
        if isinstance(param, click.Argument) or param.is_flag or param.multiple:
            continue
        if param.default in ("", None) or not isinstance(param.default, (str, int)):
            continue
        _, text = param.get_help_record(context)
        found = re.search(r"\[default: (.*?)\]", text)
        assert found and found.group(1) == str(param.default), param.opts


def test_a_help_ends_with_an_example_that_the_parser_takes(words_and_command):
    name, command = words_and_command
    _, _, example = help_of(command).rpartition("\n\nExample:\n")
    assert example.split() == command.example.split() and example
    assert max(map(len, example.splitlines())) <= 88
    for words in lines_of(example):
        assert words[: len(name)] == name
        context = command.make_context(command.name, words[len(name) :])
        rest = context.params.get("model_flags", ())
        assert not rest, f"{command.name} has no {rest}"


def test_an_example_with_an_option_that_is_none_would_be_seen():
    dump = cli.get_command(None, "dump")
    words = ["--recipe", "r", "--exp-dir", "e", "a.jsonl.gz", "b.jsonl.gz", "--kept"]
    assert dump.make_context("dump", words).params["model_flags"] == ("--kept",)
    combine = cli.get_command(None, "combine")
    assert MODEL_FLAGS["ignore_unknown_options"] and not combine.ignore_unknown_options
    with pytest.raises(click.NoSuchOption):
        combine.make_context("combine", ["a", "b", "--kept"])


@pytest.mark.parametrize(
    "count, text",
    [(0, "0.0 kB"), (1500, "1.5 kB"), (2.34e6, "2.3 MB"), (1e9, "1.0 GB")],
)
def test_bytes_are_told_in_the_unit_that_fits(count, text):
    assert size_of(count) == text


def test_an_amount_of_speech_is_told_in_the_unit_that_fits():
    assert speech(96, 230.4) == "96 cuts, 3.8 min of audio"
    assert speech(4, 2.31) == "4 cuts, 2.3 s of audio"
    assert speech(1, 0.04) == "1 cuts, 0.0 s of audio"
    assert speech(28539, 362160.0) == "28,539 cuts, 100.6 h of audio"


def test_free_space_is_that_of_the_folder_that_a_new_one_will_be_in(tmp_path):
    amount, unit = free_space(tmp_path / "a" / "b").split()
    assert float(amount.replace(",", "")) > 0 and unit in ("kB", "MB", "GB", "TB")

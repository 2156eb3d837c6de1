#!/usr/bin/env python3
"""
Print docs/options.md: every option of icefall-kd, of a plugged train.py and of the
scripts, from the code itself.

Usage: tools/options_table.py > docs/options.md
"""

import argparse
import re
from pathlib import Path
from typing import Iterator, List, Tuple

import click

from icefall_kd.cli import cli
from icefall_kd.cli import options as cli_options
from icefall_kd.training import options as training_options

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "egs/librispeech/ASR/kd.sh",
    "egs/digits/ASR/run.sh",
    "egs/digits/ASR/run_fsdd.sh",
    "egs/digits/ASR/run_ablation.sh",
    "egs/digits/ASR/run_slices.sh",
    "egs/digits/ASR/run_streaming.sh",
    "egs/commands/ASR/run_experiments.sh",
)
# Shares the script of another recipe; its own file has the defaults that differ.
SHARING = "egs/commands/ASR/run.sh"
SHARED, OWN_DEFAULTS = "egs/digits/ASR/run.sh", "egs/commands/ASR/conf/corpus.sh"
INTRODUCTION = """# Options

`tools/options_table.py` makes this page from the code. The [glossary](glossary.md)
explains the words. Conventions:

- An empty value means none.
- Lists are separated by commas. In the shell scripts, lists of words are separated by
  spaces.
- Switches of scripts are `true` or `false`.
- Jobs are numbered from 0.
- A frame is 40 ms, a stack frame 20 ms, a feature frame 10 ms.
"""
Row = Tuple[str, str, str]


def cell(text: str) -> str:
    """A text as a table's cell: one line, and bars that are none of the table's."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    """Return ``text`` as code in a table's cell."""
    return f"`{cell(text)}`" if text.strip() else ""


def table(rows: List[Row]) -> str:
    """Return ``rows`` as a table."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    lines += [f"| {code(a)} | {code(b)} | {cell(c)} |" for a, b, c in rows]
    return "\n".join(lines)


def command_rows(command: click.Command) -> Iterator[Row]:
    """The options of a command of icefall-kd, as (name and value, default, help)."""
    for option in command.params:
        if isinstance(option, click.Argument) or option.hidden:
            continue
        name = ", ".join(option.opts)
        default = option.default
        if option.is_flag:
            default = ""
        elif option.multiple:
            name, default = f"{name} ...", ""
        elif isinstance(default, bool):
            default = str(default).lower()
        help_text = option.help or ""
        if option.required:
            help_text = f"(Required.) {help_text}"
        if isinstance(option.type, click.Choice):
            help_text = f"{help_text} One of: {', '.join(option.type.choices)}."
        simple = isinstance(default, (str, int, float))
        yield name, str(default) if simple else "", help_text


def training_rows() -> Iterator[Row]:
    """The options that a plugged train.py has more."""
    parser = argparse.ArgumentParser(add_help=False)
    training_options.add_options(parser, [])
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            name = ", ".join(action.option_strings)
            default = str(action.default)
            if isinstance(action.default, bool):
                default = default.lower()
            yield name, default, action.help.replace("%%", "%")


def script_rows(text: str) -> Iterator[Row]:
    """The options of a shell script, with the comments after them."""
    head = re.search(r"^# Options$(.*?)^help_message=", text, re.M | re.S)[1]
    head = re.sub(r"\n +# ", " ", head)  # a comment's second line
    for line in head.splitlines():
        option = re.fullmatch(r'(\w+)=("[^"]*"|\S*)(?:\s+# (.*))?', line)
        if option:
            name, default, comment = option.groups(default="")
            yield f"--{name.replace('_', '-')}", default.strip('"'), comment


def sharing_rows() -> Iterator[Row]:
    """The options of the shared script that have another default in SHARING."""
    defaults = (ROOT / OWN_DEFAULTS).read_text("utf8")
    own = re.findall(r'^(\w+)="?(.*?)"?$', defaults, re.M)
    shared = script_rows((ROOT / SHARED).read_text("utf8"))
    meanings = {option: meaning for option, _, meaning in shared}
    for name, default in own:
        option = f"--{name.replace('_', '-')}"
        yield option, default, meanings[option]


def renamed_rows() -> Iterator[Row]:
    """Of each former name: the program, the former and the present name."""
    for (command, old), new in cli_options.RENAMED.items():
        yield f"icefall-kd {command}", old, new
    for old, new in getattr(training_options, "RENAMED", {}).items():
        yield "train.py of a plugged recipe", f"--kd-{old}", f"--kd-{new}"
    for path in SCRIPTS:
        pairs = re.search(r'^renamed="([^"]*)"', (ROOT / path).read_text("utf8"), re.M)
        for pair in pairs[1].split() if pairs else ():
            old, new = (f"--{name.replace('_', '-')}" for name in pair.split(":"))
            yield path, old, new


def sections() -> Iterator[str]:
    yield INTRODUCTION
    for name, command in cli.leaves().items():
        usage = command.make_context(name, [], resilient_parsing=True)
        words = " ".join(command.collect_usage_pieces(usage))
        yield f"## icefall-kd {name}\n"
        yield f"`icefall-kd {name} {words}`: {cell(command.get_short_help_str(200))}\n"
        rows = list(command_rows(command))
        yield table(rows) + "\n" if rows else ""
    yield "## train.py of a plugged recipe\n"
    yield (
        "A file of `--kd-config` has the same options without `--kd-`. A number in "
        "`epoch:value` pairs is a curve over epochs.\n"
    )
    yield table(list(training_rows())) + "\n"
    for path in SCRIPTS:
        yield f"## {path}\n"
        yield table(list(script_rows((ROOT / path).read_text("utf8")))) + "\n"
    yield f"## {SHARING}\n"
    yield f"It has the options of `{SHARED}`, some with other defaults:\n"
    yield table(list(sharing_rows())) + "\n"
    yield "## Former names\n"
    yield "A former name is refused, in one sentence that names the present one.\n"
    yield "| program | former name | present name |\n|---|---|---|"
    for row in renamed_rows():
        yield "| `{}` | `{}` | `{}` |".format(*row)


def main() -> None:
    print("\n".join(sections()))


if __name__ == "__main__":
    main()

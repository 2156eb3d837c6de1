"""Every command of the documents is run: by tests, by CI, or by hand with a date."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# RESULTS.md is what its own commands gave when somebody ran them.
DOCUMENTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "docs/[ez]*/*.md",
        "tools/*.md",
        "egs/*/ASR/*.md",
    )
    for path in ROOT.glob(pattern)
    if path.name != "RESULTS.md"
)
# Of each command the files that run it; an option of it must occur in one of them.
RUN_BY = {
    "icefall-kd cascade": "tests/cli/test_cascade.py",
    "icefall-kd combine": "tests/cli/test_cli.py",
    "icefall-kd decode": "tests/cli/test_decode.py tests/cli/test_cascade.py",
    "icefall-kd doctor": "tests/cli/test_doctor.py tests/cli/test_cli.py",
    "icefall-kd dump": "tests/cli/test_cli.py tests/cli/test_dump_flags.py"
    " tests/cli/test_dump_hidden.py",
    "icefall-kd export": "tests/cli/test_export.py tests/cli/test_export_plain.py",
    "icefall-kd filter": "tests/cli/test_label.py",
    "icefall-kd forecast": "tests/cli/test_forecast.py",
    "icefall-kd label": "tests/cli/test_label.py tests/labels/test_whisper.py",
    "icefall-kd mix": "tests/cli/test_mix.py",
    "icefall-kd plot kl": "tests/cli/test_plot.py",
    "icefall-kd plot lattice": "tests/cli/test_plot.py",
    "icefall-kd plot losses": "tests/cli/test_plot.py",
    "icefall-kd plot spikes": "tests/cli/test_plot.py",
    "icefall-kd plot way": "tests/cli/test_plot.py",
    "icefall-kd plot wer": "tests/cli/test_plot.py",
    "icefall-kd plug": "tests/plug/test_plug.py",
    "icefall-kd report": "tests/cli/test_report.py tests/cli/test_plot.py",
    "icefall-kd student": "tests/cli/test_student_command.py"
    " tests/cli/test_list_presets.py",
    "kd.sh": "tests/egs/test_kd_script.py tests/egs/test_kd_launcher.py",
    "run.sh": "tests/egs/test_digits_recipe.py tests/egs/test_commands_recipe.py",
    "run_experiments.sh": "tests/egs/test_experiments.py",
    "torchrun": "tests/cli/test_cli.py",
    "train.py": "tests/egs/test_digits_recipe.py",
    "whisper_from_ct2.py": "tests/test_whisper_from_ct2.py",
    # CI
    "make check": ".ci/run",
    "make docs": ".ci/run",
    "tests/run.sh": ".ci/run",
    "pytest": ".ci/run",
    "make_env.sh": "tests/run.sh",
    "make_k2_env.sh": ".ci/run",
    "options_table.py": "tests/test_documents.py",
    "refusals_table.py": "tests/test_documents.py",
    "install_native.py": "tools/make_env.sh",
}
# All commands that load a model share the options of a teacher.
TEACHER_OPTIONS = "tests/cli/conftest.py tests/cli/test_cli.py"
# What CI lacks: when it was run by hand, or why not, and with what result.
BY_HAND = {
    "pip install": "2026-11-30, Python 3.13, a new environment for each of report,"
    " export, docs and mvq: installed, and what they bring is imported",
    "make format": "2026-11-30: nothing was changed",
    "git clone": "needs the network; the corpus's folder is made in miniature in tests",
    "sbatch": "2026-11-30, Slurm 22.05.8 of Debian 12: an array of dumps with jobs"
    " killed and given again has one process's targets; kd.sh's jobs are in its tests",
    "ln": "links of a corpus",
    "cd": "a change of folder",
}


def command_of(words):
    """What is run by the words of a line, as the tables above call it."""
    words = list(words)
    while "=" in words[0]:  # a variable of the environment
        words.pop(0)
    if words[0].endswith("/bin/python"):
        words = words[2:] if words[1] == "-m" else words[1:]
    if words[0] == "bash":
        return words[1]
    if words[:2] == ["icefall-kd", "plot"]:
        return " ".join(words[:3])
    if words[0] in ("icefall-kd", "make", "git", "pip"):
        return " ".join(words[:2])
    return Path(words[0]).name


def lines():
    """The words of each command, with its document's name."""
    for path in DOCUMENTS:
        text = path.read_text("utf8")
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield words, str(path.relative_to(ROOT))


LINES = [(command_of(words), words, name) for words, name in lines()]


def test_each_command_is_run_by_a_test_or_by_hand():
    """Else name the test in RUN_BY, or run the command and write the date down."""
    unknown = {(c, n) for c, _, n in LINES if c not in RUN_BY and c not in BY_HAND}
    assert unknown == set()


def test_no_command_is_in_a_table_that_no_document_has():
    named = {command for command, _, _ in LINES}
    assert set(RUN_BY) | set(BY_HAND) == named


@pytest.mark.parametrize("command", RUN_BY)
def test_the_files_that_run_a_command_call_it(command):
    name = command.split()[-1]
    for file in RUN_BY[command].split():
        text = (ROOT / file).read_text("utf8")
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), file


@pytest.mark.parametrize("command", [c for c in RUN_BY if c.startswith("icefall-kd")])
def test_each_option_in_the_documents_is_tried_where_its_command_is_run(command):
    texts = "".join((ROOT / f).read_text("utf8") for f in RUN_BY[command].split())
    for file in TEACHER_OPTIONS.split():
        texts += (ROOT / file).read_text("utf8")
    given = {w for c, words, _ in LINES if c == command for w in words}
    options = {w for w in given if re.fullmatch(r"--[a-z][a-z-]*", w)}
    assert {o for o in options if o not in texts} == set()

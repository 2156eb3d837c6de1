"""What options take, and what the environment of torchrun may hold."""

import click
import pytest
from fuzzing import NOT_UTF8

from icefall_kd.cli import MODULES, cli
from icefall_kd.cli.options import RENAMED, Count, Number, Place, Text, YesNo, command
from icefall_kd.cli.torchrun import job_of
from icefall_kd.errors import KDError


@pytest.fixture
def convert():
    """A value of the command line, as an option of this type gives it to a command."""

    def run(kind, value):
        option = click.Option(["--it"], type=kind)
        return kind.convert(value, option, None)

    return run


@pytest.mark.parametrize("value, number", [("3", 3), ("12", 12), (" 7 ", 7), (5, 5)])
def test_a_count_within_its_bounds_is_taken(convert, value, number):
    assert convert(Count(3, 12), value) == number


@pytest.mark.parametrize(
    "value", ["2", "13", "-5", "x", "", "3.5", "nan", "1e1", "9" * 5000, "²"]
)
def test_a_count_beyond_its_bounds_is_refused_with_them(convert, value):
    with pytest.raises(KDError, match="^--it is .*, and must be .* from 3 to 12$") as e:
        convert(Count(3, 12), value)
    assert len(e.value.sentence) < 120


@pytest.mark.parametrize("value", ["0.5", "10", "1e-3"])
def test_a_number_within_its_bounds_is_taken(convert, value):
    assert convert(Number(0, 10), value) == float(value)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "10.01", "x", ""])
def test_a_number_beyond_its_bounds_is_refused_with_them(convert, value):
    with pytest.raises(KDError, match="--it is .*a number above 0 and up to 10$"):
        convert(Number(0, 10), value)


def test_an_empty_yes_or_no_is_refused(convert):
    assert convert(YesNo(), "0") is False and convert(YesNo(), "true") is True
    with pytest.raises(KDError, match="--it is '', and must be true or false"):
        convert(YesNo(), "")


def test_a_commands_refusal_names_its_options(capsys):
    @command()
    @click.option("--s-range", type=int)
    @click.argument("in_cuts")
    def align(s_range, in_cuts):
        raise KDError(f"`s_range` is {s_range}, `lattice` is 1, `in_cuts` is {in_cuts}")

    with pytest.raises(KDError) as e:
        align.main(["--s-range", "7", "x"], standalone_mode=False)
    assert e.value.sentence == "--s-range is 7, `lattice` is 1, IN_CUTS is x"


@pytest.mark.parametrize("kind", [Text(), Place()])
def test_what_is_not_utf8_is_refused(convert, kind):
    assert convert(kind, "öt") == "öt"
    with pytest.raises(KDError, match="must be in UTF-8"):
        convert(kind, NOT_UTF8)


def test_an_empty_path_is_refused_unless_it_says_none(convert):
    assert convert(Place(optional=True), "") == "" == convert(Text(), "")
    with pytest.raises(KDError, match="^--it is empty: give it a file"):
        convert(Place(), "")


def test_a_refused_argument_goes_by_its_name_in_the_help(capsys):
    with pytest.raises(SystemExit) as e:
        cli(["combine", "", "out.jsonl.gz"], prog_name="icefall-kd")
    assert e.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("icefall_kd: error: IN_CUTS is empty")


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("value", [[], ["1"], None])
def test_a_former_name_is_refused_by_one_sentence_with_the_new_one(capsys, old, value):
    name, option = old
    words = [option + "=1"] if value is None else [option, *value]
    with pytest.raises(SystemExit) as e:
        cli([name, *words], prog_name="icefall-kd")
    new = RENAMED[old]
    assert e.value.code == 1
    error = f"icefall_kd: error: {option} is called {new} now: give {new}\n"
    assert capsys.readouterr().err == error
    names = [o for p in cli.get_command(None, name).params for o in p.opts]
    assert new in names and option not in names


def test_the_help_of_all_commands_is_there_before_one_is_imported(run_python):
    code = "from icefall_kd.cli import cli\ncli(['--help'], standalone_mode=False)\n"
    done = run_python(code + "import sys\nprint('torch' in sys.modules)")
    for name, (_, sentence) in MODULES.items():
        assert f"  {name} " in done.stdout and sentence[:40] in done.stdout, done
    assert done.stdout.endswith("False\n")


def test_a_command_in_a_command_is_listed_by_both_words():
    names = list(cli.leaves())
    assert "plot wer" in names and "dump" in names and "plot" not in names
    assert len(names) == len(set(names)) > len(MODULES)


def test_every_option_has_a_help_that_is_a_sentence():
    for name, leaf in cli.leaves().items():
        for param in leaf.params:
            if isinstance(param, click.Option):
                assert param.help[0].isupper(), (name, param.name)
                assert param.help.rstrip("'\"").endswith("."), (name, param.name)


def test_no_help_shows_an_empty_text_as_a_default():
    for name, leaf in cli.leaves().items():
        with click.Context(leaf, info_name=name, show_default=True) as context:
            text = " ".join(leaf.get_help(context).split())
        assert 'default: ""' not in text, name
        assert "[default: 200.0]" in text or name != "dump"  # others are shown


# torchrun


def test_a_process_of_torchrun_is_a_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert job_of(1, 0) == (2, 3)
    assert job_of(2, 1) == (1, 2)  # as the command line says


def test_one_process_needs_no_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("RANK", raising=False)
    assert job_of(1, 0) == (0, 1)


NONSENSE = ["", " ", "x", "-1", "1.5", "nan", "2147483648", "1" + "0" * 20, NOT_UTF8]


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_nonsense_in_torchruns_variables_is_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(KDError, match=f"the environment variable {name} is .*unset"):
        job_of(1, 0)


@pytest.mark.parametrize("rank", ["3", None])
def test_a_rank_that_is_none_of_the_processes_is_refused(monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(KDError, match=f"WORLD_SIZE 3 and RANK {rank}.* 0 to 2"):
        job_of(1, 0)

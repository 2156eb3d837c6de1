"""What options take, and what the environment of torchrun may hold."""

import click
import pytest
from fuzzing import NOT_UTF8

from icefall_kd.cli.dump import job_of
from icefall_kd.cli.options import Commands, Count, Number, Place, Text, YesNo
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
    @click.group(cls=Commands)
    def tool():
        pass

    @tool.command()
    @click.option("--s-range", type=int)
    def align(s_range):
        raise KDError(f"`s_range` is {s_range} and `lattice` is 1")

    with pytest.raises(SystemExit) as e:
        tool.main(["align", "--s-range", "7"])
    assert e.value.code == 1
    assert capsys.readouterr().err.endswith(": --s-range is 7 and `lattice` is 1\n")


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
    @click.group(cls=Commands)
    def program():
        pass

    @program.command()
    @click.argument("in_cuts", type=Place())
    def run(in_cuts):
        raise AssertionError("it ran")

    with pytest.raises(SystemExit) as e:
        program(["run", ""], prog_name="program")
    assert e.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("icefall_kd: error: IN_CUTS is empty")


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

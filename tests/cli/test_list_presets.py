"""The list of presets: a table to read, and JSON with all of it."""

import json

import pytest

from icefall_kd.cli.presets import list_presets
from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds, count_parameters
from icefall_kd.student.presets import preset, preset_names


@pytest.fixture
def printed(capsys):
    def run(*args, **options):
        list_presets(*args, **options)
        return capsys.readouterr().out

    return run


def test_the_table_has_a_row_for_each_preset_and_its_streaming_form(printed):
    head, *rows = printed(False).split("\n\n")[0].splitlines()
    assert head.split()[0] == "preset"
    assert [row.split()[0] for row in rows] == preset_names()
    assert max(map(len, rows)) < 120


@pytest.mark.parametrize(
    "name, cells",
    [
        ("s", "2x6 192,256x5 512,768x5 512 23.41 0.62"),
        ("kws", "1x6 128x6 192x6 320 3.46 0.22"),
        ("l-streaming", "2x2,4,5,4,2 192,256,512,768,512,256"),
    ],
)
def test_a_row_says_what_the_preset_is_and_costs(printed, name, cells):
    (row,) = (r for r in printed(False).splitlines() if r.split()[:1] == [name])
    assert " ".join(row.split()).startswith(f"{name} {cells}")


def test_the_columns_stand_below_one_another(printed):
    head, *rows = printed(False).split("\n\n")[0].splitlines()
    for title in ("layers", "encoder dim", "feed-forward"):
        at = head.index(title)
        assert all(r[at - 1] == " " and r[at].isdigit() for r in rows), title
    assert len({len(r) for r in rows}) == 1


def test_the_json_has_all_settings_and_every_part(printed):
    found = json.loads(printed(True))
    assert list(found) == preset_names()
    for name, row in found.items():
        settings = row["settings"]
        assert {k: settings[k] for k in preset(name)} == preset(name)
        assert settings["use_ctc"] and settings["use_transducer"]
        assert row["parameters"] == count_parameters(settings)
        costs = row["multiply_adds_per_second"]
        assert costs == pytest.approx(count_multiply_adds(settings, 10.0))


def test_the_vocabulary_size_is_the_one_asked_for(printed):
    small, large = (json.loads(printed(True, vocab_size=v)) for v in (500, 5000))
    assert large["s"]["settings"]["vocab_size"] == 5000
    more = large["s"]["parameters"]["all"] - small["s"]["parameters"]["all"]
    # Embedding, joiner, the two simple projections and the CTC head.
    assert more == 4500 * (512 + (512 + 1) + (256 + 1) + (512 + 1) + (256 + 1))
    assert "vocabulary of 5000" in printed(False, vocab_size=5000)


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_vocabulary_is_refused(printed, size):
    with pytest.raises(KDError, match=f"vocabulary size is {size}, .*1 or more"):
        printed(False, vocab_size=size)


def test_the_list_needs_no_torch(run_python):
    done = run_python(
        "from icefall_kd.cli.presets import list_presets\n" "list_presets(False)",
        block=["torch", "numpy", "k2", "zipformer"],
    )
    assert done.stderr == "" and done.stdout.startswith("preset ")


@pytest.mark.parametrize(
    "words",
    [("--preset", "s"), ("--params", "5M"), ("--set", "num-heads=4"), ("--rtf", 1)],
)
def test_a_list_takes_no_choice(invoke, words):
    done = invoke("student", "--list", *words)
    assert done.code != 0 and done.out == ""
    assert any(f"--list takes no {words[0]}" in line for line in done.err)

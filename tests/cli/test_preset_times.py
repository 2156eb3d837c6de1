"""``student --list --measure`` and ``--rtf``, by times no machine decides."""

import json

import pytest
import torch

from icefall_kd.cli import preset_times
from icefall_kd.cli.preset_times import changes_for_rtf, report, rtf_account
from icefall_kd.errors import KDError
from icefall_kd.export import timing
from icefall_kd.student.times import (
    PARTS,
    SIDES,
    PresetTimes,
    multiply_adds,
    read_times,
    write_times,
)

TIMED = ["1m", "kws", "3m", "1m-streaming"]
HERE = {"cpu": "Abacus 7", "threads": "1", "torch": "2", "onnxruntime": "1"}


def times_of(products, rtfs, machine=HERE):
    """Times of which every side and part has its share."""
    rtf = {
        name: {side: {"encoder": 0.75 * x, "search": 0.25 * x} for side in SIDES}
        for name, x in rtfs.items()
    }
    conditions = {"utterance_seconds": 10, "tokens_a_frame": 0.2, "vocab_size": 25}
    return PresetTimes(machine, conditions, products, rtf)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(preset_times, "this_machine", lambda: HERE)


@pytest.fixture
def settings(teacher_exp):
    return teacher_exp.settings


@pytest.fixture
def times(settings):
    """The test's teacher is between 3m and 6m, and thrice slower than it should be."""
    whole = multiply_adds(settings)
    products = {"1m": whole / 9, "3m": whole / 3, "6m": 3 * whole}
    return times_of(products, {"1m": 0.02, "3m": 0.03, "6m": 0.12})


@pytest.fixture
def words(tmp_path, teacher_words, times, machine):
    path = tmp_path / "times.json"
    write_times(times, path)
    folder = ("--student-dir", tmp_path / "student")
    return ["student", *teacher_words, *folder, "--times", path]


@pytest.fixture
def measured(monkeypatch, machine):
    """A measurement without models: the time is that of 2 G/s and of 1 ms a call."""

    def measure(names, make, advance, **options):
        rtfs = {}
        for name in names:
            model, params = make(name)
            assert isinstance(model, torch.nn.Module)
            assert params.causal == name.endswith("-streaming")
            if params.causal:
                assert (params.chunk_size, params.left_context_frames) == ("16", "128")
            assert params.vocab_size == 30
            seconds = multiply_adds(params) / 2e9 + 0.001
            rtfs[name] = {side: dict.fromkeys(PARTS, seconds / 2) for side in SIDES}
            advance()
        return rtfs

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(preset_times, "preset_names", lambda: [*TIMED, "xl"])
    monkeypatch.setattr(preset_times, "free_memory", lambda: 5e9)


def test_measuring_writes_the_file_and_prints_the_tables(
    invoke, teacher_exp, measured, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    line = ["student", "--list", "--measure", "--recipe", teacher_exp.recipe]
    done = invoke(*line, "--vocab-size", 30)
    assert done.code == 0, done
    found = read_times(tmp_path / "preset_times.json")
    assert found.machine == HERE and list(found.rtf) == TIMED
    assert found.of("1m") == pytest.approx(found.multiply_adds["1m"] / 2e9 + 0.001)
    assert "Abacus 7" in done.out and "preset_times.json" in done.out
    assert report(found) in done.out
    assert "3 copies of the parameters is not free: xl\n" in done.out
    # Again, over the file of its own, as JSON.
    done = invoke(*line, "--vocab-size", 30, "--json")
    assert json.loads(done.out)["rtf"] == found.rtf


def test_no_other_file_is_written_over(refused, teacher_exp, measured, tmp_path):
    (tmp_path / "mine.json").write_text('{"a": 1}')
    line = ["student", "--list", "--measure", "--recipe", teacher_exp.recipe]
    path = tmp_path / "mine.json"
    assert "is no file of times" in refused(*line, "--times", path)
    assert "is the folder" in refused(*line, "--times", tmp_path)


def test_the_report_names_presets_slower_than_their_multiply_adds_promise():
    products = {"1m": 1e8, "3m": 2e8, "kws": 4e8, "s": 8e8}
    times = times_of(products, {"1m": 0.04, "3m": 0.0201, "kws": 0.02, "s": 0.08})
    lines = report(times).splitlines()
    (row,) = (
        line.split() for line in lines if line.startswith("kws  ") and "x" in line
    )
    assert row == ["kws", "2.0x", "4.0x", "4.0x", "4.0x", "4.0x"]
    # By time: kws, 3m, 1m, s; squared differences of ranks: 4 + 0 + 4 + 0.
    assert lines[-4:] == [f"  {side}: 0.200; 1m (0.25)" for side in SIDES]
    (row,) = (
        line.split() for line in lines if line.startswith("s  ") and "x" not in line
    )
    assert row == ["s", "0.80", *["60.00", "+", "20.00"] * 4]


def test_streams_have_tables_of_their_own_by_the_chunk():
    names = ("1m", "s", "1m-streaming", "s-streaming")
    products, rtfs = (1e8, 8e8, 1e8, 8e8), (0.01, 0.08, 0.02, 0.08)
    times = times_of(dict(zip(names, products)), dict(zip(names, rtfs)))
    times.conditions.update(chunk_size=16, left_context_frames=128)
    whole, streams = report(times).split("\n\nMilliseconds for a chunk of 0.32 s of a ")
    assert "-streaming" not in whole and "Times faster than s:" in whole
    rows = [line.split() for line in streams.splitlines()]
    assert ["1m-streaming", "0.10", *["4.80", "+", "1.60"] * 4] in rows
    assert ["1m-streaming", "8.0x", *["4.0x"] * 4] in rows
    assert streams.endswith("  torch int8: 1.000; 1m-streaming (0.50)")
    assert "left context 2.56 s" in streams


def test_equal_promises_and_times_are_named_none():
    times = times_of({"1m": 1e8, "s": 8e8}, {"1m": 0.01, "s": 0.08})
    assert report(times).endswith("  torch int8: 1.000; none")


def test_rtf_chooses_by_the_times(invoke, words, settings, times, tmp_path):
    done = invoke(*words, "--rtf", 0.03)
    assert done.code == 0, done
    saved = torch.load(tmp_path / "student" / "epoch-1.pt", weights_only=False)
    promised = multiply_adds(settings) / multiply_adds(saved)
    assert promised == pytest.approx(3, rel=0.05)
    # The teacher is at the middle of 3m and 6m: 0.06, twice as slow, not 3 times.
    line = f"by multiply-adds it would be {promised:.2f} times (+50 %)."
    shown = " ".join(done.out.split())
    account = (tmp_path / "student" / "student_account.txt").read_text()
    assert "the student 0.03" in shown and "its teacher 0.0600 s" in shown
    assert line.rsplit("(", 1)[0] in shown and "measured elsewhere" not in shown
    assert "--rtf 0.03" in account


def test_times_of_another_machine_are_said(settings, times, machine):
    other = times_of(
        times.multiply_adds, {"1m": 0.02, "6m": 0.12}, {**HERE, "cpu": "Z"}
    )
    text = rtf_account(0.03, other, settings, settings)
    assert "measured elsewhere: cpu Z there, Abacus 7 here" in text


def test_a_teacher_beyond_the_presets_has_no_time(settings, times, machine):
    wide = {**settings, "feedforward_dim": "9999,9999"}
    text = rtf_account(0.03, times, wide, settings)
    assert (
        "its teacher an unknown time, outside of the presets" in text
        and "%" not in text
    )


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"causal": True}, "the teacher is causal"),
        ({"use_transducer": False}, "a CTC head alone"),
    ],
)
def test_other_models_than_those_timed_are_refused(settings, times, changes, fault):
    with pytest.raises(KDError, match=f"{fault}: give --speed or --params"):
        changes_for_rtf(0.03, times, {**settings, **changes})


@pytest.mark.parametrize(
    "more, fault",
    [
        (("--rtf", 0.01), "--rtf is 0.01, and the presets were measured from 0.0200"),
        (("--rtf", 0.1), "--rtf 0.1 is more than the teacher takes"),
        (("--rtf", 0.03, "--preset", "s"), "--rtf 0.03 and --preset s are given"),
        (("--rtf", 0.03, "--speed", "2x"), "--rtf 0.03 and --speed 2x are given"),
        (("--rtf", 0), "--rtf is 0, and must be"),
        (("--rtf", 0.03, "--times", "no.json"), "`icefall-kd student --list --measure"),
        ((), "--times goes with --measure or --rtf"),
    ],
)
def test_bad_lines_are_refused(refused, words, more, fault):
    assert fault in refused(*words, *more)


@pytest.mark.parametrize(
    "line, fault",
    [
        (("--measure",), "--measure goes with --list or --json"),
        (("--list", "--measure"), "Missing option '--recipe'"),
    ],
)
def test_measure_lacks_something(invoke, line, fault):
    done = invoke("student", *line)
    assert done.code == 2 and fault in done.err[-1]

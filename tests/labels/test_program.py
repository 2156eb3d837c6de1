"""labels/program.py: a program as the teacher, and all that it can do wrong."""

import sys
import time
import wave

import numpy as np
import pytest
from lhotse import CutSet

from icefall_kd.errors import KDError
from icefall_kd.labels.program import ProgramTeacher, read_texts, write_wavs
from icefall_kd.targets.batches import DumpBatch


@pytest.fixture
def cuts(spoken):
    return list(CutSet.from_file(spoken))


@pytest.fixture
def say(fake, cuts, tmp_path):
    """What the fake recogniser says of the cuts."""

    def run(fault="", nbest=False, time_limit=600.0):
        folder = tmp_path / "here"
        folder.mkdir(exist_ok=True)
        teacher = ProgramTeacher(fake(fault), folder, time_limit, nbest)
        try:
            ((batch, labels),) = teacher([DumpBatch(cuts, cuts)])
        finally:
            assert list(folder.iterdir()) == []  # audio does not stay
        assert batch.cuts == cuts
        return labels

    return run


def test_each_cut_gets_its_own_text_in_any_order(say, cuts):
    assert [x.text for x in say()] == [f"Söme {cut.num_samples}." for cut in cuts]


def test_one_empty_text_is_a_label_without_words(say):
    assert [bool(x.text) for x in say("one-empty")] == [False, True, True, True]


def test_an_nbest_list_is_sorted_and_its_best_is_the_text(say, cuts):
    (first, *_) = say("nbest", nbest=True)
    text = f"Söme {cuts[0].num_samples}."
    assert first.text == text and first.scores == {"score": -0.25}
    assert first.nbest == [(text, -0.25), (text + " more", -1.5)]


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("dies", "ended with status 3 on 4 cuts.*'out of luck'"),
        ("no-file", "wrote no file"),
        ("fewer", r"lines for 3 of the 4 ids.* none for \['c4'\]"),
        ("other-ids", "begins with 'xc1', which is no id"),
        ("twice", "two lines for the id c1"),
        ("all-empty", "no text behind any of 4 ids"),
        ("latin-1", "line 1 .* no text in UTF-8"),
        ("utf-16", "line 1 .* no text in UTF-8"),
        ("nbest", "two lines for the id"),
    ],
)
def test_what_can_not_be_used_is_refused(say, fault, sentence):
    with pytest.raises(KDError, match=sentence):
        say(fault)


def test_a_line_without_a_number_is_no_nbest_list(say):
    with pytest.raises(KDError, match="has 'high' for a log-probability"):
        say("no-score", nbest=True)


def ends(pid, seconds=60):
    """Whether the process is gone or a zombie soon: a killed one may run on."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/status") as status:
                if "zombie" in status.read():
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_program_that_hangs_is_stopped_with_all_that_it_started(cuts, tmp_path):
    (tmp_path / "here").mkdir()
    note = tmp_path / "pid"
    command = f"sh -c 'sleep 3600 & echo $! > {note}; wait' {{wavs}} {{out}}"
    teacher = ProgramTeacher(command, tmp_path / "here", 1.0)
    with pytest.raises(KDError, match="longer than `time_limit` 1 s on 4 cuts of 2.3"):
        list(teacher([DumpBatch(cuts, cuts)]))
    assert list((tmp_path / "here").iterdir()) == []
    if note.is_file():  # the shell came that far
        assert ends(int(note.read_text()))


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("asr {wavs}", "lacks {wavs} or {out}"),
        ("asr 'x {wavs} {out}", "no closing quotation"),
        ("", "lacks {wavs}"),
    ],
)
def test_a_command_that_can_not_be_one_is_refused(tmp_path, command, sentence):
    with pytest.raises(KDError, match=sentence):
        ProgramTeacher(command, tmp_path, 1.0)


def test_a_program_that_is_not_there_is_refused(cuts, tmp_path):
    teacher = ProgramTeacher("/no/such/asr {wavs} {out}", tmp_path, 1.0)
    with pytest.raises(KDError, match="'/no/such/asr' .* can't be run .No such file"):
        list(teacher([DumpBatch(cuts, cuts)]))


def test_the_program_hears_the_samples_of_the_cut(cuts, tmp_path):
    part = cuts[1].truncate(offset=0.2, duration=0.5, preserve_id=True)
    write_wavs([cuts[0], part], tmp_path)
    for number, cut in enumerate((cuts[0], part)):
        with wave.open(str(tmp_path / f"{number}.wav")) as f:
            assert f.getframerate() == 8000
            heard = np.frombuffer(f.readframes(f.getnframes()), "<i2")
        assert np.array_equal(heard, np.rint(cut.load_audio()[0] * 32768))
    listed = (tmp_path / "wavs.txt").read_text("utf8").splitlines()
    assert listed == [f"c1 {tmp_path / '0.wav'}", f"c2 {tmp_path / '1.wav'}"]


def test_samples_are_the_same_whether_read_at_once_or_not(cuts, tmp_path, monkeypatch):
    def bytes_of(name):
        (tmp_path / name).mkdir()
        write_wavs(cuts, tmp_path / name)
        return [p.read_bytes() for p in sorted((tmp_path / name).glob("*.wav"))]

    whole = bytes_of("whole")
    monkeypatch.setattr(sys.modules["icefall_kd.labels.program"], "AT_ONCE", 0.2)
    assert bytes_of("parts") == whole


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a one  two\r\n\n b\tx\n", {"a": "one two", "b": "x"}),
        ("\ufeffa one\nb", {"a": "one", "b": ""}),
        ("b x\na \u4e00 \u3000y", {"a": "一 y", "b": "x"}),
    ],
)
def test_lines_may_end_and_be_spaced_as_they_like(tmp_path, text, expected):
    path = tmp_path / "out.txt"
    path.write_bytes(text.encode())
    found = read_texts(path, ["a", "b"], nbest=False)
    assert {i: texts[0][0] for i, texts in found.items()} == expected


@pytest.mark.parametrize("data", [b"a x\0\nb y", b"a \xff\nb y", b"a x\xc2\x85\nb y"])
def test_bytes_that_are_no_text_are_refused(tmp_path, data):
    path = tmp_path / "out.txt"
    path.write_bytes(data)
    with pytest.raises(KDError, match="line 1 .* no text in UTF-8"):
        read_texts(path, ["a", "b"], nbest=False)


@pytest.mark.parametrize("score", ["nan", "inf", "-1e999", "x"])
def test_a_log_probability_is_a_finite_number(tmp_path, score):
    path = tmp_path / "out.txt"
    path.write_text(f"a -1 one\na {score} two\n", "utf8")
    with pytest.raises(KDError, match="line 2 .* for a log-probability"):
        read_texts(path, ["a"], nbest=True)

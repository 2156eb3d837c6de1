"""The file of decoded batches, after kills, damage and other settings."""

import json
import os
import resource
import signal

import pytest

from icefall_kd.errors import KDError
from icefall_kd.transcripts.journal import Journal, read_journal

HEADER = {"decoding": 1, "model": "a"}


def batch(*ids):
    return {"utterances": [{"id": i, "tokens": [1]} for i in ids]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "utterances-x.jsonl"


def test_what_was_appended_is_there_when_it_is_opened_again(path):
    with Journal(path, HEADER) as journal:
        journal.append(batch("a", "b"))
    with Journal(path, HEADER) as journal:
        assert list(journal.utterances) == ["a", "b"]
        journal.append(batch("c"))
    assert read_journal(path) == [HEADER, batch("a", "b"), batch("c")]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_half_a_line_of_a_killed_process_is_cut_off(path, cut):
    with Journal(path, HEADER) as journal:
        journal.append(batch("a"))
        journal.append(batch("b", "ü"))
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    with Journal(path, HEADER) as journal:
        assert list(journal.utterances) == ["a"]
        journal.append(batch("b", "ü"))
    assert path.read_bytes() == data


def test_a_header_that_was_half_written_is_written_again(path):
    Journal(path, HEADER).close()
    path.write_bytes(path.read_bytes()[:-3])
    with Journal(path, HEADER) as journal:
        assert journal.batches == []
    assert read_journal(path) == [HEADER]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_another_model_is_begun_anew(path, caplog, overwrite):
    with Journal(path, HEADER) as journal:
        journal.append(batch("a"))
    other = HEADER if overwrite else {**HEADER, "model": "b"}
    with Journal(path, other, overwrite) as journal:
        assert journal.utterances == {}
    assert read_journal(path) == [other]
    assert ("begun anew" in caplog.text) is not overwrite


def test_a_second_process_is_refused(path, in_child):
    with Journal(path, HEADER):

        def other():
            with pytest.raises(KDError, match="written by another process"):
                Journal(path, HEADER)

        assert in_child(other) == 0
    os.stat(path)


def limit_files(num_bytes):
    """Let no file of this process become larger, which stands for a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.parametrize("more", [0, 1, 20, -1])
def test_a_disk_that_is_full_at_any_byte_of_a_line_loses_no_batch(path, in_child, more):
    """At the line's first byte, in its middle, and before its line break."""
    with Journal(path, HEADER) as journal:
        journal.append(batch("a", "b"))
        before = path.stat().st_size
        journal.append(batch("ü"))
    whole = path.read_bytes()
    path.write_bytes(whole[:before])

    def run():
        limit_files(before + more if more >= 0 else len(whole) + more)
        with pytest.raises(KDError) as e, Journal(path, HEADER) as journal:
            journal.append(batch("ü"))
        assert str(e.value) == (
            f"File too large ({path}) after 2 cuts, which are kept: free space, then "
            "retry"
        )
        assert list(journal.utterances) == ["a", "b"]

    assert in_child(run) == 0
    with Journal(path, HEADER) as journal:
        assert list(journal.utterances) == ["a", "b"]
        journal.append(batch("ü"))
    assert path.read_bytes() == whole


def test_a_disk_without_place_for_the_header_is_refused(path, in_child):
    def run():
        limit_files(5)
        with pytest.raises(KDError, match="^File too large .*: free space, then retry"):
            Journal(path, HEADER)

    assert in_child(run) == 0
    with Journal(path, HEADER) as journal:
        assert journal.batches == []


def test_another_file_is_refused(tmp_path):
    with pytest.raises(KDError, match="can't be read"):
        read_journal(tmp_path / "no-such")
    for text in ("", "x", json.dumps({"a": 1}) + "\n"):
        (tmp_path / "other").write_text(text)
        with pytest.raises(KDError, match="no list of decoded utterances"):
            read_journal(tmp_path / "other")


def test_a_journal_that_keeps_nothing_counts_and_goes_on_as_another_does(path):
    with Journal(path, HEADER, keep=False) as journal:
        journal.append(batch("a", "b"))
        journal.append(batch("c"))
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    with Journal(path, HEADER, keep=False) as journal:
        assert (journal.num_batches, journal.num_utterances) == (1, 2)
        journal.append(batch("c"))
        assert (journal.num_batches, journal.num_utterances) == (2, 3)
        assert journal.batches == [] and journal.utterances == {}
    assert path.read_bytes() == data
    with Journal(path, HEADER) as journal:
        assert (journal.num_batches, journal.num_utterances) == (2, 3)
        assert list(journal.utterances) == ["a", "b", "c"]


def test_a_journal_in_use_names_what_can_be_done(path, in_child):
    def second():
        with pytest.raises(KDError, match="another process: wait for it, or go away"):
            Journal(path, HEADER, remedy="go away")

    with Journal(path, HEADER):
        assert in_child(second) == 0

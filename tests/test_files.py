"""Files to be written: places that can't be are refused; one is there whole, or the
old one as it was, and nothing beside it."""

import errno
import os
from pathlib import Path

import pytest

from icefall_kd import files
from icefall_kd.errors import KDError
from icefall_kd.files import (
    MANIFEST,
    check_new_file,
    check_new_folder,
    lock_file,
    making_folder,
    missing_folders,
    replacing,
    temporary_name,
)


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_when_all_went_well(tmp_path, shared):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path, shared) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shared", [False, True])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, shared):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path, shared) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path, shared=True) as a, replacing(path, shared=True) as b:
        assert a != b
        a.write_text("first")
        b.write_text("second")
    assert path.read_text() == "first"  # b leaves first


def test_a_file_that_another_process_has_locked_is_refused(tmp_path, in_child):
    with open(tmp_path / "a", "ab") as f:
        lock_file(f, "give another")

        def other():
            again = open(tmp_path / "a", "ab")
            with pytest.raises(KDError) as e:
                lock_file(again, "give another")
            assert str(e.value) == (
                f"{tmp_path}/a is being written by another process: wait for it, or "
                "give another"
            )
            assert again.closed

        assert in_child(other) == 0
        lock_file(f, "give another")  # a process does not keep itself out

    def later():
        lock_file(open(tmp_path / "a", "ab"), "give another")

    assert in_child(later) == 0


def test_where_there_are_no_locks_no_file_is_refused(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    with open(tmp_path / "a", "ab") as f:
        monkeypatch.setattr(files.fcntl, "lockf", refuse)
        lock_file(f, "give another")
        monkeypatch.setattr(files, "fcntl", None)
        lock_file(f, "give another")
        assert not f.closed


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "new/deep/a.b.jsonl"])
def test_places_for_a_manifest(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name)):
        check_new_file(path, "OUT", MANIFEST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path, said",
    [
        ("", "OUT is empty: give it the name of a file that ends with .jsonl.gz or "),
        (".", r"OUT is the folder \."),
        ("folder", "OUT is the folder folder"),
        ("folder/", "OUT is the folder folder/"),
        ("new/", "OUT is the folder new/"),
        ("a.json", "OUT is a.json: .* so that Lhotse can read it"),
        (".jsonl.gz", "OUT is .jsonl.gz"),
        ("file/a.jsonl", "the folder of OUT is file, and file is a file"),
        ("file/b/a.jsonl", "the folder of OUT is file/b, and file is a file"),
    ],
)
def test_places_where_no_manifest_can_be(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    with pytest.raises(KDError, match=said):
        check_new_file(path, "OUT", MANIFEST)


def test_places_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("", "new", "new/deep"):
        check_new_folder(str(tmp_path / name), "DIR")
    for name in ("file", "file/new"):
        with pytest.raises(KDError, match="DIR is .*, and .*file is a file: give"):
            check_new_folder(str(tmp_path / name), "DIR")


def test_folders_that_are_missing(tmp_path):
    assert missing_folders(tmp_path) == []
    deep = tmp_path / "a" / "b"
    assert missing_folders(deep) == [deep, tmp_path / "a"]


def test_a_folder_that_was_made_for_nothing_goes_and_one_that_was_there_stays(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "old/a/b", "c"):
        with pytest.raises(KDError), making_folder(tmp_path / name):
            assert (tmp_path / name).is_dir()
            raise KDError("no")
    assert [p.name for p in tmp_path.rglob("*")] == ["old"]
    with pytest.raises(KDError), making_folder(tmp_path / "d" / "e"):
        (tmp_path / "d" / "e" / "file").write_text("of another")
        raise KDError("no")
    assert (tmp_path / "d" / "e" / "file").is_file()
    with making_folder(tmp_path / "f" / "g"):
        pass
    assert (tmp_path / "f" / "g").is_dir()


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path, in_child):
    path = tmp_path / "a.json"
    path.write_text("old")

    def killed():
        with replacing(path, shared=True) as temporary:
            temporary.write_text("half")
            temporary_name(path).mkdir()  # a folder, as `plug` stages one
            os.kill(os.getpid(), 9)

    assert in_child(killed) == -9
    assert len(list(tmp_path.iterdir())) == 3
    with replacing(path, shared=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_others_are_writing_stays(tmp_path):
    """Of a process that lives, of another machine, or of another file."""
    path = tmp_path / "a.json"
    mine = temporary_name(path)
    names = [mine.name, ".tmp.elsewhere.999999999.0a.a.json", mine.name + ".gz"]
    for name in names:
        (tmp_path / name).write_text("half")
    with replacing(path, shared=True) as temporary:
        temporary.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "a.json"])

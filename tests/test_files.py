"""replacing: the new file whole, or the old one as it was, and nothing beside it."""

import os

import pytest

from icefall_kd.files import own_name, replacing


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


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path, in_child):
    path = tmp_path / "a.json"
    path.write_text("old")

    def killed():
        with replacing(path, shared=True) as temporary:
            temporary.write_text("half")
            own_name(path).mkdir()  # a folder, as `plug` stages one
            os.kill(os.getpid(), 9)

    assert in_child(killed) == -9
    assert len(list(tmp_path.iterdir())) == 3
    with replacing(path, shared=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_others_are_writing_stays(tmp_path):
    """Of a process that lives, of another machine, or of another file."""
    path = tmp_path / "a.json"
    mine = own_name(path)
    names = [mine.name, ".tmp.elsewhere.999999999.0a.a.json", mine.name + ".gz"]
    for name in names:
        (tmp_path / name).write_text("half")
    with replacing(path, shared=True) as temporary:
        temporary.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "a.json"])

"""replacing: the new file whole, or the old one as it was, and nothing beside it."""

import pytest

from icefall_kd.files import replacing


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

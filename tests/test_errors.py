"""Refusals are one sentence."""

import errno
import sys
from pathlib import Path

import pytest

from icefall_kd.errors import (
    KDError,
    NotFiniteError,
    disk_errors,
    install_excepthook,
    naming_flags,
    one_sentence,
    require,
    with_flags,
)

WRAPPED = (
    "Caught KDError in DataLoader worker process 0.\n"
    "Original Traceback (most recent call last):\n"
    '  File "dataset.py", line 1, in f\n'
    "icefall_kd.errors.KDError: the cut c1 has no targets: make them\n"
)


def test_a_refusal_is_not_caught_as_a_value_error():
    assert not issubclass(KDError, (ValueError, OSError, RuntimeError))


@pytest.mark.parametrize(
    "message", ["the cut c1 has no targets: make them", WRAPPED], ids=["own", "worker"]
)
def test_sentence_is_without_a_workers_traceback(message):
    assert KDError(message).sentence == "the cut c1 has no targets: make them"


@pytest.mark.parametrize("message", ["a is 1 and b is 2: mend a", WRAPPED])
def test_excepthook_shows_a_refusal_on_one_line(capsys, message):
    install_excepthook()
    sys.excepthook(KDError, KDError(message), None)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"icefall_kd: error: {KDError(message).sentence}\n"


def test_excepthook_leaves_other_errors_to_the_hook_before(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: seen.append(args))
    install_excepthook()
    error = ValueError("not ours")
    sys.excepthook(ValueError, error, None)
    assert seen == [(ValueError, error, None)]
    assert capsys.readouterr().err == ""


def test_excepthook_is_installed_once():
    install_excepthook()
    first = sys.excepthook
    install_excepthook()
    assert sys.excepthook is first


def test_an_uncaught_refusal_ends_the_program_with_status_1(run_python):
    done = run_python(
        "from icefall_kd.errors import *\n"
        "install_excepthook()\n"
        "raise KDError('a is 1 and b is 2: mend a')"
    )
    assert done.returncode == 1
    assert done.stderr == "icefall_kd: error: a is 1 and b is 2: mend a\n"


def test_other_errors_keep_their_traceback(run_python):
    done = run_python("from icefall_kd.errors import *\ninstall_excepthook()\n1 / 0\n")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_one_sentence_turns_a_refusal_into_status_1(capsys):
    with pytest.raises(SystemExit) as e, one_sentence():
        raise KDError("a is 1 and b is 2: mend a")
    assert e.value.code == 1
    assert capsys.readouterr().err == "icefall_kd: error: a is 1 and b is 2: mend a\n"


def test_one_sentence_names_the_file_of_a_failed_disk(capsys, tmp_path):
    with pytest.raises(SystemExit) as e, one_sentence():
        (tmp_path / "no" / "folder").write_text("x")
    assert e.value.code == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "no" / "folder") in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_one_sentence_on_a_full_disk(capsys):
    with pytest.raises(SystemExit) as e, one_sentence():
        with open("/dev/full", "w") as f:
            f.write("x")
    assert e.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("icefall_kd: error: ") and err.count("\n") == 1
    assert "No space left on device" in err and "free space" in err


def test_a_failed_disk_is_a_refusal_that_names_the_file(tmp_path):
    with pytest.raises(KDError, match="No such file.*no/file.*mend the path"):
        with disk_errors():
            (tmp_path / "no" / "file").write_text("x")


def test_a_failed_disk_names_the_place_and_what_is_kept():
    done = []
    with pytest.raises(KDError) as e, disk_errors("/a/b", done):
        done += ["cut 1", "cut 2"]
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(e.value) == (
        "No space left on device (/a/b) after 2 cuts, which are kept: free space, then "
        "retry"
    )


def test_a_refusal_is_one_line_whatever_a_files_name_holds():
    assert KDError("the file a\nb\r\x0bc is none").sentence == "the file a b  c is none"


def test_one_sentence_lets_other_errors_through():
    with pytest.raises(ZeroDivisionError), one_sentence():
        _ = 1 / 0


def test_one_sentence_is_silent_when_all_is_well(capsys):
    with one_sentence():
        pass
    assert capsys.readouterr() == ("", "")


def test_an_os_error_without_text_still_gives_a_sentence(capsys):
    with pytest.raises(SystemExit), one_sentence():
        raise OSError(errno.EIO, "Input/output error")
    assert "Input/output error: free space" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.ENOSPC, "free space"),
        (errno.ENOENT, "mend the path"),
        (errno.EACCES, "that you may read and write"),
        (errno.EROFS, "that you may read and write"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOMEM, "free memory"),
    ],
)
def test_the_remedy_fits_the_error(number, remedy):
    with pytest.raises(KDError, match=f"reason.*: .*{remedy}.*then retry$"):
        with disk_errors():
            raise OSError(number, "reason")


def test_a_parameter_is_named_as_the_option_that_gave_it():
    said = with_flags("`s_range` is 1 and `other` 2", {"s_range": "--s-range"})
    assert said == "--s-range is 1 and `other` 2"


def test_a_refusal_of_a_block_names_options_and_keeps_its_class():
    with pytest.raises(NotFiniteError, match="^--seed is 1 and `b` 2$"):
        with naming_flags({"a": "--seed"}):
            raise NotFiniteError("`a` is 1 and `b` 2")


def test_a_refusal_without_parameters_passes_a_block_as_it_is():
    error = KDError("the file is empty")
    with pytest.raises(KDError) as e, naming_flags({"a": "--seed"}):
        raise error
    assert e.value is error


def test_what_is_required_and_does_not_hold_is_refused():
    require(1, "never said")
    with pytest.raises(KDError, match="^said: do this$"):
        require([], "said: do this")

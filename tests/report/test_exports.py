"""What the check of exported files found, as a report reads it."""

import json

import pytest

from icefall_kd import KDError
from icefall_kd.export.parity import Account
from icefall_kd.report.exports import ExportedForm, read_exports


def write(exp, *accounts):
    (exp / "export").mkdir()
    forms = [account.as_dict() for account in accounts]
    (exp / "export" / "parity.json").write_text(json.dumps({"forms": forms}), "utf8")


def test_the_accounts_of_a_check_are_read(tmp_path):
    torch = Account("torch", "ctc", cuts=7, same=7, wer=3.25, rtf=0.25)
    int8 = Account("int8", "ctc", cuts=7, same=5, bytes=12, broken=["it is wrong"])
    write(tmp_path, torch, int8)
    assert read_exports(tmp_path) == [
        ExportedForm("torch", "ctc", 7, 7, 3.25, 0, 0.25, False),
        ExportedForm("int8", "ctc", 7, 5, None, 12, 0.0, True),
    ]


def test_a_folder_without_an_export_has_none(tmp_path):
    assert read_exports(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"forms": 3}', '{"forms": [3]}', '{"forms": [{}]}'],
)
def test_another_file_is_refused(tmp_path, text):
    write(tmp_path)
    path = tmp_path / "export" / "parity.json"
    path.write_text(text, "utf8")
    with pytest.raises(KDError, match="check the files again by --only-check") as error:
        read_exports(tmp_path)
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "export" / "parity.json").write_bytes(b"\xff\xfe")
    with pytest.raises(KDError, match="UnicodeDecodeError"):
        read_exports(tmp_path)

"""A folder is one model's, and metadata.json says what is in it."""

import json

import pytest

from icefall_kd.errors import KDError
from icefall_kd.export.folder import (
    METADATA,
    ExportFolder,
    file_name,
    read_tokens,
    tokens_of,
    write_tokens,
)

NAMES = ["<blk>", "<unk>", "▁A", "B", "中"]


def described(**changes):
    return {
        "model": "a" * 64,
        "checkpoint": {"name": "epoch-2-avg-1"},
        "tokens": tokens_of(NAMES, {}),
        "features": {"sampling_rate": 8000, "mean": "none"},
        **changes,
    }


@pytest.fixture
def folder(tmp_path):
    made = ExportFolder(str(tmp_path / "new" / "export"))
    made.begin(described())
    with made.writing():
        (made.path / "joiner.onnx").write_bytes(b"1234")
        made.add("joiner.onnx", "joiner", "fp32", more=1)
        made.finish()
    return made


def test_names_are_those_of_sherpa_onnx():
    assert file_name("encoder", "epoch-9-avg-2") == "encoder-epoch-9-avg-2.onnx"
    assert file_name("model", "iter-5-avg-1", "int8") == "model-iter-5-avg-1.int8.onnx"


def test_what_was_written_is_read(folder):
    again = ExportFolder(str(folder.path))
    assert again.metadata == folder.metadata
    assert again.metadata["files"]["joiner.onnx"]["bytes"] == 4
    assert again.files("fp32") == {"joiner": folder.path / "joiner.onnx"}
    assert again.files("int8") == {}
    again.begin(described())  # another form of the same model joins
    assert again.metadata["files"] == folder.metadata["files"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model": "b" * 64}, r"another model \(epoch-2-avg-1, parameters aaaaaaaa\)"),
        ({"tokens": tokens_of(NAMES[:4], {})}, r"other tokens \(number 5 and not 4\)"),
        (
            {"features": {"sampling_rate": 8000, "mean": "utterance"}},
            r"other features \(mean none and not utterance\)",
        ),
    ],
    ids=["model", "tokens", "features"],
)
def test_files_of_another_model_are_refused(folder, changes, sentence):
    with pytest.raises(KDError, match=sentence):
        ExportFolder(str(folder.path)).begin(described(**changes))


def test_files_of_nobody_knows_which_model_are_refused(tmp_path):
    (tmp_path / "encoder-epoch-1-avg-1.onnx").write_bytes(b"")
    with pytest.raises(KDError, match="holds encoder-epoch-1-avg-1.onnx, and no meta"):
        ExportFolder(str(tmp_path)).begin(described())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"export": 2, "files": {}}'])
def test_a_damaged_metadata_file_is_refused(tmp_path, text):
    (tmp_path / METADATA).write_text(text)
    with pytest.raises(KDError, match="can't be read, or is not of"):
        ExportFolder(str(tmp_path))


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    folder = ExportFolder(str(tmp_path / "new" / "export"))
    folder.begin(described())
    with pytest.raises(RuntimeError), folder.writing():
        (folder.path / "joiner.onnx").write_bytes(b"1234")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_was_killed_can_be_done_again(tmp_path):
    folder = ExportFolder(str(tmp_path))
    folder.begin(described())
    with folder.writing():
        (folder.path / "joiner.onnx").write_bytes(b"12")
        again = ExportFolder(str(tmp_path))
        assert again.metadata["files"] == {}
        again.begin(described())
        with pytest.raises(KDError, match="holds files of another model"):
            again.begin(described(model="b" * 64))


def test_a_wrong_file_has_its_name_no_longer_until_it_is_written_again(folder):
    folder.fail("joiner.onnx", "it is wrong")
    folder.finish()
    assert {p.name for p in folder.path.iterdir()} == {METADATA, "joiner.onnx.failed"}
    again = ExportFolder(str(folder.path))
    assert again.files("fp32") == {}
    assert again.metadata["failed"]["joiner.onnx"]["broken"] == "it is wrong"
    again.begin(described())
    with again.writing():
        (folder.path / "joiner.onnx").write_bytes(b"5678")
        again.add("joiner.onnx", "joiner", "fp32")
        again.finish()
    assert {p.name for p in folder.path.iterdir()} == {METADATA, "joiner.onnx"}
    assert again.metadata["failed"] == {} and len(again.files("fp32")) == 1


def test_metadata_is_plain_json_in_utf8(folder):
    values = json.loads((folder.path / METADATA).read_text("utf8"))
    assert values["export"] == 1 and values["tokens"]["number"] == 5


def test_tokens_are_written_and_read(tmp_path):
    path = tmp_path / "tokens.txt"
    write_tokens(path, NAMES)
    assert path.read_text("utf8").splitlines()[2:] == ["▁A 2", "B 3", "中 4"]
    assert read_tokens(path) == NAMES
    path.write_text("a 0\nb 2\n")
    with pytest.raises(KDError, match="ids don't run from 0 on"):
        read_tokens(path)
    path.write_text("a\n")
    with pytest.raises(KDError, match="can't be read"):
        read_tokens(path)

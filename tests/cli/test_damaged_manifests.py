"""Manifests of targets with a damaged line: refused in one sentence, whoever reads."""

import gzip
import json

import pytest
from lhotse import CutSet

from icefall_kd.errors import KDError
from icefall_kd.targets.manifest import cut_of, partial_of, read_pointers
from icefall_kd.targets.store import FIELD

LENGTHS = {"c1": 47, "c2": 33, "c3": 61}
NO_CUT = "kd.jsonl.* is no manifest of Lhotse, or damaged, as a line of it begins with"
POINTER = f"the field {FIELD} of cut c2 is damaged or of another version"
# What stands in place of the second cut's line, made of its dictionary and pointer.
LINES = {
    "text": (lambda cut, pointer: "not json", NO_CUT),
    "list": (lambda cut, pointer: "[1]", NO_CUT),
    "deep": (lambda cut, pointer: "[" * 100_000, NO_CUT),
    "no id": (lambda cut, pointer: '{"x": 1}', NO_CUT),
    "id": (lambda cut, pointer: {**cut, "id": 5}, NO_CUT),
    "custom": (lambda cut, pointer: {**cut, "custom": 5}, NO_CUT),
    "tracks": (lambda cut, pointer: {**cut, "tracks": [{"cut": 1}]}, NO_CUT),
    "pointer": (lambda cut, pointer: {**cut, "custom": {FIELD: [1]}}, POINTER),
    "store": (lambda cut, pointer: with_pointer(cut, {"store": 5}), POINTER),
    "stores": (lambda cut, pointer: with_pointer(cut, pointer, store=["a"]), POINTER),
    "offset": (lambda cut, pointer: with_pointer(cut, pointer, offset="0"), POINTER),
    "more": (lambda cut, pointer: with_pointer(cut, pointer, more=1), POINTER),
}
# combine copies lines, and leaves their pointers to those who read them.
OF_LINES = [name for name, (_, match) in LINES.items() if match is NO_CUT]


def with_pointer(cut, pointer, **values):
    return {**cut, "custom": {FIELD: {**pointer, **values}}}


@pytest.fixture
def damaged(make_cut, make_store, tmp_path):
    """Damage the second line of the manifest kd.jsonl.gz; what refuses it must say."""
    make_store([make_cut(i, n) for i, n in LENGTHS.items()])
    path = tmp_path / "kd.jsonl.gz"

    def make(kind):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        cut = json.loads(lines[1])
        change, match = LINES[kind]
        changed = change(cut, cut["custom"][FIELD])
        lines[1] = changed if isinstance(changed, str) else json.dumps(changed)
        path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
        return path, match

    return make


@pytest.mark.parametrize("kind", LINES)
def test_a_dump_does_not_go_on_with_it(
    damaged, kind, make_fingerprint, tmp_path, tree_of
):
    from icefall_kd.targets import TargetWriter

    path, match = damaged(kind)
    before = tree_of(tmp_path)
    with pytest.raises(KDError, match=match) as e:
        TargetWriter(path, tmp_path / "kd", make_fingerprint())
    assert len(e.value.sentence) < 500 and tree_of(tmp_path) == before


@pytest.mark.parametrize("kind", LINES)
def test_it_is_not_repointed(refused, damaged, kind, tmp_path):
    path, match = damaged(kind)
    error = refused("repoint", path, "--storage-dir", tmp_path / "kd")
    assert match.rpartition(".*")[2] in error


@pytest.mark.parametrize("kind", OF_LINES)
def test_it_is_not_combined(refused, damaged, kind, make_cut, tmp_path):
    path, match = damaged(kind)
    cuts = CutSet.from_cuts(make_cut(i, n) for i, n in LENGTHS.items())
    cuts.to_file(tmp_path / "in.jsonl.gz")
    words = ["combine", tmp_path / "in.jsonl.gz", path, "--num-jobs", 1]
    assert match.rpartition(".*")[2] in refused(*words)


@pytest.mark.parametrize("kind", [k for k in LINES if k not in ("text", "deep")])
def test_a_caching_teacher_does_not_take_it(damaged, kind, tmp_path):
    path, match = damaged(kind)
    partial = partial_of(tmp_path / "kd.jsonl")
    partial.write_bytes(gzip.decompress(path.read_bytes()))
    with pytest.raises(KDError, match=match):
        read_pointers(partial, 0)


def test_a_torn_line_of_a_run_that_was_killed_is_no_damage(tmp_path):
    assert cut_of(b'{"id": "c', tmp_path / "kd.jsonl.partial") is None
    assert cut_of(b'{"id": "c"}', tmp_path / "kd.jsonl") == {"id": "c"}


@pytest.mark.parametrize("value", [5, [1], {"store": 5}, {"a": 1}])
def test_a_shar_of_damaged_pointers_is_not_mended(refused, value, tmp_path):
    folder = tmp_path / "shar"
    folder.mkdir()
    line = json.dumps({"cut_id": "c2", FIELD: value}) + "\n"
    (folder / f"{FIELD}.000000.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    assert POINTER in refused("repoint", folder)

"""``icefall-kd repoint``: manifests whose store lies elsewhere now."""

import gzip
import json
import shutil

import pytest
import torch
from lhotse import CutSet, load_manifest

from icefall_kd.targets import TargetWriter
from icefall_kd.targets.places import forget
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, read_fingerprint

LENGTHS = {"c1": 47, "ç2": 33, "c3": 61}


@pytest.fixture
def stored(make_cut, make_store, tmp_path):
    """The manifest kd.jsonl.gz; its store kd was moved to ``big/targets``."""
    make_store([make_cut(i, n) for i, n in LENGTHS.items()])
    (tmp_path / "big").mkdir()
    shutil.move(tmp_path / "kd", tmp_path / "big" / "targets")
    return tmp_path / "kd.jsonl.gz"


@pytest.fixture
def expected(make_cut, stored_form):
    return {i: stored_form(make_cut(i, n)) for i, n in LENGTHS.items()}


def check(cuts, expected):
    """As another process reads them, which knows nothing of the folders here."""
    forget()
    read_fingerprint.cache_clear()
    cuts = list(cuts)
    found = collate_targets(cuts)
    for row, n, cut in zip(found.parts["ctc"], found.lens.tolist(), cuts):
        assert torch.equal(row[:n], expected[cut.id])


def lines_of(path):
    with gzip.open(path, "rt", encoding="utf8") as f:
        return [json.loads(line) for line in f]


def test_a_manifest_points_at_the_folder_that_is_given(
    invoke, stored, expected, tmp_path
):
    before = lines_of(stored)
    new = tmp_path / "big" / "targets"
    done = invoke("repoint", stored, "--storage-dir", new)
    assert done.code == 0, done
    assert done.out == f"{stored}: 3 cuts point at {new}\n"
    after = lines_of(stored)
    for cut in (*before, *after):
        assert cut["custom"][FIELD].pop("store") in (str(tmp_path / "kd"), str(new))
    assert after == before
    check(load_manifest(stored), expected)


def test_beside_the_manifest_the_store_needs_no_name(
    invoke, stored, expected, tmp_path, monkeypatch
):
    shutil.move(tmp_path / "big" / "targets", tmp_path / "big" / "kd")
    path = shutil.move(stored, tmp_path / "big" / "other.jsonl.gz")
    monkeypatch.chdir(tmp_path)
    done = invoke("repoint", "big/other.jsonl.gz")
    assert done.code == 0, done
    place = str(tmp_path / "big" / "kd")
    assert {c["custom"][FIELD]["store"] for c in lines_of(path)} == {place}
    check(load_manifest(path), expected)


def test_a_store_named_by_a_relative_path_is_read_from_any_folder(
    invoke, stored, expected, tmp_path, monkeypatch
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    words = ("--storage-dir", "../big/targets")
    done = invoke("repoint", "../kd.jsonl.gz", *words)
    assert done.code == 0, done
    place = str(tmp_path / "big" / "targets")
    assert {c["custom"][FIELD]["store"] for c in lines_of(stored)} == {place}
    monkeypatch.chdir("/")
    check(load_manifest(stored), expected)


def test_a_manifest_that_is_right_stays_as_it_is(
    invoke, make_cut, make_store, tmp_path
):
    make_store([make_cut("c1", 47)], name="one")
    path = tmp_path / "one.jsonl.gz"
    before = lines_of(path)
    assert invoke("repoint", path).code == 0
    assert lines_of(path) == before


def test_of_two_stores_each_cut_finds_its_own(
    invoke, make_cut, make_store, stored, tmp_path, expected
):
    """Though both are of one teacher: by the first record's checksum."""
    make_store([make_cut("d4", 90)], name="two")
    lines = lines_of(stored) + lines_of(tmp_path / "two.jsonl.gz")
    path = tmp_path / "both.jsonl"
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, "utf8")
    shutil.move(tmp_path / "two", tmp_path / "big" / "a")
    words = [("--storage-dir", tmp_path / "big" / name) for name in ("a", "targets")]
    done = invoke("repoint", path, *words[0], *words[1])
    assert done.code == 0, done
    names = [c.custom[FIELD]["store"].rsplit("/", 1)[1] for c in load_manifest(path)]
    assert names == ["targets"] * 3 + ["a"]
    check([c for c in load_manifest(path) if c.id in expected], expected)


def test_mixed_and_bare_cuts_of_a_manifest_stay_whole(
    invoke, make_cut, stored, tmp_path, expected
):
    first, *rest = load_manifest(stored)
    mixed = first.pad(duration=1.0, preserve_id=True)
    bare = make_cut("bare", 33)
    left_out = make_cut("left-out", 33)
    left_out.custom = {FIELD: None}
    path = tmp_path / "mixed.jsonl.gz"
    CutSet.from_cuts([mixed, bare, left_out, *rest]).to_file(path)
    before = lines_of(path)
    assert invoke("repoint", path, "--storage-dir", tmp_path / "big/targets").code == 0
    after = lines_of(path)
    assert after[1:3] == before[1:3]
    cuts = [c for c in load_manifest(path) if "ba" not in c.id and "le" not in c.id]
    check(cuts, expected)


def test_a_run_that_was_cut_short_goes_on_where_its_store_is_now(
    invoke, make_cut, make_logits, make_fingerprint, tmp_path, expected
):
    cuts = [make_cut(i, n) for i, n in LENGTHS.items()]
    path = tmp_path / "out.jsonl.gz"
    writer = TargetWriter(path, tmp_path / "out_kd", make_fingerprint())
    writer.write(cuts[0], make_logits(cuts[0]))
    writer.close()
    partial = tmp_path / "out.jsonl.gz.partial"
    partial.write_bytes(partial.read_bytes() + b'{"id": "torn')
    shutil.move(tmp_path / "out_kd", tmp_path / "new_kd")
    done = invoke("repoint", partial, "--storage-dir", tmp_path / "new_kd")
    assert done.code == 0, done
    with TargetWriter(path, tmp_path / "new_kd", make_fingerprint()) as writer:
        assert len(writer) == 1
        for cut in cuts[1:]:
            writer.write(cut, make_logits(cut))
    check(load_manifest(path), expected)


# Refusals


def test_a_folder_of_other_targets_is_refused(
    refused, stored, make_fingerprint, tmp_path
):
    other = tmp_path / "other"
    make_fingerprint(teacher="b" * 64).write(other)
    error = refused("repoint", stored, "--storage-dir", other)
    assert "the targets of cut c1" in error and f"are not in {other}" in error
    assert "give --storage-dir" in error


def test_records_of_another_store_of_the_same_teacher_are_refused(
    refused, stored, make_cut, make_store, tmp_path
):
    make_store([make_cut("d4", 90)], name="two")
    error = refused("repoint", stored, "--storage-dir", tmp_path / "two")
    assert "the targets of cut c1" in error


def test_a_store_that_was_copied_in_part_is_refused(refused, stored, tmp_path):
    path = tmp_path / "big" / "targets" / "targets.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    error = refused("repoint", stored, "--storage-dir", path.parent)
    assert f"the record of cut c3 ends at byte {size}" in error
    assert f"which has {size - 1}" in error


@pytest.mark.parametrize("folders", [(), ("no-such",), ("in.jsonl.gz",)])
def test_a_store_that_is_nowhere_is_refused(
    refused, stored, in_cuts, tmp_path, monkeypatch, folders
):
    monkeypatch.chdir(tmp_path)
    words = [w for folder in folders for w in ("--storage-dir", folder)]
    error = refused("repoint", "kd.jsonl.gz", *words)
    assert "--storage-dir" in error


def test_what_is_no_manifest_with_targets_is_refused(refused, in_cuts, tmp_path):
    assert "no cut of" in refused("repoint", in_cuts)
    assert "does not exist" in refused("repoint", tmp_path / "no-such")
    text = tmp_path / "text.jsonl"
    text.write_text("words\n", "utf8")
    assert "no manifest of Lhotse" in refused("repoint", text)
    no_gzip = shutil.copy(text, tmp_path / "text.jsonl.gz")
    assert "text.jsonl.gz is damaged" in refused("repoint", no_gzip)
    (tmp_path / "folder").mkdir()
    assert "no Shar with targets" in refused("repoint", tmp_path / "folder")
    odd = tmp_path / "odd.jsonl"
    odd.write_text(
        json.dumps({"id": "a", "custom": {FIELD: {"store": 5}}}) + "\n", "utf8"
    )
    assert "damaged or of another version" in refused("repoint", odd)


def test_a_manifest_that_can_not_be_written_is_refused(
    invoke, stored, tmp_path, monkeypatch
):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("icefall_kd.cli.repoint.replacing", refuse)
    done = invoke("repoint", stored, "--storage-dir", tmp_path / "big" / "targets")
    assert done.code == 1 and len(done.err) == 1
    assert "copy it into a folder that can be written to" in done.err[0]

"""Stores and Shars that were copied, renamed, or are read from another folder."""

import os
import pickle
import shutil

import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.dataset import K2SpeechRecognitionDataset

from icefall_kd.errors import KDError
from icefall_kd.targets import TargetDataset, TargetWriter
from icefall_kd.targets.dataset import store_fingerprint
from icefall_kd.targets.places import forget, look_beside
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer, read_fingerprint

LENGTHS = {"c1": 47, "ç2": 33, "c3": 61}


@pytest.fixture
def forgotten():
    """As in a new process."""

    def run():
        forget()
        read_fingerprint.cache_clear()

    run()
    yield run
    run()


@pytest.fixture
def made(make_cut, make_logits, make_fingerprint, tmp_path, monkeypatch, forgotten):
    """Write manifest and store below ``work``, by an absolute or a relative path."""
    monkeypatch.chdir(tmp_path)
    cuts = [make_cut(i, n) for i, n in LENGTHS.items()]

    def make(relative=False, name="kd/cuts_kd", **changes):
        folder = tmp_path / "work"
        (folder / "kd").mkdir(parents=True)
        monkeypatch.chdir(folder)
        store = name if relative else folder / name
        fingerprint = make_fingerprint(**changes)
        with TargetWriter("kd/cuts.jsonl.gz", store, fingerprint) as writer:
            for cut in cuts:
                writer.write(cut, make_logits(cut))
        monkeypatch.chdir(tmp_path)
        return folder / "kd" / "cuts.jsonl.gz"

    return make


@pytest.fixture
def expected(make_cut, stored_form):
    return [stored_form(make_cut(i, n)) for i, n in LENGTHS.items()]


def check(cuts, expected):
    cuts = list(cuts)
    assert [cut.id for cut in cuts] == list(LENGTHS)
    found = collate_targets(cuts)
    for row, n, wanted in zip(found.parts["ctc"], found.lens.tolist(), expected):
        assert torch.equal(row[:n], wanted)
    store_fingerprint(cuts)


def moved_copy(path, tmp_path):
    """Manifest and store, copied to another machine; the first ones are gone."""
    new = tmp_path / "elsewhere" / "nvme"
    shutil.copytree(path.parent, new)
    shutil.rmtree(path.parents[1])
    return new / path.name


@pytest.mark.parametrize("relative", [False, True])
def test_a_copied_pair_is_read_where_the_manifest_is(
    made, expected, tmp_path, forgotten, relative
):
    path = moved_copy(made(relative), tmp_path)
    cuts = load_manifest(path)
    with pytest.raises(KDError, match="no fingerprint.json.*icefall-kd repoint CUTS"):
        check(cuts, expected)
    forgotten()
    look_beside(path.parent)
    check(cuts, expected)


def test_a_relative_store_is_read_from_any_working_folder(
    made, expected, tmp_path, monkeypatch
):
    path = made(relative=True)
    monkeypatch.chdir("/")
    look_beside(path.parent)
    check(load_manifest(path), expected)


def test_a_read_only_copy_is_read(made, expected, tmp_path):
    path = moved_copy(made(), tmp_path)
    for place in (*path.parent.rglob("*"), path.parent):
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        look_beside(path.parent)
        check(load_manifest(path), expected)
    finally:
        for place in (path.parent, *path.parent.iterdir()):
            place.chmod(0o755)


def test_the_store_stays_where_its_cuts_say_while_it_is_there(made, tmp_path):
    path = made()
    copy = tmp_path / "copy"
    shutil.copytree(path.parent, copy)
    look_beside(copy)
    (cut, *_) = load_manifest(copy / path.name)
    assert Pointer.of_cut(cut).store == str(path.parent / "cuts_kd")


def test_a_path_of_windows_is_found_by_its_last_name(made, expected, tmp_path):
    path = moved_copy(made(), tmp_path)
    cuts = list(load_manifest(path))
    for cut in cuts:
        cut.custom[FIELD]["store"] = "D:\\speech\\kd\\cuts_kd"
    look_beside(path.parent)
    check(cuts, expected)


def test_a_manifest_in_its_store_is_read(made, expected, tmp_path):
    """As --kd-teacher-cache-dir leaves it."""
    path = moved_copy(made(name="kd"), tmp_path)
    look_beside(path.parent)
    check(load_manifest(path), expected)


def test_another_teachers_store_beside_the_manifest_is_not_taken(
    made, make_fingerprint, tmp_path, expected
):
    path = moved_copy(made(), tmp_path)
    make_fingerprint(teacher="b" * 64).write(path.parent / "cuts_kd")
    look_beside(path.parent)
    with pytest.raises(KDError, match="no fingerprint.json"):
        check(load_manifest(path), expected)


def test_a_copy_is_read_where_another_teacher_was_dumped_into_the_first_place(
    made, make_fingerprint, tmp_path, expected, forgotten
):
    path = made()
    copy = tmp_path / "copy"
    shutil.copytree(path.parent, copy)
    make_fingerprint(teacher="b" * 64).write(path.parent / "cuts_kd")
    with pytest.raises(KDError, match="made under the fingerprint"):
        check(load_manifest(path), expected)
    forgotten()
    look_beside(copy)
    check(load_manifest(copy / path.name), expected)


def test_the_last_manifests_folder_is_looked_at_first(made, expected, tmp_path):
    """Of two copies, of which the first one's records are damaged."""
    path = moved_copy(made(), tmp_path)
    other = tmp_path / "other"
    shutil.copytree(path.parent, other)
    (path.parent / "cuts_kd" / "targets.bin").write_bytes(b"")
    look_beside(path.parent)
    look_beside(other)
    check(load_manifest(other / path.name), expected)
    look_beside(path.parent)
    with pytest.raises(KDError, match="damaged"):
        check(load_manifest(path), expected)


def test_a_dataset_looks_beside_its_manifest(made, expected, tmp_path, forgotten):
    path = moved_copy(made(), tmp_path)
    cuts = load_manifest(path).to_eager()
    dataset = TargetDataset(K2SpeechRecognitionDataset(), manifest_dir=str(path.parent))
    found = dataset[cuts]["kd_targets"]
    assert sorted(found.lens.tolist()) == sorted(map(len, expected))


def test_a_worker_that_is_a_new_process_looks_there_too(made, tmp_path, forgotten):
    path = moved_copy(made(), tmp_path)
    cuts = load_manifest(path).to_eager()
    dataset = TargetDataset(K2SpeechRecognitionDataset(), manifest_dir=str(path.parent))
    sent = pickle.dumps(dataset)
    forgotten()
    with pytest.raises(KDError, match="no fingerprint.json"):
        collate_targets(list(cuts))
    assert len(pickle.loads(sent)[cuts]["kd_targets"].lens) == 3


def test_records_that_are_gone_are_refused_with_the_remedy(made, tmp_path):
    path = moved_copy(made(), tmp_path)
    (path.parent / "cuts_kd" / "targets.bin").unlink()
    look_beside(path.parent)
    with pytest.raises(KDError, match="can't be read from.*icefall-kd repoint CUTS"):
        collate_targets(list(load_manifest(path)))


# A dump that goes on


def test_a_dump_goes_on_by_another_path_to_the_same_store(
    made, make_fingerprint, monkeypatch
):
    path = made(relative=True)
    monkeypatch.chdir(path.parents[1])
    with TargetWriter(path, path.parent / "cuts_kd", make_fingerprint()) as writer:
        assert len(writer) == 3


def test_a_dump_of_a_moved_store_names_the_remedy(made, make_fingerprint, tmp_path):
    path = moved_copy(made(), tmp_path)
    store = path.parent / "cuts_kd"
    with pytest.raises(KDError) as e:
        TargetWriter(path, store, make_fingerprint())
    assert f"`icefall-kd repoint {path} --storage-dir {store}`" in str(e.value)


# A Shar


def to_shar(cuts, folder):
    """A Shar of cuts that carry their records, as `icefall-kd shar` makes it."""
    folder.mkdir(parents=True)
    CutSet.from_cuts(cuts).to_shar(folder, fields={}, warn_unused_fields=False)
    return folder


def test_what_lhotse_takes_for_a_field_of_a_shar(tmp_path, make_cut):
    """The folder of small files is none, whatever lies in it."""
    cut = make_cut("c1", 33)
    cut.features = None
    folder = to_shar([cut], tmp_path / "shar")
    own = folder / "cuts.kd_targets"
    own.mkdir()
    (own / "fingerprint.json").write_text("{}", "utf8")
    (found,) = CutSet.from_shar(in_dir=folder)
    assert found.id == "c1"
    assert os.path.samefile(os.path.dirname(found.shard_origin), folder)

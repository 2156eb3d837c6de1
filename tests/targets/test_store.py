"""A store: damage is found and named, and no other teacher's targets are read."""

import dataclasses
import json
import os
import random
import shutil

import pytest
import torch
from lhotse import CutSet, load_manifest

from icefall_kd.cli.stats import print_stats
from icefall_kd.errors import KDError
from icefall_kd.targets import Fingerprint, TargetWriter
from icefall_kd.targets.dataset import store_fingerprint
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer, read_fingerprint

LENGTHS = {"c1": 33, "ç2": 90, "c3": 61, "c4": 12, "c5": 62}


@pytest.fixture
def cuts(make_cut, make_store):
    return make_store([make_cut(name, n) for name, n in LENGTHS.items()])


@pytest.fixture
def records(tmp_path):
    return tmp_path / "kd" / "targets.bin"


def owner(cuts, at):
    (cut,) = (
        c
        for c in cuts
        if 0 <= at - c.custom[FIELD]["offset"] < sum(c.custom[FIELD]["sizes"].values())
    )
    return cut


# Damage


def test_records_lie_side_by_side(cuts, records):
    """So that every byte of the file belongs to one cut."""
    at = 0
    for cut in cuts:
        pointer = Pointer.of_cut(cut)
        assert pointer.offset == at
        at += pointer.size
    assert records.stat().st_size == at


@pytest.mark.parametrize("form", ["dense", "adaptive:.9:5", "sampled:7"])
def test_a_flipped_byte_is_found_wherever_it_is(make_cut, make_store, tmp_path, form):
    cuts = make_store([make_cut(n, k) for n, k in LENGTHS.items()], ctc=form)
    path = tmp_path / "kd" / "targets.bin"
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        at = rng.randrange(len(whole))
        data = bytearray(whole)
        data[at] ^= rng.randrange(1, 256)
        with open(path, "r+b") as f:
            f.write(data)
        bad = owner(cuts, at)
        for cut in cuts:
            if cut.id != bad.id:
                collate_targets([cut])
                continue
            with pytest.raises(KDError, match=f"targets of cut {bad.id} in ") as e:
                collate_targets([cut])
            assert str(path) in str(e.value) and "checksum" in str(e.value)
            assert "--overwrite" in str(e.value) and "\n" not in str(e.value)
    path.write_bytes(whole)
    collate_targets(list(cuts))


def test_two_bytes_that_changed_places_are_found(cuts, records):
    data = bytearray(records.read_bytes())
    i, j = 40, 41
    assert data[i] != data[j]
    data[i], data[j] = data[j], data[i]
    records.write_bytes(data)
    with pytest.raises(KDError, match="targets of cut c1 .* damaged"):
        collate_targets([cuts["c1"]])


@pytest.mark.parametrize("left", [0, 1, 100, -1, -100])
def test_a_truncated_store_is_found(cuts, records, left):
    data = records.read_bytes()
    data = data[:left]
    records.write_bytes(data)
    for cut in cuts:
        pointer = Pointer.of_cut(cut)
        if pointer.offset + pointer.size <= len(data):
            collate_targets([cut])
            continue
        with pytest.raises(KDError, match=f"targets of cut {cut.id} in .* damaged"):
            collate_targets([cut])


def test_a_store_that_is_gone_is_named(cuts, records):
    records.unlink()
    with pytest.raises(KDError, match="cut c1 can't be read .*No such file") as e:
        collate_targets([cuts["c1"]])
    assert str(records) in str(e.value) and "icefall-kd dump" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_folder_in_place_of_the_records_is_named(cuts, records):
    records.unlink()
    records.mkdir()
    with pytest.raises(KDError, match="cut c1 can't be read .*[Dd]irectory"):
        collate_targets([cuts["c1"]])


OTHER = {
    "file": "other.bin",
    "offset": 14,
    "sizes": {"ctc": 200},
    "crc32": 5,
    "cut": "c9",
    "frames": 6,
    "start": 0.04,
    "duration": 0.32,
    "source": 0.3301,
}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_each_field_of_a_pointer_that_changed_is_found(cuts, records, name):
    shutil.copy(records, records.with_name("other.bin"))
    cut = cuts["c1"]
    cut.custom[FIELD] = {**cut.custom[FIELD], name: OTHER[name]}
    with pytest.raises(KDError):
        collate_targets([cut])


def test_the_targets_of_another_cut_are_not_taken(cuts):
    """As after a manifest was edited by hand: time or checksum tells."""
    cuts["c3"].custom = {FIELD: {**cuts["c5"].custom[FIELD], "cut": "c3"}}
    with pytest.raises(KDError, match="c3"):
        collate_targets([cuts["c3"]])


@pytest.mark.parametrize("value", [{}, {"store": "kd"}, {"storage_path": "x"}])
def test_a_field_of_another_version_is_refused(cuts, value):
    cuts["c1"].custom = {FIELD: value}
    with pytest.raises(KDError, match="kd_targets of cut c1 is damaged or of another"):
        collate_targets([cuts["c1"]])


@pytest.mark.parametrize("value", [3, "kd", [1, 2]])
def test_a_field_of_another_kind_is_refused(cuts, value):
    cuts["c1"].custom = {FIELD: value}
    with pytest.raises(KDError, match="kd_targets of cut c1 is damaged or of another"):
        collate_targets([cuts["c1"]])


def test_a_store_moved_with_its_manifest_is_read(cuts, tmp_path, stored_form):
    """The path is no part of the checksum."""
    (tmp_path / "kd").rename(tmp_path / "moved")
    cut = cuts["c3"]
    with pytest.raises(KDError, match="no fingerprint.json|can't be read"):
        collate_targets([cut])
    cut.custom[FIELD] = {**cut.custom[FIELD], "store": str(tmp_path / "moved")}
    assert torch.equal(collate_targets([cut]).parts["ctc"][0], stored_form(cut))


def test_a_store_that_was_overwritten_is_read_anew(
    cuts, make_cut, make_fingerprint, make_logits, tmp_path, stored_form
):
    """In the process that read it before, as in a notebook."""
    collate_targets(list(cuts))
    with TargetWriter(
        tmp_path / "kd.jsonl.gz", tmp_path / "kd", make_fingerprint(), overwrite=True
    ) as writer:
        cut = make_cut("c1", 33)
        writer.write(cut, make_logits(cut, seed=1))
    (found,) = load_manifest(tmp_path / "kd.jsonl.gz")
    assert torch.equal(collate_targets([found]).parts["ctc"][0], stored_form(found, 1))


def test_a_store_overwritten_in_another_form_is_read_anew(
    cuts, make_cut, make_fingerprint, make_logits, tmp_path
):
    collate_targets(list(cuts))
    with TargetWriter(
        tmp_path / "kd.jsonl.gz",
        tmp_path / "kd",
        make_fingerprint(ctc="top:3"),
        overwrite=True,
    ) as writer:
        cut = make_cut("c1", 33)
        writer.write(cut, make_logits(cut))
    (found,) = load_manifest(tmp_path / "kd.jsonl.gz")
    assert store_fingerprint([found])[0].ctc == "top:3"
    assert collate_targets([found]).parts["ctc"].indices.shape == (1, 7, 3)


def test_a_forked_process_reads_for_itself(cuts, in_child, stored_form):
    collate_targets(list(cuts))

    def read():
        for _ in range(20):
            for cut in cuts:
                assert torch.equal(
                    collate_targets([cut]).parts["ctc"][0], stored_form(cut)
                )

    assert in_child(read) == 0
    read()


def test_reading_keeps_one_file_open(cuts):
    for _ in range(20):
        collate_targets(list(cuts))
    names = [
        os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
    ]
    records = cuts["c1"].custom[FIELD]["store"] + "/targets.bin"
    assert names.count(os.path.realpath(records)) == 1


def test_a_manifest_saved_by_lhotse_keeps_its_targets(cuts, tmp_path, stored_form):
    changed = [c.truncate(duration=0.1).pad(duration=1.0) for c in cuts]
    CutSet.from_cuts([*cuts, *changed]).to_file(tmp_path / "again.jsonl.gz")
    again = list(load_manifest(tmp_path / "again.jsonl.gz"))
    for cut in again[:5]:
        assert torch.equal(collate_targets([cut]).parts["ctc"][0], stored_form(cut))
    for cut, original in zip(again[5:], cuts, strict=True):
        rows = stored_form(original)[:3]
        assert torch.equal(collate_targets([cut]).parts["ctc"][0, : len(rows)], rows)


def test_a_pointer_is_plain_json(cuts):
    for cut in cuts:
        value = cut.custom[FIELD]
        assert json.loads(json.dumps(value)) == value
        assert Pointer.of_cut(cut).to_dict() == value


# Fingerprints


CHANGED = {
    "teacher": "b" * 64,
    "tokens": "c" * 64,
    "vocab_size": 12,
    "blank_id": 3,
    "subsampling_factor": 2,
    "frame_shift": 0.02,
    "sampling_rate": 16000,
    "num_features": 80,
    "feature_type": "fbank",
    "feature_shift": 0.0125,
    "ctc": "top:8",
    "lattice": "collapsed",
    "s_range": 7,
    "hidden": "out:half",
    "version": 4,
    "further_kinds": {"simple": "dense"},
}


def difference(name, fingerprint):
    """What differs by a change of a field: its name and both values."""
    if name == "further_kinds":  # each kind goes by its own name
        return "simple", "", "dense"
    return name, getattr(fingerprint, name), CHANGED[name]


NAMES = [f.name for f in dataclasses.fields(Fingerprint)]


@pytest.mark.parametrize("name", NAMES)
def test_no_writer_adds_to_a_store_of_another_fingerprint(
    cuts, make_fingerprint, tmp_path, tree_of, name
):
    before = tree_of(tmp_path)
    mine, other = make_fingerprint(), make_fingerprint(**{name: CHANGED[name]})
    name, *values = difference(name, mine)
    with pytest.raises(KDError, match=f"was made with {name} ") as e:
        TargetWriter(tmp_path / "kd.jsonl.gz", tmp_path / "kd", other)
    for value in values:
        assert repr(value) in str(e.value)
    assert str(tmp_path / "kd") in str(e.value) and "\n" not in str(e.value)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_stores_of_other_fingerprints_are_not_trained_on_together(
    make_cut, make_fingerprint, make_logits, tmp_path, name
):
    stores = []
    for i, changes in enumerate([{}, {name: CHANGED[name]}]):
        make_fingerprint(**changes).write(tmp_path / str(i))
        cut = make_cut(f"c{i}", 33)
        cut.custom = {
            FIELD: Pointer(
                str(tmp_path / str(i)), "x", 0, {}, 0, cut.id, 7, 0.0, 0.33, 0.33
            ).to_dict()
        }
        stores.append(cut)
    name, *values = difference(name, make_fingerprint())
    words = "is of version 4" if name == "version" else f"made with {name} "
    with pytest.raises(KDError, match=words) as e:
        store_fingerprint(stores)
    for value in values:
        assert repr(value) in str(e.value)


def test_a_fingerprint_of_a_later_version_is_refused(cuts, tmp_path):
    """Its bytes may mean something else."""
    path = tmp_path / "kd" / "fingerprint.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "version": 4}))
    with pytest.raises(KDError, match="version"):
        store_fingerprint(cuts)


def test_a_mixed_cut_of_two_stores_counts_for_both(make_cut, make_store):
    (a,) = make_store([make_cut("c1", 33)], "a")
    (b,) = make_store([make_cut("c2", 33)], "b", teacher="b" * 64)
    b.supervisions = []
    with pytest.raises(KDError, match="made with teacher"):
        store_fingerprint([a.append(b)])


def test_a_fingerprint_is_read_once_a_process(cuts, tmp_path):
    store = str(tmp_path / "kd")
    assert read_fingerprint(store) is read_fingerprint(store)


# Statistics


def test_statistics_of_a_dense_store(cuts, capsys, stored_form):
    print_stats(cuts)
    table = dict(
        line.rsplit("  ", 1)
        for line in (li.rstrip() for li in capsys.readouterr().out.splitlines())
    )
    table = {k.strip(): v.strip() for k, v in table.items()}
    rows = torch.cat([stored_form(c) for c in cuts])
    assert table["cuts"] == "5" and table["frames"] == str(len(rows))
    assert table["bytes a frame, ctc"] == "22.00" and table["forms"] == "dense"
    entropy = -(rows.exp() * rows).sum(-1).mean()
    assert float(table["entropy, ctc (nats a frame)"]) == pytest.approx(
        float(entropy), abs=1e-3
    )
    blanks = (rows.argmax(-1) == 0).float().mean()
    assert table["frames whose best is blank, ctc"] == f"{100 * float(blanks):.1f} %"


def test_statistics_of_a_sparse_store(make_cut, make_store, capsys, read_targets):
    cuts = make_store([make_cut(n, k) for n, k in LENGTHS.items()], ctc="top:3")
    print_stats([c.pad(duration=2.0) for c in cuts])
    out = capsys.readouterr().out
    found = [read_targets(c) for c in cuts]
    n = sum(len(f.indices) for f in found)
    tail = sum(float(f.log_tail.exp().sum()) for f in found) / n
    assert "top:3" in out and f"{tail:.2e}" in out
    size = sum(Pointer.of_cut(c).size for c in cuts) / n
    assert 3 < size < 12 and f"{size:.2f}" in out
    (kept,) = (li.split()[-1] for li in out.splitlines() if "tokens stored" in li)
    assert kept == "3.00"


def test_statistics_of_parts_count_what_the_parts_hold(cuts, capsys, stored_form):
    """The frames that are counted are those that are summed over."""
    part = cuts["ç2"].truncate(offset=0.2, duration=0.2)
    print_stats([part])
    rows = stored_form(cuts["ç2"])[5:10]
    entropy = float(-(rows.exp() * rows).sum(-1).mean())
    (line,) = (li for li in capsys.readouterr().out.splitlines() if "entropy" in li)
    assert float(line.split()[-1]) == pytest.approx(entropy, abs=1e-3)


def test_statistics_of_nothing(make_cut, capsys):
    print_stats([make_cut("b1", 33)])
    assert "no cut has targets" in capsys.readouterr().out


def test_records_of_another_fingerprint_are_refused(cuts, make_fingerprint, tmp_path):
    """As of a Shar, whose records stay when its store is made anew."""
    make_fingerprint(teacher="b" * 64).write(tmp_path / "kd")
    read_fingerprint.cache_clear()
    with pytest.raises(KDError, match="targets of cut c1 were made under .* has") as e:
        collate_targets([cuts["c1"]])
    assert "\n" not in str(e.value) and make_fingerprint().digest in str(e.value)

"""Targets in a Lhotse Shar: ``icefall-kd dump SHAR CUTS``, ``icefall-kd shar``."""

import errno
import gzip
import json
import re
import shutil

import numpy as np
import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.cut import MixedCut
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from torch.utils.data import DataLoader

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import OUT
from icefall_kd.targets import TargetDataset, first_look
from icefall_kd.targets.dataset import store_fingerprint
from icefall_kd.targets.places import forget
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer, read_fingerprint
from icefall_kd.tokens import load_tokenizer

pytestmark = pytest.mark.usefixtures("loaded_once")

# Of them c3 and ç5 begin late in their recordings.
LENGTHS = {"c1": 47, "c2": 90, "c3": 61, "c4": 33, "ç5": 120}
LATE = {"c3": 7.25, "ç5": 0.37}


def to_shar(cuts, folder, shard_size=2):
    folder.mkdir()
    fields = {"features": "numpy"}
    CutSet.from_cuts(cuts).to_shar(
        folder, fields=fields, shard_size=shard_size, warn_unused_fields=False
    )
    return folder


@pytest.fixture
def cuts(make_cut):
    return [make_cut(i, n, start=LATE.get(i, 0.0)) for i, n in LENGTHS.items()]


@pytest.fixture
def in_cuts(cuts, tmp_path):
    """The plain manifest of the same cuts."""
    path = tmp_path / "in.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return path


@pytest.fixture
def folder(cuts, tmp_path):
    return to_shar(cuts, tmp_path / "shar")


@pytest.fixture
def dumped(invoke, dump_words, folder, tmp_path):
    """The manifest of targets that ``dump`` made of the Shar."""
    assert invoke(*dump_words(cuts=folder)).code == 0
    return tmp_path / "out.jsonl.gz"


@pytest.fixture
def filled(invoke, dumped, folder, tmp_path):
    """The Shar with its targets; the records outside it are gone."""
    done = invoke("shar", dumped, folder)
    assert done.code == 0, done
    (tmp_path / "out_kd" / "targets.bin").unlink()
    return folder


@pytest.fixture
def plain(invoke, dump_words, in_cuts, tmp_path):
    """The cuts of the plain manifest with targets of their own."""
    out = tmp_path / "plain.jsonl.gz"
    assert invoke(*dump_words("--num-workers", 0, cuts=in_cuts, out=out)).code == 0
    return load_manifest(out).to_eager()


def read(folder):
    return {cut.id: cut for cut in CutSet.from_shar(in_dir=folder)}


def same(a, b):
    """Targets of two batches."""
    assert torch.equal(a.lens, b.lens) and torch.equal(a.mask, b.mask)
    assert torch.equal(a.whole, b.whole) and torch.equal(a.parts["ctc"], b.parts["ctc"])


def beside(folder):
    return sorted(p.name for p in folder.parent.iterdir())


# There and back


def test_a_shars_targets_are_those_of_the_plain_manifest(filled, plain):
    cuts = read(filled)
    assert list(cuts) == list(LENGTHS) == [c.id for c in plain]
    for cut in plain:
        found = cuts[cut.id]
        assert np.array_equal(found.load_features(), cut.load_features())
        same(collate_targets([found]), collate_targets([cut]))
    together = collate_targets(list(cuts.values()))
    same(together, collate_targets(list(plain)))
    assert together.lens.tolist() == [10, 21, 14, 7, 28] and together.whole.all()


def test_the_targets_are_one_more_field_of_the_shar(
    invoke, dumped, folder, tmp_path, tree_of
):
    before = tree_of(folder)
    names = beside(folder)
    done = invoke("shar", dumped, folder)
    assert done.code == 0 and "targets of 5 cuts in 3 shards" in done.out
    after = tree_of(folder)
    added = [f"kd_targets.00000{i}.jsonl.gz" for i in range(3)]
    added.insert(0, "cuts.kd_targets/fingerprint.json")
    assert sorted(set(after) - set(before)) == added
    assert {name: after[name] for name in before} == before
    assert beside(folder) == names


def test_any_size_of_shards(invoke, dumped, cuts, plain, tmp_path):
    expected = collate_targets(list(plain))
    for size, shards in ((1, 5), (3, 2), (5, 1), (99, 1)):
        other = to_shar(cuts, tmp_path / f"shar-of-{size}", size)
        done = invoke("shar", dumped, other)
        assert done.code == 0 and f"in {shards} shards" in done.out
        assert len(list(other.glob("kd_targets.*"))) == shards
        same(collate_targets(list(read(other).values())), expected)


def test_to_do_it_again_changes_nothing(invoke, dumped, folder, plain):
    for _ in range(2):
        assert invoke("shar", dumped, folder).code == 0
        found = collate_targets(list(read(folder).values()))
        same(found, collate_targets(list(plain)))


def test_a_shar_with_targets_can_be_dumped_again(
    invoke, dump_words, filled, tmp_path, plain
):
    """By another teacher; its targets take the place of the first one's."""
    new = tmp_path / "new.jsonl.gz"
    before = collate_targets(list(read(filled).values()))
    words = ("--epoch", 1)
    assert invoke(*dump_words(*words, cuts=filled, out=new)).code == 0
    assert not any("record" in c.custom[FIELD] for c in load_manifest(new))
    assert invoke("shar", new, filled).code == 0
    after = collate_targets(list(read(filled).values()))
    assert after.parts["ctc"].shape == before.parts["ctc"].shape
    assert (after.parts["ctc"] - before.parts["ctc"]).abs().max() > 0.1


def test_the_dumps_manifest_is_plain_and_lean(dumped, folder, cuts):
    """Without the features that a Shar's cuts carry, and without its notes."""
    for line, cut in zip(
        gzip.decompress(dumped.read_bytes()).splitlines(), cuts, strict=True
    ):
        assert len(line) < 2500
        values = json.loads(line)
        assert values["id"] == cut.id and set(values["custom"]) == {FIELD}
        assert values["supervisions"][0]["text"] == "ein"


def test_several_jobs_on_a_shar_make_the_targets_of_one(
    invoke, dump_words, folder, tmp_path, plain, monkeypatch
):
    for job in range(2):
        words = ("--num-jobs", 2, "--job", job)
        assert invoke(*dump_words(*words, cuts=folder)).code == 0
    assert invoke("shar", tmp_path / "out.jsonl.gz", folder).code == 0
    for path in (tmp_path / "out_kd").glob("targets.*.bin"):
        path.unlink()
    same(collate_targets(list(read(folder).values())), collate_targets(list(plain)))


def test_all_parts_of_a_record_come_along(
    invoke, dump_words, folder, in_cuts, tmp_path, bpe_models
):
    words = ("--keep", "none", "--keep-lattice", "collapsed", "--s-range", 3)
    words = (*words, "--keep-hidden", "1:half,out:half", "--bpe-model", bpe_models.a)
    other = tmp_path / "plain.jsonl.gz"
    assert invoke(*dump_words(*words, cuts=folder)).code == 0
    assert invoke(*dump_words(*words, cuts=in_cuts, out=other)).code == 0
    assert invoke("shar", tmp_path / "out.jsonl.gz", folder).code == 0
    (tmp_path / "out_kd" / "targets.bin").unlink()
    found = collate_targets(list(read(folder).values()))
    expected = collate_targets(list(load_manifest(other)))
    assert found.parts.get("ctc") is None and set(found.parts["hidden"]) == {1, OUT}
    for layer, rows in expected.parts["hidden"].items():
        assert torch.equal(
            found.parts["hidden"][layer][found.mask], rows[expected.mask]
        )
    y = load_tokenizer(bpe_models.a).encode("ein", out_type=int)
    for a, b in zip(found.parts["lattice"], expected.parts["lattice"], strict=True):
        assert torch.equal(a.occupancy, b.occupancy) and a.labels.tolist() == y
        assert torch.equal(a.nodes.log_probs, b.nodes.log_probs)


# Cuts that were changed behind


CHANGES = {
    "part": lambda c: c.truncate(offset=0.4, duration=0.3),
    "part-padded": lambda c: c.truncate(duration=0.5).pad(duration=1.0),
    "padded": lambda c: c.pad(duration=2.0),
    "left-padded": lambda c: c.pad(duration=2.0, direction="left"),
    "both": lambda c: c.truncate(offset=0.2).pad(duration=1.5, direction="both"),
    "window": lambda c: list(c.cut_into_windows(0.24))[2],
}


def test_truncated_and_padded_shar_cuts_have_the_targets_of_plain_ones(filled, plain):
    cuts = read(filled)
    for change in CHANGES.values():
        for cut_id in ("c2", "ç5"):
            found, expected = change(cuts[cut_id]), change(plain[cut_id])
            assert isinstance(found, MixedCut) == isinstance(expected, MixedCut)
            same(collate_targets([found]), collate_targets([expected]))


def test_concatenated_shar_cuts_have_the_targets_of_plain_ones(filled, plain):
    cuts = read(filled)
    found = cuts["c3"].append(cuts["ç5"])
    expected = plain["c3"].append(plain["ç5"])
    same(collate_targets([found]), collate_targets([expected]))


def test_another_speed_of_a_shars_cut_is_refused(filled):
    with pytest.raises(KDError, match="speed or tempo was changed"):
        collate_targets([read(filled)["c3"].perturb_speed(0.9)])


def test_a_shar_is_trained_on_in_a_data_loader(filled, plain):
    loader = DataLoader(
        TargetDataset(K2SpeechRecognitionDataset()),
        sampler=SimpleCutSampler(CutSet.from_shar(in_dir=filled), max_duration=1.6),
        batch_size=None,
        num_workers=1,
    )
    seen = []
    for batch in loader:
        targets = batch["kd_targets"]
        for i, x in enumerate(batch["inputs"]):
            (cut,) = (
                c
                for c in plain
                if np.array_equal(x[: c.num_frames].numpy(), c.load_features())
            )
            n = int(targets.lens[i])
            expected = collate_targets([cut]).parts["ctc"][0]
            assert torch.equal(targets.parts["ctc"][i, :n], expected)
            seen.append(cut.id)
    assert sorted(seen) == sorted(LENGTHS)


# The store's small files


def test_small_files_are_looked_for_where_told(invoke, dumped, folder, tmp_path, plain):
    elsewhere = tmp_path / "elsewhere"
    assert invoke("shar", dumped, folder, "--storage-dir", elsewhere).code == 0
    elsewhere.mkdir()
    shutil.copy(tmp_path / "out_kd" / "fingerprint.json", elsewhere)
    shutil.rmtree(tmp_path / "out_kd")
    read_fingerprint.cache_clear()
    cuts = read(folder)
    assert {c.custom[FIELD]["store"] for c in cuts.values()} == {str(elsewhere)}
    same(collate_targets(list(cuts.values())), collate_targets(list(plain)))
    assert store_fingerprint(cuts.values())[1] == str(elsewhere)


def test_the_shars_own_folder_may_be_named(
    invoke, dumped, folder, plain, tmp_path, tree_of, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert invoke("shar", dumped, folder).code == 0
    before = tree_of(folder / "cuts.kd_targets")
    assert "fingerprint.json" in before
    for name in (folder / "cuts.kd_targets", "shar/cuts.kd_targets/"):
        done = invoke("shar", dumped, folder, "--storage-dir", name)
        assert done.code == 0, done
        assert tree_of(folder / "cuts.kd_targets") == before
    cuts = read(alone(folder, tmp_path))
    same(collate_targets(list(cuts.values())), collate_targets(list(plain)))


def test_a_first_store_that_is_gone_is_no_full_disk(invoke, filled, tmp_path, tree_of):
    """The cuts have their records, and no place where the fingerprint is."""
    cuts = [cut.drop_features() for cut in read(filled).values()]
    for cut in cuts:
        del cut.custom["shard_origin"]
    CutSet.from_cuts(cuts).to_file(tmp_path / "records.jsonl.gz")
    shutil.rmtree(tmp_path / "out_kd")
    forget()
    read_fingerprint.cache_clear()
    before = tree_of(filled)
    done = invoke("shar", tmp_path / "records.jsonl.gz", filled)
    assert done.code == 1 and "out_kd has no fingerprint.json" in done.err[-1], done
    assert "free space" not in done.err[-1] and tree_of(filled) == before


def test_a_shar_without_its_fingerprint_is_refused(filled, tmp_path):
    (tmp_path / "out_kd" / "fingerprint.json").unlink()
    shutil.rmtree(filled / "cuts.kd_targets")
    read_fingerprint.cache_clear()
    with pytest.raises(KDError, match="has no fingerprint.json.*icefall-kd repoint"):
        collate_targets([read(filled)["c1"]])


def alone(folder, tmp_path):
    """The Shar in another place, and nothing else, for another process."""
    new = tmp_path / "elsewhere" / "speech"
    shutil.copytree(folder, new)
    for name in ("out.jsonl.gz", "out_kd", "shar"):
        place = tmp_path / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    forget()
    read_fingerprint.cache_clear()
    return new


def test_a_shar_is_enough_by_itself(invoke, dumped, folder, plain, tmp_path):
    quantizer = tmp_path / "out_kd" / "quantizer.out.pt"
    quantizer.write_bytes(b"a quantizer")
    assert invoke("shar", dumped, folder).code == 0
    new = alone(folder, tmp_path)
    cuts = read(new)
    same(collate_targets(list(cuts.values())), collate_targets(list(plain)))
    own = str(new / "cuts.kd_targets")
    assert store_fingerprint(cuts.values())[1] == own
    names = [p.name for p in (new / "cuts.kd_targets").iterdir()]
    assert sorted(names) == ["fingerprint.json", "quantizer.out.pt"]
    mixed = cuts["c1"].pad(duration=3.0, preserve_id=True)
    assert collate_targets([mixed]).mask.sum() == 10


def test_a_shars_symbols_come_along(
    invoke, dump_words, folder, teacher_exp, tmp_path, bpe_models
):
    words = dump_words("--bpe-model", bpe_models.a, cuts=folder)
    assert invoke(*words).code == 0
    assert invoke("shar", tmp_path / "out.jsonl.gz", folder).code == 0
    tokens = (folder / "cuts.kd_targets" / "tokens.txt").read_bytes()
    assert tokens == (tmp_path / "out_kd" / "tokens.txt").read_bytes()


def test_an_older_shar_is_mended_where_its_store_is_now(
    invoke, filled, plain, tmp_path
):
    """As it was made before its store's small files came along."""
    shutil.rmtree(filled / "cuts.kd_targets")
    kept = shutil.copytree(tmp_path / "out_kd", tmp_path / "kept")
    new = alone(filled, tmp_path)
    with pytest.raises(KDError, match="no fingerprint.json.*icefall-kd repoint"):
        collate_targets(list(read(new).values()))
    assert "--storage-dir" in invoke("repoint", new).err[0]
    done = invoke("repoint", new, "--storage-dir", kept)
    assert done.code == 0, done
    shutil.rmtree(kept)
    forget()
    read_fingerprint.cache_clear()
    same(collate_targets(list(read(new).values())), collate_targets(list(plain)))
    assert invoke("repoint", new).code == 0  # again


def test_a_moved_shar_is_dumped_again(invoke, dump_words, filled, tmp_path):
    """The folder of small files is no shard to any command."""
    new = alone(filled, tmp_path)
    again = tmp_path / "again.jsonl.gz"
    assert invoke(*dump_words(cuts=new, out=again)).code == 0
    assert invoke("shar", again, new).code == 0


def test_targets_of_two_dumps_are_not_put_into_one_shar(
    invoke, dumped, dump_words, folder, tmp_path, tree_of
):
    other = tmp_path / "other.jsonl.gz"
    assert invoke(*dump_words("--epoch", 1, cuts=folder, out=other)).code == 0
    cuts = [*list(load_manifest(dumped))[:3], *list(load_manifest(other))[3:]]
    CutSet.from_cuts(cuts).to_file(tmp_path / "both.jsonl.gz")
    before = tree_of(tmp_path)
    done = invoke("shar", tmp_path / "both.jsonl.gz", folder)
    assert done.code == 1 and "the targets of cut c4" in done.err[-1]
    assert "those of one dump" in done.err[-1]
    assert tree_of(tmp_path) == before


def test_the_first_cuts_of_a_shar_stand_for_all(filled, monkeypatch):
    monkeypatch.setattr(first_look, "SAMPLE", 2)
    cuts = iter(CutSet.from_shar(in_dir=filled))
    assert store_fingerprint(cuts)[0].vocab_size == 25
    assert [c.id for c in cuts] == ["c4", "ç5"]  # the third was looked at
    bare = (c.drop_custom(FIELD) for c in CutSet.from_shar(in_dir=filled))
    with pytest.raises(KDError, match="2 of 2 training cuts have no targets"):
        store_fingerprint(bare)


def test_all_cuts_of_a_plain_manifest_are_looked_at(plain, monkeypatch):
    monkeypatch.setattr(first_look, "SAMPLE", 2)
    cuts = [*list(plain)[:4], plain["ç5"].drop_custom(FIELD)]
    with pytest.raises(KDError, match="1 of 5 training cuts have no targets.*ç5"):
        store_fingerprint(cuts)


# Refusals


@pytest.fixture
def left_alone(invoke, tree_of, tmp_path):
    """``shar`` ends with one sentence, and every file is as it was."""

    def run(*words):
        before = tree_of(tmp_path), beside(tmp_path / "shar")
        done = invoke("shar", *words)
        assert done.code == 1, done
        assert done.err[-1].startswith("icefall_kd: error: ")
        assert (tree_of(tmp_path), beside(tmp_path / "shar")) == before
        return done.err[-1]

    return run


def reordered(cuts):
    return [cuts[1], cuts[0], *cuts[2:]]


def reordered_in_the_last_shard(cuts):
    return [*cuts[:3], cuts[4], cuts[3]]


def last_missing(cuts):
    return cuts[:-1]


def first_missing(cuts):
    return cuts[1:]


def one_twice(cuts):
    return [*cuts, cuts[-1]]


def one_more(cuts):
    return [*cuts, cuts[0].with_id("c6")]


def one_more_within(cuts):
    return [*cuts[:3], cuts[0].with_id("c6"), *cuts[3:]]


def test_a_manifest_of_other_cuts_is_refused(left_alone, dumped, folder, tmp_path):
    given = list(load_manifest(dumped))
    for change, words in [
        (reordered, "000000.jsonl.gz is c1 and the manifest has c2 there"),
        (reordered_in_the_last_shard, "000001.jsonl.gz is c4 and the manifest has ç5"),
        (last_missing, "000002.jsonl.gz is ç5 and the manifest has no more cuts there"),
        (first_missing, "000000.jsonl.gz is c1 and the manifest has c2 there"),
        (one_more, "cut c6 of .* is not in .*shar"),
        (one_twice, "cut ç5 of .* is not in .*shar"),
        (one_more_within, "000001.jsonl.gz is c4 and the manifest has c6 there"),
    ]:
        other = tmp_path / "other.jsonl"
        with open(other, "w") as f:  # a CutSet takes no cut twice
            for cut in change(given):
                f.write(json.dumps(cut.to_dict()) + "\n")
        error = left_alone(other, folder)
        assert re.search(words, error), error
        assert "same order" in error


@pytest.mark.parametrize("change", [reordered_in_the_last_shard, one_more])
def test_a_refusal_leaves_the_targets_that_were_there(
    left_alone, filled, dumped, tmp_path, change, plain
):
    other = tmp_path / "other.jsonl"
    records = tmp_path / "out_kd" / "targets.bin"
    records.write_bytes(b"".join(_records(filled)))
    CutSet.from_cuts(change(list(load_manifest(dumped)))).to_file(other)
    left_alone(other, filled)
    records.unlink()
    same(collate_targets(list(read(filled).values())), collate_targets(list(plain)))


def _records(folder):
    for cut in read(folder).values():
        yield b"".join(Pointer.of_cut(cut).read().values())


def test_cuts_without_targets_are_refused(left_alone, in_cuts, folder):
    error = left_alone(in_cuts, folder)
    assert f"cut c1 has no targets ({FIELD})" in error and "icefall-kd dump" in error


def test_a_shard_that_is_no_gzip_file_is_damaged(left_alone, dumped, folder):
    shard = min(folder.glob("cuts.*.jsonl.gz"))
    shard.write_bytes(b"{}")
    assert f"{shard} or {dumped} is damaged (" in left_alone(dumped, folder)


def test_a_full_disk_is_said_as_in_every_command(
    left_alone, dumped, folder, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("icefall_kd.cli.shar._put_small_files", full)
    expected = f"No space left on device ({folder}): free space, then retry"
    assert expected in left_alone(dumped, folder)


def test_damaged_records_are_refused(left_alone, dumped, folder, tmp_path):
    path = tmp_path / "out_kd" / "targets.bin"
    data = bytearray(path.read_bytes())
    data[Pointer.of_cut(list(load_manifest(dumped))[3]).offset] ^= 1
    path.write_bytes(data)
    error = left_alone(dumped, folder)
    assert "targets of cut c4 in " in error and "damaged" in error


def test_folders_that_are_no_shar_are_refused(left_alone, dumped, folder, tmp_path):
    for name in ("empty", "nowhere"):
        if name == "empty":
            (tmp_path / name).mkdir()
        error = left_alone(dumped, tmp_path / name)
        assert f"{name} holds no cuts.*.jsonl.gz" in error and "lhotse shar" in error
    assert "nowhere.jsonl does not exist" in left_alone("nowhere.jsonl", folder)


def test_a_torn_shard_is_refused(left_alone, dumped, folder):
    path = folder / "cuts.000001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert "cuts.000001" in left_alone(dumped, folder)


def test_dump_of_a_folder_that_is_no_shar_is_refused(refused, dump_words, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty can't be read" in refused(*dump_words(cuts=tmp_path / "empty"))


@pytest.mark.parametrize(
    "name", ["kd_targets.000000.jsonl.gz", "kd_targets.000009.jsonl.gz"]
)
def test_what_a_killed_run_left_is_no_hindrance(
    invoke, dumped, folder, tmp_path, plain, name
):
    waiting = tmp_path / ".tmp.shar.kd_targets"
    waiting.mkdir()
    (waiting / name).write_bytes(b"half a line")
    done = invoke("shar", dumped, folder)
    assert done.code == 0, done.err[-1]
    assert not waiting.exists()
    same(collate_targets(list(read(folder).values())), collate_targets(list(plain)))


def test_the_folder_can_be_the_one_at_hand(invoke, dumped, folder, plain, monkeypatch):
    monkeypatch.chdir(folder)
    before = beside(folder)
    assert invoke("shar", dumped, ".").code == 0
    same(collate_targets(list(read(folder).values())), collate_targets(list(plain)))
    assert beside(folder) == before


# Damage


def lines_of(path):
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def rewritten(path, change):
    """Change the second cut's value in a shard of targets."""
    lines = lines_of(path)
    values = json.loads(lines[1])
    change(values[FIELD])
    lines[1] = json.dumps(values)
    path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))


DAMAGED = "targets of cut c2 in .* are damaged: checksum"


def test_a_changed_character_of_a_record_is_found(filled, plain):
    path = filled / "kd_targets.000000.jsonl.gz"
    whole = path.read_bytes()
    for at in (0, 1, 101, -9):
        for character in ("A", "B", "", "!", "ä"):

            def change(value, at=at, character=character):
                record = list(value["record"])
                record[at] = "C" if record[at] == character else character
                value["record"] = "".join(record)

            path.write_bytes(whole)
            rewritten(path, change)
            cuts = read(filled)
            with pytest.raises(KDError, match=DAMAGED):
                collate_targets([cuts["c2"]])
            found = collate_targets([cuts[i] for i in ("c1", "c3")])
            same(found, collate_targets([plain[i] for i in ("c1", "c3")]))


def test_a_changed_note_about_a_record_is_found(filled):
    path = filled / "kd_targets.000000.jsonl.gz"
    whole = path.read_bytes()
    for field, new in [
        ("frames", 20),
        ("start", 0.04),
        ("duration", 0.86),
        ("sizes", {"ctc": 1048}),
        ("sizes", {"other": 1050}),
    ]:

        def change(value, field=field, new=new):
            assert value[field] != new
            value[field] = new

        path.write_bytes(whole)
        rewritten(path, change)
        part = read(filled)["c2"].truncate(offset=0.4, duration=0.3)
        with pytest.raises(KDError, match=DAMAGED):
            collate_targets([part])


# Lhotse alone


def test_plain_lhotse_loads_the_shar(filled, plain, run_python, tmp_path):
    code = (
        "import base64, sys, lhotse, numpy as np\n"
        "found = {}\n"
        "for c in lhotse.CutSet.from_shar(in_dir=sys.argv[1]):\n"
        "    p = c.custom['kd_targets']\n"
        "    data = np.frombuffer(base64.b64decode(p['record']), np.float16)\n"
        "    found[c.id] = data.reshape(p['frames'], -1)\n"
        "    found[c.id + '.feats'] = c.load_features()\n"
        "    part = c.truncate(duration=0.1).pad(duration=2.0)\n"
        "    assert part.tracks[0].cut.custom['kd_targets']['cut'] == c.id\n"
        "    assert part.load_features().shape == (200, 20)\n"
        "np.savez(sys.argv[2], **found)\n"
        "assert 'icefall_kd' not in sys.modules\n"
        "try:\n    import icefall_kd\n"
        "except ImportError:\n    print('alone', len(found))\n"
    )
    done = run_python(code, filled, tmp_path / "out.npz", block=["icefall_kd"])
    assert done.stdout == "alone 10\n", done.stderr
    loaded = np.load(tmp_path / "out.npz")
    for cut in plain:
        rows = torch.from_numpy(loaded[cut.id]).float().log_softmax(-1)
        assert torch.equal(rows, collate_targets([cut]).parts["ctc"][0])
        assert np.array_equal(loaded[f"{cut.id}.feats"], cut.load_features())

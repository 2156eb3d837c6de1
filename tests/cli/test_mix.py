"""icefall-kd mix: one training manifest of cuts that different things teach on."""

import shutil
from collections import Counter

import pytest
from lhotse import CutSet

from icefall_kd.labels.pseudo_label import PseudoLabel, put
from icefall_kd.targets import TargetDataset

SOURCE = {"teacher": "t", "settings": {}}


@pytest.fixture
def manifests(make_cut, make_store, tmp_path):
    """Transcripts of people, of a teacher with targets, and targets alone."""
    people = [make_cut(f"p{i}", 40 + i) for i in range(3)]
    pseudo = [put(make_cut(f"t{i}", 47), PseudoLabel("two"), SOURCE) for i in range(6)]
    bare = make_store([make_cut(f"b{i}", 33, text=None) for i in range(4)], "bare")
    sets = {"people": people, "pseudo": make_store(pseudo, "pseudo"), "bare": bare}
    paths = {}
    for name, cuts in sets.items():
        paths[name] = tmp_path / f"{name}.jsonl.gz"
        CutSet.from_cuts(cuts).to_file(paths[name])
    return paths


@pytest.fixture
def out(tmp_path):
    return tmp_path / "mixed" / "train.jsonl.gz"


def words(out, *paths, weights=(), **options):
    given = ["mix", out]
    for path in paths:
        given += ["--cuts", path]
    for weight in weights:
        given += ["--weight", weight]
    return given + [x for k, v in options.items() for x in (f"--{k}", v)]


def ids(path):
    return [cut.id for cut in CutSet.from_file(path)]


def test_all_cuts_are_there_once_and_read_as_a_training_does(invoke, manifests, out):
    done = invoke(*words(out, *manifests.values()))
    assert done.code == 0 and done.err == [], done
    assert "13 cuts, 0.00 h; some have no targets" in done.out
    row = done.out.splitlines()[2].split()
    assert row[1:5] == ["0", "6", "0", "6"] and row[-1] == "1"
    cuts = CutSet.from_file(out).to_eager()
    assert sorted(ids(out)) == sorted(i for p in manifests.values() for i in ids(p))
    assert {c.supervisions[0].text for c in cuts if c.id[0] == "b"} == {""}
    from lhotse.dataset import K2SpeechRecognitionDataset

    dataset = TargetDataset(K2SpeechRecognitionDataset(), missing="hard")
    targets = dataset[CutSet.from_cuts(cuts)]["kd_targets"]
    assert int(targets.mask.any(1).sum()) == 10
    other = out.with_name("other.jsonl.gz")
    invoke(*words(other, *manifests.values(), seed=1))
    assert ids(other) != ids(out) and sorted(ids(other)) == sorted(ids(out))


def test_weights_are_the_ratio_throughout_and_repeats_get_ids_of_their_own(
    invoke, make_cut, tmp_path, out
):
    paths = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"]
    for path, count in zip(paths, (7, 60)):
        CutSet.from_cuts(
            make_cut(f"{path.name[0]}{i}", 33) for i in range(count)
        ).to_file(path)
    done = invoke(*words(out, *paths, weights=(2, 1)))
    assert done.code == 0, done
    found = ids(out)
    assert len(found) == len(set(found)) == 180
    assert Counter(name[0] for name in found) == {"a": 120, "b": 60}
    assert Counter(name.partition("_")[0] for name in found)["a0"] == 18  # 120 / 7
    assert "a0_repeat17" in found and "a0_repeat18" not in found
    # Each third has about as many; by chance alone 4 are within 2.5 deviations.
    for i in range(0, 180, 60):
        assert abs(sum(name[0] == "a" for name in found[i : i + 60]) - 40) <= 9


def test_a_store_that_was_moved_is_named_where_it_is(invoke, manifests, out, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "bare", moved / "bare")
    path = shutil.move(manifests["bare"], moved)
    assert invoke(*words(out, path)).code == 0
    stores = {cut.kd_targets["store"] for cut in CutSet.from_file(out)}
    assert stores == {str(moved / "bare")}


def test_what_a_dump_left_out_is_left_out(invoke, manifests, make_cut, out, tmp_path):
    cut = make_cut("short", 33, text="")
    cut.custom = {"kd_targets": None}
    path = tmp_path / "some.jsonl.gz"
    CutSet.from_cuts([cut, make_cut("long", 33)]).to_file(path)
    done = invoke(*words(out, path))
    assert ids(out) == ["long"] and "1 without transcript and targets" in done.out
    CutSet.from_cuts([cut]).to_file(path)
    assert invoke(*words(out, path)).code == 1


def test_what_does_not_fit_is_refused(
    refused, manifests, make_cut, make_store, tmp_path
):
    people, pseudo, bare = manifests.values()
    new = tmp_path / "new" / "train.jsonl.gz"
    other = tmp_path / "other.jsonl.gz"

    def said(cuts, *more, **options):
        CutSet.from_cuts(cuts).to_file(other)
        return refused(*words(new, people, other, *more, **options))

    nothing = said([make_cut("x", 33, text=" ")])
    assert "the cut x of" in nothing and "icefall-kd label" in nothing
    assert "the cut id p1 is in" in said([make_cut("p1", 33)])
    assert "20 features" in said([make_cut("x", 33, num_features=40)])
    assert "--weight is given 1 times" in said([make_cut("x", 33)], weights=(1,))
    assert "lower --weight" in said([make_cut("x", 33)], weights=(1, 10**5))
    others = make_store([make_cut("x", 33)], "others", teacher="another")
    assert "with one teacher" in said(others, bare)
    twice = refused(*words(new, people, people))
    assert f"is in {people} and in {people} twice" in twice
    assert "both read and written" in refused(*words(people, people))

"""Inputs at the edges: refused before a store is begun, or left out and counted."""

import importlib
import re

import pytest
import torch
from lhotse import CutSet, load_manifest

from icefall_kd.cli.dump import parse_seconds
from icefall_kd.errors import KDError
from icefall_kd.tap import ModelTap
from icefall_kd.targets import Fingerprint
from icefall_kd.targets.dataset import store_fingerprint
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer, is_left_out
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.tokens import load_tokenizer

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def lattice_words(bpe_models):
    return ("--keep-lattice", "dense", "--bpe-model", bpe_models.a)


@pytest.fixture
def cuts_file(tmp_path):
    """A manifest of these cuts."""

    def write(cuts, name="given.jsonl.gz"):
        CutSet.from_cuts(cuts).to_file(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def many(make_cut):
    """So many good cuts, g0 on, of odd lengths."""
    return lambda count: [make_cut(f"g{i}", 31 + 2 * i) for i in range(count)]


# The label positions of a lattice


def test_a_full_lattice_is_that_of_an_online_teacher(
    invoke,
    dump_words,
    cuts_file,
    make_cut,
    tmp_path,
    teacher,
    bpe_models,
    lattice_words,
):
    texts = {"a": "zero one", "b": "two", "c": "six z"}
    given = [make_cut(i, 61 + len(t), text=t) for i, t in texts.items()]
    words = (*lattice_words, "--s-range", 0, "--max-duration", 100)
    assert invoke(*dump_words(*words, cuts=cuts_file(given))).code == 0
    assert Fingerprint.read(tmp_path / "out_kd").s_range == 0
    stored = collate_targets(list(load_manifest(tmp_path / "out.jsonl.gz")))
    sp = load_tokenizer(bpe_models.a)
    for cut, lattice in zip(given, stored.parts["lattice"], strict=True):
        x = torch.from_numpy(cut.load_features())[None]
        y = [sp.encode(cut.supervisions[0].text, out_type=int)]
        lens = torch.tensor([x.size(1)])
        nodes = Teacher([teacher]).targets(x, lens, y=y, s_range=0).parts["nodes"]
        t = int(stored.lens[given.index(cut)])
        full = torch.zeros(t, len(y[0]) + 1)
        full[nodes.frame, nodes.position] = nodes.occupancy
        # Its own positions, whatever longer transcripts the batch had.
        assert lattice.ranges.tolist() == [list(range(len(y[0]) + 1))] * t
        assert (lattice.occupancy - full).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("s_range", [1, -3])
def test_too_few_label_positions_are_refused(
    invoke, refused, dump_words, lattice_words, s_range
):
    words = dump_words(*lattice_words, "--s-range", s_range)
    assert f"--s-range is {s_range}, and " in refused(*words)
    assert invoke(*dump_words(*lattice_words, "--s-range", 5)).code == 0


# What can't be given or kept


def test_a_lattice_of_a_teacher_without_transducer_leaves_nothing(
    invoke, refused, dump_words, another_exp, lattice_words
):
    folder, _ = another_exp(use_transducer=False)
    words = ("--exp-dir", folder)
    assert "has no decoder" in refused(*dump_words(*words, *lattice_words))
    assert invoke(*dump_words(*words)).code == 0


def test_a_teacher_that_is_not_finite_leaves_nothing(
    invoke, refused, dump_words, another_exp, monkeypatch
):
    folder, model = another_exp(seed=9)
    words = dump_words("--exp-dir", folder)
    broken = model.ctc_output[1].weight
    with monkeypatch.context() as m:
        m.setattr(broken, "data", broken.data * torch.nan)
        state = {"model": model.state_dict()}
        path = folder / "epoch-2.pt"
        before = path.read_bytes()
        torch.save({**torch.load(path, weights_only=False), **state}, path)
    assert "not finite" in refused(*words, "--use-averaged-model", "no")
    path.write_bytes(before)


def test_a_quantizer_of_another_width_leaves_nothing(
    invoke, refused, dump_words, tmp_path
):
    quantization = pytest.importorskip("multi_quantization")
    from icefall_kd.kinds.hidden import save_quantizer

    torch.manual_seed(0)
    save_quantizer(quantization.Quantizer(7, 256, 2), tmp_path / "q.pt")
    words = ("--keep-hidden", f"out:{tmp_path / 'q.pt'}")
    assert "its quantizer takes 7" in refused(*dump_words(*words))
    assert invoke(*dump_words("--keep-hidden", "out:half")).code == 0


def test_what_can_not_be_kept_leaves_the_store_that_was_to_be_overwritten(
    invoke, refused, dump_words, another_exp, lattice_words
):
    assert invoke(*dump_words()).code == 0
    folder, _ = another_exp(use_transducer=False)
    words = ("--exp-dir", folder, "--overwrite", *lattice_words)
    assert "has no decoder" in refused(*dump_words(*words))


# Where things are written


@pytest.mark.parametrize(
    "name, said",
    [
        ("", "OUT_CUTS is empty"),
        (".", "OUT_CUTS is the folder ."),
        ("feats", "OUT_CUTS is the folder feats"),
        ("new/", "OUT_CUTS is the folder new/"),
        ("o.json", "ends with .jsonl.gz or .jsonl"),
        ("o.json.gz", "ends with .jsonl.gz or .jsonl"),
        ("o.yaml", "ends with .jsonl.gz or .jsonl"),
        ("o.jsonl.zst", "ends with .jsonl.gz or .jsonl"),
        ("o", "ends with .jsonl.gz or .jsonl"),
        (".jsonl", "ends with .jsonl.gz or .jsonl"),
        ("in.jsonl.gz", "in.jsonl.gz is both read and written"),
        ("in.jsonl.gz/o.jsonl", "in.jsonl.gz is a file"),
    ],
)
@pytest.mark.parametrize("command", ["dump", "combine"])
def test_a_manifest_that_could_not_be_read_again_is_refused(
    refused, dump_words, tmp_path, monkeypatch, command, name, said
):
    monkeypatch.chdir(tmp_path)
    words = dump_words(cuts="in.jsonl.gz", out=name)
    if command == "combine":
        words = ["combine", "in.jsonl.gz", name, "--num-jobs", 2]
    assert said in refused(*words)


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "a.b/o.c.jsonl"])
def test_a_manifest_is_read_back_with_its_targets(invoke, dump_words, tmp_path, name):
    assert invoke(*dump_words(out=tmp_path / name)).code == 0
    found = list(load_manifest(tmp_path / name))
    assert len(found) == 4 and all(Pointer.of_cut(cut) for cut in found)


@pytest.mark.parametrize(
    "folder, said",
    [
        ("in.jsonl.gz", "in.jsonl.gz is a file"),
        ("in.jsonl.gz/kd", "in.jsonl.gz is a file"),
        ("out.jsonl.gz", "--storage-dir and OUT_CUTS are both"),
    ],
)
def test_a_store_that_is_a_file_is_refused(refused, dump_words, tmp_path, folder, said):
    assert said in refused(*dump_words("--storage-dir", tmp_path / folder))


@pytest.mark.parametrize(
    "name, said",
    [
        ("", "OUT is empty"),
        ("feats", "OUT is the folder feats"),
        ("in.jsonl.gz", "both read and written"),
        ("in.jsonl.gz/q.pt", "in.jsonl.gz is a file"),
    ],
)
def test_a_quantizer_that_could_not_be_written_is_refused(
    refused, teacher_words, in_cuts, tmp_path, monkeypatch, name, said
):
    monkeypatch.chdir(tmp_path)
    words = ["quantizer", in_cuts.name, name, *teacher_words, "--layer", 1]
    assert said in refused(*words)


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_batch_of_no_length_is_refused(invoke, dump_words, tmp_path, tree_of, value):
    before = tree_of(tmp_path)
    done = invoke(*dump_words("--max-duration", value))
    assert done.code in (1, 2) and "--max-duration" in done.err[-1]
    assert tree_of(tmp_path) == before


# Cuts that can't be heard


def bad_cuts(make_cut, multi_cut):
    return {
        "short": (make_cut("bad", 5), "has 5 feature frames"),
        "multi": (multi_cut("bad", 61), "is a MultiCut"),
        "mixed": (make_cut("bad", 61).pad(duration=2, preserve_id=True), "MixedCut"),
    }


@pytest.fixture(params=["short", "multi", "mixed"])
def bad(request, make_cut, multi_cut):
    """A cut that can't be heard, and why."""
    return bad_cuts(make_cut, multi_cut)[request.param]


def ids(cuts):
    return [cut.id for cut in cuts]


def plain(cut):
    """A cut's dictionary without what a dump adds."""
    values = cut.to_dict()
    for owner in (values, *(track["cut"] for track in values.get("tracks", []))):
        custom = {k: v for k, v in (owner.pop("custom", None) or {}).items()}
        custom.pop(FIELD, None)
        owner["custom"] = custom or None
    return values


@pytest.mark.parametrize("place", [0, 9, 19])
def test_one_cut_of_twenty_goes_without_targets(
    invoke, dump_words, cuts_file, many, tmp_path, bad, place, caplog
):
    cut, reason = bad
    given = many(19)
    given.insert(place, cut)
    path, out = cuts_file(given), tmp_path / "out.jsonl.gz"
    with caplog.at_level("WARNING"):
        done = invoke(*dump_words("--stats", cuts=path))
    assert done.code == 0, done
    assert "1 of 20 cuts can't be used and are left out: the cut bad" in caplog.text
    assert reason in caplog.text
    assert "19 cuts with targets, 1 without" in done.out
    assert re.search(r"cuts without targets +1\n", done.out)
    found = list(load_manifest(out))
    assert ids(found) == ids(given)
    assert [is_left_out(c) for c in found] == [c.id == "bad" for c in given]
    assert list(map(plain, found)) == list(map(plain, given))
    # What is there already is not asked again.
    before = (tmp_path / "out_kd/targets.bin").read_bytes()
    assert invoke(*dump_words(cuts=path)).code == 0
    assert ids(load_manifest(out)) == ids(given)
    assert (tmp_path / "out_kd/targets.bin").read_bytes() == before
    # The others have what they have without it, and training says what is to be done.
    alone = tmp_path / "alone.jsonl.gz"
    good = [c for c in given if c is not cut]
    words = dump_words(cuts=cuts_file(good, "good.jsonl"), out=alone)
    assert invoke(*words).code == 0
    records = [Pointer.of_cut(c).read() for c in found if c.id != "bad"]
    assert records == [Pointer.of_cut(c).read() for c in load_manifest(alone)]
    assert store_fingerprint(found, missing="hard")[0].teacher
    with pytest.raises(KDError, match="1 of 20 .* bad the first, as .*dump.* left .*"):
        store_fingerprint(found)


def test_more_than_one_of_twenty_are_refused(refused, dump_words, cuts_file, many, bad):
    cut, reason = bad
    error = refused(*dump_words(cuts=cuts_file([*many(18), cut])))
    assert reason in error and "1 of the 19 cuts" in error
    assert "more than 1 in 20" in error


def test_a_stretch_that_nothing_is_heard_of(
    invoke, dump_words, cuts_file, many, make_cut, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        importlib.import_module("icefall_kd.targets.batches"), "STRETCH", 0.02
    )
    given = [make_cut("bad", 1), make_cut("worse", 1), *many(40)]
    done = invoke(*dump_words(cuts=cuts_file(given)))
    assert done.code == 0 and "40 cuts with targets, 2 without" in done.out
    assert ids(load_manifest(tmp_path / "out.jsonl.gz")) == ids(given)


def test_jobs_with_cuts_that_can_not_be_heard(
    invoke, dump_words, cuts_file, many, make_cut, tmp_path
):
    given = [*many(20), make_cut("bad", 5), make_cut("last", 47)]
    path, out = cuts_file(given), tmp_path / "out.jsonl.gz"
    for job in (1, 0, 2):
        words = ("--num-jobs", 3, "--job", job)
        done = invoke(*dump_words(*words, cuts=path))
        assert done.code == 0
    assert "21 cuts with targets of 3 jobs" in done.out
    found = list(load_manifest(out))
    assert ids(found) == ids(given)
    assert [c.id for c in found if is_left_out(c)] == ["bad"]


def test_a_shar_with_a_cut_that_can_not_be_heard(
    invoke, dump_words, many, make_cut, tmp_path
):
    given = [*many(19), make_cut("bad", 5), make_cut("last", 47)]
    folder = tmp_path / "shar"
    folder.mkdir()
    CutSet.from_cuts(given).to_shar(
        folder, fields={"features": "numpy"}, shard_size=8, warn_unused_fields=False
    )
    out = tmp_path / "out.jsonl.gz"
    assert invoke(*dump_words(cuts=folder)).code == 0
    assert [c.id for c in load_manifest(out) if is_left_out(c)] == ["bad"]
    assert invoke("shar", out, folder).code == 0
    found = list(CutSet.from_shar(in_dir=folder))
    assert ids(found) == ids(given)
    targets = collate_targets(found, missing="hard")
    assert targets.mask.any(1).tolist() == [c.id != "bad" for c in given]


def test_a_manifest_without_targets_is_still_none_of_ours(
    refused, dump_words, cuts_file, many
):
    """Only what a dump left out is taken for its own."""
    cuts_file(many(2), "out.jsonl.gz")
    assert "has targets in None" in refused(*dump_words())


# Cuts that the recipe leaves out


def test_cuts_that_the_recipe_leaves_out(
    invoke, dump_words, cuts_file, many, tmp_path, caplog
):
    given = many(6)  # 0.31 to 0.41 s
    path, out = cuts_file(given), tmp_path / "out.jsonl.gz"
    words = ("--cut-seconds", "0.33:0.37", "--stats")
    with caplog.at_level("WARNING"):
        done = invoke(*dump_words(*words, cuts=path))
    assert done.code == 0 and "3 cuts with targets, 3 without" in done.out
    assert "3 of 6 cuts are not 0.33 to 0.37 s long" in caplog.text
    assert re.search(r"cuts without targets +3\n", done.out)
    found = list(load_manifest(out))
    assert [c.id for c in found if Pointer.of_cut(c)] == ["g1", "g2", "g3"]
    assert ids(found) == ids(given)
    # The same again changes nothing; other bounds are not mixed with these.
    assert invoke(*dump_words(*words, cuts=path)).code == 0
    done = invoke(*dump_words(cuts=path))
    assert done.code == 1 and "the cut g0 of 0.31 s was left without" in done.err[-1]
    assert ids(load_manifest(out)) == ids(given)
    assert invoke(*dump_words("--overwrite", cuts=path)).code == 0
    assert all(Pointer.of_cut(c) for c in load_manifest(out))


@pytest.mark.parametrize("text", ["1", "20:1", "a:b", "nan:2", "-1:2", "1:2:3", ":"])
def test_bounds_that_are_none_are_refused(refused, dump_words, text):
    assert f"--cut-seconds is '{text}'" in refused(*dump_words("--cut-seconds", text))


def test_bounds_that_leave_nothing_are_refused(refused, dump_words):
    error = refused(*dump_words("--cut-seconds", "5:20"))
    assert "none of the 4 cuts" in error and "is 5 to 20 s long" in error


def test_bounds():
    assert parse_seconds("1:20") == (1.0, 20.0)
    shortest, longest = parse_seconds("")
    assert shortest == 0 and longest > 1e9


# Supervisions


def with_supervisions(cut, count):
    cut.supervisions = count * cut.supervisions
    return cut


@pytest.mark.parametrize("count, remedy", [(0, "give it one"), (2, "trim-to-superv")])
def test_a_cut_of_no_supervision_or_two_is_refused(
    refused, dump_words, cuts_file, many, make_cut, count, remedy
):
    bad = with_supervisions(make_cut("bad", 61), count)
    error = refused(*dump_words(cuts=cuts_file([*many(40), bad])))
    assert f"the cut bad has {count} supervisions" in error and remedy in error


def test_a_cut_longer_than_its_supervision_is_heard_as_the_recipe_hears_it(
    invoke,
    dump_words,
    cuts_file,
    many,
    make_cut,
    tmp_path,
    teacher,
    caplog,
    read_targets,
):
    long = make_cut("long", 93)
    long.supervisions[0].duration = 0.61
    given = [*many(2), long]
    with caplog.at_level("WARNING"):
        done = invoke(*dump_words("--max-duration", 9, cuts=cuts_file(given)))
    assert done.code == 0
    assert (
        "1 of 3 cuts are longer than their supervision, long the first" in caplog.text
    )
    found = load_manifest(tmp_path / "out.jsonl.gz").to_eager()
    rows = read_targets(found["long"])
    with ModelTap(teacher) as hook:
        x = torch.from_numpy(long.load_features())[None, :61]
        logits = hook.encode(x, torch.tensor([61])).ctc_logits[0]
    torch.testing.assert_close(rows, logits.log_softmax(-1), rtol=2**-9, atol=1e-3)


def test_labels_are_compared_with_the_frames_that_are_heard(
    invoke, dump_words, cuts_file, make_cut, tmp_path, lattice_words, caplog
):
    long = make_cut("long", 93, text="one two")
    long.supervisions[0].duration = 0.15
    path = cuts_file([make_cut("a", 61), long])
    with caplog.at_level("WARNING"):
        assert invoke(*dump_words(*lattice_words, cuts=path)).code == 0
    assert "have more labels than frames, long the first" in caplog.text
    found = list(load_manifest(tmp_path / "out.jsonl.gz"))
    lattices = collate_targets(found, kinds=["lattice"]).parts["lattice"]
    assert [x is None for x in lattices] == [False, True]


def test_cuts_without_features_are_sent_to_an_online_teacher(
    refused, dump_words, cuts_file, many
):
    error = refused(*dump_words(cuts=cuts_file([c.drop_features() for c in many(3)])))
    assert "has no features" in error and "--kd-teacher-exp-dir" in error


# Memory


@pytest.fixture
def full_after(monkeypatch):
    """Let the teacher's memory run out behind so many calls."""

    def begin(count, error):
        left, call = [count], Teacher.outputs_to_store

        def some(self, *args):
            if not left[0]:
                raise error
            left[0] -= 1
            return call(self, *args)

        monkeypatch.setattr(Teacher, "outputs_to_store", some)
        return lambda: monkeypatch.setattr(Teacher, "outputs_to_store", call)

    return begin


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids="cuda cpu python".split(),
)
def test_a_dump_goes_on_where_memory_ran_out(
    invoke, dump_words, tmp_path, full_after, error
):
    whole = tmp_path / "whole.jsonl.gz"
    assert invoke(*dump_words(out=whole)).code == 0
    mend = full_after(3, error)  # the rehearsal, c1 and c2
    done = invoke(*dump_words())
    assert done.code == 1 and not (tmp_path / "out.jsonl.gz").exists()
    assert "memory ran out in the teacher's pass over a batch of 1 cuts" in done.err[-1]
    assert "0.6 s with padding, the longest of them c3" in done.err[-1]
    assert "--max-duration less than 0.01" in done.err[-1]
    partial = (tmp_path / "out.jsonl.gz.partial").read_text().splitlines()
    assert len(partial) == 2
    mend()
    assert invoke(*dump_words("--max-duration", 0.005)).code == 0
    found = [Pointer.of_cut(c).read() for c in load_manifest(tmp_path / "out.jsonl.gz")]
    assert found == [Pointer.of_cut(c).read() for c in load_manifest(whole)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_that_runs_out_on_reading(
    invoke, dump_words, monkeypatch, num_workers, tmp_path
):
    batches = importlib.import_module("icefall_kd.targets.batches")
    read = batches.read_features

    def full(cuts):
        if [cut.id for cut in cuts] == ["c2"]:
            raise MemoryError
        return read(cuts)

    monkeypatch.setattr(batches, "read_features", full)
    done = invoke(*dump_words("--num-workers", num_workers))
    assert (
        done.code == 1 and "reading the features of a batch of 1 cuts" in done.err[-1]
    )
    assert "[extra info]" not in done.err[-1]


def test_memory_that_is_full_from_the_first_cut_on_leaves_nothing(
    refused, dump_words, full_after
):
    full_after(0, RuntimeError("CUDA error: out of memory"))
    error = refused(*dump_words())
    assert "the teacher's pass over the cut c1: it is the first cut" in error


def test_a_quantizers_teacher_names_the_cut_that_memory_is_too_small_for(
    invoke, teacher_words, in_cuts, tmp_path, monkeypatch
):
    pytest.importorskip("multi_quantization")

    def full(*args):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Teacher, "run", full)
    words = ["quantizer", in_cuts, tmp_path / "q.pt", *teacher_words, "--layer", 1]
    done = invoke(*words)
    assert done.code == 1 and not (tmp_path / "q.pt").exists()
    assert "out in the teacher's pass over the cut c1 of 0.47 s" in done.err[-1]

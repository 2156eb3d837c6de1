"""``icefall-kd dump`` of several teachers: averaged, or one chosen for each cut.

What is expected is put together here from what each teacher's own hook says.
"""

import re

import pytest
import torch
from lhotse import CutSet, load_manifest

from icefall_kd.targets import Fingerprint
from icefall_kd.targets.fingerprint import hash_state_dict
from icefall_kd.targets.store import Pointer
from icefall_kd.tokens import load_tokenizer

pytestmark = pytest.mark.usefixtures("loaded_once")

TEACHER_OF = {"c1": 0, "c2": 1, "c3": 1, "c4": 0}


WEIGHTS = "--teacher-weights"


@pytest.fixture
def both(teacher_exp, another_exp):
    """``--exp-dir`` of two teachers, and their models."""
    folder, model = another_exp(seed=5)
    models = [teacher_exp.models["epoch-2"], model]
    return ("--exp-dir", f"{teacher_exp.folder},{folder}"), models


@pytest.fixture
def field_cuts(make_cut, tmp_path):
    """Cuts whose field ``domain`` is the number of their teacher."""

    def make(values, of="cut", name="domains.jsonl"):
        cuts = []
        for cut_id, num_frames in (("c1", 47), ("c2", 90), ("c3", 61), ("c4", 33)):
            cut = make_cut(cut_id, num_frames)
            owner = cut if of == "cut" else cut.supervisions[0]
            if cut_id in values:
                owner.custom = {"domain": values[cut_id], "age": 1}
            cuts.append(cut)
        CutSet.from_cuts(cuts).to_file(tmp_path / name)
        return tmp_path / name

    return make


def mixed(logits, weights):
    """log sum_m w_m softmax(logits_m), in float64."""
    total = sum(w * x.double().softmax(-1) for w, x in zip(weights, logits))
    return (total / sum(weights)).log()


def close(found, expected):
    """Within float16."""
    torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=1e-4)


# Averaged


@pytest.mark.parametrize(
    "words, weights, max_duration",
    [
        ((WEIGHTS, "3,1"), [3, 1], 0.01),
        ((WEIGHTS, "0.2,.8"), [0.2, 0.8], 9),
        ((), [1, 1], 9),
    ],
    ids="three-to-one fractions equal".split(),
)
def test_teachers_are_averaged_with_their_weights(
    invoke, dump_words, both, hear, tmp_path, read_targets, words, weights, max_duration
):
    """Cut by cut, and in a batch."""
    options, models = both
    words = (*options, *words, "--max-duration", max_duration)
    assert invoke(*dump_words(*words)).code == 0
    found = list(load_manifest(tmp_path / "out.jsonl.gz"))
    assert [c.id for c in found] == ["c1", "c2", "c3", "c4"]
    for cut in found:
        each = [hear(model, cut).ctc_logits[0] for model in models]
        close(read_targets(cut), mixed(each, weights))


def test_three_teachers_are_averaged(
    invoke, dump_words, both, another_exp, hear, tmp_path, read_targets
):
    (word, folders), models = both
    folder, third = another_exp(seed=6)
    words = (word, f"{folders},{folder}", "--teacher-weights", "1,2,4")
    assert invoke(*dump_words(*words)).code == 0
    for cut in load_manifest(tmp_path / "out.jsonl.gz"):
        each = [hear(model, cut).ctc_logits[0] for model in [*models, third]]
        close(read_targets(cut), mixed(each, [1, 2, 4]))


def test_lattices_are_averaged_on_the_first_teachers_nodes(
    invoke, dump_words, both, hear, tmp_path, bpe_models
):
    """Of the second teacher's full lattice those nodes are picked here."""
    options, models = both
    sp = load_tokenizer(bpe_models.a)
    words = (*options, "--teacher-weights", "3,1", "--keep-lattice", "dense")
    words = (*words, "--bpe-model", bpe_models.a, "--s-range", 4)
    assert invoke(*dump_words(*words)).code == 0
    codec = Fingerprint.read(tmp_path / "out_kd").kinds["lattice"].codec
    nodes = 0
    for cut in load_manifest(tmp_path / "out.jsonl.gz"):
        y = sp.encode(cut.supervisions[0].text, out_type=int)
        first = hear(models[0], cut, y=y, s_range=4)
        full = hear(models[1], cut, y=y, s_range=99)
        assert full.ranges.size(2) == len(y) + 1 > 4
        index = first.ranges[..., None].expand_as(first.logits)
        logits = mixed([first.logits, full.logits.gather(2, index)], [3, 1])
        parts = Pointer.of_cut(cut).read()
        assert list(parts) == ["ctc", "lattice"]
        found = codec.decode(parts["lattice"], 25)
        assert torch.equal(found.ranges, first.ranges[0])
        assert found.labels.tolist() == y
        close(found.nodes, logits[0][found.occupancy > 0])
        nodes += len(found.nodes)
        t = len(found.ranges)
        assert float(found.occupancy.sum()) == pytest.approx(t + len(y), abs=t / 100)
    assert nodes > 52  # more than one in a frame


def test_the_fingerprint_names_the_teachers_and_their_weights(
    invoke, dump_words, both, tmp_path
):
    options, models = both
    assert invoke(*dump_words(*options, "--teacher-weights", "3,1")).code == 0
    hashes = [hash_state_dict(model.state_dict()) for model in models]
    found = Fingerprint.read(tmp_path / "out_kd").teacher
    assert found == f"{hashes[0]}*3,{hashes[1]}*1"


def test_other_teachers_or_weights_leave_the_store(
    invoke, refused, dump_words, both, teacher_exp
):
    (word, folders), _ = both
    assert invoke(*dump_words(word, folders, "--teacher-weights", "3,1")).code == 0
    swapped = ",".join(reversed(folders.split(",")))
    for words in (
        (word, folders, "--teacher-weights", "1,3"),
        (word, folders),
        (word, swapped, "--teacher-weights", "3,1"),
        (word, teacher_exp.folder),
    ):
        error = refused(*dump_words(*words))
        assert "made with teacher" in error and "--overwrite" in error


def test_equal_weights_are_the_default(invoke, dump_words, both, tmp_path, tree_of):
    options, _ = both
    assert invoke(*dump_words(*options)).code == 0
    before = tree_of(tmp_path / "out_kd")
    done = invoke(*dump_words(*options, "--teacher-weights", "1,1"))
    assert done.code == 0 and "0.0 MB written" in done.out
    assert tree_of(tmp_path / "out_kd") == before


def test_one_teacher_with_a_weight_is_one_teacher(
    invoke, dump_words, tmp_path, teacher_exp, read_targets, hear
):
    teacher = teacher_exp.models["epoch-2"]
    assert invoke(*dump_words("--teacher-weights", "7")).code == 0
    found = Fingerprint.read(tmp_path / "out_kd").teacher
    assert found == hash_state_dict(teacher.state_dict())
    for cut in load_manifest(tmp_path / "out.jsonl.gz"):
        close(
            read_targets(cut), hear(teacher, cut).ctc_logits[0].double().log_softmax(-1)
        )


# Chosen


@pytest.mark.parametrize("of, max_duration", [("cut", 9), ("supervision", 0.01)])
def test_each_cut_is_taught_by_the_teacher_that_its_field_names(
    invoke, dump_words, both, field_cuts, hear, tmp_path, read_targets, of, max_duration
):
    options, models = both
    words = (*options, "--teacher-field", "domain", "--max-duration", max_duration)
    done = invoke(*dump_words(*words, cuts=field_cuts(TEACHER_OF, of)))
    assert done.code == 0
    for cut in load_manifest(tmp_path / "out.jsonl.gz"):
        own, other = TEACHER_OF[cut.id], 1 - TEACHER_OF[cut.id]
        each = [
            hear(model, cut).ctc_logits[0].double().log_softmax(-1) for model in models
        ]
        found = read_targets(cut)
        torch.testing.assert_close(found.double(), each[own], rtol=2**-9, atol=1e-3)
        assert (found - each[other]).abs().max() > 0.1
    hashes = ",".join(hash_state_dict(model.state_dict()) for model in models)
    found = Fingerprint.read(tmp_path / "out_kd").teacher
    assert found == f"{hashes} by domain"


def test_the_cuts_field_comes_before_its_supervisions(
    invoke, dump_words, both, make_cut, hear, tmp_path, read_targets
):
    options, models = both
    cut = make_cut("c1", 47)
    cut.custom, cut.supervisions[0].custom = {"domain": 1}, {"domain": 0}
    CutSet.from_cuts([cut]).to_file(tmp_path / "one.jsonl")
    words = dump_words(
        *options, "--teacher-field", "domain", cuts=tmp_path / "one.jsonl"
    )
    assert invoke(*words).code == 0
    (found,) = load_manifest(tmp_path / "out.jsonl.gz")
    expected = hear(models[1], cut).ctc_logits[0].double().log_softmax(-1)
    close(read_targets(found), expected)


def test_each_cuts_lattice_is_its_own_teachers(
    invoke, dump_words, both, field_cuts, hear, tmp_path, bpe_models
):
    options, models = both
    sp = load_tokenizer(bpe_models.a)
    words = (*options, "--teacher-field", "domain", "--keep", "none")
    words = (*words, "--keep-lattice", "dense", "--bpe-model", bpe_models.a)
    done = invoke(*dump_words(*words, "--s-range", 3, cuts=field_cuts(TEACHER_OF)))
    assert done.code == 0
    codec = Fingerprint.read(tmp_path / "out_kd").kinds["lattice"].codec
    for cut in load_manifest(tmp_path / "out.jsonl.gz"):
        y = sp.encode(cut.supervisions[0].text, out_type=int)
        own = hear(models[TEACHER_OF[cut.id]], cut, y=y, s_range=3)
        found = codec.decode(Pointer.of_cut(cut).read()["lattice"], 25)
        assert torch.equal(found.ranges, own.ranges[0])
        assert (found.occupancy - own.occupancy[0]).abs().max() <= 0.51 / 255
        expected = own.logits[0][found.occupancy > 0].double().log_softmax(-1)
        close(found.nodes, expected)


# Refusals


def vocabulary(another_exp):
    return another_exp(vocab_size=13)[0], "vocab_size 25 and .* has 13"


def feature_size(another_exp):
    return another_exp(feature_dim=30)[0], "feature_dim 20 and .* has 30"


def blank(another_exp):
    return another_exp(blank_id=1)[0], "blank_id 0 and .* has 1"


def no_folder(another_exp):
    return "nowhere", "nowhere/epoch-2.pt does not exist"


def an_empty_name(another_exp):
    return "", "has an empty name between its commas"


@pytest.mark.parametrize(
    "make",
    [vocabulary, feature_size, blank, no_folder, an_empty_name],
    ids=lambda f: f.__name__,
)
def test_teachers_that_do_not_agree_are_refused(
    refused, dump_words, teacher_exp, another_exp, make
):
    folder, words = make(another_exp)
    error = refused(*dump_words("--exp-dir", f"{teacher_exp.folder},{folder}"))
    assert re.search(words, error), error
    assert str(folder) in error


@pytest.mark.parametrize(
    "more, words",
    [
        ((WEIGHTS, "3,x"), "--teacher-weights is '3,x': give a number for each"),
        ((WEIGHTS, "3,"), "--teacher-weights is '3,'"),
        ((WEIGHTS, "3 1"), "--teacher-weights is '3 1'"),
        ((WEIGHTS, "3"), "[3.0] for 2 teachers"),
        ((WEIGHTS, "3,1,1"), "[3.0, 1.0, 1.0] for 2 teachers"),
        ((WEIGHTS, "3,0"), "[3.0, 0.0] for 2 teachers: give a number above 0"),
        ((WEIGHTS, "3,-1"), "[3.0, -1.0] for 2 teachers"),
        ((WEIGHTS, "3,nan"), "[3.0, nan] for 2 teachers"),
        ((WEIGHTS, "inf,1"), "[inf, 1.0] for 2 teachers"),
        ((WEIGHTS, "3,1", "--teacher-field", "domain"), "both given"),
        (("--keep-hidden", "1:half"), "2 teachers, and hidden layers of several"),
    ],
    ids="word empty blank few many zero below nan inf field hidden".split(),
)
def test_options_that_do_not_fit_several_teachers_are_refused(
    refused, dump_words, both, more, words
):
    assert words in refused(*dump_words(*both[0], *more))


def test_weights_of_one_teacher_must_be_one(refused, dump_words):
    assert "[3.0, 1.0] for 1 teachers" in refused(*dump_words(WEIGHTS, "3,1"))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"c1": 0, "c2": 1, "c4": 0}, "the field 'domain' of cut c3 is None"),
        ({**TEACHER_OF, "c3": "1"}, "the field 'domain' of cut c3 is '1'"),
        ({**TEACHER_OF, "c3": 1.0}, "the field 'domain' of cut c3 is 1.0"),
        ({**TEACHER_OF, "c3": 2}, "chosen for cut c3 is 2, and there are 2"),
        ({**TEACHER_OF, "c3": -1}, "chosen for cut c3 is -1, and there are 2"),
    ],
    ids="without text fraction beyond below".split(),
)
def test_a_cut_without_a_number_of_its_teacher_ends_the_dump(
    invoke, dump_words, both, field_cuts, tmp_path, values, words
):
    options = (*both[0], "--teacher-field", "domain")
    done = invoke(*dump_words(*options, cuts=field_cuts(values)))
    assert done.code == 1 and words in done.err[-1]
    assert done.err[-1].startswith("icefall_kd: error: ")
    assert not (tmp_path / "out.jsonl.gz").exists()


def test_a_dump_goes_on_when_the_field_is_mended(
    invoke, dump_words, both, field_cuts, tmp_path, read_targets
):
    options = (*both[0], "--teacher-field", "domain", "--num-workers", 0)
    bad = field_cuts({**TEACHER_OF, "c4": 7})
    assert invoke(*dump_words(*options, cuts=bad)).code == 1
    before = (tmp_path / "out_kd" / "targets.bin").read_bytes()
    assert len(before) > 0
    mended = field_cuts(TEACHER_OF, name="mended.jsonl")
    plain = tmp_path / "plain.jsonl.gz"
    assert invoke(*dump_words(*options, cuts=mended)).code == 0
    assert invoke(*dump_words(*options, cuts=mended, out=plain)).code == 0
    assert (tmp_path / "out_kd" / "targets.bin").read_bytes().startswith(before)
    found = load_manifest(tmp_path / "out.jsonl.gz")
    for a, b in zip(found, load_manifest(plain), strict=True):
        assert a.id == b.id and torch.equal(read_targets(a), read_targets(b))


def test_a_field_that_no_cut_has_is_named(invoke, dump_words, both, tmp_path):
    done = invoke(*dump_words(*both[0], "--teacher-field", "speaker"))
    assert done.code == 1 and "the field 'speaker' of cut c1 is None" in done.err[-1]
    assert not (tmp_path / "out.jsonl.gz").exists()

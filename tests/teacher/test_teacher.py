"""Teachers in the training process: what they say, store, and leave untouched."""

import random

import pytest
import torch
from lhotse import load_manifest
from lhotse.dataset.collation import collate_features

from icefall_kd import ModelTap, TargetWriter
from icefall_kd.errors import KDError
from icefall_kd.targets.reading import collate_targets
from icefall_kd.teacher.cache import CachingTeacher
from icefall_kd.teacher.teacher import Teacher


def test_one_teacher_says_what_its_hook_reads(make_model, features):
    model = make_model(seed=1)
    with ModelTap(model) as hook:
        out = hook.encode(*features)
    targets = Teacher([model]).targets(*features)
    torch.testing.assert_close(targets.parts["ctc"], out.ctc_logits.log_softmax(-1))
    assert targets.lens.tolist() == out.encoder_out_lens.tolist()
    assert targets.whole.all() and not targets.parts["ctc"].requires_grad


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_several_teachers_are_averaged_as_probabilities(make_model, features, weights):
    models = [make_model(seed=1), make_model(seed=2)]
    each = [Teacher([m]).targets(*features).parts["ctc"].exp() for m in models]
    w = torch.tensor(weights or [1.0, 1.0])
    expected = (w[0] * each[0] + w[1] * each[1]) / w.sum()
    found = Teacher(models, weights).targets(*features).parts["ctc"].exp()
    torch.testing.assert_close(found, expected)


def test_a_teacher_is_chosen_for_each_cut(make_model, features, make_cut):
    models = [make_model(seed=1), make_model(seed=2)]
    each = [Teacher([m]).targets(*features).parts["ctc"] for m in models]
    cuts = [make_cut(name, 33) for name in ("a", "b", "c")]
    teacher = Teacher(models, choose=lambda cut: int(cut.id == "b"))
    found = teacher.targets(*features, cuts).parts["ctc"]
    for row, which in enumerate((0, 1, 0)):
        expected = each[which][row]  # normalised once less
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)


def test_random_states_and_the_teachers_parameters_are_left_alone(make_model, features):
    model = make_model().train()
    teacher = Teacher([model])
    random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), torch.rand(2)
    random.seed(3)
    torch.manual_seed(3)
    teacher.targets(*features)
    assert random.random() == expected[0] and torch.equal(torch.rand(2), expected[1])
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "n, options, match",
    [
        (0, {}, "no teacher"),
        (2, {"weights": [1.0]}, "for 2 teachers"),
        (1, {"weights": [0.0]}, "above 0"),
        (1, {"weights": [1.0], "choose": len}, "both given"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(make_model, n, options, match):
    with pytest.raises(KDError, match=match):
        Teacher([make_model() for _ in range(n)], **options)


def test_teachers_of_different_vocabularies_are_refused(make_model, features):
    teacher = Teacher([make_model(), make_model(vocab_size=13)])
    with pytest.raises(KDError, match=r"\[11, 13\] tokens"):
        teacher.targets(*features)


@pytest.mark.parametrize("choose", [lambda cut: 5, lambda cut: -1])
def test_a_choice_of_no_teacher_is_refused(make_model, features, make_cut, choose):
    cuts = [make_cut(name, 33) for name in "abc"]
    with pytest.raises(KDError, match="chosen for cut a is .*give 0 to 0"):
        Teacher([make_model()], choose=choose).targets(*features, cuts)


# Lattices


Y = [[3, 4, 3], [5, 6], [7]]


def lattices_of(model, features, **options):
    with ModelTap(model) as hook:
        return hook.lattice(hook.encode(*features), Y, **options)


def on_nodes(model, features, ranges):
    """A model's logits and occupancy on given nodes, the logits of its full lattice."""
    full = lattices_of(model, features, s_range=99)
    assert full.logits.size(2) == 4  # of three labels, all positions
    index = ranges[..., None].expand(*ranges.shape, full.logits.size(3))
    occupancy = lattices_of(model, features, ranges=ranges).occupancy
    return full.logits.gather(2, index), occupancy


def say_lattice(teacher, features, cuts=None, s_range=2):
    return teacher.lattice(teacher.run(*features), Y, s_range, cuts)


def test_a_lattice_of_one_teacher_is_its_hooks(make_model, features):
    model = make_model(seed=1)
    found = say_lattice(Teacher([model]), features)
    expected = lattices_of(model, features, s_range=2)
    for name in ("ranges", "boundary", "labels", "logits", "occupancy"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_lattices_are_averaged_on_the_first_teachers_nodes(
    make_model, features, weights
):
    """log sum_m w_m softmax(logits_m), w_m of sum 1, at each node."""
    models = [make_model(seed=i) for i in range(1, 1 + len(weights or "ab"))]
    found = say_lattice(Teacher(models, weights), features)
    first = lattices_of(models[0], features, s_range=2)
    assert torch.equal(found.ranges, first.ranges)
    assert not all(
        torch.equal(lattices_of(m, features, s_range=2).ranges, first.ranges)
        for m in models[1:]
    )  # others would look elsewhere
    assert torch.equal(found.boundary, first.boundary)
    assert torch.equal(found.labels, first.labels)
    each = [on_nodes(m, features, first.ranges) for m in models]
    w = torch.tensor(weights or [1.0, 1.0], dtype=torch.float64)
    w /= w.sum()
    p = sum(a * logits.double().softmax(-1) for a, (logits, _) in zip(w, each))
    torch.testing.assert_close(found.logits.double(), p.log(), rtol=1e-5, atol=1e-5)
    occupancy = sum(a * o.double() for a, (_, o) in zip(w, each))
    torch.testing.assert_close(
        found.occupancy.double(), occupancy, rtol=1e-5, atol=1e-5
    )
    passed = torch.tensor([14.0 + 3, 9 + 2, 4 + 1])
    torch.testing.assert_close(
        found.occupancy.sum((1, 2)), passed, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("choice", [(2, 0, 1), (1, 1, 1)])
def test_each_cuts_lattice_is_its_own_teachers(make_model, features, make_cut, choice):
    models = [make_model(seed=i) for i in (1, 2, 3)]
    of = dict(zip("abc", choice))
    teacher = Teacher(models, choose=lambda cut: of[cut.id])
    cuts = [make_cut(name, 33) for name in "abc"]
    found = say_lattice(teacher, features, cuts)
    each = [lattices_of(m, features, s_range=2) for m in models]
    for row, own in enumerate(choice):
        expected = each[own]
        assert torch.equal(found.ranges[row], expected.ranges[row])
        torch.testing.assert_close(
            found.logits[row], expected.logits[row].log_softmax(-1)
        )
        torch.testing.assert_close(found.occupancy[row], expected.occupancy[row])


def test_a_choice_needs_the_cut_of_each_row(make_model, features, make_cut):
    teacher = Teacher([make_model(seed=i) for i in (1, 2)], choose=lambda cut: 0)
    for cuts in (None, [make_cut("a", 33)]):
        with pytest.raises(KDError, match="[01] cuts for 3 rows.*one cut for each"):
            say_lattice(teacher, features, cuts)


def test_lattices_of_different_vocabularies_are_refused(make_model, features):
    models = [make_model(use_ctc=False), make_model(use_ctc=False, vocab_size=13)]
    with pytest.raises(KDError, match=r"\[11, 13\] tokens"):
        say_lattice(Teacher(models, with_ctc=False), features)


def test_hidden_layers_are_those_of_one_teacher(make_model, features):
    model = make_model(seed=1)
    (out,) = Teacher([model], layers=[1, "out"]).run(*features)
    with ModelTap(model, [1]) as hook:
        expected = hook.encode(*features)
    assert set(out.hidden) == {1}
    assert torch.equal(out.hidden[1], expected.hidden[1])
    with pytest.raises(KDError, match="2 teachers, and hidden layers of several"):
        Teacher([make_model(), make_model()], layers=[1])


# Rows that are too short, or have too many labels


def test_a_row_too_short_to_be_heard_has_no_targets(make_model, features):
    x, lens = features
    teacher = Teacher([make_model(seed=1)])
    y = [[3, 4], [5], [6]]
    expected = teacher.targets(x, lens, y=y)
    lens = torch.tensor([61, 5, 23])
    found = teacher.targets(x, lens, y=y, missing="hard")
    assert found.lens.tolist() == [14, 0, 4]
    assert found.mask.sum(1).tolist() == [14, 0, 4]
    assert found.whole.tolist() == [True, False, True]
    assert torch.equal(found.parts["ctc"][0], expected.parts["ctc"][0])
    assert torch.equal(found.parts["ctc"][2, :4], expected.parts["ctc"][2, :4])
    for row in (0, 2):
        a, b = (
            t.parts["nodes"].select(t.parts["nodes"].row == row)
            for t in (found, expected)
        )
        assert len(a) and torch.equal(a.occupancy, b.occupancy)


def test_a_row_too_short_to_be_heard_is_refused_by_its_cut(
    make_model, features, make_cut
):
    x, _ = features
    cuts = [make_cut("a", 61), make_cut("b", 5), make_cut("c", 23)]
    teacher = Teacher([make_model(seed=1)])
    lens = torch.tensor([61, 5, 23])
    with pytest.raises(KDError, match="cut b has 5 feature frames .*kd-missing hard"):
        teacher.targets(x, lens, cuts)
    with pytest.raises(KDError, match="an utterance has 5 feature frames"):
        teacher.targets(x, lens)


@pytest.mark.parametrize("kind", ["on the fly", "mixed"])
def test_a_row_too_short_is_told_by_the_batch_and_not_by_stored_features(
    make_model, features, make_cut, kind
):
    """Features that are made on the fly are stored nowhere; noise makes a MixedCut."""
    short = make_cut("b", 5)
    if kind == "mixed":
        short = short.mix(make_cut("noise", 5), preserve_id="left")
    else:
        short.features = None
    cuts = [make_cut("a", 61), short, make_cut("c", 23)]
    teacher = Teacher([make_model(seed=1)])
    words = "cut b has 6 feature frames and the teacher needs 9: .*--kd-missing hard"
    with pytest.raises(KDError, match=words):
        teacher.targets(features[0], torch.tensor([61, 6, 23]), cuts)


def test_a_batch_of_rows_too_short_has_no_targets(make_model, features):
    teacher = Teacher([make_model(seed=1)])
    lens = torch.tensor([5, 3, 8])
    found = teacher.targets(features[0][:, :8], lens, missing="hard")
    assert found.lens.tolist() == [0, 0, 0] and not found.whole.any()


@pytest.mark.parametrize("path_only", [False, True])
def test_a_row_of_more_labels_than_frames_has_no_nodes(make_model, features, path_only):
    teacher = Teacher([make_model(seed=1)])
    y = [[3, 4], [5], [6, 7, 8, 9, 3]]  # of 14, 9 and 4 frames
    found = teacher.targets(*features, y=y, path_only=path_only)
    fitting = teacher.targets(*features, y=[*y[:2], [6]], path_only=path_only).parts[
        "nodes"
    ]
    fitting = fitting.select(fitting.row < 2)
    assert found.mask.sum(1).tolist() == [14, 9, 4]
    assert torch.equal(found.parts["nodes"].row, fitting.row)
    assert torch.equal(found.parts["nodes"].occupancy, fitting.occupancy)
    assert teacher.targets(*features, y=[[3] * 15] * 3).parts.get("nodes") is None


# With a cache


class Counting(Teacher):
    heard = 0

    def targets(self, x, x_lens, cuts=None):
        self.heard += len(x)
        return super().targets(x, x_lens, cuts)


@pytest.fixture
def cuts(make_cut):
    return [make_cut(f"c{n}", n) for n in (61, 33, 90)]


@pytest.fixture
def opened(tmp_path, make_fingerprint):
    return lambda **job: TargetWriter(
        tmp_path / "kd.jsonl.gz", tmp_path / "kd", make_fingerprint(), **job
    )


CPU = torch.device("cpu")


def test_each_cut_is_asked_once_and_read_from_then_on(make_model, cuts, opened):
    teacher = Counting([make_model()])
    cache = CachingTeacher(teacher, opened())
    first = cache.targets(cuts[:2], CPU)
    assert teacher.heard == 2
    again = cache.targets(cuts, CPU)
    assert teacher.heard == 3
    assert torch.equal(
        again.parts["ctc"][0, : first.lens[0]], first.parts["ctc"][0, : first.lens[0]]
    )
    x, x_lens = collate_features(_cut_set(cuts))
    online = teacher.targets(x, x_lens)
    assert again.lens.tolist() == online.lens.tolist()
    for row, n in enumerate(again.lens.tolist()):
        torch.testing.assert_close(
            again.parts["ctc"][row, :n],
            online.parts["ctc"][row, :n],
            rtol=2e-3,
            atol=2e-3,
        )


def test_a_cache_goes_on_where_an_earlier_training_stopped(make_model, cuts, opened):
    teacher = Counting([make_model()])
    with_cache = CachingTeacher(teacher, opened())
    expected = with_cache.targets(cuts, CPU)
    with_cache.writer.close()
    resumed = CachingTeacher(teacher, opened())
    found = resumed.targets(cuts, CPU)
    assert teacher.heard == 3
    assert torch.equal(found.parts["ctc"], expected.parts["ctc"])


def test_a_finished_cache_is_a_store_like_any_other(make_model, cuts, opened, tmp_path):
    cache = CachingTeacher(Teacher([make_model()]), opened())
    expected = cache.targets(cuts, CPU)
    cache.writer.finish()
    stored = load_manifest(tmp_path / "kd.jsonl.gz")
    found = collate_targets([stored[c.id] for c in cuts])
    assert torch.equal(found.parts["ctc"], expected.parts["ctc"])


def test_a_cache_hears_as_many_frames_as_the_student(make_model, make_cut, opened):
    cut = make_cut("long", 93)
    cut.supervisions[0].duration = 0.61
    teacher = Teacher([make_model()])
    found = CachingTeacher(teacher, opened()).targets([cut, make_cut("b", 100)], CPU)
    assert found.lens.tolist() == [14, 23]
    x = torch.from_numpy(cut.load_features())[None, :61]
    expected = teacher.targets(x, torch.tensor([61])).parts["ctc"][0]
    torch.testing.assert_close(
        found.parts["ctc"][0, :14], expected, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("kind", ["short", "multi"])
def test_a_cache_and_a_cut_that_can_not_be_heard(
    make_model, make_cut, multi_cut, opened, kind
):
    bad = make_cut("bad", 5) if kind == "short" else multi_cut("bad", 61)
    cuts = [make_cut("a", 61), bad]
    teacher = Counting([make_model()])
    with pytest.raises(KDError, match="the cut bad .*--kd-missing hard"):
        CachingTeacher(teacher, opened()).targets(cuts, CPU)
    cache = CachingTeacher(teacher, opened(job=1, num_jobs=2), missing="hard")
    for _ in range(2):
        found = cache.targets(cuts, CPU)
        assert found.mask.any(1).tolist() == [True, False]
    assert teacher.heard == 1


# Of several processes


@pytest.fixture
def two_caches(make_model, opened):
    """A cache for each of two processes, with teachers that count."""

    def make():
        return [
            CachingTeacher(Counting([make_model()]), opened(job=job, num_jobs=2))
            for job in range(2)
        ]

    return make


def heard(caches):
    return [cache.teacher.heard for cache in caches]


def test_what_one_process_stored_the_other_reads(two_caches, cuts):
    a, b = caches = two_caches()
    first = a.targets(cuts[:2], CPU)
    other = b.targets(cuts[2:], CPU)
    assert heard(caches) == [2, 1]
    for cache in caches:
        again = cache.targets(cuts, CPU)
        assert again.lens.tolist() == [14, 7, 21]
        for row, (targets, i) in enumerate([(first, 0), (first, 1), (other, 0)]):
            n = int(again.lens[row])
            assert torch.equal(again.parts["ctc"][row, :n], targets.parts["ctc"][i, :n])
    assert heard(caches) == [2, 1]


def test_one_process_follows_the_other_cut_by_cut(two_caches, cuts):
    a, b = caches = two_caches()
    for cut in cuts:
        expected = a.targets([cut], CPU)
        assert torch.equal(b.targets([cut], CPU).parts["ctc"], expected.parts["ctc"])
    assert heard(caches) == [3, 0]


def test_processes_go_on_with_what_both_had_stored(two_caches, cuts):
    caches = two_caches()
    expected = caches[0].targets(cuts[:2], CPU)
    caches[1].targets(cuts[2:], CPU)
    for cache in caches:
        cache.writer.close()
    caches = two_caches()
    found = [cache.targets(cuts, CPU) for cache in reversed(caches)]
    assert heard(caches) == [0, 0]
    assert torch.equal(found[0].parts["ctc"], found[1].parts["ctc"])
    assert torch.equal(found[0].parts["ctc"][1, :7], expected.parts["ctc"][1, :7])


def test_processes_go_on_with_a_cache_that_was_finished(two_caches, cuts):
    caches = two_caches()
    caches[0].targets(cuts[:2], CPU)
    caches[1].targets(cuts[2:], CPU)
    for cache in caches:
        cache.writer.finish()
    caches = two_caches()
    for cache in caches:
        cache.targets(cuts, CPU)
    assert heard(caches) == [0, 0]


def test_a_process_that_is_done_leaves_the_other_what_it_has_read(two_caches, cuts):
    a, b = caches = two_caches()
    expected = a.targets(cuts[:2], CPU)
    b.targets(cuts[:1], CPU)
    a.writer.finish()
    assert torch.equal(b.targets(cuts[:2], CPU).parts["ctc"], expected.parts["ctc"])
    assert heard(caches) == [2, 0]
    b.targets(cuts, CPU)
    assert heard(caches) == [2, 1]


def test_a_line_that_is_half_written_is_not_read(two_caches, cuts):
    """At whichever byte; nor is what stands before it read twice."""
    a, b = caches = two_caches()
    a.targets(cuts[:2], CPU)
    partial = a.writer.partial
    whole = partial.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for n in (0, 1, len(second) // 2, len(second) - 1):
        partial.write_bytes(first + second[:n])
        b._read_new_pointers()
        assert list(b.pointers) == ["c61"]
    b.targets(cuts[:1], CPU)
    assert heard(caches) == [2, 0]
    partial.write_bytes(whole)
    expected = a.targets(cuts[:2], CPU)
    assert torch.equal(b.targets(cuts[:2], CPU).parts["ctc"], expected.parts["ctc"])
    assert heard(caches) == [2, 0]


def test_a_cut_on_a_half_written_line_is_asked_anew(two_caches, cuts):
    a, b = caches = two_caches()
    expected = a.targets(cuts[:1], CPU)
    partial = a.writer.partial
    partial.write_bytes(partial.read_bytes()[:-1])
    assert torch.equal(b.targets(cuts[:1], CPU).parts["ctc"], expected.parts["ctc"])
    assert heard(caches) == [1, 1]


def test_manifests_of_several_processes_hold_each_cut_once(
    two_caches, cuts, make_model
):
    caches = two_caches()
    caches[0].targets(cuts[:1], CPU)
    caches[1].targets(cuts[1:], CPU)
    for cache in caches:
        expected = cache.targets(cuts, CPU)
    for cache in caches:
        cache.writer.finish()
    stored = [load_manifest(cache.writer.manifest) for cache in caches]
    assert [[c.id for c in s] for s in stored] == [["c61"], ["c33", "c90"]]
    found = collate_targets([c for s in stored for c in s])
    assert torch.equal(found.parts["ctc"], expected.parts["ctc"])


def test_noise_is_not_heard(make_model, cuts, opened, make_cut):
    noise = make_cut("noise", 150)
    noise.supervisions = []
    mixed = [c.mix(noise, snr=10, preserve_id="left") for c in cuts]
    plain = CachingTeacher(Teacher([make_model()]), opened())
    expected = plain.targets(cuts, CPU)
    found = plain.targets(mixed, CPU)
    assert torch.equal(found.parts["ctc"], expected.parts["ctc"])


def test_a_cut_of_two_speakers_is_refused(make_model, cuts, opened):
    cache = CachingTeacher(Teacher([make_model()]), opened())
    with pytest.raises(KDError, match="made of 2 cuts with speech"):
        cache.targets([cuts[0].append(cuts[1])], CPU)


def test_a_cut_without_features_is_refused(make_model, cuts, opened):
    cache = CachingTeacher(Teacher([make_model()]), opened())
    with pytest.raises(KDError, match="c61 has no stored features"):
        cache.targets([cuts[0].drop_features()], CPU)


def _cut_set(cuts):
    from lhotse import CutSet

    return CutSet.from_cuts(cuts)

"""LogitWriter: what is stored, and what a run that was cut short leaves."""

import json
import os
import resource
import signal

import numpy as np
import pytest
import torch
from lhotse import load_manifest
from lhotse.array import TemporalArray

from icefall_kd.errors import KDError
from icefall_kd.targets import LogitWriter
from icefall_kd.targets.writer import FIELD

LENGTHS = {"c1": 61, "c2": 33, "ç3": 90, "c4": 47, "c5": 12}


@pytest.fixture
def cuts(make_cut):
    return [make_cut(name, n) for name, n in LENGTHS.items()]


@pytest.fixture
def opened(tmp_path, make_fingerprint):
    """Open a writer on the one store of a test."""

    def open_writer(suffix=".jsonl.gz", overwrite=False, storage="kd", **changes):
        return LogitWriter(
            tmp_path / f"kd{suffix}",
            tmp_path / storage,
            make_fingerprint(**changes),
            overwrite,
        )

    return open_writer


@pytest.fixture
def check(tmp_path, make_logits):
    """The manifest holds just these cuts, in this order, each with its targets."""

    def check_manifest(expected, suffix=".jsonl.gz", seeds=None):
        found = list(load_manifest(tmp_path / f"kd{suffix}"))
        assert [c.id for c in found] == [c.id for c in expected]
        for cut in found:
            seed = (seeds or {}).get(cut.id, 0)
            expected = make_logits(cut, seed).log_softmax(-1).half().numpy()
            assert np.array_equal(cut.load_custom(FIELD), expected)

    return check_manifest


def write_all(writer, cuts, make_logits, seed=0):
    for cut in cuts:
        writer.write(cut, make_logits(cut, seed))


class Stop(Exception):
    """What cuts a run short."""


def cut_short(writer, cuts, make_logits, seed=0):
    with pytest.raises(Stop), writer:
        write_all(writer, cuts, make_logits, seed)
        raise Stop


# What is stored


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl"])
def test_round_trip(cuts, opened, check, make_logits, suffix):
    with opened(suffix) as writer:
        write_all(writer, cuts, make_logits)
    check(cuts, suffix)


@pytest.mark.parametrize("scale", [0.1, 4.0, 60.0])
def test_stored_log_probabilities_are_those_given_within_float16(
    cuts, opened, make_logits, scale, tmp_path
):
    """|stored - log p| <= 2^-11 |log p|, and normalising adds at most its mean."""
    with opened() as writer:
        for cut in cuts:
            writer.write(cut, make_logits(cut, scale=scale) + 3.0)
    for cut in load_manifest(tmp_path / "kd.jsonl.gz"):
        stored = torch.from_numpy(cut.load_custom(FIELD)).double()
        given = make_logits(cut, scale=scale).double().log_softmax(-1)
        bound = 2**-11 * given.abs() + 2**-25 + 1e-5 * scale
        assert ((stored - given).abs() <= bound).all()
        normalised = stored.log_softmax(-1)
        slack = bound + (given.exp() * bound).sum(-1, keepdim=True)
        assert ((normalised - given).abs() <= 1.01 * slack).all()
        assert stored.dtype == torch.float64 and cut.load_custom(FIELD).dtype == "f2"


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: x.double(),
        lambda x: x.clone().requires_grad_(),
        lambda x: x + torch.arange(len(x)).unsqueeze(1),  # a constant per frame
    ],
    ids="tensor numpy double grad constant".split(),
)
def test_logits_of_any_kind_are_stored_alike(cuts, opened, make_logits, kind, tmp_path):
    with opened() as writer:
        for cut in cuts:
            writer.write(cut, kind(make_logits(cut)))
    for cut in load_manifest(tmp_path / "kd.jsonl.gz"):
        expected = make_logits(cut).log_softmax(-1).numpy()
        # Rounded twice: 2^-10 of at most 32.
        np.testing.assert_allclose(cut.load_custom(FIELD), expected, atol=2**-5)


def test_the_array_belongs_to_the_cut(make_cut, opened, make_logits, tmp_path):
    cut = make_cut("late", 61, start=7.25)
    with opened() as writer:
        writer.write(cut, make_logits(cut))
    (found,) = load_manifest(tmp_path / "kd.jsonl.gz")
    stored = found.custom[FIELD]
    assert isinstance(stored, TemporalArray)
    assert (stored.start, stored.frame_shift, stored.temporal_dim) == (7.25, 0.04, 0)
    assert found.load_custom(FIELD).shape == (14, 11)


def test_the_rest_of_the_cut_stays(make_cut, opened, make_logits, tmp_path):
    cut = make_cut("c1", 61, text="größe")
    cut.custom = {"speaker_age": 42}
    before = cut.to_dict()
    with opened() as writer:
        writer.write(cut, make_logits(cut))
    assert cut.to_dict() == before  # the caller's cut
    (found,) = load_manifest(tmp_path / "kd.jsonl.gz")
    after = found.to_dict()
    assert after["custom"].pop(FIELD)["frame_shift"] == 0.04
    assert after == before
    np.testing.assert_array_equal(found.load_features(), cut.load_features())


def test_plain_lhotse_loads_the_manifest(
    cuts, opened, make_logits, run_python, tmp_path
):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    code = (
        "import sys, lhotse, numpy as np\n"
        "cuts = list(lhotse.load_manifest(sys.argv[1]))\n"
        "np.savez(sys.argv[2], **{c.id: c.load_kd_ctc_logits() for c in cuts})\n"
        "assert 'torch' in sys.modules and 'icefall_kd' not in sys.modules\n"
        "try:\n    import icefall_kd\n"
        "except ImportError:\n    print('alone', len(cuts))\n"
    )
    done = run_python(
        code, tmp_path / "kd.jsonl.gz", tmp_path / "out.npz", block=["icefall_kd"]
    )
    assert done.stdout == "alone 5\n", done.stderr
    loaded = np.load(tmp_path / "out.npz")
    for cut in cuts:
        expected = make_logits(cut).log_softmax(-1).half().numpy()
        assert np.array_equal(loaded[cut.id], expected)


def test_written_bytes_are_counted(cuts, opened, make_logits, encoder_frames):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    assert writer.bytes_written == sum(
        2 * 11 * encoder_frames(n) for n in LENGTHS.values()
    )


# A run that was cut short


def test_the_manifest_appears_at_the_finish_only(cuts, opened, make_logits, tmp_path):
    manifest = tmp_path / "kd.jsonl.gz"
    with opened() as writer:
        write_all(writer, cuts, make_logits)
        assert not manifest.exists() and writer.partial.exists()
    assert manifest.exists() and not writer.partial.exists()
    assert [p.name for p in tmp_path.glob(".*")] == []  # nothing temporary


def test_a_run_cut_short_goes_on(cuts, opened, check, make_logits, tmp_path):
    cut_short(opened(), cuts[:3], make_logits)
    assert not (tmp_path / "kd.jsonl.gz").exists()
    with opened() as writer:
        assert len(writer) == 3
        assert [c.id in writer for c in cuts] == [True] * 3 + [False] * 2
        write_all(writer, cuts[3:], make_logits)
    check(cuts)


def test_a_killed_process_loses_nothing_it_wrote(
    cuts, opened, check, make_logits, in_child
):
    def run():
        writer = opened()
        write_all(writer, cuts[:3], make_logits)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(run) == -signal.SIGKILL
    with opened() as writer:
        assert len(writer) == 3
        write_all(writer, cuts[3:], make_logits)
    check(cuts)


@pytest.mark.parametrize("keep", [1, 0.2, 0.5, 0.9, -2])
def test_a_torn_last_line_is_written_again(cuts, opened, check, make_logits, keep):
    writer = opened()
    cut_short(writer, cuts[:3], make_logits)
    data = writer.partial.read_bytes()
    start = data.rstrip(b"\n").rindex(b"\n") + 1
    line = data[start:]
    end = int(keep * len(line)) if isinstance(keep, float) else keep
    writer.partial.write_bytes(data[:start] + line[:end])
    with opened() as writer:
        assert len(writer) == 2
        write_all(writer, cuts[2:], make_logits)
    check(cuts)


def test_a_last_line_without_its_end_is_kept(cuts, opened, check, make_logits):
    writer = opened()
    cut_short(writer, cuts[:3], make_logits)
    writer.partial.write_bytes(writer.partial.read_bytes()[:-1])
    with opened() as writer:
        assert len(writer) == 3
        write_all(writer, cuts[3:], make_logits)
    check(cuts)


def test_a_line_torn_within_a_character_is_written_again(
    cuts, opened, check, make_logits
):
    writer = opened()
    cut_short(writer, cuts[:3], make_logits)
    data = writer.partial.read_bytes()
    within = data.rindex("ç".encode()) + 1
    writer.partial.write_bytes(data[:within])
    with opened() as writer:
        write_all(writer, cuts[2:], make_logits)
    check(cuts)


def test_a_run_can_be_cut_short_twice(cuts, opened, check, make_logits):
    cut_short(opened(), cuts[:2], make_logits)
    cut_short(opened(), cuts[2:3], make_logits)
    with opened() as writer:
        assert len(writer) == 3
        write_all(writer, cuts[3:], make_logits)
    check(cuts)


def test_an_array_without_its_line_is_written_again(
    cuts, opened, check, make_logits, tmp_path
):
    writer = opened()
    cut_short(writer, cuts[:3], make_logits)
    lines = writer.partial.read_text("utf8").splitlines(keepends=True)
    writer.partial.write_text("".join(lines[:2]), "utf8")
    (array,) = tmp_path.glob("kd/**/ç3*.npy")
    array.write_bytes(array.read_bytes()[:40])
    with opened() as writer:
        write_all(writer, cuts[2:], make_logits)
    check(cuts)


def test_a_full_disk_loses_nothing(cuts, opened, check, make_logits, in_child):
    """A limit on the size of files stands for the disk: lines fit, one array not."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OSError), opened(vocab_size=999) as writer:
            for cut in cuts:  # arrays of 28, 14 and 42 kB
                writer.write(cut, make_logits(cut, vocab_size=999))

    assert in_child(run) == 0
    with opened(vocab_size=999) as writer:
        assert len(writer) == 2 and "ç3" not in writer
        for cut in cuts[2:]:
            writer.write(cut, make_logits(cut, vocab_size=999))
    found = list(load_manifest(writer.manifest))
    assert [c.id for c in found] == list(LENGTHS)
    for cut in found:
        expected = make_logits(cut, vocab_size=999).log_softmax(-1).half().numpy()
        assert np.array_equal(cut.load_custom(FIELD), expected)


# A store that is there already


def test_more_cuts_are_added_to_a_finished_store(cuts, opened, check, make_logits):
    with opened() as writer:
        write_all(writer, cuts[:2], make_logits)
    with opened() as writer:
        assert len(writer) == 2 and "c1" in writer
        write_all(writer, cuts[2:], make_logits)
    check(cuts)


def test_the_old_manifest_stands_until_the_new_one_is_whole(
    cuts, opened, check, make_logits
):
    with opened() as writer:
        write_all(writer, cuts[:2], make_logits)
    cut_short(opened(), cuts[2:4], make_logits)
    check(cuts[:2])


def test_a_run_killed_between_manifest_and_partial_goes_on(
    cuts, opened, check, make_logits
):
    """At the finish both are there for a moment, with the same lines."""
    writer = opened()
    cut_short(writer, cuts[:3], make_logits)
    lines = writer.partial.read_bytes()
    with opened():
        pass
    writer.partial.write_bytes(lines)
    with opened() as writer:
        assert len(writer) == 3
        write_all(writer, cuts[3:], make_logits)
    check(cuts)


def test_nothing_to_add_leaves_the_same_manifest(cuts, opened, check, make_logits):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    with opened():
        pass
    check(cuts)


def test_another_teacher_is_refused_and_the_store_untouched(
    cuts, opened, make_logits, tmp_path, tree_of
):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    before = tree_of(tmp_path)
    with pytest.raises(KDError, match="was made with teacher") as e:
        opened(teacher="b" * 64)
    assert "a" * 64 in str(e.value) and "b" * 64 in str(e.value)
    assert "--overwrite" in str(e.value)
    assert tree_of(tmp_path) == before


def test_another_teacher_is_refused_where_a_run_was_cut_short(
    cuts, opened, make_logits, tmp_path, tree_of
):
    cut_short(opened(), cuts[:2], make_logits)
    before = tree_of(tmp_path)
    with pytest.raises(KDError, match="was made with frame_shift 0.04"):
        opened(frame_shift=0.02)
    assert tree_of(tmp_path) == before


def test_overwrite_forgets_the_store(cuts, opened, check, make_logits):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    with opened(overwrite=True, teacher="b" * 64) as writer:
        assert len(writer) == 0 and "c1" not in writer
        write_all(writer, cuts[:3], make_logits, seed=1)
    check(cuts[:3], seeds={c.id: 1 for c in cuts})


def test_an_overwriting_run_that_was_cut_short_goes_on(
    cuts, opened, check, make_logits
):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    new = {"teacher": "b" * 64}
    cut_short(opened(overwrite=True, **new), cuts[:2], make_logits, seed=1)
    with opened(**new) as writer:
        write_all(writer, [c for c in cuts if c.id not in writer], make_logits, seed=1)
    check(cuts, seeds={c.id: 1 for c in cuts})


def test_targets_of_another_store_are_not_taken_for_this_teachers(
    cuts, opened, check, make_logits
):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    try:
        with opened(storage="other", teacher="b" * 64) as writer:
            todo = [c for c in cuts if c.id not in writer]
            write_all(writer, todo, make_logits, seed=1)
    except KDError:
        return
    check(cuts, seeds={c.id: 1 for c in cuts})


def test_a_manifest_without_targets_is_not_taken_for_finished(
    cuts, opened, check, make_logits, tmp_path
):
    from lhotse import CutSet

    CutSet.from_cuts(cuts).to_file(tmp_path / "kd.jsonl.gz")
    try:
        with opened() as writer:
            todo = [c for c in cuts if c.id not in writer]
            write_all(writer, todo, make_logits)
    except KDError:
        return
    check(cuts)


# Refusals


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x[:, :10], r"shape \(14, 10\) and must be \(frames, 11\)"),
        (lambda x: x[0], r"shape \(11,\) and must be \(frames, 11\)"),
        (lambda x: x[None], r"shape \(1, 14, 11\)"),
        (lambda x: x.index_fill(1, torch.tensor([3]), float("nan")), "not finite"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("inf")), "not finite"),
        (lambda x: x.index_fill(1, torch.tensor([3]), -float("inf")), "not finite"),
    ],
    ids="vocabulary one-frame batch nan inf -inf".split(),
)
def test_logits_that_do_not_fit_are_refused(
    cuts, opened, check, make_logits, tmp_path, change, words
):
    with opened() as writer:
        with pytest.raises(KDError, match=words) as e:
            writer.write(cuts[0], change(make_logits(cuts[0])))
        assert "c1" in str(e.value) and "c1" not in writer
        assert list(tmp_path.glob("kd/**/*.npy")) == []
        writer.write(cuts[0], make_logits(cuts[0]))  # the writer goes on
    check(cuts[:1])


def test_a_duplicate_is_refused(cuts, opened, check, make_logits):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
        with pytest.raises(KDError, match="cut id c2 occurs twice"):
            writer.write(cuts[1], make_logits(cuts[1], seed=1))
    check(cuts)


def test_a_cut_of_an_earlier_run_is_a_duplicate(cuts, opened, check, make_logits):
    cut_short(opened(), cuts[:2], make_logits)
    with opened() as writer:
        with pytest.raises(KDError, match="cut id c2 occurs twice"):
            writer.write(cuts[1], make_logits(cuts[1], seed=1))
    check(cuts[:2])


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: a.pad(duration=2.0, preserve_id=True),
        lambda a, b: a.mix(b, snr=10, preserve_id="left"),
        lambda a, b: a.append(b, preserve_id="left"),
    ],
    ids="padded mixed appended".split(),
)
def test_a_mixed_cut_is_refused(cuts, opened, make_logits, change):
    with opened() as writer:
        with pytest.raises(KDError, match="c1 is a MixedCut.*before mixing"):
            writer.write(change(cuts[0], cuts[1]), make_logits(cuts[0]))
        assert len(writer) == 0


def test_the_manifest_is_json_lines(cuts, opened, make_logits, tmp_path):
    with opened(".jsonl") as writer:
        write_all(writer, cuts, make_logits)
    lines = (tmp_path / "kd.jsonl").read_text("utf8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(LENGTHS)

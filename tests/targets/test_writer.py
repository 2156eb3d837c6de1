"""TargetWriter: what is stored, and what a run that was cut short leaves."""

import errno
import json
import os
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, load_manifest

from icefall_kd.errors import KDError
from icefall_kd.targets import TargetWriter
from icefall_kd.targets import writer as writer_module
from icefall_kd.targets.manifest import combine, job_manifest
from icefall_kd.targets.store import FIELD, Pointer
from icefall_kd.types import PrunedLattice

LENGTHS = {"c1": 61, "c2": 33, "ç3": 90, "c4": 47, "c5": 12}


@pytest.fixture
def cuts(make_cut):
    return [make_cut(name, n) for name, n in LENGTHS.items()]


@pytest.fixture
def opened(tmp_path, make_fingerprint):
    """Open a writer on the one store of a test."""

    def open_writer(
        suffix=".jsonl.gz",
        overwrite=False,
        storage="kd",
        job=0,
        num_jobs=1,
        folder=tmp_path,
        **changes,
    ):
        return TargetWriter(
            folder / f"kd{suffix}",
            folder / storage,
            make_fingerprint(**changes),
            overwrite,
            job,
            num_jobs,
        )

    return open_writer


@pytest.fixture
def check(tmp_path, stored_form, read_targets):
    """The manifest holds just these cuts, in this order, each with its targets."""

    def check_manifest(expected, suffix=".jsonl.gz", seeds=None):
        found = list(load_manifest(tmp_path / f"kd{suffix}"))
        assert [c.id for c in found] == [c.id for c in expected]
        for cut in found:
            seed = (seeds or {}).get(cut.id, 0)
            assert torch.equal(read_targets(cut), stored_form(cut, seed))

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
    cuts, opened, make_logits, scale, tmp_path, read_targets
):
    """|half - log p| <= 2^-11 |log p|, and normalising adds at most its mean."""
    with opened() as writer:
        for cut in cuts:
            writer.write(cut, make_logits(cut, scale=scale) + 3.0)
    for cut in load_manifest(tmp_path / "kd.jsonl.gz"):
        stored = read_targets(cut).double()
        given = make_logits(cut, scale=scale).double().log_softmax(-1)
        bound = 2**-11 * given.abs() + 2**-25 + 1e-5 * scale
        slack = bound + (given.exp() * bound).sum(-1, keepdim=True)
        assert ((stored - given).abs() <= 1.01 * slack).all()


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
def test_logits_of_any_kind_are_stored_alike(
    cuts, opened, make_logits, kind, tmp_path, read_targets
):
    with opened() as writer:
        for cut in cuts:
            writer.write(cut, kind(make_logits(cut)))
    for cut in load_manifest(tmp_path / "kd.jsonl.gz"):
        expected = make_logits(cut).log_softmax(-1)
        # Rounded twice: 2^-10 of at most 32.
        torch.testing.assert_close(read_targets(cut), expected, rtol=0, atol=2**-5)


def test_the_record_belongs_to_the_cut(make_cut, opened, make_logits, tmp_path):
    cuts = [make_cut("c1", 61), make_cut("late", 33, start=7.25)]
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    *_, found = load_manifest(tmp_path / "kd.jsonl.gz")
    pointer = Pointer.of_cut(found)
    assert (pointer.cut, pointer.start, pointer.duration) == ("late", 7.25, 0.33)
    assert (pointer.source, pointer.frames) == (7.58, 7)
    assert (pointer.offset, pointer.sizes) == (14 * 11 * 2, {"ctc": 7 * 11 * 2})
    assert (pointer.store, pointer.file) == (str(tmp_path / "kd"), "targets.bin")


def test_the_rest_of_the_cut_stays(make_cut, opened, make_logits, tmp_path):
    cut = make_cut("c1", 61, text="größe")
    cut.custom = {"speaker_age": 42}
    before = cut.to_dict()
    with opened() as writer:
        writer.write(cut, make_logits(cut))
    assert cut.to_dict() == before  # the caller's cut
    (found,) = load_manifest(tmp_path / "kd.jsonl.gz")
    after = found.to_dict()
    assert after["custom"].pop(FIELD)["cut"] == "c1"
    assert after == before
    np.testing.assert_array_equal(found.load_features(), cut.load_features())


def test_plain_lhotse_loads_the_manifest(
    cuts, opened, make_logits, run_python, tmp_path
):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    code = (
        "import sys, lhotse, numpy as np\n"
        "cuts = lhotse.load_manifest(sys.argv[1]).to_eager()\n"
        "found = {}\n"
        "for c in cuts:\n"
        "    p = c.custom['kd_targets']\n"
        "    path = p['store'] + '/' + p['file']\n"
        "    n = p['sizes']['ctc']\n"
        "    data = np.fromfile(path, np.uint8, n, offset=p['offset'])\n"
        "    found[c.id] = data.view(np.float16).reshape(p['frames'], -1)\n"
        "np.savez(sys.argv[2], **found)\n"
        "changed = [c.truncate(duration=0.1).pad(duration=2.0) for c in cuts]\n"
        "changed.append(cuts['c1'].perturb_speed(0.9).append(cuts['c2']))\n"
        "lhotse.CutSet.from_cuts(changed).to_file(sys.argv[3])\n"
        "again = list(lhotse.load_manifest(sys.argv[3]))\n"
        "assert again[0].tracks[0].cut.custom['kd_targets']['cut'] == 'c1'\n"
        "assert 'icefall_kd' not in sys.modules\n"
        "try:\n    import icefall_kd\n"
        "except ImportError:\n    print('alone', len(cuts))\n"
    )
    done = run_python(
        code,
        tmp_path / "kd.jsonl.gz",
        tmp_path / "out.npz",
        tmp_path / "changed.jsonl.gz",
        block=["icefall_kd"],
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


def test_a_record_without_its_line_is_written_again(
    cuts, opened, check, make_logits, tmp_path
):
    writer = opened()
    cut_short(writer, cuts[:3], make_logits)
    lines = writer.partial.read_text("utf8").splitlines(keepends=True)
    writer.partial.write_text("".join(lines[:2]), "utf8")
    records = tmp_path / "kd" / "targets.bin"
    records.write_bytes(records.read_bytes()[:-40])
    with opened() as writer:
        assert len(writer) == 2
        write_all(writer, cuts[2:], make_logits)
    check(cuts)
    assert records.stat().st_size == writer_size(cuts)


def test_a_line_whose_record_is_lost_is_written_again(
    cuts, opened, check, make_logits, tmp_path
):
    """A crash of the machine may keep the manifest and lose the end of the records."""
    cut_short(opened(), cuts[:3], make_logits)
    records = tmp_path / "kd" / "targets.bin"
    records.write_bytes(records.read_bytes()[:-1])
    with opened() as writer:
        assert len(writer) == 2 and "ç3" not in writer
        write_all(writer, cuts[2:], make_logits)
    check(cuts)


def writer_size(cuts, vocab_size=11):
    return sum(2 * vocab_size * (((c.num_frames - 7) // 2 + 1) // 2) for c in cuts)


def test_a_full_disk_loses_nothing(
    cuts, opened, stored_form, make_logits, in_child, read_targets
):
    """A limit on the size of files stands for the disk: two records fit."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(KDError) as e, opened(vocab_size=999) as writer:
            for cut in cuts:  # records of 28, 14 and 42 kB
                writer.write(cut, make_logits(cut, vocab_size=999))
        sentence = str(e.value)
        assert sentence.startswith("File too large (")
        assert sentence.endswith(
            " after 2 cuts, which are kept: free space, then retry"
        )

    assert in_child(run) == 0
    with opened(vocab_size=999) as writer:
        assert len(writer) == 2 and "ç3" not in writer
        for cut in cuts[2:]:
            writer.write(cut, make_logits(cut, vocab_size=999))
    found = list(load_manifest(writer.manifest))
    assert [c.id for c in found] == list(LENGTHS)
    for cut in found:
        assert torch.equal(read_targets(cut), stored_form(cut, vocab_size=999))


# A run that ends at any point


class Faults:
    """Counts what a writer asks of its files, and acts at the ``at``-th time."""

    def __init__(self, monkeypatch, action, at):
        self.action, self.at, self.count = action, at, 0
        faults = self

        def step(half=lambda: None):
            faults.count += 1
            if faults.count == faults.at:
                half()
                faults.action()

        def faulty_open(path, mode):
            step()
            return Faulty(open(path, mode), step)

        def before(name):
            original = getattr(Path, name)

            def method(path, *args, **options):
                if not str(path).endswith(".json"):  # the fingerprint is another's
                    step()
                return original(path, *args, **options)

            monkeypatch.setattr(writer_module.Path, name, method)

        monkeypatch.setattr(writer_module, "open", faulty_open, raising=False)
        before("replace")
        before("unlink")


class Faulty:
    def __init__(self, file, step):
        self.file, self.step = file, step

    def write(self, data):
        def half():
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.step(half)
        return self.file.write(data)

    def flush(self):
        self.step()
        self.file.flush()

    def close(self):
        if not self.file.closed:
            self.step()
            self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __iter__(self):
        return iter(self.file)

    def __getattr__(self, name):
        return getattr(self.file, name)


def run_all(opened, cuts, make_logits, folder):
    with opened(".jsonl", folder=folder) as writer:
        write_all(writer, [c for c in cuts if c.id not in writer], make_logits)


@pytest.fixture
def one_run(opened, cuts, make_logits, tmp_path, tree_of):
    """Any point of a run, and what an undisturbed run leaves."""
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, None, -1)
        run_all(opened, cuts, make_logits, folder)
    expected = tree_of(folder)
    assert set(expected) == {"kd.jsonl", "kd/targets.bin", "kd/fingerprint.json"}
    assert faults.count > 20

    def clear():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    clear()
    return folder, faults.count, expected, clear


def stop():
    raise Stop


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("action, kind", [(stop, Stop), (full, KDError)])
def test_a_run_that_failed_at_any_point_goes_on_to_the_same_bytes(
    one_run, opened, cuts, make_logits, tree_of, action, kind
):
    folder, points, expected, clear = one_run
    for at in range(1, points + 1):
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, action, at)
            with pytest.raises(kind) as e:
                run_all(opened, cuts, make_logits, folder)
        if kind is KDError:
            message = str(e.value)
            assert message.startswith("No space left on device (")
            assert message.endswith(": free space, then retry")
            assert str(folder) in message and "\n" not in message, at
        run_all(opened, cuts, make_logits, folder)
        assert tree_of(folder) == expected, at
        clear()


def test_a_run_that_was_killed_at_any_point_goes_on_to_the_same_bytes(
    one_run, opened, cuts, make_logits, tree_of, in_child
):
    folder, points, expected, clear = one_run

    def run(at):
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, lambda: os.kill(os.getpid(), signal.SIGKILL), at)
            run_all(opened, cuts, make_logits, folder)

    for at in range(1, points + 1):
        assert in_child(lambda at=at: run(at)) == -signal.SIGKILL
        run_all(opened, cuts, make_logits, folder)
        found = tree_of(folder)
        assert {name: found[name] for name in expected} == expected, at
        clear()


def test_a_run_that_failed_twice_goes_on_to_the_same_bytes(
    one_run, opened, cuts, make_logits, tree_of
):
    folder, points, expected, clear = one_run
    for first, second in [(9, 4), (14, 6), (20, 12), (points, 3), (points - 1, 7)]:
        for at in (first, second):
            with pytest.MonkeyPatch.context() as patch:
                Faults(patch, stop, at)
                with pytest.raises(Stop):
                    run_all(opened, cuts, make_logits, folder)
        run_all(opened, cuts, make_logits, folder)
        assert tree_of(folder) == expected, (first, second)
        clear()


# Several jobs


def run_jobs(opened, cuts, make_logits, num_jobs):
    for job in reversed(range(num_jobs)):
        with opened(".jsonl", job=job, num_jobs=num_jobs) as writer:
            write_all(writer, cuts[job::num_jobs], make_logits)


@pytest.mark.parametrize("num_jobs", [2, 3, 7])
def test_several_jobs_combined_give_the_targets_of_one(
    cuts, opened, check, make_logits, tmp_path, num_jobs
):
    run_jobs(opened, cuts, make_logits, num_jobs)
    assert not (tmp_path / "kd.jsonl").exists()
    counts = combine(tmp_path / "kd.jsonl", num_jobs, LENGTHS)
    check(cuts, ".jsonl")
    assert list(counts.values()) == [len(cuts[j::num_jobs]) for j in range(num_jobs)]
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_jobs_at_work_at_once_do_not_meet(cuts, opened, check, make_logits, tmp_path):
    errors = []

    def run(job):
        try:
            with opened(".jsonl", job=job, num_jobs=4) as writer:
                write_all(writer, cuts[job::4], make_logits)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(j,)) for j in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    combine(tmp_path / "kd.jsonl", 4, LENGTHS)
    check(cuts, ".jsonl")


def test_one_of_several_jobs_cut_short_goes_on(
    cuts, opened, check, make_logits, tmp_path
):
    cut_short(opened(".jsonl", job=1, num_jobs=2), cuts[1:2], make_logits)
    with opened(".jsonl", job=0, num_jobs=2) as writer:
        write_all(writer, cuts[::2], make_logits)
    with pytest.raises(KDError, match="of job 1 does not exist"):
        combine(tmp_path / "kd.jsonl", 2, LENGTHS)
    with opened(".jsonl", job=1, num_jobs=2) as writer:
        assert "c2" in writer
        write_all(writer, cuts[3::2], make_logits)
    combine(tmp_path / "kd.jsonl", 2, LENGTHS)
    check(cuts, ".jsonl")


def test_an_overwriting_job_leaves_the_others_records(
    cuts, opened, check, make_logits, tmp_path
):
    run_jobs(opened, cuts, make_logits, 2)
    with opened(".jsonl", job=1, num_jobs=2, overwrite=True) as writer:
        write_all(writer, cuts[1::2], make_logits, seed=1)
    combine(tmp_path / "kd.jsonl", 2, LENGTHS)
    check(cuts, ".jsonl", seeds={"c2": 1, "c4": 1})


@pytest.mark.parametrize(
    "order, words",
    [
        (["c1", "c2", "ç3", "c4", "c5", "c6"], "cut c6 has targets of none of the 2"),
        (["c1", "c2", "ç3", "c4"], "cut c5 has targets and is not in the manifest"),
        ([], "and is not in the manifest"),
    ],
    ids="more fewer none".split(),
)
def test_a_manifest_that_the_jobs_did_not_run_on_is_refused(
    cuts, opened, make_logits, tmp_path, tree_of, order, words
):
    run_jobs(opened, cuts, make_logits, 2)
    before = tree_of(tmp_path)
    with pytest.raises(KDError, match=words) as e:
        combine(tmp_path / "kd.jsonl", 2, order)
    assert "\n" not in str(e.value) and tree_of(tmp_path) == before


@pytest.mark.parametrize("name", ["kd.jsonl.gz", "kd.jsonl", "a.jsonl.b.jsonl"])
def test_each_job_has_a_manifest_of_its_own(tmp_path, name):
    names = {job_manifest(tmp_path / name, j, n).name for n in (2, 3) for j in range(n)}
    assert len(names) == 5 and name not in names
    assert all(n.endswith((".jsonl", ".jsonl.gz")) for n in names)
    assert job_manifest(tmp_path / name, 0, 1) == tmp_path / name


@pytest.mark.parametrize("job, num_jobs", [(2, 2), (-1, 2), (1, 1), (0, 0)])
def test_a_job_that_is_none_is_refused(opened, job, num_jobs):
    with pytest.raises(KDError, match=f"job is {job} of {num_jobs}"):
        opened(job=job, num_jobs=num_jobs)


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
        (lambda x: x[:0], r"shape \(0, 11\) and .* at least one frame"),
        (lambda x: x.index_fill(1, torch.tensor([3]), float("nan")), "not finite"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("inf")), "not finite"),
        (lambda x: x.index_fill(1, torch.tensor([3]), -float("inf")), "not finite"),
        (lambda x: x.index_fill(1, torch.tensor([3]), -7e4), "span 7e.04 in a frame"),
        (lambda x: 1e6 * x, "float16 holds 60000"),
    ],
    ids="vocabulary one-frame batch empty nan inf -inf wide large".split(),
)
def test_logits_that_do_not_fit_are_refused(
    cuts, opened, check, make_logits, tmp_path, change, words
):
    with opened() as writer:
        with pytest.raises(KDError, match=words) as e:
            writer.write(cuts[0], change(make_logits(cuts[0])))
        assert "c1" in str(e.value) and "c1" not in writer
        assert (tmp_path / "kd" / "targets.bin").stat().st_size == 0
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


def test_a_spread_that_float16_holds_is_taken(cuts, opened, tmp_path, read_targets):
    logits = torch.zeros(14, 11)
    logits[:, 3] = 59000.0
    with opened() as writer:
        writer.write(cuts[0], logits)
    (found,) = load_manifest(tmp_path / "kd.jsonl.gz")
    found = read_targets(found)
    assert torch.isfinite(found).all() and found[0, 3] == 0 and found[0, 0] < -58000


# Lattices


def lattice(t=14, u=2, s=3, v=11):
    g = torch.Generator().manual_seed(0)
    ranges = torch.arange(s).expand(1, t, s)
    return PrunedLattice(
        ranges,
        torch.tensor([[0, 0, u, t]]),
        torch.tensor([[3, 4]]),
        torch.randn(1, t, s, v, generator=g),
        torch.rand(1, t, s, generator=g),
    )


@pytest.mark.parametrize("form", ["collapsed", "dense", "top:3@2"])
def test_a_lattice_is_stored_beside_the_ctc_targets(
    cuts, opened, make_logits, tmp_path, form, read_targets, stored_form
):
    with opened(ctc="dense", lattice=form, s_range=3) as writer:
        writer.write(cuts[0], make_logits(cuts[0]), lattice=lattice())
        codec = writer.fingerprint.kinds["lattice"].codec
    (found,) = load_manifest(tmp_path / "kd.jsonl.gz")
    parts = Pointer.of_cut(found).read()
    assert list(parts) == ["ctc", "lattice"]
    assert parts["lattice"] == codec.encode(lattice(), "c1")
    assert codec.decode(parts["lattice"], 11).ranges.shape == (14, 3)
    assert torch.equal(read_targets(found), stored_form(cuts[0]))


def test_a_store_of_lattices_takes_no_cut_without_one(cuts, opened, make_logits):
    with opened(lattice="collapsed", s_range=3) as writer:
        with pytest.raises(KDError, match="cut c1 comes without a lattice"):
            writer.write(cuts[0], make_logits(cuts[0]))
        bad = lattice()
        bad.logits[0, 3, 1, 2] = float("nan")
        with pytest.raises(KDError, match="lattice on cut c1 are not finite"):
            writer.write(cuts[0], make_logits(cuts[0]), lattice=bad)
        assert len(writer) == 0


def test_the_manifest_is_json_lines(cuts, opened, make_logits, tmp_path):
    with opened(".jsonl") as writer:
        write_all(writer, cuts, make_logits)
    lines = (tmp_path / "kd.jsonl").read_text("utf8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(LENGTHS)


def test_a_job_that_another_process_writes_is_refused_and_left_alone(
    cuts, opened, check, make_logits, tmp_path
):
    writer = opened()
    writer.write(cuts[0], make_logits(cuts[0], 0))
    code, read = 1, os.pipe()
    if (child := os.fork()) == 0:
        try:
            opened()
        except KDError as e:
            os.write(read[1], str(e).encode())
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    message = os.read(read[0], 4096).decode()
    assert "targets.bin is being written by another process" in message
    assert "--job" in message
    for cut in cuts[1:]:
        writer.write(cut, make_logits(cut, 0))
    writer.finish()
    check(cuts)


def test_records_of_another_manifest_are_not_cut_off(
    cuts, opened, check, make_logits, make_fingerprint, tmp_path
):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    before = (tmp_path / "kd/targets.bin").read_bytes()
    other = tmp_path / "other.jsonl.gz"
    with pytest.raises(KDError, match="another manifest's targets.*--overwrite"):
        TargetWriter(other, tmp_path / "kd", make_fingerprint())
    assert (tmp_path / "kd/targets.bin").read_bytes() == before and not other.exists()
    check(cuts)


def test_records_without_a_fingerprint_are_not_taken_over(
    cuts, opened, make_logits, tmp_path
):
    cut_short(opened(), cuts, make_logits)
    (tmp_path / "kd/fingerprint.json").unlink()
    with pytest.raises(KDError, match="no fingerprint.json beside"):
        opened(teacher="b" * 64)
    opened(overwrite=True).close()


def test_a_killed_overwrite_leaves_no_cut_of_the_old_teacher(
    cuts, opened, make_logits, tmp_path, monkeypatch
):
    with opened() as writer:
        write_all(writer, cuts, make_logits)

    def killed(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.Fingerprint, "write", killed)
        with pytest.raises(Stop):
            opened(overwrite=True, teacher="b" * 64)
    with pytest.raises(KDError, match="--overwrite"):
        opened(teacher="b" * 64)
    assert len(opened(overwrite=True, teacher="b" * 64)) == 0


def test_a_manifest_that_is_torn_is_refused(cuts, opened, make_logits, tmp_path):
    with opened() as writer:
        write_all(writer, cuts, make_logits)
    path = tmp_path / "kd.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(KDError, match="kd.jsonl.gz is damaged .EOFError"):
        opened()


def test_jobs_that_combine_at_once_all_succeed(cuts, opened, make_logits, tmp_path):
    for job in range(2):
        with opened(job=job, num_jobs=2) as writer:
            write_all(writer, cuts[job::2], make_logits)
    errors = []

    def run():
        try:
            combine(tmp_path / "kd.jsonl.gz", 2, [c.id for c in cuts])
        except Exception as e:
            errors.append(e)

    for _ in range(20):
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    found = [c.id for c in load_manifest(tmp_path / "kd.jsonl.gz")]
    assert found == [c.id for c in cuts] and not list(tmp_path.glob(".tmp*"))


def test_a_job_does_not_go_on_with_the_cuts_of_another_teacher(
    cuts, opened, make_logits
):
    """Job 0 was made anew for another teacher, and job 1 is told nothing of it."""
    for job in range(2):
        with opened(job=job, num_jobs=2) as writer:
            write_all(writer, cuts[job::2], make_logits)
    opened(job=0, num_jobs=2, overwrite=True, teacher="b" * 64).close()
    with pytest.raises(KDError, match="targets of another teacher or form"):
        opened(job=1, num_jobs=2, teacher="b" * 64)


# Cuts that are left out


def test_cuts_without_targets_stand_in_the_manifest(
    opened, cuts, make_logits, multi_cut, tmp_path
):
    from icefall_kd.targets.store import is_left_out

    multi, mixed = multi_cut("m", 61), cuts[4].pad(duration=2.0, preserve_id=True)
    with opened() as writer:
        writer.write(cuts[0], make_logits(cuts[0]))
        writer.leave_out(cuts[1])
        writer.leave_out(multi)
        writer.leave_out(mixed)
        assert len(writer) == 1 and writer.left_out == {"c2", "m", "c5"}
        assert all(name in writer for name in ("c1", "c2", "m", "c5"))
        with pytest.raises(KDError, match="cut id m occurs twice"):
            writer.leave_out(multi)
        with pytest.raises(KDError, match="cut id c2 occurs twice"):
            writer.write(cuts[1], make_logits(cuts[1]))
    found = list(load_manifest(tmp_path / "kd.jsonl.gz"))
    assert [c.id for c in found] == ["c1", "c2", "m", "c5"]
    assert [is_left_out(c) for c in found] == [False, True, True, True]
    assert not any(is_left_out(c) for c in (*cuts, multi, mixed))
    # Another run takes them over, in their order.
    with opened() as writer:
        assert len(writer) == 1 and writer.left_out == {"c2", "m", "c5"}
        writer.write(cuts[3], make_logits(cuts[3]))
    found = [c.id for c in load_manifest(tmp_path / "kd.jsonl.gz")]
    assert found == ["c1", "c2", "m", "c5", "c4"]


@pytest.mark.parametrize("folder", ["", "new/deep"])
def test_a_strangers_manifest_is_refused_and_nothing_new_is_left(
    opened, cuts, tmp_path, tree_of, folder
):
    place = tmp_path / "place"
    place.mkdir()
    CutSet.from_cuts(cuts).to_file(place / "kd.jsonl.gz")
    before, folders = tree_of(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(KDError, match="has targets in None"):
        opened(folder=place, storage=f"{folder}/kd" if folder else "kd")
    assert tree_of(tmp_path) == before and sorted(tmp_path.rglob("*")) == folders

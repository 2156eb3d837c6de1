"""labels/labelling.py: a manifest is labelled whatever stops it, in flat memory."""

import json
import os
import random
import signal
import sys
import threading
import time
import tracemalloc

import pytest
from lhotse import CutSet, MonoCut

from icefall_kd.errors import KDError
from icefall_kd.labels import labelling
from icefall_kd.labels.labelling import (
    Job,
    are_done,
    label_cuts,
    survey,
    write_manifest,
)
from icefall_kd.labels.pseudo_label import PseudoLabel

KILLS = [3, pytest.param(20, marks=pytest.mark.slow)]


class Echo:
    """A teacher that says a cut's id; of some it hears nothing."""

    max_duration = 1.5

    def __init__(self, name="echo", pause=0.0):
        self.name, self.settings, self.pause = name, {"loud": True}, pause
        self.heard = []

    def problem(self, cut):
        return "is bad" if cut.id == "bad" else ""

    def __call__(self, plan):
        for batch in plan:
            time.sleep(self.pause)
            self.heard += [cut.id for cut in batch.cuts]
            texts = ["" if cut.id.endswith("7") else cut.id for cut in batch.cuts]
            yield batch, [PseudoLabel(text, {"score": -0.5}) for text in texts]


@pytest.fixture
def many(make_cut, tmp_path, monkeypatch):
    """24 cuts of odd lengths, in stretches of 3 s."""
    for name in ("targets.batches", "labels.labelling"):
        monkeypatch.setattr(sys.modules[f"icefall_kd.{name}"], "STRETCH", 3.0)
    path = tmp_path / "many.jsonl"
    cuts = [make_cut(f"m{i}", 9 + (37 * i) % 83, text="z ein") for i in range(24)]
    CutSet.from_cuts(cuts).to_file(path)
    return path


def run(job, teacher, overwrite=False):
    """Label a job; the outcome if it was the last one."""
    counts = survey(job.in_cuts, teacher)
    label_cuts(job, teacher, counts, overwrite)
    return write_manifest(job, teacher) if are_done(job, teacher, counts) else None


def test_every_cut_carries_what_was_said_in_the_manifests_order(many, tmp_path):
    out = tmp_path / "new" / "out.jsonl.gz"
    outcome = run(Job(str(many), out), Echo())
    cuts, before = (list(CutSet.from_file(path)) for path in (out, many))
    assert [c.id for c in cuts] == [c.id for c in before]
    for cut in cuts:
        (supervision,) = cut.supervisions
        assert supervision.text == ("" if cut.id[-1] == "7" else cut.id)
        assert supervision.custom["kd_label"] == {
            "teacher": "echo",
            "settings": {"loud": True},
            "said": supervision.text,
            "scores": {"score": -0.5},
            "original": "z ein",
        }
    assert (outcome.cuts, outcome.empty, outcome.first_empty) == (24, 2, "m7")
    assert outcome.words == 22
    assert outcome.seconds == pytest.approx(sum(c.duration for c in before))


@pytest.mark.parametrize("num_jobs", [2, 3, 30])
def test_several_jobs_write_what_one_does(many, tmp_path, num_jobs):
    run(Job(str(many), tmp_path / "one.jsonl"), Echo())
    jobs = [
        Job(str(many), tmp_path / "all.jsonl", n, num_jobs) for n in range(num_jobs)
    ]
    teachers = [Echo() for _ in jobs]
    random.Random(num_jobs).shuffle(jobs)
    outcomes = [run(job, teacher) for job, teacher in zip(jobs, teachers)]
    assert [o is not None for o in outcomes] == [False] * (num_jobs - 1) + [True]
    heard = [cut_id for teacher in teachers for cut_id in teacher.heard]
    assert sorted(heard) == sorted(c.id for c in CutSet.from_file(many))
    assert (tmp_path / "all.jsonl").read_bytes() == (
        tmp_path / "one.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("kills", KILLS)
def test_a_labelling_that_is_killed_goes_on_to_the_same_result(
    many, tmp_path, in_child, kills
):
    """SIGKILL when a random share of the journal is there, and a random while on."""
    rng = random.Random(kills)
    run(Job(str(many), tmp_path / "whole.jsonl"), Echo())
    size = (tmp_path / "whole.labels-0-of-1.jsonl").stat().st_size
    job = Job(str(many), tmp_path / "killed.jsonl")
    journal = job.journal(0)

    def kill_at(size, pause):
        while not (journal.is_file() and journal.stat().st_size >= size):
            time.sleep(1e-4)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGKILL)

    killed = []
    for share in sorted(rng.random() for _ in range(kills)):
        kill = (share * size, rng.uniform(0, 0.02))

        def child(kill=kill):
            threading.Thread(target=kill_at, args=kill, daemon=True).start()
            run(job, Echo(pause=0.005))

        killed.append(in_child(child) == -signal.SIGKILL)
    assert any(killed)  # the others were done already
    last = Echo()
    run(job, last)
    assert job.out_cuts.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(last.heard) < 24  # what was there was not asked for again
    names = [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")]
    assert names == []


def test_what_is_done_is_not_asked_again_unless_it_is_wanted(many, tmp_path):
    job, again, anew = Job(str(many), tmp_path / "o.jsonl"), Echo(), Echo()
    run(job, Echo())
    before = job.out_cuts.read_bytes()
    job.out_cuts.unlink()
    assert run(job, again).cuts == 24 and again.heard == []
    assert job.out_cuts.read_bytes() == before
    run(job, anew, overwrite=True)
    assert len(anew.heard) == 24


@pytest.mark.parametrize("change", ["teacher", "settings", "manifest"])
def test_labels_of_another_teacher_are_not_lost(many, make_cut, tmp_path, change):
    job, other = Job(str(many), tmp_path / "o.jsonl"), Echo()
    run(job, Echo())
    before = job.journal(0).read_bytes()
    if change == "teacher":
        other.name = "other"
    elif change == "settings":
        other.settings = {"loud": False}
    else:
        CutSet.from_cuts([make_cut("another", 50)]).to_file(many)
    with pytest.raises(KDError, match="labels of another teacher, manifest or other"):
        run(job, other)
    assert job.journal(0).read_bytes() == before
    assert run(job, other, overwrite=True) is not None


def test_a_teacher_that_fails_at_once_leaves_nothing(many, tmp_path):
    class Broken(Echo):
        def __call__(self, plan):
            raise KDError("broken: mend it")

    with pytest.raises(KDError, match="broken"):
        run(Job(str(many), tmp_path / "a" / "b" / "o.jsonl"), Broken())
    assert not (tmp_path / "a").exists()


def test_a_teacher_that_fails_later_keeps_what_was_labelled(many, tmp_path):
    class Broken(Echo):
        def __call__(self, plan):
            for i, of_batch in enumerate(super().__call__(plan)):
                if i == 6:
                    raise KDError("broken: mend it")
                yield of_batch

    job, again = Job(str(many), tmp_path / "o.jsonl"), Echo()
    with pytest.raises(KDError, match="broken"):
        run(job, Broken())
    assert job.journal(0).is_file() and not job.out_cuts.exists()
    run(job, again)
    assert 0 < len(again.heard) < 24


def test_cuts_that_can_not_be_labelled_are_refused_first(many, make_cut, tmp_path):
    teacher = Echo()
    for cuts, sentence in (
        ([make_cut("a", 50), make_cut("bad", 50)], "the cut bad of .* is bad"),
        ([make_cut("a", 50), make_cut("a", 50)], "the cut id a occurs twice"),
        ([make_cut("a", 50).pad(1.0).drop_supervisions()], "a MixedCut without a sup"),
    ):
        CutSet.from_cuts(cuts).to_file(many)
        with pytest.raises(KDError, match=sentence):
            run(Job(str(many), tmp_path / "o.jsonl"), teacher)
    two = make_cut("two", 50)
    two.supervisions = 2 * two.supervisions
    CutSet.from_cuts([two]).to_file(many)
    with pytest.raises(KDError, match="the cut two has 2 supervisions"):
        run(Job(str(many), tmp_path / "o.jsonl"), teacher)
    assert teacher.heard == []


def test_cuts_without_a_supervision_get_one_and_padded_ones_keep_theirs(
    many, make_cut, tmp_path
):
    bare = make_cut("bare", 50).drop_supervisions()
    padded = make_cut("padded", 50).pad(1.0, preserve_id=True)
    CutSet.from_cuts([bare, padded]).to_file(many)
    run(Job(str(many), tmp_path / "o.jsonl"), Echo())
    first, second = CutSet.from_file(tmp_path / "o.jsonl")
    assert isinstance(first, MonoCut) and not isinstance(second, MonoCut)
    (supervision,) = first.supervisions
    assert (supervision.start, supervision.duration) == (0.0, 0.5)
    assert supervision.custom["kd_label"]["original"] is None
    assert first.supervisions[0].text == "bare"
    assert second.supervisions[0].text == "padded"


def test_a_label_of_a_label_keeps_the_original_text(many, tmp_path):
    run(Job(str(many), tmp_path / "a.jsonl"), Echo())
    run(Job(str(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"), Echo("second"))
    for cut in CutSet.from_file(tmp_path / "b.jsonl"):
        label = cut.supervisions[0].custom["kd_label"]
        assert label["original"] == "z ein" and label["teacher"] == "second"


def test_a_journal_is_no_decoding(many, tmp_path):
    from icefall_kd.transcripts.journal import read_journal

    job = Job(str(many), tmp_path / "o.jsonl")
    run(job, Echo())
    first = json.loads(job.journal(0).read_text("utf8").splitlines()[0])
    assert first["labels"] == labelling.VERSION
    with pytest.raises(KDError, match="is no list of decoded utterances"):
        read_journal(job.journal(0))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_manifest(make_cut, tmp_path, monkeypatch):
    for name in ("targets.batches", "labels.labelling"):
        monkeypatch.setattr(sys.modules[f"icefall_kd.{name}"], "STRETCH", 10.0)
    line = json.dumps(make_cut("c1", 50).to_dict())
    peaks = []
    # The last two are longer than the block in which a manifest is hashed, 1 MiB.
    for count in (100, 1500, 6000):
        path = tmp_path / f"{count}.jsonl"
        lines = [line.replace('"c1"', f'"c{10**6 + i}"') for i in range(count)]
        path.write_text("\n".join(lines) + "\n", "utf8")
        assert count == 100 or path.stat().st_size > 1 << 20
        teacher = Echo()
        teacher.heard = _Nothing()
        tracemalloc.start()
        assert run(Job(str(path), tmp_path / f"out-{count}.jsonl"), teacher)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1], peaks  # the first call imports


class _Nothing(list):
    def __iadd__(self, values):
        return self

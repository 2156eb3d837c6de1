"""All cuts are checked before the teacher hears the first: nothing is written."""

import pytest
from lhotse import CutSet

from icefall_kd.errors import KDError
from icefall_kd.targets.cuts import survey
from icefall_kd.teacher.teacher import Teacher

pytestmark = pytest.mark.usefixtures("loaded_once")

LENGTHS = {"c1": 47, "c2": 90, "c3": 61, "c4": 33}


def with_features(cut, **changes):
    for name, value in changes.items():
        setattr(cut.features, name, value)
    return cut


BAD = {
    "no-features": (
        lambda make: make("bad", 47).drop_features(),
        "cut bad of {path} has no features",
    ),
    "type": (
        lambda make: with_features(make("bad", 47), type="kaldi-mfcc"),
        "cut bad of {path} has features of type kaldi-mfcc and the cuts before it of "
        "kaldi-fbank",
    ),
    "frame-shift": (
        lambda make: with_features(make("bad", 94), frame_shift=0.02, num_frames=47),
        "cut bad of {path} has features of frame_shift 0.02 and the cuts before it of "
        "0.01",
    ),
    "sampling-rate": (
        lambda make: with_features(make("bad", 47), sampling_rate=16000),
        "cut bad of {path} has features of sampling_rate 16000 and the cuts before it "
        "of 8000",
    ),
    "width": (
        lambda make: make("bad", 47, num_features=21),
        "cut bad of {path} has 21 features a frame and the teacher takes 20",
    ),
    "short": (
        lambda make: make("bad", 8),
        "cut bad of {path} has 8 feature frames and the teacher needs 9",
    ),
    "twice": (lambda make: make("c2", 90), "cut id c2 occurs twice in {path}"),
}
bad_cuts = pytest.mark.parametrize("bad", BAD)
LATTICE = {
    "no-text": (lambda make: make("bad", 47, text=None), "bad has no transcript"),
    "blank-text": (lambda make: make("bad", 47, text=" "), "bad has no transcript"),
    "no-supervision": (
        lambda make: make("bad", 47).drop_supervisions(),
        "bad has 0 supervisions",
    ),
}


@pytest.fixture(params=["manifest", "shar"])
def ended_by(request, make_cut, tmp_path):
    """Cuts that end with ``bad``, the others with a custom field if told."""
    return lambda bad, **custom: _ended_by(
        request.param, make_cut, tmp_path, bad, custom
    )


def _ended_by(kind, make_cut, tmp_path, bad, custom):
    cuts = [make_cut(i, n) for i, n in LENGTHS.items()]
    for cut in cuts:
        cut.custom = dict(custom)
    cuts = CutSet.from_cuts([*cuts, bad])
    if kind == "manifest":
        cuts.to_file(tmp_path / "ended.jsonl")
        return tmp_path / "ended.jsonl"
    folder = tmp_path / "shar"
    folder.mkdir()
    fields = {"features": "numpy"}
    cuts.to_shar(folder, fields=fields, shard_size=2, warn_unused_fields=False)
    assert len(list(folder.glob("cuts.*"))) == 3
    return folder


@pytest.fixture
def refused(refused, monkeypatch):
    """And no teacher is asked."""

    def ask(*args):
        raise AssertionError("the teacher was asked")

    def run(*words):
        with monkeypatch.context() as m:
            m.setattr(Teacher, "outputs_to_store", ask)
            return refused(*words)

    return run


@bad_cuts
@pytest.mark.parametrize("max_duration", [0.01, 100])
def test_a_bad_cut_at_the_end_leaves_nothing_written(
    refused, dump_words, make_cut, ended_by, bad, max_duration
):
    make, words = BAD[bad]
    path = ended_by(make(make_cut))
    error = refused(*dump_words("--max-duration", max_duration, cuts=path))
    assert words.format(path=path) in error


def test_a_mixed_cut_at_the_end_leaves_nothing_written(
    refused, dump_words, make_cut, tmp_path
):
    """A Shar has no features of such."""
    mixed = make_cut("bad", 47).pad(duration=2.0, preserve_id=True)
    path = tmp_path / "mixed.jsonl"
    CutSet.from_cuts([make_cut("c1", 47), mixed]).to_file(path)
    error = refused(*dump_words(cuts=path))
    assert f"the cut bad of {path} is a MixedCut" in error


@pytest.mark.parametrize("bad", LATTICE)
def test_a_cut_that_has_no_lattice_leaves_nothing_written(
    refused, dump_words, make_cut, ended_by, bpe_models, bad
):
    make, words = LATTICE[bad]
    lattice = ("--keep-lattice", "collapsed", "--bpe-model", bpe_models.a)
    error = refused(*dump_words(*lattice, cuts=ended_by(make(make_cut))))
    assert "cut bad has " in error and words in error


@pytest.mark.parametrize("value", [None, "1", 1.0, True])
def test_a_cut_without_its_teachers_number_leaves_nothing_written(
    refused, dump_words, make_cut, teacher_exp, another_exp, ended_by, value
):
    bad = make_cut("bad", 47)
    bad.custom = {"domain": value}
    both = f"{teacher_exp.folder},{another_exp(seed=5)[0]}"
    words = ("--exp-dir", both, "--teacher-field", "domain")
    error = refused(*dump_words(*words, cuts=ended_by(bad, domain=1)))
    assert f"the field 'domain' of cut bad is {value!r}" in error


@pytest.mark.parametrize("job", [0, 1])
def test_each_job_checks_the_cuts_of_all(refused, dump_words, make_cut, ended_by, job):
    path = ended_by(make_cut("bad", 8))
    error = refused(*dump_words("--num-jobs", 2, "--job", job, cuts=path))
    assert "cut bad" in error


def test_a_bad_cut_leaves_the_store_that_was_to_be_overwritten(
    invoke, refused, dump_words, make_cut, ended_by, in_cuts
):
    assert invoke(*dump_words()).code == 0
    path = ended_by(make_cut("bad", 8))
    for more in ((), ("--overwrite",), ("--overwrite", "--epoch", 1)):
        assert "cut bad" in refused(*dump_words(*more, cuts=path))


@bad_cuts
def test_a_quantizer_is_not_trained_on_manifests_with_a_bad_cut(
    refused, teacher_words, make_cut, ended_by, tmp_path, bad
):
    pytest.importorskip("multi_quantization")
    make, words = BAD[bad]
    path = ended_by(make(make_cut))
    command = ["quantizer", path, tmp_path / "q.pt", *teacher_words, "--layer", 1]
    error = refused(*command, "--iters", 1, "--num-vectors", 600)
    assert words.format(path=path) in error


def test_a_survey_of_good_cuts_counts_them(make_cut, ended_by):
    path = str(ended_by(make_cut("c5", 9)))
    asked = []
    surveyed = survey(path, 20, [lambda cut: asked.append(cut.id)])
    assert (surveyed.features.type, surveyed.total) == ("kaldi-fbank", 5)
    assert asked == ["c1", "c2", "c3", "c4", "c5"]
    with pytest.raises(KDError, match="cut c1 .* takes 21"):
        survey(path, 21)

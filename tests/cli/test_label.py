"""icefall-kd label and icefall-kd filter: from a manifest to what a student learns."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from lhotse import CutSet
from tiny_whisper import whisper_folder  # noqa: F401

pytest.importorskip("kaldialign")

LENGTHS = {"c1": 147, "c2": 290, "c3": 161, "c4": 133}
FAKE = Path(__file__).resolve().parents[1] / "labels" / "fake_recogniser.py"


@pytest.fixture
def spoken(speak, tmp_path):
    """Cuts with features and audio, of the longest a text that is no transcript."""
    path = tmp_path / "in.jsonl.gz"
    CutSet.from_cuts(speak(i, n) for i, n in LENGTHS.items()).to_file(path)
    return path


@pytest.fixture
def model_words(teacher_words, talking_exp, teacher_exp):
    return [
        *(*teacher_words, "--exp-dir", talking_exp, "--num-threads", 1),
        *("--bpe-model", teacher_exp.bpe_model, "--num-workers", 0),
    ]


@pytest.fixture
def words(spoken, tmp_path, model_words):
    """``label`` by the small model; a word given twice counts the second time."""

    def make(*more, cuts=spoken, out=tmp_path / "out.jsonl.gz"):
        return ["label", cuts, out, *model_words, *more]

    return make


@pytest.fixture
def by_command(spoken, tmp_path):
    """``label`` by the fake recogniser."""

    def make(*more, fault="", cuts=spoken, out=tmp_path / "out.jsonl.gz"):
        program = shlex.join([sys.executable, str(FAKE)])
        command = f"{program} {{wavs}} {{out}} {fault}"
        return ["label", cuts, out, "--command", command, *more]

    return make


@pytest.fixture
def stops(invoke, tmp_path, tree_of):
    """The command ends by one sentence behind its bar, and writes nothing."""

    def run(*words):
        before = tree_of(tmp_path)
        done = invoke(*words)
        assert done.code == 1 and done.out == "", done
        *bars, sentence = done.err
        assert all(not bar or bar.startswith("Labelling") for bar in bars), done
        assert sentence.startswith("icefall_kd: error: ")
        assert tree_of(tmp_path) == before
        return sentence

    return run


def texts(path):
    return {cut.id: cut.supervisions[0].text for cut in CutSet.from_file(path)}


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--decoding-method", "ctc-greedy-search"),
        ("--window", 1),
        ("--on-the-fly-feats", 1, "--sampling-rate", 8000),
    ],
)
def test_a_models_labels_are_what_decode_finds(
    invoke, words, model_words, spoken, tmp_path, more
):
    done = invoke(*words(*more))
    assert done.code == 0, done
    assert "out.jsonl.gz: 4 cuts labelled, 7.3 s" in done.out
    decode = ("decode", "--cuts", spoken, "--res-dir", tmp_path / "res", *model_words)
    assert invoke(*decode, *more).code == 0
    (recogs,) = (tmp_path / "res").glob("recogs-*.txt")
    found = {}
    for line in recogs.read_text("utf8").splitlines():
        name, _, hyp = line.partition(":\thyp=")
        if hyp:
            found[name] = " ".join(json.loads(hyp.replace("'", '"')))
    labels = texts(tmp_path / "out.jsonl.gz")
    assert labels == found and any(labels.values())


def test_a_label_has_the_measures_of_a_cascade_and_what_both_heads_heard(
    invoke, words, tmp_path
):
    assert invoke(*words()).code == 0
    for cut in CutSet.from_file(tmp_path / "out.jsonl.gz"):
        label = cut.supervisions[0].custom["kd_label"]
        names = ["token", "worst-token", "frame", "path", "heads"]
        assert list(label["scores"]) == names and label["original"] == "ein"
        assert isinstance(label["ctc_text"], str)
        assert label["settings"]["method"]["name"] == "greedy_search"
        assert len(label["teacher"]) > 8


def test_several_jobs_and_other_batches_write_the_same(
    invoke, words, tmp_path, monkeypatch
):
    for name in ("targets.batches", "labels.labelling"):
        __import__(f"icefall_kd.{name}")
        monkeypatch.setattr(sys.modules[f"icefall_kd.{name}"], "STRETCH", 3.0)
    assert invoke(*words(out=tmp_path / "one.jsonl")).code == 0
    more = ("--num-jobs", 2, "--max-duration", 0.01, "--num-workers", 1)
    first = invoke(*words(*more, "--job", 1, out=tmp_path / "all.jsonl"))
    assert "job 1 of 2 is done: the last one writes" in first.out
    assert not (tmp_path / "all.jsonl").exists()
    assert invoke(*words(*more, out=tmp_path / "all.jsonl")).code == 0
    files = [(tmp_path / name).read_bytes() for name in ("one.jsonl", "all.jsonl")]
    assert files[0] == files[1]


def test_a_program_labels_what_it_hears(invoke, by_command, tmp_path):
    done = invoke(*by_command())
    assert done.code == 0, done
    labels = texts(tmp_path / "out.jsonl.gz")
    assert labels == {i: f"Söme {80 * n}." for i, n in LENGTHS.items()}
    # What the program left is gone.
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in.jsonl.gz",
        "out.jsonl.gz",
        "out.labels-0-of-1.jsonl",
    ]


def test_what_is_silent_is_said_and_dropped_by_the_filter(invoke, by_command, tmp_path):
    done = invoke(*by_command(fault="one-empty"))
    assert "nothing was heard in 1 of them, c2 the first" in done.out
    done = invoke("filter", tmp_path / "out.jsonl.gz", tmp_path / "kept.jsonl.gz")
    assert done.code == 0 and "3 of 4 cuts kept" in done.out
    assert set(texts(tmp_path / "kept.jsonl.gz")) == {"c1", "c3", "c4"}


FAULTS = ("fewer", "other-ids", "all-empty", "latin-1", "dies", "no-file", "twice")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_that_errs_is_refused_and_leaves_nothing(
    stops, by_command, tmp_path, fault
):
    where = tmp_path / "new" / "out.jsonl.gz"
    stops(*by_command(fault=fault, out=where))
    assert not where.parent.exists()


def test_a_program_that_hangs_is_refused(stops, by_command):
    sentence = stops(*by_command("--time-limit", 0.5, fault="hangs"))
    assert "longer than --time-limit 0.5 s" in sentence


def test_cuts_without_audio_are_refused(refused, stops, by_command, make_cut, tmp_path):
    path = tmp_path / "mute.jsonl"
    cut = make_cut("c1", 50)
    CutSet.from_cuts([cut.drop_recording()]).to_file(path)
    assert "has no recording" in refused(*by_command(cuts=path))
    CutSet.from_cuts([cut]).to_file(path)
    assert "the audio of cut c1 can't be read" in stops(*by_command(cuts=path))


def test_options_of_the_other_kind_of_teacher_are_refused(
    refused, words, by_command, spoken, tmp_path
):
    for option in ("--beam-size", "--causal", "--language"):
        said = refused(*by_command(option, 4))
        assert f"{option} is for another teacher than a program (--command)" in said
    assert "--language is for a Whisper: give" in refused(*words("--language", "en"))
    assert "--nbest is for a program" in refused(*words("--nbest"))
    out = tmp_path / "out.jsonl"
    assert "--recipe is missing" in refused("label", spoken, out)
    said = refused("label", spoken, out, "--command", "asr {wavs}")
    assert said.startswith("icefall_kd: error: --command is 'asr {wavs}' and lacks")


def test_a_manifest_of_something_else_is_not_lost(refused, by_command, tmp_path):
    (tmp_path / "out.jsonl.gz").write_bytes(b"precious")
    assert "give --overwrite to lose that one" in refused(*by_command())


def test_filters_are_changed_without_labelling_anew(invoke, by_command, tmp_path):
    assert invoke(*by_command("--nbest", fault="nbest")).code == 0
    rules = tmp_path / "rules.txt"
    rules.write_text("upper\n^SÖME 1\tEIN \n[^A-ZÖ ]\t\n", "utf8")
    given, kept = tmp_path / "out.jsonl.gz", tmp_path / "kept.jsonl.gz"
    filter_words = ("filter", given, kept, "--rules", rules)
    assert invoke(*filter_words).code == 0
    assert texts(kept) == {"c1": "EIN", "c2": "SÖME", "c3": "EIN", "c4": "EIN"}
    page = tmp_path / "page.md"
    more = ("--wer-threshold", 100, "--unit", "WER", "--page", page)
    done = invoke(*filter_words, *more, "--min-score", -0.5)
    assert done.code == 0, done
    assert set(texts(kept)) == {"c1", "c3", "c4"} and page.is_file()
    assert "3 of 4 cuts kept" in done.out and "WER of the labels" in done.out


def test_the_filter_drops_a_label_that_repeats_itself(invoke, by_command, tmp_path):
    assert invoke(*by_command()).code == 0
    given, kept = tmp_path / "out.jsonl.gz", tmp_path / "kept.jsonl.gz"
    rules = tmp_path / "rules.txt"
    rules.write_text(f"^{re.escape(texts(given)['c2'])}$\tein ein ein\n", "utf8")
    for most, ids in ((3, {"c1", "c2", "c3", "c4"}), (2, {"c1", "c3", "c4"})):
        done = invoke("filter", given, kept, "--rules", rules, "--max-repeats", most)
        assert done.code == 0, done
        assert set(texts(kept)) == ids


@pytest.mark.parametrize(
    "more, sentence",
    [
        (("--agree-with", "in.jsonl.gz"), "go together"),
        (("--measure", "heads"), "there is no --min-score"),
        (("--words-per-second", "5:1"), "--words-per-second is '5:1'"),
        (("--min-score", 0, "--measure", "heads"), "choose another --measure"),
        (("--heads-threshold", 5), "has no `ctc_text`"),
        (("--characters", "z-a"), "--characters is 'z-a'"),
        (("--page", "out.jsonl.gz"), "is a manifest of this command"),
    ],
)
def test_filters_that_can_not_be_applied_are_refused(
    invoke, refused, by_command, tmp_path, monkeypatch, more, sentence
):
    monkeypatch.chdir(tmp_path)
    assert invoke(*by_command("--nbest", fault="nbest")).code == 0
    said = refused("filter", "out.jsonl.gz", "kept.jsonl.gz", *more)
    assert sentence in said


# A Whisper


@pytest.fixture
def by_whisper(spoken, tmp_path, whisper_folder):  # noqa: F811
    """``label`` by a tiny Whisper."""

    def make(*more, cuts=spoken, out=tmp_path / "out.jsonl"):
        return ["label", cuts, out, "--whisper", whisper_folder, *more]

    return make


def test_a_whisper_labels_cuts_and_the_filter_knows_its_scores(
    invoke, by_whisper, tmp_path
):
    done = invoke(*by_whisper("--num-threads", 1))
    assert done.code == 0 and "4 cuts labelled, 7.3 s" in done.out, done
    assert all(texts(tmp_path / "out.jsonl").values())
    for cut in CutSet.from_file(tmp_path / "out.jsonl"):
        label = cut.supervisions[0].custom["kd_label"]
        assert label["original"] == "ein" and label["settings"]["whisper"] == "en"
        assert len(label["teacher"]) == 64
    words = ("filter", tmp_path / "out.jsonl", tmp_path / "kept.jsonl")
    for measure in ("token", "worst-token", "speech", "compression"):
        done = invoke(*words, "--min-score", -1000, "--measure", measure)
        assert "4 of 4 cuts kept" in done.out, done
    assert invoke(*words, "--min-score", 0, "--measure", "token").code == 1


@pytest.mark.slow
def test_several_jobs_of_a_whisper_write_what_one_does(
    invoke, by_whisper, tmp_path, monkeypatch
):
    for name in ("targets.batches", "labels.labelling"):
        __import__(f"icefall_kd.{name}")
        monkeypatch.setattr(sys.modules[f"icefall_kd.{name}"], "STRETCH", 3.0)
    one = ("--max-duration", 0.01)  # batches of one, whose last digits are the same
    assert invoke(*by_whisper(*one, out=tmp_path / "one.jsonl")).code == 0
    for job in (1, 0):
        more = (*one, "--num-jobs", 2, "--job", job)
        assert invoke(*by_whisper(*more, out=tmp_path / "all.jsonl")).code == 0
    files = [(tmp_path / name).read_bytes() for name in ("one.jsonl", "all.jsonl")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_an_assistant_and_shorter_windows_are_taken(
    invoke, by_whisper, whisper_folder, tmp_path  # noqa: F811
):
    plain, assisted = tmp_path / "plain.jsonl", tmp_path / "assisted.jsonl"
    assert invoke(*by_whisper("--window", 1, out=plain)).code == 0
    more = ("--window", 1, "--assistant", whisper_folder)
    assert invoke(*by_whisper(*more, out=assisted)).code == 0
    assert texts(plain) == texts(assisted)
    # A window has 12 letters at most.
    assert max(len(text) for text in texts(plain).values()) > 12


def test_a_whisper_that_can_not_be_used_is_refused(refused, by_whisper, make_cut):
    assert "--language is fr, and the Whisper knows 1" in refused(
        *by_whisper("--language", "fr")
    )
    assert "--whisper is no-such, which is no folder" in refused(
        *by_whisper("--whisper", "no-such")
    )
    said = refused(*by_whisper("--window", 31))
    assert "--window is 31, and a Whisper hears 30 s: give 1 to 30" in said
    for option in ("--nbest", "--recipe=x", "--draft=ctc", "--num-workers=2"):
        said = refused(*by_whisper(option))
        assert "is for another teacher than a Whisper (--whisper)" in said

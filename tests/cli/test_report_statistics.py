"""``icefall-kd report`` with transcripts, seeds and speakers."""

import pytest
from lhotse import CutSet
from report_folders import KD, SUFFIX

pytest.importorskip("matplotlib")

NAME = f"test-clean-{SUFFIX}.txt"
REFERENCE = "one two three four five".split()


def write_transcripts(exp, wrong, ids=None, reference=None):
    """Of 8 utterances, the first ``wrong`` have one error in five words."""
    ids = ids or [f"u{i}" for i in range(8)]
    folder = exp / "greedy_search"
    lines = []
    for i, cut_id in enumerate(ids):
        result = ["x", *REFERENCE[1:]] if i < wrong else REFERENCE
        lines += [f"{cut_id}:\tref={reference or REFERENCE}"]
        lines += [f"{cut_id}:\thyp={result}"]
    (folder / f"recogs-{NAME}").write_text("\n".join(lines) + "\n")
    rate = f"{100 * wrong / 5 / len(ids):.2f}"
    (folder / f"wer-summary-{NAME}").write_text(f"settings\tWER\ngreedy\t{rate}\n")
    return folder / f"recogs-{NAME}"


@pytest.fixture
def scored(three, tmp_path):
    """Words for three models with transcripts."""
    pytest.importorskip("kaldialign")
    for name, wrong in (("t", 0), ("s", 8), ("k", 4)):
        write_transcripts(tmp_path / name, wrong)
    return three


@pytest.fixture
def speakers(make_cut, tmp_path):
    """A manifest of the transcripts' cuts, by four speakers."""

    def write(count=4):
        cuts = [make_cut(f"u{i}", 100) for i in range(8)]
        for i, cut in enumerate(cuts):
            cut.supervisions[0].speaker = f"s{i % count}"
        (tmp_path / "fbank").mkdir(exist_ok=True)
        CutSet.from_cuts(cuts).to_file(tmp_path / "fbank/cuts_test-clean.jsonl.gz")
        return tmp_path / "fbank"

    return write


def test_intervals_and_differences_are_printed_and_written(invoke, scored, tmp_path):
    done = invoke("report", *scored, tmp_path / "out")
    assert (done.code, done.err) == (0, [])
    rates, differences = done.out.split("\n\n")[:2]
    assert "0.00 [0.00, 0.00]  20.00 [20.00, 20.00]  10.00 [" in rates
    assert differences.startswith("Against no KD, on the same utterances\n")
    row = differences.splitlines()[-1].split()
    assert row[:4] == ["greedy_search", "test-clean", "KD", "-10.00"]
    assert float(row[-2]) > 99 and row[-1] == "%"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "test-clean has 40 words in 8 utterances" in text
    assert "no interval" not in text


def test_a_name_given_again_adds_a_seed(invoke, make_exp, scored, tmp_path):
    write_transcripts(make_exp("k2", {"base_lr": 0.045, **KD}, 0.0), 8)
    words = ["--model", f"KD={tmp_path / 'k2'}"]
    done = invoke("report", *scored, *words, tmp_path / "out")
    assert (done.code, done.err) == (0, [])
    # Of 8 draws with chance 1/2, the middle 95 % are 1 to 7: 10 + 10 x 1/8 and 7/8.
    assert "20.00 [20.00, 20.00]  15.00 [11.25, 18.75]" in done.out
    assert "10.00, 20.00" in done.out and "7.07" in done.out
    text = (tmp_path / "out" / "report.md").read_text()
    assert "|  | teacher | no KD | KD (1) | KD (2) |" in text
    page = (tmp_path / "out" / "report.html").read_text("utf8")
    assert "<th>KD (1)</th><th>KD (2)</th>" in page


def test_without_transcripts_of_one_seed_a_model_has_no_interval(
    invoke, make_exp, scored, tmp_path
):
    make_exp("k2", {"base_lr": 0.045, **KD}, 14.0)
    words = ["--model", f"KD={tmp_path / 'k2'}"]
    done = invoke("report", *scored, *words, tmp_path / "out")
    assert "20.00 [20.00, 20.00]  12.00 " in done.out
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"- KD (2): no interval, as {tmp_path / 'k2'} has no greedy_search/" in text


def test_transcripts_of_the_last_setting_are_not_those_of_the_best(
    invoke, scored, tmp_path
):
    """icefall's zipformer writes each setting's transcripts to the same file."""
    path = tmp_path / "k" / "greedy_search" / f"wer-summary-{NAME}"
    path.write_text("settings\tWER\nbeam_4\t9.00\nbeam_8\t10.00\n")
    done = invoke("report", *scored, tmp_path / "out")
    assert (done.code, done.err) == (0, [])
    assert "20.00 [20.00, 20.00]  9.00 " in done.out
    text = (tmp_path / "out" / "report.md").read_text()
    assert "KD, greedy_search, test-clean: no interval, as of 2 settings" in text
    assert "best one, beam_4; decode with it alone" in text


def test_by_speaker_the_speakers_are_counted(invoke, scored, speakers, tmp_path):
    words = ["--manifest-dir", speakers(), "--by-speaker"]
    done = invoke("report", *scored, *words, tmp_path / "out")
    assert (done.code, done.err) == (0, [])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "test-clean has 40 words in 8 utterances of 4 speakers" in text
    assert "blockwise bootstrap" in text
    # Each speaker has one utterance that is wrong and one that is right.
    assert "10.00 [10.00, 10.00]" in done.out


def test_an_interval_that_all_results_have_is_taken(invoke, scored, tmp_path):
    done = invoke("report", *scored, "--interval", "8", tmp_path / "out")
    assert (done.code, done.err) == (0, [])


# Refusals, in one sentence, with nothing written


def test_too_few_words_for_the_interval_are_refused(refused, scored, tmp_path):
    said = refused("report", *scored, "--interval", "1", tmp_path / "out")
    assert "the test set test-clean has 40 words, too few for --interval 1:" in said
    assert "'KD' by greedy_search" in said and "words are needed" in said


def test_an_interval_without_transcripts_is_refused(refused, three, tmp_path):
    said = refused("report", *three, "--interval", "1", tmp_path / "out")
    assert f"{tmp_path / 't'} has no transcripts of greedy_search on test-" in said


def test_an_interval_without_results_is_refused(refused, make_exp, tmp_path):
    exp = make_exp("t", {"a": 1})
    words = ["--model", f"t={exp}", "--interval", "1"]
    said = refused("report", *words, tmp_path / "out")
    assert "--interval is given, and no model has decoding results" in said


def test_transcripts_of_another_decoding_are_refused(refused, scored, tmp_path):
    path = tmp_path / "k" / "greedy_search" / f"wer-summary-{NAME}"
    path.write_text("settings\tWER\ngreedy\t9.00\n")
    said = refused("report", *scored, tmp_path / "out")
    assert "4 errors in 40 words (10.00 %), and the result beside it is 9.00 %" in said


def test_other_utterances_are_refused(refused, scored, tmp_path):
    ids = [f"u{i}" for i in range(7)]
    path = write_transcripts(tmp_path / "k", 4, ids)
    said = refused("report", *scored, tmp_path / "out")
    assert "utterance u7 is in " in said and f" and not in {path}" in said


def test_other_references_are_refused(refused, scored, tmp_path):
    write_transcripts(tmp_path / "k", 8, reference=["won", *REFERENCE[1:]])
    said = refused("report", *scored, tmp_path / "out")
    assert "the references of utterance u0 differ" in said


def test_damaged_transcripts_are_refused(refused, scored, tmp_path):
    path = tmp_path / "k" / "greedy_search" / f"recogs-{NAME}"
    path.write_bytes(path.read_bytes()[:-9])
    said = refused("report", *scored, tmp_path / "out")
    assert f"{path} is damaged at line 16" in said


def test_speakers_without_a_manifest_dir_are_refused(refused, scored, tmp_path):
    said = refused("report", *scored, "--by-speaker", tmp_path / "out")
    assert "--by-speaker is given without --manifest-dir" in said


def test_speakers_that_no_manifest_has_are_refused(
    refused, scored, speakers, fbank, tmp_path
):
    words = ["report", *scored, "--by-speaker", "--manifest-dir", fbank]
    said = refused(*words, tmp_path / "out")
    assert "has no speaker for the cut u0 of" in said
    assert "give the --manifest-dir that was decoded" in said
    speakers()  # beside the other
    assert "has several manifests of test-clean" in refused(*words, tmp_path / "out")
    for path in fbank.iterdir():
        path.unlink()
    said = refused(*words, tmp_path / "out")
    assert "has no manifest cuts_test-clean.jsonl.gz: give a folder" in said


def test_a_single_speaker_is_refused(refused, scored, speakers, tmp_path):
    words = ["--by-speaker", "--manifest-dir", speakers(1)]
    said = refused("report", *scored, *words, tmp_path / "out")
    assert "has one speaker, s0, and an interval needs two or more" in said


def test_without_kaldialign_transcripts_are_refused(run_python, scored, tmp_path):
    words = ["icefall-kd", "report", *map(str, scored), str(tmp_path / "out")]
    done = run_python(
        f"import sys; sys.argv = {words!r}\n"
        "from icefall_kd.cli import main\n"
        "main()",
        block=["kaldialign"],
    )
    assert done.returncode == 1 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert "are counted by kaldialign" in said
    assert not (tmp_path / "out").exists()

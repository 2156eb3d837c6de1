"""The errors of each utterance, from icefall's recogs files."""

import pytest

from icefall_kd.errors import KDError
from icefall_kd.report.results import Decoding, ErrorRate
from icefall_kd.report.transcripts import read_scores

pytest.importorskip("kaldialign")

PAIRS = [("b", "one two three", "one too"), ("a-1", "four", "four five"), ("c", "", "")]
ICEFALL = (
    "%WER = 75.00\nErrors: 1 insertions, 1 deletions, 1 substitutions, over 4 "
    "reference words (2 correct)\nSearch below for sections\n"
)
DIGITS = "%WER 75.00% [3 / 4, 1 ins, 1 del, 1 sub ]\n"
CHINESE = [("a", "今天 天气", "今天 天汽"), ("b", "好", "好 吗")]
CER = (
    "%WER = 40.00\nErrors: 1 insertions, 0 deletions, 1 substitutions, over 5 "
    "reference words (4 correct)\n"
)


@pytest.mark.parametrize("errs", [ICEFALL, DIGITS, None], ids=["icefall", "digits", ""])
def test_each_utterance_has_its_errors_and_words_in_the_order_of_ids(
    write_recogs, errs
):
    scores = read_scores(write_recogs(PAIRS, errs=errs), 75.0)
    assert scores.ids == ["a-1", "b", "c"]
    assert scores.references == ["four", "one two three", ""]
    assert (scores.errors.tolist(), scores.words.tolist()) == ([1, 2, 0], [1, 3, 0])
    assert not scores.characters and scores.percent == 75.0


@pytest.mark.parametrize("char_level", [False, True])
def test_characters_are_scored_where_the_recipe_did(write_recogs, char_level):
    """aishell stores characters, ksponspeech words that it scores by characters."""
    path = write_recogs(CHINESE, errs=CER, char_level=char_level)
    scores = read_scores(path, 40.0)
    assert scores.words.tolist() == [4, 1] and scores.errors.tolist() == [1, 1]
    # Characters that are stored are icefall's words.
    assert scores.characters is not char_level


def test_a_reference_that_is_one_string_is_scored_by_its_characters(tmp_path):
    path = tmp_path / "recogs-test-epoch-1-avg-1.txt"
    path.write_text("a:\tref=今天天气\na:\thyp=今天天汽\n", "utf8")
    assert read_scores(path, 25.0).errors.tolist() == [1]


def test_errors_of_sclites_alignment_are_taken_where_the_recipe_counted_them(
    write_recogs,
):
    """By costs of 3, 3 and 4 these are six insertions and deletions, not 5 errors."""
    path = write_recogs([("a", "a b c d e", "d e f g h")])
    for errors in (5, 6):
        scores = read_scores(path, 20.0 * errors)
        assert scores.errors.tolist() == [errors]
    with pytest.raises(KDError):
        read_scores(path, 140.0)


def test_time_stamps_between_the_lines_are_passed_over(write_recogs):
    path = write_recogs(PAIRS[:1])
    path.write_text(path.read_text("utf8") + "b:\ttimestamp_hyp=[0.1, 0.2]\n", "utf8")
    assert read_scores(path, 66.67).errors.tolist() == [2]


def test_a_cut_of_several_utterances_has_each(write_recogs):
    pairs = [("a", "two", "two"), ("a", "one", "x")]
    scores = read_scores(write_recogs(pairs), 50.0)
    assert (scores.ids, scores.references) == (["a", "a"], ["one", "two"])
    assert scores.errors.tolist() == [1, 0]


@pytest.mark.parametrize("errs", [ICEFALL, DIGITS, None], ids=["icefall", "digits", ""])
def test_another_rate_than_the_summarys_is_refused(write_recogs, errs):
    path = write_recogs(PAIRS, errs=errs)
    said = r"has 3 errors in 4 words \(75.00 %\), and the result beside it is 74.00 %"
    with pytest.raises(KDError, match=f"{path.name} {said}.*decode again, or remove"):
        read_scores(path, 74.0)


@pytest.mark.parametrize(
    "errs",
    [
        DIGITS.replace("3 / 4", "6 / 8"),
        ICEFALL.replace("over 4", "over 40").replace("1 ins", "28 ins"),
    ],
)
def test_other_counts_than_the_errs_files_are_refused(write_recogs, errs):
    """As of transcripts of half of the test set."""
    path = write_recogs(PAIRS, errs=errs)
    with pytest.raises(KDError, match=r"has 3 errors in 4 words.*(6|30) errors in"):
        read_scores(path, 75.0)


@pytest.mark.parametrize(
    "text, line",
    [
        ("a:\tref=['x']\n", 2),
        ("a:\thyp=['x']\n", 1),
        ("a:\tref=['x']\nb:\thyp=['x']\n", 2),
        ("a:\tref=['x']\na:\tref=['x']\n", 2),
        ("a:\tref=['x'\na:\thyp=['x']\n", 1),
        ("a:\tref=[1]\na:\thyp=['x']\n", 1),
        ("a:\tref=['x']\na:\thyp=['x']\nnothing\n", 3),
    ],
)
def test_a_damaged_file_is_refused_by_its_line(tmp_path, text, line):
    path = tmp_path / "recogs-test-epoch-1-avg-1.txt"
    path.write_text(text)
    with pytest.raises(KDError, match=f"{path.name} is damaged at line {line}"):
        read_scores(path, 0.0)


@pytest.mark.parametrize("text", ["", "a:\tref=[]\na:\thyp=['x']\n"])
def test_transcripts_without_a_word_are_refused(tmp_path, text):
    path = tmp_path / "recogs-test-epoch-1-avg-1.txt"
    path.write_text(text)
    with pytest.raises(KDError, match="without a word of reference"):
        read_scores(path, 0.0)


@pytest.mark.parametrize(
    "name, setting, found",
    [
        ("test-clean-greedy_search-epoch-3-avg-1", "greedy_search", True),
        ("test-clean_greedy_search_epoch-3-avg-1", "greedy_search", True),
        ("test-clean-epoch-3-avg-1", "greedy_search", True),
        ("test-clean-beam_4-epoch-3-avg-1", "beam_4", True),
        ("test-clean-beam_8-epoch-3-avg-1", "beam_4", False),
        ("test-other-greedy_search-epoch-3-avg-1", "greedy_search", False),
        ("test-clean-greedy_search-epoch-4-avg-1", "greedy_search", False),
        ("test-clean-greedy_search-epoch-3-avg-1-x", "greedy_search", False),
    ],
)
def test_transcripts_are_those_of_set_setting_and_suffix(
    write_recogs, name, setting, found
):
    path = write_recogs(PAIRS, name)
    rates = {"test-clean": ErrorRate(75.0, setting)}
    made = Decoding("m", "wer", "epoch-3-avg-1", rates, folder=path.parent)
    assert made.transcripts("test-clean") == (path if found else None)


def test_of_several_settings_the_best_has_its_own_file(write_recogs):
    rates = {"test": ErrorRate(75.0, "beam_4", settings=2)}
    path = write_recogs(PAIRS, "test-epoch-3-avg-1")
    made = Decoding("m", "wer", "epoch-3-avg-1", rates, folder=path.parent)
    assert made.transcripts("test") is None
    path = write_recogs(PAIRS, "test-beam_4-epoch-3-avg-1")
    assert made.transcripts("test") == path

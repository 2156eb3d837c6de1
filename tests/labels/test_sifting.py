"""labels/sifting.py: what is kept, what it becomes, and what is counted."""

import math

import pytest
from lhotse import CutSet

from icefall_kd.errors import KDError
from icefall_kd.kinds.nbest import read_nbest
from icefall_kd.labels import filters
from icefall_kd.labels.pseudo_label import PseudoLabel, put
from icefall_kd.labels.sifting import Sieve, sift
from icefall_kd.labels.text import TextRules
from icefall_kd.tokens import load_tokenizer

pytest.importorskip("kaldialign")

SOURCE = {"teacher": "t", "settings": {}}


@pytest.fixture
def labelled(make_cut, tmp_path):
    """Write a manifest: for each cut the original text and what was said."""

    def make(texts, name="labelled.jsonl", **more):
        cuts = []
        for i, (original, said) in enumerate(texts):
            cut = make_cut(f"c{i}", 100, text=original)
            label = PseudoLabel(said, {"token": -0.1 * i}, **more)
            cuts.append(put(cut, label, SOURCE))
        path = tmp_path / name
        CutSet.from_cuts(cuts).to_file(path)
        return str(path)

    return make


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.txt"
    path.write_text("lower\n[.,]\t\n", "utf8")
    return TextRules(str(path))


def kept(path):
    return {cut.id: cut.supervisions[0].text for cut in CutSet.from_file(path)}


def test_each_filter_counts_what_it_drops_and_what_no_other_would(
    labelled, rules, tmp_path
):
    path = labelled(
        [("a b", "A b."), ("a b", "x, y"), ("a b", ""), (None, "Z z"), ("a b", "a 7")]
    )
    used = [
        filters.not_empty(),
        filters.only_characters("a-z"),
        filters.error_rate_below(50, "WER"),
    ]
    out = tmp_path / "out.jsonl.gz"
    outcome = sift(path, out, Sieve(used, rules))
    assert kept(out) == {"c0": "a b", "c3": "z z"}
    assert outcome.dropped == {"empty": 1, "characters": 1, "WER": 2}
    assert outcome.alone == {"empty": 1, "WER": 1}
    assert outcome.first["empty"] == "c2: no text"
    assert (outcome.kept, outcome.cuts) == (2, 5)
    assert outcome.of_all.percent == 100 * (0 + 2 + 2 + 1) / 8
    assert outcome.of_kept.percent == 0
    assert outcome.rows()[2] == ("characters", "c4: the characters '7'", "1", "0")
    sentence = outcome.sentence("WER")
    assert sentence.startswith("2 of 5 cuts kept, 2.0 s of 5.0 s (40.0 %); WER of the ")


def test_what_was_said_stays_so_that_filters_can_be_changed(labelled, rules, tmp_path):
    path = labelled([("A", "A."), ("B", "B,")])
    sift(path, tmp_path / "one.jsonl", Sieve([filters.not_empty()], rules))
    again = Sieve([filters.not_empty()], TextRules(""))
    sift(str(tmp_path / "one.jsonl"), tmp_path / "two.jsonl", again)
    assert kept(tmp_path / "one.jsonl") == {"c0": "a", "c1": "b"}
    assert kept(tmp_path / "two.jsonl") == {"c0": "A.", "c1": "B,"}
    for cut in CutSet.from_file(tmp_path / "one.jsonl"):
        label = cut.supervisions[0].custom["kd_label"]
        assert label["rules"] == rules.digest and label["original"] in ("A", "B")


def test_another_teachers_labels_are_compared(labelled, rules, tmp_path):
    path = labelled([(None, "a b"), (None, "a b c d")])
    other = labelled([(None, "A, b"), (None, "a b c x")], "other.jsonl")
    judge = filters.differs_below(25, "agreement", "other_words")
    outcome = sift(path, tmp_path / "o.jsonl", Sieve([judge], rules), other)
    assert kept(tmp_path / "o.jsonl") == {"c0": "a b"}
    assert outcome.first["agreement"] == "c1: 25.0 % differ from 'a b c x'"


@pytest.mark.parametrize("count", [1, 3])
def test_labels_of_other_cuts_are_refused(labelled, rules, tmp_path, count):
    path = labelled(2 * [(None, "a")])
    other = labelled(count * [(None, "a")], "other.jsonl")
    judge = filters.differs_below(25, "agreement", "other_words")
    with pytest.raises(KDError, match="two labellings of the same manifest"):
        sift(path, tmp_path / "new" / "o.jsonl", Sieve([judge], rules), other)
    assert not (tmp_path / "new").exists()


def test_nothing_kept_is_refused_and_nothing_written(labelled, rules, tmp_path):
    path = labelled([("a", ""), ("a", "")])
    out, page = tmp_path / "new" / "o.jsonl", str(tmp_path / "page.md")
    with pytest.raises(KDError, match="none of the 2 cuts .* as c0: no text: loosen"):
        sift(path, out, Sieve([filters.not_empty()], rules), page=page)
    assert sorted(p.name for p in tmp_path.glob("*.*")) == [
        "labelled.jsonl",
        "rules.txt",
    ]
    assert not out.parent.exists()


def test_a_manifest_without_labels_is_refused(make_cut, rules, tmp_path):
    path = tmp_path / "in.jsonl"
    CutSet.from_cuts([make_cut("c0", 50)]).to_file(path)
    with pytest.raises(KDError, match="the cut c0 has no pseudo-label"):
        sift(str(path), tmp_path / "o.jsonl", Sieve([filters.not_empty()], rules))


def test_the_page_has_each_dropped_cut_with_its_reasons(labelled, rules, tmp_path):
    path = labelled([("a", "a"), ("x|y\nz", "b | b"), (None, "")])
    used = [filters.not_empty(), filters.error_rate_below(50, "WER")]
    page = tmp_path / "page.md"
    sift(path, tmp_path / "o.jsonl", Sieve(used, rules), page=str(page))
    lines = page.read_text("utf8").splitlines()
    assert lines[0] == "# Pseudo-labels that were dropped"
    assert lines[2].startswith("1 of 3 cuts kept")
    assert lines[-2:] == [
        "| c1 | 1.00 | WER: WER 150.0 % | b \\| b | x\\|y z |",
        "| c2 | 1.00 | empty: no text |  |  |",
    ]
    assert "| WER | c1: WER 150.0 % | 1 | 1 |" in lines


def test_the_texts_of_an_nbest_list_become_the_students_too(
    labelled, rules, tmp_path, bpe_models
):
    nbest = [("A b", -0.5), ("a, b", -1.5), ("a β", -2.0), (".", -3.0), ("b", -4.0)]
    path = labelled([(None, "A b")], nbest=nbest)
    sp = load_tokenizer(bpe_models.ab)
    used = [filters.not_empty(), filters.has_tokens(sp)]
    sift(path, tmp_path / "o.jsonl", Sieve(used, rules, tokenizer=sp))
    (cut,) = CutSet.from_file(tmp_path / "o.jsonl")
    (first, second) = read_nbest(cut)
    both = math.log(math.exp(-0.5) + math.exp(-1.5))
    assert first[0] == "a b" and first[1] == pytest.approx(both)
    assert second == ("b", -4.0)


def test_texts_of_characters_are_compared_by_characters(labelled, rules, tmp_path):
    path = labelled([("一 二 三 四", "一二三"), ("一二", "一 二")])
    used = [filters.error_rate_below(25.1, "CER")]
    outcome = sift(path, tmp_path / "o.jsonl", Sieve(used, rules, "CER"))
    assert outcome.kept == 2 and outcome.of_all.percent == 100 / 6

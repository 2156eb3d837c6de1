"""labels/text.py: rules that rewrite a teacher's text, and what tokens lack."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icefall_kd.errors import KDError
from icefall_kd.labels.text import TextRules, unknown_parts
from icefall_kd.tokens import load_tokenizer


@pytest.fixture
def rules(tmp_path):
    def make(text, encoding="utf8"):
        path = tmp_path / "rules.txt"
        path.write_bytes(text.encode(encoding))
        return TextRules(str(path))

    return make


def test_steps_are_done_in_their_order(rules):
    first = rules("# words\n\nupper\n7\tSEVEN\n[^A-Z' ]\t \n")
    assert first("Six 7, it's  \tall.") == "SIX SEVEN IT'S ALL"
    later = rules("[^A-Z' ]\t \nupper\n")
    assert later("SIx 7.") == "SI"


def test_groups_unicode_and_nothing_behind_the_tab(rules):
    assert rules(r"(\w)-(\w)" + "\t\\2\\1")("a-b") == "ba"
    assert rules("nfkc\nlower\n[。,]\t\n", "utf-8-sig")("ＡＢ，你好。") == "ab你好"
    assert rules("nfc")("e\u0301") == "\u00e9"


def test_no_rules_leave_a_text_but_for_its_blanks():
    assert TextRules("")("  Ab \n c ") == "Ab c" and TextRules("").digest == ""


@given(st.text(max_size=30))
def test_a_text_that_was_rewritten_stays(text):
    rewrite = TextRules("")
    assert rewrite(rewrite(text)) == rewrite(text)


@pytest.mark.parametrize(
    "line, fault",
    [
        ("uper", "line 2 of the rules"),
        ("(\tx", "can't be used"),
        ("a\t\\3", "can't be used"),
        ("a\t\\g<name>", "can't be used"),
    ],
)
def test_a_line_that_is_no_rule_is_refused_by_its_number(rules, line, fault):
    with pytest.raises(KDError, match=fault) as e:
        rules("lower\n" + line)
    assert "line 2" in str(e.value)


def test_a_file_that_is_no_text_is_refused(rules, tmp_path):
    with pytest.raises(KDError, match="UnicodeDecodeError"):
        rules("ä\tx", "latin-1")
    with pytest.raises(KDError, match="FileNotFoundError"):
        TextRules(str(tmp_path / "none"))


def test_the_digest_is_that_of_the_file(rules):
    assert rules("lower").digest == rules("lower").digest != rules("upper").digest


def test_what_a_bpe_model_can_not_write_is_named(bpe_models):
    sp = load_tokenizer(bpe_models.ab)
    assert unknown_parts(sp, "ab ba") == []
    assert unknown_parts(sp, "aβb") == ["β"]


def test_what_characters_lack_is_named(tmp_path):
    (tmp_path / "tokens.txt").write_text("<blk> 0\n一 1\n二 2\n", "utf8")
    tokenizer = load_tokenizer(tmp_path)
    assert unknown_parts(tokenizer, "一 二") == []
    assert unknown_parts(tokenizer, "一三x") == ["x", "三"]

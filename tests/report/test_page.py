"""Blocks as Markdown, HTML and lines."""

import re
from string import Formatter

import pytest

from icefall_kd.report.page import (
    Bullets,
    Heading,
    Plots,
    Table,
    Text,
    to_html,
    to_markdown,
)
from icefall_kd.report.words import LANGUAGES, words_of

EN, ZH = map(words_of, LANGUAGES)

SVG = '<svg><defs><path id="m1"/></defs><g id="axes_1"><use href="#m1"/></g></svg>'
HARD = "<b>a|b*c_d_</b> & `e` [f](http://g) \\ #h"


def test_markdown_shows_any_text_as_it_is():
    text = to_markdown(HARD, [Text(HARD), Bullets([HARD])], "")
    shown = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text).replace("&amp;", "&")
    assert shown.count(HARD) == 3
    assert not re.search(r"(?<!\\)[<>|*`\[\]]", text)
    assert "c_d\\_" in text  # within a word an underscore means nothing


def test_a_markdown_table_has_its_numbers_to_the_right():
    table = Table(["a", "b", "c"], [["x|y", "z", "1"]], left=2)
    assert to_markdown("t", [Heading("h"), table], "f").splitlines() == [
        *("### t", "", "#### h", ""),
        *("| a | b | c |", "| --- | --- | ---: |", "| x\\|y | z | 1 |", "", "f"),
    ]


def test_a_name_with_line_ends_stays_in_its_row():
    table = Table(["a"], [["x\ny"]])
    assert "| x y |" in to_markdown("t", [table], "")


def test_markdown_has_no_plots():
    plots = Plots([("loss", SVG)], "n")
    assert to_markdown("t", [plots], "f") == "### t\n\nf\n"


def test_html_escapes_all_that_it_is_given():
    blocks = [Text(HARD), Bullets([HARD]), Table([HARD], [[HARD]]), Heading(HARD)]
    blocks.append(Plots([(HARD, SVG)], HARD))
    page = to_html(HARD, blocks, HARD, '"x"')
    assert "<b>" not in page and "</b>" not in page
    assert "&lt;b&gt;" in page and 'lang="&quot;x&quot;"' in page


def test_an_interval_of_a_cell_stays_on_one_line():
    table = Table(["a b", "WER [c d]"], [["x y", "30.4 [27.7, 33.1]"]])
    page = to_html("t", [table], "f", "en")
    assert ">30.4 [27.7,\u00a033.1]<" in page and ">x y<" in page
    assert "[27.7, 33.1]" in to_markdown("t", [table], "f").replace("\\", "")


def test_figures_of_one_page_have_ids_of_their_own():
    page = to_html("t", [Plots([("a", SVG)]), Plots([("b", SVG)])], "f", "en")
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) == 2
    assert re.findall(r'href="#([^"]*)"', page) == ids


def test_a_page_names_its_language_and_its_letters():
    page = to_html("题", [Text("文")], "脚", "zh-CN")
    assert '<html lang="zh-CN">' in page and '<meta charset="utf-8">' in page
    assert "<title>题</title>" in page


# Words


@pytest.mark.parametrize("key", EN)
def test_both_languages_ask_for_the_same_things(key):
    en, zh = (
        {name for _, name, _, _ in Formatter().parse(words[key]) if name}
        for words in (EN, ZH)
    )
    assert en == zh


def test_every_word_is_used():
    import icefall_kd.cli.report as command
    from icefall_kd.report import costs, models, notes, rates, tables

    modules = (command, costs, models, notes, rates, tables)
    used = "".join(open(m.__file__, encoding="utf8").read() for m in modules)
    assert [k for k in EN if f'"{k}"' not in used] == []


def test_chinese_words_are_chinese():
    assert {k for k in EN if EN[k] == ZH[k]} <= {"checkpoint"}

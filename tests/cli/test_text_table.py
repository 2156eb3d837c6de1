"""Columns of a terminal."""

from icefall_kd.cli.text_table import text_table


def test_columns_are_aligned_where_letters_are_wide():
    lines = text_table([["模型", "WER"], ["a", "5.25"], ["教师", "12.5"]])
    assert lines.splitlines() == ["模型   WER", "a     5.25", "教师  12.5"]


def test_columns_of_words_are_aligned_to_the_left():
    lines = text_table([["a", "b", "c"], ["xx", "yy", "123"], ["x", "", ""]], left=2)
    assert lines.splitlines() == ["a   b     c", "xx  yy  123", "x"]

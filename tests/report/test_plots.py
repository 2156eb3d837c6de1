"""Curves and bars as SVG."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from icefall_kd.report.bootstrap import Interval
from icefall_kd.report.plots import (
    COLOURS,
    MARKS,
    POINTS,
    draw_legend,
    draw_loss,
    draw_rates,
    draw_weights,
    thinned,
)

pytest.importorskip("matplotlib")

CURVE = [(i / 10, 3 - i / 10) for i in range(20)]
DRAWN = {
    "loss": lambda: draw_loss([(0, CURVE), (2, CURVE)], [(0, CURVE[::5])], "epochs"),
    "weights": lambda: draw_weights({"hard": CURVE, "ctc": CURVE}, "epoch 数"),
    "legend": lambda: draw_legend(["a", "模型"]),
    "rates": lambda: draw_rates([("g, test", [5.0, math.nan])], ["a", "b"], "WER (%)"),
}


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawing_is_one_svg_element_that_asks_for_nothing(name):
    svg = DRAWN[name]()
    assert ET.fromstring(svg).tag.endswith("svg")
    assert svg.startswith("<svg")
    found = re.findall(r'(?:href|src)="([^"]*)"', svg)
    found += re.findall(r"url\(([^)]*)\)", svg)
    assert found and all(link.startswith("#") for link in found)
    assert "<metadata" not in svg and "@import" not in svg


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_numbers_give_the_same_bytes(name):
    assert DRAWN[name]() == DRAWN[name]()


@pytest.mark.parametrize("number", range(3))
def test_a_models_colour_is_that_of_its_number(number):
    svg = draw_loss([(number, CURVE)], [], "x").lower()
    others = {c.lower() for c in COLOURS[1:]} - {COLOURS[number].lower()}
    assert COLOURS[number].lower() in svg or number == 0
    assert not any(colour in svg for colour in others)


def test_words_stay_text_in_the_readers_letters():
    assert "epoch 数" in texts(DRAWN["weights"]())


def test_a_legend_has_each_name_and_its_colour():
    svg = draw_legend(["a $x$", "模型"])
    assert texts(svg) == ["a $x$", "模型"] and COLOURS[1].lower() in svg.lower()


def test_a_name_is_never_a_formula():
    svg = draw_rates([("g_$1$", [5.0])], ["K $a_1$ <b>"], "x")
    assert "g_$1$" in texts(svg)
    assert "5.00  K $a_1$ &lt;b&gt;" in texts(svg)


def test_an_interval_is_a_line_that_the_label_leaves_free():
    groups = [("g, test", [5.0, 4.0])]
    plain = draw_rates(groups, ["a", "b"], "x")
    assert draw_rates(groups, ["a", "b"], "x", [[None, None]]) == plain
    svg = draw_rates(groups, ["a", "b"], "x", [[Interval(4.0, 6.0), None]])
    assert svg.count("#888888") > 0 == plain.count("#888888")
    assert texts(svg)[-2:] == ["5.00  a", "4.00  b"]


def test_bars_of_models_without_a_rate_are_left_out():
    assert [t for t in texts(DRAWN["rates"]()) if "  " in t] == ["5.00  a"]


@pytest.mark.parametrize(
    "curves",
    [
        [(0, [(0.0, math.nan), (1.0, math.inf)])],
        [(0, [(0.5, 2.0)])],
        [(0, [(0.0, 0.0), (1.0, 0.0)])],
        [(0, [(0.0, -1.0), (1.0, 200.0)])],
        [],
    ],
    ids=["no number", "one point", "zeros", "negative", "none"],
)
def test_strange_curves_are_drawn(curves):
    ET.fromstring(draw_loss(curves, [], "x"))


def test_a_wide_range_has_a_logarithmic_axis():
    narrow = draw_loss([(0, [(0.0, 10.0), (1.0, 1.0)])], [], "x")
    wide = draw_loss([(0, [(0.0, 10.0), (1.0, 0.1)])], [], "x")
    assert "0.2" in texts(wide) and "0.5" in texts(wide)
    assert "0.5" not in texts(narrow)


def test_a_long_curve_is_thinned_evenly_and_keeps_its_ends():
    series = [(float(i), 1.0) for i in range(10 * POINTS)]
    found = thinned(series)
    assert len(found) == POINTS
    assert (found[0], found[-1]) == (series[0], series[-1])
    steps = {b[0] - a[0] for a, b in zip(found, found[1:])}
    assert steps <= {10.0, 11.0}
    assert thinned(series[:POINTS]) == series[:POINTS]
    assert len(thinned(series, MARKS)) == MARKS

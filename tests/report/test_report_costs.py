"""Error rates against costs: which points are drawn."""

import math
from types import SimpleNamespace

import pytest

from icefall_kd.report.comparison import Comparison, Model, Run, TestAudio
from icefall_kd.report.costs import cost_plots, draw_cost_plots
from icefall_kd.report.plots import COLOURS, styled
from icefall_kd.report.results import Decoding, DecodingLog, ErrorRate
from icefall_kd.report.words import words_of


def run(name, percent, parameters=None, seconds=None, trained=None):
    log = DecodingLog("2025", {"test": seconds} if seconds else {})
    decoding = Decoding("greedy_search", "wer", "epoch-3_avg-1", log=log)
    if percent is not None:
        decoding.rates["test"] = ErrorRate(percent, "greedy_search")
    training = SimpleNamespace(
        parameters=parameters, seconds_until={"epoch-3": trained}.get
    )
    return Run(name, name, training, [decoding], [])


def compare(models, seconds=None):
    models = [Model(name, runs) for name, runs in models.items()]
    audio = TestAudio("fbank", {"test": seconds} if seconds else {})
    return Comparison(models, "", "", "WER", audio, {}, words_of("en"))


@pytest.fixture
def report():
    return compare(
        {
            "big": [run("big", 4.0, 1000, 20.0, 300.0)],
            "small": [run("small", 8.0, 10, 2.0), run("small 2", 6.0, 10, 4.0)],
        }
    )


def points(row):
    return {p.cost: [(q.model, q.cost, q.percent) for q in p.points] for p in row}


def test_a_point_has_means_over_seeds_and_only_costs_that_are_known(report):
    (row,) = cost_plots(report, ["wer"])
    assert points(row) == {
        "parameters": [(0, 1000, 4.0), (1, 10, 7.0)],
        "decoding_axis": [(0, 20.0, 4.0), (1, 3.0, 7.0)],
        "seconds": [(0, 300.0, 4.0)],
    }


def test_real_time_factors_stand_in_place_of_seconds(report):
    report.audio.seconds["test"] = 40.0
    (row,) = cost_plots(report, ["wer"])
    assert points(row)["rtf_axis"] == [(0, 0.5, 4.0), (1, pytest.approx(0.075), 7.0)]
    assert "decoding_axis" not in points(row)


def test_a_model_without_a_rate_has_no_point_and_without_costs_there_is_no_plot():
    report = compare({"a": [run("a", 5.0, 9)], "b": [run("b", None, 9)]})
    (row,) = cost_plots(report, ["wer"])
    assert points(row) == {"parameters": [(0, 9, 5.0)]}
    assert cost_plots(compare({"a": [run("a", 5.0)]}), ["wer"]) == []
    assert cost_plots(report, ["cer"]) == cost_plots(report, []) == []


def test_points_are_drawn_where_they_are_in_the_colour_of_their_model(report):
    pytest.importorskip("matplotlib")
    rows = cost_plots(report, ["wer"])
    with styled():
        figure = draw_cost_plots(rows, report.names, report.words)
    parameters, decoding, training = figure.axes
    at = [
        (float(x), float(y))
        for x, y in (line.get_xydata()[0] for line in parameters.lines)
    ]
    assert at == [(1000, 4.0), (10, 7.0)]
    colours = [line.get_markeredgecolor() for line in parameters.lines]
    assert colours == list(COLOURS[:2])
    assert parameters.get_xscale() == "log" and decoding.get_xscale() == "linear"
    assert parameters.get_ylabel() == "test: WER (%)"
    assert training.get_xlabel() == "training seconds"
    assert all(math.isfinite(x) for x in decoding.get_xlim())
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["big", "small"]


def test_test_sets_of_both_kinds_have_rows_with_their_own_unit():
    cer = run("a", 3.0, 9)
    cer.decodings[0].kind = "cer"
    both = run("a", 5.0, 9)
    both.decodings += cer.decodings
    rows = cost_plots(compare({"a": [both]}), ["wer", "cer"])
    assert [(r[0].unit, r[0].points[0].percent) for r in rows] == [
        ("WER", 5.0),
        ("CER", 3.0),
    ]

"""``benchmarks/forecast.py``: predictions against what training gave."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from icefall_kd.errors import KDError
from icefall_kd.forecast.measures import HeadMeasures, Interval, Measures, ModelMeasures
from icefall_kd.forecast.model import SITUATIONS, fit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark():
    path = ROOT / "benchmarks" / "forecast.py"
    spec = importlib.util.spec_from_file_location("benchmark_forecast", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(name, teacher, without, with_kd, situation="converged"):
    return {
        "name": name,
        "situation": situation,
        "teacher": {"ctc": teacher},
        "without": {"ctc": without},
        "with": {"ctc": with_kd},
    }


@pytest.fixture
def read(benchmark, tmp_path):
    def of(runs):
        path = tmp_path / "runs.json"
        path.write_text(json.dumps(runs))
        return benchmark.read_runs(path)

    return of


def test_the_numbers_in_the_code_are_those_fitted_to_the_tables(benchmark):
    """Else run benchmarks/forecast.py and copy what it prints."""
    runs = benchmark.read_runs(ROOT / "benchmarks" / "forecast_digits.json")
    for name, numbers in benchmark.fit_situations(runs).items():
        shown = SITUATIONS[name]
        assert shown.points == numbers.points
        for field in ("slope", "cost", "spread"):
            value = getattr(numbers, field)
            assert getattr(shown, field) == pytest.approx(value, abs=0.005), name


def test_the_tables_are_those_of_the_results():
    text = (ROOT / "egs/digits/ASR/RESULTS.md").read_text("utf8")
    runs = json.loads((ROOT / "benchmarks" / "forecast_digits.json").read_text())
    for run in runs:
        for model in ("teacher", "without", "with"):
            for wer in run[model].values():
                assert f"{wer:.2f}" in text, (run["name"], wer)


def test_a_fit_finds_the_line_that_points_lie_on():
    gaps = (0.1, 0.4, 0.9, 1.3)
    found = fit([(g, 0.1 - 0.5 * g) for g in gaps], with_cost=True)
    assert (found.slope, found.cost) == pytest.approx((0.5, 0.1))
    through_0 = fit([(g, -0.5 * g) for g in gaps], with_cost=False)
    assert (through_0.slope, through_0.cost) == pytest.approx((0.5, 0.0))
    assert found.spread == 0.1  # the least
    assert fit([(g, 0.2 * g) for g in gaps], with_cost=True).slope == 0.0
    assert fit([(0.1, 0.2), (0.2, 0.1)], with_cost=True) is None


def test_each_run_is_predicted_by_the_others(benchmark, read):
    """Three on a line, and one far from it: it does not predict itself."""
    runs = [run_of(str(i), 10, 10 * 2**i, 10 * 2 ** (i / 2)) for i in (1, 2, 3)]
    runs.append(run_of("far", 10, 40, 38))
    rows = benchmark.compare(read(runs))
    assert [row["run"] for row in rows] == ["1", "2", "3", "far"]
    assert rows[3]["measured"] == pytest.approx(0.95)
    assert rows[3]["gap"] == pytest.approx(math.log(4))
    alone = rows[3]["leave one out"]
    assert alone["value"] == pytest.approx(0.5) and not alone["right"]
    in_code = math.exp(-SITUATIONS["converged"].slope * math.log(4))
    assert rows[3]["in code"]["value"] == pytest.approx(in_code)
    assert rows[0]["leave one out"]["value"] > 2**-0.5
    text = benchmark.report(read(runs), rows)
    assert "| far (converged) | ctc | 4.00 | 0.95 |" in text and "wrong" in text


def test_a_run_with_measures_has_the_gap_and_the_advice_of_these(
    benchmark, read, tmp_path
):
    gap = Interval(0.0, -0.2, 0.2)
    heads = {"ctc": HeadMeasures(1.0, Interval(20, 18, 22), 0.1)}
    model = ModelMeasures(3, 10, heads)
    measures = Measures(9, 90, model, None, (model,), 3, {"ctc": gap}, worse=0.2)
    (tmp_path / "m.json").write_text(json.dumps({"measures": measures.as_dict()}))
    outcome = {"without": {"ctc": 20.0}, "with": {"ctc": 21.0}}
    runs = read([{"name": "a", "measures": "m.json", **outcome}])
    assert (runs[0].situation, runs[0].answer) == ("falling", "no")
    assert runs[0].gaps["ctc"] == gap
    assert benchmark.advice_is_right(runs[0]) is True
    rows = benchmark.compare(runs)
    assert "Advice: right in 1 of 1 runs." in benchmark.report(runs, rows)


@pytest.mark.parametrize(
    "runs, message",
    [
        ({}, "is no list of runs"),
        ([{"name": "a"}], "run 0 of .* can't be used \\(KeyError: 'without'\\)"),
        ([run_of("a", 1, 2, 3, "odd")], "the situation of a is 'odd', and must be one"),
        ([run_of("a", 0, 2, 3)], "run 0 of .* can't be used \\(ZeroDivisionError"),
    ],
)
def test_bad_lists(read, runs, message):
    with pytest.raises(KDError, match=message):
        read(runs)

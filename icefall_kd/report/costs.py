"""Error rates beside what a model costs: parameters, decoding and training."""

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from icefall_kd.report.bootstrap import Interval
from icefall_kd.report.comparison import Comparison, Model
from icefall_kd.report.models import real_time_factor
from icefall_kd.report.plots import COLOURS, MARKERS

WIDE = 20  # the ratio of costs from which on their axis is logarithmic


@dataclass(frozen=True)
class CostPoint:
    """An error rate of a model, and what one thing cost.

    Args:
      model: The model's number.
      method: Of decoding.
      cost: A mean over seeds.
      percent: The error rate, a mean over seeds.
      interval: Its interval, or None.
    """

    model: int
    method: str
    cost: float
    percent: float
    interval: Optional[Interval] = None


@dataclass(frozen=True)
class CostPlot:
    """The points of one test set against one cost.

    Args:
      test_set: Its name.
      unit: WER or CER.
      cost: The key of the cost's name among the words of a report.
      points: At least one.
    """

    test_set: str
    unit: str
    cost: str
    points: List[CostPoint]


def cost_plots(report: Comparison, kinds: Sequence[str]) -> List[List[CostPlot]]:
    """The points of each test set, a row with a plot for each cost that is known.

    The costs are parameters; decoding, as a real-time factor where the seconds of the
    test sets are known, else in seconds; and seconds of training.

    Args:
      report: The data.
      kinds: The kinds of summaries, of wer and cer.

    Returns:
      Rows of equal length; [] where no cost is known.
    """
    sets = [(kind, s) for kind in kinds for _, s in report.sets.get(kind, [])]
    rows = []
    for kind, test_set in dict.fromkeys(sets):
        unit = report.unit_of(kind)
        points = {cost: _points(report, kind, test_set, cost) for cost in _COSTS}
        rows.append([CostPlot(test_set, unit, *item) for item in points.items()])
    known = [i for i in range(len(_COSTS)) if any(row[i].points for row in rows)]
    if "rtf_axis" in (rows[0][i].cost for i in known):
        known = [i for i in known if rows[0][i].cost != "decoding_axis"]
    return [[row[i] for i in known] for row in rows] if known else []


def _points(report: Comparison, kind: str, test_set: str, cost: str) -> List[CostPoint]:
    points = []
    for method, name in report.sets[kind]:
        if name != test_set:
            continue
        statistics = report.statistics.get((kind, method, test_set))
        intervals = statistics.intervals if statistics else {}
        for i, model in enumerate(report.models):
            percent = model.percent(method, kind, test_set)
            value = _COSTS[cost](report, model, method, kind, test_set)
            if value is not None and math.isfinite(percent):
                interval = intervals.get(model.name)
                points.append(CostPoint(i, method, value, percent, interval))
    return points


def _parameters(
    report: Comparison, model: Model, method: str, kind: str, test_set: str
) -> Optional[float]:
    return model.parameters


def _rtf(
    report: Comparison, model: Model, method: str, kind: str, test_set: str
) -> Optional[float]:
    return _mean([real_time_factor(run, method, report.audio) for run in model.runs])


def _decoding(
    report: Comparison, model: Model, method: str, kind: str, test_set: str
) -> Optional[float]:
    logs = [
        next((d.log for d in run.decodings if d.method == method and d.log), None)
        for run in model.runs
    ]
    return _mean([log.seconds.get(test_set) if log else None for log in logs])


def _training(
    report: Comparison, model: Model, method: str, kind: str, test_set: str
) -> Optional[float]:
    """Until the checkpoint that was decoded."""
    seconds: List[Optional[float]] = []
    for run in model.runs:
        decoded = [d for d in run.decodings if (d.method, d.kind) == (method, kind)]
        known = run.training and decoded
        saved = decoded[0].saved_as if decoded else ""
        seconds.append(run.training.seconds_until(saved) if known else None)
    return _mean(seconds)


def _mean(values: Sequence[Optional[float]]) -> Optional[float]:
    """None where a seed has no value, or where clocks are too coarse for one."""
    return mean(values) if values and all(values) else None


# By the key of its name among the words of a report.
_COSTS: Dict[str, Callable[..., Optional[float]]] = {
    "parameters": _parameters,
    "rtf_axis": _rtf,
    "decoding_axis": _decoding,
    "seconds": _training,
}


def draw_cost_plots(
    rows: Sequence[Sequence[CostPlot]], names: Sequence[str], words: Any
) -> Any:
    """Draw error rates against costs, a row of plots for each test set.

    A model has its colour, and a decoding method its mark; a line shows the interval.

    Args:
      rows: Of :func:`cost_plots`, at least one.
      names: The models' names, by their numbers.
      words: Those of the report in one language.

    Returns:
      A figure, drawn while :func:`icefall_kd.report.plots.styled` holds.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = len(rows[0])
    figure = Figure(figsize=(0.6 + 3.0 * columns, 3.2 * len(rows)))
    grid = figure.subplots(len(rows), columns, sharey="row", squeeze=False)
    plots = [plot for row in rows for plot in row]
    methods = sorted({point.method for plot in plots for point in plot.points})
    for row, of_row in zip(rows, grid):
        for plot, axes in zip(row, of_row):
            _draw_points(axes, plot, methods)
            axes.set_xlabel(words[plot.cost])
        of_row[0].set_ylabel(f"{row[0].test_set}: {row[0].unit} (%)")
    colours = [Patch(color=COLOURS[i % len(COLOURS)]) for i in range(len(names))]
    marks = [Line2D([], [], **_mark(0, i)) for i in range(len(methods))]
    figure.tight_layout()
    place = {"bbox_to_anchor": (1, 0.95), "loc": "upper left", "frameon": False}
    handles = [*colours, *marks] if len(methods) > 1 else colours
    figure.legend(handles, [*names, *methods][: len(handles)], **place)
    return figure


def _draw_points(axes: Any, plot: CostPlot, methods: Sequence[str]) -> None:
    for point in plot.points:
        mark = _mark(point.model, methods.index(point.method))
        if point.interval:
            ends = (point.interval.low, point.interval.high)
            axes.plot([point.cost] * 2, ends, color=mark["mec"], lw=1.2)
        axes.plot(point.cost, point.percent, **mark)
    costs = [point.cost for point in plot.points]
    if costs and max(costs) > WIDE * min(costs):
        axes.set_xscale("log")
    elif costs:
        axes.set_xlim(0, 1.12 * max(costs))
        axes.locator_params(axis="x", nbins=5)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(_short)


def _short(value: float, _: Tuple[int, ...]) -> str:
    """A number of an axis, such as 1.5 M."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _mark(model: int, method: int) -> Dict[str, Any]:
    colour = COLOURS[model % len(COLOURS)]
    style = {"marker": MARKERS[method % len(MARKERS)], "mec": colour, "ls": "none"}
    return {**style, "mfc": colour if method == 0 else "white", "ms": 7, "mew": 1.4}

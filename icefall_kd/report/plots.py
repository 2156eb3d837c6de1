"""Curves and bars as SVG inside a page; equal numbers give equal bytes."""

import io
import math
import re
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from icefall_kd.errors import KDError
from icefall_kd.report.bootstrap import Interval
from icefall_kd.report.logs import Series, weight_names

# A palette for colour-blind readers (Okabe and Ito), the dark colours first.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^DvPX"
DASHES = ("", "6 2", "2 2", "8 2 2 2", "10 3", "4 1 1 1 1 1", "1 3")
POINTS = 500  # at most, of a training curve
MARKS = 30  # at most, of a validation curve
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "icefall_kd",
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "figure.dpi": 72,
    "axes.formatter.useoffset": False,
}


def need_matplotlib() -> None:
    """Refuse to draw without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise KDError(
            f"pictures are drawn by matplotlib, which can't be imported "
            f'({e}): run `pip install "icefall_kd[report]"`'
        ) from None


def thinned(series: Series, points: int = POINTS) -> Series:
    """At most ``points`` points of ``series``, evenly spaced, with the last one."""
    if len(series) <= points:
        return series
    step = (len(series) - 1) / (points - 1)
    return [series[round(i * step)] for i in range(points)]


def draw_loss(
    train: Sequence[Tuple[int, Series]], valid: Sequence[Tuple[int, Series]], x: str
) -> str:
    """Draw the curves of one loss: lines for training, markers for validation.

    Args:
      train: For each model its number, which determines the colour, and its curve.
      valid: The same for the validation.
      x: The label of the horizontal axis.
    """
    with _figure(3.6, 2.5) as (figure, axes):
        figure.subplots_adjust(left=0.17, right=0.97, top=0.96, bottom=0.19)
        plot_loss(axes, train, valid, x)
        return svg_of(figure)


def plot_loss(
    axes: Any,
    train: Sequence[Tuple[int, Series]],
    valid: Sequence[Tuple[int, Series]],
    x: str,
) -> None:
    """Draw the curves of one loss into some axes, as :func:`draw_loss` does.

    Args:
      axes: Those of matplotlib.
      train: For each model its number, which determines the colour, and its curve.
      valid: The same for the validation.
      x: The label of the horizontal axis.
    """
    for i, series in train:
        axes.plot(*zip(*thinned(series)), lw=1.6, **line_of(i))
        finite = [(x, y) for x, y in thinned(series) if math.isfinite(y)]
        if len(finite) == 1:  # a line would not show a single point
            axes.plot(*finite[0], marker="_", **line_of(i))
    for i, series in valid:
        axes.plot(*zip(*thinned(series, MARKS)), **{**marker_of(i), "ls": "none"})
    values = [y for _, s in (*train, *valid) for _, y in s if math.isfinite(y)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        _logarithmic(axes)
    elif values and min(values) >= 0:
        axes.set_ylim(0, 1.06 * max(values) or 1.0)
    _epochs(axes, x)


def draw_loss_grid(
    curves: Sequence[Tuple[str, Dict[int, Series], Dict[int, Series]]],
    numbers: Sequence[int],
    names: Sequence[str],
    x: str,
) -> Any:
    """Draw the curves of all losses, up to three plots in a row.

    Args:
      curves: Of :func:`icefall_kd.report.comparison.loss_curves`, at least one.
      numbers: The model's number of each run.
      names: The models' names, by their numbers.
      x: The label of the horizontal axis.

    Returns:
      A figure, drawn while :func:`styled` holds.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.5 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, *runs) in zip(grid, curves):
        lines, marks = ([(numbers[i], c) for i, c in of.items()] for of in runs)
        plot_loss(axes, lines, marks, x)
        axes.set_title(name, fontsize=10)
    for axes in grid[len(curves) :]:
        axes.set_axis_off()
    figure.tight_layout()
    handles = [
        Line2D([], [], lw=1.6, **{**marker_of(i), **line_of(i)})
        for i in range(len(names))
    ]
    place = {"loc": "upper left", "bbox_to_anchor": (1, 0.97), "handlelength": 4}
    figure.legend(handles, names, frameon=False, **place)
    return figure


def draw_legend(names: Sequence[str]) -> str:
    """Draw the legend of :func:`draw_loss`.

    Args:
      names: The models' names, by their numbers.
    """
    with _figure(1, 0.1) as (figure, axes):
        axes.set_axis_off()
        for i, name in enumerate(names):
            axes.plot([], [], lw=1.6, label=name, **marker_of(i), **line_of(i))
        axes.legend(loc="upper left", frameon=False, handlelength=5, borderpad=0)
        return svg_of(figure, bbox_inches="tight")


def draw_weights(weights: Dict[str, Series], x: str) -> str:
    """Draw one model's weights; later curves are thinner, so that all stay visible.

    Args:
      weights: A curve for each term.
      x: The label of the horizontal axis.
    """
    with _figure(6.4, 2.9) as (figure, axes):
        for term, series in weights.items():
            i = weight_names().index(term)
            width = max(1.2, 5 - 0.8 * i)
            axes.plot(*zip(*thinned(series)), lw=width, label=term, **line_of(i))
        highest = max((w for s in weights.values() for _, w in s), default=0.0)
        axes.set_ylim(0, 1.06 * highest or 1.0)
        _epochs(axes, x)
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, handlelength=4
        )
        return svg_of(figure, bbox_inches="tight")


def draw_rates(
    groups: Sequence[Tuple[str, Sequence[float]]],
    models: Sequence[str],
    x: str,
    intervals: Sequence[Sequence[Optional[Interval]]] = (),
) -> str:
    """Draw bars of each model's error rates, a group for each set and method.

    Args:
      groups: A group's name, and a rate (%) for each model, NaN for a missing one.
      models: The models' names.
      x: The label of the horizontal axis.
      intervals: Of each group, the interval of each rate, or None; () for none at all.
    """
    bars: List[Tuple[float, int, float, Optional[Interval]]] = []
    ticks: List[float] = []
    y = 0.0
    for number, (_, rates) in enumerate(groups):
        ends = intervals[number] if intervals else [None] * len(rates)
        known = [(i, rate) for i, rate in enumerate(rates) if math.isfinite(rate)]
        bars += [(y + k, i, rate, ends[i]) for k, (i, rate) in enumerate(known)]
        ticks.append(y + (len(known) - 1) / 2)
        y += len(known) + 0.8
    ends = [max(rate, interval.high if interval else 0) for *_, rate, interval in bars]
    highest = max(ends, default=0.0) or 1.0
    with _figure(7.0, 0.6 + 0.27 * y) as (figure, axes):
        for (height, i, rate, interval), end in zip(bars, ends):
            colour = COLOURS[i % len(COLOURS)]
            style = {"edgecolor": colour, "hatch": ("", "////", "", "....")[i % 4]}
            style["color"] = "white" if i % 2 else colour
            axes.barh(height, rate, height=0.8, lw=1.2, **style)
            if interval:  # grey is seen on a black bar and beside it
                line = {"color": "#888888", "lw": 1.6, "marker": "|", "ms": 7}
                axes.plot([interval.low, interval.high], [height, height], **line)
            label = f"{rate:.2f}  {models[i]}"
            axes.text(end + 0.01 * highest, height, label, va="center", fontsize=9)
        axes.set_yticks(ticks, [name for name, _ in groups])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.set_xlim(0, 1.05 * highest)
        axes.invert_yaxis()
        axes.set_xlabel(x)
        return svg_of(figure, bbox_inches="tight")


def draw_costs(
    curves: Sequence[Tuple[str, Series]],
    marks: Sequence[Tuple[str, Tuple[float, float]]],
    x: str,
    y: str,
) -> str:
    """Draw error rates by cost: a line for each curve, and single points.

    Args:
      curves: Names, and costs with their error rates.
      marks: Names of single points, and their cost and error rate.
      x: The label of the horizontal axis.
      y: The label of the vertical axis.
    """
    with _figure(6.4, 4.0) as (figure, axes):
        for i, (name, series) in enumerate(curves):
            axes.plot(*zip(*thinned(series)), lw=1.6, label=name, **line_of(i))
        for i, (name, point) in enumerate(marks):
            axes.plot(*point, ls="none", label=name, **{**marker_of(i), "ms": 8})
        axes.set_xlim(left=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
        return svg_of(figure, bbox_inches="tight")


@contextmanager
def styled() -> Iterator[None]:
    """Let matplotlib draw, and save, as all pictures of the project are drawn."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


@contextmanager
def _figure(width: float, height: float) -> Iterator[Tuple[Any, Any]]:
    """A figure of ``width`` by ``height`` inches, and its axes."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots()


def _epochs(axes: Any, x: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=high - low > 2))
    axes.set_xlabel(x)


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def svg_of(figure: Any, **options: Any) -> str:
    """The figure as an <svg> element, without the head and metadata of a file.

    Args:
      figure: Of matplotlib, drawn and saved while :func:`styled` holds.
      options: Those of ``savefig``.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font has no Chinese; the reader's has
        figure.savefig(out, format="svg", metadata={"Date": None}, **options)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r"\s+\n", "\n", text)


def line_of(i: int) -> Dict[str, Any]:
    """The colour and dashes of a model's line.

    Args:
      i: The model's number.
    """
    dash = DASHES[i % len(DASHES)]
    style = (0, tuple(map(float, dash.split()))) if dash else "-"
    return {"color": COLOURS[i % len(COLOURS)], "ls": style}


def marker_of(i: int) -> Dict[str, Any]:
    """The shape and colour of a model's marks.

    Args:
      i: The model's number.
    """
    style = {"marker": MARKERS[i % len(MARKERS)], "mec": COLOURS[i % len(COLOURS)]}
    return {**style, "ms": 5, "mfc": "white", "mew": 1.4}

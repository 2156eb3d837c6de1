"""Curves as SVG that stands inside a page; the same bytes for the same numbers."""

import io
import math
import re
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from icefall_kd.errors import KDError
from icefall_kd.report.logs import WEIGHTS, Series
from icefall_kd.report.page import COLOURS, DASHES, MARKERS

POINTS = 500  # of a curve at most
MARKS = 30  # of a validation's
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
    """Refuse where there is nothing to draw with."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise KDError(
            f"the report's plots are drawn by matplotlib, which can't be imported "
            f'({e}): run `pip install "icefall_kd[report]"`'
        ) from None


def thinned(series: Series, points: int = POINTS) -> Series:
    """At most so many points, evenly taken, with the last one."""
    if len(series) <= points:
        return series
    step = (len(series) - 1) / (points - 1)
    return [series[round(i * step)] for i in range(points)]


def draw_loss(
    train: Sequence[Tuple[int, Series]], valid: Sequence[Tuple[int, Series]], x: str
) -> str:
    """Curves of one loss: lines of training, markers of validation.

    Args:
      train: For each model its number, which gives the colour, and its curve.
      valid: The same of the validation.
      x: What stands below the axis.
    """
    with _figure(3.6, 2.5) as (figure, axes):
        figure.subplots_adjust(left=0.17, right=0.97, top=0.96, bottom=0.19)
        for i, series in train:
            xs, ys = _columns(thinned(series))
            axes.plot(xs, ys, lw=1.6, **_line(i))
            finite = [k for k, y in enumerate(ys) if math.isfinite(y)]
            if len(finite) == 1:  # no line has a single point
                axes.plot(xs[finite[0]], ys[finite[0]], marker="_", **_line(i))
        for i, series in valid:
            axes.plot(
                *_columns(thinned(series, MARKS)),
                ls="none",
                marker=MARKERS[i % len(MARKERS)][0],
                ms=5,
                mfc="white",
                mec=COLOURS[i % len(COLOURS)],
                mew=1.4,
            )
        values = [y for _, s in (*train, *valid) for _, y in s if math.isfinite(y)]
        if values and min(values) > 0 and max(values) > 20 * min(values):
            _logarithmic(axes)
        elif values and min(values) >= 0:
            axes.set_ylim(0, 1.06 * max(values) or 1.0)
        _epochs(axes, x)
        return _svg(figure)


def draw_weights(weights: Dict[str, Series], x: str) -> str:
    """Curves of one model's weights; those of equal height stay visible."""
    with _figure(6.4, 2.9) as (figure, axes):
        for term, series in weights.items():
            i = WEIGHTS.index(term)
            xs, ys = _columns(thinned(series))
            axes.plot(xs, ys, lw=max(1.2, 5 - 0.8 * i), label=term, **_line(i))
        highest = max((w for s in weights.values() for _, w in s), default=0.0)
        axes.set_ylim(0, 1.06 * highest or 1.0)
        _epochs(axes, x)
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, handlelength=4
        )
        return _svg(figure, bbox_inches="tight")


def draw_rates(
    groups: Sequence[Tuple[str, Sequence[float]]], models: Sequence[str], x: str
) -> str:
    """Bars of each model's rates, a group for each set and method.

    Args:
      groups: A group's name, and a rate (%) for each model; NaN for none.
    """
    bars: List[Tuple[float, int, float]] = []
    ticks: List[float] = []
    y = 0.0
    for _, rates in groups:
        there = [(i, r) for i, r in enumerate(rates) if math.isfinite(r)]
        bars += [(y + k, i, rate) for k, (i, rate) in enumerate(there)]
        ticks.append(y + (len(there) - 1) / 2)
        y += len(there) + 0.8
    highest = max((rate for *_, rate in bars), default=0.0) or 1.0
    with _figure(7.0, 0.6 + 0.27 * y) as (figure, axes):
        for at, i, rate in bars:
            colour = COLOURS[i % len(COLOURS)]
            axes.barh(
                at,
                rate,
                height=0.8,
                color="white" if i % 2 else colour,
                edgecolor=colour,
                hatch=("", "////", "", "....")[i % 4],
                lw=1.2,
            )
            label = f"{rate:.2f}  {models[i]}"
            axes.text(rate + 0.01 * highest, at, label, va="center", fontsize=9)
        axes.set_yticks(ticks, [name for name, _ in groups])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.set_xlim(0, 1.05 * highest)
        axes.invert_yaxis()
        axes.set_xlabel(x)
        return _svg(figure, bbox_inches="tight")


@contextmanager
def _figure(width: float, height: float) -> Iterator[Tuple[Any, Any]]:
    """A figure of so many inches, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
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


def _svg(figure: Any, **options: Any) -> str:
    """The figure, without what only a file of its own needs."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without Chinese: the reader's has it
        figure.savefig(out, format="svg", metadata={"Date": None}, **options)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r"\s+\n", "\n", text)


def _line(i: int) -> Dict[str, Any]:
    dash = DASHES[i % len(DASHES)]
    style = (0, tuple(map(float, dash.split()))) if dash else "-"
    return {"color": COLOURS[i % len(COLOURS)], "ls": style}


def _columns(series: Series) -> Tuple[List[float], List[float]]:
    return [x for x, _ in series], [y for _, y in series]

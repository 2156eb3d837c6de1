"""The way of the data: from cuts and a teacher to a student's report."""

from dataclasses import dataclass
from typing import Any, Dict, Tuple

_WIDTH, _HEIGHT = 0.76, 0.56  # of a box
_LIFT = 0.045  # of a word above its arrow


@dataclass(frozen=True)
class Arrow:
    """What becomes of what, and by which command.

    Args:
      source: The key of a box.
      target: The key of another.
      command: What is run; "" where another arrow to the same box says it.
    """

    source: str
    target: str
    command: str = ""


# Where each box stands. Its words have its key, with "box_" before.
BOXES: Dict[str, Tuple[float, float]] = {
    "recipe": (0, 2),
    "cuts": (0, 1),
    "teacher": (0, 0),
    "copy": (1.2, 2),
    "targets": (1.2, 1),
    "start": (1.2, 0),
    "student": (2.42, 1),
    "results": (3.58, 1.6),
    "files": (3.58, 0.4),
    "report": (4.74, 1),
}
ARROWS = (
    Arrow("recipe", "copy", "plug"),
    Arrow("cuts", "targets", "dump"),
    Arrow("teacher", "targets"),
    Arrow("teacher", "start", "student"),
    Arrow("copy", "student"),
    Arrow("targets", "student", "train.py"),
    Arrow("start", "student"),
    Arrow("student", "results", "decode"),
    Arrow("student", "files", "export"),
    Arrow("results", "report", "report"),
    Arrow("files", "report"),
)


def draw_way(words: Dict[str, str]) -> Any:
    """Draw what is read and written as boxes, and the commands as arrows.

    Args:
      words: Of :func:`icefall_kd.plot.words.words_of`.

    Returns:
      A figure of matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(11.5, 3.5))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.4, 5.14)
    axes.set_ylim(-0.4, 2.4)
    for key, (x, y) in BOXES.items():
        is_student = key in ("start", "student", "results", "files")
        shade = "#e3f0f9" if is_student else "#f2f2f2"
        corner = (x - _WIDTH / 2, y - _HEIGHT / 2)
        style = {"boxstyle": "round,pad=0,rounding_size=0.05", "lw": 1.0}
        box = FancyBboxPatch(corner, _WIDTH, _HEIGHT, fc=shade, ec="#555555", **style)
        axes.add_patch(box)
        axes.text(x, y, words[f"box_{key}"], ha="center", va="center", fontsize=9)
    for arrow in ARROWS:
        _draw_arrow(axes, arrow)
    return figure


def _draw_arrow(axes: Any, arrow: Arrow) -> None:
    """An arrow from the right of a box to the left of another, and its command."""
    (x0, y0), (x1, y1) = BOXES[arrow.source], BOXES[arrow.target]
    begin, end = (x0 + _WIDTH / 2, y0), (x1 - _WIDTH / 2, y1)
    line = {"arrowstyle": "-|>", "color": "#333333", "lw": 1.2, "shrinkA": 0}
    axes.annotate("", end, begin, arrowprops={**line, "shrinkB": 1})
    if arrow.command:
        middle = ((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2)
        is_level = y0 == y1
        # Beside a slope that rises the word stands left of it, else right of it.
        sides = {True: "center", False: "right" if y1 > y0 else "left"}
        axes.text(
            middle[0] + (0 if is_level else 0.03 * (-1 if y1 > y0 else 1)),
            middle[1] + _LIFT,
            arrow.command,
            ha=sides[is_level],
            va="bottom",
            fontsize=8,
            family="monospace",
            color="#0072B2",
        )

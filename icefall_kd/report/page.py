"""A report's blocks, as Markdown, as one HTML page, and as lines of a terminal."""

import re
import unicodedata
from dataclasses import dataclass, field
from html import escape
from itertools import count
from typing import Iterator, Sequence, Tuple, Union

NONE = "-"

# Of a palette for colour-blind readers (Okabe and Ito), the dark ones first.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# matplotlib's name of a marker, and its outline around 0, 0.
MARKERS = (
    ("o", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"),
    ("s", "M-4 -4h8v8h-8z"),
    ("^", "M0 -5l5 9h-10z"),
    ("D", "M0 -5l5 5l-5 5l-5 -5z"),
    ("v", "M0 5l5 -9h-10z"),
    ("P", "M-2 -5h4v3h3v4h-3v3h-4v-3h-3v-4h3z"),
    ("X", "M-5 -3l2 -2l3 3l3 -3l2 2l-3 3l3 3l-2 2l-3 -3l-3 3l-2 -2l3 -3z"),
)
DASHES = ("", "6 2", "2 2", "8 2 2 2", "10 3", "4 1 1 1 1 1", "1 3")

_CSS = """
body { font: 16px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei",
  sans-serif; color: #111; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #bbb; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.8rem 0;
  font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #bbb; padding: 0.25rem 0.6rem; text-align: right;
  vertical-align: top; }
th { background: #f2f2f2; }
th.l, td.l { text-align: left; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; break-inside: avoid; }
figcaption { font-weight: 600; }
svg { max-width: 100%; height: auto; overflow: visible; }
svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.6rem; list-style: none;
  padding: 0; margin: 0.6rem 0; }
.legend svg { vertical-align: middle; margin-right: 0.4rem; }
footer { margin-top: 3rem; color: #555; font-size: 0.85rem; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; }
  table { font-size: 9pt; } footer { margin-top: 1rem; } .legend { break-after: avoid; }
  tr, li { break-inside: avoid; } h2 { break-after: avoid; }
  .wide { overflow: visible; } .many figure { width: 48%; }
  .many { gap: 1rem 2%; } }
"""


@dataclass
class Heading:
    text: str


@dataclass
class Text:
    text: str


@dataclass
class Bullets:
    items: Sequence[str]


@dataclass
class Table:
    """Cells of plain text.

    Args:
      left: How many columns hold words, and stand to the left; the rest are numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass
class Plots:
    """Figures, each a caption and an SVG; for HTML alone.

    Args:
      legend: Names, in the order of the colours.
      note: How to read them.
    """

    figures: Sequence[Tuple[str, str]]
    legend: Sequence[str] = field(default_factory=list)
    note: str = ""


Block = Union[Heading, Text, Bullets, Table, Plots]


def to_markdown(title: str, blocks: Sequence[Block], footer: str) -> str:
    """The report as a section of icefall's RESULTS.md; without plots."""
    parts = [f"### {_md(title)}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"#### {_md(block.text)}")
        elif isinstance(block, Text):
            parts.append(_md(block.text))
        elif isinstance(block, Bullets):
            parts.append("\n".join(f"- {_md(item)}" for item in block.items))
        elif isinstance(block, Table):
            bar = ["---" if i < block.left else "---:" for i in range(len(block.head))]
            rows = [[_md(cell) for cell in row] for row in (block.head, *block.rows)]
            rows.insert(1, bar)
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join([*parts, _md(footer)]) + "\n"


def to_html(title: str, blocks: Sequence[Block], footer: str, lang: str) -> str:
    """The report as one page that asks for nothing else."""
    parts = []
    numbers = count(1)
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h2>{escape(block.text)}</h2>")
        elif isinstance(block, Text):
            parts.append(f"<p>{escape(block.text)}</p>")
        elif isinstance(block, Bullets):
            items = "".join(f"<li>{escape(item)}</li>\n" for item in block.items)
            parts.append(f"<ul>\n{items}</ul>")
        elif isinstance(block, Table):
            parts.append(_html_table(block))
        else:
            parts.append(_html_plots(block, numbers))
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="{escape(lang)}">\n<head>\n'
        '<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n<footer>{escape(footer)}</footer>\n"
        "</body>\n</html>\n"
    )


def to_lines(table: Table) -> str:
    """A table for a terminal, whose Chinese characters are two columns wide."""
    rows = [table.head, *table.rows]
    widths = [max(map(_width, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths)):
            gap = " " * (width - _width(cell))
            cells.append(cell + gap if i < table.left else gap + cell)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        parts = []
        for i, cell in enumerate(cells):
            name = ' class="l"' if i < table.left else ""
            # A path may break behind its slashes.
            text = escape(cell).replace("/", "/<wbr>")
            parts.append(f"<{tag}{name}>{text}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>\n"

    rows = "".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class="wide"><table>\n<thead>{row(table.head, "th")}</thead>\n<tbody>\n'
        f"{rows}</tbody>\n</table></div>"
    )


def _html_plots(plots: Plots, numbers: Iterator[int]) -> str:
    legend, name = "", "plots"
    if plots.legend:
        name = "plots many"
        items = "".join(
            f"<li>{_swatch(i)}{escape(name)}</li>\n"
            for i, name in enumerate(plots.legend)
        )
        legend = f'<ul class="legend">\n{items}</ul>\n'
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>\n"
        f"{_own_ids(svg, next(numbers))}</figure>\n"
        for caption, svg in plots.figures
    )
    note = f"\n<p>{escape(plots.note)}</p>" if plots.note else ""
    return f'{legend}<div class="{name}">\n{figures}</div>{note}'


def _own_ids(svg: str, number: int) -> str:
    """An SVG whose ids no other one of the page has."""
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)  # nothing names these
    return re.sub(r'( id="|href="#|url\(#)', rf"\1f{number}-", svg)


def _swatch(i: int) -> str:
    colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
    marker = MARKERS[i % len(MARKERS)][1]
    return (
        '<svg width="60" height="14" viewBox="-30 -7 60 14" aria-hidden="true">'
        f'<path d="M-29 0h58" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dash or "none"}"/><path d="{marker}" '
        f'fill="white" stroke="{colour}" stroke-width="1.5"/></svg>'
    )


def _md(text: str) -> str:
    """Plain text that Markdown shows as it is."""
    text = " ".join(text.split()).replace("&", "&amp;")
    text = re.sub(r"([\\`*\[\]<>|#~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)

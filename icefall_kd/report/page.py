"""The blocks of a report, as Markdown and as one HTML page."""

import re
from dataclasses import dataclass
from html import escape
from itertools import count
from typing import Iterator, Sequence, Tuple, Union

NONE = "-"
_BRACKETS = re.compile(r"\[[^\[\]]*\]")

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
@media screen { figure { overflow-x: auto; } svg { max-width: none; } }
svg text { font-family: inherit !important; }
footer { margin-top: 3rem; color: #555; font-size: 0.85rem; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; }
  table { font-size: 9pt; } footer { margin-top: 1rem; }
  tr, li { break-inside: avoid; } h2 { break-after: avoid; }
  .wide { overflow: visible; } .many figure { width: 48%; }
  .many { gap: 1rem 2%; } }
"""


@dataclass
class Heading:
    """The heading of a section."""

    text: str


@dataclass
class Text:
    """A paragraph."""

    text: str


@dataclass
class Bullets:
    """A list of remarks."""

    items: Sequence[str]


@dataclass
class Table:
    """Cells of plain text.

    Args:
      head: The names of the columns.
      rows: A cell for each column.
      left: How many columns are words, aligned to the left; the others are numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass
class Plots:
    """Figures, which only the HTML page shows.

    Args:
      figures: A caption and an SVG for each.
      note: How the figures are read.
      many: Whether two of them are printed side by side.
    """

    figures: Sequence[Tuple[str, str]]
    note: str = ""
    many: bool = False


Block = Union[Heading, Text, Bullets, Table, Plots]


def to_markdown(title: str, blocks: Sequence[Block], footer: str) -> str:
    """The report as a section of icefall's RESULTS.md, without plots.

    Args:
      title: The section's heading, plain text.
      blocks: The report.
      footer: Its last paragraph.
    """
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
    """The report as one page that loads no other file.

    Args:
      title: The page's heading, plain text.
      blocks: The report.
      footer: Its last paragraph.
      lang: The language of the page, such as en.
    """
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


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        parts = []
        for i, cell in enumerate(cells):
            name = ' class="l"' if i < table.left else ""
            # A path may break after its slashes, and an interval nowhere.
            text = escape(_BRACKETS.sub(_unbroken, cell)).replace("/", "/<wbr>")
            parts.append(f"<{tag}{name}>{text}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>\n"

    rows = "".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class="wide"><table>\n<thead>{row(table.head, "th")}</thead>\n<tbody>\n'
        f"{rows}</tbody>\n</table></div>"
    )


def _unbroken(found: "re.Match[str]") -> str:
    return found.group().replace(" ", "\u00a0")


def _html_plots(plots: Plots, numbers: Iterator[int]) -> str:
    figures = ""
    for caption, svg in plots.figures:
        title = f"<figcaption>{escape(caption)}</figcaption>\n" if caption else ""
        figures += f"<figure>{title}{_with_number(svg, next(numbers))}</figure>\n"
    name = "plots many" if plots.many else "plots"
    note = f"\n<p>{escape(plots.note)}</p>" if plots.note else ""
    return f'<div class="{name}">\n{figures}</div>{note}'


def _with_number(svg: str, number: int) -> str:
    """An SVG whose ids begin with its number, as a page must have each id once."""
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)  # nothing refers to these
    return re.sub(r'( id="|href="#|url\(#)', rf"\1f{number}-", svg)


def _md(text: str) -> str:
    """Escape plain text for Markdown."""
    text = " ".join(text.split()).replace("&", "&amp;")
    text = re.sub(r"([\\`*\[\]<>|#~])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)

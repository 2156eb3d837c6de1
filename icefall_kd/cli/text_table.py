"""Tables of plain text for a terminal."""

import unicodedata
from typing import Iterable, List, Sequence


def text_table(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Lay out a table in columns.

    Args:
      rows: The table's cells, with its head as the first row.
      left: How many columns are aligned to the left; the others are to the right.

    Returns:
      Lines without the last line's end. A Chinese character is two columns wide.
    """
    rows = list(rows)
    widths = [max(map(_width, column)) for column in zip(*rows)]
    lines: List[str] = []
    for row in rows:
        line = ""
        for i, (cell, width) in enumerate(zip(row, widths)):
            gap = " " * (width - _width(cell))
            line += (cell + gap if i < left else gap + cell) + "  "
        lines.append(line.rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)

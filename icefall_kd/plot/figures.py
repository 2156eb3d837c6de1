"""A picture as a file: SVG, PNG or PDF, written completely or not at all."""

import re
import warnings
from pathlib import Path
from typing import Any, Callable, List, Sequence

from icefall_kd.errors import require
from icefall_kd.files import check_new_file, making_folder, replacing
from icefall_kd.report.plots import need_matplotlib, styled, svg_of

SUFFIXES = (".svg", ".png", ".pdf")
DOTS = 110  # an inch, of a PNG
# Files of fonts with Chinese letters, upright and of medium weight.
_CHINESE = (
    r"(sans.*(cjk|[^a-z](sc|cn|hans)[^a-z])|wqy|msyh|simhei|pingfang|droidsansfallback)"
    r"(?!.*(bold|black|light|thin|mono))"
)


def check_picture(path: str, name: str = "OUT") -> None:
    """Refuse a picture that can't be drawn or written, before the work for it.

    Args:
      path: The file.
      name: The argument that gave it.

    Raises:
      KDError: another ending than those of :data:`SUFFIXES`, a path where no file can
        be written, or no matplotlib.
    """
    check_new_file(path, name)
    require(
        Path(path).suffix in SUFFIXES and Path(path).stem not in SUFFIXES,
        f"{name} is {path}, and a picture is a file that ends with "
        f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}: give it such a name",
    )
    need_matplotlib()


def write_picture(path: str, draw: Callable[[], Any]) -> None:
    """Draw a picture and write it; equal numbers give equal bytes.

    Letters of an SVG stay text, in the fonts of its reader.

    Args:
      path: The file, as :func:`check_picture` takes it. Its folder is made.
      draw: Returns matplotlib's figure.

    Raises:
      KDError: letters that no font of this machine has, for a PNG or PDF.
    """
    out = Path(path)
    with making_folder(out.parent), replacing(out) as temporary:
        if out.suffix == ".svg":
            with styled(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of letters that the reader has
                text = svg_of(draw(), bbox_inches="tight")
            temporary.write_text(text, encoding="utf8")
            return
        missing = _save(draw, out.suffix, temporary, [])
        if missing:
            missing = _save(draw, out.suffix, temporary, _chinese_fonts())
        require(
            not missing,
            f"no font of this machine has all letters of {out} ({missing}): give it "
            "the ending .svg, whose letters are its reader's, or install a font such "
            "as Noto Sans CJK",
        )


def _save(
    draw: Callable[[], Any], suffix: str, path: Path, fonts: Sequence[str]
) -> str:
    """Write a picture of dots or a PDF; return what is said of a missing letter.

    Args:
      draw: Returns matplotlib's figure.
      suffix: Of its kind.
      path: The file.
      fonts: Fonts for the letters that matplotlib's own lacks.
    """
    import matplotlib

    date = {"CreationDate": None} if suffix == ".pdf" else {"Software": None}
    options = {"format": suffix[1:], "dpi": DOTS, "bbox_inches": "tight"}
    with styled(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", *fonts]
        draw().savefig(path, metadata=date, **options)
    said = (str(warning.message) for warning in caught)
    return next((" ".join(s.split()) for s in said if "missing from" in s), "")


def _chinese_fonts() -> List[str]:
    """The name of a font with Chinese letters, or of none.

    matplotlib's list of fonts may be older than the font, so files are looked for.
    """
    from matplotlib import font_manager

    for path in sorted(font_manager.findSystemFonts()):
        if re.search(_CHINESE, Path(path).name, re.I):
            try:
                font_manager.fontManager.addfont(path)
                return [font_manager.FontProperties(fname=path).get_name()]
            except (OSError, RuntimeError):  # a file that is no font
                continue
    return []

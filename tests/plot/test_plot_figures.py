"""Pictures as files, and the way of the data."""

import ast
from pathlib import Path

import pytest

from icefall_kd.cli import MODULES
from icefall_kd.errors import KDError
from icefall_kd.plot import figures
from icefall_kd.plot.figures import check_picture, write_picture
from icefall_kd.plot.way import ARROWS, BOXES, draw_way
from icefall_kd.plot.words import LANGUAGES, words_of

pytest.importorskip("matplotlib")
HEADS = {".svg": b"<svg", ".png": b"\x89PNG", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", HEADS)
def test_each_ending_gives_its_kind_of_file_with_the_same_bytes(tmp_path, suffix):
    contents = []
    for name in ("a", "b"):
        path = tmp_path / name / f"way{suffix}"
        write_picture(str(path), lambda: draw_way(words_of("en")))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].startswith(HEADS[suffix])


@pytest.mark.parametrize("name", ["way.jpg", "way", ".svg", "way.svg.gz", "way.SVG"])
def test_another_ending_is_refused(tmp_path, name):
    with pytest.raises(KDError, match="ends with .svg, .png or .pdf: give it such"):
        check_picture(str(tmp_path / name))


def test_a_drawing_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "way.png"
    path.write_bytes(b"before")

    def fail():
        raise KDError("no")

    with pytest.raises(KDError):
        write_picture(str(path), fail)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_letters_that_no_font_has_are_refused_where_they_would_be_boxes(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(figures, "_chinese_fonts", lambda: [])
    png, svg = tmp_path / "way.png", tmp_path / "way.svg"
    with pytest.raises(KDError, match="no font of this machine .*give it the ending"):
        write_picture(str(png), lambda: draw_way(words_of("zh")))
    assert not png.exists()
    write_picture(str(svg), lambda: draw_way(words_of("zh")))
    assert "教师" in svg.read_text("utf8")


def test_the_way_has_commands_that_exist_and_a_word_for_each_box():
    for lang in LANGUAGES:
        assert {f"box_{key}" for key in BOXES} <= set(words_of(lang))
    ends = {key for arrow in ARROWS for key in (arrow.source, arrow.target)}
    assert ends == set(BOXES)
    commands = {arrow.command for arrow in ARROWS} - {"", "train.py"}
    assert commands <= set(MODULES)


def test_every_word_is_used():
    """Else a picture lost what a translator keeps on translating."""
    package = Path(figures.__file__).parents[1]
    paths = [*(package / "plot").glob("*.py"), *(package / "cli").glob("plot*.py")]
    used = {f"box_{key}" for key in BOXES} | {"blank", "neighbour", "spike"}
    for path in paths:
        if path.name == "words.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                used.add(node.slice.value)
    assert set(words_of("en")) <= used

"""Sphinx's settings for the documents; `make docs` builds them into docs/build.

The source folder is the repository's root, so that a link from page to page is the same
file name here and where the repository is read.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from icefall_kd import __version__  # noqa: E402

project = "icefall_kd"
copyright = "the icefall_kd developers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "egs/*/ASR/*.md", "egs/*/ASR/pretrained/*.md", "tools/README.md", "*.md"]
exclude_patterns = ["README*.md", ".*", "docs/build"]
exclude_patterns += [
    f"egs/*/ASR/{name}" for name in ("data", "download", "exp", "work")
]

smartquotes = False  # it makes a dash of the two hyphens of an option

html_theme = "sphinx_rtd_theme"
html_extra_path = ["root"]  # the first page's address leads to docs/index.html
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_js_files = ["find_most.js"]
html_show_sourcelink = False
highlight_language = "none"  # what commands print; their own blocks say bash

myst_heading_anchors = 3

# A line's end between Chinese characters is no blank.
LINE_END = re.compile(
    r"(?<=[\u4e00-\u9fff])\n(?=[\u4e00-\u9fff\uff08])"
    r"|(?<=[\u3001\u3002\uff08-\uff1f])\n(?=[`A-Za-z\u4e00-\u9fff\uff08])"
)


def _join_lines(app, docname, source):
    parts = source[0].split("```")  # every other one is a block of code
    parts[::2] = (LINE_END.sub("", part) for part in parts[::2])
    source[0] = "```".join(parts)


def setup(app):
    app.connect("source-read", _join_lines)


autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True

#!/usr/bin/env python3
"""
Check the local links of HTML pages: each must lead to a file, and to an id in it.

Usage: tools/check_links.py docs/build
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Dict, List, Set
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the ids of an HTML page.

    Args:
      path: The page's file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: List[str] = []
        self.ids: Set[str] = set()
        self.feed(path.read_text("utf8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.ids.add(value)


def broken_links(folder: Path) -> List[str]:
    """Return the links of a folder's pages that lead nowhere, as "page: link".

    Args:
      folder: The folder; pages in its subfolders are read too.
    """
    pages: Dict[Path, Page] = {p.resolve(): Page(p) for p in folder.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            target = target if parts.path else path
            fragment = unquote(parts.fragment)
            missing = fragment and target in pages and fragment not in pages[target].ids
            if not target.exists() or missing:
                broken.append(f"{path.relative_to(folder.resolve())}: {link}")
    return broken


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("Usage: tools/check_links.py FOLDER, a folder of HTML pages")
    folder = Path(sys.argv[1])
    broken = broken_links(folder)
    count = len(list(folder.rglob("*.html")))
    if not count or broken:
        print("\n".join(broken), file=sys.stderr)
        sys.exit(f"{len(broken)} local links of {count} pages lead nowhere")
    print(f"All local links of {count} pages lead somewhere.")


if __name__ == "__main__":
    main()

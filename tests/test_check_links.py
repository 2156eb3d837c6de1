"""tools/check_links.py finds the links of HTML pages that lead nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "check_links.py"
SECOND = '<h1 id="top">2</h1><a href="first.html">1</a><a href="#top">up</a>'


@pytest.fixture
def check(tmp_path):
    """Run the script on two pages; the first is given."""

    def run(first):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / "first.html").write_text(first, "utf8")
        (tmp_path / "sub" / "second.html").write_text(SECOND, "utf8")
        command = [sys.executable, SCRIPT, tmp_path]
        return subprocess.run(command, capture_output=True, text=True)

    return run


def test_links_to_files_ids_and_other_hosts_pass(check):
    done = check('<a href="second.html#top">2</a><a href="https://nowhere.example/x">')
    assert (done.returncode, done.stdout) == (
        0,
        "All local links of 2 pages lead somewhere.\n",
    )


@pytest.mark.parametrize(
    "link", ["third.html", "second.html#none", "#none", "../second.html"]
)
def test_a_link_that_leads_nowhere_is_named(check, link):
    done = check(f'<a href="{link}">x</a>')
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"sub/first.html: {link}"


def test_a_folder_without_pages_is_refused(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "0 pages" in done.stderr

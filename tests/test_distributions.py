"""The wheel and the source distribution: what they have, and what they say they are."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import icefall_kd

pytestmark = pytest.mark.slow  # both are built, in about 5 s

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {"README.md", "README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md"}
# Top files of the source distribution, beside the package.
SDIST = DOCUMENTS | {"CITATION.cff", "LICENSE", "MANIFEST.in", "setup.py"}
SDIST |= {"pyproject.toml", "setup.cfg", "PKG-INFO"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder in which both distributions are built, from a copy of the tree."""
    folder = tmp_path_factory.mktemp("distributions")
    tree = folder / "tree"
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    code = shutil.ignore_patterns("__pycache__")
    for name in ("icefall_kd", "tests", "tools", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=code, symlinks=True)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", folder]
    command += ["bdist_wheel", "-d", folder]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    """The wheel's files, as name: bytes."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(built):
    """The names of the source distribution's files, below its folder."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        members = [m for m in archive.getmembers() if m.isfile()]
    return {member.name.partition("/")[2] for member in members}


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel if n.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel[name])


def package_files():
    files = (p for p in (ROOT / "icefall_kd").rglob("*") if p.is_file())
    names = {str(p.relative_to(ROOT)) for p in files}
    return {name for name in names if "__pycache__" not in name}


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    names = {name for name in wheel if ".dist-info/" not in name}
    assert names == package_files()
    assert "icefall_kd/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in wheel) or any(
        name.endswith(".dist-info/LICENSE") for name in wheel
    )


def test_the_source_distribution_has_the_package_and_its_documents(sdist):
    names = {name for name in sdist if not name.startswith("icefall_kd.egg-info/")}
    assert names == package_files() | SDIST


def test_the_version_stands_in_the_package_alone(metadata):
    assert metadata["Version"] == icefall_kd.__version__
    others = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "CITATION.cff"]
    for path in others:
        assert icefall_kd.__version__ not in path.read_text("utf8"), path.name
    headings = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == icefall_kd.__version__


def test_the_command_is_in_the_wheel(wheel):
    (name,) = (n for n in wheel if n.endswith("entry_points.txt"))
    assert "icefall-kd = icefall_kd.cli:main" in wheel[name].decode()


def test_extras_that_texts_tell_to_install_exist(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    texts = [*ROOT.rglob("icefall_kd/**/*.py"), *ROOT.glob("*.md")]
    texts += [*ROOT.glob("egs/*/ASR/*.md"), *ROOT.glob("docs/**/*.md")]
    named = set()
    for path in texts:
        found = re.findall(r"(?:icefall_kd|\"\.)\[([\w,]+)\]", path.read_text("utf8"))
        named.update(extra for group in found for extra in group.split(","))
    assert {"report", "export"} <= named <= extras


def test_what_the_tests_need_has_all_other_extras(metadata):
    """So that a test environment can do all that a user can install."""
    by_extra = {}
    for line in metadata.get_all("Requires-Dist"):
        name = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
        for extra in re.findall(r"extra == [\"'](\w+)", line):
            by_extra.setdefault(extra, set()).add(name)
    assert {n for extra in by_extra.values() for n in extra} == by_extra["test"]

"""Files are read and written as UTF-8, whatever the locale."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lhotse import CutSet

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("icefall_kd", "egs", "tools", "benchmarks")
MODULES = ("os", "tarfile", "wave", "webbrowser")  # whose open() takes no encoding
PROGRAMS = {"run", "Popen", "call", "check_call", "check_output"}


def scripts():
    found = [p for name in FOLDERS for p in sorted((ROOT / name).rglob("*.py"))]
    assert len(found) > 80
    return found


def constant(call, index, name):
    """An argument of a call, by place or by name; None where there is none."""
    nodes = [k.value for k in call.keywords if k.arg == name]
    if index is not None and len(call.args) > index:
        nodes.append(call.args[index])
    return nodes[0].value if nodes and isinstance(nodes[0], ast.Constant) else None


def places_of(call):
    """Where an encoding may stand by its place; None for a call without text."""
    function = call.func
    name = getattr(function, "attr", getattr(function, "id", ""))
    owner = getattr(getattr(function, "value", None), "id", "")
    plain = isinstance(function, ast.Name)
    if name == "open" and owner not in MODULES:
        if plain or owner in ("io", "codecs"):
            return None if "b" in (constant(call, 1, "mode") or "r") else 3
        if owner in ("gzip", "bz2", "lzma"):
            return 3 if "t" in (constant(call, 1, "mode") or "rb") else None
        mode = constant(call, 0, "mode")
        if call.args and not isinstance(mode, str):
            return None  # of something that is no path
        return None if "b" in (mode or "r") else 2
    if name in ("read_text", "write_text"):
        return 0 if name == "read_text" else 1
    if name in PROGRAMS and (plain or owner == "subprocess"):
        names = ("text", "universal_newlines")
        text = any(constant(call, None, name) for name in names)
        return 99 if text else None
    if name in ("FileHandler", "TextIOWrapper", "FileType"):
        return {"FileHandler": 2, "TextIOWrapper": 1, "FileType": 2}[name]
    if name in ("NamedTemporaryFile", "TemporaryFile"):
        return None if "b" in (constant(call, 0, "mode") or "w+b") else 99
    return None


def without_encoding(code):
    """The lines of calls that leave the encoding to the locale."""
    lines = []
    for call in ast.walk(ast.parse(code)):
        place = places_of(call) if isinstance(call, ast.Call) else None
        named = any(k.arg == "encoding" for k in getattr(call, "keywords", []))
        if place is not None and not named and len(call.args) <= place:
            lines.append(call.lineno)
    return sorted(lines)


@pytest.mark.parametrize(
    "code, found",
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, mode='a')", True),
        ("open(p, 'rb')", False),
        ("open(p, encoding='utf8')", False),
        ("p.open()", True),
        ("p.open('wb')", False),
        ("gzip.open(p)", False),
        ("gzip.open(p, 'wt')", True),
        ("os.open(p, 0)", False),
        ("p.read_text()", True),
        ("p.read_text('utf8')", False),
        ("p.write_text(words)", True),
        ("p.write_text(words, 'utf8')", False),
        ("subprocess.run(c, text=True)", True),
        ("subprocess.run(c)", False),
        ("subprocess.run(c, text=True, encoding='utf8')", False),
        ("logging.FileHandler(p)", True),
        ("logging.FileHandler(p, encoding='utf8')", False),
    ],
)
def test_a_call_without_encoding_is_found(code, found):
    assert bool(without_encoding(code)) == found


def test_every_text_file_says_its_encoding():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in scripts()
        for line in without_encoding(path.read_text("utf8"))
    }
    assert found == set()


# Another locale

MAIN = "from icefall_kd.cli import main\nmain()\n"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TEXT = "eins 一二三 ß"


@pytest.fixture(scope="session")
def gbk(tmp_path_factory):
    """The environment of a Chinese system whose locale is not UTF-8."""
    if shutil.which("localedef") is None:
        pytest.skip("no localedef here to make a locale with")
    folder = tmp_path_factory.mktemp("locales")
    made = ["localedef", "-i", "zh_CN", "-f", "GBK", str(folder / "zh_CN.GBK")]
    subprocess.run(made, capture_output=True)
    if not (folder / "zh_CN.GBK").is_dir():
        pytest.skip("no zh_CN and GBK here to make a locale of")
    return {"LOCPATH": str(folder), "LC_ALL": "zh_CN.GBK", "PYTHONUTF8": "0"}


@pytest.fixture(params=["C", "GBK"])
def other_locale(request):
    """The environment of a locale whose encoding is not UTF-8."""
    if request.param == "GBK":
        return request.getfixturevalue("gbk")
    return ASCII


@pytest.fixture
def run_in(tmp_path):
    """Run ``python -c CODE WORD ...`` in such a locale; both streams as bytes."""

    def run(env, code, *words):
        command = [sys.executable, "-c", code, *map(str, words)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path, **env}
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, timeout=600
        )

    return run


def test_the_locale_is_another_one(run_in, other_locale):
    code = "from icefall_kd.files import text_encoding\nprint(text_encoding())"
    found = run_in(other_locale, code).stdout.decode().strip()
    assert found in ("ascii", "gbk") and found != "utf-8"


@pytest.fixture
def cuts(make_cut):
    return [make_cut(i, n, text=TEXT) for i, n in (("ç5-一", 47), ("c2", 33))]


@pytest.fixture
def dump_in(run_in, teacher_exp):
    """Run ``icefall-kd dump`` in such a locale; the cuts that it wrote."""

    def dump(env, given, out):
        words = ["dump", given, out, "--recipe", teacher_exp.recipe]
        words += ["--exp-dir", teacher_exp.folder, "--epoch", 2]
        words += ["--use-averaged-model", 0, "--num-threads", 1, "--num-workers", 0]
        done = run_in(env, MAIN, *words)
        assert done.returncode == 0, done.stderr.decode("utf8", "replace")
        return CutSet.from_file(out).to_eager()

    return dump


def test_a_manifest_is_read_and_written_as_utf8(dump_in, other_locale, cuts, tmp_path):
    given = tmp_path / "in.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(given)
    found = dump_in(other_locale, given, tmp_path / "out.jsonl.gz")
    assert [c.id for c in found] == [c.id for c in cuts]
    assert [c.supervisions[0].text for c in found] == [TEXT, TEXT]
    assert [c.custom["kd_targets"]["cut"] for c in found] == [c.id for c in cuts]


def test_a_shar_is_read_and_written_as_utf8(dump_in, run_in, gbk, cuts, tmp_path):
    folder = tmp_path / "shar"
    folder.mkdir()
    CutSet.from_cuts(cuts).to_shar(
        folder, fields={"features": "numpy"}, shard_size=1, warn_unused_fields=False
    )
    found = dump_in(gbk, folder, tmp_path / "out.jsonl.gz")
    assert [c.supervisions[0].text for c in found] == [TEXT, TEXT]
    done = run_in(gbk, MAIN, "shar", tmp_path / "out.jsonl.gz", folder)
    assert done.returncode == 0, done.stderr.decode("utf8", "replace")
    ids = [c.custom["kd_targets"]["cut"] for c in CutSet.from_shar(in_dir=folder)]
    assert ids == [c.id for c in cuts]


def test_what_is_printed_keeps_the_locales_encoding(run_in, gbk):
    code = "from icefall_kd.files import run_in_utf8\nrun_in_utf8()\n"
    code += r"print('\u4e00\u4e8c')"
    assert run_in(gbk, code).stdout.decode("gbk") == "一二\n"
    assert run_in(ASCII, code).stdout.decode("ascii") == "\\u4e00\\u4e8c\n"


def test_a_program_in_utf8_goes_on_as_it_is(monkeypatch):
    from icefall_kd import files

    def refuse(*args):
        raise AssertionError("begun anew")

    monkeypatch.setattr(os, "execve", refuse)
    monkeypatch.setattr(files, "text_encoding", lambda: "utf-8")
    files.run_in_utf8()
    # Where Python was told to and does otherwise, as by -X utf8=0, it is left at that.
    monkeypatch.setattr(files, "text_encoding", lambda: "gbk")
    monkeypatch.setenv("PYTHONUTF8", "1")
    files.run_in_utf8()

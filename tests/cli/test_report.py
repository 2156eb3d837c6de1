"""``icefall-kd report`` from the folders to the pages."""

import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_folders import SUFFIX

from icefall_kd.export.parity import Account
from icefall_kd.targets.store import read_fingerprint

pytest.importorskip("matplotlib")

VOID = {"meta", "wbr", "br", "link"}


class Page(HTMLParser):
    """Tags in balance, and all that a page asks of others."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.links, self.text, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes, closed=False):
        self.tags.add(tag)
        self.links += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]
        if tag not in VOID and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def targets(make_cut, make_store, tmp_path):
    make_store([make_cut("u", 100)], name="made")
    return tmp_path / "made.jsonl.gz"


@pytest.mark.parametrize(
    "lang, ending, row",
    [
        ("en", "", "| KD | int8 | ctc | wrong | 5 of 7 | 8.50 | 0.25 | 0.1250 |"),
        ("zh", ".zh-CN", "| KD | int8 | ctc | 错误 | 5 / 7 | 8.50 | 0.25 | 0.1250 |"),
    ],
)
def test_what_the_check_of_exported_files_found_is_in_the_report(
    invoke, three, tmp_path, lang, ending, row
):
    exp = next(word for word in map(str, three) if word.startswith("KD=")).split("=")[1]
    files = dict(bytes=250000, rtf=0.125, broken=["it is wrong"])
    int8 = Account("int8", "ctc", cuts=7, same=5, wer=8.5, **files)
    (Path(exp) / "export").mkdir()
    path = Path(exp) / "export" / "parity.json"
    path.write_text(json.dumps({"forms": [int8.as_dict()]}), "utf8")
    done = invoke("report", *three, tmp_path / "out", "--lang", lang)
    assert (done.code, done.err) == (0, [])
    assert row in (tmp_path / "out" / f"report{ending}.md").read_text("utf8")


def test_both_files_are_written_and_the_rates_printed(
    invoke, three, fbank, targets, tmp_path
):
    out = tmp_path / "a" / "b"
    done = invoke("report", *three, "--manifest-dir", fbank, "--targets", targets, out)
    assert (done.code, done.err) == (0, [])
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "report.md"]
    title, head, row, *_ = done.out.splitlines()
    assert title == "WER (%) on the test sets"
    assert head.split()[:2] == ["decoding", "method"]
    assert (
        " ".join(row.split()) == "greedy_search test-clean 4.00 8.00 7.00 -12.5 % 25 %"
    )
    assert done.out.splitlines()[-3:-1] == [
        str(out / "report.md"),
        str(out / "report.html"),
    ]
    text = (out / "report.md").read_text("utf8")
    assert (
        "| greedy_search | test-clean | 4.00 | 8.00 | 7.00 | -12.5 % | 25 % |" in text
    )
    # 2 s of decoding for 40 s of audio.
    assert "| RTF, greedy_search | 0.0500 |" in text
    assert "| parameters | 4,000 | 1,000 (25.0 % of the teacher's) |" in text
    assert "| term | KD |" in text and "| ctc | 0 ... 0.2 |" in text
    assert "made.jsonl.gz | ctc dense | 1 | 0.00 |" in text


@pytest.mark.parametrize("lang, ending", [("en", ""), ("zh", ".zh-CN")])
def test_the_page_is_whole_and_needs_nothing_else(
    invoke, three, fbank, tmp_path, lang, ending
):
    words = ["report", *three, "--manifest-dir", fbank, "--lang", lang]
    assert invoke(*words, tmp_path / "out").code == 0
    text = (tmp_path / "out" / f"report{ending}.html").read_text("utf8")
    page = Page(text)
    assert page.links and all(link.startswith("#") for link in page.links)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert not re.search(r"@import|url\((?!#)", text)
    assert text.count("<figure>") == 2 + 1 + 3 + 1  # rates; legend, losses; weights
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.links} <= set(ids)
    assert {"teacher", "no KD", "KD", "7.00", "greedy_search"} <= set(page.text)


def test_the_chinese_report_has_its_own_names_and_words(invoke, three, tmp_path):
    done = invoke("report", *three, "--lang", "zh", tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["report.zh-CN.html", "report.zh-CN.md"]
    assert done.out.startswith("测试集上的 WER（%）\n")
    text = (tmp_path / "out" / "report.zh-CN.html").read_text("utf8")
    assert '<html lang="zh-CN">' in text and "教师" in text


def test_the_same_folders_give_the_same_bytes(invoke, three, fbank, tmp_path):
    for out in ("one", "two"):
        invoke("report", *three, "--manifest-dir", fbank, tmp_path / out)
    for name in ("report.md", "report.html"):
        one, two = ((tmp_path / out / name).read_bytes() for out in ("one", "two"))
        assert one == two


def test_names_and_titles_are_shown_as_they_are(invoke, make_exp, tmp_path):
    exp = make_exp("<i>x", {"a": 1, "kd_ctc_weight": 1.0}, 5.0)
    words = ["--model", f"<b>1&$2$=={exp}", "--title", "<u>a</u> | b"]
    # The name ends at the first "=".
    assert invoke("report", *words, tmp_path / "out").code == 1
    words[1] = f"<b>1&$2$={exp}"
    assert invoke("report", *words, tmp_path / "out").code == 0
    text = (tmp_path / "out" / "report.html").read_text("utf8")
    page = Page(text)
    assert not page.tags & {"b", "u", "i"}
    assert "<u>a</u> | b" in page.text and "<b>1&$2$" in page.text
    assert "5.00  <b>1&$2$" in page.text
    assert "### \\<u\\>a\\</u\\> \\| b" in (tmp_path / "out" / "report.md").read_text()


def test_the_unit_of_the_heading_can_be_told(invoke, three, tmp_path):
    done = invoke("report", *three, "--unit", "CER", tmp_path / "out")
    assert done.out.startswith("CER (%) on the test sets\n")


def test_who_is_compared_with_whom_can_be_told(invoke, three, tmp_path):
    words = ["--teacher", "KD", "--baseline", "teacher"]
    assert invoke("report", *three, *words, tmp_path / "out").code == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert (
        'Compared: "no KD" with "teacher", the student without KD; the teacher is '
        in (text)
    )
    # From 4 to 8, where the teacher has 7.
    assert "| 4.00 | 8.00 | 7.00 | +100.0 % | - |" in text


def test_a_baseline_alone_leaves_the_first_other_model_as_the_teacher(
    invoke, three, tmp_path
):
    invoke("report", *three, "--baseline", "teacher", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert 'Compared: "KD" with "teacher"' in text
    assert 'the teacher is "no KD"' in text


def test_what_is_missing_is_a_dash_and_a_note(invoke, make_exp, three, tmp_path):
    bare = make_exp("bare", {"base_lr": 0.045})
    only_results = make_exp("results", None, 6.0)
    words = ["--model", f"bare={bare}", "--model", f"results={only_results}"]
    done = invoke("report", *three, *words, tmp_path / "out")
    assert done.code == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 4.00 | 8.00 | 7.00 (-12.5 %) | - | 6.00 (-25.0 %) |" in text
    assert "- bare: no decoding results in" in text
    assert "- results: no training log in" in text
    assert (
        "- No RTF, as the seconds of audio are not known: give --manifest-dir" in text
    )


def test_one_model_alone_makes_a_report(invoke, make_exp, tmp_path):
    exp = make_exp("t", {"a": 1}, 4.0)
    assert invoke("report", "--model", f"t={exp}", tmp_path / "out").code == 0


# Refusals, in one sentence, with nothing written


def test_a_model_without_an_equals_sign_is_refused(refused, make_exp, tmp_path):
    exp = make_exp("t", {"a": 1})
    for word in (exp, f"={exp}", "t="):
        said = refused("report", "--model", word, tmp_path / "out")
        assert "is not NAME=EXP_DIR" in said and str(word) in said


def test_a_folder_given_twice_for_a_model_is_refused(refused, three, tmp_path):
    again = tmp_path / "k" / ".." / "k"
    said = refused("report", *three, "--model", f"KD={again}", tmp_path / "out")
    assert f"--model gives 'KD' the folder {again} twice: give each seed" in said


def test_a_folder_that_does_not_exist_is_refused(refused, three, tmp_path):
    said = refused(
        "report", *three, "--model", f"x={tmp_path / 'no'}", tmp_path / "out"
    )
    assert f"{tmp_path / 'no'} of 'x' does not exist: mend --model" in said


def test_a_folder_without_logs_and_results_is_refused(refused, make_exp, tmp_path):
    exp = make_exp("empty")
    said = refused("report", "--model", f"x={exp}", tmp_path / "out")
    assert f"{exp} of 'x' has neither log/log-train-* nor" in said


@pytest.mark.parametrize("option", ["teacher", "baseline"])
def test_a_role_of_no_model_is_refused(refused, three, tmp_path, option):
    said = refused("report", *three, f"--{option}", "x", tmp_path / "out")
    assert f"--{option} is 'x', and the models are teacher, no KD, KD" in said


def test_one_model_in_both_roles_is_refused(refused, three, tmp_path):
    words = ["--teacher", "KD", "--baseline", "KD"]
    said = refused("report", *three, *words, tmp_path / "out")
    assert "--teacher and --baseline are both 'KD'" in said


def test_an_out_dir_that_is_a_file_is_refused(refused, three, tmp_path):
    (tmp_path / "out").write_text("mine")
    said = refused("report", *three, tmp_path / "out")
    assert f"{tmp_path / 'out'} is a file, and OUT_DIR must be a folder" in said


def test_a_manifest_dir_that_is_none_is_refused(refused, three, tmp_path):
    words = ["--manifest-dir", tmp_path / "no"]
    said = refused("report", *three, *words, tmp_path / "out")
    assert f"--manifest-dir {tmp_path / 'no'} is not a folder" in said


def test_targets_that_were_moved_are_read_where_their_manifest_is(
    invoke, three, targets, tmp_path
):
    new = tmp_path / "elsewhere"
    new.mkdir()
    targets = targets.rename(new / targets.name)
    (tmp_path / "made").rename(new / "made")
    read_fingerprint.cache_clear()
    done = invoke("report", *three, "--targets", targets, tmp_path / "out")
    assert (done.code, done.err) == (0, [])
    assert "ctc dense" in (tmp_path / "out" / "report.md").read_text("utf8")


def test_targets_that_do_not_exist_are_refused(refused, three, tmp_path):
    words = ["--targets", tmp_path / "no.jsonl.gz"]
    said = refused("report", *three, *words, tmp_path / "out")
    assert f"the manifest {tmp_path / 'no.jsonl.gz'} does not exist" in said


DAMAGES = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "no gzip": lambda whole: b"no gzip at all\n" * 9,
    "no JSON": lambda whole: gzip.compress(gzip.decompress(whole) + b"{]\n"),
    "no cut": lambda whole: gzip.compress(gzip.decompress(whole) + b'{"id": 1}\n'),
    "empty": lambda whole: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("which", ["audio", "targets"])
def test_a_damaged_manifest_is_refused(
    refused, three, fbank, targets, tmp_path, damage, which
):
    path = {"audio": next(fbank.iterdir()), "targets": targets}[which]
    path.write_bytes(damage(path.read_bytes()))
    words = ["--manifest-dir", fbank, "--targets", targets]
    said = refused("report", *three, *words, tmp_path / "out")
    assert str(path) in said


def test_a_damaged_summary_is_refused(refused, three, tmp_path):
    path = tmp_path / "k" / "greedy_search" / f"wer-summary-test-clean-{SUFFIX}.txt"
    path.write_text("settings\tWER\n")
    said = refused("report", *three, tmp_path / "out")
    assert f"{path} holds no error rate" in said


def test_without_matplotlib_it_is_refused_before_any_work(run_python, tmp_path):
    done = run_python(
        "import sys; sys.argv = ['icefall-kd', 'report', '--model', 'x', "
        f"{str(tmp_path / 'out')!r}]\n"
        "from icefall_kd.cli import main\n"
        "main()",
        block=["matplotlib"],
    )
    assert done.returncode == 1 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith("icefall_kd: error: ")
    assert 'pip install "icefall_kd[report]"' in said
    assert not (tmp_path / "out").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    invoke, three, tmp_path, monkeypatch
):
    invoke("report", *three, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    from pathlib import Path

    real = Path.write_text

    def fail(self, text, **options):
        if self.name.endswith(".html"):
            raise OSError(28, "No space left on device", str(self))
        return real(self, text, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    done = invoke("report", *three, "--title", "new", tmp_path / "out")
    assert done.code == 1 and len(done.err) == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before

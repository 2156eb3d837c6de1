"""``icefall-kd plot``: each kind, what it prints and writes, and all refusals."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from lhotse import CutSet

from icefall_kd.cli.plot import KINDS

pytest.importorskip("matplotlib")
LENGTHS = {"c1": 47, "c2": 90, "c3": 61}
TEXTS = {"c1": "zero one", "c2": "seven two nine", "c3": "four"}


@pytest.fixture
def write_cuts(make_cut, tmp_path):
    def write(name="dev", **options):
        path = tmp_path / f"{name}.jsonl.gz"
        text = options.pop("text", None)
        cuts = (
            make_cut(i, n, text=TEXTS[i] if text is None else text, **options)
            for i, n in LENGTHS.items()
        )
        CutSet.from_cuts(cuts).to_file(path)
        return path

    return write


@pytest.fixture
def words(teacher_words, bpe_models, write_cuts, tmp_path):
    """A kind of picture of cuts; a word given twice counts the second time."""
    cuts = write_cuts()

    def make(kind, *more, cuts=cuts, out=tmp_path / "out" / "p.svg"):
        options = ["--bpe-model", bpe_models.a, "--cuts", cuts]
        return ["plot", kind, out, *teacher_words, *options, *more]

    return make


@pytest.fixture
def students(another_exp):
    """Words for two students of other parameters."""
    folders = [another_exp(seed)[0] for seed in (5, 6)]
    names = ("no KD", "KD")
    return [w for n, f in zip(names, folders) for w in ("--student", f"{n}={f}")]


def texts(path):
    svg = path.read_text("utf8")
    assert ET.fromstring(svg).tag.endswith("svg")
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


# What is drawn


def test_all_kinds_are_listed_without_torch(run_python):
    code = "from icefall_kd.cli import cli\n"
    code += "cli(['plot', '--help'], standalone_mode=False)\n"
    done = run_python(code + "import sys\nprint('torch' in sys.modules)")
    for kind, (_, sentence) in KINDS.items():
        assert f"  {kind} " in done.stdout and sentence[:40] in done.stdout, done
    assert done.stdout.endswith("False\n")


def test_a_lattice_is_drawn_with_its_tokens(invoke, words, tmp_path, loaded_once):
    done = invoke(*words("lattice", "--cut-id", "c2", "--s-range", 3))
    assert (done.code, done.err) == (0, []), done
    first, path = done.out.splitlines()
    assert re.fullmatch(
        r"21 frames, \d+ tokens; ranges of 3 leave out [\d.e+-]+ % of the occupancy",
        first,
    )
    found = texts(tmp_path / "out" / "p.svg")
    assert path.endswith("p.svg") and "c2: seven two nine" in found
    assert sum(t.startswith("\u2581") for t in found) >= 3


def test_a_lattice_of_another_language(invoke, words, tmp_path, loaded_once):
    assert invoke(*words("lattice", "--lang", "zh")).code == 0
    found = texts(tmp_path / "out" / "p.svg")
    assert "c1: zero one" in found and "最优路径" in found


def test_spikes_of_all_models_are_drawn_and_printed(
    invoke, words, students, tmp_path, loaded_once
):
    done = invoke(*words("spikes", "--cut-id", "c2", *students))
    assert (done.code, done.err) == (0, []), done
    rows = done.out.splitlines()
    assert rows[0].startswith("model ")
    assert [row.partition("  ")[0] for row in rows[1:4]] == ["teacher", "no KD", "KD"]
    found = texts(tmp_path / "out" / "p.svg")
    assert {"teacher", "no KD", "KD", "c2: seven two nine"} <= set(found)


def test_the_kl_of_all_students_is_drawn_and_printed(
    invoke, words, students, tmp_path, loaded_once
):
    out = tmp_path / "p.png"
    done = invoke(*words("kl", "--num-cuts", 2, *students, out=out))
    assert done.code == 0, done
    rows = [re.split("  +", line)[:2] for line in done.out.splitlines()[1:7]]
    kinds = ("blank", "neighbour", "spike")
    assert rows == [[name, kind] for name in ("no KD", "KD") for kind in kinds]
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_students_epoch_is_its_last_or_the_one_that_is_named(
    invoke, words, another_exp, tmp_path, loaded_once, teacher_exp
):
    folder = tmp_path / "student"
    folder.mkdir()
    for epoch, seed in ((2, 5), (4, 6)):
        checkpoint = another_exp(seed)[0] / "epoch-2.pt"
        (folder / f"epoch-{epoch}.pt").write_bytes(checkpoint.read_bytes())
    drawn = []
    for more in ([], ["--student-epoch", 4], ["--student-epoch", 2]):
        done = invoke(*words("spikes", "--student", f"s={folder}", *more))
        assert done.code == 0, done
        drawn.append((tmp_path / "out" / "p.svg").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_error_rates_are_drawn_against_costs(invoke, three, fbank, tmp_path):
    out = tmp_path / "wer.svg"
    done = invoke("plot", "wer", *three, "--manifest-dir", fbank, out)
    assert (done.code, done.err, done.out) == (0, [], f"{out}\n")
    found = texts(out)
    names = {"teacher", "no KD", "KD", "parameters", "RTF of decoding"}
    assert names | {"test-clean: WER (%)"} <= set(found)
    done = invoke("plot", "wer", *three, "--unit", "CER", "--lang", "zh", out)
    assert done.code == 0
    assert {"test-clean: CER (%)", "解码秒数", "参数量"} <= set(texts(out))


def test_losses_are_drawn_by_name(invoke, three, tmp_path):
    out = tmp_path / "losses.svg"
    done = invoke("plot", "losses", *three, out)
    assert (done.code, done.err, done.out) == (0, [], f"{out}\n")
    found = texts(out)
    assert {"loss", "ctc_loss", "kd_ctc_loss", "teacher", "no KD", "KD"} <= set(found)
    assert found.count("epochs") == 3


@pytest.mark.parametrize("lang, word", [("en", "cuts"), ("zh", "教师")])
def test_the_way_is_drawn_with_the_commands(invoke, tmp_path, lang, word):
    out = tmp_path / "way.svg"
    assert invoke("plot", "way", "--lang", lang, out).code == 0
    found = texts(out)
    commands = {"plug", "dump", "student", "train.py", "decode", "export", "report"}
    assert commands | {word} <= set(found)


def test_the_report_has_pictures_that_were_drawn(invoke, three, tmp_path):
    way, out = tmp_path / "way.svg", tmp_path / "out"
    assert invoke("plot", "way", way).code == 0
    done = invoke("report", *three, out, "--picture", f"a=b <way>={way}")
    assert (done.code, done.err) == (0, [])
    page = (out / "report.html").read_text("utf8")
    section = page.partition("<h2>Pictures</h2>")[2]
    assert "<figcaption>a=b &lt;way&gt;</figcaption>" in section
    assert section.count("<svg") == 1 and "train.py" in section
    assert "Pictures" in (out / "report.md").read_text("utf8")


# Refusals


def test_a_picture_that_is_none_of_the_three_kinds(refused, words, tmp_path):
    for kind in ("lattice", "spikes", "kl"):
        out = tmp_path / "p.jpg"
        more = [] if kind == "lattice" else ["--student", "s=x"]
        message = refused(*words(kind, *more, out=out))
        assert f"OUT is {out}, and a picture is a file that ends with" in message
    assert "ends with .svg, .png or .pdf" in refused("plot", "way", tmp_path / "way")


def test_an_unknown_cut(refused, words, students, loaded_once, tmp_path):
    for kind, more in (("lattice", []), ("spikes", students), ("kl", students)):
        message = refused(*words(kind, *more, "--cut-id", "c9"))
        assert message.endswith(
            f"the manifest {tmp_path}/dev.jsonl.gz has no cut c9: give --cut-id one of "
            "its own, such as c1"
        )


def test_cuts_that_the_model_can_not_hear(
    refused, words, write_cuts, make_cut, tmp_path, loaded_once
):
    message = refused(*words("lattice", cuts=write_cuts("wide", num_features=40)))
    assert (
        "c1 of" in message and "40 features a frame and the model takes 20" in message
    )
    bare, short = tmp_path / "bare.jsonl.gz", tmp_path / "short.jsonl.gz"
    CutSet.from_cuts([make_cut("c1", 47).drop_features()]).to_file(bare)
    assert "has no features: compute them first" in refused(
        *words("lattice", cuts=bare)
    )
    CutSet.from_cuts([make_cut("c1", 5)]).to_file(short)
    message = refused(*words("lattice", cuts=short))
    assert "has 5 feature frames and the teacher needs 9: give --cut-id" in message


def test_transcripts_that_make_no_lattice(
    refused, words, write_cuts, make_cut, tmp_path, loaded_once
):
    message = refused(*words("lattice", cuts=write_cuts("silent", text="")))
    assert "c1 has no transcript, and a lattice needs one" in message
    message = refused(*words("lattice", cuts=write_cuts("chinese", text="zero 一")))
    assert "can't spell the transcript 'zero 一' of the cut c1" in message
    assert "the tokens of --bpe-model" in message
    long = tmp_path / "long.jsonl.gz"
    CutSet.from_cuts([make_cut("c1", 23, text="zero one two three")]).to_file(long)
    message = refused(*words("lattice", cuts=long))
    assert "labels and the teacher outputs 4 frames" in message


def test_models_that_do_not_fit(
    refused, words, another_exp, teacher_exp, tmp_path, loaded_once
):
    folder, _ = another_exp(7, vocab_size=26)
    for kind in ("spikes", "kl"):
        message = refused(*words(kind, "--student", f"s={folder}"))
        assert "has vocab_size 26 and the teacher in" in message
    other = tmp_path / "rate"
    other.mkdir()
    checkpoint = torch.load(teacher_exp.folder / "epoch-2.pt", weights_only=False)
    torch.save({**checkpoint, "subsampling_factor": 8}, other / "epoch-2.pt")
    message = refused(*words("kl", "--student", f"s={other}"))
    assert "has subsampling_factor 8 and the teacher in" in message


def test_students_that_are_not_there(refused, words, tmp_path, loaded_once):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        message = refused(*words("kl", "--student", f"s={tmp_path / name}"))
        assert f"folder {tmp_path / name} has no epoch-N.pt: give" in message
    message = refused(*words("kl", "--student", "s"))
    assert "--student 's' is not NAME=EXP_DIR" in message
    both = ["--student", f"s={tmp_path}/a", "--student", f"s={tmp_path}/b"]
    assert "the student 's' has 2 folders" in refused(*words("kl", *both))


def test_a_picture_with_tokens_needs_them(refused, words, students, loaded_once):
    for kind, more in (("lattice", []), ("spikes", students), ("kl", students)):
        message = refused(*words(kind, *more, "--bpe-model", ""))
        assert "--bpe-model is empty, and the picture has the texts" in message


def test_a_head_that_is_missing(
    refused, words, another_exp, students, tmp_path, loaded_once
):
    ctc, _ = another_exp(8, use_transducer=False)
    message = refused(*words("lattice", "--exp-dir", ctc))
    assert "and a lattice needs a transducer head" in message
    rnnt, _ = another_exp(9, use_ctc=False)
    for kind in ("spikes", "kl"):
        message = refused(*words(kind, "--student", f"s={rnnt}"))
        assert "has no CTC head" in message


def test_folders_without_what_is_drawn(refused, make_exp, tmp_path):
    out = tmp_path / "p.svg"
    make_exp("decoded", None, 5.0)
    message = refused("plot", "losses", "--model", f"a={tmp_path}/decoded", out)
    assert f"the logs in {tmp_path}/decoded have no losses: give folders" in message
    make_exp("trained", {"base_lr": 0.045})
    message = refused("plot", "wer", "--model", f"a={tmp_path}/trained", out)
    assert "no --model has results of decode.py" in message
    (tmp_path / "decoded" / "greedy_search" / "log-decode").touch()
    for path in (tmp_path / "decoded" / "greedy_search").glob("log-decode-*"):
        path.unlink()
    message = refused("plot", "wer", "--model", f"a={tmp_path}/decoded", out)
    assert "no log of --model has a number of parameters or seconds" in message


def test_what_is_no_picture_for_the_report(refused, three, tmp_path):
    broken = tmp_path / "broken.svg"
    broken.write_text("<svg")
    for value, part in (
        ("way.svg", "is not CAPTION=FILE.svg: give a caption and an SVG"),
        ("a=way.png", "is not CAPTION=FILE.svg"),
        ("a=nowhere.svg", "--picture nowhere.svg does not exist: draw it first"),
        (f"a={broken}", f"--picture {broken} is no SVG: draw it again"),
    ):
        assert part in refused("report", *three, tmp_path / "out", "--picture", value)


def test_without_matplotlib_it_is_refused_before_any_work(run_python, tmp_path):
    code = "from icefall_kd.cli import main\nmain()\n"
    done = run_python(
        "import sys\n" + code, "plot", "way", tmp_path / "w.svg", block=["matplotlib"]
    )
    assert done.returncode == 1
    assert 'pip install "icefall_kd[report]"' in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "w.svg").exists()

"""The documents: their links, commands, options, files and Python, against the code."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from icefall_kd.cli import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/[ez]*/*.md")]
    + [*ROOT.glob("tools/*.md"), *ROOT.glob("egs/*/ASR/*.md")]
)
# Options of icefall, pytest, pip and other programs that the documents name.
OTHERS = """
    --manifest-dir --start-epoch --num-epochs --max-duration --use-fp16 --full-libri
    --use-averaged-model --chunk-size --left-context-frames --num-encoder-layers
    --ctc-loss-scale --use-cr-ctc --enable-spec-aug --use-ctc --use-transducer
    --base-lr --jit --world-size --epoch --avg --iter --exp-dir --lang-dir
    --bpe-model --recipe --num-workers --gres --array --wrap --logdir
    --master-port --help --causal --dist --embed-channels --nproc_per_node --no_python
    --nnodes --node_rank --master_addr --rdzv_backend
    --feedforward-dim --encoder-unmasked-dim --prune-range --spec-aug-time-warp-factor
""".split()
TOOLS = [*ROOT.glob("tools/*.sh"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.sh")]
TOOLS += [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("egs/*/ASR/local/*.py")]


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """The words of each shell command in a document."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.fixture(scope="module")
def options_page():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "options_table.py"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


def test_the_page_of_options_is_what_the_code_has(options_page):
    """Else run tools/options_table.py > docs/options.md."""
    assert (ROOT / "docs" / "options.md").read_text("utf8") == options_page


@pytest.mark.slow  # CI asks: who words a message need not print the page each time
def test_the_page_of_refusals_is_what_the_code_has():
    """Else run tools/refusals_table.py > docs/refusals.md."""
    script = ROOT / "tools" / "refusals_table.py"
    done = subprocess.run([sys.executable, script], capture_output=True, check=True)
    page = done.stdout.decode("utf8")
    assert (ROOT / "docs" / "refusals.md").read_text("utf8") == page
    rows = re.findall(r"^\| (.+) \| (.*) \| (`.+`) \|$", page, re.M)
    assert len(rows) > 500
    # Nearly all say what to do; the others name what is wrong, or the call adds it.
    assert sum(not cure.strip() for _, cure, _ in rows) < 0.1 * len(rows)


def test_every_option_has_a_meaning(options_page):
    rows = re.findall(r"^\| `(-.*?)` \| .*? \|(.*)\|$", options_page, re.M)
    assert len(rows) > 150
    assert [name for name, meaning in rows if not meaning.strip()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_files(path):
    text = path.read_text("utf8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_options_that_a_document_names_exist(path, options_page):
    sources = "".join(p.read_text("utf8") for p in TOOLS)
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", options_page + sources))
    text = path.read_text("utf8")
    former = text.find("## Former names")
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*[\w*]", text[: former % (1 << 30)])
    assert [o for o in named if o not in known | set(OTHERS) and o[-1] != "*"] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_of_icefall_kd_are_understood(path):
    for words in commands(path.read_text("utf8")):
        if words[0] != "icefall-kd":
            continue
        is_plot = words[1] == "plot"
        name, values = " ".join(words[1 : 2 + is_plot]), words[2 + is_plot :]
        with cli.leaves()[name].make_context(name, values) as context:
            flags = context.params.get("model_flags") or ()
        # Of what it takes as a model's flags, each is one of the recipe's.
        assert {f for f in flags if f.startswith("--")} <= set(OTHERS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_scripts_that_a_document_calls_exist_and_have_its_options(path):
    for words in commands(path.read_text("utf8")):
        name = words[1] if words[0] == "bash" else words[0]
        if not re.search(r"^(\./|egs/|tools/|tests/).*\.(sh|py)$", name):
            continue
        if name.startswith("./zipformer_kd/"):  # the copy that a user plugged
            continue
        script = (path.parent if name.startswith("./") else ROOT) / name
        assert script.exists(), name
        if script.suffix == ".sh" and re.search(
            r"^# Options|^\. .*/run\.sh", script.read_text(), re.M
        ):
            done = subprocess.run([script, "--help"], capture_output=True, text=True)
            options = re.findall(r"^  (--[a-z-]+) ", done.stdout, re.M)
            assert {w for w in words if re.match("--[a-z-]+$", w)} <= {
                *options,
                "--help",
            }


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_a_document_names_exist(path):
    named = set(
        re.findall(
            r"`((?:icefall_kd|egs|tools|tests|benchmarks|docs)/[^`*\s]*)`",
            path.read_text("utf8"),
        )
    )
    # What `make docs` makes.
    named = {name for name in named if not name.startswith("docs/build")}
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_modules_that_a_document_names_exist(path):
    """As `losses/ctc.py`, in the folder of the package."""
    folders = {p.name for p in (ROOT / "icefall_kd").iterdir() if p.is_dir()}
    names = re.findall(r"`(\w+)/(\w+\.py)`", path.read_text("utf8"))
    package = [(folder, name) for folder, name in names if folder in folders]
    assert [
        p for p in package if not (ROOT / "icefall_kd" / p[0] / p[1]).exists()
    ] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_of_a_document_imports_what_there_is(path):
    for block in blocks(path.read_text("utf8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(
                "icefall_kd"
            ):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), alias.name


def test_both_languages_have_the_same_commands():
    """All but names that are shown, as of models in a report."""
    chinese = [ROOT / "README.zh-CN.md", *ROOT.glob("egs/*/ASR/README.zh-CN.md")]
    pairs = [(path.with_name("README.md"), path) for path in chinese]
    english = sorted(ROOT.glob("docs/en/*.md"))
    assert [p.name for p in english] == sorted(p.name for p in ROOT.glob("docs/zh/*"))
    pairs += [(path, ROOT / "docs" / "zh" / path.name) for path in english]
    for path, other in pairs:
        both = [list(commands(p.read_text("utf8"))) for p in (path, other)]
        assert [w[0] for w in both[0]] == [w[0] for w in both[1]]
        tables = [p.read_text("utf8").count("\n|---") for p in (path, other)]
        assert tables[0] == tables[1]


def test_the_readme_names_the_command_that_tests_everything():
    assert ["bash", "tests/run.sh"] in commands((ROOT / "README.md").read_text("utf8"))
    assert "bash tests/run.sh" in (ROOT / ".ci" / "run").read_text()


WALK = re.compile(r"^\| \d+ \| `(\S+)` \| `(\w+)` \|", re.M)


@pytest.mark.parametrize(
    "step",
    list(enumerate(WALK.findall((ROOT / "docs" / "design.md").read_text("utf8")), 1)),
    ids=lambda step: f"{step[0]} {step[1][1]}",
)
def test_each_step_of_the_walks_through_the_code_exists(step):
    file, name = step[1]
    tree = ast.parse((ROOT / "icefall_kd" / file).read_text("utf8"))
    definitions = (ast.FunctionDef, ast.ClassDef)
    names = {n.name for n in ast.walk(tree) if isinstance(n, definitions)}
    assert name in names


def test_the_walks_have_all_their_steps():
    text = (ROOT / "docs" / "design.md").read_text("utf8")
    assert len(WALK.findall(text)) == len(re.findall(r"^\| \d+ \|", text, re.M)) > 30


def test_the_design_names_each_folder_and_module_of_the_package():
    text = (ROOT / "docs" / "design.md").read_text("utf8")
    named = set(re.findall(r"^\| `([\w./]+)` \|", text, re.M))
    package = ROOT / "icefall_kd"
    there = {p.name for p in package.glob("*.py")} - {"__init__.py", "recipe.py"}
    there |= {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert there <= named


def test_the_examples_of_a_new_kind_and_a_new_term_work():
    import textwrap

    import numpy as np
    import torch

    from icefall_kd import EncoderOut, JointKDLoss, Targets
    from icefall_kd.kinds import FrameKind
    from icefall_kd.terms.base import Option, Term
    from icefall_kd.terms.schedule import Curve

    names = {"FrameKind": FrameKind, "Term": Term, "Option": Option, "Curve": Curve}
    names.update(np=np, torch=torch)
    text = (ROOT / "docs" / "design.md").read_text("utf8")
    for block in re.findall(r"^   ```python\n(.*?)^   ```", text, re.M | re.S):
        exec(textwrap.dedent(block), names)

    g = torch.Generator().manual_seed(7)
    lens = torch.tensor([5, 3])
    teacher = EncoderOut(torch.randn(2, 5, 6, generator=g), lens)
    student = EncoderOut(torch.randn(2, 5, 4, generator=g), lens)
    kind = names["EnergyKind"]("float", 11, 0)
    values = kind.take(teacher)
    records = [kind.encode(value, "c1") for value in values]
    frames = [kind.frames(value)[0] for value in values]
    assert frames == [5, 3]
    index = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 0, 0]])
    energies = kind.collate(records, frames, index, [0, 1])
    assert torch.equal(energies[1, :3], teacher.encoder_out[1, :3].norm(dim=-1))
    with pytest.raises(ValueError, match="8 energies, and not 9"):
        kind.decode(records, [5, 4])

    joint = JointKDLoss([names["EnergyTerm"](weight=2.0)], hard_weight=0.0)
    assert joint.kinds == ["energy"]
    loss, info = joint(
        torch.tensor(3.0), student, Targets(lens, parts={"energy": energies})
    )
    expected = sum(
        float(
            (student.encoder_out[n, t].norm() - teacher.encoder_out[n, t].norm()) ** 2
        )
        for n, t in [(0, t) for t in range(5)] + [(1, t) for t in range(3)]
    )
    assert float(loss) == pytest.approx(2 * expected, rel=1e-5)
    assert info["kd_energy_loss"] == pytest.approx(expected, rel=1e-5)
    assert info["kd_energy_frames"] == 8


def test_imports_go_up_the_table_of_the_design():
    text = (ROOT / "docs" / "design.md").read_text("utf8")
    section = text.split("## Folders and modules")[1].split("\n## ")[0]
    order = [
        name.strip("/") for name in re.findall(r"^\| `([\w./]+)` \|", section, re.M)
    ]
    exceptions = set(re.findall(r"`(\w+/\w+\.py)` (?:compares|runs)", section))
    package, wrong = ROOT / "icefall_kd", set()
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        folder = name.split("/")[0]
        imports = re.findall(r"^\s*from icefall_kd\.(\w+)", path.read_text(), re.M)
        for module in imports if folder in order else ():
            if f"{module}.py" in order:
                module = f"{module}.py"
            if order.index(module) > order.index(folder):
                wrong.add(name)
    assert wrong == exceptions

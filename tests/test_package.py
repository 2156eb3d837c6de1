"""The package is cheap to import, and its public names are enough."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import icefall_kd

ROOT = Path(icefall_kd.__file__).parents[1]
DEEPER = "icefall_kd."
USERS = sorted([*ROOT.glob("egs/**/*.py"), *ROOT.glob("benchmarks/*.py")])
HEAVY = {"torch", "k2", "fast_rnnt", "lhotse", "numpy"}
LIST = "import sys; print(' '.join(sorted({m.partition('.')[0] for m in sys.modules})))"


@pytest.mark.parametrize(
    "module", ["icefall_kd", "icefall_kd.cli", "icefall_kd.training.session"]
)
def test_import_loads_nothing_heavy(run_python, module):
    done = run_python(f"import {module}\n{LIST}")
    loaded = set(done.stdout.split())
    assert "icefall_kd" in loaded, done.stderr
    assert not loaded & HEAVY


def test_the_first_use_of_a_name_imports_it(run_python):
    done = run_python(f"import icefall_kd\nicefall_kd.ctc_kd_loss\n{LIST}")
    loaded = set(done.stdout.split())
    assert "torch" in loaded, done.stderr
    assert not loaded & {"k2", "fast_rnnt", "lhotse"}


@pytest.mark.parametrize("name", icefall_kd.__all__)
def test_every_public_name_is_there(name):
    assert getattr(icefall_kd, name) is not None
    assert name in dir(icefall_kd)


@pytest.mark.parametrize(
    "name, module",
    [
        ("KDError", "icefall_kd.errors"),
        ("ModelTap", "icefall_kd.tap"),
        ("TargetWriter", "icefall_kd.targets.writer"),
        ("JointKDLoss", "icefall_kd.terms.joint"),
        ("build_student", "icefall_kd.student.build"),
        ("ctc_kd_loss", "icefall_kd.losses.ctc"),
        ("dump_targets", "icefall_kd.targets.dump"),
        ("Teacher", "icefall_kd.teacher.teacher"),
        ("TeacherSpec", "icefall_kd.teacher.spec"),
    ],
)
def test_a_public_name_is_that_of_its_module(name, module):
    value = getattr(icefall_kd, name)
    assert (value.__name__, value.__module__) == (name, module)
    assert name in icefall_kd.__all__


def deeper_imports(path):
    """What a file imports from the package's modules, as (module, name)."""
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(DEEPER):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_and_benchmarks_import_public_names_from_the_package(path):
    public = {id(getattr(icefall_kd, name)) for name in icefall_kd.__all__}
    deeper = [
        f"{module}.{name}"
        for module, name in deeper_imports(path)
        if id(getattr(import_module(module), name, None) or path) in public
    ]
    assert deeper == []


def test_an_import_from_a_module_is_seen(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from icefall_kd.errors import KDError as Error, require\n")
    assert list(deeper_imports(script)) == [
        ("icefall_kd.errors", "KDError"),
        ("icefall_kd.errors", "require"),
    ]


def test_the_former_name_of_the_tap_is_the_same_class():
    assert icefall_kd.TeacherHook is icefall_kd.ModelTap


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = icefall_kd.Nope


# What a bare `pip install icefall_kd` does not bring.
OPTIONAL = ["kaldialign", "matplotlib", "multi_quantization", "onnx", "onnxruntime"]
OPTIONAL += ["sherpa_onnx", "sentencepiece", "tensorboard", "zipformer"]
OPTIONAL += ["k2", "fast_rnnt", "kaldifeat", "icefall", "sphinx"]


@pytest.mark.slow
def test_all_commands_and_names_are_there_without_optional_packages(run_python):
    code = """
import icefall_kd
from icefall_kd.cli import cli
for name in icefall_kd.__all__:
    getattr(icefall_kd, name)
for command in cli.leaves().values():
    print(command.name)
"""
    done = run_python(code, block=OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert {"dump", "export", "student"} <= set(done.stdout.split())


@pytest.mark.slow
def test_scores_without_kaldialign_are_one_sentence(run_python, teacher_exp, tmp_path):
    code = "import sys\nfrom icefall_kd.cli import main\nmain()\n"
    words = ["student", "--recipe", teacher_exp.recipe, "--exp-dir", teacher_exp.folder]
    words += ["--epoch", 2, "--use-averaged-model", 0, "--bpe-model", "bpe.model"]
    words += ["--cuts", "cuts.jsonl.gz", "--student-dir", tmp_path / "student"]
    done = run_python(code, *words, block=["kaldialign"])
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert 'pip install "icefall_kd[report]"' in done.stderr
    assert not (tmp_path / "student").exists()

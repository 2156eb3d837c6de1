"""The package is cheap to have around."""

import re
from pathlib import Path

import pytest

import icefall_kd

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


@pytest.mark.parametrize(
    "name, module",
    [
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
def test_a_public_name_is_in_its_module(name, module):
    found = getattr(icefall_kd, name)
    assert (found.__name__, found.__module__) == (name, module)
    assert name in dir(icefall_kd) and name in icefall_kd.__all__


def test_the_former_name_of_the_tap_opens_the_same_door():
    assert icefall_kd.TeacherHook is icefall_kd.ModelTap


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = icefall_kd.Nope


def test_version_is_that_of_setup():
    setup = Path(icefall_kd.__file__).parents[1] / "setup.py"
    version = re.search(r'version="([^"]+)"', setup.read_text("utf8")).group(1)
    assert icefall_kd.__version__ == version

"""Where Python lacks what Linux has: as on Windows, and on odd file systems."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.plug.plug import plug

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "egs" / "digits" / "ASR" / "zipformer"

# The libraries come first: they know what to do without.
WITHOUT = """
import os, signal, sys
import click, lhotse.dataset, sentencepiece, torch, torch.distributed, tqdm.auto, yaml
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for module, names in (
    (os, "pread fork symlink sched_getaffinity O_CLOEXEC uname".split()),
    (signal, "SIGHUP SIGKILL SIGUSR1".split()),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""


@pytest.fixture
def elsewhere(run_python):
    """Run code where those are missing; its output."""

    def run(code, *args):
        done = run_python(WITHOUT + code, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_all_modules_can_be_imported(elsewhere):
    code = """
import pkgutil, importlib, icefall_kd
for found in pkgutil.walk_packages(icefall_kd.__path__, "icefall_kd."):
    importlib.import_module(found.name)
    print(found.name)
"""
    names = elsewhere(code).split()
    assert {"icefall_kd.targets.writer", "icefall_kd.cli.dump"} <= set(names)


def test_targets_are_read(elsewhere, make_cut, make_store, read_targets, tmp_path):
    cuts = make_store([make_cut("c1", 47), make_cut("c2", 61)])
    code = """
import sys, torch
from lhotse import load_manifest
from icefall_kd.targets.dataset import store_fingerprint
from icefall_kd.targets.reading import collate_targets
cuts = list(load_manifest(sys.argv[1]))
store_fingerprint(cuts)
found = collate_targets(cuts)
torch.save((found.parts["ctc"], found.lens), sys.argv[2])
"""
    elsewhere(code, tmp_path / "kd.jsonl.gz", tmp_path / "found.pt")
    ctc, lens = torch.load(tmp_path / "found.pt")
    for row, n, cut in zip(ctc, lens.tolist(), cuts):
        assert torch.equal(row[:n], read_targets(cut))


def test_to_write_targets_says_what_it_needs(elsewhere, tmp_path, tree_of):
    code = """
import sys
from icefall_kd.errors import KDError
from icefall_kd.targets import Fingerprint, TargetWriter
mark = Fingerprint("a", "", 11, 0, 4, 0.04, 8000, 20, "kaldi-fbank")
try:
    TargetWriter(sys.argv[1] + "/out.jsonl.gz", sys.argv[1] + "/kd", mark)
except KDError as e:
    print(e)
"""
    told = elsewhere(code, tmp_path)
    assert "file locks (the module fcntl)" in told and "Linux or macOS" in told
    assert len(told.splitlines()) == 1
    assert tree_of(tmp_path) == {}


def test_a_file_system_without_links_is_named(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    recipe = shutil.copytree(RECIPE, tmp_path / "zipformer")
    (recipe / "README.md").write_text("A file that is linked.\n", "utf8")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    new = tmp_path / "zipformer_kd"
    with pytest.raises(KDError, match="symbolic links.*another file system") as e:
        plug(recipe, new)
    assert str(new) in str(e.value)
    assert list(tmp_path.iterdir()) == [recipe]

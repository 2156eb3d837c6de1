"""Cuts with audio, and a program that plays the teacher."""

import shlex
import sys
from pathlib import Path

import pytest
from exporting import speak  # noqa: F401
from lhotse import CutSet

FAKE = Path(__file__).with_name("fake_recogniser.py")
LENGTHS = {"c1": 47, "c2": 90, "c3": 61, "c4": 33}


@pytest.fixture
def spoken(speak, tmp_path):  # noqa: F811
    """A manifest of cuts with audio."""
    path = tmp_path / "spoken.jsonl.gz"
    CutSet.from_cuts(speak(i, n) for i, n in LENGTHS.items()).to_file(path)
    return path


@pytest.fixture
def fake():
    """The command of the fake recogniser."""

    def make(fault=""):
        words = [sys.executable, str(FAKE), "{wavs}", "{out}", fault]
        return shlex.join(words).replace("'{wavs}' '{out}'", "{wavs} {out}")

    return make

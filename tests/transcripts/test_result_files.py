"""icefall's result files, byte for byte those that its own functions write.

The comparison needs icefall: the environment variable ICEFALL_DIR names its top folder.
"""

import ast
import io
import logging
import os
import random
import typing
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from icefall_kd.transcripts.scores import (
    Result,
    count_errors,
    to_characters,
    write_results,
    write_transcripts,
)

pytest.importorskip("kaldialign")


def drawn(seed, count=40):
    """Results with errors of all kinds, some utterances empty on either side."""
    rng = random.Random(seed)
    words = ["ein", "zwei", "drei", "四", "viele", "ein's"]
    results = []
    for i in range(count):
        reference = [rng.choice(words) for _ in range(rng.randrange(7))]
        found = []
        for word in reference:
            draw = rng.random()
            if draw < 0.2:
                found.append(rng.choice(words))
            elif draw < 0.9:
                found.append(word)
            if rng.random() < 0.15:
                found.append(rng.choice(words))
        results.append(Result(f"c-{i:02d}", reference, found))
    return sorted([*results, Result("empty", [], []), Result("more", [], ["ein"])])


@pytest.fixture(scope="module")
def utils():
    """Two functions of icefall's utils.py, whose imports are not needed."""
    if "ICEFALL_DIR" not in os.environ:
        pytest.skip("the environment variable ICEFALL_DIR is not set")
    path = Path(os.environ["ICEFALL_DIR"]) / "icefall" / "utils.py"
    names = ("store_transcripts", "write_error_stats")
    tree = ast.parse(path.read_text("utf8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") in names]
    import kaldialign

    found = {**vars(typing), "defaultdict": defaultdict, "logging": logging}
    found.update(kaldialign=kaldialign, Pathlike=str)
    exec(compile(tree, str(path), "exec"), found)
    return SimpleNamespace(**{name: found[name] for name in names})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("characters", [False, True])
def test_the_files_are_icefalls_to_the_byte(tmp_path, utils, seed, characters):
    results = drawn(seed)
    theirs = io.StringIO()
    rate = utils.write_error_stats(
        theirs, "test", [tuple(r) for r in results], False, compute_CER=characters
    )
    of_unit = to_characters(results) if characters else results
    write_results(tmp_path, "test-x", "greedy", of_unit, count_errors(of_unit))
    utils.store_transcripts(tmp_path / "theirs", results, char_level=characters)

    def read(name):
        return (tmp_path / name).read_text("utf8")

    assert read("errs-test-x.txt") == theirs.getvalue()
    assert read("recogs-test-x.txt") == read("theirs")
    assert read("wer-summary-test-x.txt") == f"settings\tWER\ngreedy\t{rate}\n"


def test_counts_by_hand():
    errors = count_errors(
        [Result("a", ["x", "y", "z"], ["x", "q"]), Result("b", [], ["x"])]
    )
    assert errors.counts() == {
        "insertions": 1,
        "deletions": 1,
        "substitutions": 1,
        "length": 3,
    }
    assert errors.total == 3 and errors.percent == 100.0


def test_results_of_a_run_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recogs-a.txt"
    write_transcripts(path, [Result("a", ["x"], ["x"])])
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_transcripts(path, [Result("a", ["x"], []), None])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

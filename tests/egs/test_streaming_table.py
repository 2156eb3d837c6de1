"""The table of streaming students: emissions, delays, WERs and their interval."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icefall_kd.errors import KDError

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "digits" / "ASR" / "local"


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("kaldialign")
    sys.path.insert(0, str(LOCAL))
    try:
        import streaming_table
    finally:
        sys.path.remove(str(LOCAL))
    return streaming_table


def test_a_token_is_emitted_at_the_first_of_its_frames(table):
    symbols = torch.tensor([0, 2, 2, 0, 2, 1, 0])
    logits = torch.nn.functional.one_hot(symbols, 3).float()
    assert table.emissions(logits, 0) == [(2, 1), (2, 4), (1, 5)]


def test_delays_are_those_of_the_tokens_that_both_have(table):
    teacher = {"a": {"tokens": [(3, 2), (4, 6), (5, 9)]}}
    student = {"a": {"tokens": [(3, 3), (7, 5), (5, 11), (6, 12)]}}
    assert table.delays(teacher, student) == [40, 80]


def utterance(reference, hypothesis):
    return {"reference": reference.split(), "ctc": hypothesis.split()}


def test_a_wer_is_the_mean_of_its_seeds(table):
    right, wrong = utterance("one two", "one two"), utterance("one two", "one")
    assert table.cell([{"a": right}, {"a": wrong}], "ctc") == (
        "**25.00** ± 0.0 (0.00, 50.00)"
    )


def test_a_difference_is_taken_utterance_by_utterance(table):
    base = {str(i): utterance("one two", "one" if i % 3 else "") for i in range(60)}
    better = {i: {**u, "ctc": u["ctc"] + ["two"]} for i, u in base.items()}
    difference, _, half = table.against([better], [base]).split()
    assert float(difference) == -50 and float(half) == 0
    alone = table.bootstrap([table.errors(base, "ctc")]).interval(0)
    assert alone.half_width > 3


def test_a_run_that_is_missing_is_named(table, tmp_path):
    with pytest.raises(KDError, match="epoch-3.pt, let run_streaming.sh"):
        table.recognise(tmp_path, 3, tmp_path, tmp_path)


@pytest.mark.parametrize(
    "words, refusal",
    [
        (["--variants", "d0 delay2"], "there is no variant delay2: give none, or d"),
        (["--variants", "d0"], "seed-1 has no targets: let run_fsdd.sh finish seed 1"),
    ],
)
def test_the_script_refuses_what_it_can_not_do_before_any_work(
    tmp_path, words, refusal
):
    script = LOCAL.parent / "run_streaming.sh"
    command = [str(script), "--work-dir", str(tmp_path / "work"), *words]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf8")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("run_streaming.sh: error: ") and refusal in line
    assert not (tmp_path / "work").exists()

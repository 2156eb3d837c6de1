"""What is compared, and what is said where a form is not the model."""

import dataclasses

import numpy as np
import pytest

from icefall_kd.errors import KDError
from icefall_kd.export.parity import Account, judge, largest, markdown_of, table_of
from icefall_kd.export.sherpa import recognize
from icefall_kd.export.sides import Side, contexts, ctc_tokens, greedy

TORCH = Account("torch", "transducer", cuts=9, same=9, wer=10.0)
FP32 = Account("fp32", "transducer", 5e-5, 1e-6, 1e-6, cuts=9, same=9, wer=10.0)


def sentences(**changes):
    row = dataclasses.replace(FP32, broken=[], **changes)
    judge([TORCH, row])
    return row.broken


def test_a_form_within_its_bound_is_right():
    assert sentences() == []
    assert sentences(form="int8", encoder=3.0, wer=10.2) == []
    assert sentences(form="fp16", encoder=0.1, same=0, wer=9.0) == []


@pytest.mark.parametrize("part", ["encoder", "decoder", "joiner"])
@pytest.mark.parametrize("value", [2e-4, float("inf")])
def test_fp32_may_not_differ(part, value):
    (sentence,) = sentences(**{part: value})
    assert f"its {part} differs by" in sentence and "0.0001 is the bound" in sentence


def test_sherpa_may_have_no_other_tokens_in_fp32_one_by_one():
    row = {"encoder": None, "decoder": None, "joiner": None, "differ": ["a", "b"]}
    (sentence,) = sentences(form="sherpa-onnx fp32", **row)
    assert "other tokens than torch in 2 of 9 utterances, first in a" in sentence
    assert sentences(form="sherpa-onnx int8", **row) == []


def test_a_smaller_form_may_not_lose_words():
    (sentence,) = sentences(form="int8", wer=10.21)
    assert "has a WER of 10.21 %, torch 10.00 %, and 0.2 points" in sentence
    assert sentences(form="int8", wer=None) == []


def test_the_largest_difference():
    a = np.zeros((2, 3), dtype=np.float32)
    assert largest(a, a + 2) == 2 and largest(a, a) == 0
    assert largest(a, a[:1]) == float("inf")
    assert largest(a + float("nan"), a) == float("inf")


def test_the_table_has_a_row_for_each_form():
    rows = table_of([TORCH, dataclasses.replace(FP32, bytes=2_500_000)])
    assert rows[0][0] == "form" and len({len(row) for row in rows}) == 1
    assert rows[1][2:6] == ("", "", "", "9 of 9")
    assert rows[2][2:8] == ("5.0e-05", "1.0e-06", "1.0e-06", "9 of 9", "10.00", "2.50")
    lines = markdown_of(rows).splitlines()
    assert len(lines) == 4 and lines[1] == "|" + "---|" * 9
    assert lines[3].startswith("| fp32 | transducer | 5.0e-05 | ")


def test_greedy_search_is_that_of_a_stateless_decoder():
    """The joiner's logits are 1 for the sum of frame and context, modulo 4."""

    def join(frames, rows):
        return np.eye(4)[(frames[:, 0] + rows[:, 0]).astype(int) % 4]

    side = Side("toy", decode=lambda y: y.clip(0).sum(1, keepdims=True), join=join)
    frames = np.array([[1], [0], [3], [1]])
    # 1 + 0 = 1; 0 + (0 + 1) = 1; 3 + (1 + 1) = 1; 1 + (1 + 1) = 3
    assert greedy(side, frames, context_size=2, blank_id=0) == [1, 1, 1, 3]
    frames = np.array([[1], [3], [3]])  # 3 + (0 + 1) is a blank
    assert greedy(side, frames, context_size=2, blank_id=0) == [1]


def test_ctc_tokens_are_collapsed():
    rows = np.eye(4)[[0, 2, 2, 0, 2, 3, 3, 0]]
    assert ctc_tokens(rows, 0) == [2, 2, 3]


def test_contexts_show_each_token_at_each_place():
    rows = contexts(7, 2, 0)
    assert rows[0].tolist() == [-1, 0] and rows.dtype == np.int64
    for place in (0, 1):
        assert set(rows[1:, place]) == set(range(7))


def test_sherpa_that_fails_is_one_sentence(tmp_path):
    features = {"sampling_rate": 8000, "num_mel_bins": 20}
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(KDError, match="sherpa-onnx can't run model.onnx"):
        recognize(
            {"model": tmp_path / "model.onnx"},
            tmp_path / "tokens.txt",
            features,
            [np.zeros(800, dtype=np.float32)],
            tmp_path,
        )

"""Transcribed cuts by which a student is measured: student/cuts.py."""

import pytest
from lhotse import CutSet

from icefall_kd.errors import KDError
from icefall_kd.student.cuts import read_batches
from icefall_kd.tokens import load_tokenizer


def test_one_cut_of_twenty_that_can_not_be_used_is_left_out(
    make_cut, multi_cut, tmp_path, teacher_exp, bpe_models, caplog
):
    good = [make_cut(f"g{i}", 47 + i, text="one") for i in range(57)]
    bad = [
        make_cut("short", 5, text="one"),
        make_cut("long", 15, text="one " * 9),
        multi_cut("multi", 61),
    ]
    path = str(tmp_path / "some.jsonl")
    CutSet.from_cuts([bad[0], *good, *bad[1:]]).to_file(path)
    sp, settings = load_tokenizer(bpe_models.a), teacher_exp.settings
    batches = read_batches(path, 100, settings, sp)
    assert sum(len(x) for x, _, _ in batches) == 57
    assert "3 of 60 cuts can't be used and are left out: the cut short" in caplog.text
    with pytest.raises(KDError, match="cut short .* and 1 of the 3 cuts are such"):
        read_batches(path, 2, settings, sp)


def test_a_cut_is_measured_on_the_frames_that_the_recipe_hears(
    make_cut, tmp_path, teacher_exp, bpe_models
):
    long = make_cut("long", 93, text="one")
    long.supervisions[0].duration = 0.61
    path = str(tmp_path / "some.jsonl")
    CutSet.from_cuts([long]).to_file(path)
    sp = load_tokenizer(bpe_models.a)
    ((x, x_lens, _),) = read_batches(path, 9, teacher_exp.settings, sp)
    assert x.shape[1] == 61 and x_lens.tolist() == [61]


def test_a_number_of_cuts_below_1_is_refused_by_its_parameter(teacher_exp):
    with pytest.raises(KDError, match="`num_cuts` is 0, and must be 1 or more"):
        read_batches("any.jsonl", 0, teacher_exp.settings, None)

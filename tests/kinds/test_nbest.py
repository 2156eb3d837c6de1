"""N-best lists on cuts: they come back, fit whole cuts alone, and load with Lhotse."""

import json
import math

import pytest
from lhotse import CutSet, MonoCut
from lhotse.cut import PaddingCut

from icefall_kd.errors import KDError
from icefall_kd.kinds.nbest import FIELD, read_nbest, write_nbest

LIST = [("zwei drei", -0.25), ("", -1.5), ("zwei ü", -3.0)]


@pytest.fixture
def bare(make_cut):
    return make_cut("c1", 200, start=0.5)


@pytest.fixture
def cut(bare):
    return write_nbest(bare, LIST)


@pytest.fixture
def other(make_cut):
    return write_nbest(make_cut("c2", 100), [("vier", -0.1)])


@pytest.fixture
def noise(make_cut):
    cut = make_cut("n", 100)
    cut.supervisions = []
    return cut


def test_what_is_written_is_read(cut):
    assert read_nbest(cut) == LIST


def test_a_cut_without_a_list_gives_an_empty_one(bare):
    assert read_nbest(bare) == []
    assert read_nbest(bare.pad(duration=4)) == []


def test_an_empty_list_is_legal(bare):
    assert read_nbest(write_nbest(bare, [])) == []


def test_writing_leaves_the_cut_and_its_other_fields_alone(bare):
    bare.custom = {"snr": 3}
    written = write_nbest(bare, LIST)
    assert bare.custom == {"snr": 3} and written.custom["snr"] == 3
    assert written.supervisions[0].text == "ein" and written.id == bare.id
    again = write_nbest(written, [("neu", -1.0)])
    assert read_nbest(again) == [("neu", -1.0)] and read_nbest(written) == LIST


def test_numpy_scores_are_written_as_json_has_them(bare, tmp_path):
    import numpy as np

    cut = write_nbest(bare, [("eins", np.float32(-0.5)), ("zwei", -2)])
    CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl")
    (found,) = CutSet.from_file(tmp_path / "cuts.jsonl")
    assert read_nbest(found) == [("eins", -0.5), ("zwei", -2.0)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_a_list_survives_its_manifest(cut, bare, tmp_path, suffix):
    path = tmp_path / f"cuts{suffix}"
    CutSet.from_cuts([cut, bare.with_id("none")]).to_file(path)
    first, second = CutSet.from_file(path)
    assert read_nbest(first) == LIST and read_nbest(second) == []


def test_the_manifest_loads_where_the_package_is_not(cut, tmp_path, run_python):
    CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl.gz")
    code = """
import sys, json
from lhotse import CutSet
(cut,) = CutSet.from_file(sys.argv[1])
assert cut.truncate(duration=1).pad(duration=3).load_features().shape == (300, 20)
print(json.dumps(cut.custom))
"""
    done = run_python(code, tmp_path / "cuts.jsonl.gz", block=["icefall_kd"])
    assert done.returncode == 0, done.stderr
    texts = [x["text"] for x in json.loads(done.stdout)[FIELD]["hypotheses"]]
    assert texts == [text for text, _ in LIST]


# What cuts go through


def test_a_part_of_the_cut_has_no_list(cut):
    assert read_nbest(cut.truncate(duration=1.5)) == []
    assert read_nbest(cut.truncate(offset=0.3)) == []
    moved = cut.truncate(offset=0.3)
    moved.duration = cut.duration
    assert read_nbest(moved) == []
    assert read_nbest(cut.truncate(duration=cut.duration)) == LIST


def test_a_longer_cut_has_no_list(cut):
    assert read_nbest(cut.extend_by(duration=0.4, direction="left")) == []


def test_padding_and_noise_leave_the_list(cut, noise):
    assert read_nbest(cut.pad(duration=5)) == LIST
    assert read_nbest(cut.pad(duration=5, direction="left")) == LIST
    assert read_nbest(cut.mix(noise, snr=10)) == LIST
    assert read_nbest(noise.mix(cut, offset_other_by=0.2, snr=10)) == LIST
    assert read_nbest(cut.mix(noise).truncate(duration=1)) == []


def test_two_cuts_with_speech_have_no_list(cut, other, make_cut):
    assert read_nbest(cut.append(other)) == []
    assert read_nbest(cut.append(make_cut("c3", 50))) == []
    assert read_nbest(make_cut("c3", 50).append(cut)) == []


def test_a_cut_without_a_supervision_may_carry_a_list(noise, other):
    heard = write_nbest(noise, LIST)
    assert read_nbest(heard) == LIST
    assert read_nbest(heard.pad(duration=5)) == LIST
    assert read_nbest(heard.append(other)) == []


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("change", ["perturb_speed", "perturb_tempo"])
def test_a_change_of_speed_leaves_the_list_of_a_whole_cut(cut, change, factor):
    changed = getattr(cut.drop_features(), change)(factor)
    assert changed.duration != cut.duration
    assert read_nbest(changed) == LIST
    assert read_nbest(changed.truncate(duration=changed.duration - 0.1)) == []


def test_resampling_and_volume_leave_the_list(cut):
    assert read_nbest(cut.drop_features().resample(11025)) == LIST
    assert read_nbest(cut.drop_features().perturb_volume(2.0)) == LIST


def test_a_cut_of_features_alone_keeps_its_list(bare):
    cut = write_nbest(bare.drop_recording(), LIST)
    assert cut.custom[FIELD]["source"] == 0
    assert read_nbest(cut) == LIST and read_nbest(cut.truncate(duration=1)) == []


def test_padding_alone_has_no_list():
    cut = PaddingCut("p", 1.0, 8000, -23.0, num_frames=100, num_features=20)
    assert read_nbest(cut) == []


# Refusals


def refused(match, function, *args):
    with pytest.raises(KDError, match=match) as e:
        function(*args)
    assert "\n" not in str(e.value) and "write_nbest" in str(e.value)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bare, cut, score):
    refused("cut c1 has the score .* of 'x'", write_nbest, bare, [("x", score)])
    cut.custom[FIELD]["hypotheses"][1]["score"] = score
    refused("cut c1 has the score .* of ''", read_nbest, cut)


@pytest.mark.parametrize(
    "hypotheses, match",
    [
        ({"text": "x"}, "no list"),
        (None, "no list"),
        (["x"], "without a text, 'x'"),
        ([{"score": -1.0}], "without a text"),
        ([{"text": 3, "score": -1.0}], "without a text"),
        ([{"text": "x"}], "no score of 'x'"),
        ([{"text": "x", "score": None}], "no score of 'x'"),
        ([{"text": "x", "score": "low"}], "no score of 'x'"),
    ],
)
def test_a_damaged_list_is_refused(cut, hypotheses, match):
    cut.custom[FIELD]["hypotheses"] = hypotheses
    refused(match, read_nbest, cut)


def test_another_field_of_that_name_is_refused(cut):
    cut.custom[FIELD] = [{"text": "x", "score": -1.0}]
    refused("cut c1 has no list", read_nbest, cut)


@pytest.mark.parametrize("name", ["start", "duration", "source"])
def test_a_list_that_does_not_say_what_was_decoded_is_refused(cut, name):
    del cut.custom[FIELD][name]
    refused("lacks a start, duration or source", read_nbest, cut)


def test_a_mixed_cut_is_not_written_to(bare, noise):
    mixed = bare.mix(noise)
    assert not isinstance(mixed, MonoCut)
    with pytest.raises(KDError, match="MixedCut.*before mixing"):
        write_nbest(mixed, LIST)

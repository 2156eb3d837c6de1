"""Times of presets: the file, the line through them, and rank correlation."""

import json
import random

import pytest

from icefall_kd.errors import KDError
from icefall_kd.student.times import (
    PARTS,
    SIDES,
    PresetTimes,
    rank_correlation,
    read_times,
    write_times,
)

PRODUCTS = {"1m": 1e8, "3m": 4e8, "kws": 2e8, "s": 1.6e9}
RTFS = {"1m": 0.01, "3m": 0.02, "kws": 9.0, "s": 0.09}


def times_of(rtfs=RTFS):
    rtf = {
        name: {side: dict.fromkeys(PARTS, value / 2) for side in SIDES}
        for name, value in rtfs.items()
    }
    return PresetTimes({"cpu": "ä"}, {"vocab_size": 500}, PRODUCTS, rtf)


def test_what_is_written_is_read(tmp_path):
    write_times(times_of(), tmp_path / "t.json")
    assert read_times(tmp_path / "t.json") == times_of()


def test_a_model_between_two_presets_lies_on_the_line_of_the_logarithms():
    times = times_of()
    for name in ("1m", "3m", "s"):
        assert times.of_model(PRODUCTS[name]) == pytest.approx(RTFS[name])
    # kws, whose time is another, is no rung of the ladder.
    assert times.of_model(2e8) == pytest.approx((0.01 * 0.02) ** 0.5)
    assert times.of_model(8e8) == pytest.approx((0.02 * 0.09) ** 0.5)
    assert times.of_model(0.9e8) is None and times.of_model(1.7e9) is None


@pytest.mark.parametrize("rtf", [0.01, 0.013, 0.02, 0.05, 0.09])
def test_a_time_has_the_multiply_adds_that_have_that_time(rtf):
    products = times_of().products_for(rtf)
    assert times_of().of_model(products) == pytest.approx(rtf)


def test_of_several_models_of_a_time_the_one_of_most_multiply_adds_counts():
    times = times_of({"1m": 0.02, "3m": 0.01, "s": 0.04})
    assert times.products_for(0.02) == pytest.approx(8e8)
    flat = times_of({"1m": 0.02, "3m": 0.02})
    assert flat.products_for(0.02) == pytest.approx(PRODUCTS["3m"])


@pytest.mark.parametrize("rtf", [0.0099, 0.091, 5.0])
def test_a_time_beyond_the_presets_is_refused(rtf):
    with pytest.raises(KDError, match=r"`rtf` is .* 0.0100 \(1m\) to 0.0900 \(s\)"):
        times_of().products_for(rtf)


def _changed(change):
    def write(fields):
        change(fields)
        return json.dumps(fields)

    return write


@pytest.mark.parametrize(
    "text_of",
    [
        lambda fields: "",
        lambda fields: "{}",
        lambda fields: "[1, 2]",
        lambda fields: "7",
        lambda fields: "[" * 100000,
        lambda fields: json.dumps(fields)[:-3],
        _changed(lambda f: f.update(format=2)),
        _changed(lambda f: f.update(more=2)),
        _changed(lambda f: f.pop("machine")),
        _changed(lambda f: f.update(machine=[])),
        _changed(lambda f: f.update(multiply_adds={})),
        _changed(lambda f: f["multiply_adds"].update(s=0)),
        _changed(lambda f: f["multiply_adds"].update(s="many")),
        _changed(lambda f: [f["rtf"].pop(name) for name in ("1m", "s")]),
        _changed(lambda f: f["rtf"]["s"].pop(SIDES[2])),
        _changed(lambda f: f["rtf"]["s"][SIDES[1]].update(search=-0.1)),
        _changed(lambda f: f["rtf"]["s"][SIDES[1]].update(encoder=float("nan"))),
        _changed(lambda f: f["rtf"]["s"][SIDES[1]].update(encoder=float("inf"))),
    ],
)
def test_another_file_is_refused(tmp_path, text_of):
    path = tmp_path / "t.json"
    write_times(times_of(), path)
    path.write_text(text_of(json.loads(path.read_text("utf8"))), "utf8")
    with pytest.raises(KDError, match="t.json is no file of times .*measure anew"):
        read_times(path)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "t.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KDError, match="is no file of times"):
        read_times(tmp_path / "t.json")


def test_the_rank_correlation_is_spearmans():
    assert rank_correlation([1, 5, 7], [0.1, 0.2, 90]) == pytest.approx(1)
    assert rank_correlation([1, 5, 7], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 5, 7], [2, 2, 2]) == 0
    assert rank_correlation([1, 2, 3], [5, 5, 9]) == pytest.approx(3**0.5 / 2)
    values = random.Random(0).sample(range(100), 9)
    order = sorted(values)
    total = sum((i - order.index(v)) ** 2 for i, v in enumerate(values))
    expected = 1 - 6 * total / (9 * 80)
    assert rank_correlation(range(9), values) == pytest.approx(expected)

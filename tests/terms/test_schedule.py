"""Weights over epochs: what they say in between, and what is no weight."""

import math

import pytest

from icefall_kd.errors import KDError
from icefall_kd.terms.schedule import SCHEDULES, Curve, Schedule


@pytest.mark.parametrize(
    "epoch, weight", [(0, 0.8), (2.5, 0.7), (5, 0.6), (7, 0.3), (8, 0.15), (11, 0.15)]
)
def test_a_curve_is_linear_between_its_points_and_constant_outside(epoch, weight):
    curve = Curve.parse("0:0.8,5:0.6,7:0.3,8:0.15", "ctc")
    assert curve(epoch) == pytest.approx(weight)


def test_a_curve_that_begins_late_stands_at_its_first_weight():
    curve = Curve.parse("2:0.5,4:1", "ctc")
    assert [curve(x) for x in (0, 2, 3, 9)] == [0.5, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("value", [0.3, "0.3", "0:0.3"])
def test_a_number_is_a_constant(value):
    curve = Curve.parse(value, "ctc")
    assert {curve(x) for x in (0, 1.5, 99)} == {0.3} and str(curve) == "0.3"


def test_a_curve_reads_what_it_writes():
    curve = Curve.parse("0:0.8,10:0.5", "ctc")
    assert Curve.parse(str(curve), "ctc") == curve and curve.highest == 0.8


@pytest.mark.parametrize(
    "value",
    ["a", "", "1,2", "0:1,0:2", "2:1,1:1", "0:1,5", "0:-1", -1, "0:nan", "nan:1", None]
    + ["-1:0.5", "0:1,inf:2", math.inf, "0:1:2"],
)
def test_what_is_no_weight_is_refused_with_its_name(value):
    with pytest.raises(KDError, match="`weight` is ") as e:
        Curve.parse(value, "`weight`")
    assert repr(value) in str(e.value)


def test_from_scratch_distils_from_the_first_batch():
    schedule = Schedule()
    assert schedule.is_constant and {schedule(x) for x in (0, 3, 1e6)} == {1.0}


def test_a_warm_up_has_hard_labels_alone_and_then_rises():
    schedule = Schedule("warmup", 20)
    shares = [schedule(x) for x in (0, 2.9, 3, 3.5, 4, 10, 19.99)]
    assert shares == pytest.approx([0, 0, 0, 0.5, 1, 1, 1])


def test_fine_tuning_rises_at_once():
    schedule = Schedule("finetune", 20)
    assert [schedule(x) for x in (0, 0.5, 1, 19)] == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_epochs_go_without_distillation(name):
    schedule = Schedule(name, 10, last_epochs=2)
    assert not schedule.is_constant
    assert [schedule(x) for x in (5, 7.99, 8, 9.5)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("slow", 10), "`schedule` is 'slow': .* scratch, warmup, finetune"),
        (("scratch", 3, 3), "`last_epochs` is 3 of 3 epochs"),
        (("scratch", 3, -1), "`last_epochs` is -1"),
        (("warmup",), "no --num-epochs"),
        (("scratch", math.inf, 1), "no --num-epochs"),
    ],
)
def test_a_schedule_that_can_not_be_is_refused(arguments, words):
    with pytest.raises(KDError, match=words):
        Schedule(*arguments)

"""A student of a given size or speed: near its goal, and a slice of its teacher."""

import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from recipe_model import get_model

from icefall_kd import build_student
from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds, count_parameters
from icefall_kd.student.presets import (
    EMBED_CHANNELS,
    LADDER,
    embed_channels,
    per_stack,
    preset,
)
from icefall_kd.student.search import nearest, parse_goal

RECIPE = {
    "feature_dim": 80,
    "vocab_size": 500,
    "context_size": 2,
    "use_transducer": True,
    "use_ctc": True,
    "causal": False,
}
# As the digits recipe has it, and others of no preset's shape.
DIGITS = {
    **RECIPE,
    "feature_dim": 40,
    "vocab_size": 25,
    "downsampling_factor": "1,2,2",
    "num_encoder_layers": "2,2,2",
    "feedforward_dim": "96,192,192",
    "num_heads": "4,4,4",
    "encoder_dim": "48,96,96",
    "encoder_unmasked_dim": "32,64,64",
    "query_head_dim": "16",
    "pos_head_dim": "4",
    "value_head_dim": "12",
    "pos_dim": 48,
    "cnn_module_kernel": "15,15,15",
    "decoder_dim": 96,
    "joiner_dim": 96,
}
UNEVEN = {
    **DIGITS,
    "num_encoder_layers": "5,1,3",
    "encoder_dim": "50,141,90",
    "encoder_unmasked_dim": "30,50,90",
    "feedforward_dim": "100,151,333",
    "num_heads": "2,4,9",
    "decoder_dim": 20,
    "joiner_dim": 77,
}
SHALLOW = {**RECIPE, **preset("m"), "num_encoder_layers": "2", "decoder_dim": 256}
TEACHERS = {
    **{name: {**RECIPE, **preset(name)} for name in ("xl", "l", "m", "s", "kws")},
    "m-streaming": {**RECIPE, **preset("m-streaming")},
    "m-ctc": {**RECIPE, **preset("m"), "use_transducer": False},
    "shallow": SHALLOW,
    "digits": DIGITS,
    "uneven": UNEVEN,
    "digits-front": {**DIGITS, "embed_channels": "8,32,128"},
    "s-front": {**RECIPE, **preset("s"), "embed_channels": "8,32,128"},
    "narrow-front": {**UNEVEN, "embed_channels": "7,40,24"},
}
VARY = (
    "num_encoder_layers",
    "num_heads",
    "feedforward_dim",
    "encoder_dim",
    "encoder_unmasked_dim",
    "decoder_dim",
    "joiner_dim",
)
every_teacher = pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS)


def size(settings):
    return count_parameters(settings)["all"]


def speed(settings, teacher):
    cost = (count_multiply_adds(s)["all"] for s in (teacher, settings))
    return next(cost) / next(cost)


def is_slice(student, teacher):
    """Nowhere wider or deeper, and the same in all else."""
    for name in VARY:
        pairs = zip(per_stack(student, name), per_stack(teacher, name), strict=True)
        if not all(a <= b for a, b in pairs):
            return False
    unmasked, dims = (
        per_stack(student, f"encoder_{n}") for n in ("unmasked_dim", "dim")
    )
    pairs = zip(embed_channels(student), embed_channels(teacher), strict=True)
    if not all(a <= b for a, b in pairs):
        return False
    fixed = [n for n in teacher if n not in (*VARY, "embed_channels")]
    same = all(student[n] == teacher[n] for n in fixed)
    return same and all(u <= d for u, d in zip(unmasked, dims, strict=True))


# Goals


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("5M", "parameters", 5e6),
        ("5m", "parameters", 5e6),
        ("0.8M", "parameters", 8e5),
        ("800k", "parameters", 8e5),
        ("800K", "parameters", 8e5),
        ("5000000", "parameters", 5e6),
        (5000000, "parameters", 5e6),
        (" 23.4M ", "parameters", 23.4e6),
        ("3x", "speed", 3),
        ("2.5X", "speed", 2.5),
        ("1x", "speed", 1),
    ],
)
def test_a_goal_is_read(text, kind, value):
    goal = parse_goal(text)
    assert (goal.kind, goal.value) == (kind, pytest.approx(value))


@pytest.mark.parametrize(
    "text",
    ["fast", "", "M", "x", "-5M", "-2x", "5 M", "5MM", "5.M", ".5M", "1e6", "5.5"]
    + ["nan", "inf", "5G", "1,000", "0x10", "５M", "5M\n6", None, True],
)
def test_what_is_no_goal_is_refused_with_examples_of_goals(text):
    with pytest.raises(KDError, match=r"is no goal .*5M, 800k or 5000000.*2\.5x"):
        parse_goal(text)


@pytest.mark.parametrize("text", ["0.5x", "0x", "0.99x"])
def test_a_student_slower_than_its_teacher_is_refused(text):
    with pytest.raises(KDError, match=f"{text} the speed .*slower .*1x or more"):
        parse_goal(text)


@pytest.mark.parametrize("text", ["0", "0M", "0.0k"])
def test_a_student_of_nothing_is_refused(text):
    with pytest.raises(KDError, match=f"no student has {text} parameters"):
        parse_goal(text)


# Students of a teacher


@every_teacher
def test_every_size_below_the_teachers_is_met_by_a_slice_of_it(teacher):
    largest = size(teacher)
    goal, off = float(largest), []
    while goal > max(400e3, largest / 40):
        student = {**teacher, **nearest(int(goal), teacher, teacher)}
        assert is_slice(student, teacher), goal
        off.append(abs(size(student) / goal - 1))
        goal *= 0.7
    assert len(off) >= 3
    assert max(off) <= 0.05
    assert sorted(off)[len(off) // 2] <= 0.02


@every_teacher
def test_the_same_is_true_of_speeds(teacher):
    with pytest.raises(KDError, match="the fastest is") as e:
        nearest("1000x", teacher, teacher)
    fastest = float(re.search(r"fastest is ([0-9.]+)x", str(e.value)).group(1))
    for i in range(6):
        goal = fastest ** (i / 5)
        student = {**teacher, **nearest(f"{goal:.4f}x", teacher, teacher)}
        assert is_slice(student, teacher), goal
        assert speed(student, teacher) == pytest.approx(goal, rel=0.05)


@st.composite
def teachers(draw):
    n = draw(st.integers(1, 6))

    def numbers(low, high):
        return [draw(st.integers(low, high)) for _ in range(n)]

    dims = numbers(8, 600)
    shape = {
        "downsampling_factor": [1, 2, 4, 8, 4, 2][:n],
        "num_encoder_layers": numbers(1, 6),
        "feedforward_dim": numbers(8, 2000),
        "num_heads": numbers(1, 10),
        "encoder_dim": dims,
        "encoder_unmasked_dim": [draw(st.integers(1, d)) for d in dims],
    }
    shape = {k: ",".join(map(str, v)) for k, v in shape.items()}
    shape["decoder_dim"] = 4 * draw(st.integers(1, 200))
    shape["joiner_dim"] = draw(st.integers(1, 800))
    return {**RECIPE, **preset("s"), "cnn_module_kernel": "15", **shape}


@given(teachers(), st.floats(0.02, 1.2))
@hypothesis_settings(max_examples=30)
def test_any_teacher_has_a_slice_of_the_size_or_a_refusal_whose_remedy_works(
    teacher, share
):
    goal = max(int(size(teacher) * share), 1)
    try:
        changes = nearest(goal, teacher, teacher)
    except KDError as e:
        goal = re.search(r"; give `goal` (\S+)$", str(e)).group(1)
        changes = nearest(goal, teacher, teacher)
    student = {**teacher, **changes}
    assert is_slice(student, teacher)
    assert size(student) == pytest.approx(parse_goal(goal).value, rel=0.05)


@pytest.mark.parametrize("name", LADDER[:5])
def test_a_preset_below_the_teacher_is_found_as_it_is(name):
    teacher = TEACHERS["m"]
    found = {
        **teacher,
        **nearest(f"{size({**RECIPE, **preset(name)})}", teacher, teacher),
    }
    assert found == {**teacher, **preset(name)}
    rounded = f"{size({**RECIPE, **preset(name)}) / 1e6:.2f}M"
    assert {**teacher, **nearest(rounded, teacher, teacher)} == found


@every_teacher
def test_the_teachers_own_size_and_speed_are_the_teacher(teacher):
    assert nearest(size(teacher), teacher, teacher) == {}
    assert nearest("1x", teacher, teacher) == {}


def test_layers_that_come_whole_leave_no_gap():
    """All four stacks of this teacher lose half of their layers at one place."""
    teacher = {**DIGITS, "num_encoder_layers": "2,2,2", "encoder_dim": "96"}
    for percent in range(20, 100):
        goal = size(teacher) * percent // 100
        student = {**teacher, **nearest(goal, teacher, teacher)}
        assert size(student) == pytest.approx(goal, rel=0.05)


def test_only_what_differs_is_returned_as_the_parser_has_it():
    teacher = TEACHERS["m"]
    changes = nearest("23.4M", teacher, teacher)
    assert changes == {
        "num_encoder_layers": "2,2,2,2,2,2",
        "feedforward_dim": "512,768,768,768,768,768",
        "encoder_dim": "192,256,256,256,256,256",
        "encoder_unmasked_dim": "192,192,192,192,192,192",
    }
    assert nearest("23.4M", {**teacher, **changes}, teacher) == {}


def test_the_settings_given_are_left_alone():
    base, teacher = dict(DIGITS), dict(DIGITS)
    nearest("500k", base, teacher)
    assert base == DIGITS and teacher == DIGITS


@pytest.mark.parametrize("own", [{"use_transducer": False}, {"vocab_size": 5000}])
def test_the_students_own_heads_and_vocabulary_are_counted(own):
    teacher = TEACHERS["m"]
    base = {**teacher, **own}
    student = {**base, **nearest("4M", base, teacher)}
    assert {k: student[k] for k in own} == own
    assert size(student) == pytest.approx(4e6, rel=0.02)
    assert size({**student, **{k: teacher[k] for k in own}}) != pytest.approx(
        4e6, rel=0.05
    )


def test_a_student_found_can_be_built_from_its_teacher(make_model, make_settings):
    shape = {k: v for k, v in DIGITS.items() if k != "vocab_size"}
    teacher, settings = make_model(**shape), make_settings(**shape)
    for goal in ("400k", "1.3x"):
        changes = nearest(goal, settings, settings)
        student, new = build_student(teacher, settings, changes, get_model)
        assert sum(p.numel() for p in student.parameters()) == size(new)
    assert speed(new, settings) == pytest.approx(1.3, rel=0.02)


# The front end


@pytest.mark.parametrize("goal", ["65k", "80k", "120k", "190k", "2x", "4x", "7x"])
def test_a_front_end_that_has_an_option_gets_narrower(goal):
    teacher = TEACHERS["digits-front"]
    student = {**teacher, **nearest(goal, teacher, teacher)}
    assert is_slice(student, teacher)
    wanted = parse_goal(goal)
    found = size(student)
    if wanted.kind == "speed":
        found = speed(student, teacher)
    assert found == pytest.approx(wanted.value, rel=0.05)
    channels = embed_channels(student)
    assert all(a < b for a, b in zip(channels[1:], EMBED_CHANNELS[1:], strict=True))
    with pytest.raises(KDError, match="the (smallest|fastest)"):
        nearest(goal, DIGITS, DIGITS)


@pytest.mark.parametrize("name", LADDER[:5])
def test_presets_have_icefalls_front_end(name):
    teacher = TEACHERS["s-front"]
    found = nearest(size({**RECIPE, **preset(name)}), teacher, teacher)
    assert {**teacher, **found} == {**teacher, **preset(name)}


def test_a_front_end_of_a_student_without_a_teacher_gets_narrower():
    base = {**RECIPE, "embed_channels": "8,32,128"}
    student = {**base, **nearest("250k", base)}
    assert size(student) == pytest.approx(250e3, rel=0.05)
    assert embed_channels(student) < EMBED_CHANNELS


# Students of no teacher


@pytest.mark.parametrize("goal", ["500k", "2M", "5M", "17M", "40M", "100M", "300M"])
def test_a_student_without_a_teacher_lies_on_the_ladder(goal):
    student = {**RECIPE, **nearest(goal, RECIPE)}
    assert size(student) == pytest.approx(parse_goal(goal).value, rel=0.02)
    for name in VARY:
        pairs = zip(
            per_stack(student, name), per_stack(preset("xl"), name), strict=True
        )
        assert all(a <= b for a, b in pairs)


@pytest.mark.parametrize("name", LADDER)
def test_each_preset_is_what_its_own_size_gives(name):
    settings = {**RECIPE, **preset(name)}
    assert nearest(size(settings), settings) == {}


def test_a_larger_goal_gives_a_larger_student():
    sizes = [size({**RECIPE, **nearest(f"{m}M", RECIPE)}) for m in range(1, 40, 3)]
    assert sizes == sorted(sizes)


# Refusals


def test_a_student_larger_than_its_teacher_is_refused():
    with pytest.raises(KDError) as e:
        nearest("50M", TEACHERS["s"], TEACHERS["s"])
    assert str(e.value) == (
        "no student of this teacher has 50M parameters: the largest has 23,414,115; "
        "give `goal` 23.4M"
    )


def test_a_student_smaller_than_any_is_refused():
    message = r"has 100k parameters: the smallest has 3\d\d,\d\d\d; give `goal` 3\d\dk$"
    with pytest.raises(KDError, match=f"^no student of this teacher {message}"):
        nearest("100k", TEACHERS["m"], TEACHERS["m"])
    with pytest.raises(KDError, match=f"^no student {message}"):
        nearest("100k", RECIPE)


def test_more_parameters_than_xl_are_refused():
    with pytest.raises(KDError, match="largest has 747,196,271; give `goal` 747M$"):
        nearest("5000M", RECIPE)


@pytest.mark.parametrize("goal", ["9" * 400, "9" * 400 + "M", "9" * 400 + "x"])
def test_a_number_beyond_all_numbers_is_refused(goal):
    with pytest.raises(KDError, match="the (largest|fastest) "):
        nearest(goal, DIGITS, DIGITS)


def test_a_speed_without_a_teacher_is_refused():
    with pytest.raises(KDError, match="3x is one relative to a teacher.*parameters"):
        nearest("3x", RECIPE)

"""build_student: which of the teacher's numbers a student starts from."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipe_model import get_model

from icefall_kd import ModelTap, build_student
from icefall_kd.errors import KDError
from icefall_kd.student.selection import layer_map

LAYER = re.compile(r"(encoder\.encoders\.(\d)\.(?:encoder\.)?layers\.)(\d)(\..*)")
NARROW = {
    "encoder_dim": "8,12",
    "encoder_unmasked_dim": "8,8",
    "feedforward_dim": "16,20",
    "num_heads": "2,2",
    "decoder_dim": 8,
    "joiner_dim": 12,
}


@pytest.fixture
def teacher(make_model):
    return make_model().eval()


@pytest.fixture
def build(teacher, make_settings):
    def build_one(init="teacher", **changes):
        return build_student(teacher, make_settings(), changes, get_model, init)

    return build_one


def outputs(model, features):
    with ModelTap(model) as hook:
        out = hook.encode(*features)
    return out.encoder_out, out.ctc_logits


# Layers


@given(st.integers(1, 40), st.integers(1, 40))
def test_layers_are_first_last_and_evenly_between(a, b):
    n_teacher, n_student = max(a, b), min(a, b)
    chosen = layer_map(n_teacher, n_student)
    assert len(chosen) == n_student and chosen[0] == 0
    if n_student > 1:
        assert chosen[-1] == n_teacher - 1
        steps = [y - x for x, y in zip(chosen, chosen[1:], strict=False)]
        assert min(steps) >= 1  # none twice
        assert max(abs(s - (n_teacher - 1) / (n_student - 1)) for s in steps) <= 1


# The same settings


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"causal": True, "chunk_size": "4", "left_context_frames": "16"},
        {"encoder_dim": "24,16"},
        {"use_transducer": False},
    ],
    ids="as-it-is causal last-narrower ctc".split(),
)
def test_no_change_gives_bit_identical_outputs(
    make_model, make_settings, features, shape
):
    teacher, settings = make_model(**shape).eval(), make_settings(**shape)
    student, found = build_student(teacher, settings, {}, get_model)
    assert student is not teacher and found == settings
    for a, b in zip(
        outputs(student, features), outputs(teacher, features), strict=True
    ):
        assert torch.equal(a, b)
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name


def test_the_student_owns_its_parameters(build, teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student, _ = build(num_encoder_layers="1,2")
    with torch.no_grad():
        for p in student.parameters():
            p.fill_(7.0)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_the_settings_given_are_left_alone(teacher, make_settings):
    settings = make_settings()
    changes = {"num_encoder_layers": "1,1"}
    _, new = build_student(teacher, settings, changes, get_model)
    assert settings == make_settings() and changes == {"num_encoder_layers": "1,1"}
    assert type(new) is type(settings)
    assert new == {**make_settings(), "num_encoder_layers": "1,1"}


@pytest.mark.parametrize("layers", ["1,3", "2,2", "1,1", "2,1"])
def test_fewer_layers_are_the_teachers_layers(build, teacher, layers):
    student, _ = build(num_encoder_layers=layers)
    wanted = [int(n) for n in layers.split(",")]
    maps = [layer_map(n, m) for n, m in zip((2, 3), wanted, strict=True)]
    source, counts = teacher.state_dict(), {}
    for name, value in student.state_dict().items():
        match = LAYER.match(name)
        if match:
            prefix, stack, layer, rest = match.groups()
            counts.setdefault(stack, set()).add(layer)
            name = f"{prefix}{maps[int(stack)][int(layer)]}{rest}"
        assert torch.equal(value, source[name]), name
    assert [len(counts[s]) for s in "01"] == wanted


# Narrower students


def blocks_of(name, heads):
    """The parts of a projection's rows, as Zipformer's forward passes split them."""
    if ".self_attn_weights.in_proj." in name:
        return [heads * 8, heads * 8, heads * 4]  # query, key, position
    if ".nonlin_attention.in_proj." in name:
        return 3
    if re.search(r"\.conv_module\d\.in_proj\.", name):
        return 2
    return 1


def split(value, blocks):
    if not value.ndim:
        return (value,)
    return value.chunk(blocks) if isinstance(blocks, int) else value.split(blocks)


@pytest.mark.parametrize(
    "changes",
    [NARROW, *({k: v} for k, v in NARROW.items() if k != "encoder_unmasked_dim")],
    ids=lambda changes: "all" if changes is NARROW else "-".join(changes),
)
def test_each_matrix_is_the_teachers_first_channels_block_by_block(
    build, teacher, make_model, changes
):
    if "encoder_dim" in changes:
        changes = {**changes, "encoder_unmasked_dim": "8,8"}
    student, _ = build(**changes)
    shapes = {n: v.shape for n, v in make_model(**changes).state_dict().items()}
    heads = 2 if "num_heads" in changes else 4
    source, smaller = teacher.state_dict(), 0
    for name, value in student.state_dict().items():
        assert value.shape == shapes[name], name
        whole = split(source[name], blocks_of(name, 4))
        parts = split(value, blocks_of(name, heads))
        assert len(parts) == len(whole)
        for part, block in zip(parts, whole, strict=True):
            first = block[tuple(slice(n) for n in part.shape)]
            assert torch.equal(part, first), name
        smaller += value.shape != source[name].shape
    assert smaller >= 2


def test_a_narrower_student_runs_and_gets_gradients(build, features):
    student, _ = build(**NARROW, num_encoder_layers="1,2")
    student.train()
    x, x_lens = features
    simple, pruned, ctc, *_ = student(
        x=x, x_lens=x_lens, y=[[3, 4], [5], [7]], prune_range=3
    )
    (simple + pruned + ctc).backward()
    assert torch.isfinite(simple + pruned + ctc)
    assert all(p.grad is not None for p in student.ctc_output.parameters())


def test_a_student_without_the_transducer(build, features):
    student, _ = build(use_transducer=False, num_encoder_layers="1,1")
    assert student.joiner is None
    assert outputs(student, features)[1].shape == (3, 14, 11)


# Slices whose result is known


def zero_columns(layers, name, keep):
    """Let a layer's output depend on the first ``keep`` hidden channels only."""
    for layer in layers:
        module = layer.get_submodule(name)
        module.weight.data[:, keep(module.weight.size(1)) :] = 0


def stacks(model):
    first, second = model.encoder.encoders
    return [*first.layers], [*second.encoder.layers]


def test_hidden_channels_that_do_nothing_can_be_sliced_off(
    teacher, make_settings, features
):
    """Feed-forward of 3/4, 1 and 5/4 times the setting; half of it does nothing."""
    for layers in stacks(teacher):
        for i in (1, 2, 3):
            zero_columns(layers, f"feed_forward{i}.out_proj", lambda n: n // 2)
    expected = outputs(teacher, features)
    student, _ = build_student(
        teacher, make_settings(), {"feedforward_dim": "12,16"}, get_model
    )
    for a, b in zip(outputs(student, features), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_heads_that_do_nothing_can_be_sliced_off(teacher, make_settings, features):
    """The last two of four heads of 6 values each reach no output."""
    for layers in stacks(teacher):
        for i in (1, 2):
            zero_columns(layers, f"self_attn{i}.out_proj", lambda n: n // 2)
    expected = outputs(teacher, features)
    student, _ = build_student(
        teacher, make_settings(), {"num_heads": "2,2"}, get_model
    )
    for a, b in zip(outputs(student, features), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_layer_that_does_nothing_can_be_left_out(teacher, make_settings, features):
    """The middle one of three, bypassed; a student of two takes first and last."""
    stacks(teacher)[1][1].bypass.bypass_scale.data.zero_()
    expected = outputs(teacher, features)
    student, _ = build_student(
        teacher, make_settings(), {"num_encoder_layers": "2,2"}, get_model
    )
    for a, b in zip(outputs(student, features), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_joiner_channels_that_do_nothing_can_be_sliced_off(teacher, make_settings):
    teacher.joiner.output_linear.weight.data[:, 12:] = 0
    student, _ = build_student(teacher, make_settings(), {"joiner_dim": 12}, get_model)
    g = torch.Generator().manual_seed(0)
    encoder_out = torch.randn(2, 5, 1, 24, generator=g)
    decoder_out = torch.randn(2, 1, 4, 16, generator=g)
    with torch.no_grad():
        a = student.joiner(encoder_out, decoder_out)
        b = teacher.joiner(encoder_out, decoder_out)
    torch.testing.assert_close(a, b)


# Random start


def test_a_random_student_is_what_get_model_gives(build, teacher, make_settings):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    torch.manual_seed(5)
    student, settings = build("random", **NARROW)
    torch.manual_seed(5)
    expected = get_model(make_settings(**NARROW))
    for name, value in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    assert settings == make_settings(**NARROW)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_random_student_may_be_wider_and_deeper(build):
    student, _ = build("random", encoder_dim="24,32", num_encoder_layers="3,4")
    assert len(student.encoder.encoders[0].layers) == 3
    assert student.ctc_output[1].in_features == 32


# Refusals


@pytest.mark.parametrize(
    "changes, both",
    [
        ({"encoder_dim": "16,32"}, ("16,32", "16,24")),
        ({"encoder_dim": "24,24"}, ("24,24", "16,24")),
        ({"encoder_dim": "24"}, ("24", "16,24")),
        ({"feedforward_dim": "24,40"}, ("24,40", "24,32")),
        ({"num_heads": "4,8"}, ("4,8", "4,4")),
        ({"decoder_dim": 20}, ("20", "16")),
        ({"joiner_dim": 24}, ("24", "20")),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_a_wider_student_is_refused(build, changes, both):
    (name,) = changes
    with pytest.raises(KDError, match="can't be wider.*`init` random") as e:
        build(**changes)
    assert f"the student's {name} is {both[0]} and its teacher's {both[1]}:" in str(
        e.value
    )


@pytest.mark.parametrize("name", ["num_encoder_layers", "encoder_dim", "num_heads"])
def test_other_numbers_of_stacks_are_refused(build, name):
    with pytest.raises(KDError, match=f"{name} has 3 numbers.*downsampling_factor 2"):
        build(**{name: "2,3,1"})


FRONT = {"embed_channels": "8,16,32"}


@pytest.fixture
def build_front(make_model, make_settings):
    """Build a student of a teacher whose front end has an option."""
    teacher, settings = make_model(**FRONT).eval(), make_settings(**FRONT)

    def build_one(init, channels):
        changes = {"embed_channels": channels}
        return build_student(teacher, settings, changes, get_model, init)

    return build_one


@pytest.mark.parametrize("channels", ["9,16,32", "8,17,32", "2,2,33"])
def test_a_front_end_of_more_channels_is_refused_but_for_random_parameters(
    build_front, channels
):
    with pytest.raises(KDError) as e:
        build_front("teacher", channels)
    assert str(e.value) == (
        f"the student's embed_channels is {channels} and its teacher's 8,16,32: a "
        "student that starts from its teacher can't be wider; give at most the "
        "teacher's, or `init` random"
    )
    student, _ = build_front("random", channels)
    found = [len(student.encoder_embed.conv[i].bias) for i in (0, 4, 7)]
    assert found == [int(n) for n in channels.split(",")]


@pytest.mark.parametrize("init", ["teacher", "random"])
@pytest.mark.parametrize(
    "channels, message",
    [
        ("8,16", "embed_channels is '8,16', and must be three numbers"),
        ("8,16,32,64", "embed_channels is '8,16,32,64', and must be three numbers"),
        ("8", "embed_channels is '8', and must be three numbers"),
        ("0,16,32", "embed_channels is '0,16,32', and must be a positive"),
        ("8,16,x", "embed_channels is '8,16,x', and must be a positive"),
        ("8,-16,32", "embed_channels is '8,-16,32', and must be a positive"),
        ("", "embed_channels is '', and must be a positive"),
    ],
)
def test_channels_that_make_no_front_end_are_refused(
    build_front, init, channels, message
):
    with pytest.raises(KDError, match=message):
        build_front(init, channels)


def test_channels_of_a_recipe_without_the_option_are_refused(build):
    with pytest.raises(KDError, match="embed_channels can't be set, .*no option for"):
        build(embed_channels="8,16,32")


@pytest.mark.parametrize("layers", ["3,3", "2,4", "4"])
def test_a_deeper_student_is_refused(build, layers):
    with pytest.raises(KDError, match="layers per stack.*`init` random") as e:
        build(num_encoder_layers=layers)
    assert "(2, 3)" in str(e.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("downsampling_factor", "1,4"),
        ("query_head_dim", "4"),
        ("pos_head_dim", "2"),
        ("value_head_dim", "3"),
        ("pos_dim", 8),
        ("cnn_module_kernel", "5,5"),
        ("feature_dim", 16),
        ("context_size", 1),
        ("vocab_size", 7),
        ("blank_id", 1),
        ("causal", True),
    ],
)
def test_a_setting_that_slices_cannot_follow_is_refused(
    build, make_settings, name, value
):
    with pytest.raises(KDError, match=f"student's {name} is {value}") as e:
        build(**{name: value})
    assert f"teacher's {make_settings()[name]}" in str(e.value)
    assert "`init` random" in str(e.value)


def test_the_same_setting_written_otherwise_is_taken(build):
    student, _ = build(
        downsampling_factor="1, 2", num_encoder_layers="2", query_head_dim="8,8"
    )
    assert len(student.encoder.encoders[1].encoder.layers) == 2


@pytest.mark.parametrize("wanted, near", [(3, 4), (9, 8), (10, 8), (15, 12)])
def test_a_decoder_that_its_groups_do_not_divide_is_refused(build, wanted, near):
    with pytest.raises(KDError, match=f"decoder_dim is {wanted}, .*: give {near}$"):
        build(decoder_dim=wanted)


def test_a_random_student_with_such_a_decoder_is_refused(build):
    with pytest.raises(KDError, match="decoder_dim=9 .*decoder_dim a multiple of 4"):
        build("random", decoder_dim=9)


def test_a_decoder_without_convolution_takes_any_width(make_model, make_settings):
    teacher, settings = make_model(context_size=1), make_settings(context_size=1)
    student, _ = build_student(teacher, settings, {"decoder_dim": 9}, get_model)
    a, b = student.decoder.embedding.weight, teacher.decoder.embedding.weight
    assert torch.equal(a, b[:, :9])


def test_more_unmasked_than_all_channels_are_refused(build):
    with pytest.raises(KDError, match="encoder_unmasked_dim is 8,12.*encoder_dim 9,11"):
        build(encoder_dim="9,11")


class Rnn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.LSTM(4, 4)


def older_zipformer(make_model):
    """Of the recipes before zipformer: layers without nonlinear attention."""
    model = make_model()
    for layers in stacks(model):
        for layer in layers:
            del layer.nonlin_attention
    return model


@pytest.mark.parametrize("init, refused", [("teacher", True), ("random", False)])
@pytest.mark.parametrize("kind, name", [("rnn", "LSTM"), ("older", "Zipformer")])
def test_a_teacher_that_is_no_such_zipformer_is_refused(
    make_model, make_settings, kind, name, init, refused
):
    teacher = Rnn() if kind == "rnn" else older_zipformer(make_model)
    if not refused:
        build_student(teacher, make_settings(), {}, get_model, init)
        return
    with pytest.raises(KDError, match=f"encoder is a {name} without.*`init` random"):
        build_student(teacher, make_settings(), {}, get_model, init)


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_an_unknown_setting_is_refused(build, init):
    with pytest.raises(KDError, match="no setting 'encoder_dims'.*encoder_dim"):
        build(init, encoder_dims="8,8")


def test_an_unknown_start_is_refused(build):
    with pytest.raises(KDError, match="init is 'zeros'.*'teacher' or 'random'"):
        build("zeros")


def test_a_head_that_the_teacher_lacks_is_refused(make_model, make_settings):
    teacher = make_model(use_transducer=False)
    settings = make_settings(use_transducer=False)
    with pytest.raises(
        KDError, match="teacher has no parameter (joiner|decoder).*`init`"
    ):
        build_student(teacher, settings, {"use_transducer": True}, get_model)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_dim": "8,8"},  # below encoder_unmasked_dim
        {"encoder_dim": "8,8,8"},
        {"encoder_dim": "abc"},
        {"num_encoder_layers": "x"},
        {"num_encoder_layers": "0,3"},
    ],
    ids=["unmasked", "stacks", "word", "layers-word", "no-layers"],
)
@pytest.mark.parametrize("init", ["teacher", "random"])
def test_a_setting_that_makes_no_model_is_refused(build, changes, init):
    (name,) = changes
    with pytest.raises(KDError, match=name):
        build(init, **changes)

"""A student's parameters: what it says equals what its masked teacher says."""

import copy
import random
from types import MethodType, SimpleNamespace

import pytest
import torch
from recipe_model import front_end, get_model
from torch import nn
from zipformer.modules.scaling import BiasNorm

from icefall_kd import ModelTap, build_student
from icefall_kd.errors import KDError
from icefall_kd.student.front import strongest_front
from icefall_kd.student.importance import encoder_layers
from icefall_kd.student.presets import embed_channels, per_stack
from icefall_kd.student.selection import (
    CONVNEXT,
    FRONT_CONVS,
    HEADS,
    Selection,
    select_first,
)

MODULES = (
    *("feed_forward1", "feed_forward2", "feed_forward3"),
    *("conv_module1", "conv_module2", "nonlin_attention"),
)
ATTENTIONS = ("self_attn1", "self_attn2")
FEWER_UNITS = {
    "feedforward_dim": "13,22",
    "num_heads": "3,2",
    "decoder_dim": 8,
    "joiner_dim": 13,
}
THREE = {
    "num_encoder_layers": "2,1,2",
    "downsampling_factor": "1,2,2",
    "feedforward_dim": "24,32,28",
    "num_heads": "4,4,3",
    "cnn_module_kernel": "7,5,3",
    "encoder_unmasked_dim": "8,8,8",
}
FRONT = {"embed_channels": "6,9,14"}
UNMASKED = {"encoder_unmasked_dim": "8,8"}
CAUSAL = {"causal": True, "chunk_size": "4", "left_context_frames": "16"}
# Other widths of the stream; each channel of the output comes from one and the same
# stack in teacher and student.
WIDTHS = {
    "last-widest": ({}, "9,14"),
    "first-unchanged": ({}, "16,17"),
    "all-the-same": ({"encoder_dim": "24,24"}, "14,14"),
    "middle-narrowest": ({**THREE, "encoder_dim": "16,24,24"}, "14,10,22"),
    "causal": (CAUSAL, "9,14"),
}


def keep_random(settings, new, seed=0):
    """Any layers, channels, hidden units and heads that fit, in any order."""
    rng = random.Random(seed)
    teacher, student = get_model(settings), get_model(new)
    widths, limits = per_stack(new, "encoder_dim"), per_stack(settings, "encoder_dim")
    stream = []
    for width in sorted(set(widths)):
        limit = min(b for a, b in zip(widths, limits, strict=True) if a >= width)
        left = [c for c in range(limit) if c not in stream]
        stream += rng.sample(left, width - len(stream))
    kept = Selection([], stream)
    for i, layers in enumerate(encoder_layers(teacher)):
        smaller = encoder_layers(student)[i]
        kept.layers.append(sorted(rng.sample(range(len(layers)), len(smaller))))
        heads = [per_stack(s, "num_heads")[i] for s in (settings, new)]
        for name, layer in layers:
            for part in MODULES:
                n = [
                    m.get_submodule(f"{part}.out_proj").weight.size(1)
                    for m in (layer, smaller[0][1])
                ]
                kept.units[f"{name}.{part}"] = rng.sample(range(n[0]), n[1])
            others = rng.sample(range(1, heads[0]), heads[1] - 1)
            kept.units[name + HEADS] = [0, *others]
    kept.units["joiner"] = rng.sample(range(settings.joiner_dim), new.joiner_dim)
    groups = rng.sample(range(settings.decoder_dim // 4), new.decoder_dim // 4)
    kept.units["decoder"] = [4 * g + c for g in groups for c in range(4)]
    for conv in FRONT_CONVS:
        n = [len(m.get_submodule(conv).bias) for m in (teacher, student)]
        kept.units[conv] = rng.sample(range(n[0]), n[1])
    kept.units[CONVNEXT] = rng.sample(range(3 * n[0]), 3 * n[1])
    return kept


def zero_others(matrix, keep):
    others = torch.ones(matrix.weight.size(1), dtype=torch.bool)
    others[torch.as_tensor(keep)] = False
    matrix.weight.data[:, others] = 0


def mask_front(front, kept):
    """Mask what the student leaves out, before all that reads it."""
    first, second, last = (kept.units.get(conv) for conv in FRONT_CONVS)
    if first is None:  # the student's front end is the teacher's
        return
    zero_others(front.conv[4], first)
    zero_others(front.conv[7], second)
    zero_others(front.convnext.pointwise_conv1, last)
    n = front.out_width
    zero_others(front.out, [c * n + f for c in last for f in range(n)])
    zero_others(front.convnext.pointwise_conv2, kept.units[CONVNEXT])


def only(keep, x):
    mask = torch.zeros(x.size(-1), dtype=x.dtype)
    mask[torch.as_tensor(keep)] = 1
    return x * mask


def norm_over(norm, keep):
    """BiasNorm with the mean square over some channels."""

    def forward(self, x):
        square = ((x - self.bias)[..., torch.as_tensor(keep)] ** 2).mean(-1, True)
        return x * square**-0.5 * self.log_scale.exp()

    norm.forward = MethodType(forward, norm)


def masked(teacher, student, settings, new, kept):
    """The teacher without what the student leaves out, its shape as it was."""
    teacher = copy.deepcopy(teacher)
    norm_over(
        teacher.encoder_embed.out_norm, kept.stream[: per_stack(new, "encoder_dim")[0]]
    )
    for i, layers in enumerate(encoder_layers(teacher)):
        stream = kept.stream[: per_stack(new, "encoder_dim")[i]]
        teacher.encoder.encoders[i].register_forward_pre_hook(
            lambda m, args, stream=stream: (only(stream, args[0]), *args[1:])
        )
        smaller = encoder_layers(student)[i][0][1]
        for j, (name, layer) in enumerate(layers):
            if j not in kept.layers[i]:
                layer.register_forward_hook(lambda m, args, out: args[0])
            for part in MODULES:
                n = smaller.get_submodule(f"{part}.out_proj").weight.size(1)
                units = kept.units.get(f"{name}.{part}", range(n))
                zero_others(layer.get_submodule(f"{part}.out_proj"), units)
            n = per_stack(new, "num_heads")[i]
            width = per_stack(settings, "value_head_dim")[i]
            heads = kept.units.get(name + HEADS, range(n))
            for part in ATTENTIONS:
                values = [h * width + c for h in heads for c in range(width)]
                zero_others(layer.get_submodule(f"{part}.out_proj"), values)
            for part in (*MODULES, *ATTENTIONS):
                layer.get_submodule(part).register_forward_hook(
                    lambda m, args, out, stream=stream: only(stream, out)
                )
            norm_over(layer.norm, stream)
    mask_front(teacher.encoder_embed, kept)
    joined = kept.units.get("joiner", range(new.joiner_dim))
    zero_others(teacher.joiner.output_linear, joined)
    decoded = kept.units.get("decoder", range(new.decoder_dim))
    zero_others(teacher.joiner.decoder_proj, decoded)
    zero_others(teacher.simple_lm_proj, decoded)
    return teacher


@torch.no_grad()
def everything(model, features):
    """All that a model says, in double precision."""
    model = copy.deepcopy(model).double()
    x, x_lens = features
    with ModelTap(model, layers=range(len(model.encoder.encoders))) as hook:
        out = hook.encode(x.double(), x_lens)
    decoder_out = model.decoder(
        torch.tensor([[0, 3, 4, 7], [0, 9, 1, 1], [0, 5, 5, 2]])
    )
    heard = out.encoder_out
    return SimpleNamespace(
        encoder_out=heard,
        hidden=out.hidden,
        heads=(
            out.ctc_logits,
            model.simple_am_proj(heard),
            model.simple_lm_proj(decoder_out),
            model.joiner(heard.unsqueeze(2), decoder_out.unsqueeze(1)),
        ),
    )


def check_stacks(found, expected, new, kept):
    for i, width in enumerate(per_stack(new, "encoder_dim")):
        same(found.hidden[i], expected.hidden[i][..., kept.stream[:width]])


def check(found, expected, new, kept):
    check_stacks(found, expected, new, kept)
    same(found.encoder_out, expected.encoder_out[..., kept.stream])
    for a, b in zip(found.heads, expected.heads, strict=True):
        same(a, b)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def differ(a, b):
    return any(
        float((x - y).abs().max()) > 1e-2 for x, y in zip(a.heads, b.heads, strict=True)
    )


@pytest.fixture
def pair(make_model, make_settings):
    """A teacher, its student, and what masks the teacher as that student."""

    def make(changes, keep, **shape):
        teacher, settings = make_model(seed=3, **shape).eval(), make_settings(**shape)
        new = make_settings(**{**shape, **changes})
        kept = keep(settings, new)
        student, found = build_student(
            teacher, settings, changes, get_model, selection=kept
        )
        assert found == new
        if "embed_channels" in changes:
            front = strongest_front(teacher.state_dict(), embed_channels(new))
            kept.units = {**front, **kept.units}
        return teacher, student.eval(), (settings, new, kept)

    return make


KEEP = pytest.mark.parametrize("keep", [select_first, keep_random])


# Equal to the masked teacher


@KEEP
@pytest.mark.parametrize("name", ["all", *FEWER_UNITS])
def test_fewer_units_are_the_teacher_with_the_others_masked(pair, features, keep, name):
    changes = FEWER_UNITS if name == "all" else {name: FEWER_UNITS[name]}
    teacher, student, terms = pair(changes, keep)
    found = everything(student, features)
    check(found, everything(masked(teacher, student, *terms), features), *terms[1:])
    assert differ(found, everything(teacher, features))


@KEEP
@pytest.mark.parametrize("channels", ["5,9,14", "6,4,14", "6,9,11", "1,2,3"])
def test_fewer_channels_of_the_front_end_are_the_teacher_with_the_others_masked(
    pair, features, keep, channels
):
    teacher, student, terms = pair({"embed_channels": channels}, keep, **FRONT)
    found = everything(student, features)
    check(found, everything(masked(teacher, student, *terms), features), *terms[1:])
    assert differ(found, everything(teacher, features))


@KEEP
@pytest.mark.parametrize("name", WIDTHS)
def test_a_narrower_stream_is_the_teacher_with_the_others_masked(
    pair, features, keep, name
):
    shape, width = WIDTHS[name]
    unmasked = ",".join("8" for _ in width.split(","))
    changes = {"encoder_dim": width, "encoder_unmasked_dim": unmasked}
    teacher, student, terms = pair(changes, keep, **shape)
    found = everything(student, features)
    check(found, everything(masked(teacher, student, *terms), features), *terms[1:])
    assert differ(found, everything(teacher, features))


@pytest.mark.parametrize(
    "layers", [[[1], [1]], [[0], [0, 2]], [[0, 1], [1, 2]]], ids=str
)
def test_fewer_layers_are_the_teacher_with_the_others_bypassed(pair, features, layers):
    changes = {"num_encoder_layers": ",".join(str(len(of)) for of in layers)}
    kept = Selection(layers, list(range(24)))
    teacher, student, terms = pair(changes, lambda *_: kept)
    found = everything(student, features)
    check(found, everything(masked(teacher, student, *terms), features), *terms[1:])
    assert differ(found, everything(teacher, features))


@pytest.mark.parametrize("shape", [{}, CAUSAL, {"context_size": 1}, FRONT], ids=str)
def test_all_at_once_is_the_masked_teacher(pair, features, shape):
    changes = {
        **FEWER_UNITS,
        "num_encoder_layers": "1,2",
        "encoder_dim": "10,15",
        "encoder_unmasked_dim": "8,8",
    }
    if shape == FRONT:
        changes["embed_channels"] = "4,7,5"
    teacher, student, terms = pair(changes, keep_random, **shape)
    found = everything(student, features)
    check(found, everything(masked(teacher, student, *terms), features), *terms[1:])


@pytest.mark.parametrize("shape", [{}, CAUSAL, {**THREE, "encoder_dim": "16,24,20"}])
def test_all_channels_in_another_order_give_the_same_logits(pair, features, shape):
    teacher, student, (settings, new, kept) = pair({}, keep_random, **shape)
    assert kept.stream != sorted(kept.stream)
    assert not torch.equal(student.ctc_output[1].weight, teacher.ctc_output[1].weight)
    check(everything(student, features), everything(teacher, features), new, kept)


# Where the encoder's output comes from another stack in the student than in the teacher


LAST_NARROWER = {"encoder_dim": "12,8", "encoder_unmasked_dim": "8,8"}


def test_of_another_last_stack_the_other_channels_and_all_stacks_are_equal(
    pair, features
):
    """Channels 8 to 11: the teacher has them in both stacks, the student in one."""
    teacher, student, terms = pair(LAST_NARROWER, select_first, encoder_dim="24,16")
    found = everything(student, features)
    expected = everything(masked(teacher, student, *terms), features)
    check_stacks(found, expected, *terms[1:])
    same(found.encoder_out[..., :8], expected.encoder_out[..., :8])
    assert not torch.allclose(found.encoder_out, expected.encoder_out[..., :12])


def test_channels_of_the_same_last_stack_are_equal_where_it_is_not_the_widest(
    pair, features
):
    stream = [3, 15, 0, 7, 8, 2, 11, 9, 23, 16, 20, 17]  # 8 of 16, 4 of the other 8
    kept = Selection([[0, 1], [0, 1, 2]], stream)
    teacher, student, terms = pair(LAST_NARROWER, lambda *_: kept, encoder_dim="24,16")
    found = everything(student, features)
    check(found, everything(masked(teacher, student, *terms), features), *terms[1:])


# Front ends without an option for their channels


class OtherFront(nn.Module):
    """None of icefall's: it has no convolutions."""

    def __init__(self, width):
        super().__init__()
        self.out = nn.Linear(20, width)
        self.out_norm = BiasNorm(width)


@pytest.mark.parametrize("front", ["other", "written-into-the-recipe"])
def test_the_front_end_that_a_recipe_has_without_an_option_is_followed(
    make_model, make_settings, front
):
    settings = make_settings()

    def make(settings):
        model = get_model(settings)
        width = int(settings.encoder_dim.split(",")[0])
        other = front == "other"
        model.encoder_embed = (
            OtherFront(width) if other else front_end(settings, 6, 9, 14)
        )
        return model

    teacher = make(settings)
    student, _ = build_student(
        teacher, settings, {"encoder_dim": "8,12", **UNMASKED}, make
    )
    source = teacher.encoder_embed.state_dict()
    for name, value in student.encoder_embed.state_dict().items():
        of_stream = name.startswith("out") and value.ndim > 0
        expected = source[name][:8] if of_stream else source[name]
        assert torch.equal(value, expected), name


# BiasNorm's scale


def test_shifts_are_added_to_the_norms_of_the_teachers_layers(pair):
    norms = {"encoder.encoders.1.encoder.layers.2.norm": 0.25}
    norms["encoder_embed.out_norm"] = -0.5
    layers = [[0], [2]]
    kept = Selection(layers, list(range(24)), norm_shifts=norms)
    teacher, student, _ = pair({"num_encoder_layers": "1,1"}, lambda *_: kept)
    first, last = (m.encoder.encoders[1].encoder.layers for m in (student, teacher))
    a, b = first[0].norm.log_scale, last[2].norm.log_scale
    torch.testing.assert_close(a, b + 0.25)
    a, b = (m.encoder_embed.out_norm.log_scale for m in (student, teacher))
    torch.testing.assert_close(a, b - 0.5)
    a, b = (m.encoder.encoders[0].layers[0].norm.log_scale for m in (student, teacher))
    assert torch.equal(a, b)


# Parameters that no rule knows


ATTENTION = {
    "use_attention_decoder": True,
    "attention_decoder_dim": 8,
    "attention_decoder_num_layers": 1,
    "attention_decoder_attention_dim": 8,
    "attention_decoder_num_heads": 2,
    "attention_decoder_feedforward_dim": 8,
}


def test_an_attention_decoder_is_copied_where_it_reads_the_same_channels(pair):
    teacher, student, _ = pair({"num_encoder_layers": "1,2"}, select_first, **ATTENTION)
    source = teacher.attention_decoder.state_dict()
    for name, value in student.attention_decoder.state_dict().items():
        assert torch.equal(value, source[name]), name


@pytest.mark.parametrize(
    "changes, keep",
    [
        ({"num_encoder_layers": "1,2"}, keep_random),
        ({"encoder_dim": "12,20"}, select_first),
    ],
    ids=["other-order", "narrower"],
)
def test_an_attention_decoder_that_reads_other_channels_is_refused(pair, changes, keep):
    with pytest.raises(KDError, match="attention_decoder.*no rule.*`init` random"):
        pair(changes, keep, **ATTENTION)


def with_adapters(model):
    """A parameter in each layer as LoRA has them, over the hidden units alone."""
    for layers in encoder_layers(model):
        for _, layer in layers:
            matrix = layer.feed_forward1.out_proj
            matrix.lora_A = nn.Parameter(torch.randn(2, matrix.weight.size(1)))
    return model


def adapted(make_model, settings, changes, kept):
    def make(settings):
        return with_adapters(get_model(settings))

    teacher = with_adapters(make_model(seed=3)).eval()
    return teacher, build_student(teacher, settings, changes, make, selection=kept)[0]


def test_adapters_are_copied_with_their_layers(make_model, make_settings):
    kept = Selection([[1], [1]], list(range(24)))
    changes = {"num_encoder_layers": "1,1"}
    teacher, student = adapted(make_model, make_settings(), changes, kept)
    for a, b in zip(encoder_layers(student), encoder_layers(teacher), strict=True):
        pair = [of[n][1].feed_forward1.out_proj for of, n in ((a, 0), (b, 1))]
        assert torch.equal(pair[0].lora_A, pair[1].lora_A)


@pytest.mark.parametrize("what", ["units", "stream", "fewer-units"])
def test_adapters_of_other_units_are_refused(make_model, make_settings, what):
    settings, changes = make_settings(), {}
    kept = keep_random(settings, settings)
    if what == "units":
        kept.stream.sort()
    elif what == "stream":
        kept.units = {}
    else:
        kept, changes = None, {"feedforward_dim": "16,32"}
    with pytest.raises(KDError, match="lora_A.*no rule.*`init` random"):
        adapted(make_model, settings, changes, kept)

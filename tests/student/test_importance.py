"""select_important: what matters is measured right, and the teacher left as it was."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipe_model import get_model
from torch import nn
from zipformer.modules.scaling import SwooshL, SwooshR

from icefall_kd import ModelTap, build_student
from icefall_kd.errors import KDError
from icefall_kd.student.front import FRONT_READERS
from icefall_kd.student.importance import (
    _ATTENTIONS,
    _MODULES,
    _READERS,
    _TRANSDUCER,
    _measure_shares,
    _select_stream,
    encoder_layers,
    num_passes,
    select_important,
)
from icefall_kd.student.selection import CONVNEXT, FRONT_CONVS, HEADS, select_first

Y = [[3, 4, 9], [5], [7, 7]]
NARROW = {
    "num_encoder_layers": "1,2",
    "encoder_dim": "8,12",
    "encoder_unmasked_dim": "8,8",
    "feedforward_dim": "12,16",
    "num_heads": "2,3",
    "decoder_dim": 8,
    "joiner_dim": 12,
}


@pytest.fixture
def teacher(make_model):
    return make_model(seed=2).eval()


@pytest.fixture
def batch(features):
    return (*features, Y)


@pytest.fixture
def keep(teacher, make_settings, batch):
    """What a student with these changes keeps of the teacher."""

    def important(batches=None, layers=False, channels=True, **changes):
        settings, new = make_settings(), make_settings(**changes)
        batches = batches or [batch]
        return select_important(teacher, settings, new, batches, layers, channels)

    return important


def layers_of(model):
    return [pair for layers in encoder_layers(model) for pair in layers]


def listen(model, batches):
    return _measure_shares(model, batches, lambda: None)


# Shares


def matrices(model):
    found = {}
    for name, layer in layers_of(model):
        for part in (*_MODULES, *_ATTENTIONS):
            for end in ("in_proj", "out_proj"):
                found[f"{name}.{part}.{end}"] = layer.get_submodule(f"{part}.{end}")
        found[f"{name}.self_attn_weights.in_proj"] = layer.self_attn_weights.in_proj
    for name in (*_READERS, *_TRANSDUCER, *FRONT_READERS):
        found[name] = model.get_submodule(name)
    return found


def naive_shares(model, batch):
    """Of each matrix and input channel: frames' sum of (W_c x_c)^2, frame by frame."""
    totals, handles = {}, []

    def tap(name, module):
        kind = getattr(module, "activation", None)
        swoosh = {"SwooshL": SwooshL(), "SwooshR": SwooshR(), None: nn.Identity()}[kind]

        weight = module.weight.detach().double()

        def hook(module, args):
            heard = swoosh(args[0].detach())
            heard = heard.movedim(1, -1) if weight.ndim == 4 else heard
            for x in heard.reshape(-1, heard.size(-1)).double():
                # Of each channel, (out, in), and of each place of a kernel.
                given = weight * (x.view(-1, 1, 1) if weight.ndim == 4 else x)
                added = (given**2).sum(0).reshape(len(x), -1).sum(1)
                totals[name] = totals.get(name, 0) + added

        handles.append(module.register_forward_pre_hook(hook))

    for name, module in matrices(model).items():
        tap(name, module)
    x, x_lens, y = batch
    with ModelTap(model) as hook:
        for i, n in enumerate(x_lens.tolist()):
            out = hook.encode(x[i : i + 1, :n], x_lens[i : i + 1])
            hook.lattice(out, y[i : i + 1])
    for handle in handles:
        handle.remove()
    return {name: total / total.sum() for name, total in totals.items()}


def test_shares_are_those_of_the_squares_that_each_channel_adds(teacher, batch):
    found, expected = listen(teacher, [batch]), naive_shares(teacher, batch)
    assert len(expected) == 5 * (2 * 8 + 1) + 3 + 2 + 5
    for name, share in expected.items():
        torch.testing.assert_close(found.share(name), share, rtol=1e-4, atol=1e-7)
        assert float(found.share(name).sum()) == pytest.approx(1)


def test_padding_has_no_share(teacher, batch):
    """Utterances of 61, 42 and 23 frames, together and one by one."""
    x, x_lens, y = batch
    loud = x.clone()
    for row, n in zip(loud, x_lens, strict=True):
        row[n:] = 50.0
    alone = [
        (x[i : i + 1, :n], x_lens[i : i + 1], y[i : i + 1])
        for i, n in enumerate(x_lens.tolist())
    ]
    together, one_by_one = listen(teacher, [(loud, x_lens, y)]), listen(teacher, alone)
    for name in matrices(teacher):
        torch.testing.assert_close(together.share(name), one_by_one.share(name))


def test_batches_add_up(teacher, batch):
    x, x_lens, y = batch
    halves = [(x[:1], x_lens[:1], y[:1]), (x[1:], x_lens[1:], y[1:])]
    whole, found = listen(teacher, [batch]), listen(teacher, halves)
    for name in matrices(teacher):
        torch.testing.assert_close(found.share(name), whole.share(name))


# Layers


def test_a_layer_that_does_nothing_goes_first(teacher, keep):
    stacks = encoder_layers(teacher)
    for _, layer in (stacks[0][0], stacks[1][2]):
        layer.bypass.bypass_scale.data.zero_()
    kept = keep(layers=True, channels=False, num_encoder_layers="1,2")
    assert kept.layers == [[1], [0, 1]]


def test_of_two_layers_that_do_the_same_one_stays(teacher, keep):
    """Each of two can be spared, but not both: the third, which does little, goes."""

    def relu(src, *args, **kwargs):
        return src.relu()

    def little(src, *args, **kwargs):
        return src + 0.01

    for (_, layer), forward in zip(
        encoder_layers(teacher)[1], (relu, little, relu), strict=True
    ):
        layer.forward = forward
    kept = keep(layers=True, channels=False, num_encoder_layers="2,1")
    assert kept.layers[0] == [0, 1] and kept.layers[1] in ([0], [2])


def test_the_layer_that_goes_changes_the_output_least(teacher, keep, batch):
    x, x_lens, _ = batch

    def heard():
        with ModelTap(teacher) as hook:
            out = hook.encode(x, x_lens)
        return torch.cat(
            [
                row[:n]
                for row, n in zip(out.encoder_out, out.encoder_out_lens, strict=True)
            ]
        )

    whole, damage = heard(), []
    for _, layer in encoder_layers(teacher)[1]:
        handle = layer.register_forward_hook(lambda m, args, out: args[0])
        damage.append(float(((heard() - whole) ** 2).sum()))
        handle.remove()
    left = [j for j in range(3) if j != damage.index(min(damage))]
    kept = keep(layers=True, channels=False, num_encoder_layers="2,2")
    assert kept.layers == [[0, 1], left] and len(set(damage)) == 3


def test_layers_alone_leave_the_first_channels_and_channels_the_even_layers(
    keep, make_settings
):
    first = select_first(make_settings(), make_settings(**NARROW))
    kept = keep(layers=True, channels=False, **NARROW)
    assert (kept.stream, kept.units, kept.norm_shifts) == (first.stream, {}, {})
    kept = keep(layers=False, channels=True, **NARROW)
    assert kept.layers == first.layers == [[0], [0, 2]] and kept.stream != first.stream


# Hidden units, heads, channels


def silence(matrix, columns):
    matrix.weight.data[:, list(columns)] = 0


def test_units_that_do_nothing_are_not_kept(teacher, keep):
    rng, expected = random.Random(0), {}
    for name, layer in layers_of(teacher):
        for part in _MODULES[:3]:
            matrix = layer.get_submodule(f"{part}.out_proj")
            units = range(matrix.weight.size(1))
            silent = rng.sample(units, len(units) // 2)
            silence(matrix, silent)
            expected[f"{name}.{part}"] = sorted(set(units) - set(silent))
    kept = keep(feedforward_dim="12,16")
    assert {name: kept.units[name] for name in expected} == expected


def test_convolutions_and_nonlinear_attention_keep_what_fits_the_width(teacher, keep):
    for _, layer in layers_of(teacher):
        for part in _MODULES[3:]:
            silence(layer.get_submodule(f"{part}.out_proj"), range(4))
    kept = keep(encoder_dim="11,20", encoder_unmasked_dim="8,8")
    sizes = {0: (11, 11, 33 // 4), 1: (20, 20, 15)}
    for i, layers in enumerate(encoder_layers(teacher)):
        for name, layer in layers:
            for part, n in zip(_MODULES[3:], sizes[i], strict=True):
                units = kept.units[f"{name}.{part}"]
                whole = layer.get_submodule(f"{part}.out_proj").weight.size(1)
                assert len(set(units)) == n and set(units) <= set(range(whole))
                if whole - n >= 4:
                    assert min(units) >= 4


def test_heads_that_do_nothing_are_not_kept(teacher, keep):
    for _, layer in layers_of(teacher):
        for part in _ATTENTIONS:
            silence(layer.get_submodule(f"{part}.out_proj"), range(6, 12))  # head 1
            silence(layer.get_submodule(f"{part}.out_proj"), range(18, 24))  # head 3
    kept = keep(num_heads="2,3")
    for name, _ in encoder_layers(teacher)[0]:
        assert kept.units[name + HEADS] == [0, 2]
    for name, _ in encoder_layers(teacher)[1]:
        assert {0, 2} < set(kept.units[name + HEADS])


def test_both_attentions_count_for_a_head(teacher, keep):
    """Head 2 does all in the second attention, and the others the first's."""
    for _, layer in layers_of(teacher):
        silence(layer.self_attn1.out_proj, range(12, 18))
        layer.self_attn2.out_proj.weight.data[:, 12:18] *= 100
    kept = keep(num_heads="2,2")
    assert all(kept.units[name + HEADS] == [0, 2] for name, _ in layers_of(teacher))


def test_head_0_is_kept_even_where_it_does_nothing(teacher, keep):
    """Its weights are those of the nonlinear attention."""
    for _, layer in layers_of(teacher):
        for part in _ATTENTIONS:
            silence(layer.get_submodule(f"{part}.out_proj"), range(6))
    kept = keep(num_heads="1,3")
    for i, n in enumerate((1, 3)):
        for name, _ in encoder_layers(teacher)[i]:
            heads = kept.units[name + HEADS]
            assert heads[0] == 0 and len(heads) == n


def test_joiner_and_decoder_units_that_do_nothing_are_not_kept(teacher, keep):
    silence(teacher.joiner.output_linear, [*range(0, 6), 13, 19])
    silence(teacher.joiner.decoder_proj, [*range(0, 4), *range(8, 12)])
    kept = keep(joiner_dim=12, decoder_dim=8)
    assert kept.units["joiner"] == [*range(6, 13), *range(14, 19)]
    assert kept.units["decoder"] == [*range(4, 8), *range(12, 16)]


def test_a_group_of_the_decoder_is_kept_for_the_sum_of_its_shares(teacher, keep):
    """One channel that does much, in a group, against four that do a bit more."""
    weight = teacher.joiner.decoder_proj.weight.data
    weight[:] = 0
    weight[0, [3, 6]] = torch.tensor([1000.0, 1e-3])
    kept = keep(decoder_dim=8)
    assert kept.units["decoder"] == [*range(0, 8)]


def test_a_decoder_without_convolution_is_kept_channel_by_channel(
    make_model, make_settings, batch
):
    shape = {"context_size": 1}
    teacher = make_model(seed=2, **shape).eval()
    silence(teacher.joiner.decoder_proj, [0, 5, 6])
    settings, new = make_settings(**shape), make_settings(**shape, decoder_dim=13)
    kept = select_important(teacher, settings, new, [batch], layers=False)
    left = [c for c in range(16) if c not in (0, 5, 6)]
    assert kept.units["decoder"] == left


def test_channels_that_nothing_reads_are_not_kept(teacher, keep):
    silent = [0, 3, 5, 6, 9, 10, 12, 15, 17, 18, 20, 23]  # 8 of the first 16
    for name, matrix in matrices(teacher).items():
        if name.endswith(".in_proj") or name in _READERS:
            silence(matrix, [c for c in silent if c < matrix.weight.size(1)])
    kept = keep(encoder_dim="8,12", encoder_unmasked_dim="8,8")
    assert kept.stream == [1, 2, 4, 7, 8, 11, 13, 14, 16, 19, 21, 22]


def test_the_heads_of_the_model_count_for_a_channel(teacher, keep):
    """A channel that the encoder doesn't read, but the CTC head does."""
    for name, matrix in matrices(teacher).items():
        if name.endswith(".in_proj") and matrix.weight.size(1) == 24:
            silence(matrix, [20])
    teacher.ctc_output[1].weight.data[:, 20] *= 1000
    kept = keep(encoder_dim="16,17")
    assert kept.stream == [*range(16), 20]


# The front end


FRONT = {"embed_channels": "6,9,14"}


@pytest.fixture
def front(make_model, make_settings, batch):
    """A teacher whose front end has an option, and what a student of it keeps."""
    teacher = make_model(seed=2, **FRONT).eval()

    def keep(**changes):
        settings, new = make_settings(**FRONT), make_settings(**{**FRONT, **changes})
        return select_important(teacher, settings, new, [batch], layers=False).units

    return teacher.encoder_embed, keep


def columns(front, channels):
    """Of the output layer: all frequencies of some channels."""
    return [c * front.out_width + f for c in channels for f in range(front.out_width)]


def test_channels_of_the_front_end_that_do_nothing_are_not_kept(front):
    embed, keep = front
    silence(embed.conv[4], [0, 3])
    silence(embed.conv[7], [1, 2, 5, 8])
    silence(embed.convnext.pointwise_conv1, [*range(0, 6), 12])
    silence(embed.out, columns(embed, [*range(0, 6), 12]))
    silence(embed.convnext.pointwise_conv2, [*range(5, 26)])
    units = keep(embed_channels="4,5,7")
    first, second, third = (units[conv] for conv in FRONT_CONVS)
    assert first == [1, 2, 4, 5] and second == [0, 3, 4, 6, 7]
    assert third == [6, 7, 8, 9, 10, 11, 13]
    assert units[CONVNEXT] == [*range(0, 5), *range(26, 42)]


@pytest.mark.parametrize("reader", ["convnext", "out"])
def test_both_that_read_the_front_ends_last_channels_count(front, reader):
    """Channel 13 does nothing in one of them, and all in the other."""
    embed, keep = front
    matrix, loud = embed.convnext.pointwise_conv1, [13]
    if reader == "out":
        matrix, loud = embed.out, columns(embed, [13])
        silence(embed.convnext.pointwise_conv1, [13])
    else:
        silence(embed.out, columns(embed, [13]))
    matrix.weight.data[:, loud] *= 1000
    assert keep(embed_channels="6,9,1")[FRONT_CONVS[-1]] == [13]


def test_a_channel_of_the_front_end_counts_with_all_its_frequencies(front):
    """One that does much at one frequency, and one that does a bit more at all."""
    embed, keep = front
    silence(embed.convnext.pointwise_conv1, range(14))
    scales = torch.zeros(14, embed.out_width)
    scales[3, 1], scales[9] = 100.0, 99.0
    with torch.no_grad():
        embed.out.weight[:] = 1.0
        # Of the same channel's signal, so that the weights alone differ.
        for conv in (embed.conv[7], embed.convnext.depthwise_conv):
            conv.weight[9], conv.bias[9] = conv.weight[3], conv.bias[3]
        embed.convnext.pointwise_conv2.weight.zero_()
        embed.convnext.pointwise_conv2.bias.zero_()
        embed.out.weight *= scales.flatten()
    assert keep(embed_channels="6,9,1")[FRONT_CONVS[-1]] == [9]


def test_a_front_end_without_an_option_is_kept_as_it_is(teacher, keep):
    assert not {CONVNEXT, *FRONT_CONVS} & set(keep(**NARROW).units)


class Shares:
    """One share for all that reads the stream in a stack, and one for all heads."""

    def __init__(self, stacks, heads):
        self.stacks, self.heads = stacks, heads

    def share(self, name):
        if name in _READERS:
            return self.heads
        return self.stacks[int(name.split(".")[2])]


@st.composite
def nested(draw):
    n = draw(st.integers(1, 5))
    limits = draw(st.lists(st.integers(1, 12), min_size=n, max_size=n))
    widths = [draw(st.integers(1, limit)) for limit in limits]
    return limits, widths, draw(st.integers(0, 9))


@given(nested())
def test_one_set_of_channels_fits_the_teachers_width_in_every_stack(case):
    limits, widths, seed = case
    g = torch.Generator().manual_seed(seed)
    shares = [torch.rand(n, generator=g).double() for n in limits]
    heads = torch.rand(max(limits), generator=g).double()
    model = SimpleNamespace(encoder=SimpleNamespace())
    model.encoder.encoders = [SimpleNamespace(layers=[None]) for _ in limits]
    settings = [
        {
            "downsampling_factor": ",".join("2" * len(limits)),
            "encoder_dim": ",".join(map(str, dims)),
        }
        for dims in (limits, widths)
    ]
    stream = _select_stream(Shares(shares, heads), model, *settings)
    assert len(stream) == len(set(stream)) == max(widths)
    for limit, width in zip(limits, widths, strict=True):
        assert max(stream[:width]) < limit
    if widths == limits:
        assert stream == list(range(max(limits)))
    # The narrowest stack has the best of what all have.
    least = min(limits)
    share = sum(s[:least] for s in shares) + heads[:least]
    assert stream[: min(widths)] == sorted(share.topk(min(widths)).indices.tolist())


# BiasNorm


def test_where_all_is_kept_it_is_kept_in_order_and_no_norm_shifts(keep):
    kept = keep(layers=True)
    assert kept.layers == [[0, 1], [0, 1, 2]] and kept.stream == list(range(24))
    assert all(units == list(range(len(units))) for units in kept.units.values())
    assert len(kept.norm_shifts) == 6 and set(kept.norm_shifts.values()) == {0.0}


def test_a_shift_brings_the_mean_square_of_the_kept_to_that_of_all(
    teacher, keep, batch
):
    kept = keep(**NARROW)
    norms = {"encoder_embed.out_norm": (teacher.encoder_embed.out_norm, 8)}
    for layers, width in zip(encoder_layers(teacher), (8, 12), strict=True):
        norms.update({f"{name}.norm": (layer.norm, width) for name, layer in layers})
    assert set(kept.norm_shifts) == set(norms)
    seen = {}

    def tap(name):
        return lambda m, args: seen.setdefault(name, []).append(
            (args[0] - m.bias).detach().reshape(-1, args[0].size(-1))
        )

    handles = [m.register_forward_pre_hook(tap(k)) for k, (m, _) in norms.items()]
    x, x_lens, _ = batch
    with ModelTap(teacher) as hook:
        for i, n in enumerate(x_lens.tolist()):
            hook.encode(x[i : i + 1, :n], x_lens[i : i + 1])
    for handle in handles:
        handle.remove()
    for name, (_, width) in norms.items():
        found = torch.cat(seen[name]) ** 2
        ratio = found[:, kept.stream[:width]].mean() / found.mean()
        scale = torch.tensor(kept.norm_shifts[name]).exp()
        torch.testing.assert_close(scale, ratio.sqrt(), rtol=1e-4, atol=0)


# Passes


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("stacks", ["2,3", "1,2", "1,1", "2,1"])
def test_the_passes_are_told_beforehand(
    teacher, make_settings, features, layers, channels, stacks
):
    x, x_lens = (t[2:] for t in features)
    batches = [(x[:, :23], x_lens, [[3]])] * 2
    settings, new = make_settings(), make_settings(num_encoder_layers=stacks)
    calls = []
    select_important(
        teacher, settings, new, batches, layers, channels, lambda: calls.append(0)
    )
    assert len(calls) == num_passes(settings, new, 2, layers, channels)
    assert bool(calls) == (layers or channels)


# Models without one of the heads


@pytest.mark.parametrize(
    "shape, y, heads",
    [
        ({}, Y, True),
        ({}, None, False),
        ({"use_transducer": False}, Y, False),
        ({"use_ctc": False}, Y, True),
        ({"causal": True, "chunk_size": "4,-1", "left_context_frames": "16,-1"}, Y, 1),
    ],
    ids=["both", "no-labels", "ctc", "transducer", "causal"],
)
def test_a_student_starts_from_what_is_kept(
    make_model, make_settings, features, shape, y, heads
):
    teacher = make_model(seed=2, **shape).eval()
    settings, new = make_settings(**shape), make_settings(**{**shape, **NARROW})
    kept = select_important(teacher, settings, new, [(*features, y)])
    assert [len(of) for of in kept.layers] == [1, 2]
    assert {"joiner", "decoder"} & set(kept.units) == (
        {"joiner", "decoder"} if heads else set()
    )
    student, _ = build_student(teacher, settings, NARROW, get_model, selection=kept)
    with ModelTap(student, with_ctc=shape.get("use_ctc", True)) as hook:
        out = hook.encode(*features)
    assert out.encoder_out.shape == (3, 14, 12)
    assert torch.isfinite(out.encoder_out).all()


# The teacher as it was


def state_of(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    return (
        [m.training for m in model.modules()],
        hooks,
        model.encoder.chunk_size,
        random.getstate(),
        torch.get_rng_state().tolist(),
        [p.tolist() for p in model.parameters()],
    )


@pytest.mark.parametrize("fault", ["", "short", "labels"])
def test_the_teacher_is_left_as_found(make_model, make_settings, batch, fault):
    """Also when the second batch can't be heard, or its labels be aligned."""
    shape = {"causal": True, "chunk_size": "4,8", "left_context_frames": "16"}
    teacher = make_model(seed=2, **shape).train()
    teacher.joiner.eval()
    x, x_lens, y = batch
    batches = [batch, batch]
    if fault == "short":
        batches[1] = (x[:, :8], x_lens.clamp(max=8), y)
    elif fault == "labels":
        batches[1] = (x, x_lens, [[3] * 60, [4], [5]])
    settings, new = make_settings(**shape), make_settings(**{**shape, **NARROW})
    before = state_of(teacher)
    for layers in (False, True):
        with pytest.raises(KDError) if fault else nullcontext():
            select_important(teacher, settings, new, batches, layers)
        assert state_of(teacher) == before


def test_a_teacher_that_cannot_be_tapped_is_left_without_hooks(
    teacher, make_settings, batch
):
    del encoder_layers(teacher)[1][2][1].norm
    before = state_of(teacher)
    settings = make_settings()
    with pytest.raises(AttributeError):
        select_important(teacher, settings, settings, [batch], layers=False)
    assert state_of(teacher) == before

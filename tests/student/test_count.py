"""What a model costs, counted from its settings: as the real model has it, and as
torch's own counter finds it."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds, count_parameters
from icefall_kd.student.presets import preset

HEADS = {"use_ctc": True, "use_transducer": True, "context_size": 2}
PARTS = ("encoder_embed", "encoder", "decoder", "joiner", "ctc_output")
UNEVEN = {
    "downsampling_factor": "2,1,3,8",
    "num_encoder_layers": "1,2,1,3",
    "encoder_dim": "17,30,22,11",
    "encoder_unmasked_dim": "8",
    "feedforward_dim": "13,26,31,9",
    "num_heads": "1,2,3,5",
    "query_head_dim": "3,8,5,2",
    "pos_head_dim": "1,2,3,4",
    "value_head_dim": "7,2,5,3",
    "cnn_module_kernel": "3,1,9,31",
    "pos_dim": 6,
    "decoder_dim": 12,
    "joiner_dim": 9,
    "feature_dim": 13,
    "vocab_size": 29,
}
ATTENTION = {
    "use_attention_decoder": True,
    "attention_decoder_dim": 24,
    "attention_decoder_num_layers": 3,
    "attention_decoder_attention_dim": 16,
    "attention_decoder_num_heads": 4,
    "attention_decoder_feedforward_dim": 40,
}
CASES = {
    "small": {},
    "causal": {"causal": True},
    "ctc": {"use_transducer": False},
    "transducer": {"use_ctc": False},
    "one-symbol": {"context_size": 1},
    "three-symbols": {"context_size": 3},
    "uneven": UNEVEN,
    "uneven-causal": {**UNEVEN, "causal": True},
    "one-stack": {
        "downsampling_factor": "4",
        "num_encoder_layers": "2",
        "encoder_dim": "20",
        "encoder_unmasked_dim": "20",
        "feedforward_dim": "30",
        "num_heads": "4",
        "cnn_module_kernel": "5",
    },
    "attention": ATTENTION,
    "narrow-front": {"embed_channels": "3,5,7"},
    "wide-front": {**UNEVEN, "embed_channels": "11,33,130"},
    "odd-front": {**preset("1m"), "feature_dim": 40, "embed_channels": "8,16,1"},
    "1m": {**preset("1m"), "feature_dim": 80, "vocab_size": 500},
    "1m-streaming": {**preset("1m-streaming"), "feature_dim": 80, "vocab_size": 500},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def real_parameters(model):
    def count(*names):
        modules = (getattr(model, name, None) for name in names)
        return sum(p.numel() for m in modules if m for p in m.parameters())

    parts = {part: count(part) for part in (*PARTS, "attention_decoder")}
    parts["simple"] = count("simple_am_proj", "simple_lm_proj")
    return {**parts, "all": sum(p.numel() for p in model.parameters())}


# Parameters


@every_case
def test_parameters_are_those_of_the_real_model(make_model, make_settings, case):
    case = {**HEADS, **case}
    model = make_model(shaken=False, **case)
    assert count_parameters(make_settings(**case)) == real_parameters(model)


@st.composite
def shapes(draw):
    n = draw(st.integers(1, 3))

    def numbers(low, high):
        return ",".join(str(draw(st.integers(low, high))) for _ in range(n))

    return {
        "downsampling_factor": numbers(1, 5),
        "num_encoder_layers": numbers(1, 2),
        "encoder_dim": numbers(8, 40),
        "encoder_unmasked_dim": "8",
        "feedforward_dim": numbers(4, 40),
        "num_heads": numbers(1, 5),
        "query_head_dim": numbers(1, 9),
        "pos_head_dim": numbers(1, 5),
        "value_head_dim": numbers(1, 9),
        "cnn_module_kernel": str(draw(st.sampled_from([1, 3, 15]))),
        "pos_dim": draw(st.sampled_from([4, 18])),
        "decoder_dim": 4 * draw(st.integers(1, 9)),
        "joiner_dim": draw(st.integers(1, 40)),
        "feature_dim": draw(st.integers(7, 90)),
        "embed_channels": ",".join(str(draw(st.integers(1, 40))) for _ in range(3)),
        "vocab_size": draw(st.integers(2, 60)),
        "context_size": draw(st.integers(1, 3)),
        "causal": draw(st.booleans()),
        "use_ctc": draw(st.booleans()),
        "use_transducer": True,
    }


@given(shapes())
@hypothesis_settings(max_examples=20)
def test_parameters_are_exact_for_any_shape(make_model, make_settings, shape):
    model = make_model(shaken=False, **shape)
    assert count_parameters(make_settings(**shape)) == real_parameters(model)


def test_a_transducer_alone_and_not_causal_is_meant_where_nothing_is_said(
    make_settings,
):
    names = ("use_ctc", "use_transducer", "causal", "use_attention_decoder")
    values = (False, True, False, False)
    said = make_settings(**dict(zip(names, values, strict=True)))
    unsaid = {k: v for k, v in said.items() if k not in names}
    assert count_parameters(unsaid) == count_parameters(said)
    assert count_multiply_adds(unsaid) == count_multiply_adds(said)


def test_icefalls_own_front_end_is_meant_where_nothing_is_said(make_settings):
    unsaid, said = make_settings(), make_settings(embed_channels="8,32,128")
    other = make_settings(embed_channels="8,32,127")
    for count in (count_parameters, count_multiply_adds):
        assert count(unsaid) == count(said) != count(other)


def test_settings_may_be_numbers_and_tuples(make_settings):
    written = make_settings(query_head_dim="8", encoder_dim="16,24")
    numbers = {**written, "query_head_dim": 8, "encoder_dim": (16, 24)}
    assert count_parameters(numbers) == count_parameters(written)


# Multiply-adds


def profiled(model, settings, frames):
    """Multiply-adds of each part, as the real modules run greedy search.

    The counter sees matrix products and convolutions. The weighted sums that
    downsampling makes are element-wise to it, and are returned apart.
    """
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode
    parts, sums, hooks = dict.fromkeys(PARTS, 0.0), [], []

    def run(part, function):
        with counter(display=False) as c, torch.no_grad():
            out = function()
        parts[part] = c.get_total_flops() / 2
        return out

    def see_downsampling(module, inputs, output):
        sums.append(module.downsample * output.numel())

    for module in model.modules():
        if type(module).__name__ == "SimpleDownsample":
            hooks.append(module.register_forward_hook(see_downsampling))
    x = torch.randn(1, frames, settings["feature_dim"])
    x, lens = run(
        "encoder_embed", lambda: model.encoder_embed(x, torch.tensor([frames]))
    )
    mask = torch.zeros(1, x.size(1), dtype=torch.bool)
    x, lens = run("encoder", lambda: model.encoder(x.permute(1, 0, 2), lens, mask))
    for hook in hooks:
        hook.remove()
    if settings["use_ctc"]:
        run("ctc_output", lambda: model.ctc_output(x.permute(1, 0, 2)))
    if settings["use_transducer"]:  # one symbol a frame
        symbols = torch.zeros(x.size(0), settings["context_size"], dtype=torch.long)
        y = run("decoder", lambda: model.decoder(symbols, need_pad=False))
        run("joiner", lambda: model.joiner(x, y))
    return parts, sum(sums)


@every_case
@pytest.mark.parametrize("seconds", [3.17, 10.0])
def test_multiply_adds_are_what_torch_counts(make_model, make_settings, case, seconds):
    """Part by part within 2 %; and to the last one, with the sums of downsampling."""
    # Shorter chunks are padded to whole ones, at random.
    case = {**HEADS, **case, "chunk_size": "-1"}
    settings = make_settings(**case)
    model = make_model(shaken=False, **case).eval()
    parts, sums = profiled(model, settings, round(100 * seconds))
    found = count_multiply_adds(settings, seconds)
    assert found["all"] == pytest.approx(sum(parts.values()) / seconds, rel=0.02)
    for part in PARTS:
        assert found[part] == pytest.approx(parts[part] / seconds, rel=0.02), part
        if part == "encoder":
            assert sums > 0
            parts[part] += sums
        assert found[part] == pytest.approx(parts[part] / seconds, rel=1e-9), part
    assert found["all"] == pytest.approx(sum(found[p] for p in PARTS), rel=1e-12)


def test_torch_counts_grouped_convolutions_and_batched_products_right():
    """Else the comparison above would show nothing."""
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode
    cases = [
        (
            lambda: torch.nn.Conv1d(6, 6, 5, groups=6, padding=2)(torch.ones(1, 6, 9)),
            270,
        ),
        (
            lambda: torch.nn.Conv1d(8, 8, 2, groups=2)(torch.ones(3, 8, 2)),
            3 * 8 * 4 * 2,
        ),
        (lambda: torch.matmul(torch.ones(3, 1, 4, 5), torch.ones(3, 1, 5, 7)), 420),
        (lambda: torch.matmul(torch.ones(3, 2, 4, 5), torch.ones(3, 1, 5, 7)), 840),
        (lambda: torch.nn.Linear(5, 7)(torch.ones(2, 4, 5)), 280),
    ]
    for function, products in cases:
        with counter(display=False) as c, torch.no_grad():
            function()
        assert c.get_total_flops() == 2 * products


def test_s_takes_the_multiply_adds_that_torch_counted_for_icefall():
    """Transducer and CTC, vocabulary 500, 10 s, per second of audio."""
    settings = {**HEADS, **preset("s"), "feature_dim": 80, "vocab_size": 500}
    assert count_multiply_adds(settings)["all"] == pytest.approx(624.7e6, rel=1e-3)


def test_longer_utterances_take_more_for_each_second(make_settings):
    short, long = (count_multiply_adds(make_settings(), s) for s in (10.0, 30.0))
    assert long["encoder"] > 1.1 * short["encoder"]
    for part in ("encoder_embed", "decoder", "joiner"):
        assert long[part] == pytest.approx(short[part], rel=0.01)


# Refusals


@pytest.mark.parametrize("count", [count_parameters, count_multiply_adds])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoder_dim": "16,24,8"}, "encoder_dim has 3 numbers.*one number"),
        ({"feedforward_dim": "24,x"}, "feedforward_dim is '24,x'"),
        ({"num_encoder_layers": "0,2"}, "num_encoder_layers is '0,2'"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"decoder_dim": "16,16"}, "decoder_dim is '16,16', and must be one number"),
        ({"feature_dim": 6}, "feature_dim is 6, .*7 or more"),
        ({"embed_channels": "8,16"}, "embed_channels is '8,16', .*three numbers"),
        ({"embed_channels": "0,16,32"}, "embed_channels is '0,16,32', .*positive"),
        ({"embed_channels": "8,16,x"}, "embed_channels is '8,16,x', .*numbers"),
        ({"use_adapters": True}, "use_adapters is True, .*without it"),
        ({"use_lora": True, "lora_r": 8}, "lora_r is 8, .*without it"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_what_can_not_be_counted_is_refused(make_settings, count, changes, message):
    with pytest.raises(KDError, match=message):
        count(make_settings(**changes))


def test_lora_that_is_switched_off_is_no_reason_to_refuse(make_settings):
    plain = count_parameters(make_settings())
    assert count_parameters(make_settings(use_lora=False, lora_r=8)) == plain
    assert count_parameters(make_settings(use_lora=True, lora_r=0)) == plain


@pytest.mark.parametrize("seconds", [0.08, 0.0, -1.0])
def test_an_utterance_without_a_frame_is_refused(make_settings, seconds):
    with pytest.raises(KDError, match=f"{seconds} s is too short.*0.09 s"):
        count_multiply_adds(make_settings(), seconds)


def test_the_shortest_utterance_is_counted(make_settings):
    assert count_multiply_adds(make_settings(), 0.09)["encoder"] > 0

"""The named settings: icefall's as its recipes have them, ours as slices of them."""

import argparse
import json

import pytest
from zipformer.bin.train import add_model_arguments, get_model

from icefall_kd import build_student
from icefall_kd.errors import KDError
from icefall_kd.student.count import count_parameters
from icefall_kd.student.presets import (
    LADDER,
    PRESETS,
    per_stack,
    preset,
    preset_names,
    streaming,
    to_ints,
)

RECIPE = {"feature_dim": 80, "vocab_size": 500, "context_size": 2, "blank_id": 0}
WIDTHS = (
    "num_encoder_layers",
    "num_heads",
    "feedforward_dim",
    "encoder_dim",
    "encoder_unmasked_dim",
)
SAME = (
    "downsampling_factor",
    "query_head_dim",
    "pos_head_dim",
    "value_head_dim",
    "cnn_module_kernel",
)
OURS = {"10m": 10e6, "6m": 6e6, "3m": 3e6, "1m": 1e6}


@pytest.fixture(scope="module")
def defaults():
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return vars(parser.parse_args([]))


@pytest.fixture(scope="module")
def small(make_model):
    return make_model(shaken=False, **RECIPE, **preset("s"), use_ctc=True).eval()


def counted(name, transducer=True, ctc=True):
    heads = {"use_transducer": transducer, "use_ctc": ctc}
    return count_parameters({**RECIPE, **preset(name), **heads})["all"]


# What they are


def test_every_setting_is_one_that_the_recipes_parser_has(defaults):
    for name in preset_names():
        for key, value in preset(name).items():
            assert type(value) is type(defaults[key]), (name, key)


def test_m_is_what_the_recipes_parser_gives(defaults):
    assert preset("m") == {key: defaults[key] for key in preset("m")}


@pytest.mark.parametrize(
    "name, transducer, both, ctc",
    [
        ("s", 23_285_615, 23_414_115, 22_118_279),
        ("m", 65_549_011, 65_805_511, 64_250_603),
        ("l", 148_439_574, 148_824_074, 147_010_094),
        ("xl", 746_427_771, 747_196_271, 743_497_619),
        ("kws", 3_396_409, 3_460_909, 2_768_849),
    ],
)
def test_icefalls_presets_have_the_parameters_that_icefall_gives(
    name, transducer, both, ctc
):
    found = counted(name, ctc=False), counted(name), counted(name, transducer=False)
    assert found == (transducer, both, ctc)


def test_xl_has_about_700_million_parameters_at_its_vocabulary_of_2000():
    settings = {**RECIPE, **preset("xl-streaming"), "use_ctc": True, "vocab_size": 2000}
    assert count_parameters(settings)["all"] == pytest.approx(750e6, rel=0.02)


@pytest.mark.parametrize("name, millions", OURS.items())
def test_our_presets_have_the_size_in_their_name(name, millions):
    assert counted(name) == pytest.approx(millions, rel=0.05)
    assert counted(name, ctc=False) == pytest.approx(millions, rel=0.02)


# How they hang together


def test_each_preset_of_the_ladder_is_nowhere_more_than_the_next():
    for lower, upper in zip(LADDER, LADDER[1:], strict=False):
        a, b = preset(lower), preset(upper)
        for name in WIDTHS:
            pairs = zip(per_stack(a, name), per_stack(b, name), strict=True)
            assert all(x <= y for x, y in pairs), (lower, upper, name)
        for name in ("decoder_dim", "joiner_dim"):
            assert a[name] <= b[name], (lower, upper, name)
        assert counted(lower) < counted(upper)


@pytest.mark.parametrize("name", [*OURS, "s", "m", "l", "kws"])
def test_all_but_xl_share_what_a_slice_can_not_change(name):
    assert all(preset(name)[key] == preset("s")[key] for key in (*SAME, "pos_dim"))


@pytest.mark.parametrize("name", [*OURS, "kws"])
def test_a_student_of_each_size_can_be_sliced_from_s(small, make_settings, name):
    settings = make_settings(**RECIPE, **preset("s"), use_ctc=True)
    student, _ = build_student(small, settings, preset(name), get_model)
    assert sum(p.numel() for p in student.parameters()) == counted(name)


@pytest.mark.parametrize("name", PRESETS)
def test_the_unmasked_channels_are_no_more_than_there_are(name):
    settings = preset(name)
    pairs = zip(
        per_stack(settings, "encoder_unmasked_dim"),
        per_stack(settings, "encoder_dim"),
        strict=True,
    )
    assert all(unmasked <= dim for unmasked, dim in pairs)


# Streaming


@pytest.mark.parametrize("name", PRESETS)
def test_the_streaming_form_differs_in_causal_and_chunks_alone(name):
    settings, before = preset(name), preset(name)
    new = streaming(settings)
    assert settings == before
    assert new == preset(f"{name}-streaming")
    assert {k: v for k, v in new.items() if k not in settings} == {
        "causal": True,
        "chunk_size": "16,32,64,-1",
        "left_context_frames": "64,128,256,-1",
    }


def test_a_streaming_model_runs_with_every_chunk(make_model, features):
    model = make_model(**preset("1m-streaming"), feature_dim=20).eval()
    x, x_lens = features
    for chunk in (16, 32, 64, -1):
        model.encoder.chunk_size = (chunk,)
        out, lens = model.forward_encoder(x, x_lens)
        assert out.shape == (3, 14, 64) and lens.tolist() == [14, 9, 4]


# Names and values


def test_a_preset_is_a_copy():
    preset("s")["encoder_dim"] = "1"
    assert preset("s")["encoder_dim"] != "1"


@pytest.mark.parametrize("name", ["S", "", "small", "-streaming", "s-streaming-x"])
def test_an_unknown_preset_is_refused_with_those_there_are(name):
    with pytest.raises(KDError, match="no preset .*xl, l, m, s, 10m") as e:
        preset(name)
    assert repr(name) in str(e.value)


@pytest.mark.parametrize("value", ["2,2,4", (2, 2, 4), [2, 2, 4], " 2, 2 ,4"])
def test_a_list_is_read_however_it_is_written(value):
    assert to_ints({"x": value}, "x") == (2, 2, 4)


@pytest.mark.parametrize("value", ["", "2,,2", "a", "2,0", "-1", 0, 1.5j, None, (), {}])
def test_what_is_no_list_of_positive_numbers_is_refused(value):
    with pytest.raises(KDError, match="setting x is .* positive whole number"):
        to_ints({"x": value}, "x")


def test_a_missing_setting_is_refused_by_its_name():
    with pytest.raises(KDError, match="setting encoder_dim is None"):
        per_stack({"downsampling_factor": "1,2"}, "encoder_dim")


def test_one_number_stands_for_all_stacks():
    settings = {"downsampling_factor": "1,2,4", "query_head_dim": "32"}
    assert per_stack(settings, "query_head_dim") == (32, 32, 32)


def test_another_number_of_stacks_is_refused():
    settings = {"downsampling_factor": "1,2,4", "encoder_dim": "32,64"}
    with pytest.raises(KDError, match="encoder_dim has 2 numbers.*factor 3"):
        per_stack(settings, "encoder_dim")


# The real icefall

# In a process of its own: the recipe's zipformer.py has the name of a package here.
REAL = """
import json, sys
import icefall
from pathlib import Path
from icefall_kd.teacher.recipe import import_train
root = Path(icefall.__file__).resolve().parents[1]
train = import_train(root / "egs" / "librispeech" / "ASR" / "zipformer")
sizes = {}
for name, settings in json.loads(sys.argv[1]).items():
    params = train.get_params()
    params.update(vars(train.get_parser().parse_args([])))
    params.update(settings)
    model = train.get_model(params)
    sizes[name] = sum(p.numel() for p in model.parameters())
print(json.dumps(sizes))
"""


def test_the_real_icefall_makes_models_of_these_sizes(run_python):
    pytest.importorskip("k2", reason="no k2: tools/make_k2_env.sh --icefall")
    pytest.importorskip("icefall", reason="no icefall on PYTHONPATH")
    names = [n for n in preset_names() if n.split("-")[0] not in ("l", "xl")]
    settings = {n: {**RECIPE, **preset(n), "use_ctc": True} for n in names}
    done = run_python(REAL, json.dumps(settings))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {n: counted(n) for n in names}

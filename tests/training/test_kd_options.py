"""The --kd-* options: defaults, curves as text, and a YAML file of them."""

import argparse
import pickle
import sys

import pytest
from zipformer.bin import train as zipformer_train

from icefall_kd.errors import KDError
from icefall_kd.terms import TERMS
from icefall_kd.terms.schedule import Curve
from icefall_kd.training import session
from icefall_kd.training.options import RENAMED, all_options, read_config

DEFAULTS = {
    "kd_config": "",
    "kd_ctc_weight": 0.0,
    "kd_simple_weight": 0.0,
    "kd_rnnt_weight": 0.0,
    "kd_full_sum_weight": 0.0,
    "kd_full_sum_form": "two-sided",
    "kd_hidden_weight": 0.0,
    "kd_nbest_weight": 0.0,
    "kd_ctc_frame_weighting": "all",
    "kd_ctc_delay": 0,
    "kd_ctc_symbol_weight": 1.0,
    "kd_rnnt_form": "nodes",
    "kd_rnnt_shift": 0,
    "kd_stored_ranges": False,
    "kd_rnnt_node_weighting": "occupancy",
    "kd_rnnt_blank_weight": 1.0,
    "kd_hidden_layers": "",
    "kd_hidden_distance": "mse",
    "kd_hidden_projector_lr": 1e-3,
    "kd_schedule": "scratch",
    "kd_last_epochs": 0.0,
    "kd_condition": "none",
    "kd_freeze": "",
    "kd_int8_from": "",
    "kd_int8_scales": "tensor",
    "kd_teacher_path_only": False,
    "kd_teacher_s_range": 5,
    "kd_hard_weight": 1.0,
    "kd_temperature": 1.0,
    "kd_missing": "refuse",
    "kd_time_warp": "off",
    "kd_teacher_exp_dir": "",
    "kd_teacher_epoch": 30,
    "kd_teacher_iter": 0,
    "kd_teacher_avg": 1,
    "kd_teacher_use_averaged_model": True,
    "kd_teacher_bpe_model": "",
    "kd_teacher_model_flags": "",
    "kd_teacher_recipe": "",
    "kd_teacher_clean": False,
    "kd_teacher_cache_dir": "",
    "kd_teacher_keep": "dense",
}

# One line of the file for each option, none of them its default.
LINES = {
    "ctc-weight": ("0:0.8,10:0.5", "0:0.8,10:0.5"),
    "simple-weight": ("0:2,3:1", "0:2,3:1"),
    "rnnt-weight": ("0.25", 0.25),
    "full-sum-weight": (".5", 0.5),
    "full-sum-form": ("one-sided", "one-sided"),
    "hidden-weight": ("1e-1", 0.1),
    "nbest-weight": ("2", 2.0),
    "hard-weight": ("5:0.5", "5:0.5"),
    "temperature": ("2", 2.0),
    "ctc-frame-weighting": ("non-blank", "non-blank"),
    "ctc-delay": ("3", 3),
    "ctc-symbol-weight": ("2", 2.0),
    "rnnt-form": ("total", "total"),
    "rnnt-shift": ("2", 2),
    "stored-ranges": ("1", True),
    "rnnt-node-weighting": ("equal", "equal"),
    "rnnt-blank-weight": (".25", 0.25),
    "hidden-layers": ("3:2", "3:2"),
    "hidden-distance": ("cosine", "cosine"),
    "hidden-projector-lr": ("2e-3", 2e-3),
    "schedule": ("warmup", "warmup"),
    "last-epochs": ("1.5", 1.5),
    "condition": ("right", "right"),
    "int8-from": ("1.5", "1.5"),
    "int8-scales": ("channel", "channel"),
    "freeze": ("encoder_embed decoder:2", "encoder_embed decoder:2"),
    "missing": ("hard", "hard"),
    "time-warp": ("follow", "follow"),
    "teacher-exp-dir": ("exp/a,exp/b", "exp/a,exp/b"),
    "teacher-epoch": ("7", 7),
    "teacher-iter": ("4000", 4000),
    "teacher-avg": ("4", 4),
    "teacher-use-averaged-model": ("0", False),
    "teacher-bpe-model": ("bpe.model", "bpe.model"),
    "teacher-model-flags": ("--causal 1", "--causal 1"),
    "teacher-recipe": ("../zipformer", "../zipformer"),
    "teacher-s-range": ("0", 0),
    "teacher-path-only": ("yes", True),
    "teacher-clean": ("true", True),
    "teacher-cache-dir": ("/tmp/on", "/tmp/on"),
    "teacher-keep": ("top:8@2", "top:8@2"),
}


def dest(name):
    return "kd_" + name.replace("-", "_")


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line as a recipe's main() does."""

    def run(*words, parser=None):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        if parser is None:
            parser = argparse.ArgumentParser(
                formatter_class=argparse.ArgumentDefaultsHelpFormatter
            )
        session.add_arguments(parser)
        return parser.parse_args()

    return run


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "kd.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# The parser


def test_options_are_off_by_default(parse):
    assert vars(parse()) == DEFAULTS
    assert all(DEFAULTS[o.dest] == o.default for o in all_options())
    assert len(all_options()) == len(DEFAULTS) - 1 == len(LINES)


def test_options_are_read_from_the_command_line(parse):
    words = [w for name, (x, _) in LINES.items() for w in (f"--kd-{name}", x)]
    expected = {dest(name): value for name, (_, value) in LINES.items()}
    assert vars(parse(*words)) == {"kd_config": "", **expected}


def test_options_do_not_collide_with_zipformers_parser(parse, monkeypatch):
    parser = zipformer_train.get_parser()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    before = set(vars(parser.parse_args([])))
    assert not before & set(DEFAULTS)
    args = vars(parse("--kd-rnnt-weight", "0.5", parser=parser))
    assert set(args) == before | set(DEFAULTS)  # argparse raises on a taken name
    assert {k: args[k] for k in DEFAULTS} == {**DEFAULTS, "kd_rnnt_weight": 0.5}


def test_options_do_not_collide_with_the_digits_recipes(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    parser = recipe.get_parser()
    recipe.AsrDataModule.add_arguments(parser)
    args = vars(parser.parse_args(["--kd-ctc-weight", "0.8"]))
    found = {k: v for k, v in args.items() if k.startswith("kd_")}
    assert found == {**DEFAULTS, "kd_ctc_weight": 0.8}


@pytest.mark.parametrize(
    "formatter", ["HelpFormatter", "ArgumentDefaultsHelpFormatter"]
)
def test_the_help_names_every_option(monkeypatch, formatter):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    parser = argparse.ArgumentParser(formatter_class=getattr(argparse, formatter))
    session.add_arguments(parser)
    text = parser.format_help()
    assert all(f"--kd-{name} " in text for name in ("config", *LINES))
    assert "15 % of the epochs" in " ".join(text.split()) and "%%" not in text


@pytest.mark.parametrize("name", [*TERMS, "hard"])
@pytest.mark.parametrize("text", ["0.75", "0:0.8,10:0.5", "10:0.5"])
def test_a_weight_is_a_number_or_the_text_of_a_curve(parse, name, text):
    name = f"{name.replace('_', '-')}-weight"
    value = getattr(parse(f"--kd-{name}", text), dest(name))
    assert value == (0.75 if text == "0.75" else text) and type(value) in (float, str)
    assert Curve.parse(value, name) == Curve.parse(text, name)


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("value", ["x", None])
def test_an_old_name_is_refused_with_the_new_one(parse, config, old, value):
    new = RENAMED[old]
    assert dest(new) in DEFAULTS and dest(old) not in DEFAULTS
    words = [[f"--kd-{old}"], [f"--kd-{old}={value}"]][value is not None]
    with pytest.raises(KDError) as e:
        parse(*words)
    assert str(e.value) == f"--kd-{old} is called --kd-{new} now: give --kd-{new}"
    for name in (old, old.replace("-", "_")):
        with pytest.raises(KDError, match=f"{old!r}, .* called {new!r} now") as e:
            parse("--kd-config", config(f"{name}: {value}\n"))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["stored-ranges", "teacher-path-only"])
@pytest.mark.parametrize("text, value", [("true", True), ("0", False), ("No", False)])
def test_a_switch_is_read_as_icefalls(parse, config, name, text, value):
    assert getattr(parse(f"--kd-{name}", text), dest(name)) is value
    path = config(f"{name}: {text}\n")
    assert getattr(parse("--kd-config", path), dest(name)) is value


def test_what_is_no_curve_is_refused_where_it_is_used(parse, make_model, make_params):
    args = vars(parse("--kd-ctc-weight", "lots"))
    with pytest.raises(KDError, match="--kd-ctc-weight is 'lots', and must be"):
        session.attach(make_params(**args), make_model())


# The file


@pytest.mark.parametrize("spell", [str, lambda name: name.replace("-", "_")])
def test_every_option_can_stand_in_the_file(parse, config, spell):
    path = config("".join(f"{spell(n)}: {x}\n" for n, (x, _) in LINES.items()))
    found = vars(parse("--kd-config", path))
    expected = {dest(name): value for name, (_, value) in LINES.items()}
    assert found == {"kd_config": str(path), **expected}
    assert all(type(v) is type(found[k]) for k, v in expected.items())
    assert not any(found[k] == DEFAULTS[k] for k in expected)


@pytest.mark.parametrize("name", LINES)
def test_the_command_line_goes_before_the_file(parse, config, name):
    text, value = LINES[name]
    path = config(f"{name}: {text}\n")
    default = DEFAULTS[dest(name)]
    for given in ([f"--kd-{name}", default], [f"--kd-{name}={default}"]):
        for words in ([*given, "--kd-config", path], [f"--kd-config={path}", *given]):
            assert vars(parse(*words)) == {**DEFAULTS, "kd_config": str(path)}
    found = vars(parse("--kd-config", path))
    assert found == {**DEFAULTS, "kd_config": str(path), dest(name): value}


@pytest.mark.parametrize("flag", ["--kd-config", "--kd-confi", "--kd-conf"])
def test_the_file_is_read_however_argparse_lets_it_be_named(parse, config, flag):
    path = config("temperature: 3\n")
    assert parse(flag, path).kd_temperature == 3.0


def test_a_file_of_nothing_changes_nothing(parse, config):
    for text in ("", "# ctc-weight: 1\n", "---\n"):
        path = config(text)
        assert vars(parse("--kd-config", path)) == {**DEFAULTS, "kd_config": str(path)}


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("ctc-weight: 10:0.5", "kd_ctc_weight", "10:0.5"),  # 600.5 to YAML
        ("hard-weight: 5:1", "kd_hard_weight", "5:1"),  # 301
        ("hidden-layers: 3:2", "kd_hidden_layers", "3:2"),  # 182
        ("teacher-epoch: 010", "kd_teacher_epoch", 10),  # 8
        ("teacher-keep: no", "kd_teacher_keep", "no"),  # False
        (
            "teacher-cache-dir: 2026-01-02",
            "kd_teacher_cache_dir",
            "2026-01-02",
        ),  # a date
        ("teacher-exp-dir:", "kd_teacher_exp_dir", ""),  # None
        ("ctc_weight: '0:1, 4:0.5' # falls", "kd_ctc_weight", "0:1, 4:0.5"),
    ],
)
def test_values_are_what_stands_there(config, text, name, value):
    assert read_config(str(config(text))) == {name: value}


@pytest.mark.parametrize(
    "text, words",
    [
        ("- ctc-weight\n- 1\n", "holds no options: give lines such as"),
        ("ctc-weight 1", "holds no options"),
        ("42", "holds no options"),
        ("ctc-weight: [1", "can't be read .*give a YAML file"),
        ("a: b: c", "can't be read"),
        ("ctc-wieght: 1", "the option 'ctc-wieght', .*did you mean 'ctc-weight'"),
        ("kd-temperatur: 1", "the option 'kd-temperatur', .*'temperature'"),
        ("rnnt_w: 1", "the option 'rnnt-w', .*'rnnt-weight'"),
        ("config: other.yaml", "the option 'config', which there is not"),
        ("temperature: hot", "temperature: 'hot', and temperature must be a number"),
        ("ctc-delay: 1.5", "ctc-delay: '1.5', and ctc-delay must be a whole number"),
        ("teacher-path-only: maybe", "teacher-path-only: 'maybe', .* true or false"),
        ("teacher-epoch:", "teacher-epoch: '', .* a whole number"),
        ("ctc-weight: [0.5, 1]", "ctc-weight: .*'0.5', '1'.*number, or numbers by"),
        ("hidden-layers: [out, 3]", "hidden-layers: .*must be one text"),
        ("ctc-weight:\n  at: 1", "ctc-weight: {'at': '1'}"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_sentence(parse, config, text, words):
    path = config(text)
    with pytest.raises(KDError, match=words) as e:
        parse("--kd-config", path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(parse, tmp_path):
    for name in ("none.yaml", "."):
        with pytest.raises(KDError, match="can't be read .*give a YAML file") as e:
            parse("--kd-config", tmp_path / name)
        assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"keep: \xe9\n")
    with pytest.raises(KDError, match="latin.yaml, can't be read") as e:
        parse("--kd-config", path)
    assert "\n" not in str(e.value)


def test_an_option_without_its_file_is_left_to_the_recipes_parser(parse, capsys):
    with pytest.raises(SystemExit) as e:
        parse("--kd-config")
    assert e.value.code == 2
    assert capsys.readouterr().err.count("expected one argument") == 1


REFUSED = """
import argparse, sys
from icefall_kd.training import session as kd
parser = argparse.ArgumentParser()
kd.add_arguments(parser)
"""


def test_the_program_ends_with_the_sentence_alone(run_python, config):
    done = run_python(REFUSED, "--kd-config", config("temprature: 2"))
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("icefall_kd: error: ") and "'temperature'" in line


def test_the_program_ends_with_an_old_names_sentence(run_python):
    done = run_python(REFUSED + "parser.parse_args()\n", "--kd-projector-lr", "1e-3")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("icefall_kd: error: --kd-projector-lr is called ")


def test_reading_options_loads_neither_torch_nor_k2(run_python, config):
    code = REFUSED + (
        "parser.parse_args()\n"
        "print(sorted({'torch', 'k2', 'fast_rnnt', 'lhotse'} & set(sys.modules)))"
    )
    done = run_python(code, "--kd-config", config("temperature: 2"))
    assert (done.stdout, done.stderr) == ("[]\n", "")


# What goes on


def test_params_travel_to_processes_and_checkpoints_as_plain_values(
    parse, config, make_model, make_params
):
    """A curve stays text: a checkpoint loads where icefall_kd is not installed."""
    path = config("ctc-weight: 0:0.8,10:0.5\nschedule: warmup\n")
    args = parse("--kd-config", path, "--kd-hard-weight", "0:1,4:0.5")
    assert vars(pickle.loads(pickle.dumps(args))) == vars(args)
    params = make_params(**{**vars(args), "num_epochs": 30})
    session.attach(params, make_model())
    assert params.kd_ctc_weight == "0:0.8,10:0.5"
    assert session.current().distillation.joint.weights(29)["ctc"] == 0.5
    data = pickle.dumps(dict(params))
    assert b"0:0.8,10:0.5" in data and b"icefall_kd" not in data
    assert pickle.loads(data) == dict(params)

"""A recipe whose own functions fail is refused in one sentence."""

import pytest

from icefall_kd.errors import KDError
from icefall_kd.teacher.loader import load_recipe_model, settings_of
from icefall_kd.teacher.recipe import (
    import_train,
    model_names,
    params_of_flags,
    recipe_defaults,
    recipe_params,
)

GOOD = {
    "get_params": "return {'feature_dim': 20}",
    "get_model": "return None",
    "add_model_arguments": "parser.add_argument('--encoder-dim', default='8')",
    "get_parser": "parser = argparse.ArgumentParser()\n"
    "    add_model_arguments(parser)\n    return parser",
}


@pytest.fixture
def recipe_of(tmp_path):
    """A recipe of GOOD's functions, some of them changed."""

    def make(**changes):
        code = "import argparse\n"
        for name, body in {**GOOD, **changes}.items():
            args = {"get_model": "params", "add_model_arguments": "parser"}
            code += f"def {name}({args.get(name, '')}):\n    {body}\n"
        (tmp_path / "train.py").write_text(code, "utf8")
        return import_train(tmp_path)

    return make


BROKEN = {
    "raises": ("raise RuntimeError('no\\nluck')", "RuntimeError: no"),
    "asserts": ("assert False", "AssertionError: no message"),
    "exits": ("raise SystemExit('no luck')", "SystemExit: no luck"),
}


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and "train.py" in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("body, words", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(
    "name, call",
    [
        ("get_params", recipe_params),
        ("get_parser", recipe_defaults),
        ("get_parser", lambda train: params_of_flags(train, ["--encoder-dim", "9"])),
        ("get_parser", model_names),
        ("add_model_arguments", model_names),
    ],
    ids="params defaults flags student-parser student-arguments".split(),
)
def test_a_function_that_fails_is_named(recipe_of, name, call, body, words):
    train = recipe_of(**{name: body})
    with pytest.raises(KDError) as e:
        call(train)
    one_sentence(e, name, words, "--help until it works")


@pytest.mark.parametrize("body, words", BROKEN.values(), ids=BROKEN)
def test_a_teacher_of_such_a_recipe_is_refused(recipe_of, teacher_exp, body, words):
    train = recipe_of(get_params=body)
    with pytest.raises(KDError) as e:
        load_recipe_model(train.__file__[: -len("/train.py")], teacher_exp.folder, 2)
    one_sentence(e, "get_params", words)


def test_an_import_that_exits_is_refused(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('read the README')\n", "utf8")
    with pytest.raises(KDError) as e:
        import_train(tmp_path)
    one_sentence(e, "can't be imported", "SystemExit: read the README")


def test_a_parser_that_demands_an_option_is_refused(recipe_of):
    body = "parser = argparse.ArgumentParser()\n"
    body += "    parser.add_argument('--exp', required=True)\n    return parser"
    train = recipe_of(get_parser=body)
    for call in (recipe_defaults, model_names):
        with pytest.raises(KDError) as e:
            call(train)
        one_sentence(e, "refuses an empty command line", "--exp")


def test_a_type_that_fails_is_refused(recipe_of):
    body = "parser = argparse.ArgumentParser()\n"
    body += "    parser.add_argument('--size', type=lambda x: {}[x])\n    return parser"
    train = recipe_of(get_parser=body)
    with pytest.raises(KDError) as e:
        params_of_flags(train, ["--size", "big"])
    one_sentence(e, "KeyError: 'big'")


@pytest.mark.parametrize(
    "name, call",
    [("get_params", recipe_params), ("get_parser", recipe_defaults)],
)
def test_a_function_that_returns_something_else_is_refused(recipe_of, name, call):
    train = recipe_of(**{name: "return None"})
    with pytest.raises(KDError) as e:
        call(train)
    one_sentence(e, name, "returns a NoneType", "`recipe`")


def test_a_refusal_of_a_plugged_recipe_stays_as_it_is(recipe_of):
    body = "from icefall_kd.errors import KDError\n"
    body += "    raise KDError('kd.yaml is no mapping')"
    with pytest.raises(KDError, match="^kd.yaml is no mapping$"):
        recipe_defaults(recipe_of(get_parser=body))


def test_settings_without_a_checkpoint_of_such_a_recipe_are_refused(
    recipe_of, tmp_path, bpe_models
):
    train = recipe_of(get_params="raise OSError('data/lang is not there')")
    with pytest.raises(KDError) as e:
        settings_of({"model": {}}, tmp_path / "x.pt", train, (), bpe_models.a)
    one_sentence(e, "get_params", "OSError: data/lang is not there")

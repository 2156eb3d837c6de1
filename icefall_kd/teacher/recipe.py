"""A recipe's own code: its ``train`` module, its options and its params."""

import argparse
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, Sequence, Union

import torch
from torch import nn

from icefall_kd.errors import KDError, first_line, require

# The first is of most recipes, the last of those with a CTC head alone.
_MAKERS = ("get_model", "get_transducer_model", "get_ctc_model")


def import_train(recipe_dir: Union[str, Path]) -> ModuleType:
    """Import the ``train`` module of a recipe.

    Args:
      recipe_dir: The folder of the recipe's ``train.py``.

    Raises:
      KDError: no such file, one that can't be imported, or a module that lacks what
        icefall's Zipformer recipes have.
    """
    folder = Path(recipe_dir).resolve()
    require(
        (folder / "train.py").is_file(),
        f"the recipe folder {recipe_dir} holds no train.py: give `recipe` the folder "
        "of the recipe's train.py, such as ./zipformer",
    )
    main = sys.modules.get("__main__")
    if Path(getattr(main, "__file__", None) or "").resolve() == folder / "train.py":
        return main  # the recipe that is running
    _forget_namesakes(folder)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    try:
        with _threads_unchanged():
            train = importlib.import_module("train")
    except KDError:  # the copy of a former version of icefall_kd
        raise
    except (Exception, SystemExit) as e:  # whatever the recipe's code raises
        line = getattr(e, "lineno", None)
        raise KDError(
            f"{folder}/train.py can't be imported{f' (line {line})' if line else ''}: "
            f"{first_line(e)}; run the recipe's own train.py --help until it works"
        ) from None
    need_functions(train, "get_params")
    model_maker(train)
    return train


def _forget_namesakes(folder: Path) -> None:
    """Forget modules of other recipes, and packages, named as this folder's files."""
    for name in ["train", *(path.stem for path in folder.glob("*.py"))]:
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded and Path(loaded).parent.resolve() != folder:
            for key in [k for k in sys.modules if k.split(".")[0] == name]:
                del sys.modules[key]


@contextmanager
def _threads_unchanged() -> Iterator[None]:
    """Recipes set threads on import, and torch aborts where they run already."""
    names = ("set_num_threads", "set_num_interop_threads")
    saved = {name: getattr(torch, name) for name in names}
    for name in names:
        setattr(torch, name, lambda n: None)
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(torch, name, function)


def need_functions(train: ModuleType, *names: str) -> None:
    """Refuse a recipe whose ``train`` module lacks a function.

    Args:
      train: The module.
      names: The functions that it must have.
    """
    for name in names:
        require(
            callable(getattr(train, name, None)),
            f"{train.__file__} has no function {name}, which icefall's Zipformer "
            "recipes have: give `recipe` the folder of such a recipe",
        )


def model_maker(train: ModuleType) -> Callable[[Dict[str, Any]], nn.Module]:
    """The recipe's function that makes its model of its params, by any of its names.

    Args:
      train: The recipe's module.
    """
    for name in _MAKERS:
        if callable(getattr(train, name, None)):
            return getattr(train, name)
    need_functions(train, _MAKERS[0])  # which refuses


def call_recipe(function: Callable, *args: Any) -> Any:
    """The result of a function of a recipe's ``train`` module.

    Args:
      function: The function.
      args: Its arguments.

    Raises:
      KDError: whatever the recipe's code raised, in one sentence.
    """
    try:
        return function(*args)
    except KDError:  # of a plugged recipe
        raise
    except (Exception, SystemExit) as e:  # argparse exits
        name = getattr(function, "__qualname__", "a function")
        code = getattr(function, "__code__", None)
        file = code.co_filename if code else "the recipe's train.py"
        raise KDError(
            f"{name} of {file} fails ({first_line(e)}): run the recipe's own train.py "
            "--help until it works, or give `recipe` another folder"
        ) from None


def _result_of(train: ModuleType, name: str, kind: type, article_and_kind: str) -> Any:
    """The result of a recipe's function without arguments, of the type that it has."""
    result = call_recipe(getattr(train, name))
    require(
        isinstance(result, kind),
        f"{name} of {train.__file__} returns a {type(result).__name__}, and icefall's "
        f"return {article_and_kind}: give `recipe` the folder of such a recipe",
    )
    return result


def recipe_params(train: ModuleType) -> Dict[str, Any]:
    """The params that the recipe's ``get_params`` returns, anew at each call.

    Args:
      train: The recipe's module.
    """
    return _result_of(train, "get_params", dict, "a dictionary")


def _parser_of(train: ModuleType, refusal: str) -> argparse.ArgumentParser:
    """The recipe's parser, which refuses in one sentence.

    Args:
      train: The recipe's module.
      refusal: The sentence, with {} for the parser's own message.
    """
    require(
        callable(getattr(train, "get_parser", None)),
        f"{train.__file__} has no function get_parser, which icefall's recipes have: "
        "give an epoch-N.pt or checkpoint-N.pt, and no model flags",
    )
    kind = argparse.ArgumentParser
    parser = _result_of(train, "get_parser", kind, "an ArgumentParser")

    def refuse(message: str) -> None:
        raise KDError(refusal.replace("{}", message))

    parser.error = refuse
    return parser


def recipe_defaults(train: ModuleType) -> Dict[str, Any]:
    """The params that the recipe's own parser returns for an empty command line.

    Args:
      train: The recipe's module.

    Raises:
      KDError: a recipe without a parser, or whose parser demands an option.
    """
    parser = _parser_of(
        train,
        f"the parser of {train.__file__} refuses an empty command line ({{}}): give "
        "its options defaults",
    )
    return vars(call_recipe(parser.parse_args, []))


def params_of_flags(train: ModuleType, flags: Sequence[str]) -> Dict[str, Any]:
    """The params that ``flags`` set among the options of the recipe's own parser.

    Args:
      train: The recipe's module.
      flags: Words of a command line.

    Raises:
      KDError: an option that the parser does not know, or a value that it refuses.
    """
    if not flags:
        return {}
    parser = _parser_of(train, f"{train.__file__} refuses the model's flags: {{}}")
    parser.allow_abbrev = False
    unset = object()
    names = vars(call_recipe(parser.parse_args, []))
    namespace = argparse.Namespace(**dict.fromkeys(names, unset))
    parsed, unknown = call_recipe(parser.parse_known_args, list(flags), namespace)
    if unknown:
        raise KDError(
            f"{unknown[0]} is an option neither of this command nor of "
            f"{train.__file__}: see --help of both, and give the files before the "
            "model's flags"
        )
    params = {name: x for name, x in vars(parsed).items() if x is not unset}
    for name in params:
        require(
            not name.startswith("kd_"),
            f"{flag_of(name)} is an option of training and no flag of the model: see "
            "--help of this command",
        )
    return params


def flag_of(name: str) -> str:
    """The option of a recipe's param.

    Args:
      name: The param's name, such as encoder_dim.
    """
    return "--" + name.replace("_", "-")


def model_names(train: ModuleType) -> Dict[str, Any]:
    """The names of the recipe's model options, with the defaults of its own parser.

    Args:
      train: The recipe's module.
    """
    need_functions(train, "add_model_arguments", "get_parser")
    parser = argparse.ArgumentParser()
    call_recipe(train.add_model_arguments, parser)
    defaults = recipe_defaults(train)
    # librispeech and egs/digits have these outside.
    names = [*vars(parser.parse_args([])), "context_size", "embed_channels"]
    # A way to train, without parameters of its own.
    names = [name for name in names if name != "use_cr_ctc"]
    return {name: defaults[name] for name in names if name in defaults}


def flags_of(settings: Dict[str, Any], defaults: Dict[str, Any]) -> str:
    """The options that make the recipe's parser return ``settings``, in one line.

    Args:
      settings: A model's.
      defaults: Those of :func:`model_names`.
    """
    words = []
    for name, default in defaults.items():
        value = settings.get(name, default)
        if value != default:
            value = "".join(str(value).split())  # the shell parts words at spaces
            flag = flag_of(name)
            # argparse takes -1,16 for an option of its own.
            words += [f"{flag}={value}"] if value.startswith("-") else [flag, value]
    return " ".join(words)

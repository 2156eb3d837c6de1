"""Rebuilds a recipe's model from its checkpoints, with the recipe's own code."""

import argparse
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple, Union

import torch
from torch import nn

from icefall_kd.errors import KDError, first_line, require
from icefall_kd.targets.fingerprint import STREAMING
from icefall_kd.teacher.checkpoints import (
    averages_until,
    averaging_module,
    checkpoint_files,
    load_checkpoint,
)
from icefall_kd.tokens import load_tokenizer

BLANK = "<blk>"
# The first is of most recipes, the last of those with a CTC head alone.
_MAKERS = ("get_model", "get_transducer_model", "get_ctc_model")
# Parameters with a row for each token, in all recipes' models that have them.
_TOKEN_ROWS = ("decoder.embedding.weight", "ctc_output.1.weight")
# What a checkpoint holds beside the recipe's params.
_STATE = (
    "model",
    "model_avg",
    "optimizer",
    "scheduler",
    "grad_scaler",
    "sampler",
)


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
            f"{_flag(name)} is an option of training and no flag of the model: see "
            "--help of this command",
        )
    return params


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(
    checkpoint: Dict[str, Any],
    path: Path,
    train: ModuleType,
    flags: Sequence[str] = (),
    bpe_model: str = "",
) -> Dict[str, Any]:
    """The recipe's params that a checkpoint holds beside its states.

    Where it holds none, they come from ``flags`` and the recipe's defaults.

    Args:
      checkpoint: Its dictionary.
      path: Its file, for errors.
      train: The recipe's module.
      flags: The model's options, words of the recipe's command line.
      bpe_model: The teacher's ``bpe.model``, or the folder of its ``tokens.txt``.

    Raises:
      KDError: flags that contradict the checkpoint, or none where they are needed.
    """
    settings = {k: v for k, v in checkpoint.items() if k not in _STATE}
    params = params_of_flags(train, flags)
    known = "encoder_dim" in settings or "encoder_dims" in settings  # of older ones
    if not (known and "vocab_size" in settings):
        tokens = _params_of_tokens(checkpoint, path, bpe_model)
        return {**recipe_defaults(train), **recipe_params(train), **params, **tokens}
    settings.setdefault("blank_id", 0)  # k2's, where a recipe has CTC alone
    for name, value in params.items():
        require(
            name in STREAMING or settings.get(name, value) == value,
            f"{_flag(name)} is {value} and the checkpoint {path} was trained with "
            f"{settings.get(name)}: leave the flag out",
        )
    return {**settings, **params}


def _params_of_tokens(
    checkpoint: Dict[str, Any], path: Path, bpe_model: str
) -> Dict[str, Any]:
    """The params that tell the tokens of a checkpoint which holds no settings."""
    require(
        bpe_model,
        f"the checkpoint {path} holds no model settings (encoder_dim, vocab_size): "
        "give `bpe_model` and the model's flags, or an epoch-N.pt or checkpoint-N.pt "
        "of the recipe's own training",
    )
    tokenizer = load_tokenizer(bpe_model)
    size = _number_of_tokens(checkpoint)
    remedy = "give the bpe.model or lang folder that the checkpoint was trained with"
    require(
        size in (0, tokenizer.get_piece_size()),
        f"`bpe_model` {bpe_model} has {tokenizer.get_piece_size()} tokens and the "
        f"parameters in {path} are for {size}: {remedy}",
    )
    blank_id = tokenizer.piece_to_id(BLANK)
    require(
        tokenizer.id_to_piece(blank_id) == BLANK,
        f"`bpe_model` {bpe_model} has no token {BLANK}, and icefall's blank is that: "
        f"{remedy}",
    )
    eos_id = tokenizer.piece_to_id("<sos/eos>")
    return {
        "blank_id": blank_id,
        "sos_id": eos_id,
        "eos_id": eos_id,
        "vocab_size": tokenizer.get_piece_size(),
    }


def _number_of_tokens(checkpoint: Dict[str, Any]) -> int:
    """How many tokens the parameters of a checkpoint are for; 0 if they don't tell."""
    state = checkpoint.get("model")
    for name in _TOKEN_ROWS if isinstance(state, dict) else ():
        if name in state:
            return len(state[name])
    return 0


def load_recipe_model(
    recipe_dir: Union[str, Path],
    exp_dir: Union[str, Path],
    epoch: int = 0,
    iteration: int = 0,
    avg: int = 1,
    use_averaged_model: bool = False,
    flags: Sequence[str] = (),
    bpe_model: str = "",
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Build a recipe's model as it was trained, and load its parameters strictly.

    Args:
      recipe_dir: The folder of the recipe's ``train.py``.
      exp_dir: The experiment folder.
      epoch: N of ``epoch-N.pt``.
      iteration: N of ``checkpoint-N.pt``, taken in place of the epoch; 0 for none.
      avg: The number of checkpoints to average.
      use_averaged_model: Whether to average all steps between two checkpoints.
      flags: The model's options, words of the recipe's own command line, where the
        checkpoint holds parameters alone.
      bpe_model: The recipe's ``bpe.model``, there too.

    Returns:
      The model, in eval mode, and the settings in its checkpoint.

    Raises:
      KDError: checkpoints that are not there, can't be read or don't fit the recipe.
    """
    train = import_train(recipe_dir)
    files = checkpoint_files(exp_dir, epoch, iteration, avg, use_averaged_model)
    state_name = "model_avg" if use_averaged_model else "model"
    remedy = "give one that the recipe's own training wrote"
    if use_averaged_model:
        remedy = "give `use_averaged_model` 0"
    averages = set()
    for path in files:
        checkpoint = load_checkpoint(path)
        averages.add(averages_until(checkpoint))
        settings = settings_of(checkpoint, path, train, flags, bpe_model)
        _check_numbers(settings, path)
        require(
            state_name in checkpoint,
            f"the checkpoint {path} holds no {state_name}: {remedy}",
        )
    require(
        not use_averaged_model or len(averages) > 1,
        f"the model was not averaged between {files[0]} and {files[-1]} (every "
        f"{settings.get('average_period')} steps): raise `avg`, or give "
        "`use_averaged_model` 0",
    )
    params = recipe_params(train)
    params.update(settings)
    model = _model_of(train, params, files[-1])
    if use_averaged_model:
        state = averaging_module().average_checkpoints_with_averaged_model(
            filename_start=str(files[0]), filename_end=str(files[1])
        )
    elif len(files) > 1:
        # In the order in which decode.py adds them up, to the last bit.
        names = [str(f) for f in (files[::-1] if iteration > 0 else files)]
        state = averaging_module().average_checkpoints(names)
    else:
        state = checkpoint["model"]
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as e:
        difference = " ".join(str(e).split())[:200]
        raise KDError(
            f"the parameters in {files[-1]} are not those of the model that its "
            f"settings describe ({difference}...): give the recipe, and for parameters "
            "alone the model's flags, that it was trained with"
        ) from None
    return model.eval(), settings


def _check_numbers(settings: Dict[str, Any], path: Path) -> None:
    for name, least in (("vocab_size", 1), ("feature_dim", 1), ("blank_id", 0)):
        value = settings.get(name, least)
        require(
            type(value) is int and value >= least,
            f"the checkpoint {path} has the {name} {value!r}, which must be a whole "
            f"number from {least} on: copy or train it again",
        )


def _model_of(train: ModuleType, params: Dict[str, Any], path: Path) -> nn.Module:
    make = model_maker(train)
    try:
        return make(params)
    except Exception as e:  # whatever the recipe's code raises
        raise KDError(
            f"{make.__name__} of {train.__file__} can't build the model of {path}: "
            f"{type(e).__name__}: {' '.join(str(e).split())}; give the recipe that it "
            "was trained with"
        ) from None

"""Rebuilds a recipe's model from its checkpoints, with the recipe's own code."""

import argparse
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple, Union

import torch
from torch import nn

from icefall_kd.errors import KDError, first_line
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
# Parameters with a row for each symbol, in all recipes' models that have them.
_SYMBOL_ROWS = ("decoder.embedding.weight", "ctc_output.1.weight")
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
    """Import the ``train`` module of a recipe folder."""
    folder = Path(recipe_dir).resolve()
    if not (folder / "train.py").is_file():
        raise KDError(
            f"the recipe folder {recipe_dir} holds no train.py: give --recipe the "
            "folder of the recipe's train.py, such as ./zipformer"
        )
    main = sys.modules.get("__main__")
    if Path(getattr(main, "__file__", None) or "").resolve() == folder / "train.py":
        return main  # the recipe that is running
    _forget_others(folder)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    try:
        with _threads_as_they_are():
            train = importlib.import_module("train")
    except (Exception, SystemExit) as e:  # whatever the recipe's code raises
        where = getattr(e, "lineno", None)
        raise KDError(
            f"{folder}/train.py can't be imported"
            f"{f' (line {where})' if where else ''}: {first_line(e)}; run the "
            "recipe's own train.py --help until it works"
        ) from None
    need_functions(train, "get_params")
    model_maker(train)
    return train


def _forget_others(folder: Path) -> None:
    """Forget modules of other recipes, and packages, named as this folder's files."""
    for name in ["train", *(path.stem for path in folder.glob("*.py"))]:
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded and Path(loaded).parent.resolve() != folder:
            for key in [k for k in sys.modules if k.split(".")[0] == name]:
                del sys.modules[key]


def model_maker(train: ModuleType) -> Callable[[Dict[str, Any]], nn.Module]:
    """The recipe's function that makes its model of its params, by any of its names."""
    for name in _MAKERS:
        if callable(getattr(train, name, None)):
            return getattr(train, name)
    raise KDError(
        f"{train.__file__} has no function {_MAKERS[0]}, which icefall's Zipformer "
        "recipes have: give --recipe such a recipe's folder"
    )


def need_functions(train: ModuleType, *names: str) -> None:
    """Refuse a recipe whose ``train`` module lacks one of these."""
    for name in names:
        if not callable(getattr(train, name, None)):
            raise KDError(
                f"{train.__file__} has no function {name}, which icefall's Zipformer "
                "recipes have: give --recipe such a recipe's folder"
            )


def call_recipe(function: Callable, *args: Any) -> Any:
    """What a function of a recipe's ``train`` module returns.

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
            "--help until it works, or give --recipe another folder"
        ) from None


@contextmanager
def _threads_as_they_are() -> Iterator[None]:
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


def teacher_folders(exp_dir: str, option: str = "--exp-dir") -> List[str]:
    """The experiment folders that ``--exp-dir A,B`` of several teachers names.

    A folder whose own name has a comma, such as ``exp,lr0.045``, is one teacher's.

    Args:
      exp_dir: As the user gave it.
      option: Where the user gave it, for the error.

    Raises:
      KDError: an empty name, or both readings are there.
    """
    folders = exp_dir.split(",")
    if len(folders) == 1 or Path(exp_dir).is_dir():
        if len(folders) > 1 and all(Path(folder).is_dir() for folder in folders):
            raise KDError(
                f"{option} {exp_dir} is a folder, and so are {' and '.join(folders)}: "
                "rename the first, as it can't be told whether one teacher or "
                f"{len(folders)} are meant"
            )
        return [exp_dir]
    if not all(folders):
        raise KDError(
            f"{option} is {exp_dir!r}, which is no folder and has an empty name "
            "between its commas: give the teachers' folders, such as A,B"
        )
    return folders


def one_teacher_folder(exp_dir: str, command: str) -> str:
    """``exp_dir`` as it is, or refused where it names several teachers.

    Args:
      command: What takes one teacher alone, for the error.
    """
    folders = teacher_folders(exp_dir)
    if len(folders) > 1:
        raise KDError(
            f"--exp-dir {exp_dir} names {len(folders)} teachers (there is no folder "
            f"of that name), and {command} takes one: give {folders[0]}"
        )
    return folders[0]


def given_flags(train: ModuleType, flags: Sequence[str]) -> Dict[str, Any]:
    """What ``flags`` set among the options of the recipe's own parser.

    Raises:
      KDError: an option that the parser does not know, or a value that it refuses.
    """
    if not flags:
        return {}
    parser = _parser_of(train)
    unset = object()

    def refuse(message: str) -> None:
        raise KDError(f"{train.__file__} refuses the model's flags: {message}")

    parser.error = refuse
    parser.allow_abbrev = False
    known = vars(call_recipe(parser.parse_args, []))
    found, extra = call_recipe(
        parser.parse_known_args,
        list(flags),
        argparse.Namespace(**dict.fromkeys(known, unset)),
    )
    if extra:
        raise KDError(
            f"{extra[0]} is an option neither of this command nor of {train.__file__}: "
            "see --help of both, and give the files before the model's flags"
        )
    given = {k: v for k, v in vars(found).items() if v is not unset}
    for name in given:
        if name.startswith("kd_"):
            raise KDError(
                f"--{name.replace('_', '-')} is an option of training and no flag of "
                "the model: see --help of this command"
            )
    return given


def _parser_of(train: ModuleType) -> argparse.ArgumentParser:
    if not callable(getattr(train, "get_parser", None)):
        raise KDError(
            f"{train.__file__} has no function get_parser, which icefall's recipes "
            "have: give an epoch-N.pt or checkpoint-N.pt, and no model flags"
        )
    parser = call_recipe(train.get_parser)
    if not isinstance(parser, argparse.ArgumentParser):
        raise _no_such(train, "get_parser", "an ArgumentParser", parser)
    return parser


def recipe_params(train: ModuleType) -> Dict[str, Any]:
    """What the recipe's ``get_params`` gives, anew at each call."""
    params = call_recipe(train.get_params)
    if not isinstance(params, dict):
        raise _no_such(train, "get_params", "a dictionary", params)
    return params


def _no_such(train: ModuleType, name: str, wanted: str, value: Any) -> KDError:
    return KDError(
        f"{name} of {train.__file__} returns a {type(value).__name__}, and icefall's "
        f"return {wanted}: give --recipe the folder of such a recipe"
    )


def recipe_defaults(train: ModuleType) -> Dict[str, Any]:
    """What the recipe's own parser gives for an empty command line.

    Raises:
      KDError: a recipe without a parser, or whose parser demands an option.
    """
    parser = _parser_of(train)

    def refuse(message: str) -> None:
        raise KDError(
            f"the parser of {train.__file__} refuses an empty command line "
            f"({message}): give its options defaults"
        )

    parser.error = refuse
    return vars(call_recipe(parser.parse_args, []))


def settings_of(
    checkpoint: Dict[str, Any],
    path: Path,
    train: ModuleType,
    flags: Sequence[str] = (),
    bpe_model: str = "",
) -> Dict[str, Any]:
    """The recipe's params that a checkpoint holds beside its states.

    Where it holds none, they come from ``flags`` and the recipe's defaults.

    Raises:
      KDError: flags that contradict the checkpoint, or none where they are needed.
    """
    settings = {k: v for k, v in checkpoint.items() if k not in _STATE}
    given = given_flags(train, flags)
    known = "encoder_dim" in settings or "encoder_dims" in settings  # of older ones
    if known and "vocab_size" in settings:
        settings.setdefault("blank_id", 0)  # k2's, where a recipe has CTC alone
        for name, value in given.items():
            same = name not in settings or settings[name] == value
            if not same and name not in STREAMING:
                raise KDError(
                    f"--{name.replace('_', '-')} is {value} and the checkpoint {path} "
                    f"was trained with {settings[name]}: leave the flag out"
                )
        return {**settings, **given}
    if not bpe_model:
        raise KDError(
            f"the checkpoint {path} holds no model settings (encoder_dim, vocab_size): "
            "give --bpe-model and the model's flags, or an epoch-N.pt or "
            "checkpoint-N.pt of the recipe's own training"
        )
    sp = load_tokenizer(bpe_model)
    size = _number_of_symbols(checkpoint)
    if size not in (0, sp.get_piece_size()):
        raise KDError(
            f"--bpe-model {bpe_model} has {sp.get_piece_size()} symbols and the "
            f"parameters in {path} are for {size}: give the bpe.model or lang folder "
            "that the checkpoint was trained with"
        )
    blank_id = sp.piece_to_id(BLANK)
    if sp.id_to_piece(blank_id) != BLANK:
        raise KDError(
            f"--bpe-model {bpe_model} has no symbol {BLANK}, and icefall's blank is "
            "that: give the bpe.model or lang folder that the checkpoint was trained "
            "with"
        )
    return {
        **recipe_defaults(train),
        **recipe_params(train),
        **given,
        "blank_id": blank_id,
        "sos_id": sp.piece_to_id("<sos/eos>"),
        "eos_id": sp.piece_to_id("<sos/eos>"),
        "vocab_size": sp.get_piece_size(),
    }


def _number_of_symbols(checkpoint: Dict[str, Any]) -> int:
    """How many symbols the parameters of a checkpoint are for; 0 if they don't tell."""
    state = checkpoint.get("model")
    for name in _SYMBOL_ROWS if isinstance(state, dict) else ():
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
      flags: The model's options, words of the recipe's own command line, where the
        checkpoint holds parameters alone.
      bpe_model: The recipe's ``bpe.model``, there too.

    Returns:
      The model, in eval mode, and the settings found in its checkpoint.
    """
    train = import_train(recipe_dir)
    files = checkpoint_files(exp_dir, epoch, iteration, avg, use_averaged_model)
    needed = "model_avg" if use_averaged_model else "model"
    averages = set()
    for path in files:
        checkpoint = load_checkpoint(path)
        averages.add(averages_until(checkpoint))
        settings = settings_of(checkpoint, path, train, flags, bpe_model)
        _check_numbers(settings, path)
        if needed not in checkpoint:
            raise KDError(
                f"the checkpoint {path} holds no {needed}: "
                + (
                    "give --use-averaged-model 0"
                    if use_averaged_model
                    else "give one that the recipe's own training wrote"
                )
            )
    if use_averaged_model and len(averages) == 1:
        raise KDError(
            f"the model was not averaged between {files[0]} and {files[1]} "
            f"(every {settings.get('average_period')} steps): raise --avg, or give "
            "--use-averaged-model 0"
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
        if type(value) is not int or value < least:
            raise KDError(
                f"the checkpoint {path} has the {name} {value!r}, which must be a "
                f"whole number from {least} on: copy or train it again"
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

"""Rebuilds a recipe's model from its checkpoints, with the recipe's own code."""

import argparse
import importlib
import logging
import pickle
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path, PosixPath
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.targets.fingerprint import STREAMING, load_bpe_model

BLANK = "<blk>"
# The first is of most recipes, the last of those with a CTC head alone.
_MAKERS = ("get_model", "get_transducer_model", "get_ctc_model")
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
    except Exception as e:  # whatever the recipe's code raises
        where = getattr(e, "lineno", None)
        raise KDError(
            f"{folder}/train.py can't be imported"
            f"{f' (line {where})' if where else ''}: {type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else 'no message'}; run the recipe's "
            "own train.py --help until it works"
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


def _checkpoint_module() -> ModuleType:
    for name in ("icefall.checkpoint", "zipformer.utils.checkpoint"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise KDError(
        "neither icefall nor the package zipformer can be imported: put icefall on "
        "PYTHONPATH, or run `pip install zipformer==0.1.3`"
    )


def checkpoint_files(
    exp_dir: Union[str, Path], epoch: int, iteration: int, avg: int, averaged: bool
) -> List[Path]:
    """The files that ``--epoch``/``--iter``, ``--avg`` and averaging ask for.

    Returns:
      One file to load as it is, [start, end] for the averaged model between two
      checkpoints, or ``avg`` files to average.
    """
    exp_dir = Path(exp_dir)
    if avg < 1:
        raise KDError(f"--avg is {avg}, and must be 1 or more")
    if iteration > 0:
        found = sorted(
            exp_dir.glob("checkpoint-*.pt"), key=lambda p: int(p.stem.split("-")[1])
        )
        found = [p for p in found if int(p.stem.split("-")[1]) <= iteration]
        want = avg + 1 if averaged else avg
        if len(found) < want:
            raise KDError(
                f"{exp_dir} has {len(found)} checkpoint-*.pt up to {iteration}, and "
                f"--iter {iteration} --avg {avg} need {want}: lower --avg, or train "
                "with a smaller --save-every-n"
            )
        files = [found[-want], found[-1]] if averaged else found[-want:]
    elif avg == 1 and not averaged:
        files = [exp_dir / f"epoch-{epoch}.pt"]
    elif averaged:
        files = [exp_dir / f"epoch-{epoch - avg}.pt", exp_dir / f"epoch-{epoch}.pt"]
    else:
        files = [exp_dir / f"epoch-{e}.pt" for e in range(epoch - avg + 1, epoch + 1)]
    for path in files:
        if not path.is_file():
            raise KDError(
                f"the checkpoint {path} does not exist: mend --exp-dir, --epoch, "
                "--iter or --avg"
            )
    return files


def _load_data(path: Path) -> Optional[Dict[str, Any]]:
    """Load without running pickled code; None where torch can't do so."""
    safe = getattr(torch.serialization, "safe_globals", None)  # from torch 2.5 on
    try:
        with safe([type(path), PosixPath]) if safe else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return None


def load_checkpoint(path: Path) -> Dict[str, Any]:
    try:
        checkpoint = _load_data(path)
        if checkpoint is None:
            logging.warning(
                f"{path} holds more than data, so loading it runs what was pickled "
                "into it: use checkpoints of people you trust only"
            )
            checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as e:  # torch raises many kinds for a damaged file
        raise KDError(
            f"the checkpoint {path} can't be read ({type(e).__name__}): copy or train "
            "it again"
        ) from None
    if not isinstance(checkpoint, dict):
        raise KDError(
            f"the checkpoint {path} holds a {type(checkpoint).__name__}, not a dict "
            "with a model: give the epoch-N.pt or checkpoint-N.pt of a training"
        )
    return checkpoint


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
    known = vars(parser.parse_args([]))
    found, extra = parser.parse_known_args(
        list(flags), argparse.Namespace(**dict.fromkeys(known, unset))
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
    return train.get_parser()


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
    sp = load_bpe_model(bpe_model)
    blank_id = sp.piece_to_id(BLANK)
    if sp.id_to_piece(blank_id) != BLANK:
        raise KDError(
            f"the BPE model {bpe_model} has no symbol {BLANK}, and icefall's blank is "
            "that: give the bpe.model that the checkpoint was trained with"
        )
    return {
        **vars(_parser_of(train).parse_args([])),
        **train.get_params(),
        **given,
        "blank_id": blank_id,
        "sos_id": sp.piece_to_id("<sos/eos>"),
        "eos_id": sp.piece_to_id("<sos/eos>"),
        "vocab_size": sp.get_piece_size(),
    }


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
        averages.add(_averages(checkpoint))
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
    params = train.get_params()
    params.update(settings)
    model = _model_of(train, params, files[-1])
    if use_averaged_model:
        state = _checkpoint_module().average_checkpoints_with_averaged_model(
            filename_start=str(files[0]), filename_end=str(files[1])
        )
    elif len(files) > 1:
        state = _checkpoint_module().average_checkpoints([str(f) for f in files])
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


def _averages(checkpoint: Dict[str, Any]) -> int:
    """How often the averaged model was updated until this checkpoint."""
    batch, period = checkpoint.get("batch_idx_train"), checkpoint.get("average_period")
    numbers = [x if isinstance(x, int) and x > 0 else 0 for x in (batch, period)]
    return numbers[0] // (numbers[1] or 1)


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

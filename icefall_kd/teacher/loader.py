"""Rebuilds a recipe's model from its checkpoints, with the recipe's own code."""

from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Sequence, Tuple, Union

from torch import nn

from icefall_kd.errors import KDError, require
from icefall_kd.targets.fingerprint import STREAMING
from icefall_kd.teacher.checkpoints import (
    averages_until,
    averaging_module,
    checkpoint_files,
    load_checkpoint,
)
from icefall_kd.teacher.recipe import (
    flag_of,
    import_train,
    model_maker,
    params_of_flags,
    recipe_defaults,
    recipe_params,
)
from icefall_kd.tokens import load_tokenizer

BLANK = "<blk>"
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
            f"{flag_of(name)} is {value} and the checkpoint {path} was trained with "
            f"{settings.get(name)}: leave the flag out",
        )
    return {**settings, **params}


def _params_of_tokens(
    checkpoint: Dict[str, Any], path: Path, bpe_model: str
) -> Dict[str, Any]:
    """The params that depend on the tokens, for a checkpoint without settings."""
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
    """How many tokens the parameters of a checkpoint are for; 0 if it is not known."""
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
    averages, period = set(), None
    for path in files:
        checkpoint = load_checkpoint(path)
        period = period or checkpoint.get("average_period")
        averages.add(averages_until(checkpoint, period))
        settings = settings_of(checkpoint, path, train, flags, bpe_model)
        _check_numbers(settings, path)
        require(
            state_name in checkpoint,
            f"the checkpoint {path} holds no {state_name}: {remedy}",
        )
    require(
        not use_averaged_model or len(averages) > 1,
        f"the model was not averaged between {files[0]} and {files[-1]} (every "
        f"{period} steps): raise `avg`, or give `use_averaged_model` 0",
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

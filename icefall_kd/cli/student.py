"""Builds a student from a teacher, as a checkpoint that train.py starts from."""

import argparse
from pathlib import Path
from typing import Any, Dict, Tuple

import click
import torch

from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.recipe.loader import import_train, load_recipe_model
from icefall_kd.student.build import build_student, check_settings
from icefall_kd.targets.fingerprint import check_vocabulary

PARTS = ("encoder_embed", "encoder", "decoder", "joiner", "ctc_output")


_COUNTERS = (
    "best_train_loss",
    "best_valid_loss",
    "best_train_epoch",
    "best_valid_epoch",
    "batch_idx_train",
)
_BOOLS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_KINDS = {int: int, float: float, bool: lambda word: _BOOLS[word.lower()]}


def parse_changes(changes: Tuple[str, ...], settings: Dict[str, Any]) -> Dict[str, Any]:
    """``("encoder-dim=32,32",)`` as values of the types that the teacher's have."""
    parsed: Dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not value:
            raise KDError(f"--set {change} is not of the form NAME=VALUE")
        check_settings(settings, {name: value})
        kind = type(settings[name])
        try:
            parsed[name] = _KINDS.get(kind, str)(value)
        except (ValueError, KeyError):
            raise KDError(
                f"--set {change}: {name} takes a {kind.__name__}, as the teacher's "
                f"{settings[name]}"
            ) from None
    return parsed


def model_names(train) -> Dict[str, Any]:
    """The recipe's model options with the defaults of its own parser."""
    parser = argparse.ArgumentParser()
    train.add_model_arguments(parser)
    defaults = vars(train.get_parser().parse_args([]))
    names = [*vars(parser.parse_args([])), "context_size"]  # librispeech has it outside
    return {name: defaults[name] for name in names if name in defaults}


def flags_of(settings: Dict[str, Any], defaults: Dict[str, Any]) -> str:
    """The options that make the recipe's parser give ``settings``."""
    words = []
    for name, default in defaults.items():
        value = settings.get(name, default)
        if value != default:
            words += ["--" + name.replace("_", "-"), str(value)]
    return " ".join(words)


def save_start(path: Path, model, params: Dict[str, Any]) -> None:
    """Write a checkpoint of zero steps: no optimizer, scheduler or sampler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    with replacing(path) as temporary:
        torch.save({"model": state, "model_avg": state, **params}, temporary)


def student(
    recipe: str,
    exp_dir: str,
    epoch: int,
    iteration: int,
    avg: int,
    use_averaged_model: bool,
    flags: Tuple[str, ...],
    bpe_model: str,
    student_dir: str,
    changes: Tuple[str, ...],
    init: str,
    seed: int,
) -> None:
    teacher, settings = load_recipe_model(
        recipe, exp_dir, epoch, iteration, avg, use_averaged_model, flags, bpe_model
    )
    if bpe_model:
        check_vocabulary(bpe_model, settings)
    train = import_train(recipe)
    defaults = model_names(train)
    params = train.get_params()
    # All but where the teacher's training stood: get_model reads what it likes.
    fresh = (*_COUNTERS, *(k for k in settings if k.startswith("kd_")))
    params.update({k: v for k, v in settings.items() if k not in fresh})
    torch.manual_seed(seed)
    model, params = build_student(
        teacher, params, parse_changes(changes, params), train.get_model, init
    )
    params["average_period"] = settings.get("average_period", 200)
    path = Path(student_dir) / "epoch-1.pt"
    save_start(path, model, params)
    line = flags_of(params, defaults)
    path.with_name("student_flags").write_text(line + "\n")
    _account(teacher, model)
    click.echo(f"\nThe student stands in {path}. Train it with\n")
    click.echo(f"  --exp-dir {student_dir} --start-epoch 2 {line}")


def _account(teacher, model) -> None:
    def count(m, part: str) -> int:
        module = getattr(m, part, None) if part else m
        return sum(p.numel() for p in module.parameters()) if module else 0

    click.echo(f"{'parameters':<16}{'teacher':>12}{'student':>12}{'ratio':>8}")
    for part in (*PARTS, ""):
        a, b = count(teacher, part), count(model, part)
        ratio = f"{b / a:.2f}" if a else "-"
        click.echo(f"{part or 'all':<16}{a:>12,}{b:>12,}{ratio:>8}")

"""Builds a student from a teacher, as a checkpoint that train.py starts from."""

import argparse
import math
import shlex
from itertools import islice
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Tuple

import click
import torch
from lhotse.cut import Cut
from tqdm.auto import tqdm

from icefall_kd.cli.account import account
from icefall_kd.cli.batches import read_features
from icefall_kd.cli.cuts import Survey, checked, labels_of, why_long
from icefall_kd.cli.memory import enough_memory
from icefall_kd.errors import KDError, naming_flags
from icefall_kd.files import check_new_folder, replacing
from icefall_kd.student.build import build_student, check_settings, check_slices
from icefall_kd.student.count import count_parameters
from icefall_kd.student.importance import FeatureBatch, num_passes, select_important
from icefall_kd.student.presets import per_stack, preset
from icefall_kd.student.scores import HeadScores, score_heads
from icefall_kd.student.search import nearest, parse_goal
from icefall_kd.student.selection import Selection, select_first
from icefall_kd.targets.heard import check_supervision, why_unheard
from icefall_kd.teacher.loader import (
    call_recipe,
    import_train,
    load_recipe_model,
    model_maker,
    need_functions,
    one_teacher_folder,
    recipe_defaults,
    recipe_params,
)
from icefall_kd.tokens import load_tokenizer

BATCH = 8  # cuts that the teacher hears at once
# Parameters, and layers in a stack, beyond which a model would take hours to build.
LARGEST, DEEPEST = 10**10, 100
FLAGS, ACCOUNT = "student_flags", "student_account.txt"

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
        # Those of a model are sizes; a list of them is looked at stack by stack.
        if kind in (int, float) and not 0 < parsed[name] < math.inf:
            raise KDError(f"--set {change}: {name} must be above 0, and finite")
    return parsed


def model_names(train) -> Dict[str, Any]:
    """The recipe's model options with the defaults of its own parser."""
    need_functions(train, "add_model_arguments", "get_parser")
    parser = argparse.ArgumentParser()
    call_recipe(train.add_model_arguments, parser)
    defaults = recipe_defaults(train)
    names = [*vars(parser.parse_args([])), "context_size"]  # librispeech has it outside
    # A way to train, without parameters of its own.
    names = [name for name in names if name != "use_cr_ctc"]
    return {name: defaults[name] for name in names if name in defaults}


def flags_of(settings: Dict[str, Any], defaults: Dict[str, Any]) -> str:
    """The options that make the recipe's parser give ``settings``."""
    words = []
    for name, default in defaults.items():
        value = settings.get(name, default)
        if value != default:
            value = "".join(str(value).split())  # the shell parts words at spaces
            flag = "--" + name.replace("_", "-")
            # argparse takes -1,16 for an option of its own.
            words += [f"{flag}={value}"] if value.startswith("-") else [flag, value]
    return " ".join(words)


def _check_place(path: Path, exp_dir: str) -> None:
    """Refuse to write over a checkpoint that is no student of ours, or beside it."""
    if path.parent.resolve() == Path(exp_dir).resolve():
        raise KDError(
            f"--student-dir and --exp-dir are both {exp_dir}, where another training, "
            "the teacher's, has its checkpoints: give another --student-dir"
        )
    if path.exists() and not path.with_name(FLAGS).exists():
        raise KDError(
            f"the folder {path.parent} has an {path.name} of another training, which "
            "the student's would replace: give another --student-dir"
        )


def save_start(path: Path, model, params: Dict[str, Any]) -> None:
    """Write a checkpoint of zero steps: no optimizer, scheduler or sampler."""
    state = model.state_dict()
    with replacing(path) as temporary:
        torch.save({"model": state, "model_avg": state, **params}, temporary)


def _one_goal(size: str, params: str, speed: str) -> None:
    given = {"--preset": size, "--params": params, "--speed": speed}
    names = [f"{name} {value}" for name, value in given.items() if value]
    if len(names) > 1:
        raise KDError(f"{' and '.join(names)} are given: give one of them")
    for name, value in (("--params", params), ("--speed", speed)):
        if value and (parse_goal(value).kind == "speed") != (name == "--speed"):
            example = "3x" if name == "--speed" else "5M"
            raise KDError(f"{name} is {value}, and takes a value as {example}")


def _changes(
    settings: Dict[str, Any], size: str, goal: str, asked: Tuple[str, ...]
) -> Dict[str, Any]:
    """What differs in the student from the teacher's settings."""
    changes: Dict[str, Any] = {}
    if size:
        changes = preset(size)
    elif goal:
        speed = parse_goal(goal).kind == "speed"
        with naming_flags({"goal": "--speed" if speed else "--params"}):
            changes = nearest(goal, settings, settings)
    changes.update(parse_changes(asked, settings))
    return changes


def _check_random(
    settings: Dict[str, Any], new: Dict[str, Any], defaults: Dict[str, Any]
) -> None:
    """Refuse what a student that is no slice of its teacher must keep to all the same.

    Args:
      settings: The teacher's.
      new: What differs in the student.
      defaults: The options that the recipe's train.py has for its model.
    """
    for name, value in new.items():
        if name not in defaults:
            raise KDError(
                f"{name} can't be set to {value}: train.py has no option for it that "
                f"makes a model; choose of {', '.join(defaults)}"
            )
    try:
        layers = max(per_stack({**settings, **new}, "num_encoder_layers"))
        size = count_parameters({**settings, **new})["all"]
    except KDError:  # of a variant that nobody counted yet
        return
    if layers > DEEPEST or size > LARGEST:
        raise KDError(
            f"the student would have {size:,} parameters and {layers} layers in a "
            f"stack, and at most {LARGEST:,} and {DEEPEST} are built: give smaller "
            "numbers"
        )


def read_batches(
    path: str, num_cuts: int, settings: Dict[str, Any], sp: Any
) -> List[FeatureBatch]:
    """The first ``num_cuts`` cuts: features, lengths and labels."""
    if num_cuts < 1:
        raise KDError(f"--num-cuts is {num_cuts}, and must be 1 or more")
    use = "the measure of a student"

    def labels(some: List[Cut]) -> List[List[int]]:
        return labels_of(some, sp, use, "label it first")

    def why_not(cut: Cut) -> str:
        reason = why_unheard(cut)
        if reason:
            return reason
        check_supervision(cut)
        return why_long(cut, labels([cut])[0], use)

    survey = Survey(path, why_not=why_not)
    dims = int(settings["feature_dim"])
    cuts = list(islice(checked(survey, dims, light=False), num_cuts))
    survey.check()
    survey.warn()
    batches = []
    with enough_memory(
        f"reading the features of {len(cuts)} cuts", "give --num-cuts fewer"
    ):
        for i in range(0, len(cuts), BATCH):
            some = cuts[i : i + BATCH]
            batches.append((*read_features(some), labels(some)))
    return batches


def _enough_memory(batches: List[FeatureBatch]) -> ContextManager[None]:
    frames = max(x.size(1) for x, _, _ in batches)
    return enough_memory(
        f"a pass over {BATCH} cuts of --cuts of up to {frames} feature frames",
        "give --cuts shorter ones, or free memory",
    )


def _judged(models, batches: List[FeatureBatch], sp, blank_id: int) -> List[HeadScores]:
    total = len(models) * len(batches)
    with (
        _enough_memory(batches),
        tqdm(desc="Before training", unit=" batches", total=total) as bar,
    ):
        return [score_heads(m, batches, sp, blank_id, bar.update) for m in models]


def _choose(
    teacher, settings, student, batches: List[FeatureBatch], layers: str, channels: str
) -> Selection:
    which = {"layers": layers == "important", "channels": channels == "important"}
    if not any(which.values()):
        return select_first(settings, student)
    total = num_passes(settings, student, len(batches), **which)
    with (
        _enough_memory(batches),
        tqdm(desc="Importance", unit=" batches", total=total) as bar,
    ):
        return select_important(
            teacher, settings, student, batches, advance=bar.update, **which
        )


@naming_flags(
    {
        "changes": "--set",
        "goal": "--params or --speed",
        "init": "--init",
        "preset": "--preset",
    }
)
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
    size: str,
    params_goal: str,
    speed: str,
    changes: Tuple[str, ...],
    init: str,
    layers: str,
    channels: str,
    cuts: str,
    num_cuts: int,
    seed: int,
) -> None:
    _one_goal(size, params_goal, speed)
    chosen = "important" in (layers, channels)
    if chosen and init == "random":
        raise KDError(
            "--layers and --channels say what is kept of the teacher, and --init "
            "random keeps nothing: leave out one of them"
        )
    if chosen and not cuts:
        raise KDError("importance is measured on cuts: give --cuts, with features")
    if cuts and not bpe_model:
        raise KDError("--cuts need the labels of the transcripts: give --bpe-model")
    exp_dir = one_teacher_folder(exp_dir, "student")
    path = Path(student_dir) / "epoch-1.pt"
    check_new_folder(student_dir, "--student-dir")
    _check_place(path, exp_dir)
    teacher, settings = load_recipe_model(
        recipe, exp_dir, epoch, iteration, avg, use_averaged_model, flags, bpe_model
    )
    sp = load_tokenizer(bpe_model, settings["vocab_size"]) if bpe_model else None
    batches = read_batches(cuts, num_cuts, settings, sp) if cuts else []
    train = import_train(recipe)
    defaults = model_names(train)
    params = recipe_params(train)
    # All but where the teacher's training stood: get_model reads what it likes.
    fresh = (*_COUNTERS, *(k for k in settings if k.startswith("kd_")))
    params.update({k: v for k, v in settings.items() if k not in fresh})
    new = _changes(params, size, params_goal or speed, changes)
    kept = None
    if init == "teacher":
        wanted = check_slices(teacher, params, new)
        kept = _choose(teacher, params, wanted, batches, layers, channels)
    _check_random(params, new, defaults)
    torch.manual_seed(seed)
    model, student_params = build_student(
        teacher, params, new, model_maker(train), init, kept
    )
    student_params["average_period"] = settings.get("average_period", 200)
    judged = []
    if batches:
        blank = int(settings.get("blank_id", 0))
        judged = _judged((teacher, model), batches, sp, blank)
    heard = sum(len(x) for x, _, _ in batches)
    text = account(teacher, model, params, student_params, kept, judged, heard)
    line = flags_of(student_params, defaults)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, words in ((FLAGS, line), (ACCOUNT, text)):
        with replacing(path.with_name(name)) as temporary:
            temporary.write_text(words + "\n", "utf8")
    save_start(path, model, student_params)
    click.echo(text)
    click.echo(f"\nThe student stands in {path}. Train it with\n")
    click.echo(f"  --exp-dir {shlex.quote(student_dir)} --start-epoch 2 {line}")

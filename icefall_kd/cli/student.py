"""Builds a student from a teacher, as a checkpoint that train.py starts from."""

import math
import shlex
from itertools import islice
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Sequence

import click
import torch
from lhotse.cut import Cut
from torch import nn
from tqdm.auto import tqdm

from icefall_kd.cli.account import account
from icefall_kd.cli.options import (
    MODEL_FLAGS,
    MOST_SEED,
    Count,
    Place,
    Text,
    command,
    teacher_options,
)
from icefall_kd.errors import KDError, naming_flags, require
from icefall_kd.files import check_new_folder, replacing
from icefall_kd.memory import enough_memory
from icefall_kd.student import presets
from icefall_kd.student.build import build_student, check_settings, check_slices
from icefall_kd.student.count import count_parameters
from icefall_kd.student.importance import FeatureBatch, num_passes, select_important
from icefall_kd.student.scores import HeadScores, score_heads
from icefall_kd.student.search import nearest, parse_goal
from icefall_kd.student.selection import Selection, select_first
from icefall_kd.targets.batches import read_features
from icefall_kd.targets.cuts import Survey, checked
from icefall_kd.targets.model_input import check_supervision, why_unusable
from icefall_kd.targets.transcript_checks import labels_of, why_long
from icefall_kd.teacher.recipe import (
    flags_of,
    import_train,
    model_maker,
    model_names,
    recipe_params,
)
from icefall_kd.teacher.spec import TeacherSpec

BATCH = 8  # cuts that the teacher runs on at once
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


def parse_changes(changes: Sequence[str], settings: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of --set, as values of the types that the teacher's have.

    Args:
      changes: NAME=VALUE each, such as "encoder-dim=32,32".
      settings: The teacher's.

    Raises:
      KDError: a setting that the teacher does not have, or a value of another type.
    """
    parsed: Dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        name = name.strip().replace("-", "_")
        require(equals and value, f"--set {change} is not of the form NAME=VALUE")
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
        require(
            kind not in (int, float) or 0 < parsed[name] < math.inf,
            f"--set {change}: {name} must be above 0, and finite",
        )
    return parsed


def _check_place(path: Path, exp_dir: str) -> None:
    """Refuse to write over a checkpoint that is no student of ours, or beside it."""
    require(
        path.parent.resolve() != Path(exp_dir).resolve(),
        f"--student-dir and --exp-dir are both {exp_dir}, where another training, the "
        "teacher's, has its checkpoints: give another --student-dir",
    )
    require(
        not path.exists() or path.with_name(FLAGS).exists(),
        f"the folder {path.parent} has an {path.name} of another training, which the "
        "student's would replace: give another --student-dir",
    )


def _save_start(path: Path, model: nn.Module, params: Dict[str, Any]) -> None:
    """Write a checkpoint of zero steps: no optimizer, scheduler or sampler."""
    state = model.state_dict()
    with replacing(path) as temporary:
        torch.save({"model": state, "model_avg": state, **params}, temporary)


def _check_goal(size: str, params: str, speed: str) -> None:
    """Refuse several sizes, and a speed in place of a size."""
    options = {"--preset": size, "--params": params, "--speed": speed}
    words = [f"{name} {value}" for name, value in options.items() if value]
    require(len(words) <= 1, f"{' and '.join(words)} are given: give one of them")
    for name, value, example in (("--params", params, "5M"), ("--speed", speed, "3x")):
        with naming_flags({"goal": name}):
            is_speed = bool(value) and parse_goal(value).kind == "speed"
        require(
            not value or is_speed == (name == "--speed"),
            f"{name} is {value}, and takes a value as {example}",
        )


def _changes(
    settings: Dict[str, Any], size: str, goal: str, set_by_user: Sequence[str]
) -> Dict[str, Any]:
    """The settings in which the student differs from the teacher."""
    changes: Dict[str, Any] = {}
    if size:
        changes = presets.preset(size)
    elif goal:
        speed = parse_goal(goal).kind == "speed"
        with naming_flags({"goal": "--speed" if speed else "--params"}):
            changes = nearest(goal, settings, settings)
    changes.update(parse_changes(set_by_user, settings))
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
        require(
            name in defaults,
            f"{name} can't be set to {value}: train.py has no option for it that makes "
            f"a model; choose of {', '.join(defaults)}",
        )
    try:
        layers = max(presets.per_stack({**settings, **new}, "num_encoder_layers"))
        size = count_parameters({**settings, **new})["all"]
    except KDError:  # of a variant that nobody counted yet
        return
    require(
        layers <= DEEPEST and size <= LARGEST,
        f"the student would have {size:,} parameters and {layers} layers in a stack, "
        f"and at most {LARGEST:,} and {DEEPEST} are built: give smaller numbers",
    )


def read_batches(
    path: str, num_cuts: int, settings: Dict[str, Any], tokenizer: Any
) -> List[FeatureBatch]:
    """Read transcribed cuts, to measure a student by.

    Args:
      path: Their manifest.
      num_cuts: How many, from the first on.
      settings: The teacher's.
      tokenizer: The teacher's.

    Returns:
      For each batch its features, lengths and labels.

    Raises:
      KDError: cuts that can't be used.
    """
    require(num_cuts >= 1, f"--num-cuts is {num_cuts}, and must be 1 or more")
    use = "the measure of a student"

    def labels(cuts: List[Cut]) -> List[List[int]]:
        return labels_of(cuts, tokenizer, use, "label it first")

    def why_not(cut: Cut) -> str:
        reason = why_unusable(cut)
        if reason:
            return reason
        check_supervision(cut)
        return why_long(cut, labels([cut])[0], use)

    survey = Survey(path, why_not=why_not)
    num_features = int(settings["feature_dim"])
    cuts = list(islice(checked(survey, num_features, light=False), num_cuts))
    survey.check()
    survey.warn()
    batches = []
    work = f"reading the features of {len(cuts)} cuts"
    with enough_memory(work, "give --num-cuts fewer"):
        for i in range(0, len(cuts), BATCH):
            batch = cuts[i : i + BATCH]
            batches.append((*read_features(batch), labels(batch)))
    return batches


def _enough_memory(batches: List[FeatureBatch]) -> ContextManager[None]:
    frames = max(x.size(1) for x, _, _ in batches)
    return enough_memory(
        f"a pass over {BATCH} cuts of --cuts of up to {frames} feature frames",
        "give --cuts shorter ones, or free memory",
    )


def _score_each(
    models: Sequence[nn.Module],
    batches: List[FeatureBatch],
    tokenizer: Any,
    blank_id: int,
) -> List[HeadScores]:
    total = len(models) * len(batches)
    with (
        _enough_memory(batches),
        tqdm(desc="Before training", unit=" batches", total=total) as bar,
    ):
        return [
            score_heads(m, batches, tokenizer, blank_id, bar.update) for m in models
        ]


def _select(
    teacher: nn.Module,
    settings: Dict[str, Any],
    student: Dict[str, Any],
    batches: List[FeatureBatch],
    layers: str,
    channels: str,
) -> Selection:
    """What the student keeps of the teacher: the first, or the important."""
    important = {"layers": layers == "important", "channels": channels == "important"}
    if not any(important.values()):
        return select_first(settings, student)
    total = num_passes(settings, student, len(batches), **important)
    with (
        _enough_memory(batches),
        tqdm(desc="Importance", unit=" batches", total=total) as bar,
    ):
        return select_important(
            teacher, settings, student, batches, advance=bar.update, **important
        )


@command(context_settings=MODEL_FLAGS)
@click.option("--list", "listed", is_flag=True, help="Print a table of the presets.")
@click.option("--json", "as_json", is_flag=True, help="Print the presets as JSON.")
@click.option(
    "--vocab-size",
    type=Count(1, 10**6),
    default=500,
    metavar="N",
    help="The vocabulary size for which --list and --json count parameters.",
)
@teacher_options(required=False)
@click.option(
    "--student-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The student's experiment folder, such as zipformer_kd/exp/student.",
)
@click.option(
    "--preset",
    type=Text(),
    default="",
    metavar="NAME",
    help="Build a size of --list, such as s.",
)
@click.option(
    "--params",
    "params_goal",
    type=Text(),
    default="",
    metavar="SIZE",
    help="Build a student of about so many parameters, such as 5M.",
)
@click.option(
    "--speed",
    type=Text(),
    default="",
    metavar="FACTOR",
    help="Build a student of so many times fewer multiply-adds than the teacher, such "
    "as 3x. The measured speed-up may differ.",
)
@click.option(
    "--set",
    "changes",
    type=Text(),
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting that differs from the teacher's, such as encoder-dim=32,32,32. The "
    "option may be given more than once.",
)
@click.option(
    "--init",
    type=click.Choice(["teacher", "random"]),
    default="teacher",
    help="Start from the teacher's slices, or from random parameters.",
)
@click.option(
    "--layers",
    type=click.Choice(["even", "important"]),
    default="even",
    help="The teacher's layers that are kept: evenly spaced ones, or those that are "
    "important on --cuts.",
)
@click.option(
    "--channels",
    type=click.Choice(["first", "important"]),
    default="first",
    help="The channels, heads and hidden units that are kept: the first ones (in the "
    "front end those of the largest weights), or those that are important on --cuts.",
)
@click.option(
    "--cuts",
    type=Place(optional=True),
    default="",
    metavar="CUTS",
    help="A manifest of transcribed cuts with features: to measure importance, and the "
    "student's loss and WER before any training.",
)
@click.option(
    "--num-cuts",
    type=Count(1, 10**6),
    default=64,
    metavar="N",
    help="The number of cuts of --cuts that are used, from the first on.",
)
@click.option(
    "--seed",
    type=Count(0, MOST_SEED),
    default=42,
    metavar="N",
    help="The seed of random parameters.",
)
def student(
    listed: bool,
    as_json: bool,
    vocab_size: int,
    teacher: TeacherSpec,
    **options: Any,
) -> None:
    """Build a student from a teacher, as a checkpoint that train.py starts from.

    The command writes epoch-1.pt into --student-dir (train on with --start-epoch 2),
    the model's options into the file student_flags beside it, and what it prints into
    student_account.txt.
    """
    if listed or as_json:
        if teacher.model_flags:
            raise click.UsageError(f"--list takes no {teacher.model_flags[0]!r}.")
        from icefall_kd.cli.presets import list_presets

        list_presets(as_json, vocab_size)
        return
    needed = {"--recipe": teacher.recipe, "--exp-dir": teacher.exp_dir}
    needed["--student-dir"] = options["student_dir"]
    for name, value in needed.items():
        if not value:
            raise click.UsageError(f"Missing option '{name}'.")
    _build(teacher, **options)


@naming_flags({"goal": "--params or --speed"})
def _build(
    teacher: TeacherSpec,
    student_dir: str,
    preset: str,
    params_goal: str,
    speed: str,
    changes: Sequence[str],
    init: str,
    layers: str,
    channels: str,
    cuts: str,
    num_cuts: int,
    seed: int,
) -> None:
    """Build and write the student; the parameters are those of :func:`student`."""
    _check_goal(preset, params_goal, speed)
    important = "important" in (layers, channels)
    require(
        not important or init != "random",
        "--layers and --channels choose what is kept of the teacher, and --init random "
        "keeps nothing: leave out one of them",
    )
    require(
        not important or cuts,
        "importance is measured on cuts: give --cuts, with features",
    )
    require(
        not cuts or teacher.bpe_model,
        "--cuts need the labels of the transcripts: give --bpe-model",
    )
    path = Path(student_dir) / "epoch-1.pt"
    check_new_folder(student_dir, "--student-dir")
    _check_place(path, teacher.one_folder("student"))
    loaded = teacher.load_one("student")
    settings = loaded.settings
    tokenizer = teacher.tokenizer(settings)
    batches = read_batches(cuts, num_cuts, settings, tokenizer) if cuts else []
    train = import_train(teacher.recipe)
    defaults = model_names(train)
    params = recipe_params(train)
    # All but how far the teacher's training was: get_model reads what it likes.
    fresh = (*_COUNTERS, *(k for k in settings if k.startswith("kd_")))
    params.update({k: v for k, v in settings.items() if k not in fresh})
    if "embed_channels" in defaults:  # which a teacher from before that option had
        params.setdefault("embed_channels", ",".join(map(str, presets.EMBED_CHANNELS)))
    new = _changes(params, preset, params_goal or speed, changes)
    selection = None
    if init == "teacher":
        sliced = check_slices(loaded.model, params, new)
        selection = _select(loaded.model, params, sliced, batches, layers, channels)
    _check_random(params, new, defaults)
    torch.manual_seed(seed)
    model, student_params = build_student(
        loaded.model, params, new, model_maker(train), init, selection
    )
    # icefall counts an average's steps by the checkpoint where they begin. After no
    # steps, 1 is right for whichever period the training has.
    student_params["average_period"] = 1
    scores = []
    if batches:
        blank_id = int(settings.get("blank_id", 0))
        scores = _score_each((loaded.model, model), batches, tokenizer, blank_id)
    count = sum(len(x) for x, _, _ in batches)
    text = account(
        loaded.model, model, params, student_params, selection, scores, count
    )
    line = flags_of(student_params, defaults)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, words in ((FLAGS, line), (ACCOUNT, text)):
        with replacing(path.with_name(name)) as temporary:
            temporary.write_text(words + "\n", "utf8")
    _save_start(path, model, student_params)
    click.echo(text)
    click.echo(f"\nThe student is in {path}. Train it with\n")
    click.echo(f"  --exp-dir {shlex.quote(student_dir)} --start-epoch 2 {line}")

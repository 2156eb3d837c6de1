"""Builds a student from a teacher, as a checkpoint that train.py starts from."""

import shlex
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional, Sequence

import click
import torch
from torch import nn
from tqdm.auto import tqdm

from icefall_kd.cli.account import account
from icefall_kd.cli.options import (
    MODEL_FLAGS,
    MOST_SEED,
    Count,
    Number,
    Place,
    Text,
    command,
    teacher_options,
)
from icefall_kd.cli.preset_times import (
    TIMES,
    changes_for_rtf,
    check_rtf,
    measure_presets,
    rtf_account,
)
from icefall_kd.cli.student_size import changes_of, check_goal, check_random
from icefall_kd.errors import naming_flags, need_kaldialign, require
from icefall_kd.files import check_new_folder, replacing
from icefall_kd.memory import enough_memory
from icefall_kd.student import presets
from icefall_kd.student.build import build_student, check_slices
from icefall_kd.student.cuts import BATCH, read_batches
from icefall_kd.student.importance import FeatureBatch, num_passes, select_important
from icefall_kd.student.scores import HeadScores, score_heads
from icefall_kd.student.selection import Selection, select_first
from icefall_kd.teacher.recipe import (
    flags_of,
    import_train,
    model_maker,
    model_names,
    recipe_params,
)
from icefall_kd.teacher.spec import TeacherSpec

FLAGS, ACCOUNT = "student_flags", "student_account.txt"

_COUNTERS = (
    "best_train_loss",
    "best_valid_loss",
    "best_train_epoch",
    "best_valid_epoch",
    "batch_idx_train",
)


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


EXAMPLE = """
icefall-kd student --list
icefall-kd student \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --preset s --student-dir zipformer_kd/exp/start
"""


@command(context_settings=MODEL_FLAGS, example=EXAMPLE)
@click.option("--list", "listed", is_flag=True, help="Print a table of the presets.")
@click.option("--json", "as_json", is_flag=True, help="Print the presets as JSON.")
@click.option(
    "--measure",
    is_flag=True,
    help="Time each preset on this machine too, with --list or --json, and write the "
    "times into --times. It needs --recipe.",
)
@click.option(
    "--times",
    type=Place(optional=True),
    default="",
    metavar="FILE",
    help=f"The file of times that --measure writes and --rtf reads. Default: {TIMES}.",
)
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
    "--rtf",
    type=Number(0, 1000),
    metavar="R",
    help="Build a student that takes so many seconds of one CPU thread for a second of "
    "audio, such as 0.02, by the times in --times (onnxruntime, fp32).",
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
    measure: bool,
    times: str,
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
        flags = {
            "--preset": options["preset"],
            "--params": options["params_goal"],
            "--speed": options["speed"],
            "--rtf": options["rtf"],
            "--set": options["changes"],
        }
        for name, value in flags.items():
            if value:
                raise click.UsageError(
                    f"--list takes no {name}: leave one of them out."
                )
        if measure:
            if not teacher.recipe:
                raise click.UsageError("Missing option '--recipe', of --measure.")
            measure_presets(teacher.recipe, times or TIMES, vocab_size, as_json)
            return
        require(not times, "--times goes with --measure or --rtf: give one of them")
        from icefall_kd.cli.presets import list_presets

        list_presets(as_json, vocab_size)
        return
    if measure:
        raise click.UsageError("--measure goes with --list or --json.")
    needed = {"--recipe": teacher.recipe, "--exp-dir": teacher.exp_dir}
    needed["--student-dir"] = options["student_dir"]
    for name, value in needed.items():
        if not value:
            raise click.UsageError(f"Missing option '{name}'.")
    _build(teacher, times=times, **options)


@naming_flags({"goal": "--params or --speed"})
def _build(
    teacher: TeacherSpec,
    times: str,
    student_dir: str,
    preset: str,
    params_goal: str,
    speed: str,
    rtf: Optional[float],
    changes: Sequence[str],
    init: str,
    layers: str,
    channels: str,
    cuts: str,
    num_cuts: int,
    seed: int,
) -> None:
    """Build and write the student; the parameters are those of :func:`student`."""
    check_goal(preset, params_goal, speed)
    require(not times or rtf, "--times goes with --measure or --rtf: give one of them")
    measured = None
    if rtf:
        sizes = {"--preset": preset, "--params": params_goal, "--speed": speed}
        others = [f"{option} {value}" for option, value in sizes.items() if value]
        measured = check_rtf(rtf, others, times or TIMES)
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
    if cuts:
        need_kaldialign()
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
    by_time = changes_for_rtf(rtf, measured, params) if measured else {}
    new = changes_of(params, preset, params_goal or speed, changes)
    new = {**by_time, **new}
    selection = None
    if init == "teacher":
        sliced = check_slices(loaded.model, params, new)
        selection = _select(loaded.model, params, sliced, batches, layers, channels)
    check_random(params, new, defaults)
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
    if measured:
        text += "\n\n" + rtf_account(rtf, measured, params, student_params)
    line = flags_of(student_params, defaults)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, words in ((FLAGS, line), (ACCOUNT, text)):
        with replacing(path.with_name(name)) as temporary:
            temporary.write_text(words + "\n", "utf8")
    _save_start(path, model, student_params)
    click.echo(text)
    click.echo(f"\nThe student is in {path}. Train it with\n")
    click.echo(f"  --exp-dir {shlex.quote(student_dir)} --start-epoch 2 {line}")

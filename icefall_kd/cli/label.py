"""Lets a teacher transcribe cuts: a recipe's model, a Whisper, or any program."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List

import click
from click.core import ParameterSource

from icefall_kd.cli.amounts import begin, speech
from icefall_kd.cli.combine import check_not_overwritten
from icefall_kd.cli.options import (
    MODEL_FLAGS,
    Number,
    Place,
    Text,
    command,
    job_options,
    teacher_options,
)
from icefall_kd.cli.search_options import (
    SearchOptions,
    check_one_chunk_size,
    search_options,
)
from icefall_kd.cli.torchrun import job_of
from icefall_kd.errors import need_kaldialign, require
from icefall_kd.files import MANIFEST, check_new_file
from icefall_kd.labels.labelling import (
    Job,
    LabelTeacher,
    Outcome,
    are_done,
    label_cuts,
    survey,
    write_manifest,
)
from icefall_kd.labels.program import ProgramTeacher
from icefall_kd.labels.recipe import RecipeTeacher
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.teacher.spec import TeacherSpec
from icefall_kd.transcripts.recognizer import Recognizer

# The parameters of each teacher that is no recipe's model, beside those of all.
OF_TEACHERS = {
    "program": ("nbest", "time_limit"),
    "whisper": ("language", "assistant"),
}
ALSO_OF_TEACHERS = {"program": (), "whisper": ("window", "max_duration", "num_threads")}
OF_ALL = ("in_cuts", "out_cuts", "num_jobs", "job", "overwrite")
NAMES = {"program": "program", "whisper": "Whisper"}
OPTIONS = {"program": "--command", "whisper": "--whisper"}


EXAMPLE = """
icefall-kd label \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  cuts.jsonl.gz labels.jsonl.gz
icefall-kd label --whisper openai/whisper-small --language en \\
  cuts.jsonl.gz labels.jsonl.gz
"""


@command(context_settings=MODEL_FLAGS, example=EXAMPLE)
@click.argument("in_cuts", type=Place())
@click.argument("out_cuts", type=Place())
@teacher_options(required=False)
@click.option(
    "--command",
    "program",
    type=Text(),
    default="",
    metavar="'PROGRAM {wavs} {out}'",
    help="A program as the teacher, in place of a recipe's model. {wavs} becomes a "
    "list with an id and the path of a wav file on each line; into {out} the program "
    "writes each id and its text.",
)
@click.option(
    "--nbest",
    is_flag=True,
    help="With --command: its lines are an id, a log-probability in nats and a text, "
    "and an id may have several.",
)
@click.option(
    "--time-limit",
    type=Number(0, 10**7),
    default=3600.0,
    metavar="SECONDS",
    help="With --command: how long the program may take for about 1000 s of audio, "
    "or for one longer cut.",
)
@click.option(
    "--whisper",
    type=Place(optional=True),
    default="",
    metavar="FOLDER_OR_NAME",
    help="A Whisper as the teacher, in place of a recipe's model: a folder that the "
    "package transformers saved, or a name such as openai/whisper-tiny.",
)
@click.option(
    "--language",
    type=Text(),
    default="",
    metavar="CODE",
    help="With --whisper: the language that is spoken, such as en. Without it a "
    "multilingual Whisper tells for each cut.",
)
@click.option(
    "--assistant",
    type=Place(optional=True),
    default="",
    metavar="FOLDER_OR_NAME",
    help="With --whisper: a smaller Whisper of the same tokens that drafts, such as a "
    "Distil-Whisper. The text is the same.",
)
@search_options
@job_options
@click.option("--overwrite", is_flag=True, help="Label anew what is labelled already.")
def label(
    in_cuts: str,
    out_cuts: str,
    teacher: TeacherSpec,
    program: str,
    nbest: bool,
    time_limit: float,
    whisper: str,
    language: str,
    assistant: str,
    search: SearchOptions,
    num_jobs: int,
    job: int,
    overwrite: bool,
) -> None:
    """Let a teacher transcribe IN_CUTS; write OUT_CUTS.

    The teacher is a recipe's model, which says what `icefall-kd decode` finds, a
    Whisper, or a program. OUT_CUTS has all cuts of the manifest IN_CUTS, with the
    teacher's text in their supervisions; kd_label in a supervision's custom fields has
    scores, teacher, settings and the original text. Give OUT_CUTS to `icefall-kd
    filter` before you train on it.

    The same command continues a run that was cut short. Several jobs share the work as
    in `icefall-kd dump`; the last one writes OUT_CUTS. The labels-*.jsonl beside it are
    what they found.

    MODEL FLAGS are the model options of the recipe's decode.py, as for `icefall-kd
    dump`.
    """
    values = {"program": program, "whisper": whisper}
    _check_options(teacher, [name for name, value in values.items() if value])
    number, num_jobs = job_of(num_jobs, job)
    this = Job(in_cuts, Path(out_cuts), number, num_jobs)
    _check_places(this, overwrite)
    with ExitStack() as stack:
        if program:
            folder = this.out_cuts.parent
            labels: Any = ProgramTeacher(program, folder, time_limit, nbest)
        elif whisper:
            labels = _whisper(whisper, language, assistant, search)
        else:
            labels = _model(teacher, search, stack)
        counts = survey(in_cuts, labels)
        part = f", job {number} of {num_jobs}" if num_jobs > 1 else ""
        plan = f"Labelling {speech(counts.cuts, counts.seconds)}{part}, for {out_cuts}."
        label_cuts(this, labels, counts, overwrite, lambda: begin(plan))
        if are_done(this, labels, counts):
            _say(this, write_manifest(this, labels))
        else:
            click.echo(
                f"job {number} of {num_jobs} is done: the last one writes {out_cuts}"
            )


def _model(
    teacher: TeacherSpec, search: SearchOptions, stack: ExitStack
) -> LabelTeacher:
    """Load a recipe's model as the teacher."""
    need_kaldialign()
    model = teacher.load_one("label")
    check_one_chunk_size(model.settings)
    num_features = int(model.settings["feature_dim"])
    recognizer = Recognizer(
        model.model, model.settings, search.method, search.device(), search.window
    )
    stack.callback(recognizer.close)
    return RecipeTeacher(
        model.name(),
        recognizer,
        search.reader(num_features),
        teacher.tokenizer(model.settings),
        num_features,
        search.rate,
        search.max_duration,
        search.num_workers,
    )


def _whisper(
    place: str, language: str, assistant: str, search: SearchOptions
) -> LabelTeacher:
    """Load a Whisper as the teacher."""
    from icefall_kd.labels.assistant import Assistant
    from icefall_kd.labels.whisper import LONGEST, WhisperTeacher
    from icefall_kd.labels.whisper_model import Parts, Whisper

    parts, device = Parts(place), search.device()
    drafts = None
    if assistant:
        drafts = Assistant(Parts(assistant, "assistant"), parts, device)
    model = Whisper(parts, device, language, drafts)
    return WhisperTeacher(model, search.max_duration, search.window or LONGEST)


def _check_options(teacher: TeacherSpec, chosen: List[str]) -> None:
    """Refuse options that don't go together."""
    given = _given()
    for name in chosen:
        own = (name, *OF_TEACHERS[name], *ALSO_OF_TEACHERS[name], *OF_ALL)
        others = [option for n, option in given.items() if n not in own]
        others += [word for word in teacher.model_flags if word.startswith("-")]
        require(
            not others,
            f"{', '.join(others)} is for another teacher than a {NAMES[name]} "
            f"({given[name]}): leave one of them out",
        )
        return
    for name, options in OF_TEACHERS.items():
        wrong = [given[option] for option in options if option in given]
        require(
            not wrong,
            f"{', '.join(wrong)} is for a {NAMES[name]}: give {OPTIONS[name]}, or "
            "leave it out",
        )
    for name, remedy in (
        ("recipe", "the folder of a recipe's train.py, or give --whisper or --command"),
        ("exp_dir", "the teacher's experiment folder, or give --whisper or --command"),
        ("bpe_model", "the teacher's bpe.model or lang folder, for the text of tokens"),
    ):
        option = "--" + name.replace("_", "-")
        require(getattr(teacher, name), f"{option} is missing: give it {remedy}")


def _given() -> Dict[str, str]:
    """The options and arguments of this command line, by their parameters' names."""
    context = click.get_current_context()
    params: List[click.Parameter] = context.command.params
    return {
        p.name: p.opts[0]
        for p in params
        if p.name != "model_flags"
        and context.get_parameter_source(p.name) is ParameterSource.COMMANDLINE
    }


def _check_places(job: Job, overwrite: bool) -> None:
    """Refuse an input that is none, and an output that would be lost."""
    ManifestCuts(job.in_cuts)
    require(
        not Path(job.in_cuts).is_dir(),
        f"IN_CUTS is the folder {job.in_cuts}, and labels go into the lines of a "
        "manifest: give a file .jsonl.gz, and make the Shar of what is labelled",
    )
    check_new_file(str(job.out_cuts), "OUT_CUTS", MANIFEST)
    check_not_overwritten(job.in_cuts, job.out_cuts, "OUT_CUTS")
    journals = [job.journal(number) for number in range(job.num_jobs)]
    require(
        overwrite or not job.out_cuts.exists() or any(p.exists() for p in journals),
        f"{job.out_cuts} is there, and {journals[0].name} beside it is not: name "
        "another OUT_CUTS, or give --overwrite to lose that one",
    )


def _say(job: Job, outcome: Outcome) -> None:
    text = (
        f"{job.out_cuts}: {outcome.cuts:,} cuts labelled, {outcome.seconds:,.1f} s, "
        f"{outcome.words:,} words"
    )
    if outcome.empty:
        text += (
            f"; nothing was heard in {outcome.empty:,} of them, {outcome.first_empty} "
            "the first: `icefall-kd filter` drops these"
        )
    click.echo(text)
    click.echo(f"Next: icefall-kd filter {job.out_cuts} KEPT.jsonl.gz")

"""Says before a training whether distillation has something to gain."""

import json
from pathlib import Path
from textwrap import fill
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import click
from tqdm.auto import tqdm

from icefall_kd.cli.amounts import begin
from icefall_kd.cli.options import (
    MODEL_FLAGS,
    Count,
    Number,
    Place,
    command,
    teacher_options,
)
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import need_kaldialign, require, with_flags
from icefall_kd.files import check_new_file, replacing
from icefall_kd.forecast.measures import Interval, Measures, ModelMeasures
from icefall_kd.forecast.verdict import NAMES, Verdict, check_words, decide
from icefall_kd.teacher.spec import LoadedTeacher, TeacherSpec

WIDTH = 88  # of the verdict's lines
_FLAGS = {
    "student_dir": "--student-dir",
    "baseline_dir": "--baseline-dir",
}
_TERMS = {"ctc": "CTC", "rnnt": "lattice"}


EXAMPLE = """
icefall-kd forecast \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --cuts data/fbank/librispeech_cuts_dev-clean.jsonl.gz \\
  --baseline-dir zipformer_kd/exp/no-kd
"""


@command(context_settings=MODEL_FLAGS, example=EXAMPLE)
@teacher_options()
@click.option(
    "--cuts",
    type=Place(),
    required=True,
    metavar="CUTS",
    help="A manifest of transcribed cuts with features, such as the dev set's. A model "
    "looks better than it is on speakers that it was trained on.",
)
@click.option(
    "--num-cuts",
    type=Count(1, 10**6),
    default=300,
    metavar="N",
    help="The number of cuts of --cuts that are used, from the first on.",
)
@click.option(
    "--student-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The folder that `icefall-kd student` wrote, for the student before training.",
)
@click.option(
    "--baseline-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The experiment folder of a training of the student without distillation, "
    "short or long.",
)
@click.option(
    "--baseline-epochs",
    type=Count(1, 1000),
    default=6,
    metavar="N",
    help="The number of epochs of --baseline-dir that are measured, up to the last.",
)
@click.option(
    "--train-cuts",
    type=Place(),
    multiple=True,
    metavar="CUTS",
    help="A manifest of training cuts, in which hours with and without transcripts are "
    "counted. The option may be given more than once.",
)
@click.option(
    "--difference",
    type=Number(0, 99),
    default=None,
    metavar="PERCENT",
    help="Refuse --cuts of too few words to show such a difference between teacher and "
    "student, in percent of the student's WER, such as 15.",
)
@click.option(
    "--json",
    "json_file",
    type=Place(optional=True),
    default="",
    metavar="FILE",
    help="Write all measures and the verdict into this file.",
)
def forecast(
    teacher: TeacherSpec,
    cuts: str,
    num_cuts: int,
    student_dir: str,
    baseline_dir: str,
    baseline_epochs: int,
    train_cuts: Sequence[str],
    difference: Optional[float],
    json_file: str,
) -> None:
    """Say whether distillation has something to gain, and with what terms.

    Teacher and student run on some cuts, as wide as --chunk-size lets a causal one. The
    command prints what it measured, and a verdict: whether to distil, what to expect,
    and the lines of a kd.yaml, or why not to.
    """
    require(
        student_dir or baseline_dir,
        "a teacher is compared with its student: give --baseline-dir, the experiment "
        "folder of a training without distillation, or --student-dir",
    )
    require(
        teacher.bpe_model,
        "--cuts need the labels of the transcripts: give --bpe-model",
    )
    need_kaldialign()
    if json_file:
        check_new_file(json_file, "--json")
        folder = Path(json_file).absolute().parent
        require(
            folder.is_dir(),
            f"--json {json_file} can't be written, as {folder} does not exist: give a "
            "file in a folder that is there",
        )
    teacher.one_folder("forecast")
    measures, notes = _measure(
        teacher,
        cuts,
        num_cuts,
        student_dir,
        baseline_dir,
        baseline_epochs,
        train_cuts,
    )
    if difference is not None:
        check_words(measures, difference)
    verdict = decide(measures)
    if json_file:
        _write(json_file, measures, verdict)
    click.echo(_tables(measures, cuts, notes))
    click.echo()
    for sentence in verdict.sentences:
        click.echo(fill(with_flags(sentence, _FLAGS), WIDTH, break_on_hyphens=False))
    if verdict.lines:
        click.echo("\nIn kd.yaml, for --kd-config:\n")
        click.echo("\n".join(f"  {line}" for line in verdict.lines))
    if json_file:
        click.echo(f"\nAll measures: {json_file}")


def _measure(
    spec: TeacherSpec,
    cuts: str,
    num_cuts: int,
    student_dir: str,
    baseline_dir: str,
    baseline_epochs: int,
    train_cuts: Sequence[str],
) -> Tuple[Measures, List[str]]:
    """The measures, and notes on them; the parameters are those of the command."""
    from icefall_kd.forecast.measure import Listener, measure
    from icefall_kd.forecast.students import kept_epochs, load_start
    from icefall_kd.student.cuts import read_batches

    teacher = spec.load_one("forecast")
    settings = teacher.settings
    epochs = kept_epochs(baseline_dir)[-baseline_epochs:] if baseline_dir else []
    if not student_dir and _has_start(baseline_dir):
        student_dir = baseline_dir
    start = None
    if student_dir:
        start = load_start(spec.recipe, student_dir, settings, teacher.folder)
    if epochs:  # one that does not fit is refused before any work
        _check_epoch(spec.recipe, baseline_dir, epochs[-1], teacher, start)
    hours = _hours(train_cuts, int(settings["feature_dim"]))
    tokenizer = spec.tokenizer(settings)
    batches = read_batches(cuts, num_cuts, settings, tokenizer)
    notes: List[str] = []
    passes = 2 + (start is not None) + len(epochs)
    begin(
        f"Teacher and student are compared on {sum(len(x) for x, _, _ in batches):,} "
        f"cuts, in {passes} passes."
    )
    with tqdm(desc="Measuring", unit=" batches", total=passes * len(batches)) as bar:
        listener = Listener(
            batches, tokenizer, int(settings.get("blank_id", 0)), bar.update
        )
        models = _epochs(spec.recipe, baseline_dir, epochs, notes)
        measures = measure(listener, teacher.model, start, models, hours)
    return measures, notes


def _has_start(folder: str) -> bool:
    from icefall_kd.forecast.students import START, is_start

    path = Path(folder) / START
    return path.is_file() and is_start(path)


def _check_epoch(
    recipe: str, folder: str, epoch: int, teacher: LoadedTeacher, start: Any
) -> None:
    """Refuse a training of a model that isn't the student of this teacher."""
    from icefall_kd.forecast.students import check_fits, load_epoch

    model, settings, _ = load_epoch(recipe, folder, epoch)
    check_fits(settings, teacher.settings, Path(folder), teacher.folder)
    if start is not None:
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, start)]
        require(
            sizes[0] == sizes[1],
            f"the model trained in {folder} has {sizes[0]:,} parameters and the "
            f"student before training {sizes[1]:,}: give --student-dir and "
            "--baseline-dir of one student",
        )


def _epochs(
    recipe: str, folder: str, epochs: Sequence[int], notes: List[str]
) -> Iterator[Tuple[int, Any]]:
    """Number and model of each epoch; what is not averaged is noted."""
    from icefall_kd.forecast.students import load_epoch

    single = []
    for epoch in epochs:
        model, _, averaged = load_epoch(recipe, folder, epoch)
        if not averaged:
            single.append(str(epoch))
        yield epoch, model
    if single:
        notes.append(
            f"Not averaged over an epoch, as {folder} has no averages of it: epoch "
            f"{', '.join(single)}."
        )


def _hours(paths: Sequence[str], num_features: int) -> Tuple[float, float]:
    """Hours of cuts with and without transcripts."""
    from icefall_kd.targets.cuts import survey
    from icefall_kd.targets.transcript import has_no_text

    seconds = [0.0, 0.0]

    def count(cut: Any) -> None:
        seconds[has_no_text(cut)] += cut.duration

    for path in paths:
        survey(path, num_features, [count])
    require(
        seconds[0] or not paths,
        f"no cut of {' and '.join(paths)} has a transcript: give --train-cuts the "
        "transcribed cuts too, with which the others are compared",
    )
    return seconds[0] / 3600, seconds[1] / 3600


def _write(path: str, measures: Measures, verdict: Verdict) -> None:
    values = {"measures": measures.as_dict(), "verdict": vars(verdict)}
    text = json.dumps(values, indent=1, default=vars) + "\n"
    with replacing(Path(path), shared=True) as temporary:
        temporary.write_text(text, "utf8")


# What is printed


def _tables(measures: Measures, cuts: str, notes: Sequence[str]) -> str:
    size = f"{measures.cuts} cuts of {cuts} with {measures.words:,} words."
    blocks = [f"{size} In brackets: intervals of 95 %.", _model_table(measures)]
    if notes:
        blocks.append("\n".join(notes))
    if measures.terms:
        blocks.append(_term_table(measures))
    blocks.append(_shares(measures))
    return "\n\n".join(blocks)


def _model_table(measures: Measures) -> str:
    heads = [head for head in NAMES if head in measures.teacher.heads]
    head_row = ["", "parameters"]
    for head in heads:
        head_row += [f"{NAMES[head]} loss", "WER %", "right"]
    rows = [head_row, _model_row("teacher", measures.teacher, heads)]
    if measures.start is not None:
        rows.append(_model_row("student before training", measures.start, heads))
    for model in measures.epochs:
        mark = " *" if model.epoch == measures.best else ""
        name = f"student, epoch {model.epoch}{mark}"
        rows.append(_model_row(name, model, heads))
    text = (
        "Losses are in nats a token. right: utterances whose best tokens are the "
        "transcript's."
    )
    if measures.epochs:
        text += " *: the best epoch, which is compared."
    return f"{text_table(rows)}\n{text}"


def _model_row(name: str, model: ModelMeasures, heads: Sequence[str]) -> List[str]:
    row = [name, f"{model.parameters:,}"]
    for head in heads:
        of_head = model.heads.get(head)
        if of_head is None:
            row += ["-"] * 3
            continue
        row += [
            f"{of_head.loss:.3f}",
            f"{of_head.wer.value:.1f} {_brackets(of_head.wer)}",
            f"{100 * of_head.right:.0f} %",
        ]
    return row


def _brackets(interval: Interval) -> str:
    return f"({interval.low:.1f}-{interval.high:.1f})"


def _term_table(measures: Measures) -> str:
    name = "best epoch" if measures.best else "student before training"
    head = [f"teacher || {name}", "where", "count", "KL", "of blank", "of tokens"]
    rows = [[*head, "teacher's entropy"]]
    for term in measures.terms:
        parts = [
            "-" if x is None else f"{x:.3f}"
            for x in (term.blank, term.tokens, term.entropy)
        ]
        if term.term in _TERMS:
            row = [_TERMS[term.term], term.where, f"{term.count:,.0f}"]
            rows.append([*row, f"{term.value:.3f}", *parts])
    lines = [
        "Means over frames and nodes, in nats; KL is the sum of the two beside it."
    ]
    lines += [
        f"Cosine distance of the encoder outputs, after the best linear map: "
        f"{term.value:.3f}."
        for term in measures.terms
        if term.term == "hidden"
    ]
    table = f"{text_table(rows, left=2)}\n" if len(rows) > 1 else ""
    return table + "\n".join(lines)


def _shares(measures: Measures) -> str:
    lines = []
    if measures.worse is not None:
        lines.append(
            "Cuts to whose transcript the teacher gives less probability than the "
            f"student: {100 * measures.worse:.0f} %."
        )
    hours = (measures.transcribed, measures.untranscribed)
    if any(hours):
        lines.append(
            f"Training cuts: {hours[0]:.2f} hours with transcripts and {hours[1]:.2f} "
            "without."
        )
    return "\n".join(lines)

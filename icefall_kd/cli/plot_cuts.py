"""Draws what models say of cuts: ``icefall-kd plot lattice``, ``spikes``, ``kl``."""

from itertools import islice
from typing import Any, Dict, List, Sequence, Tuple

import click
from tqdm.auto import tqdm

from icefall_kd.cli.models import folders_by_name
from icefall_kd.cli.options import (
    MODEL_FLAGS,
    Count,
    Place,
    Text,
    command,
    teacher_options,
)
from icefall_kd.cli.plot_models import lang_option
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import require
from icefall_kd.plot.figures import check_picture, write_picture
from icefall_kd.plot.words import words_of
from icefall_kd.teacher.spec import LoadedTeacher, TeacherSpec

BATCH = 8  # cuts that a model runs on at once

_OUT = click.argument("out", type=Place())
_CUTS = click.option(
    "--cuts",
    type=Place(),
    required=True,
    metavar="CUTS",
    help="A manifest of cuts with features, such as the dev set's.",
)
_CUT_ID = click.option(
    "--cut-id",
    type=Text(),
    default="",
    metavar="ID",
    help="The cut that is drawn. Default: the first one of --cuts.",
)
_STUDENTS = click.option(
    "--student",
    "students",
    type=Text(),
    multiple=True,
    required=True,
    metavar="NAME=EXP_DIR",
    help="A student's name and its experiment folder. The option may be given more "
    "than once.",
)
_EPOCH = click.option(
    "--student-epoch",
    type=Count(0, 10**6),
    default=0,
    metavar="N",
    help="The epoch-N.pt of each student, averaged over its epoch if the one before is "
    "kept. 0: each one's last.",
)


@command(
    context_settings=MODEL_FLAGS,
    example="""icefall-kd plot lattice \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --cuts data/fbank/librispeech_cuts_dev-clean.jsonl.gz lattice.svg""",
)
@_OUT
@teacher_options()
@_CUTS
@_CUT_ID
@click.option(
    "--s-range",
    type=Count(2, 10_000),
    default=5,
    metavar="N",
    help="Label positions of a pruning range at a frame, as the recipe's "
    "--prune-range.",
)
@lang_option
def lattice(
    out: str, teacher: TeacherSpec, cuts: str, cut_id: str, s_range: int, lang: str
) -> None:
    """Draw the transducer's lattice of an utterance, with its pruning ranges.

    The lattice is full, of all frames and label positions. Shades are the probability
    that the path passes a node; the outline has the ranges that the simple joiner would
    prune the lattice to; a line is the best path. --exp-dir may be a teacher's or a
    student's.
    """
    from icefall_kd.plot.lattice import draw_lattice, lattice_picture
    from icefall_kd.plot.utterance import labels_in, read_utterance

    check_picture(out)
    tokenizer_needed(teacher)
    loaded = teacher.load_one("a picture")
    tokenizer = teacher.tokenizer(loaded.settings)
    utterance = read_utterance(cuts, cut_id, loaded.settings)
    labels = labels_in(utterance, tokenizer)
    texts = [tokenizer.id_to_piece(i) for i in labels]
    picture = lattice_picture(loaded.model, utterance, labels, texts, s_range)
    words = words_of(lang)
    title = title_of(utterance)
    write_picture(out, lambda: draw_lattice(picture, title, words))
    frames, rows = picture.occupancy.shape
    click.echo(
        f"{frames} frames, {rows - 1} tokens; ranges of {s_range} leave out "
        f"{100 * picture.outside:.3g} % of the occupancy"
    )
    click.echo(out)


@command(
    context_settings=MODEL_FLAGS,
    example="""icefall-kd plot spikes \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --cuts data/fbank/librispeech_cuts_dev-clean.jsonl.gz \\
  --student KD=zipformer_kd/exp/kd --student-epoch 30 spikes.svg""",
)
@_OUT
@teacher_options()
@_CUTS
@_CUT_ID
@_STUDENTS
@_EPOCH
@lang_option
def spikes(
    out: str,
    teacher: TeacherSpec,
    cuts: str,
    cut_id: str,
    students: Sequence[str],
    student_epoch: int,
    lang: str,
) -> None:
    """Draw an utterance's spectrogram, and where each model puts its tokens.

    A frame stands where it begins by icefall's timestamps, 40 ms times its number.
    """
    from icefall_kd.plot.spikes import draw_spikes, track_of
    from icefall_kd.plot.utterance import read_utterance

    check_picture(out)
    loaded, of_students, texts, blank_id = _load(teacher, students, student_epoch)
    utterance = read_utterance(cuts, cut_id, loaded.settings)
    words = words_of(lang)
    models = {words["teacher"]: loaded.model, **of_students}
    tracks = [track_of(n, m, utterance, blank_id) for n, m in models.items()]
    title = title_of(utterance)
    write_picture(out, lambda: draw_spikes(utterance, tracks, texts, title, words))
    rows = [["model", "frames of CTC spikes", "of the transducer's tokens"]]
    for track in tracks:
        ctc_tokens = ((s.frame, s.token) for s in track.spikes)
        cells = (
            " ".join(f"{frame}:{texts[token]}" for frame, token in pairs)
            for pairs in (ctc_tokens, track.emitted)
        )
        rows.append([track.name, *cells])
    click.echo(text_table(rows, left=3))
    click.echo(out)


@command(
    context_settings=MODEL_FLAGS,
    example="""icefall-kd plot kl \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --cuts data/fbank/librispeech_cuts_dev-clean.jsonl.gz \\
  --student KD=zipformer_kd/exp/kd --student-epoch 30 kl.svg""",
)
@_OUT
@teacher_options()
@_CUTS
@_CUT_ID
@click.option(
    "--num-cuts",
    type=Count(1, 10**6),
    default=100,
    metavar="N",
    help="The number of cuts of --cuts over which the bars are, from the first on.",
)
@_STUDENTS
@_EPOCH
@lang_option
def kl(
    out: str,
    teacher: TeacherSpec,
    cuts: str,
    cut_id: str,
    num_cuts: int,
    students: Sequence[str],
    student_epoch: int,
    lang: str,
) -> None:
    """Draw at which frames of the CTC head students are far from their teacher.

    Over the time of one utterance, and over many by kind of frame: spikes, where the
    teacher's best token is not blank, the blank frames beside them, and the others.
    """
    from icefall_kd.forecast.divergences import split_kl
    from icefall_kd.plot.kl import (
        KLPicture,
        draw_kl,
        log_probs_of,
        sum_by_kind,
        table_rows,
    )
    from icefall_kd.plot.utterance import read_utterance

    check_picture(out)
    loaded, of_students, texts, blank_id = _load(teacher, students, student_epoch)
    utterance = read_utterance(cuts, cut_id, loaded.settings)
    features = (utterance.features, utterance.lens)
    (own,) = log_probs_of(loaded.model, *features)
    rows = {
        name: split_kl(own, log_probs_of(model, *features)[0], blank_id)
        for name, model in of_students.items()
    }
    batches = _batches(cuts, num_cuts, int(loaded.settings["feature_dim"]))
    count = sum(len(lens) for _, lens in batches)
    with tqdm(desc="Comparing", unit=" batches", total=len(batches)) as bar:
        totals = sum_by_kind(
            loaded.model, of_students, batches, blank_id, lambda: bar.update()
        )
    picture = KLPicture(own, rows, totals, count)
    words, title = words_of(lang), title_of(utterance)
    write_picture(
        out, lambda: draw_kl(picture, utterance, texts, blank_id, title, words)
    )
    head = ["student", "frames", "count", "of frames", "of KL", "mean KL"]
    head += ["blank or not", "which token"]
    click.echo(text_table([head, *table_rows(totals)], left=2))
    click.echo(out)


def tokenizer_needed(teacher: TeacherSpec) -> None:
    """Refuse a teacher without tokens.

    Args:
      teacher: As the options named it.
    """
    require(
        teacher.bpe_model,
        "--bpe-model is empty, and the picture has the texts of tokens: give the "
        "teacher's bpe.model or lang folder",
    )


def title_of(utterance: Any) -> str:
    """Return a picture's title: the cut's id, and the beginning of its text.

    Args:
      utterance: A :class:`icefall_kd.plot.utterance.Utterance`.
    """
    cut = utterance.cut
    text = " ".join((s.text or "") for s in cut.supervisions)
    short = text if len(text) <= 60 else text[:59] + "…"
    return f"{cut.id}: {short}" if text.strip() else cut.id


def _load(
    teacher: TeacherSpec, students: Sequence[str], epoch: int
) -> Tuple[LoadedTeacher, Dict[str, Any], List[str], int]:
    """Teacher, students by name, the text of each token, and the id of blank."""
    from icefall_kd.plot.utterance import load_students
    from icefall_kd.tokens import token_names

    tokenizer_needed(teacher)
    folders = folders_by_name(students, "--student")
    loaded = teacher.load_one("a picture")
    texts = token_names(teacher.tokenizer(loaded.settings))
    models = load_students(
        teacher.recipe, folders, epoch, loaded.settings, loaded.folder
    )
    return loaded, models, texts, int(loaded.settings.get("blank_id", 0))


def _batches(path: str, num_cuts: int, num_features: int) -> List[Tuple[Any, Any]]:
    """Features and lengths of the first cuts of a manifest."""
    from icefall_kd.targets.batches import read_features
    from icefall_kd.targets.cuts import Survey, checked

    survey = Survey(path)
    cuts = list(islice(checked(survey, num_features, light=False), num_cuts))
    survey.check()
    survey.warn()
    return [read_features(cuts[i : i + BATCH]) for i in range(0, len(cuts), BATCH)]

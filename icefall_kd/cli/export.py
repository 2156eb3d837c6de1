"""Exports a teacher or a student for where it runs."""

from typing import Tuple

import click

from icefall_kd.cli.options import (
    MODEL_FLAGS,
    Count,
    Place,
    Text,
    YesNo,
    command,
    teacher_options,
)
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError, require
from icefall_kd.export.build import FORMS, ONNX, PARTS, Wanted, describe
from icefall_kd.export.build import export as write_files
from icefall_kd.export.build import heads_of
from icefall_kd.export.features import features_of
from icefall_kd.export.files import OPSETS
from icefall_kd.export.folder import ExportFolder
from icefall_kd.export.packages import need
from icefall_kd.teacher.spec import TeacherSpec
from icefall_kd.tokens import token_names


@command(name="export", context_settings=MODEL_FLAGS)
@teacher_options()
@click.option(
    "--export-dir",
    type=Place(),
    required=True,
    metavar="FOLDER",
    help="The folder of the files, of this model alone.",
)
@click.option(
    "--cuts",
    type=Place(),
    required=True,
    metavar="CUTS",
    help="A manifest of some of the recipe's cuts, with features and audio: a model is "
    "exported for features as these.",
)
@click.option(
    "--forms",
    type=Text(),
    default=ONNX,
    metavar="FORMS",
    help="What is written, separated by commas: torchscript as icefall's export.py "
    "does, and onnx, in fp32, as sherpa-onnx loads it.",
)
@click.option(
    "--heads",
    type=Text(),
    default="",
    metavar="HEADS",
    help="transducer, ctc or both, separated by a comma. Default: all that the model "
    "has.",
)
@click.option(
    "--opset",
    type=Count(OPSETS.start, OPSETS.stop - 1),
    default=OPSETS.start,
    metavar="N",
    help="The version of ONNX's operators.",
)
@click.option(
    "--on-the-fly-feats",
    type=YesNo(),
    default=False,
    metavar="BOOL",
    help="The recipe computes lhotse's Fbank of the audio in training, without "
    "normalisation: --cuts needs no stored features.",
)
def export(
    teacher: TeacherSpec,
    export_dir: str,
    cuts: str,
    forms: str,
    heads: str,
    opset: int,
    on_the_fly_feats: bool,
) -> None:
    """Write a model, teacher or student, as files for where it runs.

    The names of the files, and what is in them, are those of icefall's export scripts,
    so that sherpa-onnx and icefall's onnx_pretrained.py load them. Beside them are
    tokens.txt, and metadata.json: shapes, frame rates, features, the hash of the
    tokens, versions. Where a recipe takes the mean of each utterance off its features,
    which no runtime does, the encoder's graph does it.

    MODEL FLAGS are the model options of the recipe's decode.py, as for `icefall-kd
    dump`.
    """
    asked = _words(forms, FORMS, "--forms")
    of_heads = _words(heads, tuple(PARTS), "--heads") if heads else ()
    require(
        teacher.bpe_model,
        "the tokens are exported too: give --bpe-model the model's bpe.model or lang "
        "folder",
    )
    teacher.one_folder("export")
    if ONNX in asked:
        need("onnx", "the form onnx")
    folder = ExportFolder(export_dir)
    loaded = teacher.load_one("export")
    settings = loaded.settings
    wanted = Wanted(asked, heads_of(loaded.model, of_heads), opset)
    require(
        not settings.get("causal"),
        "the model is causal, and whole utterances are what is exported: give a model "
        "that was trained with --causal 0",
    )
    names = token_names(teacher.tokenizer(settings))
    features = features_of(cuts, int(settings["feature_dim"]), on_the_fly_feats)
    folder.begin(describe(teacher, loaded, names, features))
    with folder.writing():
        write_files(loaded, wanted, names, features, folder)
    rows = [("file", "MB")]
    for name, values in folder.metadata["files"].items():
        rows.append((name, f"{values['bytes'] / 1e6:.2f}"))
    click.echo(text_table(rows, left=1))
    click.echo(
        f"Features: {features.num_mel_bins} bins at {features.sampling_rate} Hz, mean "
        f"taken off: {features.mean}"
    )


def _words(value: str, known: Tuple[str, ...], option: str) -> Tuple[str, ...]:
    """The words of an option's list, each once, in the order of ``known``."""
    words = value.split(",")
    for word in words:
        if word not in known:
            raise KDError(
                f"{option} is {value!r}, and must be of {', '.join(known)}, separated "
                "by commas"
            )
    return tuple(word for word in known if word in words)

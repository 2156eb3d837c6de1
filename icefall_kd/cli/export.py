"""Exports a teacher or a student for where it runs."""

from typing import Any, Dict, List, Optional, Tuple

import click

from icefall_kd.cli.amounts import begin, free_space, size_of
from icefall_kd.cli.options import (
    MODEL_FLAGS,
    Count,
    Number,
    Place,
    Text,
    YesNo,
    command,
    teacher_options,
)
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError, naming_flags, need_kaldialign, require
from icefall_kd.export.build import (
    CTC_HEAD,
    FORMS,
    ONNX,
    PARTS,
    PLAIN,
    Wanted,
    check_form,
    chunk_encoder,
    describe,
)
from icefall_kd.export.build import export as write_files
from icefall_kd.export.build import heads_of
from icefall_kd.export.check import (
    check,
    check_files,
    check_lengths,
    sherpa_can,
    utterances_of,
    write_findings,
)
from icefall_kd.export.features import features_of
from icefall_kd.export.files import OPSETS
from icefall_kd.export.folder import FAILED, FP16, ExportFolder
from icefall_kd.export.packages import need
from icefall_kd.export.parity import Account, table_of
from icefall_kd.report.exports import PARITY
from icefall_kd.rounding import SCALES, TENSOR
from icefall_kd.teacher.spec import TeacherSpec
from icefall_kd.tokens import token_names
from icefall_kd.zipformer import MIN_FRAMES

_PLAIN_FLAGS = {
    "mask": "--plain-mask",
    "decoder": "--plain-decoder",
    "table_mb": "--plain-table-mb",
}


EXAMPLE = """
icefall-kd export \\
  --recipe ./zipformer --exp-dir zipformer_kd/exp/kd --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --export-dir zipformer_kd/exp/kd/export --num-cuts 200 \\
  --check data/fbank/librispeech_cuts_test-clean.jsonl.gz
"""


@command(name="export", context_settings=MODEL_FLAGS, example=EXAMPLE)
@teacher_options()
@click.option(
    "--export-dir",
    type=Place(),
    required=True,
    metavar="FOLDER",
    help="The folder of the files, of this model alone.",
)
@click.option(
    "--check",
    "check_cuts",
    type=Place(optional=True),
    default="",
    metavar="CUTS",
    help="Give the utterances of these cuts, with features and audio, to the recipe's "
    "model and to all files, and to sherpa-onnx, and compare what they say.",
)
@click.option(
    "--num-cuts",
    type=Count(1, 10**9),
    default=None,
    metavar="N",
    help="With --check: the first N cuts alone. Default: all.",
)
@click.option(
    "--only-check",
    is_flag=True,
    help="Write no files, and check those that are there.",
)
@click.option(
    "--sherpa",
    type=YesNo(),
    default=True,
    metavar="BOOL",
    help="With --check: give the audio to sherpa-onnx too.",
)
@click.option(
    "--cuts",
    type=Place(optional=True),
    default="",
    metavar="CUTS",
    help="A manifest of some of the recipe's cuts, with features and audio: a model is "
    "exported for features as these. Default: those of --check.",
)
@click.option(
    "--forms",
    type=Text(),
    default=ONNX,
    metavar="FORMS",
    help="What is written, separated by commas: torchscript as icefall's export.py "
    "does, onnx, in fp32, as sherpa-onnx loads it, and fp16. plain: for chips, "
    "ONNX for one length without gather, loops or shapes that are not numbers.",
)
@click.option(
    "--int8",
    type=Text(),
    default="",
    metavar="PARTS",
    help="Parts that are written in int8 too, separated by commas: encoder, decoder, "
    "joiner, and model for the CTC head's.",
)
@click.option(
    "--int8-scales",
    type=click.Choice(SCALES),
    default=TENSOR,
    help="How many scales a weight in int8 has: tensor for one, as icefall's exporters "
    "write it, channel for one for each channel that comes out, with which outliers "
    "of one do not cost the others.",
)
@click.option(
    "--equalize",
    is_flag=True,
    help="Give channels that multiply each other like sizes first, which leaves the "
    "output as it is: for a model that loses words in int8.",
)
@click.option(
    "--heads",
    type=Text(),
    default="",
    metavar="HEADS",
    help="Heads that are exported: transducer, ctc or both, separated by a comma. "
    "Default: all that the model has.",
)
@click.option(
    "--opset",
    type=Count(OPSETS.start, OPSETS.stop - 1),
    default=OPSETS.start,
    metavar="N",
    help="The version of ONNX's operators.",
)
@click.option(
    "--num-frames",
    type=Count(MIN_FRAMES, 10**6),
    default=None,
    metavar="N",
    help="The length of the form plain, in feature frames (100 a second). A stream's "
    "is that of its chunks.",
)
@click.option(
    "--plain-mask",
    type=YesNo(),
    default=True,
    metavar="BOOL",
    help="The plain encoder takes a mask of the utterance's frames, with which a "
    "shorter one comes out as alone.",
)
@click.option(
    "--plain-decoder",
    type=click.Choice(("embedding", "table")),
    default="embedding",
    help="The plain decoder: embedding for a graph that takes rows of "
    "token_embedding.npy, or table for a row for each context.",
)
@click.option(
    "--plain-table-mb",
    type=Number(0.0, 1e6),
    default=16.0,
    metavar="MB",
    help="The largest table of all contexts that is written.",
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
    check_cuts: str,
    num_cuts: Optional[int],
    only_check: bool,
    sherpa: bool,
    cuts: str,
    forms: str,
    int8: str,
    int8_scales: str,
    equalize: bool,
    heads: str,
    opset: int,
    num_frames: Optional[int],
    plain_mask: bool,
    plain_decoder: str,
    plain_table_mb: float,
    on_the_fly_feats: bool,
) -> None:
    """Write a model, teacher or student, as files for where it runs.

    The names of the files, and what is in them, are those of icefall's export scripts,
    so that sherpa-onnx and icefall's onnx_pretrained.py load them. Beside them are
    tokens.txt, and metadata.json: shapes, frame rates, features, the hash of the
    tokens, versions. Where a recipe takes the mean of each utterance off its features,
    which no runtime does, the encoder's graph does it.

    --check shows for each form how far its outputs are from torch's, in how many
    utterances its tokens are the same, its WER, size and real-time factor. The status
    is 1 where fp32 differs by more than 1e-4, sherpa-onnx in fp32 has other tokens, or
    a smaller form's WER is more than 0.2 points higher; the files of such a form get
    .failed behind their names, so that nobody deploys them.

    MODEL FLAGS are the model options of the recipe's decode.py, as for `icefall-kd
    dump`. A causal model is exported for streaming, with one --chunk-size and
    --left-context-frames, and with --chunk-size -1 for whole utterances.
    """
    form_names = _words(forms, FORMS, "--forms")
    of_heads = _words(heads, tuple(PARTS), "--heads") if heads else ()
    parts = tuple(part for head in PARTS.values() for part in head)
    of_int8 = _words(int8, parts, "--int8") if int8 else ()
    require(
        ONNX in form_names or not (FP16 in form_names or of_int8),
        f"--forms is {forms} and fp16 or --int8 is asked for, and they are made of the "
        "files in fp32: give onnx among the forms",
    )
    require(
        of_int8 or int8_scales == TENSOR,
        f"--int8-scales is {int8_scales}, and no part is written in int8: give --int8 "
        "the parts, or leave --int8-scales out",
    )
    require(
        check_cuts or not only_check,
        "--only-check is given without --check: give it the cuts to check with",
    )
    require(
        check_cuts or num_cuts is None,
        f"--num-cuts is {num_cuts} and --check is missing: give it the cuts to check "
        "with, or leave --num-cuts out",
    )
    require(
        cuts or check_cuts,
        "it is not known what features the model is exported for: give --check or "
        "--cuts some of the recipe's cuts, with features and audio",
    )
    require(
        teacher.bpe_model,
        "the tokens are exported too: give --bpe-model the model's bpe.model or lang "
        "folder",
    )
    teacher.one_folder("export")
    _need_packages(form_names, of_int8, bool(check_cuts), sherpa)
    plain = _plain_of(form_names, num_frames, plain_mask, plain_decoder, plain_table_mb)
    folder = ExportFolder(export_dir)
    loaded = teacher.load_one("export")
    settings = loaded.settings
    of_heads = heads_of(loaded.model, of_heads)
    known = [part for head in of_heads for part in PARTS[head]]
    for part in of_int8:
        require(
            part in known,
            f"--int8 has {part}, and what is exported has {', '.join(known)}: give "
            "some of these",
        )
    wanted = Wanted(form_names, of_heads, of_int8, int8_scales, equalize, opset, plain)
    tokenizer = teacher.tokenizer(settings)
    names = token_names(tokenizer)
    num_features = int(settings["feature_dim"])
    features = features_of(cuts or check_cuts, num_features, on_the_fly_feats)
    check_form(settings, wanted, features)
    chunks = chunk_encoder(loaded)
    utterances, of_plain = [], []
    if check_cuts:  # before there is a file
        utterances = utterances_of(
            check_cuts, features, on_the_fly_feats, chunks, num_cuts
        )
        if num_frames:
            check_lengths(utterances, num_frames)
    values = describe(teacher, loaded, names, features)
    plan = _plan(loaded.model, forms, utterances, folder, only_check)
    if only_check:
        require(
            folder.metadata,
            f"--export-dir {export_dir} has no metadata.json, so there is nothing to "
            "check: leave --only-check out",
        )
        folder.same_model(values)
    else:
        folder.begin(values)
        begin(plan)
        with folder.writing(), naming_flags(_PLAIN_FLAGS):
            of_plain = write_files(loaded, wanted, names, features, folder)
    rows = [("file", "MB")]
    for name, values in folder.metadata["files"].items():
        rows.append((name, f"{values['bytes'] / 1e6:.2f}"))
    click.echo(text_table(rows, left=1))
    for line in of_plain:
        click.echo(line)
    click.echo(
        f"Features: {features.num_mel_bins} bins at {features.sampling_rate} Hz, mean "
        f"taken off: {features.mean}"
    )
    if check_cuts:
        if folder.metadata.pop("checked", None):
            folder.finish()  # what was found before no longer counts
        check_files(folder, names)
        if only_check:
            begin(plan)
        if sherpa and CTC_HEAD in of_heads and not sherpa_can(CTC_HEAD, chunks):
            click.echo(
                "sherpa-onnx streams CTC models of 80 Mel bins alone, and this one has "
                f"{num_features}: it is not asked."
            )
        accounts = check(loaded, folder, utterances, tokenizer, names, sherpa, chunks)
        _check(folder, accounts, check_cuts)
        click.echo(f"Files: {folder.path}. Next: load them by sherpa-onnx.")
    else:
        click.echo(
            f"Files: {folder.path}. Next: compare them with the model by --only-check "
            "--check CUTS."
        )


def _plan(
    model: Any, forms: str, utterances: List[Any], folder: ExportFolder, checks: bool
) -> str:
    """What will be done, in one sentence."""
    count = sum(p.numel() for p in model.parameters())
    text = f"A model of {count:,} parameters ({size_of(4 * count)} in fp32)"
    if not checks:
        text += f" becomes {forms} in {folder.path}, where {free_space(folder.path)} "
        text += "are free"
    if utterances:
        text += ", and" if not checks else ""
        text += f" is compared with its files on {len(utterances):,} utterances"
    return text + "."


def _plain_of(
    forms: Tuple[str, ...],
    num_frames: Optional[int],
    mask: bool,
    decoder: str,
    table_mb: float,
) -> Dict[str, Any]:
    """What is asked of the plain form, as fields of PlainForm; empty without it."""
    if PLAIN not in forms:
        require(
            num_frames is None,
            f"--num-frames is {num_frames}, and only the form plain has a length: give "
            "plain among --forms, or leave --num-frames out",
        )
        return {}
    fields = {"mask": mask, "decoder": decoder, "table_mb": table_mb}
    return {**fields, "num_frames": num_frames} if num_frames else fields


def _need_packages(
    forms: Tuple[str, ...], int8: Tuple[str, ...], checks: bool, sherpa: bool
) -> None:
    """Refuse what a package is missing for, before a model is loaded."""
    if set(forms) & {ONNX, FP16} or int8:
        need("onnx", "the form onnx")
    if PLAIN in forms:
        need("onnx", "the form plain")
        need("onnxruntime", "the form plain")
    if FP16 in forms:
        need("onnxconverter_common", "the form fp16")
    if int8:
        need("onnxruntime.quantization", "the form int8")
    if checks:
        need("onnxruntime", "--check")
        need_kaldialign()
    if checks and sherpa:
        need("sherpa_onnx", "--check, without --sherpa 0,")


def _check(folder: ExportFolder, accounts: List[Account], cuts: str) -> None:
    """Show and write what was compared, and refuse what is wrong.

    Args:
      folder: The folder.
      accounts: Of all heads and forms.
      cuts: The manifest.
    """
    click.echo(text_table(table_of(accounts), left=2))
    sentences, withdrawn = write_findings(folder, accounts, cuts)
    if withdrawn:
        click.echo(
            f"Renamed to *{FAILED}, as they are wrong: " + ", ".join(sorted(withdrawn))
        )
    if sentences:
        more = f" (and {len(sentences) - 1} more in {folder.path / PARITY})"
        raise KDError(sentences[0] + (more if len(sentences) > 1 else ""))


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

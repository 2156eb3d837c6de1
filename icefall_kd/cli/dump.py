"""Stores a teacher's targets of cuts."""

import math
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import click
import torch
from lhotse import CutSet
from lhotse.cut import Cut

from icefall_kd.cli.amounts import begin, free_space, size_of, speech
from icefall_kd.cli.combine import NEXT, check_not_overwritten, combine_jobs
from icefall_kd.cli.options import (
    MODEL_FLAGS,
    MOST_THREADS,
    Count,
    Number,
    Place,
    Text,
    command,
    job_options,
    teacher_options,
)
from icefall_kd.cli.torchrun import job_of, number_of
from icefall_kd.errors import KDError, require
from icefall_kd.files import MANIFEST, check_new_file, check_new_folder, replacing
from icefall_kd.kinds.hidden import (
    HiddenCodec,
    Layer,
    from_command_line,
    load_quantizer,
)
from icefall_kd.lattice import check_s_range
from icefall_kd.targets.cuts import ANY_SECONDS, ManifestCuts, Seconds, survey
from icefall_kd.targets.dump import dump_targets, rehearse
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.manifest import job_manifest
from icefall_kd.targets.model_input import check_supervision
from icefall_kd.targets.record import RecordEncoder
from icefall_kd.targets.transcript_checks import TranscriptCheck
from icefall_kd.targets.writer import TargetWriter
from icefall_kd.teacher.spec import TeacherSpec, joint_name
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.tokens import hash_tokens, token_names, write_token_names

EXAMPLE = """
icefall-kd dump \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --keep adaptive:0.999:16 --keep-lattice adaptive:0.999:16 --stats \\
  data/fbank/librispeech_cuts_train-clean-100.jsonl.gz \\
  data/kd/librispeech_cuts_train-clean-100.jsonl.gz
"""


@command(context_settings=MODEL_FLAGS, example=EXAMPLE)
@click.argument("in_cuts", type=Place())
@click.argument("out_cuts", type=Place())
@teacher_options()
@click.option(
    "--teacher-weights",
    "weights",
    type=Text(),
    default="",
    metavar="A,B",
    help="Several teachers' shares of the average, such as 2,1. Default: equal ones.",
)
@click.option(
    "--teacher-field",
    type=Text(),
    default="",
    metavar="NAME",
    help="Choose one of several teachers for each cut: the custom field of the cut "
    "that holds the teacher's number, from 0 on.",
)
@click.option(
    "--storage-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The folder of the store. Default: beside OUT_CUTS, with its name and _kd.",
)
@click.option(
    "--keep",
    type=Text(),
    default="dense",
    metavar="FORM",
    help="The form in which CTC targets are stored: dense, top:K, "
    "adaptive:MASS:MAX, sampled:N, or none. Sparse forms are for one temperature: 1, "
    "or that after @, such as top:8@2.",
)
@click.option(
    "--keep-lattice",
    type=Text(),
    default="none",
    metavar="FORM",
    help="The form in which pruned lattices are stored: collapsed, a form of --keep, "
    "or none. path: before a form, such as path:dense, stores the best alignment "
    "alone.",
)
@click.option(
    "--keep-hidden",
    type=Text(),
    default="none",
    metavar="LAYER:FORM",
    help="The hidden layers that are stored, separated by commas, such as "
    "3:half,out:q.pt, or none. LAYER is a stack's index, or out for the encoder "
    "output. FORM is half (float16) or a file of `icefall-kd quantizer`.",
)
@click.option(
    "--keep-simple",
    type=Text(),
    default="none",
    metavar="FORM",
    help="The form in which the acoustic half of the transducer's simple joiner is "
    "stored: a form of --keep, or none.",
)
@click.option(
    "--s-range",
    type=Count(0, 1000),
    default=5,
    metavar="N",
    help="Label positions of a pruned lattice at each frame. 0: the full lattice.",
)
@click.option(
    "--cut-seconds",
    type=Text(),
    default="",
    metavar="SHORTEST:LONGEST",
    help="Only cuts of these durations get targets, such as 1:20. Give the bounds that "
    "the recipe's training has. Default: all cuts.",
)
@click.option(
    "--max-duration",
    type=Number(0, 10**6),
    default=200.0,
    metavar="SECONDS",
    help="Seconds of audio in a batch, padding counted.",
)
@job_options
@click.option(
    "--num-workers",
    type=Count(0, MOST_THREADS),
    default=1,
    metavar="N",
    help="Processes that read features. 0: the teacher's own.",
)
@click.option(
    "--num-threads",
    type=Count(0, MOST_THREADS),
    default=0,
    metavar="N",
    help="CPU threads of the teacher. 0: one for each core.",
)
@click.option("--overwrite", is_flag=True, help="Delete the store's earlier targets.")
@click.option("--stats", is_flag=True, help="Print a table of what the store holds.")
def dump(
    in_cuts: str,
    out_cuts: str,
    teacher: TeacherSpec,
    weights: str,
    teacher_field: str,
    storage_dir: str,
    keep: str,
    keep_lattice: str,
    keep_hidden: str,
    keep_simple: str,
    s_range: int,
    cut_seconds: str,
    max_duration: float,
    num_jobs: int,
    job: int,
    num_workers: int,
    num_threads: int,
    overwrite: bool,
    stats: bool,
) -> None:
    """Store the teacher's targets of IN_CUTS; write OUT_CUTS.

    IN_CUTS is a manifest of cuts with features, or the folder of a Lhotse Shar (see
    `icefall-kd shar`). OUT_CUTS is the same manifest with the targets on its cuts.
    Several teachers of one recipe, --exp-dir A,B, are averaged, or one is chosen for
    each cut. The same command continues a run that was cut short. Under torchrun each
    process is a job; on a cluster, give each its --job. The last job joins their
    manifests.

    MODEL FLAGS are the model options of the recipe's decode.py, such as
    --num-encoder-layers. Give them, and --bpe-model, for a checkpoint that holds
    parameters alone, such as a released pretrained.pt; and give --chunk-size and
    --left-context-frames for a streaming teacher.
    """
    cuts = ManifestCuts(in_cuts)
    storage_dir = storage_dir or _default_store(out_cuts)
    _check_places(in_cuts, out_cuts, storage_dir)
    check_s_range(s_range)
    seconds = parse_seconds(cut_seconds)
    keep, keep_lattice = _form(keep), _form(keep_lattice)
    keep_hidden, keep_simple = _form(keep_hidden), _form(keep_simple)
    require(
        not keep_lattice or teacher.bpe_model,
        "--keep-lattice needs the labels of the transcripts: give --bpe-model",
    )
    require(
        not (weights and teacher_field),
        "--teacher-weights and --teacher-field are both given: give one of them",
    )
    job, num_jobs = job_of(num_jobs, job)
    shares = _numbers(weights)
    codecs, quantizers = from_command_line(keep_hidden)

    teachers = teacher.load()
    settings = teachers[0].settings
    names = [loaded.name() for loaded in teachers]
    tokenizer = teacher.tokenizer(settings)
    choose = _chooser(teacher_field) if teacher_field else None
    checks = [check for check in (check_supervision, choose) if check]
    transcripts = TranscriptCheck(tokenizer) if keep_lattice else None
    if transcripts:
        checks.append(transcripts)
    surveyed = survey(in_cuts, int(settings["feature_dim"]), checks, seconds)
    if transcripts:
        transcripts.check(surveyed.total, in_cuts)
    fingerprint = Fingerprint.of(
        joint_name(names, shares, teacher_field),
        settings,
        surveyed.features,
        hash_tokens(token_names(tokenizer)) if tokenizer is not None else None,
        ctc=keep,
        lattice=keep_lattice,
        s_range=s_range if keep_lattice else 0,
        hidden=",".join(map(str, codecs)),
        further_kinds={"simple": keep_simple} if keep_simple else {},
    )
    layers = [codec.layer for codec in codecs]
    models = [loaded.model for loaded in teachers]
    running = Teacher(
        models,
        shares,
        choose,
        layers,
        with_ctc=bool(fingerprint.ctc),
        with_simple=bool(keep_simple),
    )
    torch.set_num_threads(num_threads or os.cpu_count() or 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", number_of("LOCAL_RANK") or 0)
    options = {"tokenizer": tokenizer, "cut_seconds": seconds, "device": device}
    out = Path(out_cuts)
    with ExitStack() as stack:
        stack.callback(running.close)
        encoder = RecordEncoder(
            fingerprint,
            lambda codec: (
                load_quantizer(quantizers[codec.layer]) if codec.codes else None
            ),
        )
        rate = rehearse(cuts, running, encoder, fingerprint, **options)
        surveyed.warn()
        writer = stack.enter_context(
            TargetWriter(out, storage_dir, fingerprint, overwrite, job, num_jobs)
        )
        _write_small_files(storage_dir, tokenizer, codecs, quantizers)
        amount = speech(surveyed.total, surveyed.seconds)
        part = f", of all {num_jobs} jobs" if num_jobs > 1 else ""
        begin(
            f"The teacher's targets of {amount}{part}: about "
            f"{size_of(rate * surveyed.seconds)}, by the first cut, into "
            f"{storage_dir}, where {free_space(storage_dir)} are free."
        )
        dump_targets(
            cuts,
            running,
            writer,
            max_duration=max_duration,
            num_workers=num_workers,
            total=-(-surveyed.total // num_jobs),
            **options,
        )
    _summarize(writer, storage_dir, in_cuts, out, overwrite)
    if stats and out.is_file():
        from icefall_kd.cli.stats import print_stats

        print_stats(CutSet.from_file(out))
    if num_jobs == 1:
        click.echo(NEXT)


def _form(text: str) -> str:
    """A form as the fingerprint has it: "" for none."""
    return "" if text == "none" else text


def parse_seconds(text: str) -> Seconds:
    """The durations of the shortest and of the longest cut that get targets.

    Args:
      text: Such as "1:20"; "" for all durations.

    Raises:
      KDError: a text that is no two numbers, or a first that is above the second.
    """
    if not text:
        return ANY_SECONDS
    try:
        shortest, longest = map(float, text.split(":"))
    except ValueError:
        shortest = longest = math.nan
    require(
        0 <= shortest <= longest,
        f"--cut-seconds is {text!r}: give the seconds of the shortest and of the "
        "longest cut that is trained on, such as 1:20",
    )
    return shortest, longest


def _numbers(text: str) -> Optional[List[float]]:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise KDError(
            f"--teacher-weights is {text!r}: give a number for each teacher, with "
            "commas"
        ) from None


def _chooser(name: str) -> Callable[[Cut], int]:
    """Reads the number of a cut's teacher from its field, or its supervision's."""

    def choose(cut: Cut) -> int:
        for owner in (cut, *cut.supervisions):
            value = (owner.custom or {}).get(name)
            if value is not None:
                break
        require(
            isinstance(value, int) and not isinstance(value, bool),
            f"the field {name!r} of cut {cut.id} is {value!r}, and must be the number "
            "of its teacher among --exp-dir, from 0 on: write it into the cut's custom "
            "fields",
        )
        return value

    return choose


def _default_store(out_cuts: str) -> str:
    out = Path(out_cuts)
    return str(out.parent / (out.name.split(".jsonl")[0] + "_kd"))


def _check_places(in_cuts: str, out_cuts: str, storage_dir: str) -> None:
    """Refuse an output that can't be written, or that would be written over."""
    check_new_file(out_cuts, "OUT_CUTS", MANIFEST)
    check_new_folder(storage_dir, "the folder of the targets")
    check_not_overwritten(in_cuts, out_cuts, "OUT_CUTS")
    require(
        Path(storage_dir).resolve() != Path(out_cuts).resolve(),
        f"--storage-dir and OUT_CUTS are both {out_cuts}: give --storage-dir the name "
        "of a folder",
    )


def _write_small_files(
    storage_dir: str,
    tokenizer: Any,
    codecs: Sequence[HiddenCodec],
    quantizers: Dict[Layer, Path],
) -> None:
    """Put the teacher's tokens and quantizers beside the records."""
    if tokenizer is not None:
        write_token_names(storage_dir, token_names(tokenizer))
    for codec in codecs:
        if codec.layer in quantizers:
            target = codec.quantizer_file(storage_dir)
            with replacing(target, shared=True) as temporary:
                shutil.copyfile(quantizers[codec.layer], temporary)


def _summarize(
    writer: TargetWriter, storage_dir: str, in_cuts: str, out: Path, overwrite: bool
) -> None:
    """Print what was stored; join the jobs' manifests after the last one."""
    text = f"{len(writer)} cuts with targets, "
    if writer.left_out:
        text += f"{len(writer.left_out)} without, "
    text += f"{writer.bytes_written / 1e6:.1f} MB written, records in {storage_dir}"
    num_jobs = writer.num_jobs
    if num_jobs == 1:
        click.echo(f"{out}: {text}")
        return
    click.echo(f"this job: {text}")
    manifests = [job_manifest(out, j, num_jobs) for j in range(num_jobs)]
    if not overwrite and all(path.is_file() for path in manifests):
        combine_jobs(in_cuts, out, num_jobs)
    else:
        click.echo(
            "when all jobs are done: icefall-kd combine --num-jobs "
            f"{num_jobs} {in_cuts} {out}"
        )

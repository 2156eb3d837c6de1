"""Decodes cuts with a teacher or a student, and writes icefall's result files."""

import json
import os
import reprlib
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Optional

import click
import torch

from icefall_kd.cli.amounts import begin, speech
from icefall_kd.cli.options import MODEL_FLAGS, Place, Text, command, teacher_options
from icefall_kd.cli.search_options import (
    SearchOptions,
    check_one_chunk_size,
    search_options,
)
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError, disk_errors, need_kaldialign, require
from icefall_kd.files import check_new_folder, replacing
from icefall_kd.student.count import count_multiply_adds
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.targets.fingerprint import STREAMING
from icefall_kd.teacher.spec import LoadedTeacher, TeacherSpec
from icefall_kd.transcripts.cuts import CutsToDecode, hash_of_manifest, name_of_set
from icefall_kd.transcripts.decoding import decode_cuts, rehearse
from icefall_kd.transcripts.first_answers import FirstAnswers
from icefall_kd.transcripts.journal import Journal
from icefall_kd.transcripts.outcome import Outcome, table_of
from icefall_kd.transcripts.recognizer import CAUSAL_PADDING, Method, Recognizer
from icefall_kd.zipformer import has_ctc

VERSION = 1  # of the journal's lines
LONGEST_NAME = 100  # bytes of a set's name; file names have 255


EXAMPLE = """
icefall-kd decode \\
  --recipe ./zipformer --exp-dir zipformer_kd/exp/kd --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --cuts data/fbank/librispeech_cuts_test-clean.jsonl.gz
"""


@command(context_settings=MODEL_FLAGS, example=EXAMPLE)
@teacher_options()
@click.option(
    "--cuts",
    type=Place(),
    required=True,
    metavar="CUTS",
    help="A manifest of cuts with features, or the folder of a Lhotse Shar. Cuts "
    "without a text are decoded and not scored.",
)
@search_options
@click.option(
    "--test-set",
    type=Text(),
    default="",
    metavar="NAME",
    help="The set's name in the names of result files. Default: what follows cuts_ in "
    "the manifest's name.",
)
@click.option(
    "--unit",
    type=click.Choice(("WER", "CER")),
    default="WER",
    help="What the result files have: words or, as recipes for Chinese, characters.",
)
@click.option(
    "--res-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The folder of the results. Default: that of icefall's decode.py, the "
    "method's in --exp-dir.",
)
@click.option(
    "--cascade",
    type=Place(optional=True),
    default="",
    metavar="FILE",
    help="Decode those cuts alone of which the student is unsure, by a cascade.json of "
    "`icefall-kd cascade`.",
)
@click.option(
    "--answers",
    type=Place(optional=True),
    default="",
    metavar="FILE",
    help="With --cascade: the student's utterances-*.jsonl of the same cuts.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Decode anew what is decoded already.",
)
def decode(
    teacher: TeacherSpec,
    cuts: str,
    search: SearchOptions,
    test_set: str,
    unit: str,
    res_dir: str,
    cascade: str,
    answers: str,
    overwrite: bool,
) -> None:
    """Decode cuts with a model, teacher or student, and say what it cost.

    The results are icefall's recogs-, errs- and wer-summary- files, in the folder and
    by the names of its decode.py, so that `icefall-kd report` shows them. The table at
    the end, and the file decoding-*.json, have error rates, the real-time factors of
    encoder and search (RTF, seconds for a second of audio), the latency of an
    utterance, which is the time of its batch, and the peak of memory. The same command
    continues a decoding that was stopped.

    MODEL FLAGS are the model options of the recipe's decode.py, as for `icefall-kd
    dump`. A causal model needs --chunk-size and --left-context-frames.
    """
    check_names(teacher, cascade, answers)
    method, window = search.method, search.window
    own = Path(teacher.one_folder("decode"))
    folder = Path(res_dir or own / ("cascade" if cascade else method.name))
    test_set = test_set or name_of_set(cuts)
    _check_outputs(folder, test_set)
    model = teacher.load_one("decode")
    suffix = suffix_of(teacher, model.settings, method, window, cascade)
    tokenizer = teacher.tokenizer(model.settings)
    num_features = int(model.settings["feature_dim"])
    known = CutsToDecode(cuts, num_features, search.rate).survey()
    header = {**_header(model, method, known, search.rate), "window": window}
    first = None
    if cascade:
        first = FirstAnswers.read(Path(cascade), Path(answers), header, known.texts)
        header["cascade"] = first.cascade.as_dict()
    device, reader = search.device(), search.reader(num_features)
    with ExitStack() as stack:
        recognizer = Recognizer(model.model, model.settings, method, device, window)
        stack.callback(recognizer.close)
        # What can't be decoded is refused before there is a file.
        short = next(c for c in ManifestCuts(cuts) if c.id == known.shortest[0])
        rehearse(short, reader, recognizer, search.max_duration)
        path = folder / f"utterances-{test_set}-{suffix}.jsonl"
        journal = stack.enter_context(Journal(path, header, overwrite))
        ids = list(known.texts) if first is None else first.asked
        amount = speech(len(known.texts), known.seconds)
        asked = "" if first is None else f"{len(ids):,} of "
        begin(f"Decoding {asked}{amount}, by {method.name} into {folder}.")
        decode_cuts(
            ManifestCuts(cuts),
            reader,
            recognizer,
            journal,
            search.max_duration,
            search.num_workers,
            ids,
        )
    outcome = Outcome(folder, test_set, suffix, method, known, journal, first)
    with disk_errors(folder, outcome.utterances):
        errors = outcome.write(tokenizer, unit)
    summary = outcome.summary(errors)
    summary.update(
        exp_dir=teacher.exp_dir,
        parameters=sum(p.numel() for p in model.model.parameters()),
        device=str(device),
        threads=torch.get_num_threads(),
        max_duration=search.max_duration,
        date=datetime.now().strftime("%Y-%m-%d-%H-%M-%S"),
    )
    name = f"{test_set}-{suffix}"
    path = folder / f"decoding-{name}.json"
    with disk_errors(path, outcome.utterances), replacing(path, shared=True) as new:
        new.write_text(json.dumps(summary, indent=1) + "\n", "utf8")
    click.echo(text_table(table_of(summary), left=2))
    click.echo(f"Results: {folder}/*-{name}.*")
    click.echo("Next: compare models by `icefall-kd report`.")


def check_names(teacher: TeacherSpec, cascade: str, answers: str) -> None:
    """Refuse options that don't go together.

    Args:
      teacher: Names the model.
      cascade: The option --cascade.
      answers: The option --answers.
    """
    remedy = "give --bpe-model the model's bpe.model or lang folder"
    require(teacher.bpe_model, f"the text of tokens is needed: {remedy}")
    require(
        bool(cascade) == bool(answers),
        "--cascade and --answers go together: give the threshold's cascade.json and "
        "the student's utterances-*.jsonl",
    )


def _check_outputs(folder: Path, test_set: str) -> None:
    """Refuse what can be refused before the model is loaded."""
    is_name = "/" not in test_set and test_set.isprintable() and test_set.strip()
    require(
        is_name and len(os.fsencode(test_set)) <= LONGEST_NAME,
        f"--test-set is {reprlib.repr(test_set)}, and must be a part of a file's name, "
        "such as test-clean",
    )
    need_kaldialign()
    check_new_folder(str(folder), "--res-dir")


def suffix_of(
    teacher: TeacherSpec,
    settings: Dict[str, Any],
    method: Method,
    window: Optional[float] = None,
    cascade: str = "",
) -> str:
    """The end of the names of result files, which is that of icefall's decode.py.

    Args:
      teacher: Names the checkpoints.
      settings: The model's.
      method: The search.
      window: The option --window. This and the next one icefall has not.
      cascade: The option --cascade.

    Raises:
      KDError: a causal model without one size of chunks and left context.
    """
    number = f"epoch-{teacher.epoch}"
    if teacher.iteration:
        number = f"iter-{teacher.iteration}"
    suffix = f"{number}_avg-{teacher.avg}"
    if settings.get("causal"):
        check_one_chunk_size(settings)
        for option, text in zip(STREAMING, ("chunk", "left-context")):
            suffix += f"_{text}-{settings.get(option)}"
        if method.causal_padding != CAUSAL_PADDING:
            suffix += f"_causal-padding-{method.causal_padding}"
    suffix += method.suffix(settings.get("context_size", 2))
    if window is not None:
        suffix += f"_window-{window:g}"
    if teacher.use_averaged_model:
        suffix += "_use-averaged-model"
    return suffix + ("_cascade" if cascade else "")


def _header(
    model: LoadedTeacher, method: Method, known: CutsToDecode, rate: Any
) -> Dict[str, Any]:
    """What the results depend on, and what a cascade asks of a decoding."""
    return {
        "decoding": VERSION,
        "model": model.name(),
        "method": method.options(),
        "ctc": has_ctc(model.model),
        "manifest": hash_of_manifest(known.path),
        "sampling_rate": rate,
        "multiply_adds": _multiply_adds(model.settings, known),
    }


def _multiply_adds(settings: Dict[str, Any], known: CutsToDecode) -> Optional[float]:
    """For a second of audio, in utterances of the cuts' mean length; None: unknown."""
    seconds = max(0.1, known.seconds / len(known.texts))
    try:
        return count_multiply_adds(settings, seconds)["all"]
    except (KDError, KeyError):  # a model that is not counted, as with adapters
        return None

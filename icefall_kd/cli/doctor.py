"""Shows what is installed, and whether a teacher, cuts and a student fit together."""

import argparse
import re
import shlex
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Tuple

import click

from icefall_kd.cli.options import MODEL_FLAGS, Place, Text, command, teacher_options
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError, first_line, require
from icefall_kd.files import check_new_file
from icefall_kd.training.options import add_options, distils, flags_in_errors

if TYPE_CHECKING:  # the command also runs where torch is missing
    from icefall_kd.teacher.spec import LoadedTeacher, TeacherSpec

# name of the module, of its distribution, whether it is needed, how to get it
_PARTS: List[Tuple[str, str, str, str]] = [
    ("torch", "torch", "needed", "pip install torch"),
    ("lhotse", "lhotse", "needed", "pip install lhotse urllib3"),
    ("k2", "k2", "one of these", "k2's wheel for your torch"),
    ("fast_rnnt", "fast_rnnt", "one of these", "tools/install_native.py fast_rnnt"),
    ("sentencepiece", "sentencepiece", "recipe", "pip install sentencepiece"),
    ("torchaudio", "torchaudio", "recipe", "pip install torchaudio"),
    ("kaldialign", "kaldialign", "recipe", "pip install kaldialign"),
    ("onnx", "onnx", "export", "pip install onnx"),
    ("onnxruntime", "onnxruntime", "export", "pip install onnxruntime"),
    ("sherpa_onnx", "sherpa-onnx", "export", "pip install sherpa-onnx"),
    ("matplotlib", "matplotlib", "report", "pip install matplotlib"),
    ("zipformer.modules", "zipformer", "egs/digits", "pip install zipformer==0.1.3"),
    ("icefall", "icefall", "egs/librispeech", "put icefall on PYTHONPATH"),
    ("kaldifeat", "kaldifeat", "optional", "tools/install_native.py kaldifeat"),
]


_BROKEN = "it is there, and can't be imported"


def _version(module: str, distribution: str) -> Tuple[str, str]:
    """The version, or "" where the module can't be imported, and then why it can't.

    The reason is "" for a module that is not there.
    """
    try:
        imported = import_module(module)
    except ModuleNotFoundError as e:
        there = e.name not in (module, module.partition(".")[0])
        return "", f"{_BROKEN}: {first_line(e)}" * there
    except Exception as e:  # a broken binary raises whatever it likes
        return "", f"{_BROKEN}: {first_line(e)}"
    try:
        return metadata.version(distribution), ""
    except metadata.PackageNotFoundError:
        return str(getattr(imported, "__version__", "found")), ""


def _installed() -> None:
    """Print the table of installed parts, and refuse where one is missing."""
    rows = []
    for module, distribution, need, install in _PARTS:
        version, problem = _version(module, distribution)
        rows.append((distribution, version, need, problem or install))
    installed = {name for name, version, *_ in rows if version}
    cells = []
    for name, version, need, remedy in rows:
        state = "broken" if remedy.startswith(_BROKEN) else "missing"
        cells.append((name, version or state, need, "" if version else remedy))
    click.echo(text_table([("part", "version", "for", "to install"), *cells], left=4))
    engine = next((e for e in ("k2", "fast_rnnt") if e in installed), None)
    click.echo(f"transducer engine: {engine or 'none'}")
    missing = [n for n, v, need, _ in rows if need == "needed" and not v]
    if missing or engine is None:
        what = ", ".join(missing) or "k2 and fast_rnnt"
        click.echo(f"icefall_kd: error: missing {what}: see the last column", err=True)
        raise SystemExit(1)


def _row(name: str, text: str) -> None:
    click.echo(f"{name:<15}{text}")


def _heads(model) -> str:
    from icefall_kd.zipformer import has_ctc, has_transducer

    heads = {"CTC": has_ctc(model), "transducer": has_transducer(model)}
    return " and ".join(name for name, exists in heads.items() if exists) or "no head"


def _load_teacher(spec: "TeacherSpec") -> Tuple["LoadedTeacher", Optional[Any]]:
    """The teacher and its tokenizer, each with a row of the table."""
    teacher = spec.load_one("doctor")
    settings = teacher.settings
    size = sum(p.numel() for p in teacher.model.parameters())
    heads = _heads(teacher.model)
    text = f"{size:,} parameters, {heads}, {settings['vocab_size']} tokens"
    _row("teacher", text + (", causal" if settings.get("causal") else ""))
    tokenizer = spec.tokenizer(settings)
    if tokenizer is not None:
        size = tokenizer.get_piece_size()
        _row("tokens", f"{size} in {spec.bpe_model}, as the teacher has")
    return teacher, tokenizer


def _options_of(words: str) -> Dict[str, Any]:
    """The ``--kd-*`` options of a training that gets these words."""

    def refuse(message: str) -> None:
        raise KDError(f"--kd {words!r} is no option of distillation: {message}")

    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.error = refuse
    try:
        options = shlex.split(words)
    except ValueError as e:
        raise KDError(
            f"--kd {words!r} can't be split into words ({e}): close its quotation"
        ) from None
    add_options(parser, options)
    params = vars(parser.parse_args(options))
    if not distils(params):
        raise KDError(f"--kd {words!r} gives no term a weight: distillation is off")
    return params


def _is_among(teacher: str, teachers: str) -> bool:
    """Whether a teacher is one of those that a fingerprint names.

    Args:
      teacher: Its name, which has commas where a causal teacher has several chunks.
      teachers: The fingerprint's: one name, or several with commas, with a weight
        after each (``name*2``) or the field that chooses among them at the end.
    """
    return bool(re.search(rf"(^|,){re.escape(teacher)}($|[,*]| by )", teachers))


def _write_flags(path: str, recipe: str, settings: Dict[str, Any]) -> None:
    """Write the options by which the recipe's scripts build a model, in one line."""
    from icefall_kd.files import replacing
    from icefall_kd.teacher.recipe import flags_of, import_train, model_names

    line = flags_of(settings, model_names(import_train(recipe)))
    try:
        with replacing(Path(path), shared=True) as temporary:
            temporary.write_text(line + "\n", "utf8")
    except OSError as e:
        raise KDError(
            f"--write-flags {path} can't be written ({e.strerror}): give a file in a "
            "folder that is there"
        ) from None


def _check_targets(
    path: str, teacher: "LoadedTeacher", tokenizer: Optional[Any], kd: str
) -> None:
    """Refuse targets of another teacher, of other tokens, or that a loss can't use."""
    from icefall_kd.targets.cuts import ManifestCuts
    from icefall_kd.targets.dataset import store_fingerprint
    from icefall_kd.targets.store import is_left_out
    from icefall_kd.tokens import hash_tokens, token_names

    left_out = 0

    def cuts_of_training() -> Iterator[Any]:
        nonlocal left_out
        for cut in ManifestCuts(path):
            left_out += is_left_out(cut)
            if not is_left_out(cut):
                yield cut

    settings, name = teacher.settings, teacher.name()
    fingerprint, store = store_fingerprint(cuts_of_training())
    tokens = hash_tokens(token_names(tokenizer)) if tokenizer is not None else None
    blank_id = settings.get("blank_id", 0)
    fingerprint.check_student(settings["vocab_size"], blank_id, tokens)
    require(
        _is_among(name, fingerprint.teacher),
        f"the targets in {store} are of the teacher {fingerprint.teacher[:8]} and this "
        f"one is {name[:8]} (hashes of their parameters): give the --exp-dir, --epoch "
        "and --avg that they were dumped with, or dump them again",
    )
    kinds = {"CTC": fingerprint.ctc, "lattice": fingerprint.lattice}
    kinds.update(hidden=fingerprint.hidden, **fingerprint.further_kinds)
    forms = ", ".join(f"{kind} {form}" for kind, form in kinds.items() if form)
    _row("targets", f"{forms}, of this teacher, in {store}")
    if left_out:
        _row("", f"{left_out} cuts go without targets: train with --kd-missing hard")
    if kd:
        _check_loss(kd, fingerprint, store, left_out)


def _check_loss(kd: str, fingerprint: Any, store: str, left_out: int) -> None:
    """Refuse options of distillation that the targets are not enough for."""
    from icefall_kd.terms.joint import JointKDLoss

    params = _options_of(kd)
    with flags_in_errors():
        joint = JointKDLoss.from_params(params, num_epochs=1)
    require(
        not left_out or params["kd_missing"] != "refuse",
        f"{left_out} cuts of the manifest go without targets, as `icefall-kd dump` "
        "left them out, and --kd-missing is refuse: give --kd-missing hard, so that "
        "they have the hard loss alone",
    )
    with flags_in_errors():
        joint.check_store(fingerprint, store)
    _row("loss", str(joint))


def _student(folder: str, recipe: str, settings: Dict[str, Any]) -> None:
    """Refuse a student of other tokens, or flags that its checkpoint contradicts."""
    from icefall_kd.teacher.checkpoints import load_checkpoint
    from icefall_kd.teacher.loader import settings_of
    from icefall_kd.teacher.recipe import import_train

    path, flags = Path(folder) / "epoch-1.pt", Path(folder) / "student_flags"
    for file in (path, flags):
        require(
            file.is_file(),
            f"{folder} has no {file.name}: give --student-dir the folder that "
            "`icefall-kd student` wrote",
        )
    train = import_train(recipe)
    words = _words_of(flags)
    student = settings_of(load_checkpoint(path), path, train, words)
    _check_complete(flags, words, train, student)
    for name in ("vocab_size", "blank_id"):
        require(
            student.get(name, 0) == settings.get(name, 0),
            f"the student's {name} in {path} is {student.get(name)} and the teacher's "
            f"{settings.get(name)}: build it from this teacher",
        )
    _row("student", f"{path}, and its flags fit it")


def _words_of(flags: Path) -> List[str]:
    try:
        return flags.read_text("utf8").split()
    except UnicodeDecodeError as e:
        raise KDError(
            f"{flags} is not in UTF-8 (byte {e.start}): build the student again with "
            "`icefall-kd student`"
        ) from None


def _check_complete(flags: Path, words: List[str], train, settings: Dict[str, Any]):
    """Refuse a file that lacks flags without which the recipe's defaults hold."""
    from icefall_kd.teacher.recipe import flags_of, model_names, params_of_flags

    needed = params_of_flags(train, flags_of(settings, model_names(train)).split())
    params = params_of_flags(train, words)
    for name, value in needed.items():
        require(
            name in params,
            f"{flags} lacks --{name.replace('_', '-')} {value}, which the student "
            "beside it was built with: build it again with `icefall-kd student`",
        )


EXAMPLE = """
icefall-kd doctor
icefall-kd doctor \\
  --recipe ./zipformer --exp-dir zipformer/exp --epoch 30 --avg 9 \\
  --bpe-model data/lang_bpe_500/bpe.model \\
  --cuts data/fbank/librispeech_cuts_dev-clean.jsonl.gz
"""


@command(context_settings=MODEL_FLAGS, example=EXAMPLE)
@teacher_options(required=False)
@click.option(
    "--cuts",
    type=Place(optional=True),
    default="",
    metavar="CUTS",
    help="A manifest of cuts for this teacher, with or without its targets.",
)
@click.option(
    "--student-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The folder that `icefall-kd student` wrote for this teacher.",
)
@click.option(
    "--kd",
    type=Text(),
    default="",
    metavar="OPTIONS",
    help="The --kd-* options that train.py will get, in one text, such as '--kd-config "
    "kd.yaml'.",
)
@click.option(
    "--write-flags",
    type=Place(optional=True),
    default="",
    metavar="FILE",
    help="Write the teacher's model options, which decode.py needs, into this file.",
)
def doctor(
    teacher: "TeacherSpec", cuts: str, student_dir: str, kd: str, write_flags: str
) -> None:
    """Show what is installed, and how to get what is missing.

    With a teacher, check also whether its tokens, the cuts, the targets on these and a
    student fit it. The exit status is 1 if something is missing or does not fit.
    """
    subjects = (cuts, student_dir, kd, write_flags)
    subjects += (teacher.model_flags, teacher.bpe_model)
    has_teacher = bool(teacher.exp_dir and teacher.recipe)
    require(
        has_teacher or not any((teacher.exp_dir, teacher.recipe, *subjects)),
        "cuts, a student, tokens, --kd, --write-flags and model flags are about a "
        "teacher: give --recipe and --exp-dir",
    )
    if write_flags:
        check_new_file(write_flags, "--write-flags")
    require(
        cuts or not kd,
        "--kd is checked against targets: give --cuts that carry them",
    )
    _installed()
    if not has_teacher:
        return
    teacher.one_folder("doctor")
    click.echo()
    loaded, tokenizer = _load_teacher(teacher)
    if cuts:
        _check_cuts(cuts, loaded, tokenizer, kd)
    if student_dir:
        _student(student_dir, teacher.recipe, loaded.settings)
    if write_flags:
        _write_flags(write_flags, teacher.recipe, loaded.settings)
    click.echo("These fit together.")


def _check_cuts(
    path: str, teacher: "LoadedTeacher", tokenizer: Optional[Any], kd: str
) -> None:
    """Refuse cuts that the teacher can't run on, and targets that don't fit it."""
    from icefall_kd.targets.cuts import survey
    from icefall_kd.targets.model_input import check_supervision
    from icefall_kd.targets.store import tracks_with_targets

    with_targets: List[str] = []

    def look_for_targets(cut: Any) -> None:
        if not with_targets and tracks_with_targets(cut):
            with_targets.append(cut.id)

    num_features = int(teacher.settings["feature_dim"])
    surveyed = survey(path, num_features, [check_supervision, look_for_targets])
    features = surveyed.features
    _row(
        "cuts",
        f"{surveyed.total} in {path}, {features.num_features} features of "
        f"{features.type}, {features.sampling_rate} Hz",
    )
    surveyed.warn()
    require(
        with_targets or not kd,
        f"--kd is given and the cuts of {path} have no targets: dump them first",
    )
    if with_targets:
        _check_targets(path, teacher, tokenizer, kd)

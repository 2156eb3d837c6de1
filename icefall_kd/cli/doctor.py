"""What is installed and what is missing; whether a teacher, cuts and a student fit."""

import argparse
import re
import shlex
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Dict, List, Tuple

import click

from icefall_kd.errors import KDError
from icefall_kd.files import check_new_file
from icefall_kd.training.options import add_options, distils, flags_in_errors

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
    ("matplotlib", "matplotlib", "report", "pip install matplotlib"),
    ("zipformer.modules", "zipformer", "egs/digits", "pip install zipformer==0.1.3"),
    ("icefall", "icefall", "egs/librispeech", "put icefall on PYTHONPATH"),
    ("kaldifeat", "kaldifeat", "optional", "tools/install_native.py kaldifeat"),
]


def _version(module: str, distribution: str) -> str:
    """The version, or "" where the module can't be imported."""
    try:
        imported = import_module(module)
    except Exception:  # a broken binary raises whatever it likes
        return ""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(imported, "__version__", "found"))


def _installed() -> None:
    rows = []
    for module, distribution, need, install in _PARTS:
        rows.append((distribution, _version(module, distribution), need, install))
    found = {name for name, version, *_ in rows if version}
    click.echo(f"{'part':<15}{'version':<22}{'for':<17}to install")
    for name, version, need, install in rows:
        shown = "" if version else install
        click.echo(f"{name:<15}{version or 'missing':<22}{need:<17}{shown}".rstrip())
    engine = next((e for e in ("k2", "fast_rnnt") if e in found), None)
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

    heads = [("CTC", has_ctc(model)), ("transducer", has_transducer(model))]
    return " and ".join(name for name, there in heads if there) or "no head"


def _teacher(name: str, options: Dict[str, Any]) -> Tuple[Any, Dict[str, Any], Any]:
    from icefall_kd.teacher.loader import load_recipe_model
    from icefall_kd.tokens import load_tokenizer

    model, settings = load_recipe_model(**options)
    size = sum(p.numel() for p in model.parameters())
    text = f"{size:,} parameters, {_heads(model)}, {settings['vocab_size']} symbols"
    _row(name, text + (", causal" if settings.get("causal") else ""))
    sp, tokens = None, options["bpe_model"]
    if tokens:
        sp = load_tokenizer(tokens, settings["vocab_size"])
        _row("tokens", f"{sp.get_piece_size()} in {tokens}, as the teacher has")
    return model, settings, sp


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
        behind each (``name*2``) or the field that chooses among them at the end.
    """
    return bool(re.search(rf"(^|,){re.escape(teacher)}($|[,*]| by )", teachers))


def _write_flags(path: str, recipe: str, settings: Dict[str, Any]) -> None:
    """Write the options by which the recipe's scripts build a model, in one line."""
    from icefall_kd.cli.student import flags_of, model_names
    from icefall_kd.files import replacing
    from icefall_kd.teacher.loader import import_train

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
    path: str, teacher: str, settings: Dict[str, Any], sp: Any, kd: str
) -> None:
    """Refuse targets of another teacher, of other tokens, or that a loss can't use."""
    from icefall_kd.cli.cuts import open_cuts, readable
    from icefall_kd.targets.dataset import store_fingerprint
    from icefall_kd.targets.store import is_left_out
    from icefall_kd.tokens import hash_tokens, token_names

    left_out = 0

    def cuts_of_training():
        nonlocal left_out
        for cut in readable(open_cuts(path), path):
            left_out += is_left_out(cut)
            if not is_left_out(cut):
                yield cut

    found, store = store_fingerprint(cuts_of_training())
    tokens = hash_tokens(token_names(sp)) if sp is not None else None
    found.check_student(settings["vocab_size"], settings.get("blank_id", 0), tokens)
    kept = [("CTC", found.ctc), ("lattice", found.lattice), ("hidden", found.hidden)]
    said = ", ".join(f"{name} {how}" for name, how in kept if how)
    if teacher and not _is_among(teacher, found.teacher):
        raise KDError(
            f"the targets in {store} are of the teacher {found.teacher[:8]} and this "
            f"one is {teacher[:8]} (hashes of their parameters): give the --exp-dir, "
            "--epoch and --avg that they were dumped with, or dump them again"
        )
    _row("targets", f"{said}, of this teacher, in {store}")
    if left_out:
        _row("", f"{left_out} cuts go without targets: train with --kd-missing hard")
    if kd:
        from icefall_kd.terms.joint import JointKDLoss

        params = _options_of(kd)
        with flags_in_errors():
            joint = JointKDLoss.from_params(params, num_epochs=1)
        if left_out and params["kd_missing"] == "refuse":
            raise KDError(
                f"{left_out} cuts of the manifest go without targets, as "
                "`icefall-kd dump` left them out, and --kd-missing is refuse: give "
                "--kd-missing hard, so that they have the hard loss alone"
            )
        with flags_in_errors():
            joint.check_store(found, store)
        _row("loss", str(joint))


def _student(folder: str, recipe: str, settings: Dict[str, Any]) -> None:
    """Refuse a student of other symbols, or flags that its checkpoint contradicts."""
    from icefall_kd.teacher.loader import import_train, load_checkpoint, settings_of

    path, flags = Path(folder) / "epoch-1.pt", Path(folder) / "student_flags"
    for file in (path, flags):
        if not file.is_file():
            raise KDError(
                f"{folder} has no {file.name}: give --student-dir the folder that "
                "`icefall-kd student` wrote"
            )
    train = import_train(recipe)
    words = _words_of(flags)
    given = settings_of(load_checkpoint(path), path, train, words)
    _check_whole(flags, words, train, given)
    for name in ("vocab_size", "blank_id"):
        if given.get(name, 0) != settings.get(name, 0):
            raise KDError(
                f"the student's {name} in {path} is {given.get(name)} and the "
                f"teacher's {settings.get(name)}: build it from this teacher"
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


def _check_whole(flags: Path, words: List[str], train, settings: Dict[str, Any]):
    """Refuse a file that lacks flags without which the recipe's defaults hold."""
    from icefall_kd.cli.student import flags_of, model_names
    from icefall_kd.teacher.loader import given_flags

    needed = given_flags(train, flags_of(settings, model_names(train)).split())
    given = given_flags(train, words)
    for name, value in needed.items():
        if name not in given:
            raise KDError(
                f"{flags} lacks --{name.replace('_', '-')} {value}, which the student "
                "beside it was built with: build it again with `icefall-kd student`"
            )


def doctor(
    cuts: str,
    student_dir: str,
    kd: str,
    write_flags: str,
    recipe: str,
    exp_dir: str,
    **which,
) -> None:
    more = (cuts, student_dir, kd, write_flags, which["flags"], which["bpe_model"])
    if any((exp_dir, recipe, *more)) and not (exp_dir and recipe):
        raise KDError(
            "cuts, a student, tokens, --kd, --write-flags and model flags are about a "
            "teacher: give --recipe and --exp-dir"
        )
    if write_flags:
        check_new_file(write_flags, "--write-flags")
    if kd and not cuts:
        raise KDError("--kd is looked at beside targets: give --cuts that carry them")
    _installed()
    if not exp_dir:
        return
    from icefall_kd.cli.cuts import survey
    from icefall_kd.targets.fingerprint import name_of
    from icefall_kd.targets.heard import check_supervision
    from icefall_kd.targets.store import tracks_with_targets
    from icefall_kd.teacher.loader import one_teacher_folder

    exp_dir = one_teacher_folder(exp_dir, "doctor")
    click.echo()
    options = {"recipe_dir": recipe, "exp_dir": exp_dir, **which}
    model, settings, sp = _teacher("teacher", options)
    if cuts:
        with_targets = []

        def look(cut) -> None:
            if not with_targets and tracks_with_targets(cut):
                with_targets.append(cut.id)

        surveyed = survey(cuts, int(settings["feature_dim"]), [check_supervision, look])
        features = surveyed.features
        _row(
            "cuts",
            f"{surveyed.total} in {cuts}, {features.num_features} features of "
            f"{features.type}, {features.sampling_rate} Hz",
        )
        surveyed.warn()
        if with_targets:
            _check_targets(cuts, name_of(model, settings), settings, sp, kd)
        elif kd:
            raise KDError(
                f"--kd is given and the cuts of {cuts} have no targets: dump them first"
            )
    if student_dir:
        _student(student_dir, recipe, settings)
    if write_flags:
        _write_flags(write_flags, recipe, settings)
    click.echo("These fit together.")

"""Compares models by what icefall wrote of them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

import click
from lhotse.cut import Cut

from icefall_kd import __version__
from icefall_kd.cli.cuts import open_cuts, readable
from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.report.logs import read_training
from icefall_kd.report.manifests import manifests_of, seconds_of, stored_by
from icefall_kd.report.page import to_html, to_lines, to_markdown
from icefall_kd.report.plots import need_matplotlib
from icefall_kd.report.results import read_decodings, split_last
from icefall_kd.report.tables import Audio, Model, Report, blocks_of, rate_tables
from icefall_kd.report.words import WORDS


def report(
    out_dir: str,
    models: Sequence[str],
    teacher: str = "",
    baseline: str = "",
    manifest_dir: str = "",
    targets: Sequence[str] = (),
    unit: str = "WER",
    lang: str = "en",
    title: str = "",
) -> None:
    """Write the report of ``models`` into ``out_dir``, and print the rates.

    Args:
      models: ``NAME=EXP_DIR`` each.
      teacher: A name; default: the first that is not the baseline's.
      baseline: Likewise: the first that is not the teacher's.

    Raises:
      KDError: what can't be read, or names that don't fit each other.
    """
    need_matplotlib()
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise KDError(f"{out} is a file, and OUT_DIR must be a folder: give another")
    if manifest_dir and not Path(manifest_dir).is_dir():
        raise KDError(
            f"--manifest-dir {manifest_dir} is not a folder: give that of the test "
            "sets' manifests, such as data/fbank"
        )
    folders = _named(models)
    teacher, baseline = _roles(list(folders), teacher, baseline)
    found = [_read_model(name, exp) for name, exp in folders.items()]
    words = WORDS[lang]
    made = Report(
        found,
        teacher,
        baseline,
        unit,
        _read_audio(found, manifest_dir),
        {path: stored_by(_cuts(path)) for path in dict.fromkeys(targets)},
        words,
    )
    title = " ".join(title.split()) or words["title"]
    blocks = blocks_of(made)
    footer = words["footer"].format(version=__version__)
    ending = "" if lang == "en" else f".{words['lang']}"
    pages = {
        out / f"report{ending}.md": to_markdown(title, blocks, footer),
        out / f"report{ending}.html": to_html(title, blocks, footer, words["lang"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path, text in pages.items():
            temporary = stack.enter_context(replacing(path))
            temporary.write_text(_writable(text), encoding="utf8")
    for kind, table in rate_tables(made).items():
        click.echo(words["rates"].format(unit=made.unit_of(kind)))
        click.echo(_writable(to_lines(table)) + "\n")
    for path in pages:
        click.echo(path)


def _named(models: Sequence[str]) -> Dict[str, Path]:
    found: Dict[str, Path] = {}
    for text in models:
        name, equals, exp = text.partition("=")
        name = " ".join(name.split())
        if not (name and equals and exp):
            raise KDError(
                f"--model {text!r} is not NAME=EXP_DIR: give a name and a folder, as "
                "in --model teacher=zipformer/exp"
            )
        if name in found:
            raise KDError(
                f"two models are called {name!r}, {found[name]} and {exp}: give each a "
                "name of its own"
            )
        found[name] = Path(exp)
    return found


def _roles(names: List[str], teacher: str, baseline: str) -> Tuple[str, str]:
    for option, name in (("teacher", teacher), ("baseline", baseline)):
        if name and name not in names:
            raise KDError(
                f"--{option} is {name!r}, and the models are {', '.join(names)}: give "
                "one of these"
            )
    if teacher and teacher == baseline:
        raise KDError(
            f"--teacher and --baseline are both {teacher!r}: give the student without "
            "KD as --baseline"
        )
    if len(names) < 2:
        return "", ""
    teacher = teacher or next(n for n in names if n != baseline)
    return teacher, baseline or next(n for n in names if n != teacher)


def _read_model(name: str, exp: Path) -> Model:
    if not exp.is_dir():
        raise KDError(
            f"the experiment folder {exp} of {name!r} does not exist: mend --model"
        )
    training = read_training(exp)
    last, others = split_last(read_decodings(exp))
    if training is None and not last:
        raise KDError(
            f"the experiment folder {exp} of {name!r} has neither log/log-train-* nor "
            "METHOD/wer-summary-*: give the --exp-dir of train.py and decode.py"
        )
    return Model(name, exp, training, last, others)


def _read_audio(models: Sequence[Model], manifest_dir: str) -> Audio:
    found = Audio(manifest_dir)
    if not manifest_dir:
        return found
    for test_set in sorted({s for m in models for d in m.decodings for s in d.rates}):
        paths = manifests_of(Path(manifest_dir), test_set)
        if len(paths) > 1:
            found.several[test_set] = [path.name for path in paths]
        elif paths:
            found.seconds[test_set] = seconds_of(_cuts(str(paths[0])))
    return found


def _cuts(path: str) -> Iterator[Cut]:
    return readable(open_cuts(path), path)


def _writable(text: str) -> str:
    """``text`` with ``?`` for what is not UTF-8, such as in the name of a file."""
    return text.encode("utf8", "replace").decode()

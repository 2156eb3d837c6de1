"""Compares models by icefall's logs and results."""

from contextlib import ExitStack
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

import click
from lhotse.cut import Cut

from icefall_kd import __version__
from icefall_kd.cli.options import Place, Text, command
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError, require
from icefall_kd.files import replacing
from icefall_kd.report.comparison import Comparison, Model, TestAudio
from icefall_kd.report.logs import read_training
from icefall_kd.report.manifests import manifests_of, measure_targets
from icefall_kd.report.page import to_html, to_markdown
from icefall_kd.report.plots import need_matplotlib
from icefall_kd.report.results import read_decodings, split_last
from icefall_kd.report.tables import blocks_of, rate_tables
from icefall_kd.report.words import words_of
from icefall_kd.targets.cuts import ManifestCuts


@command()
@click.argument("out_dir", type=Place())
@click.option(
    "--model",
    "models",
    type=Text(),
    multiple=True,
    required=True,
    metavar="NAME=EXP_DIR",
    help="A model's name and its experiment folder. Give the option once for each "
    "model.",
)
@click.option(
    "--teacher",
    type=Text(),
    default="",
    metavar="NAME",
    help="The teacher's name. Default: the first model.",
)
@click.option(
    "--baseline",
    type=Text(),
    default="",
    metavar="NAME",
    help="The student that the others are compared with. Default: the second model.",
)
@click.option(
    "--manifest-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The folder of the test sets' manifests, such as data/fbank: for the RTF "
    "(real-time factor).",
)
@click.option(
    "--targets",
    type=Place(),
    multiple=True,
    metavar="MANIFEST",
    help="A manifest that `icefall-kd dump` wrote. The option may be given more than "
    "once.",
)
@click.option(
    "--unit",
    type=click.Choice(["WER", "CER"]),
    default="WER",
    help="The unit of the recipe's error rates. Give CER where it scores characters, "
    "as in Chinese.",
)
@click.option(
    "--lang",
    type=click.Choice(["en", "zh"]),
    default="en",
    help="The language of the report: English or Chinese.",
)
@click.option(
    "--title",
    type=Text(),
    default="",
    metavar="TEXT",
    help="The report's title. Default: one for what is compared.",
)
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
    """Compare teacher and students in OUT_DIR/report.md and OUT_DIR/report.html.

    The report has error rates, parameters, RTF, bytes of targets, losses and weights.
    They are read from the logs and results that train.py and decode.py left in the
    experiment folders:

    \b
      icefall-kd report --model teacher=zipformer/exp \\
        --model "no KD=zipformer_kd/exp/student" \\
        --model "KD=zipformer_kd/exp/student-kd" \\
        --manifest-dir data/fbank report

    The Markdown is for icefall's RESULTS.md, the HTML has the curves too.
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
    folders = _folders_by_name(models)
    teacher, baseline = _roles(list(folders), teacher, baseline)
    loaded = [_read_model(name, exp) for name, exp in folders.items()]
    audio = _read_audio(loaded, manifest_dir)
    sizes = {path: measure_targets(_cuts(path)) for path in dict.fromkeys(targets)}
    words = words_of(lang)
    data = Comparison(loaded, teacher, baseline, unit, audio, sizes, words)
    blocks = blocks_of(data)
    title = " ".join(title.split()) or words["title"]
    footer = data.text("footer", version=__version__)
    ending = "" if lang == "en" else f".{words['lang']}"
    pages = {
        out / f"report{ending}.md": to_markdown(title, blocks, footer),
        out / f"report{ending}.html": to_html(title, blocks, footer, words["lang"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path, text in pages.items():
            temporary = stack.enter_context(replacing(path))
            temporary.write_text(_utf8(text), encoding="utf8")
    for kind, table in rate_tables(data).items():
        click.echo(data.text("rates", unit=data.unit_of(kind)))
        click.echo(_utf8(text_table([table.head, *table.rows], table.left)) + "\n")
    for path in pages:
        click.echo(path)


def _folders_by_name(models: Sequence[str]) -> Dict[str, Path]:
    """The experiment folders by the names of the models, from ``NAME=EXP_DIR``."""
    folders: Dict[str, Path] = {}
    for text in models:
        name, equals, exp = text.partition("=")
        name = " ".join(name.split())
        require(
            name and equals and exp,
            f"--model {text!r} is not NAME=EXP_DIR: give a name and a folder, as in "
            "--model teacher=zipformer/exp",
        )
        if name in folders:
            raise KDError(
                f"two models are called {name!r}, {folders[name]} and {exp}: give each "
                "a name of its own"
            )
        folders[name] = Path(exp)
    return folders


def _roles(names: List[str], teacher: str, baseline: str) -> Tuple[str, str]:
    """The names of the teacher and of the baseline, with defaults for missing ones."""
    for option, name in (("teacher", teacher), ("baseline", baseline)):
        require(
            not name or name in names,
            f"--{option} is {name!r}, and the models are {', '.join(names)}: give one "
            "of these",
        )
    require(
        not teacher or teacher != baseline,
        f"--teacher and --baseline are both {teacher!r}: give the student without KD "
        "as --baseline",
    )
    if len(names) < 2:
        return "", ""
    teacher = teacher or next(n for n in names if n != baseline)
    return teacher, baseline or next(n for n in names if n != teacher)


def _read_model(name: str, exp: Path) -> Model:
    require(
        exp.is_dir(),
        f"the experiment folder {exp} of {name!r} does not exist: mend --model",
    )
    training = read_training(exp)
    last, earlier = split_last(read_decodings(exp))
    require(
        training is not None or last,
        f"the experiment folder {exp} of {name!r} has neither log/log-train-* nor "
        "METHOD/wer-summary-*: give the --exp-dir of train.py and decode.py",
    )
    return Model(name, exp, training, last, earlier)


def _read_audio(models: Sequence[Model], manifest_dir: str) -> TestAudio:
    audio = TestAudio(manifest_dir)
    if not manifest_dir:
        return audio
    for test_set in sorted({s for m in models for d in m.decodings for s in d.rates}):
        paths = manifests_of(Path(manifest_dir), test_set)
        if len(paths) > 1:
            audio.ambiguous[test_set] = [path.name for path in paths]
        elif paths:
            cuts = _cuts(str(paths[0]))
            audio.seconds[test_set] = sum(cut.duration for cut in cuts)
    return audio


def _cuts(path: str) -> Iterator[Cut]:
    return iter(ManifestCuts(path))


def _utf8(text: str) -> str:
    """``text`` with ``?`` for what is not UTF-8, such as in the name of a file."""
    return text.encode("utf8", "replace").decode()

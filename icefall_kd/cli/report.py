"""Compares models by icefall's logs and results."""

from contextlib import ExitStack
from pathlib import Path
from typing import List, Optional, Sequence, Tuple
from xml.etree import ElementTree

import click

from icefall_kd import __version__
from icefall_kd.cli.models import (
    check_manifest_dir,
    folders_by_name,
    measure_all,
    models_option,
    read_audio,
    read_model,
)
from icefall_kd.cli.options import Number, Place, Text, command
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError, require
from icefall_kd.files import replacing
from icefall_kd.report.comparison import Comparison, Model
from icefall_kd.report.intervals import need_interval
from icefall_kd.report.manifests import TargetSizes, measure_targets
from icefall_kd.report.page import Block, Heading, Plots, Table, to_html, to_markdown
from icefall_kd.report.plots import need_matplotlib
from icefall_kd.report.rates import rate_blocks
from icefall_kd.report.tables import blocks_of
from icefall_kd.report.words import words_of
from icefall_kd.targets.cuts import ManifestCuts

EXAMPLE = """
icefall-kd report --model teacher=zipformer/exp \\
  --model "no KD=zipformer_kd/exp/no-kd" --model "KD=zipformer_kd/exp/kd" \\
  --manifest-dir data/fbank report
"""


@command(example=EXAMPLE)
@click.argument("out_dir", type=Place())
@models_option
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
    "(real-time factor), and for the speakers.",
)
@click.option(
    "--by-speaker",
    is_flag=True,
    help="Compute the intervals over speakers, as the utterances of one speaker depend "
    "on each other. Needs --manifest-dir.",
)
@click.option(
    "--interval",
    type=Number(0, 100),
    default=None,
    metavar="POINTS",
    help="Refuse a test set that has too few words for 95 % intervals of this half "
    "width, in percentage points.",
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
    "--picture",
    "pictures",
    type=Text(),
    multiple=True,
    metavar="CAPTION=FILE",
    help="An SVG for the HTML page, such as `icefall-kd plot` draws, and its caption. "
    "The option may be given more than once.",
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
    by_speaker: bool = False,
    interval: Optional[float] = None,
    targets: Sequence[str] = (),
    pictures: Sequence[str] = (),
    unit: str = "WER",
    lang: str = "en",
    title: str = "",
) -> None:
    """Compare teacher and students in OUT_DIR/report.md and OUT_DIR/report.html.

    The report has error rates with confidence intervals, p values of the differences,
    parameters, RTF, bytes of targets, losses and weights. They are read from the logs
    and results that train.py and decode.py left in the experiment folders, and from
    what `icefall-kd export --check` found of the files in EXP_DIR/export.

    Give one name several times for several seeds: --model KD=exp/kd-1 --model
    KD=exp/kd-2. The report then has their mean.

    The Markdown is for icefall's RESULTS.md, the HTML has the curves too.
    """
    need_matplotlib()
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise KDError(f"{out} is a file, and OUT_DIR must be a folder: give another")
    check_manifest_dir(manifest_dir)
    require(
        manifest_dir or not by_speaker,
        "--by-speaker is given without --manifest-dir, whose manifests name the "
        "speakers: give the folder of the test sets' manifests, such as data/fbank",
    )
    drawn = _pictures(pictures, lang)
    folders = folders_by_name(models)
    teacher, baseline = _roles(list(folders), teacher, baseline)
    loaded = [read_model(name, exps) for name, exps in folders.items()]
    audio = read_audio(loaded, manifest_dir, by_speaker)
    statistics = measure_all(loaded, baseline, audio, by_speaker)
    if interval is not None:
        _need_transcripts(loaded)
        need_interval(statistics, interval)
    sizes = {path: _measure(path) for path in dict.fromkeys(targets)}
    words = words_of(lang)
    data = Comparison(loaded, teacher, baseline, unit, audio, sizes, words, statistics)
    blocks = [*blocks_of(data), *drawn]
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
    for block in rate_blocks(data):
        if isinstance(block, Heading):
            click.echo(_utf8(block.text))
        elif isinstance(block, Table):
            click.echo(_utf8(text_table([block.head, *block.rows], block.left)) + "\n")
    for path in pages:
        click.echo(path)
    click.echo("Next: open the HTML in a browser; it has the curves too.")


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


def _need_transcripts(models: Sequence[Model]) -> None:
    """Refuse ``--interval`` where a result has no interval."""
    runs = [run for m in models for run in m.runs]
    require(
        any(run.decodings for run in runs),
        "--interval is given, and no model has decoding results: run decode.py, or "
        "leave --interval out",
    )
    for run in runs:
        for d, test_set in run.without_scores:
            raise KDError(
                f"--interval is given, and {run.exp} has no transcripts of "
                f"{d.rates[test_set].setting} on {test_set}, {d.method}/recogs-"
                f"{test_set}-*{d.suffix}.txt, to compute one: decode again with this "
                "setting, or leave --interval out"
            )


def _pictures(pictures: Sequence[str], lang: str) -> List[Block]:
    """The section of pictures that others drew; none without any."""
    figures = []
    for text in pictures:
        caption, equals, path = text.rpartition("=")
        require(
            caption.strip() and equals and path.endswith(".svg"),
            f"--picture {text!r} is not CAPTION=FILE.svg: give a caption and an SVG, "
            'as in --picture "Lattice=lattice.svg"',
        )
        require(Path(path).is_file(), f"--picture {path} does not exist: draw it first")
        try:
            svg = Path(path).read_text("utf8")
            is_svg = ElementTree.fromstring(svg).tag.endswith("}svg")
        except (ElementTree.ParseError, ValueError):
            is_svg = False
        require(is_svg, f"--picture {path} is no SVG: draw it again")
        figures.append((caption.strip(), svg[svg.index("<svg") :]))
    if not figures:
        return []
    return [Heading(words_of(lang)["pictures"]), Plots(figures)]


def _measure(path: str) -> TargetSizes:
    return measure_targets(iter(ManifestCuts(path)))


def _utf8(text: str) -> str:
    """``text`` with ``?`` for what is not UTF-8, such as in the name of a file."""
    return text.encode("utf8", "replace").decode()

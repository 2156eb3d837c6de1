"""Draws what logs and results tell of models: ``icefall-kd plot wer``, ``losses``."""

from typing import Any, Callable, List, Sequence

import click

from icefall_kd.cli.models import (
    check_manifest_dir,
    folders_by_name,
    measure_all,
    models_option,
    read_audio,
    read_model,
)
from icefall_kd.cli.options import Place, command
from icefall_kd.errors import require
from icefall_kd.plot.figures import check_picture, write_picture
from icefall_kd.plot.words import LANGUAGES, words_of
from icefall_kd.report.comparison import Comparison, Model, loss_curves
from icefall_kd.report.costs import cost_plots, draw_cost_plots
from icefall_kd.report.plots import draw_loss_grid
from icefall_kd.report.words import words_of as report_words

_UNIT = click.option(
    "--unit",
    type=click.Choice(["WER", "CER"]),
    default="WER",
    help="The unit of the recipe's error rates. Give CER where it scores characters, "
    "as in Chinese.",
)


def lang_option(function: Callable) -> Callable:
    """Give a command the language of its picture, ``lang``.

    Args:
      function: The command's.
    """
    return click.option(
        "--lang",
        type=click.Choice(LANGUAGES),
        default="en",
        help="The language of the picture: English or Chinese.",
    )(function)


@command(
    example="""icefall-kd plot wer --model teacher=zipformer/exp \\
  --model "no KD=zipformer_kd/exp/no-kd" \\
  --model KD=zipformer_kd/exp/kd --manifest-dir data/fbank wer.svg"""
)
@click.argument("out", type=Place())
@models_option
@click.option(
    "--manifest-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The folder of the test sets' manifests, such as data/fbank: for real-time "
    "factors in place of seconds of decoding.",
)
@_UNIT
@lang_option
def wer(
    out: str, models: Sequence[str], manifest_dir: str, unit: str, lang: str
) -> None:
    """Draw error rates against parameters, decoding time and training time.

    They are read from icefall's logs and results in the experiment folders, as
    `icefall-kd report` reads them. A line through a point is its interval of 95 %.
    """
    check_picture(out)
    check_manifest_dir(manifest_dir)
    report = _read(models, manifest_dir, unit, lang)
    kinds = list(report.sets)
    require(
        kinds,
        "no --model has results of decode.py: decode with them first, or give others",
    )
    rows = cost_plots(report, kinds)
    require(
        rows,
        "no log of --model has a number of parameters or seconds of decoding or "
        "training, against which error rates could be drawn: keep the logs of train.py "
        "and decode.py",
    )
    write_picture(out, lambda: draw_cost_plots(rows, report.names, report.words))
    click.echo(out)


@command(
    example="""icefall-kd plot losses --model "no KD=zipformer_kd/exp/no-kd" \\
  --model KD=zipformer_kd/exp/kd losses.svg"""
)
@click.argument("out", type=Place())
@models_option
@lang_option
def losses(out: str, models: Sequence[str], lang: str) -> None:
    """Draw the curves of each loss: hard ones, and those of distillation (kd_).

    Lines are of training, marks of validation, both means over frames as icefall logs
    them, and not multiplied by the weights.
    """
    check_picture(out)
    loaded = _read_models(models)
    runs = [run for model in loaded for run in model.runs]
    curves = list(loss_curves(runs))
    folders = ", ".join(str(run.exp) for run in runs)
    require(
        curves,
        f"the logs in {folders} have no losses: give folders where train.py has logged "
        "its first batches, or wait for them",
    )
    names = [model.name for model in loaded]
    numbers = [names.index(m.name) for m in loaded for _ in m.runs]
    x = report_words(lang)["epoch_axis"]
    write_picture(out, lambda: draw_loss_grid(curves, numbers, names, x))
    click.echo(out)


@command(example="""icefall-kd plot way way.svg""")
@click.argument("out", type=Place())
@lang_option
def way(out: str, lang: str) -> None:
    """Draw the way of the data: what is read and written, and by which command."""
    from icefall_kd.plot.way import draw_way

    check_picture(out)
    write_picture(out, lambda: draw_way(words_of(lang)))
    click.echo(out)


def _read_models(models: Sequence[str]) -> List[Model]:
    folders = folders_by_name(models)
    return [read_model(name, exps) for name, exps in folders.items()]


def _read(models: Sequence[str], manifest_dir: str, unit: str, lang: str) -> Any:
    """The data of a report in which nothing is compared."""
    loaded = _read_models(models)
    audio = read_audio(loaded, manifest_dir, by_speaker=False)
    statistics = measure_all(loaded, "", audio, by_speaker=False)
    words = report_words(lang)
    return Comparison(loaded, "", "", unit, audio, {}, words, statistics)

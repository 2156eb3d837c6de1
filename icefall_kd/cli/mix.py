"""Mixes labelled, pseudo-labelled and target-only cuts into one training manifest."""

from pathlib import Path
from typing import Tuple

import click

from icefall_kd.cli.combine import check_not_overwritten
from icefall_kd.cli.options import Count, Number, Place, command
from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import require
from icefall_kd.files import MANIFEST, check_new_file
from icefall_kd.labels.mixing import Source
from icefall_kd.labels.mixing import mix as mix_manifests
from icefall_kd.targets.cuts import ManifestCuts

EXAMPLE = """
icefall-kd mix data/kd/train.jsonl.gz --cuts data/kd/transcribed.jsonl.gz \\
  --cuts data/kd/labelled.jsonl.gz --weight 3 --weight 1
"""


@command(example=EXAMPLE)
@click.argument("out_cuts", type=Place())
@click.option(
    "--cuts",
    "in_cuts",
    type=Place(),
    multiple=True,
    required=True,
    metavar="CUTS",
    help="A manifest of training cuts. The option is given for each of them.",
)
@click.option(
    "--weight",
    "weights",
    type=Number(0, 10**6),
    multiple=True,
    metavar="W",
    help="The share of the cuts that come from the manifest of the same place among "
    "--cuts: with weights 3 and 1, three of four. Give one for each or none.",
)
@click.option(
    "--seed",
    type=Count(0, 2**32 - 1),
    default=0,
    metavar="N",
    help="Another number gives another random order.",
)
def mix(
    out_cuts: str, in_cuts: Tuple[str, ...], weights: Tuple[float, ...], seed: int
) -> None:
    """Mix the cuts of several manifests; write OUT_CUTS, which a recipe trains on.

    Each cut has a transcript, of people or of `icefall-kd label`, or targets of
    `icefall-kd dump`, or both. In training it gets the losses that it allows: without a
    transcript the recipe's own loss leaves it out, and without targets, with
    --kd-missing hard, the terms do. With weights, OUT_CUTS has all cuts once or more
    often; those that come again get other ids.
    """
    check_new_file(out_cuts, "OUT_CUTS", MANIFEST)
    for path in in_cuts:
        ManifestCuts(path)
        check_not_overwritten(path, out_cuts, "OUT_CUTS")
    require(
        len(weights) in (0, len(in_cuts)),
        f"--weight is given {len(weights)} times and --cuts {len(in_cuts)} times: "
        "give a weight for each manifest, or none",
    )
    sources = [Source(path, w) for path, w in zip(in_cuts, weights)]
    sources = sources or [Source(path) for path in in_cuts]
    rows = mix_manifests(Path(out_cuts), sources, bool(weights), seed)
    click.echo(text_table(rows))
    total = sum(source.chosen for source in sources)
    seconds = sum(s.seconds * s.chosen / s.cuts for s in sources)
    text = f"{out_cuts}: {total:,} cuts, {seconds / 3600:,.2f} h"
    left_out = sum(source.left_out for source in sources)
    if left_out:
        text += f"; {left_out:,} without transcript and targets are left out"
    if any(s.with_targets for s in sources) and any(s.without_targets for s in sources):
        text += "; some have no targets, so train with --kd-missing hard"
    click.echo(text)
    click.echo("Next: train on it, under the name that the recipe's data module reads.")

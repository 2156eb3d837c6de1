"""Joins the manifests of the jobs of a dump."""

from pathlib import Path
from typing import Union

import click

from icefall_kd.cli.options import MOST_JOBS, Count, Place, command
from icefall_kd.errors import require
from icefall_kd.files import MANIFEST, check_new_file
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.targets.manifest import combine as combine_manifests

# What follows a dump.
NEXT = "Next: train the plugged recipe on this manifest, with --kd-config FILE."
EXAMPLE = """
icefall-kd combine --num-jobs 4 data/fbank/librispeech_cuts_train-clean-100.jsonl.gz \\
  data/kd/librispeech_cuts_train-clean-100.jsonl.gz
"""


@command(example=EXAMPLE)
@click.argument("in_cuts", type=Place())
@click.argument("out_cuts", type=Place())
@click.option(
    "--num-jobs",
    type=Count(1, MOST_JOBS),
    required=True,
    metavar="N",
    help="The number of jobs, as `dump` was given it.",
)
def combine(in_cuts: str, out_cuts: str, num_jobs: int) -> None:
    """Join the manifests that the jobs of a dump wrote beside OUT_CUTS.

    The cuts get the order that they have in IN_CUTS. `icefall-kd dump` does this by
    itself when its last job ends.
    """
    combine_jobs(in_cuts, out_cuts, num_jobs)


def check_not_overwritten(in_cuts: str, out_cuts: Union[str, Path], name: str) -> None:
    """Refuse an output that is the input.

    Args:
      in_cuts: The manifest that is read.
      out_cuts: The file that is written.
      name: The argument's name, such as OUT_CUTS.
    """
    require(
        Path(in_cuts).resolve() != Path(out_cuts).resolve(),
        f"{in_cuts} is both read and written: give {name} another name",
    )


def combine_jobs(in_cuts: str, out_cuts: Union[str, Path], num_jobs: int) -> None:
    """Join the manifests of all jobs, in the order of ``in_cuts``.

    Args:
      in_cuts: The manifest that was dumped.
      out_cuts: The manifest to write, beside which those of the jobs are.
      num_jobs: How many jobs there were.
    """
    check_new_file(str(out_cuts), "OUT_CUTS", MANIFEST)
    check_not_overwritten(in_cuts, out_cuts, "OUT_CUTS")
    ids = (cut.id for cut in ManifestCuts(in_cuts, light=True))
    counts = combine_manifests(out_cuts, num_jobs, ids)
    total = sum(counts.values())
    click.echo(f"{out_cuts}: {total} cuts with targets of {num_jobs} jobs")
    click.echo(NEXT)

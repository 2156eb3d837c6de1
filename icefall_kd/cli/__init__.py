"""``icefall-kd``: dump, student, doctor. ``icefall-kd COMMAND --help`` tells more."""

import click

from icefall_kd import __version__
from icefall_kd.errors import one_sentence


@click.group(context_settings={"show_default": True})
@click.version_option(__version__)
def cli() -> None:
    """Knowledge distillation for icefall's Zipformer recipes."""


@cli.command()
def doctor() -> None:
    """Say what is installed, and how to get what is missing."""
    from icefall_kd.cli.doctor import doctor as run

    run()


def teacher_options(command):
    """The options by which icefall's scripts name a model."""
    for option in (
        click.option(
            "--use-averaged-model/--no-use-averaged-model",
            default=True,
            help="Average over the steps between two checkpoints, as icefall does.",
        ),
        click.option("--avg", default=1, help="How many checkpoints to average."),
        click.option(
            "--iter", "iteration", default=0, help="Use checkpoint-ITER.pt, not epochs."
        ),
        click.option("--epoch", default=0, help="Use epoch-EPOCH.pt."),
        click.option(
            "--exp-dir", required=True, help="The teacher's experiment folder."
        ),
        click.option(
            "--recipe",
            required=True,
            help="Folder of the recipe's train.py, such as ./zipformer.",
        ),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("in_cuts")
@click.argument("out_cuts")
@teacher_options
@click.option("--bpe-model", default="", help="The teacher's bpe.model.")
@click.option(
    "--storage-dir",
    default="",
    help="Folder for the arrays; default: beside OUT_CUTS, named as it.",
)
@click.option("--max-duration", default=200.0, help="Seconds of audio in a batch.")
@click.option("--num-threads", default=0, help="CPU threads; 0: all cores.")
@click.option("--overwrite", is_flag=True, help="Forget targets made earlier.")
def dump(**options) -> None:
    """Store what the teacher's CTC head says on IN_CUTS; write OUT_CUTS.

    IN_CUTS carry features. OUT_CUTS is the same manifest with the targets on its
    cuts. A run that was cut short goes on where it stopped.
    """
    from icefall_kd.cli.dump import dump as run

    with one_sentence():
        run(**options)


@cli.command()
@teacher_options
@click.option("--student-dir", required=True, help="The student's experiment folder.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting that differs from the teacher's, such as encoder-dim=32,32,32.",
)
@click.option("--init", default="teacher", help="teacher (its slices), or random.")
@click.option("--bpe-model", default="", help="The student's bpe.model, to be checked.")
@click.option("--seed", default=42, help="For --init random.")
def student(**options) -> None:
    """Build a student from a teacher, as a checkpoint that train.py starts from.

    Writes epoch-1.pt into --student-dir (train on with --start-epoch 2), and the
    model's flags into the file student_flags beside it.
    """
    from icefall_kd.cli.student import student as run

    with one_sentence():
        run(**options)


def main() -> None:
    cli(prog_name="icefall-kd")

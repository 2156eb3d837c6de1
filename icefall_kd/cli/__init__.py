"""The command ``icefall-kd``; see ``icefall-kd COMMAND --help``."""

import click

from icefall_kd import __version__
from icefall_kd.cli.options import Commands
from icefall_kd.files import run_in_utf8

# The module of each command, which is imported when the command runs, and its help.
MODULES = {
    "cascade": (
        "icefall_kd.cli.cascade",
        "Choose the utterances that a student leaves to its teacher.",
    ),
    "combine": (
        "icefall_kd.cli.combine",
        "Join the manifests that the jobs of a dump wrote.",
    ),
    "decode": (
        "icefall_kd.cli.decode",
        "Decode cuts with a model, teacher or student, and say what it cost.",
    ),
    "doctor": (
        "icefall_kd.cli.doctor",
        "Show what is installed, and whether teacher, cuts and student fit together.",
    ),
    "dump": ("icefall_kd.cli.dump", "Store a teacher's targets of cuts."),
    "export": (
        "icefall_kd.cli.export",
        "Write a model, teacher or student, as files for where it runs.",
    ),
    "filter": (
        "icefall_kd.cli.filter",
        "Keep the pseudo-labels that a student can learn from.",
    ),
    "forecast": (
        "icefall_kd.cli.forecast",
        "Say before a training whether distillation has something to gain.",
    ),
    "label": (
        "icefall_kd.cli.label",
        "Let a teacher, a model or any program, transcribe cuts.",
    ),
    "mix": (
        "icefall_kd.cli.mix",
        "Mix labelled, pseudo-labelled and target-only cuts for a training.",
    ),
    "plot": (
        "icefall_kd.cli.plot",
        "Draw models, losses, a lattice, spikes, and where teacher and student differ.",
    ),
    "plug": (
        "icefall_kd.cli.plug",
        "Make a working copy of a recipe, with distillation plugged in.",
    ),
    "quantizer": (
        "icefall_kd.cli.quantizer",
        "Train the vector quantizer of a teacher's hidden layer.",
    ),
    "repoint": (
        "icefall_kd.cli.repoint",
        "Let a manifest point at its targets where these are now.",
    ),
    "report": ("icefall_kd.cli.report", "Compare teacher and students in a report."),
    "shar": ("icefall_kd.cli.shar", "Put targets into the Lhotse Shar of their cuts."),
    "student": (
        "icefall_kd.cli.student",
        "Build a student from a teacher, as a checkpoint that train.py starts from.",
    ),
}


@click.group(
    cls=Commands,
    modules=MODULES,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__)
def cli() -> None:
    """Knowledge distillation for icefall's Zipformer recipes."""


def main() -> None:
    """Run the command line of this process."""
    run_in_utf8()
    from icefall_kd.cli.stops import clean_up_when_stopped

    clean_up_when_stopped()
    cli(prog_name="icefall-kd")

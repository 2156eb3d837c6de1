"""The command ``icefall-kd``; ``icefall-kd COMMAND --help`` tells more."""

from functools import partial

import click

from icefall_kd import __version__
from icefall_kd.cli.options import (
    MOST_JOBS,
    MOST_SEED,
    MOST_THREADS,
    Commands,
    Count,
    Number,
    Place,
    Text,
    YesNo,
)
from icefall_kd.files import run_in_utf8

# What train.py knows and a command does not.
MODEL_FLAGS = {"ignore_unknown_options": True}


@click.group(
    cls=Commands,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__)
def cli() -> None:
    """Knowledge distillation for icefall's Zipformer recipes."""


def teacher_options(command, required=True):
    """The options by which icefall's scripts name a model."""
    for option in (
        click.argument(
            "flags", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL FLAGS]..."
        ),
        click.option(
            "--bpe-model",
            "--lang-dir",
            "bpe_model",
            type=Place(optional=True),
            default="",
            help="The teacher's bpe.model, or the folder of its tokens.txt where its "
            "symbols are characters.",
        ),
        click.option(
            "--use-averaged-model",
            type=YesNo(),
            default=True,
            help="Average over the steps between two checkpoints, as icefall does.",
        ),
        click.option(
            "--avg",
            type=Count(1, 10_000),
            default=1,
            help="How many checkpoints to average.",
        ),
        click.option(
            "--iter",
            "iteration",
            type=Count(0, 10**9),
            default=0,
            help="Use checkpoint-ITER.pt, not epochs.",
        ),
        click.option(
            "--epoch", type=Count(0, 10**6), default=0, help="Use epoch-EPOCH.pt."
        ),
        click.option(
            "--exp-dir",
            type=Place(),
            required=required,
            help="The teacher's experiment folder; `dump` takes several, with commas.",
        ),
        click.option(
            "--recipe",
            type=Place(),
            required=required,
            help="Folder of the recipe's train.py, such as ./zipformer.",
        ),
    ):
        command = option(command)
    return command


@cli.command(context_settings=MODEL_FLAGS)
@partial(teacher_options, required=False)
@click.option(
    "--cuts",
    type=Place(optional=True),
    default="",
    help="Cuts for this teacher, without or with its targets.",
)
@click.option(
    "--student-dir",
    type=Place(optional=True),
    default="",
    help="What `icefall-kd student` wrote for it.",
)
@click.option(
    "--kd",
    type=Text(),
    default="",
    metavar="OPTIONS",
    help="Those that train.py will get, such as '--kd-config kd.yaml'.",
)
@click.option(
    "--write-flags",
    type=Place(optional=True),
    default="",
    metavar="FILE",
    help="Write the teacher's model flags, which its decode.py needs, into this file.",
)
def doctor(**options) -> None:
    """Say what is installed, and how to get what is missing.

    Given a teacher, also whether its tokens, the cuts, the targets that these carry,
    and a student fit it.
    """
    from icefall_kd.cli.doctor import doctor as run

    run(**options)


@cli.command(context_settings=MODEL_FLAGS)
@click.argument("in_cuts", type=Place())
@click.argument("out_cuts", type=Place())
@teacher_options
@click.option(
    "--storage-dir",
    type=Place(optional=True),
    default="",
    help="Folder for the arrays; default: beside OUT_CUTS, named as it.",
)
@click.option(
    "--keep",
    type=Text(),
    default="dense",
    help="How CTC targets are kept: dense, top:K, adaptive:MASS:MAX or sampled:N; a "
    "sparse form is for one temperature, 1 or that behind @. none: not at all.",
)
@click.option(
    "--keep-lattice",
    type=Text(),
    default="",
    help="Keep the transducer's pruned lattice too: collapsed, or a form of "
    "--keep; with path: before it, its best alignment alone.",
)
@click.option(
    "--keep-hidden",
    type=Text(),
    default="",
    help="Keep hidden layers too: LAYER:half, or LAYER:FILE of `icefall-kd quantizer`; "
    "LAYER is a stack's index, or out for the encoder's output; several with commas.",
)
@click.option(
    "--weights",
    type=Text(),
    default="",
    help="Of several teachers: their shares, with commas.",
)
@click.option(
    "--teacher-field",
    type=Text(),
    default="",
    help="Of several teachers: the field of a cut that holds the number of its own.",
)
@click.option(
    "--s-range",
    type=Count(0, 1000),
    default=5,
    help="Label positions of a lattice at a frame; 0: all.",
)
@click.option(
    "--cut-seconds",
    type=Text(),
    default="",
    metavar="SHORTEST:LONGEST",
    help="Leave cuts out that the recipe's training leaves out, such as 1:20.",
)
@click.option(
    "--max-duration",
    type=Number(0, 10**6),
    default=200.0,
    help="Seconds of audio in a batch.",
)
@click.option(
    "--num-jobs",
    type=Count(1, MOST_JOBS),
    default=1,
    help="How many jobs share the manifest.",
)
@click.option(
    "--job",
    type=Count(0, MOST_JOBS - 1),
    default=0,
    help="Which of them this is, from 0 on.",
)
@click.option(
    "--num-workers",
    type=Count(0, MOST_THREADS),
    default=1,
    help="Processes that read features.",
)
@click.option("--stats", is_flag=True, help="Print what the store holds.")
@click.option(
    "--num-threads",
    type=Count(0, MOST_THREADS),
    default=0,
    help="CPU threads; 0: all cores.",
)
@click.option("--overwrite", is_flag=True, help="Forget targets made earlier.")
def dump(**options) -> None:
    """Store what the teacher says on IN_CUTS; write OUT_CUTS.

    IN_CUTS carry features. OUT_CUTS is the same manifest with the targets on its
    cuts. IN_CUTS may be the folder of a Shar; see `icefall-kd shar`. Several teachers
    of one recipe, --exp-dir A,B, are averaged or chosen for each cut. A run that was
    cut short goes on where it stopped. Under torchrun each process is a job; on a
    cluster give each its --job. The last one joins their manifests.

    MODEL FLAGS are those of the recipe's decode.py, as --num-encoder-layers: for a
    checkpoint that holds parameters alone, such as a released pretrained.pt, which
    needs --bpe-model too; and --chunk-size and --left-context-frames for a causal
    teacher.
    """
    from icefall_kd.cli.dump import dump as run

    run(**options)


@cli.command()
@click.argument("in_cuts", type=Place())
@click.argument("out_cuts", type=Place())
@click.option(
    "--num-jobs",
    type=Count(1, MOST_JOBS),
    required=True,
    help="How many jobs there were.",
)
def combine(in_cuts: str, out_cuts: str, num_jobs: int) -> None:
    """Join the manifests that the jobs of a dump wrote beside OUT_CUTS."""
    from icefall_kd.cli.dump import combine_jobs

    combine_jobs(in_cuts, out_cuts, num_jobs)


@cli.command()
@click.argument("cuts_path", metavar="CUTS", type=Place())
@click.argument("shar_dir", type=Place())
@click.option(
    "--store",
    type=Place(optional=True),
    default="",
    help="Where fingerprint.json, tokens.txt and quantizers will be found; default: "
    "in the Shar, into which they are copied.",
)
def shar(**options) -> None:
    """Put the targets of CUTS into SHAR_DIR, the Lhotse Shar of the same cuts.

    CUTS is what `icefall-kd dump SHAR_DIR CUTS` wrote. The targets become one more
    field of the Shar, kd_targets.NNNNNN.jsonl.gz, and come along when it is read.
    """
    from icefall_kd.cli.shar import shar as run

    run(**options)


@cli.command(context_settings=MODEL_FLAGS)
@click.argument("in_cuts", type=Place())
@click.argument("out", type=Place())
@teacher_options
@click.option("--layer", type=Text(), required=True, help="A stack's index, or out.")
@click.option(
    "--codes", type=Count(1, 32), default=8, help="Codes of one byte for each vector."
)
@click.option(
    "--num-vectors", type=Count(1, 10**8), default=100_000, help="To train on."
)
@click.option(
    "--iters",
    type=Count(1, 10**7),
    default=10_000,
    help="Steps in each of its two phases.",
)
@click.option(
    "--seed",
    type=Count(0, MOST_SEED),
    default=42,
    help="Seed of the vectors and of the quantizer.",
)
def quantizer(**options) -> None:
    """Train the vector quantizer of a teacher's hidden layer on IN_CUTS; write OUT.

    `icefall-kd dump --keep-hidden LAYER:OUT` stores that layer as its codes.
    """
    from icefall_kd.cli.quantizer import quantizer as run

    run(**options)


@cli.command(context_settings=MODEL_FLAGS)
@click.option("--list", "listed", is_flag=True, help="List the presets, and end.")
@click.option("--json", "as_json", is_flag=True, help="List them as JSON.")
@click.option("--vocab-size", type=Count(1, 10**6), default=500, help="For --list.")
@partial(teacher_options, required=False)
@click.option(
    "--student-dir",
    type=Place(optional=True),
    default="",
    help="The student's experiment folder.",
)
@click.option(
    "--preset",
    "size",
    type=Text(),
    default="",
    help="A size of --list, such as s.",
)
@click.option(
    "--params",
    "params_goal",
    type=Text(),
    default="",
    help="Parameters to come near, such as 5M.",
)
@click.option(
    "--speed",
    type=Text(),
    default="",
    help="How many times fewer multiply-adds, such as 3x.",
)
@click.option(
    "--set",
    "changes",
    type=Text(),
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting that differs from the teacher's, such as encoder-dim=32,32,32.",
)
@click.option(
    "--init",
    type=click.Choice(["teacher", "random"]),
    default="teacher",
    help="Start from the teacher's slices, or from random parameters.",
)
@click.option(
    "--layers",
    type=click.Choice(["even", "important"]),
    default="even",
    help="Which of the teacher's: evenly spaced, or by importance on --cuts.",
)
@click.option(
    "--channels",
    type=click.Choice(["first", "important"]),
    default="first",
    help="Which channels, heads and hidden units: the first, or by importance.",
)
@click.option(
    "--cuts",
    type=Place(optional=True),
    default="",
    help="Transcribed cuts with features: for importance, and to say the student's "
    "loss and WER before any training.",
)
@click.option(
    "--num-cuts",
    type=Count(1, 10**6),
    default=64,
    help="How many of them, from the first on.",
)
@click.option("--seed", type=Count(0, MOST_SEED), default=42, help="For --init random.")
def student(listed: bool, as_json: bool, vocab_size: int, **options) -> None:
    """Build a student from a teacher, as a checkpoint that train.py starts from.

    Writes epoch-1.pt into --student-dir (train on with --start-epoch 2), the model's
    flags into the file student_flags beside it, and what it prints into
    student_account.txt.
    """
    if listed or as_json:
        if options["flags"]:
            raise click.UsageError(f"--list takes no {options['flags'][0]!r}.")
        from icefall_kd.cli.presets import list_presets

        list_presets(as_json, vocab_size)
        return
    for name in ("recipe", "exp_dir", "student_dir"):
        if not options[name]:
            raise click.UsageError(f"Missing option '--{name.replace('_', '-')}'.")
    from icefall_kd.cli.student import student as run

    run(**options)


@cli.command()
@click.argument("recipe_dir", type=Place())
@click.argument("new_dir", type=Place(optional=True), default="")
@click.option(
    "--diff", "as_diff", is_flag=True, help="Print the patch, and write nothing."
)
@click.option(
    "--check",
    is_flag=True,
    help="Say of a folder whether it is plugged (exit status 0), stale (3) or foreign "
    "(4), and why.",
)
@click.option(
    "--undo", "undo_it", is_flag=True, help="Take the lines out of a working copy."
)
@click.option(
    "--leave-out",
    type=Text(),
    multiple=True,
    metavar="FILE",
    help="A training script that stays as it is; may be given more than once.",
)
def plug(**options) -> None:
    """Make NEW_DIR a working copy of a recipe, with distillation plugged in.

    RECIPE_DIR is the folder of a train.py or finetune.py, such as ./zipformer. It is
    not written to, nor is what it links to. NEW_DIR, such as ./zipformer_kd, has the
    same scripts. Train and decode there as ever:

    \b
      icefall-kd plug ./zipformer ./zipformer_kd
      ./zipformer_kd/train.py --help
      icefall-kd plug --check ./zipformer_kd
      icefall-kd plug --undo ./zipformer_kd

    Plugged by other lines than this version's, or of an original that has changed
    since, a folder is stale: --undo it, and plug it again. What was changed in it by
    hand is kept.
    """
    from icefall_kd.cli.plug import plug as run

    run(**options)


@cli.command()
@click.argument("out_dir", type=Place())
@click.option(
    "--model",
    "models",
    type=Text(),
    multiple=True,
    required=True,
    metavar="NAME=EXP_DIR",
    help="A model's name and its experiment folder; once for each model.",
)
@click.option(
    "--teacher",
    type=Text(),
    default="",
    help="The teacher's name; default: the first model.",
)
@click.option(
    "--baseline",
    type=Text(),
    default="",
    help="The student that the others are compared with; default: the second model.",
)
@click.option(
    "--manifest-dir",
    type=Place(optional=True),
    default="",
    help="Folder of the test sets' manifests, such as data/fbank: for the RTF.",
)
@click.option(
    "--targets",
    type=Place(),
    multiple=True,
    metavar="MANIFEST",
    help="A manifest that `icefall-kd dump` wrote; may be given more than once.",
)
@click.option(
    "--unit",
    type=click.Choice(["WER", "CER"]),
    default="WER",
    help="What the recipe's WER is: CER where it scores characters, as in Chinese.",
)
@click.option("--lang", type=click.Choice(["en", "zh"]), default="en")
@click.option("--title", type=Text(), default="", help="Default: what is compared.")
def report(**options) -> None:
    """Compare teacher and students in OUT_DIR/report.md and OUT_DIR/report.html.

    Error rates, parameters, RTF, bytes of targets, losses and weights, from the logs
    and results that train.py and decode.py left in the experiment folders:

    \b
      icefall-kd report --model teacher=zipformer/exp \\
        --model "no KD=zipformer_kd/exp/student" \\
        --model "KD=zipformer_kd/exp/student-kd" \\
        --manifest-dir data/fbank report

    The Markdown is for icefall's RESULTS.md, the HTML has the curves too.
    """
    from icefall_kd.cli.report import report as run

    run(**options)


@cli.command()
@click.argument("cuts_path", type=Place(), metavar="CUTS")
@click.option(
    "--storage-dir",
    "folders",
    type=Place(),
    multiple=True,
    help="The folder where a store lies now, if it is not beside CUTS; may be given "
    "more than once.",
)
def repoint(**options) -> None:
    """Let CUTS point at their targets where these lie now.

    CUTS is a manifest that `icefall-kd dump` wrote, and is written anew; or the folder
    of a Shar with targets, into which the store's small files are copied. A store that
    lies beside its manifest under its old name is found without this.
    """
    from icefall_kd.cli.repoint import repoint as run

    run(**options)


def main() -> None:
    run_in_utf8()
    from icefall_kd.cli.stops import clean_up_when_stopped

    clean_up_when_stopped()
    cli(prog_name="icefall-kd")

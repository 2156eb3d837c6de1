"""The ``--kd-*`` options of a plugged recipe, from its command line and from a file."""

import argparse
import difflib
import reprlib
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

from icefall_kd.errors import KDError

WEIGHTS = ("ctc", "rnnt", "full_sum", "hidden", "nbest")
MUST_BE = {
    int: "a whole number",
    float: "a number",
    str: "one text in UTF-8",
    "weight": "a number, or numbers by epoch",
}
# Of whole numbers; what is larger would run out of memory or never end.
BOUNDS = {
    "ctc-delay": (0, 50),
    "rnnt-shift": (0, 1000),
    "teacher-ranges": (0, 1),
    "teacher-epoch": (0, 10**6),
    "teacher-avg": (1, 10_000),
    "s-range": (0, 1000),
    "path-only": (0, 1),
}
BY_EPOCH = "A number, or numbers by epoch: 0:0.8,10:0.5 falls in ten epochs."

# Name, type, default, help; a folder's default is "", none.
OPTIONS = (
    (
        "ctc-weight",
        "weight",
        0.0,
        "Weight of the CTC frame KL against the teacher's targets. The recipe scales "
        "its own CTC loss by --ctc-loss-scale, 0.2 by default, and not this one: 1 "
        f"counts five times as much as that. {BY_EPOCH}",
    ),
    (
        "rnnt-weight",
        "weight",
        0.0,
        "Weight of the transducer's KL on the nodes of the teacher's pruned lattice.",
    ),
    (
        "full-sum-weight",
        "weight",
        0.0,
        "Weight of the distance between the teacher's and the student's "
        "log-probability of the transcript, summed over the lattice's paths.",
    ),
    (
        "hidden-weight",
        "weight",
        0.0,
        "Weight of the distance of hidden layers, --kd-hidden-layers.",
    ),
    (
        "nbest-weight",
        "weight",
        0.0,
        "Weight of the CTC and transducer losses of the cuts' n-best lists. With all "
        "these weights at 0 distillation is off.",
    ),
    (
        "hard-weight",
        "weight",
        1.0,
        "Weight of the recipe's own loss beside the KD terms. Without distillation "
        "the recipe's loss keeps its weight of 1.",
    ),
    ("temperature", float, 1.0, "Temperature of the frame and node terms."),
    (
        "ctc-frames",
        str,
        "all",
        "Which frames the CTC term counts: all, non-blank, symmetric (those and as "
        "many blank frames beside them), or all weighted by the teacher's entropy or "
        "confidence. Those of entropy have a mean of 1 in each utterance, and are "
        "large where student and teacher differ: its gradient is about 4 times that "
        "of all, so give a quarter of the weight.",
    ),
    (
        "ctc-delay",
        int,
        0,
        "Frames by which a streaming student's CTC head may lag behind its teacher "
        "without loss; a wrong label costs all the same. On real digits it made the "
        "student later and no better.",
    ),
    (
        "rnnt-form",
        str,
        "nodes",
        "nodes: over all symbols that the teacher's lattice tells; collapsed: over "
        "{next label, blank, rest}; mean_u: of the mean over the label positions of a "
        "frame; sampled_u: at one position of a frame; total: mean_u mixed with the "
        "CTC head.",
    ),
    (
        "rnnt-shift",
        int,
        0,
        "Frames by which a streaming student's transducer may lag behind its teacher.",
    ),
    (
        "teacher-ranges",
        int,
        0,
        "1: the recipe's own pruned loss looks where the stored lattices do, in place "
        "of the student's own pruning.",
    ),
    (
        "node-weights",
        str,
        "occupancy",
        "occupancy: nodes count by how likely the teacher's path passes them; equal.",
    ),
    (
        "hidden-layers",
        str,
        "",
        "Pairs TEACHER:STUDENT with commas, each a stack's index or out, the encoder's "
        "output: 3:2,out:out.",
    ),
    ("hidden-kind", str, "mse", "mse or cosine; MVQ codes are predicted."),
    (
        "projector-lr",
        float,
        1e-3,
        "Learning rate of what is trained between hidden layers.",
    ),
    (
        "schedule",
        str,
        "scratch",
        "scratch: KD from the first batch; warmup: 15 %% of the epochs on hard labels "
        "first; finetune: KD rises in 5 %% of the epochs, for a converged student.",
    ),
    ("last-epochs", float, 0.0, "How many of the last epochs go without KD."),
    (
        "freeze",
        str,
        "",
        "Submodules of the student that don't train, with KD or without it; one with a "
        "number thaws after so many epochs of this training: 'encoder_embed "
        "encoder.0:1.5 decoder:2', encoder.0 being the first stack.",
    ),
    (
        "missing",
        str,
        "refuse",
        "What becomes of training cuts without targets: refuse, or hard: train on "
        "them by the recipe's own loss alone; kd_frames in the log is the share of "
        "frames that have targets.",
    ),
    (
        "time-warp",
        str,
        "off",
        "What becomes of SpecAugment's time warp, which moves frames away from stored "
        "targets: off, or follow: CTC and hidden targets are moved alike.",
    ),
    (
        "teacher-exp-dir",
        str,
        "",
        "Ask the teacher of this experiment folder in the training process, in place "
        "of reading stored targets; several, with commas, are averaged.",
    ),
    ("teacher-epoch", int, 30, "The teacher's epoch-N.pt."),
    ("teacher-avg", int, 1, "How many epochs are averaged."),
    (
        "teacher-recipe",
        str,
        "",
        "Folder of the teacher's train.py; default: that of this script.",
    ),
    (
        "s-range",
        int,
        5,
        "With --kd-teacher-exp-dir: label positions of its lattice at a frame; at 0 "
        "all of them, the full lattice.",
    ),
    (
        "path-only",
        int,
        0,
        "With --kd-teacher-exp-dir: 1 for the nodes of its best alignment alone.",
    ),
    (
        "cache-dir",
        str,
        "",
        "With --kd-teacher-exp-dir: store what the teacher says on each cut as it is, "
        "and read that from the second epoch on. At the end each process leaves the "
        "manifest of the cuts it heard there, such as cuts.jsonl.gz.",
    ),
    (
        "keep",
        str,
        "dense",
        "With --kd-cache-dir: how targets are kept, as `icefall-kd dump --keep` has "
        "it.",
    ),
)


def weight(text: str) -> Any:
    """A number, or the text of a curve, as checkpoints keep it."""
    try:
        return float(text)
    except ValueError:
        return text  # Curve.parse has the error's sentence


def _must_be(name: str, kind: Any) -> str:
    """What the value of an option must be, in words."""
    if name not in BOUNDS:
        return MUST_BE[kind]
    least, most = BOUNDS[name]
    return f"{MUST_BE[kind]} from {least} to {most}"


def _read(name: str, kind: Any, text: str) -> Any:
    """The value of an option.

    Raises:
      ValueError: a text that is none.
    """
    text.encode("utf8")  # an error of its is a ValueError
    if kind == "weight":
        return weight(text)
    value = kind(text)
    if name in BOUNDS and not BOUNDS[name][0] <= value <= BOUNDS[name][1]:
        raise ValueError
    return value


def _type_of(name: str, kind: Any) -> Callable[[str], Any]:
    """What argparse is to read an option with."""

    def read(text: str) -> Any:
        try:
            return _read(name, kind, text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{reprlib.repr(text)} is not {_must_be(name, kind)}"
            ) from None

    return read


def add_options(
    parser: argparse.ArgumentParser, words: Optional[Sequence[str]] = None
) -> None:
    """Add the options to a recipe's parser; the file's values are their defaults.

    Args:
      words: Of the command line; default: this process's.

    Raises:
      KDError: a file that ``--kd-config`` names and that can't be read.
    """
    group = parser.add_argument_group("knowledge distillation (icefall_kd)")
    group.add_argument(
        "--kd-config",
        type=str,
        default="",
        help="YAML file of these options without --kd-, such as `ctc-weight: 0.8`; "
        "the command line goes before it.",
    )
    for name, kind, default, text in OPTIONS:
        kind = _type_of(name, kind)
        group.add_argument(f"--kd-{name}", type=kind, default=default, help=text)
    path = _config_of(sys.argv[1:] if words is None else words)
    if path:
        parser.set_defaults(**read_config(path))


def _config_of(argv) -> Optional[str]:
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--kd-config", nargs="?")  # none: the recipe's parser will tell
    return early.parse_known_args(argv)[0].kd_config


def read_config(path: str) -> Dict[str, Any]:
    """The options of a YAML file, by the names that they have in ``params``.

    Raises:
      KDError: no such file, no YAML, or an option that there is not.
    """
    import yaml

    try:  # all values as text: YAML itself reads 3:2 as 182 and 10:0.5 as 600.5
        text = Path(path).read_text(encoding="utf-8")
        found = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as e:
        raise KDError(
            f"the file of --kd-config, {path}, can't be read "
            f"({' '.join(str(e).split())}): give a YAML file such as `ctc-weight: 0.8`"
        ) from None
    if not isinstance(found, dict):
        raise KDError(
            f"the file of --kd-config, {path}, holds no options: give lines such as "
            "`ctc-weight: 0.8`"
        )
    known = {name: kind for name, kind, _, _ in OPTIONS}
    values = {}
    for name, value in found.items():
        name = str(name).replace("_", "-")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or sorted(known)
            raise KDError(
                f"{path} has the option {name!r}, which there is not: did you mean "
                f"{near[0]!r}?"
            )
        try:
            if not isinstance(value, str):
                raise ValueError
            values["kd_" + name.replace("-", "_")] = _read(name, known[name], value)
        except ValueError:
            raise KDError(
                f"{path} has {name}: {reprlib.repr(value)}, and {name} must be "
                f"{_must_be(name, known[name])}"
            ) from None
    return values

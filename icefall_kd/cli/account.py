"""The account of a student: its size, its origin, and how well it starts."""

from typing import Any, Dict, List, Optional

from torch import nn

from icefall_kd.cli.text_table import text_table
from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds
from icefall_kd.student.presets import embed_channels, per_stack
from icefall_kd.student.scores import HeadScores
from icefall_kd.student.selection import HEADS, Selection

PARTS = ("encoder_embed", "encoder", "decoder", "joiner", "ctc_output")
_ROWS = (
    ("CTC loss a token", "ctc_loss", ".3f"),
    ("CTC WER %", "ctc_wer", ".2f"),
    ("transducer loss a token", "transducer_loss", ".3f"),
    ("transducer WER %", "transducer_wer", ".2f"),
)


def _sizes(
    teacher: nn.Module,
    student: nn.Module,
    teacher_settings: Dict[str, Any],
    student_settings: Dict[str, Any],
) -> str:
    def count(model: nn.Module) -> Dict[str, int]:
        counts = dict.fromkeys((*PARTS, "other"), 0)
        for name, p in model.named_parameters():
            part = name.partition(".")[0]
            counts[part if part in PARTS else "other"] += p.numel()
        return {**counts, "all": sum(counts.values())}

    rows = [["parameters", "teacher", "student", "ratio"]]
    for (part, old), new in zip(count(teacher).items(), count(student).values()):
        rows.append([part, f"{old:,}", f"{new:,}", f"{new / old:.2f}" if old else "-"])
    try:
        settings = (teacher_settings, student_settings)
        old, new = (count_multiply_adds(s)["all"] for s in settings)
    except KDError:  # a variant whose products are not counted
        return text_table(rows)
    speeds = [f"{old / 1e6:,.0f}", f"{new / 1e6:,.0f}", f"{new / old:.2f}"]
    return text_table([*rows, ["M multiply-adds/s", *speeds]])


def _numbers(indices: List[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    runs: List[List[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def _origin(
    teacher: Dict[str, Any], student: Dict[str, Any], selection: Selection
) -> str:
    """The teacher's layers, channels and heads that each stack of the student takes."""
    rows = [["kept of", "layers", "channels", "heads"]]
    layers = per_stack(teacher, "num_encoder_layers")
    for i, count in enumerate(layers):
        row = [f"stack {i}", f"{_numbers(selection.layers[i])} of {count}"]
        for name in ("encoder_dim", "num_heads"):
            new, old = (per_stack(s, name)[i] for s in (student, teacher))
            row.append(f"{new} of {old}")
        rows.append(row)
    old, new = (",".join(map(str, embed_channels(s))) for s in (teacher, student))
    if new != old:
        rows.append(["front end", "", f"{new} of {old}", ""])
    channels = "channels, heads and hidden units: the first"
    if any(name.endswith(HEADS) for name in selection.units):
        channels = "channels, heads and hidden units by importance; the residual "
        channels += f"stream's: {_numbers(sorted(selection.stream))}"
    elif new != old:
        channels += "; the front end's: those of the largest weights"
    return f"{text_table(rows)}\n{channels}"


def _start(scores: List[HeadScores], num_cuts: int) -> str:
    rows = [[f"before training, {num_cuts} cuts", "teacher", "student"]]
    for title, name, form in _ROWS:
        values = [getattr(s, name) for s in scores]
        if any(value is not None for value in values):
            cells = ["-" if v is None else format(v, form) for v in values]
            rows.append([title, *cells])
    return text_table(rows)


def account(
    teacher: nn.Module,
    student: nn.Module,
    teacher_settings: Dict[str, Any],
    student_settings: Dict[str, Any],
    selection: Optional[Selection],
    scores: List[HeadScores],
    num_cuts: int,
) -> str:
    """Tables of a student's sizes, its origin, and its scores before any training.

    Args:
      teacher: The teacher.
      student: The student.
      teacher_settings: The teacher's settings, by the names of the recipe's params.
      student_settings: The student's settings.
      selection: What the student took of the teacher; None for random parameters.
      scores: Of the teacher and the student, or empty.
      num_cuts: The number of cuts that the scores are of.
    """
    blocks = [_sizes(teacher, student, teacher_settings, student_settings)]
    if selection is None:
        blocks.append("kept of the teacher: nothing")
    else:
        blocks.append(_origin(teacher_settings, student_settings, selection))
    if scores:
        blocks.append(_start(scores, num_cuts))
    return "\n\n".join(blocks)

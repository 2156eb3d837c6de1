"""The account of a student: its size, its origin, and how well it starts."""

from typing import Any, Dict, List, Optional

from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds
from icefall_kd.student.presets import per_stack
from icefall_kd.student.scores import HeadScores
from icefall_kd.student.selection import HEADS, Selection

PARTS = ("encoder_embed", "encoder", "decoder", "joiner", "ctc_output")
_ROWS = (
    ("CTC loss a token", "ctc_loss", ".3f"),
    ("CTC WER %", "ctc_wer", ".2f"),
    ("transducer loss a token", "transducer_loss", ".3f"),
    ("transducer WER %", "transducer_wer", ".2f"),
)


def _table(head: List[str], rows: List[List[str]]) -> List[str]:
    """Lines with the first column to the left and the others to the right."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = []
    for first, *rest in table:
        cells = [text.rjust(w) for text, w in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _sizes(
    teacher: nn.Module, student: nn.Module, old: Dict[str, Any], new: Dict[str, Any]
) -> List[str]:
    def count(model: nn.Module) -> Dict[str, int]:
        found = dict.fromkeys((*PARTS, "other"), 0)
        for name, p in model.named_parameters():
            part = name.partition(".")[0]
            found[part if part in PARTS else "other"] += p.numel()
        return {**found, "all": sum(found.values())}

    counts = zip(count(teacher).items(), count(student).values())
    rows = [
        [part, f"{a:,}", f"{b:,}", f"{b / a:.2f}" if a else "-"]
        for (part, a), b in counts
    ]
    try:
        a, b = (count_multiply_adds(s)["all"] for s in (old, new))
    except KDError:  # of a variant whose products nobody counted yet
        return _table(["parameters", "teacher", "student", "ratio"], rows)
    speed = ["M multiply-adds/s", f"{a / 1e6:,.0f}", f"{b / 1e6:,.0f}", f"{b / a:.2f}"]
    return _table(["parameters", "teacher", "student", "ratio"], [*rows, speed])


def _numbers(indices: List[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    runs: List[List[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def _origin(old: Dict[str, Any], new: Dict[str, Any], kept: Selection) -> List[str]:
    """What each stack's layers and channels are of the teacher's."""
    rows = []
    layers, widths, heads = (
        [per_stack(s, name) for s in (old, new)]
        for name in ("num_encoder_layers", "encoder_dim", "num_heads")
    )
    for i, (n, width) in enumerate(zip(layers[0], widths[1])):
        rows.append(
            [
                f"stack {i}",
                f"{_numbers(kept.layers[i])} of {n}",
                f"{width} of {widths[0][i]}",
                f"{heads[1][i]} of {heads[0][i]}",
            ]
        )
    lines = _table(["kept of", "layers", "channels", "heads"], rows)
    if any(name.endswith(HEADS) for name in kept.units):
        lines.append(
            "channels, heads and hidden units by importance; the residual stream's: "
            + _numbers(sorted(kept.stream))
        )
    else:
        lines.append("channels, heads and hidden units: the first")
    return lines


def _starts(judged: List[HeadScores], num_cuts: int) -> List[str]:
    rows = []
    for title, name, form in _ROWS:
        values = [getattr(j, name) for j in judged]
        if any(v is not None for v in values):
            cells = ["-" if v is None else format(v, form) for v in values]
            rows.append([title, *cells])
    head = [f"before training, {num_cuts} cuts", "teacher", "student"]
    return _table(head, rows)


def account(
    teacher: nn.Module,
    student: nn.Module,
    old: Dict[str, Any],
    new: Dict[str, Any],
    kept: Optional[Selection],
    judged: List[HeadScores],
    num_cuts: int,
) -> str:
    """Tables of sizes, of what was kept, and of loss and WER before any training.

    Args:
      old: The teacher's settings.
      new: The student's.
      kept: None for a student that starts from random parameters.
      judged: Of the teacher and the student, or empty.
      num_cuts: On how many cuts that was.
    """
    blocks = [_sizes(teacher, student, old, new)]
    blocks.append(_origin(old, new, kept) if kept else ["kept of the teacher: nothing"])
    if judged:
        blocks.append(_starts(judged, num_cuts))
    return "\n\n".join("\n".join(lines) for lines in blocks)

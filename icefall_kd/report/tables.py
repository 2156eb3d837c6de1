"""The blocks of a report that compares models."""

import math
from typing import List, Optional

from icefall_kd.report.comparison import Comparison, loss_curves
from icefall_kd.report.logs import Series, weight_names
from icefall_kd.report.models import models_table, short, shown
from icefall_kd.report.notes import notes_of
from icefall_kd.report.page import NONE, Block, Bullets, Heading, Plots, Table, Text
from icefall_kd.report.plots import MARKS, POINTS, draw_legend, draw_loss, draw_weights
from icefall_kd.report.rates import rate_blocks


def blocks_of(report: Comparison) -> List[Block]:
    """All blocks of a report, in their order.

    Args:
      report: Its data.
    """
    names = {"teacher": report.teacher, "baseline": report.baseline}
    students = [m.name for m in report.students]
    blocks: List[Block] = []
    if students:
        quoted = [report.words["quote"].format(name) for name in students]
        joined = report.words["and"].join(quoted)
        blocks.append(Text(report.text("compared", students=joined, **names)))
    blocks += rate_blocks(report)
    blocks += [Heading(report.words["models"]), models_table(report)]
    if report.targets:
        blocks += [Heading(report.words["targets"]), _targets_table(report)]
    if any(run.exports for run in report.runs):
        text = Text(report.text("exports_text", unit=report.unit))
        blocks += [Heading(report.words["exports"]), _exports_table(report), text]
    blocks += [*_losses(report), *_weights(report), *_decodings(report)]
    blocks.append(Heading(report.words["notes"]))
    notes = list(dict.fromkeys(notes_of(report)))  # each once
    return [*blocks, Bullets(notes)] if notes else blocks


def _targets_table(report: Comparison) -> Table:
    rows = []
    for manifest, sizes in report.targets.items():
        hours = sizes.seconds / 3600
        cells = ["; ".join(sizes.forms) or NONE, f"{sizes.cuts:,}", f"{hours:.2f}"]
        cells.append(f"{sizes.bytes:,}")
        cells.append(", ".join(f"{k} {n:,}" for k, n in sizes.sizes.items()) or NONE)
        cells.append(f"{sizes.bytes / 1e6 / hours:.2f}" if hours else NONE)
        rows.append([manifest, *cells])
    names = ("manifest", "form", "cuts", "hours", "bytes", "parts", "mb_hour")
    return Table([report.words[n] for n in names], rows, left=2)


def _exports_table(report: Comparison) -> Table:
    """A row for each form and head of each exported model."""
    w, rows = report.words, []
    for run in report.runs:
        for form in run.exports:
            same = report.text("same_of", same=form.same, cuts=form.cuts)
            size = f"{form.bytes / 1e6:.2f}" if form.bytes else NONE
            cells = [shown(form.error_rate, "{:.2f}"), size, f"{form.rtf:.4f}"]
            verdict = w["wrong" if form.is_wrong else "right"]
            rows.append([run.name, form.form, form.head, verdict, same, *cells])
    names = [w[n] for n in ("model", "export_form", "head", "verdict", "same_tokens")]
    return Table([*names, report.unit + " %", "MB", "RTF"], rows, left=4)


def _losses(report: Comparison) -> List[Block]:
    w = report.words
    runs = report.runs
    colours = [report.models.index(report.model_of(run)) for run in runs]
    rows, figures = [], []
    for name, lines, marks in loss_curves(runs):
        drawn = [[(colours[i], c) for i, c in x.items()] for x in (lines, marks)]
        figure = draw_loss(*drawn, w["epoch_axis"])
        figures.append((name, figure))
        row = [name]
        for i in range(len(runs)):
            ends = [
                series[i][-1][1] if i in series else math.nan
                for series in (lines, marks)
            ]
            cells = [f"{y:.4g}" if math.isfinite(y) else NONE for y in ends]
            row.append(" / ".join(cells) if cells != [NONE, NONE] else NONE)
        rows.append(row)
    if not rows:
        return []
    note = report.text("plots_text", points=POINTS, markers=MARKS)
    return [
        Heading(w["losses"]),
        Plots([("", draw_legend(report.names))]),
        Plots(figures, note, many=True),
        Text(w["losses_table"]),
        Table([w["loss"], *(run.name for run in runs)], rows),
        Text(w["losses_text"]),
    ]


def _weights(report: Comparison) -> List[Block]:
    w = report.words
    curves = {run.name: run.training.weights() for run in report.runs if run.training}
    curves = {name: weights for name, weights in curves.items() if weights}
    if not curves:
        return []
    terms = [
        term
        for term in weight_names()
        if any(term in weights for weights in curves.values())
    ]
    rows = [[t, *(_ends(c.get(t)) for c in curves.values())] for t in terms]
    figures = [(name, draw_weights(c, w["epoch_axis"])) for name, c in curves.items()]
    return [
        Heading(w["weights"]),
        Table([w["term"], *curves], rows),
        Text(w["weights_text"]),
        Plots(figures),
    ]


def _ends(series: Optional[Series]) -> str:
    """The first and the last value; a single one for a constant."""
    if not series:
        return NONE
    values = [f"{v:g}" for _, v in series]
    return values[0] if len(set(values)) == 1 else f"{values[0]} ... {values[-1]}"


def _decodings(report: Comparison) -> List[Block]:
    w = report.words
    names = (
        "model",
        "method",
        "checkpoint",
        "options",
        "device",
        "batch_seconds",
        "date",
    )
    head = [w[name] for name in names]
    rows, earlier = [], []
    for run in report.runs:
        for d in run.decodings:
            device = d.log.device if d.log else ""
            seconds = d.log.max_duration if d.log else None
            cells = [d.checkpoint, d.options or NONE, device or NONE]
            cells.append(NONE if seconds is None else short(seconds))
            # 2025-01-02-03-04-05 becomes 2025-01-02 03:04:05.
            cells.append(f"{d.date[:10]} {d.date[11:].replace('-', ':')}")
            rows.append([run.name, d.method, *cells])
        for d in run.earlier:
            rates = [f"{s} {r.percent:.2f}" for s, r in sorted(d.rates.items())]
            result = f"{report.unit_of(d.kind)} {', '.join(rates)}"
            cells = [d.checkpoint, d.options or NONE, result]
            earlier.append([run.name, d.method, *cells])
    if not rows:
        return []
    text = Text(report.text("decodings_text", unit=report.unit))
    blocks = [Heading(w["decodings"]), Table(head, rows, left=len(head)), text]
    if earlier:
        head = [*head[:4], w["result"]]
        blocks += [Heading(w["others"]), Table(head, earlier, left=len(head))]
    return blocks

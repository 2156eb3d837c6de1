"""The blocks of a report that compares models."""

import math
from typing import Callable, Dict, Iterator, List, Optional

from icefall_kd.report.comparison import (
    Comparison,
    Model,
    TestAudio,
    gap_closed,
    relative_change,
)
from icefall_kd.report.logs import Series, weight_names
from icefall_kd.report.page import NONE, Block, Bullets, Heading, Plots, Table, Text
from icefall_kd.report.plots import (
    MARKS,
    POINTS,
    draw_legend,
    draw_loss,
    draw_rates,
    draw_weights,
)


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
    for kind, table in rate_tables(report).items():
        unit = report.unit_of(kind)
        blocks += [Heading(report.text("rates", unit=unit)), table]
        if len(students) > 1:
            blocks.append(Text(report.text("change_text", unit=unit, **names)))
        elif students:
            values = {"student": students[0], "unit": unit, **names}
            blocks.append(Text(report.text("closed_text", **values)))
        blocks.append(_rate_plot(report, kind))
    blocks += [Heading(report.words["models"]), models_table(report)]
    if report.targets:
        blocks += [Heading(report.words["targets"]), _targets_table(report)]
    blocks += [*_losses(report), *_weights(report), *_decodings(report)]
    blocks.append(Heading(report.words["notes"]))
    notes = list(dict.fromkeys(_notes(report)))  # each once
    return [*blocks, Bullets(notes)] if notes else blocks


def rate_tables(report: Comparison) -> Dict[str, Table]:
    """A table of error rates for each kind of summary, wer and cer.

    With one student it has columns for the student's change and the gap closed; with
    several, each change is in brackets.

    Args:
      report: The data.
    """
    w, students = report.words, report.students
    tables = {}
    for kind, rows in report.sets.items():
        head = [w["method"], w["set"], *report.names]
        if len(students) == 1:
            names = {"student": students[0].name, "baseline": report.baseline}
            head += [report.text("change", **names), w["closed"]]
        cells = []
        for method, test_set in rows:
            rates = {m.name: m.percent(method, kind, test_set) for m in report.models}
            row = [_rate(rate) for rate in rates.values()]
            if len(students) == 1:
                rate, baseline = rates[students[0].name], rates[report.baseline]
                closed = gap_closed(rate, baseline, rates[report.teacher])
                row.append(_signed(relative_change(rate, baseline)))
                row.append(NONE if closed is None else f"{closed:.0f} %")
            elif students:
                for i, model in enumerate(report.models):
                    change = relative_change(rates[model.name], rates[report.baseline])
                    if model in students and change is not None:
                        row[i] += f" ({_signed(change)})"
            cells.append([method, test_set, *row])
        tables[kind] = Table(head, cells, left=2)
    return tables


def models_table(report: Comparison) -> Table:
    """A table of sizes, settings and speed of the models.

    Args:
      report: The data.
    """
    w, models = report.words, report.models
    parameters = [_shown(m.parameters, "{:,}") for m in models]
    largest = report.model(report.teacher).parameters if report.teacher else None
    for i, m in enumerate(models):
        if m.parameters and largest and m.name != report.teacher:
            share = f"{100 * m.parameters / largest:.1f}"
            parameters[i] += " (" + report.text("of_teacher", share=share) + ")"
    rows = [
        [w["exp"], *(str(m.exp) for m in models)],
        [w["parameters"], *parameters],
        [w["distillation"], *(_distillation(m, w["off"]) for m in models)],
    ]
    rows += [[w[name], *map(setting, models)] for name, setting in _SETTINGS.items()]
    for method in report.methods:
        factors = [_real_time_factor(m, method, report.audio) for m in models]
        if any(factor is not None for factor in factors):
            cells = [_shown(factor, "{:.4f}") for factor in factors]
            rows.append([report.text("rtf", method=method), *cells])
    return Table(["", *report.names], rows)


def _shown(value: Optional[float], form: str) -> str:
    return NONE if value is None else form.format(value)


def _rate(percent: float) -> str:
    return f"{percent:.2f}" if math.isfinite(percent) else NONE


def _signed(percent: Optional[float]) -> str:
    return _shown(percent, "{:+.1f} %")


def _short(value: object) -> str:
    try:
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)
    except OverflowError:  # a whole number that no float holds
        return str(value)


def _distillation(model: Model, off: str) -> str:
    """The settings of distillation; ``off`` without it."""
    training = model.training
    if training is None or training.distils is None:
        return NONE
    if not training.distils:
        return off
    settings = training.kd_settings or training.settings
    weights = [(term, settings.get(f"kd_{term}_weight")) for term in weight_names()]
    cells = [f"{t} {_short(v)}" for t, v in weights if v not in (None, 0, 0.0)]
    for name in ("temperature", "schedule"):
        if f"kd_{name}" in settings:
            cells.append(f"{name} {_short(settings[f'kd_{name}'])}")
    return "; ".join(cells)


def _epochs(model: Model) -> str:
    if model.training is None or not model.training.batches:
        return NONE
    first, last = (model.training.batches[i].epoch for i in (0, -1))
    return f"{first}-{last}" if first < last else f"{last}"


def _base_lr(model: Model) -> str:
    training = model.training
    return _short(training.settings.get("base_lr", NONE)) if training else NONE


def _batch_seconds(model: Model) -> str:
    """Seconds of audio in a batch, as "processes x seconds" for several processes."""
    settings = model.training.settings if model.training else {}
    if not settings.get("max_duration"):
        return NONE
    size, seconds = settings.get("world_size") or 1, _short(settings["max_duration"])
    return seconds if size == 1 else f"{size} x {seconds}"


# Rows of settings in which a student and its baseline should be equal.
_SETTINGS: Dict[str, Callable[[Model], str]] = {
    "epochs": _epochs,
    "base_lr": _base_lr,
    "batch": _batch_seconds,
}


def _real_time_factor(model: Model, method: str, audio: TestAudio) -> Optional[float]:
    """Seconds of decoding for a second of audio, over the sets that have both."""
    log = next((d.log for d in model.decodings if d.method == method and d.log), None)
    sets = [s for s in (log.seconds if log else ()) if audio.seconds.get(s)]
    if not sets:
        return None
    return sum(log.seconds[s] for s in sets) / sum(audio.seconds[s] for s in sets)


def _rate_plot(report: Comparison, kind: str) -> Plots:
    groups = [
        (f"{method}, {s}", [m.percent(method, kind, s) for m in report.models])
        for method, s in report.sets[kind]
    ]
    figure = draw_rates(groups, report.names, f"{report.unit_of(kind)} (%)")
    return Plots([("", figure)])


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


def _losses(report: Comparison) -> List[Block]:
    w = report.words
    trained = [(i, m.training) for i, m in enumerate(report.models) if m.training]
    train = {i: training.losses() for i, training in trained}
    valid = {i: training.valid_losses() for i, training in trained}
    curves = [*train.values(), *valid.values()]
    names = dict.fromkeys(name for series in curves for name in series)
    rows, figures = [], []
    for name in sorted(names, key=lambda n: (n.startswith("kd_"), n != "loss")):
        lines = {i: series[name] for i, series in train.items() if name in series}
        marks = {i: series[name] for i, series in valid.items() if name in series}
        figure = draw_loss(list(lines.items()), list(marks.items()), w["epoch_axis"])
        figures.append((name, figure))
        row = [name]
        for i in range(len(report.models)):
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
        Table([w["loss"], *report.names], rows),
        Text(w["losses_text"]),
    ]


def _weights(report: Comparison) -> List[Block]:
    w = report.words
    curves = {m.name: m.training.weights() for m in report.models if m.training}
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
    names = ("model", "method", "checkpoint", "options", "device", "seconds", "date")
    head = [w[name] for name in names]
    rows, earlier = [], []
    for m in report.models:
        for d in m.decodings:
            device = d.log.device if d.log else ""
            seconds = d.log.max_duration if d.log else None
            cells = [d.checkpoint, d.options or NONE, device or NONE]
            cells.append(NONE if seconds is None else _short(seconds))
            # 2025-01-02-03-04-05 becomes 2025-01-02 03:04:05.
            cells.append(f"{d.date[:10]} {d.date[11:].replace('-', ':')}")
            rows.append([m.name, d.method, *cells])
        for d in m.earlier:
            rates = [f"{s} {_rate(r.percent)}" for s, r in sorted(d.rates.items())]
            result = f"{report.unit_of(d.kind)} {', '.join(rates)}"
            cells = [d.checkpoint, d.options or NONE, result]
            earlier.append([m.name, d.method, *cells])
    if not rows:
        return []
    text = Text(report.text("decodings_text", unit=report.unit))
    blocks = [Heading(w["decodings"]), Table(head, rows, left=len(head)), text]
    if earlier:
        head = [*head[:4], w["result"]]
        blocks += [Heading(w["others"]), Table(head, earlier, left=len(head))]
    return blocks


def _notes(report: Comparison) -> Iterator[str]:
    """Remarks on missing data, and on how the numbers were measured."""
    for m in report.models:
        values = {"model": m.name, "folder": m.exp}
        if m.training is None:
            yield report.text("no_training", **values)
        elif not m.training.batches:
            yield report.text("no_batches", **values)
        elif m.training.distils is None:
            yield report.text("no_kd", **values)
        if not m.decodings:
            yield report.text("no_decoding", **values)
    for m in report.models:
        logs = [m.training, *(d.log for d in (*m.decodings, *m.earlier))]
        count = sum(log.skipped for log in logs if log)
        if count:
            yield report.text("skipped", model=m.name, count=count)
    trainings = [m.training for m in report.models if m.training]
    if trainings and not any(t.distils for t in trainings):
        yield report.text("no_weights")
    yield from _difference_notes(report)
    for m, d in report.decodings:
        for test_set, rate in sorted(d.rates.items()):
            if rate.settings > 1:
                values = {"model": m.name, "method": d.method, "set": test_set}
                values |= {"count": rate.settings, "setting": rate.setting}
                yield report.text("best_setting", **values)
    for method in report.methods:
        # Revisions of icefall differ in what they put between the options.
        options = {
            d.options.replace("_", "-"): d.options or NONE
            for _, d in report.decodings
            if d.method == method
        }
        if len(options) > 1:
            shown = "; ".join(options.values())
            yield report.text("other_options", method=method, options=shown)
    for manifest, sizes in report.targets.items():
        values = {"manifest": manifest, "cuts": sizes.cuts, "all": sizes.all_cuts}
        if sizes.cuts < sizes.all_cuts or not sizes.cuts:
            key = "some_targets" if sizes.cuts else "no_targets"
            yield report.text(key, **values)
        for store in sizes.missing:
            yield report.text("no_store", manifest=manifest, store=store)
    yield from _rtf_notes(report)


def _difference_notes(report: Comparison) -> Iterator[str]:
    """Differences between the students and the baseline other than distillation."""
    if not report.students:
        return
    baseline = report.model(report.baseline)
    if baseline.training and baseline.training.distils:
        yield report.text("baseline_distilled", baseline=baseline.name)
    settings = {"parameters": lambda m: _shown(m.parameters, "{}"), **_SETTINGS}
    for student in report.students:
        differences = []
        for name, setting in settings.items():
            values = [setting(student), setting(baseline)]
            if values[0] != values[1] and NONE not in values:
                differences.append(f"{report.words[name]} {' / '.join(values)}")
        if differences:
            names = {"student": student.name, "baseline": baseline.name}
            what = report.words["and"].join(differences)
            yield report.text("unlike", what=what, **names)


def _rtf_notes(report: Comparison) -> Iterator[str]:
    """How the real-time factors were measured, and which are missing."""
    audio = report.audio
    if not report.decodings:
        return
    if not audio.folder:
        yield report.text("rtf_needs")
        return
    factors = [_real_time_factor(m, d.method, audio) for m, d in report.decodings]
    if any(factor is not None for factor in factors):
        yield report.text("rtf_text")
    for test_set in sorted({s for _, d in report.decodings for s in d.rates}):
        values = {"set": test_set, "folder": audio.folder}
        if test_set in audio.ambiguous:
            paths = report.words["and"].join(audio.ambiguous[test_set])
            yield report.text("rtf_several", paths=paths, **values)
        elif test_set not in audio.seconds:
            yield report.text("rtf_no_manifest", **values)
    for (m, d), factor in zip(report.decodings, factors):
        if factor is None and (d.log is None or not d.log.seconds):
            yield report.text("rtf_no_log", model=m.name, method=d.method)

"""The blocks of a report that compares models."""

import math
from typing import Callable, Dict, Iterator, List, Optional

from icefall_kd.report.comparison import Comparison, Run, TestAudio
from icefall_kd.report.logs import Series, weight_names
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
    notes = list(dict.fromkeys(_notes(report)))  # each once
    return [*blocks, Bullets(notes)] if notes else blocks


def models_table(report: Comparison) -> Table:
    """A table of sizes, settings and speed of the models.

    Args:
      report: The data.
    """
    w, runs = report.words, report.runs
    parameters = [_shown(run.parameters, "{:,}") for run in runs]
    largest = report.model(report.teacher).parameters if report.teacher else None
    for i, run in enumerate(runs):
        if run.parameters and largest and report.model_of(run).name != report.teacher:
            share = f"{100 * run.parameters / largest:.1f}"
            parameters[i] += " (" + report.text("of_teacher", share=share) + ")"
    rows = [
        [w["exp"], *(str(run.exp) for run in runs)],
        [w["parameters"], *parameters],
        [w["distillation"], *(_distillation(run, w["off"]) for run in runs)],
    ]
    rows += [[w[name], *map(setting, runs)] for name, setting in _SETTINGS.items()]
    rows += [[w[name], *map(value, runs)] for name, value in _COSTS.items()]
    for method in report.methods:
        factors = [_real_time_factor(run, method, report.audio) for run in runs]
        if any(factor is not None for factor in factors):
            cells = [_shown(factor, "{:.4f}") for factor in factors]
            rows.append([report.text("rtf", method=method), *cells])
    return Table(["", *(run.name for run in runs)], rows)


def _shown(value: Optional[float], form: str) -> str:
    return NONE if value is None else form.format(value)


def _short(value: object) -> str:
    try:
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)
    except OverflowError:  # a whole number that no float holds
        return str(value)


def _distillation(run: Run, off: str) -> str:
    """The settings of distillation; ``off`` without it."""
    training = run.training
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


def _epochs(run: Run) -> str:
    if run.training is None or not run.training.batches:
        return NONE
    first, last = (run.training.batches[i].epoch for i in (0, -1))
    return f"{first}-{last}" if first < last else f"{last}"


def _base_lr(run: Run) -> str:
    training = run.training
    return _short(training.settings.get("base_lr", NONE)) if training else NONE


def _batch_seconds(run: Run) -> str:
    """Seconds of audio in a batch, as "processes x seconds" for several processes."""
    settings = run.training.settings if run.training else {}
    if not settings.get("max_duration"):
        return NONE
    size, seconds = settings.get("world_size") or 1, _short(settings["max_duration"])
    return seconds if size == 1 else f"{size} x {seconds}"


# Rows of settings in which a student and its baseline should be equal.
_SETTINGS: Dict[str, Callable[[Run], str]] = {
    "epochs": _epochs,
    "base_lr": _base_lr,
    "batch": _batch_seconds,
}


def _seed(run: Run) -> str:
    return _short(run.training.settings.get("seed", NONE)) if run.training else NONE


def _steps(run: Run) -> str:
    steps = run.steps()
    if steps is None:
        return NONE
    return f"{steps.count:,}" if steps.exact else f"≥ {steps.count:,}"


def _seconds(run: Run) -> str:
    seconds = run.training.seconds if run.training else 0
    return f"{seconds:,.0f}" if seconds else NONE


# Rows of what tells a training from others, and of what it cost.
_COSTS: Dict[str, Callable[[Run], str]] = {
    "seed": _seed,
    "steps": _steps,
    "seconds": _seconds,
}


def _real_time_factor(run: Run, method: str, audio: TestAudio) -> Optional[float]:
    """Seconds of decoding for a second of audio, over the sets that have both."""
    log = next((d.log for d in run.decodings if d.method == method and d.log), None)
    sets = [s for s in (log.seconds if log else ()) if audio.seconds.get(s)]
    if not sets:
        return None
    return sum(log.seconds[s] for s in sets) / sum(audio.seconds[s] for s in sets)


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
            cells = [_shown(form.error_rate, "{:.2f}"), size, f"{form.rtf:.4f}"]
            verdict = w["wrong" if form.is_wrong else "right"]
            rows.append([run.name, form.form, form.head, verdict, same, *cells])
    names = [w[n] for n in ("model", "export_form", "head", "verdict", "same_tokens")]
    return Table([*names, report.unit + " %", "MB", "RTF"], rows, left=4)


def _losses(report: Comparison) -> List[Block]:
    w = report.words
    runs = report.runs
    trained = [(i, run.training) for i, run in enumerate(runs) if run.training]
    colours = [report.models.index(report.model_of(run)) for run in runs]
    train = {i: training.losses() for i, training in trained}
    valid = {i: training.valid_losses() for i, training in trained}
    curves = [*train.values(), *valid.values()]
    names = dict.fromkeys(name for series in curves for name in series)
    rows, figures = [], []
    for name in sorted(names, key=lambda n: (n.startswith("kd_"), n != "loss")):
        lines = {i: series[name] for i, series in train.items() if name in series}
        marks = {i: series[name] for i, series in valid.items() if name in series}
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
            cells.append(NONE if seconds is None else _short(seconds))
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


def _notes(report: Comparison) -> Iterator[str]:
    """Remarks on missing data, and on how the numbers were measured."""
    for run in report.runs:
        values = {"model": run.name, "folder": run.exp}
        if run.training is None:
            yield report.text("no_training", **values)
        elif not run.training.batches:
            yield report.text("no_batches", **values)
        elif run.training.distils is None:
            yield report.text("no_kd", **values)
        if not run.decodings:
            yield report.text("no_decoding", **values)
    yield from _transcript_notes(report)
    yield from _seed_notes(report)
    for run in report.runs:
        logs = [run.training, *(d.log for d in (*run.decodings, *run.earlier))]
        count = sum(log.skipped for log in logs if log)
        if count:
            yield report.text("skipped", model=run.name, count=count)
    trainings = [run.training for run in report.runs if run.training]
    if trainings and not any(t.distils for t in trainings):
        yield report.text("no_weights")
    yield from _difference_notes(report)
    for run, d in report.decodings:
        for test_set, rate in sorted(d.rates.items()):
            if rate.settings > 1:
                values = {"model": run.name, "method": d.method, "set": test_set}
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
    if any(run.training and run.training.distils for run in baseline.runs):
        yield report.text("baseline_distilled", baseline=baseline.name)
    settings = {"parameters": lambda run: _shown(run.parameters, "{}"), **_SETTINGS}
    for student in report.students:
        differences = []
        for name, setting in settings.items():
            values = [
                report.words["and"].join(dict.fromkeys(map(setting, model.runs)))
                for model in (student, baseline)
            ]
            if values[0] != values[1] and NONE not in values:
                differences.append(f"{report.words[name]} {' / '.join(values)}")
        if differences:
            names = {"student": student.name, "baseline": baseline.name}
            what = report.words["and"].join(differences)
            yield report.text("unlike", what=what, **names)


def _transcript_notes(report: Comparison) -> Iterator[str]:
    """Which runs have no intervals, for want of transcripts."""
    for run in report.runs:
        missing = []
        for d, test_set in run.without_scores:
            rate = d.rates[test_set]
            if rate.settings > 1:
                values = {"method": d.method, "set": test_set, "count": rate.settings}
                values |= {"model": run.name, "setting": rate.setting}
                yield report.text("no_transcript_of_setting", **values)
            else:
                missing.append(f"{d.method}/recogs-{test_set}-*{d.suffix}.txt")
        if missing:
            values = {"folder": run.exp, "first": missing[0], "count": len(missing)}
            key = "no_transcripts" if len(missing) > 1 else "no_transcript"
            yield report.text(key, model=run.name, **values)


def _seed_notes(report: Comparison) -> Iterator[str]:
    """Where the runs of a model are not what seeds should be."""
    for m in report.models:
        seeds = [seed for seed in map(_seed, m.runs) if seed != NONE]
        if len(set(seeds)) < len(seeds):
            shown = report.words["and"].join(seeds)
            yield report.text("same_seed", model=m.name, seeds=shown)
        for method in report.methods:
            checkpoints = dict.fromkeys(
                d.checkpoint for r in m.runs for d in r.decodings if d.method == method
            )
            if len(checkpoints) > 1:
                values = {"method": method, "checkpoints": "; ".join(checkpoints)}
                yield report.text("other_checkpoints", model=m.name, **values)


def _rtf_notes(report: Comparison) -> Iterator[str]:
    """How the real-time factors were measured, and which are missing."""
    audio = report.audio
    if not report.decodings:
        return
    if not audio.folder:
        yield report.text("rtf_needs")
        return
    factors = [_real_time_factor(run, d.method, audio) for run, d in report.decodings]
    if any(factor is not None for factor in factors):
        yield report.text("rtf_text")
    for test_set in sorted({s for _, d in report.decodings for s in d.rates}):
        values = {"set": test_set, "folder": audio.folder}
        if test_set in audio.ambiguous:
            paths = report.words["and"].join(audio.ambiguous[test_set])
            yield report.text("rtf_several", paths=paths, **values)
        elif test_set not in audio.seconds:
            yield report.text("rtf_no_manifest", **values)
    without = [
        f"{run.name} ({d.method})"
        for (run, d), factor in zip(report.decodings, factors)
        if factor is None and (d.log is None or not d.log.seconds)
    ]
    if without:
        yield report.text("rtf_no_log", models=report.words["and"].join(without))

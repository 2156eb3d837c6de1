"""What a report says of its models, block by block."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from icefall_kd.report.logs import WEIGHTS, Series, Training
from icefall_kd.report.manifests import Stored
from icefall_kd.report.page import NONE, Block, Bullets, Heading, Plots, Table, Text
from icefall_kd.report.plots import MARKS, POINTS, draw_loss, draw_rates, draw_weights
from icefall_kd.report.results import Decoding


@dataclass
class Model:
    """A model's name, folder, logs and results.

    Args:
      decodings: The last one of each method.
      others: All that are not.
    """

    name: str
    exp: Path
    training: Optional[Training]
    decodings: List[Decoding]
    others: List[Decoding]

    @property
    def parameters(self) -> Optional[int]:
        if self.training is not None and self.training.parameters:
            return self.training.parameters
        logs = (d.log for d in self.decodings)
        return next((log.parameters for log in logs if log and log.parameters), None)

    def percent(self, method: str, kind: str, test_set: str) -> float:
        """The error rate; NaN where there is none."""
        for d in self.decodings:
            if (d.method, d.kind) == (method, kind) and test_set in d.rates:
                return d.rates[test_set].percent
        return math.nan


@dataclass
class Audio:
    """Seconds of audio by test set, and why a set has none.

    Args:
      folder: Of manifests; "" where none was given.
      several: Manifests of the sets that have more than one.
    """

    folder: str = ""
    seconds: Dict[str, float] = field(default_factory=dict)
    several: Dict[str, List[str]] = field(default_factory=dict)


@dataclass
class Report:
    """All that a report is made of.

    Args:
      teacher: A model's name; "" where there are none to compare.
      baseline: The student without KD; likewise.
      unit: What a wer-summary's numbers are called, WER or CER.
      targets: By manifest.
      words: Of one language, see :mod:`icefall_kd.report.words`.
    """

    models: Sequence[Model]
    teacher: str
    baseline: str
    unit: str
    audio: Audio
    targets: Dict[str, Stored]
    words: Dict[str, str]

    def model(self, name: str) -> Model:
        return next(m for m in self.models if m.name == name)

    def unit_of(self, kind: str) -> str:
        """What the rates of cer- or wer-summaries are."""
        return "CER" if kind == "cer" else self.unit

    @property
    def students(self) -> List[Model]:
        """Those compared with the baseline."""
        if not self.baseline:
            return []
        return [m for m in self.models if m.name not in (self.teacher, self.baseline)]


def relative_change(rate: float, baseline: float) -> Optional[float]:
    """Percent by which ``rate`` is above ``baseline``; None where that says nothing."""
    if not baseline > 0 or not math.isfinite(rate):
        return None
    return 100 * (rate - baseline) / baseline


def gap_closed(rate: float, baseline: float, teacher: float) -> Optional[float]:
    """Percent of the way from ``baseline`` to ``teacher``; None without a gap."""
    if not baseline > teacher or not math.isfinite(rate):
        return None
    return 100 * (baseline - rate) / (baseline - teacher)


def blocks_of(report: Report) -> List[Block]:
    """The whole report in its order."""
    w = report.words
    found: List[Block] = []
    if report.students:
        quoted = [w["quote"].format(m.name) for m in report.students]
        students = w["and"].join(quoted)
        sides = {"teacher": report.teacher, "baseline": report.baseline}
        found.append(Text(w["compared"].format(students=students, **sides)))
    for kind, table in rate_tables(report).items():
        unit = report.unit_of(kind)
        found += [Heading(w["rates"].format(unit=unit)), table]
        if len(report.students) > 1:
            found.append(Text(w["change_text"].format(unit=unit, **sides)))
        elif report.students:
            sides["student"] = report.students[0].name
            found.append(Text(w["closed_text"].format(unit=unit, **sides)))
        found.append(_rate_plot(report, kind))
    found += [Heading(w["models"]), models_table(report)]
    if report.targets:
        found += [Heading(w["targets"]), _targets_table(report)]
    found += _losses(report)
    found += _weights(report)
    found += _decodings(report)
    found += [Heading(w["notes"]), Bullets(_notes(report))]
    return [b for b in found if not isinstance(b, Bullets) or b.items]


def rate_tables(report: Report) -> Dict[str, Table]:
    """A table of error rates for each kind of summary, wer and cer."""
    w, students = report.words, report.students
    found = {}
    for kind, rows in _sets(report).items():
        head = [w["method"], w["set"], *(m.name for m in report.models)]
        if len(students) == 1:
            sides = {"student": students[0].name, "baseline": report.baseline}
            head += [w["change"].format(**sides), w["closed"]]
        lines = []
        for method, test_set in rows:
            rates = {m.name: m.percent(method, kind, test_set) for m in report.models}
            line = [method, test_set]
            for m in report.models:
                cell = _rate(rates[m.name])
                if len(students) > 1 and m in students:
                    change = relative_change(rates[m.name], rates[report.baseline])
                    cell += "" if change is None else f" ({_signed(change)})"
                line.append(cell)
            if len(students) == 1:
                own, base = rates[students[0].name], rates[report.baseline]
                line.append(_signed(relative_change(own, base)))
                closed = gap_closed(own, base, rates[report.teacher])
                line.append(NONE if closed is None else f"{closed:.0f} %")
            lines.append(line)
        found[kind] = Table(head, lines, left=2)
    return found


def models_table(report: Report) -> Table:
    """Sizes, settings and speed of the models."""
    w = report.words
    rows = [[w["exp"], *(str(m.exp) for m in report.models)]]
    sizes = [m.parameters for m in report.models]
    of = report.model(report.teacher).parameters if report.teacher else None
    row = [w["parameters"]]
    for m, size in zip(report.models, sizes):
        cell = NONE if size is None else f"{size:,}"
        if size is not None and of and m.name != report.teacher:
            share = w["of_teacher"].format(share=f"{100 * size / of:.1f}")
            cell += f" ({share})"
        row.append(cell)
    rows.append(row)
    for name, function in (
        ("distillation", _distillation),
        ("epochs", _epochs),
        ("base_lr", _base_lr),
        ("batch", _batch),
    ):
        rows.append([w[name], *(function(m.training, w) for m in report.models)])
    for method in _methods(report):
        speeds = [_rtf(m, method, report.audio) for m in report.models]
        if any(s is not None for s in speeds):
            cells = [NONE if s is None else f"{s:.4f}" for s in speeds]
            rows.append([w["rtf"].format(method=method), *cells])
    return Table(["", *(m.name for m in report.models)], rows)


def _sets(report: Report) -> Dict[str, List[Tuple[str, str]]]:
    """Methods and test sets that some model was decoded by, for wer and cer."""
    found: Dict[str, List[Tuple[str, str]]] = {}
    decodings = [d for m in report.models for d in m.decodings]
    for kind in sorted({d.kind for d in decodings}, reverse=True):
        rows = {(d.method, s) for d in decodings if d.kind == kind for s in d.rates}
        found[kind] = sorted(rows)
    return found


def _methods(report: Report) -> List[str]:
    return sorted({d.method for m in report.models for d in m.decodings})


def _rate(percent: float) -> str:
    return f"{percent:.2f}" if math.isfinite(percent) else NONE


def _signed(percent: Optional[float]) -> str:
    return NONE if percent is None else f"{percent:+.1f} %"


def _distillation(training: Optional[Training], w: Dict[str, str]) -> str:
    if training is None or training.distils is None:
        return NONE
    if not training.distils:
        return w["off"]
    s = training.kd_settings or training.settings
    terms = [(t, s.get(f"kd_{t}_weight")) for t in WEIGHTS]
    shown = [f"{t} {_short(v)}" for t, v in terms if v not in (None, 0, 0.0)]
    for name in ("temperature", "schedule"):
        if f"kd_{name}" in s:
            shown.append(f"{name} {_short(s[f'kd_{name}'])}")
    return "; ".join(shown)


def _epochs(training: Optional[Training], w: Dict[str, str]) -> str:
    first, last = training.epochs() if training else (0, 0)
    if not last:
        return NONE
    return f"{first}-{last}" if first < last else f"{last}"


def _base_lr(training: Optional[Training], w: Dict[str, str]) -> str:
    return _short(training.settings.get("base_lr", NONE)) if training else NONE


def _batch(training: Optional[Training], w: Dict[str, str]) -> str:
    seconds = training and training.settings.get("max_duration")
    if not seconds:
        return NONE
    size = training.settings.get("world_size") or 1
    return _short(seconds) if size == 1 else f"{size} x {_short(seconds)}"


def _short(value: object) -> str:
    try:
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)
    except OverflowError:  # a whole number that no float holds
        return str(value)


def _rtf(model: Model, method: str, audio: Audio) -> Optional[float]:
    """Seconds of decoding for a second of audio, over the sets that have both."""
    log = next((d.log for d in model.decodings if d.method == method and d.log), None)
    sets = [s for s in (log.seconds if log else ()) if audio.seconds.get(s)]
    if not sets:
        return None
    return sum(log.seconds[s] for s in sets) / sum(audio.seconds[s] for s in sets)


def _rate_plot(report: Report, kind: str) -> Plots:
    groups = [
        (f"{method}, {s}", [m.percent(method, kind, s) for m in report.models])
        for method, s in _sets(report)[kind]
    ]
    names = [m.name for m in report.models]
    return Plots([("", draw_rates(groups, names, f"{report.unit_of(kind)} (%)"))])


def _targets_table(report: Report) -> Table:
    w = report.words
    rows = []
    for manifest, stored in report.targets.items():
        hours = stored.seconds / 3600
        parts = ", ".join(f"{k} {n:,}" for k, n in stored.sizes.items())
        rows.append(
            [
                manifest,
                "; ".join(stored.kept) or NONE,
                f"{stored.cuts:,}",
                f"{hours:.2f}",
                f"{stored.bytes:,}",
                parts or NONE,
                f"{stored.bytes / 1e6 / hours:.2f}" if hours else NONE,
            ]
        )
    names = ("manifest", "kept", "cuts", "hours", "bytes", "parts", "mb_hour")
    return Table([w[n] for n in names], rows, left=2)


def _losses(report: Report) -> List[Block]:
    w = report.words
    trained = [(i, m) for i, m in enumerate(report.models) if m.training]
    train = {i: m.training.losses() for i, m in trained}
    valid = {i: m.training.valid_losses() for i, m in trained}
    curves = [*train.values(), *valid.values()]
    names = dict.fromkeys(name for found in curves for name in found)
    order = sorted(names, key=lambda n: (n.startswith("kd_"), n != "loss"))
    if not order:
        return []
    rows, figures = [], []
    for name in order:
        lines = [(i, s[name]) for i, s in train.items() if name in s]
        marks = [(i, s[name]) for i, s in valid.items() if name in s]
        figures.append((name, draw_loss(lines, marks, w["epoch_axis"])))
        row = [name]
        for i in range(len(report.models)):
            ends = [dict(of).get(i, [(0, math.nan)])[-1][1] for of in (lines, marks)]
            cells = [f"{y:.4g}" if math.isfinite(y) else NONE for y in ends]
            row.append(" / ".join(cells) if cells != [NONE, NONE] else NONE)
        rows.append(row)
    return [
        Heading(w["losses"]),
        Plots(
            figures,
            [m.name for m in report.models],
            w["plots_text"].format(points=POINTS, markers=MARKS),
        ),
        Text(w["losses_table"]),
        Table([w["loss"], *(m.name for m in report.models)], rows),
        Text(w["losses_text"]),
    ]


def _weights(report: Report) -> List[Block]:
    w = report.words
    found = [(m.name, m.training.weights()) for m in report.models if m.training]
    found = [(name, series) for name, series in found if series]
    if not found:
        return []
    terms = [t for t in WEIGHTS if any(t in series for _, series in found)]
    rows = [[t, *(_from_to(series.get(t)) for _, series in found)] for t in terms]
    figures = [(n, draw_weights(s, w["epoch_axis"])) for n, s in found]
    return [
        Heading(w["weights"]),
        Table([w["term"], *(name for name, _ in found)], rows),
        Text(w["weights_text"]),
        Plots(figures),
    ]


def _from_to(series: Optional[Series]) -> str:
    if not series:
        return NONE
    values = [f"{v:g}" for _, v in series]
    return values[0] if len(set(values)) == 1 else f"{values[0]} ... {values[-1]}"


def _decodings(report: Report) -> List[Block]:
    w = report.words
    names = ("model", "method", "checkpoint", "options", "device", "seconds", "date")
    rows, others = [], []
    for m in report.models:
        for d in m.decodings:
            device, seconds = (
                (d.log.device, d.log.max_duration) if d.log else ("", None)
            )
            cells = (d.checkpoint, d.options or NONE, device or NONE)
            cells += (NONE if seconds is None else _short(seconds), _date(d.date))
            rows.append([m.name, d.method, *cells])
        for d in m.others:
            rates = [f"{s} {_rate(r.percent)}" for s, r in sorted(d.rates.items())]
            unit = report.unit_of(d.kind)
            cells = (d.checkpoint, d.options or NONE, f"{unit} {', '.join(rates)}")
            others.append([m.name, d.method, *cells])
    if not rows:
        return []
    text = w["decodings_text"].format(unit=report.unit)
    found = [
        Heading(w["decodings"]),
        Table([w[n] for n in names], rows, len(names)),
        Text(text),
    ]
    if others:
        head = [*(w[n] for n in names[:4]), w["result"]]
        found += [Heading(w["others"]), Table(head, others, len(head))]
    return found


def _date(text: str) -> str:
    """``2025-01-02-03-04-05`` as one reads it."""
    return f"{text[:10]} {text[11:].replace('-', ':')}"


def _notes(report: Report) -> List[str]:
    """What is missing, and how the numbers came about."""
    w = report.words
    found = []
    for m in report.models:
        names = {"model": m.name, "folder": m.exp}
        if m.training is None:
            found.append(w["no_training"].format(**names))
        elif not m.training.batches:
            found.append(w["no_batches"].format(**names))
        elif m.training.distils is None:
            found.append(w["no_kd"].format(**names))
        if not m.decodings:
            found.append(w["no_decoding"].format(**names))
    for m in report.models:
        logs = [m.training, *(d.log for d in (*m.decodings, *m.others))]
        count = sum(log.skipped for log in logs if log)
        if count:
            found.append(w["skipped"].format(model=m.name, count=count))
    trainings = [m.training for m in report.models if m.training]
    if trainings and not any(t.distils for t in trainings):
        found.append(w["no_weights"])
    found += _unlike(report)
    for m in report.models:
        for d in m.decodings:
            for s, r in sorted(d.rates.items()):
                if r.settings > 1:
                    names = {"model": m.name, "method": d.method, "set": s}
                    count = {"count": r.settings, "setting": r.setting}
                    found.append(w["best_setting"].format(**names, **count))
    for method in _methods(report):
        decodings = [d for m in report.models for d in m.decodings]
        # Revisions of icefall differ in what they put between the options.
        options = {
            d.options.replace("_", "-"): d.options or NONE
            for d in decodings
            if d.method == method
        }
        if len(options) > 1:
            shown = "; ".join(options.values())
            found.append(w["other_options"].format(method=method, options=shown))
    for manifest, stored in report.targets.items():
        if not stored.cuts:
            found.append(w["no_targets"].format(manifest=manifest))
        elif stored.cuts < stored.all_cuts:
            numbers = {"cuts": stored.cuts, "all": stored.all_cuts}
            found.append(w["some_targets"].format(manifest=manifest, **numbers))
        for store in stored.missing:
            found.append(w["no_store"].format(manifest=manifest, store=store))
    return found + _rtf_notes(report)


def _unlike(report: Report) -> List[str]:
    """What else but distillation parts the students from the baseline."""
    w = report.words
    if not report.students:
        return []
    base = report.model(report.baseline)
    found = []
    if base.training and base.training.distils:
        found.append(w["baseline_distilled"].format(baseline=base.name))
    for m in report.students:
        sides = [(w["parameters"], m.parameters, base.parameters)]
        for name, function in (
            ("epochs", _epochs),
            ("base_lr", _base_lr),
            ("batch", _batch),
        ):
            sides.append((w[name], function(m.training, w), function(base.training, w)))
        what = [
            f"{name} {own} / {other}"
            for name, own, other in sides
            if own != other and NONE not in (own, other) and None not in (own, other)
        ]
        if what:
            names = {"student": m.name, "baseline": base.name}
            found.append(w["unlike"].format(what=w["and"].join(what), **names))
    return found


def _rtf_notes(report: Report) -> List[str]:
    w, audio = report.words, report.audio
    decodings = [(m, d) for m in report.models for d in m.decodings]
    if not decodings:
        return []
    if not audio.folder:
        return [w["rtf_needs"]]
    found = []
    for test_set in sorted({s for _, d in decodings for s in d.rates}):
        names = {"set": test_set, "folder": audio.folder}
        if test_set in audio.several:
            paths = w["and"].join(audio.several[test_set])
            found.append(w["rtf_several"].format(paths=paths, **names))
        elif test_set not in audio.seconds:
            found.append(w["rtf_no_manifest"].format(**names))
    measured = False
    for m, d in decodings:
        names = {"model": m.name, "method": d.method}
        if _rtf(m, d.method, audio) is not None:
            measured = True
        elif d.log is None or not d.log.seconds:
            found.append(w["rtf_no_log"].format(**names))
    return [w["rtf_text"], *found] if measured else found

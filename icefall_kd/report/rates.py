"""The blocks of a report that show error rates."""

import math
import warnings
from statistics import mean
from typing import Callable, Dict, List, NamedTuple, Optional

from icefall_kd.report.bootstrap import DRAWS, Interval
from icefall_kd.report.comparison import Comparison, Run, gap_closed, relative_change
from icefall_kd.report.costs import cost_plots, draw_cost_plots
from icefall_kd.report.intervals import Statistics, measure
from icefall_kd.report.page import NONE, Block, Heading, Plots, Table, Text
from icefall_kd.report.plots import draw_rates, styled, svg_of
from icefall_kd.report.results import Decoding
from icefall_kd.report.transcripts import Scores, read_scores


def rate_blocks(report: Comparison) -> List[Block]:
    """Rates with their intervals, seeds, differences, and rates at equal cost.

    Args:
      report: The data.
    """
    blocks: List[Block] = []
    for kind in report.sets:
        unit = report.unit_of(kind)
        blocks += [Heading(report.text("rates", unit=unit)), rate_table(report, kind)]
        blocks += [*_change_text(report, unit), _rate_plot(report, kind)]
        blocks += _cost_plots(report, kind)
        blocks += [*_interval_text(report, kind)]
        if any(len(m.runs) > 1 for m in report.models):
            heading = Heading(report.text("seeds_rates", unit=unit))
            blocks += [heading, seeds_table(report, kind)]
            blocks.append(Text(report.text("seeds_text", unit=unit)))
        differences = differences_table(report, kind)
        if differences.rows:
            heading = report.text("differences", unit=unit, baseline=report.baseline)
            with_seeds = report.words["seeds_error"] in differences.head
            seeds = report.words["differences_seeds"] if with_seeds else ""
            values = {"unit": unit, "draws": DRAWS + 1, "seeds": seeds}
            text = report.text("differences_text", **values)
            blocks += [Heading(heading), differences, Text(text)]
        for cost, title, text in (
            ("steps", "equal_steps", "steps_text"),
            ("seconds", "equal_seconds", "seconds_text"),
        ):
            table = equal_table(report, kind, cost)
            if table.rows:
                heading = Heading(report.text(title, unit=unit))
                blocks += [heading, table, Text(report.text(text))]
    return blocks


def rate_table(report: Comparison, kind: str) -> Table:
    """A table of error rates, with their intervals where there are transcripts.

    With one student it has columns for the student's change and the gap closed; with
    several, each change is in brackets.

    Args:
      report: The data.
      kind: The kind of summary, wer or cer.
    """
    w, students = report.words, report.students
    head = [w["method"], w["set"], *report.names]
    if len(students) == 1:
        names = {"student": students[0].name, "baseline": report.baseline}
        head += [report.text("change", **names), w["closed"]]
    cells = []
    for method, test_set in report.sets[kind]:
        rates = {m.name: m.percent(method, kind, test_set) for m in report.models}
        statistics = report.statistics.get((kind, method, test_set))
        intervals = statistics.intervals if statistics else {}
        row = [_rate(rate, intervals.get(name)) for name, rate in rates.items()]
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
    return Table(head, cells, left=2)


def seeds_table(report: Comparison, kind: str) -> Table:
    """A table of each seed's error rate, and of their standard deviation.

    Args:
      report: The data.
      kind: The kind of summary, wer or cer.
    """
    w = report.words
    rows = []
    for method, test_set in report.sets[kind]:
        for m in report.models:
            if len(m.runs) > 1:
                key = (method, kind, test_set)
                cells = [_rate(m.percent(*key)), _rate(m.deviation(*key))]
                seeds = ", ".join(map(_rate, m.percents(*key)))
                rows.append([method, test_set, m.name, *cells, seeds])
    head = [w[n] for n in ("method", "set", "model", "mean", "deviation", "seeds")]
    return Table(head, rows, left=3)


def differences_table(report: Comparison, kind: str) -> Table:
    """A table of how each model differs from the baseline on the same utterances.

    Args:
      report: The data.
      kind: The kind of summary, wer or cer.
    """
    names = ("method", "set", "model", "points", "ratio", "p", "improvement")
    head = [report.words[name] for name in names]
    rows = []
    for method, test_set in report.sets[kind]:
        statistics = report.statistics.get((kind, method, test_set))
        for name, d in statistics.differences.items() if statistics else ():
            points = f"{d.points:+.2f} [{d.interval.low:+.2f}, {d.interval.high:+.2f}]"
            ratio = NONE
            if math.isfinite(d.ratio):
                low, high = d.ratio_interval.low, d.ratio_interval.high
                ratio = f"{d.ratio:.3f} [{low:.3f}, {high:.3f}]"
            cells = [points, ratio, f"{d.p:.4f}", f"{100 * d.improvement:.1f} %"]
            deviations = [
                model.deviation(method, kind, test_set) ** 2 / len(model.runs)
                for model in (report.model(name), report.model(report.baseline))
            ]
            cells.append(_rate(math.sqrt(sum(deviations))))
            rows.append([method, test_set, name, *cells])
    if any(row[-1] != NONE for row in rows):
        head.append(report.words["seeds_error"])
    else:
        rows = [row[:-1] for row in rows]
    return Table(head, rows, left=3)


class _Result(NamedTuple):
    """An error rate at some point of a training."""

    cost: float
    percent: float
    run: Run
    decoding: Decoding


def equal_table(report: Comparison, kind: str, cost: str) -> Table:
    """A table of the students at equal cost, as far as several checkpoints are there.

    Of each run it has the last result whose cost is not above the smallest cost of all
    runs' last results; of each model the interval where these have transcripts.

    Args:
      report: The data.
      kind: The kind of summary, wer or cer.
      cost: ``steps`` or ``seconds``.
    """
    models = [m for m in report.models if m.name != report.teacher]
    rows = []
    for method, test_set in report.sets[kind] if report.students else ():
        results = {
            m.name: [_results(run, method, kind, test_set, cost) for run in m.runs]
            for m in models
        }
        runs = [run for runs in results.values() for run in runs if run]
        if not any(len({r.cost for r in run}) > 1 for run in runs):
            continue
        most = min(max(r.cost for r in run) for run in runs)
        speakers = report.audio.speakers.get(test_set)
        cells = [_at_most(results[m.name], most, test_set, speakers) for m in models]
        rows.append([method, test_set, f"{most:,.0f}", *cells])
    w = report.words
    head = [w["method"], w["set"], w[cost], *(m.name for m in models)]
    return Table(head, rows, left=2)


def _results(
    run: Run, method: str, kind: str, test_set: str, cost: str
) -> List[_Result]:
    """The results of a run that were decoded as its last one, the last first."""
    decodings = [
        d
        for d in (*run.decodings, *run.earlier)
        if (d.method, d.kind) == (method, kind) and test_set in d.rates
    ]
    results = []
    for d in decodings:
        if d.options == decodings[0].options:
            value = _COSTS[cost](run, d.saved_as)
            if value is not None:
                results.append(_Result(value, d.rates[test_set].percent, run, d))
    return results


def _at_most(
    runs: List[List[_Result]],
    most: float,
    test_set: str,
    speakers: Optional[Dict[str, str]],
) -> str:
    """The mean of each run's last result that costs ``most`` at most."""
    chosen = []
    for run in runs:
        affordable = [r for r in run if r.cost <= most]
        if not affordable:
            return NONE
        chosen.append(max(affordable, key=lambda r: r.cost))
    costs = dict.fromkeys(f"{r.cost:,.0f}" for r in chosen)
    checkpoints = dict.fromkeys(r.decoding.checkpoint for r in chosen)
    shown = f"{' / '.join(checkpoints)}; {' / '.join(costs)}"
    scores, interval = [_scores(r, test_set) for r in chosen], None
    if all(scores):
        interval = measure({"": scores}, speakers=speakers).intervals[""]
    return f"{_rate(mean(r.percent for r in chosen), interval)} ({shown})"


def _scores(result: _Result, test_set: str) -> Optional[Scores]:
    """The errors of each utterance of a result, or None without transcripts."""
    d = result.decoding
    if any(d is last for last in result.run.decodings):
        return result.run.scores.get((d.kind, d.method, test_set))
    path = d.transcripts(test_set)
    return path and read_scores(path, result.percent)


def _steps(run: Run, checkpoint: str) -> Optional[float]:
    steps = run.steps(checkpoint)
    return None if steps is None else steps.count


def _seconds(run: Run, checkpoint: str) -> Optional[float]:
    return run.training.seconds_until(checkpoint) if run.training else None


_COSTS: Dict[str, Callable[[Run, str], Optional[float]]] = {
    "steps": _steps,
    "seconds": _seconds,
}


def _rate(percent: float, interval: Optional[Interval] = None) -> str:
    if not math.isfinite(percent):
        return NONE
    if interval is None:
        return f"{percent:.2f}"
    return f"{percent:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _signed(percent: Optional[float]) -> str:
    return NONE if percent is None else f"{percent:+.1f} %"


def _change_text(report: Comparison, unit: str) -> List[Text]:
    """How the changes in the table of rates are read."""
    names = {"teacher": report.teacher, "baseline": report.baseline, "unit": unit}
    students = [m.name for m in report.students]
    if len(students) > 1:
        return [Text(report.text("change_text", **names))]
    if students:
        return [Text(report.text("closed_text", student=students[0], **names))]
    return []


def _interval_text(report: Comparison, kind: str) -> List[Text]:
    """How the intervals are computed, and what they don't contain."""
    sets: Dict[str, Statistics] = {
        test_set: statistics
        for (k, _, test_set), statistics in report.statistics.items()
        if k == kind and statistics.intervals
    }
    if not sets:
        return []
    by_speaker = any(statistics.speakers for statistics in sets.values())
    sizes = []
    for test_set, statistics in sorted(sets.items()):
        unit = "size_characters" if statistics.characters else "size_words"
        size = report.text(unit, set=test_set, words=f"{statistics.words:,}")
        sizes.append(size + report.text("size_units", count=statistics.utterances))
        if statistics.speakers:
            sizes[-1] += report.text("size_speakers", count=statistics.speakers)
    values = {"draws": f"{DRAWS:,}", "sizes": "; ".join(sizes)}
    key = "speakers_text" if by_speaker else "interval_text"
    return [Text(report.text(key, unit=report.unit_of(kind), **values))]


def _cost_plots(report: Comparison, kind: str) -> List[Plots]:
    """Rates against costs, where there are several models and a cost is known."""
    rows = cost_plots(report, [kind]) if len(report.models) > 1 else []
    if not rows:
        return []
    unit = report.unit_of(kind)
    with styled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font has no Chinese; the reader's has
        figure = draw_cost_plots(rows, report.names, report.words)
        svg = svg_of(figure, bbox_inches="tight")
    return [Plots([("", svg)], report.text("costs_text", unit=unit))]


def _rate_plot(report: Comparison, kind: str) -> Plots:
    groups, intervals = [], []
    for method, test_set in report.sets[kind]:
        rates = [m.percent(method, kind, test_set) for m in report.models]
        groups.append((f"{method}, {test_set}", rates))
        statistics = report.statistics.get((kind, method, test_set))
        of_models = statistics.intervals if statistics else {}
        intervals.append([of_models.get(name) for name in report.names])
    unit = f"{report.unit_of(kind)} (%)"
    figure = draw_rates(groups, report.names, unit, intervals)
    return Plots([("", figure)])

"""The table of a report's models: sizes, settings, steps and speed."""

from typing import Callable, Dict, Optional

from icefall_kd.report.comparison import Comparison, Run, TestAudio
from icefall_kd.report.logs import weight_names
from icefall_kd.report.page import NONE, Table


def models_table(report: Comparison) -> Table:
    """A table of sizes, settings and speed of the models.

    Args:
      report: The data.
    """
    w, runs = report.words, report.runs
    parameters = [shown(run.parameters, "{:,}") for run in runs]
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
    rows += [[w[name], *map(setting, runs)] for name, setting in SETTINGS.items()]
    rows += [[w[name], *map(value, runs)] for name, value in _COSTS.items()]
    for method in report.methods:
        factors = [real_time_factor(run, method, report.audio) for run in runs]
        if any(factor is not None for factor in factors):
            cells = [shown(factor, "{:.4f}") for factor in factors]
            rows.append([report.text("rtf", method=method), *cells])
    return Table(["", *(run.name for run in runs)], rows)


def shown(value: Optional[float], form: str) -> str:
    """Return a number as text, or a dash for None.

    Args:
      value: The number.
      form: How it is written, such as ``{:.2f}``.
    """
    return NONE if value is None else form.format(value)


def short(value: object) -> str:
    """Return a setting as text, a number without zeros at its end.

    Args:
      value: The setting.
    """
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
    cells = [f"{t} {short(v)}" for t, v in weights if v not in (None, 0, 0.0)]
    for name in ("temperature", "schedule"):
        if f"kd_{name}" in settings:
            cells.append(f"{name} {short(settings[f'kd_{name}'])}")
    return "; ".join(cells)


def _epochs(run: Run) -> str:
    if run.training is None or not run.training.batches:
        return NONE
    first, last = (run.training.batches[i].epoch for i in (0, -1))
    return f"{first}-{last}" if first < last else f"{last}"


def _base_lr(run: Run) -> str:
    training = run.training
    return short(training.settings.get("base_lr", NONE)) if training else NONE


def _batch_seconds(run: Run) -> str:
    """Seconds of audio in a batch, as "processes x seconds" for several processes."""
    settings = run.training.settings if run.training else {}
    if not settings.get("max_duration"):
        return NONE
    size, seconds = settings.get("world_size") or 1, short(settings["max_duration"])
    return seconds if size == 1 else f"{size} x {seconds}"


# Rows of settings in which a student and its baseline should be equal.
SETTINGS: Dict[str, Callable[[Run], str]] = {
    "epochs": _epochs,
    "base_lr": _base_lr,
    "batch": _batch_seconds,
}


def seed_of(run: Run) -> str:
    """Return the seed of a training, or a dash.

    Args:
      run: The training.
    """
    return short(run.training.settings.get("seed", NONE)) if run.training else NONE


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
    "seed": seed_of,
    "steps": _steps,
    "seconds": _seconds,
}


def real_time_factor(run: Run, method: str, audio: TestAudio) -> Optional[float]:
    """Return the seconds of decoding for a second of audio; None for no such sets.

    Args:
      run: The training.
      method: Of decoding, such as ``greedy_search``.
      audio: The seconds of the test sets; those without them are left out.
    """
    log = next((d.log for d in run.decodings if d.method == method and d.log), None)
    sets = [s for s in (log.seconds if log else ()) if audio.seconds.get(s)]
    if not sets:
        return None
    return sum(log.seconds[s] for s in sets) / sum(audio.seconds[s] for s in sets)

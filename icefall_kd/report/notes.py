"""The remarks at the end of a report: what is missing, and how it was measured."""

from typing import Iterator

from icefall_kd.report.comparison import Comparison
from icefall_kd.report.models import SETTINGS, real_time_factor, seed_of, shown
from icefall_kd.report.page import NONE


def notes_of(report: Comparison) -> Iterator[str]:
    """Yield remarks on missing data, and on how the numbers were measured.

    Args:
      report: The data.
    """
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
    settings = {"parameters": lambda run: shown(run.parameters, "{}"), **SETTINGS}
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
        seeds = [seed for seed in map(seed_of, m.runs) if seed != NONE]
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
    factors = [real_time_factor(run, d.method, audio) for run, d in report.decodings]
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

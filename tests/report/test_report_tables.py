"""The numbers of a report."""

import math
from pathlib import Path

import pytest

from icefall_kd.report.comparison import (
    Comparison,
    Model,
    Run,
    TestAudio,
    gap_closed,
    relative_change,
)
from icefall_kd.report.logs import LogLine, Training
from icefall_kd.report.manifests import TargetSizes
from icefall_kd.report.models import models_table
from icefall_kd.report.page import Bullets, Table
from icefall_kd.report.rates import rate_table
from icefall_kd.report.results import Decoding, DecodingLog, ErrorRate
from icefall_kd.report.tables import blocks_of
from icefall_kd.report.words import words_of

pytest.importorskip("matplotlib")


def decoding(kind="wer", suffix="epoch-3-avg-1", settings=1, log=None, **rates):
    found = {k: ErrorRate(v, "beam_4", settings) for k, v in rates.items()}
    return Decoding("greedy_search", kind, suffix, found, "2025-01-02-03-04-05", log)


def model(name, *decodings, others=(), settings=None, parameters=1000, epochs=(1, 3)):
    training = None
    if settings is not None:
        lines = [LogLine(e, 1, {"loss": 1.0}, {"ctc": 1.0}) for e in epochs]
        training = Training(settings, parameters, lines, [])
    run = Run(name, Path("exp") / name, training, list(decodings), list(others))
    return Model(name, [run])


def report(*models, audio=None, targets=None, unit="WER", lang="en"):
    names = [*(m.name for m in models), "", ""]
    roles = names[:2] if len(models) > 1 else ["", ""]
    audio = audio or TestAudio()
    return Comparison(models, *roles, unit, audio, targets or {}, words_of(lang))


def row_of(table, *first):
    (found,) = (r for r in table.rows if tuple(r[: len(first)]) == first)
    return found[len(first) :]


def notes(made):
    (found,) = (b for b in blocks_of(made) if isinstance(b, Bullets))
    return "\n".join(found.items)


@pytest.mark.parametrize(
    "rate, baseline, change",
    [(6.34, 8.53, -25.67), (9.0, 6.0, 50.0), (5.0, 5.0, 0.0)],
)
def test_a_change_is_relative_to_the_baseline(rate, baseline, change):
    assert relative_change(rate, baseline) == pytest.approx(change, abs=0.01)


@pytest.mark.parametrize("rate, baseline", [(5.0, 0.0), (math.nan, 5), (5, math.nan)])
def test_a_change_against_nothing_is_none(rate, baseline):
    assert relative_change(rate, baseline) is None


@pytest.mark.parametrize(
    "rate, closed", [(8.0, 0.0), (6.0, 50.0), (4.0, 100.0), (3.0, 125.0), (9.0, -25.0)]
)
def test_the_share_closed_is_that_of_the_way_to_the_teacher(rate, closed):
    assert gap_closed(rate, baseline=8.0, teacher=4.0) == closed


@pytest.mark.parametrize("teacher", [8.0, 9.0, math.nan])
def test_where_the_teacher_is_no_better_there_is_no_gap(teacher):
    assert gap_closed(7.0, baseline=8.0, teacher=teacher) is None


def test_three_models_have_change_and_share_beside_their_rates():
    made = report(
        model("T", decoding(a=4.0, b=8.0)),
        model("S", decoding(a=8.0, b=8.0)),
        model("K", decoding(a=7.0, b=9.0)),
    )
    table = rate_table(made, "wer")
    assert table.head[2:] == [
        *("T", "S", "K"),
        *("K against S", "share of the gap closed"),
    ]
    assert row_of(table, "greedy_search", "a") == [
        *("4.00", "8.00", "7.00", "-12.5 %", "25 %")
    ]
    # Distillation harms, and there is no gap.
    assert row_of(table, "greedy_search", "b")[3:] == ["+12.5 %", "-"]


def test_of_more_models_each_has_its_change_in_brackets():
    made = report(
        *(model(n, decoding(a=r)) for n, r in zip("TSKL", (4.0, 8.0, 6.0, 10.0)))
    )
    assert row_of(rate_table(made, "wer"), "greedy_search", "a") == [
        *("4.00", "8.00", "6.00 (-25.0 %)", "10.00 (+25.0 %)")
    ]


def test_two_models_are_not_compared():
    made = report(model("T", decoding(a=4.0)), model("S", decoding(a=8.0)))
    table = rate_table(made, "wer")
    assert row_of(table, "greedy_search", "a") == ["4.00", "8.00"]


def test_what_was_not_decoded_is_a_dash_and_a_note():
    made = report(
        model("T", decoding(a=4.0), settings={}),
        model("S", decoding(b=8.0), settings={}),
        model("K", settings={}),
    )
    table = rate_table(made, "wer")
    assert row_of(table, "greedy_search", "a") == ["4.00", "-", "-", "-", "-"]
    assert "K: no decoding results in exp/K" in notes(made)


def test_cer_summaries_have_a_table_of_their_own_whatever_the_unit():
    made = report(model("T", decoding(a=9.0), decoding("cer", a=4.0)), unit="WER")
    assert [made.unit_of(kind) for kind in made.sets] == ["WER", "CER"]
    assert row_of(rate_table(made, "cer"), "greedy_search", "a") == ["4.00"]
    assert report(model("T"), unit="CER").unit_of("wer") == "CER"


def test_parameters_are_a_share_of_the_teachers():
    made = report(
        model("T", settings={}, parameters=1310989),
        model("S", settings={}, parameters=307642),
        model("K", decoding(a=1.0, log=DecodingLog("2025", parameters=655494))),
    )
    assert row_of(models_table(made), "parameters") == [
        "1,310,989",
        "307,642 (23.5 % of the teacher's)",
        "655,494 (50.0 % of the teacher's)",
    ]


def test_distillation_is_told_by_its_weights():
    settings = {"kd_ctc_weight": "0:1,2:0.5", "kd_rnnt_weight": 0.0}
    settings |= {"kd_hard_weight": 0.5, "kd_temperature": 2.0, "kd_schedule": "warmup"}
    made = report(
        model("T"), model("S", settings={"x": 1}), model("K", settings=settings)
    )
    assert row_of(models_table(made), "distillation") == [
        "-",
        "off",
        "hard 0.5; ctc 0:1,2:0.5; temperature 2; schedule warmup",
    ]


def test_the_rtf_is_of_all_sets_whose_audio_is_known():
    log = DecodingLog("2025", {"a": 2.0, "b": 1.0, "c": 50.0}, "cpu", 200)
    made = report(
        model("T", decoding(a=1.0, b=1.0, c=1.0, log=log)),
        model("S", decoding(a=1.0)),
        audio=TestAudio("data", {"a": 20.0, "b": 40.0}),
    )
    assert row_of(models_table(made), "RTF, greedy_search") == ["0.0500", "-"]
    text = notes(made)
    assert "No RTF of c: data has no manifest cuts_c.jsonl.gz" in text
    assert "No RTF, as the log has no times: S (greedy_search)" in text
    assert "RTF: seconds of decoding by seconds of audio" in text


def test_without_manifests_there_is_no_rtf_and_a_note_says_what_to_give():
    log = DecodingLog("2025", {"a": 2.0})
    made = report(model("T", decoding(a=1.0, log=log)))
    assert not any("RTF" in row[0] for row in models_table(made).rows)
    assert "--manifest-dir" in notes(made)


def test_several_manifests_of_a_set_are_named():
    audio = TestAudio("data", {}, {"a": ["x_cuts_a.jsonl.gz", "y_cuts_a.jsonl.gz"]})
    made = report(model("T", decoding(a=1.0)), audio=audio)
    assert "several of it, x_cuts_a.jsonl.gz, y_cuts_a.jsonl.gz" in notes(made)


def test_targets_are_told_by_the_hour():
    stored = TargetSizes(4, 3, 1800.0, {"ctc": 1_500_000, "lattice": 500_000}, ["top"])
    made = report(model("T", decoding(a=1.0)), targets={"m": stored})
    (table,) = (
        b for b in blocks_of(made) if isinstance(b, Table) and b.head[0] == "manifest"
    )
    assert row_of(table, "m") == [
        *("top", "3", "0.50", "2,000,000"),
        *("ctc 1,500,000, lattice 500,000", "4.00"),
    ]
    assert "m: 3 of 4 cuts have targets" in notes(made)


def test_the_baseline_that_was_distilled_itself_is_noted():
    kd = {"kd_ctc_weight": 1.0}
    made = report(*(model(n, settings=kd) for n in "TSK"))
    assert '"S" was distilled itself' in notes(made)


def test_what_else_parts_student_and_baseline_is_noted():
    made = report(
        model("T", settings={"base_lr": 0.045}),
        model("S", settings={"base_lr": 0.045}, epochs=(1, 3)),
        model("K", settings={"base_lr": 0.02}, epochs=(1, 5), parameters=900),
    )
    text = notes(made)
    assert "parameters 900 / 1000, epochs trained 1-5 / 1-3" in text
    assert "base learning rate 0.02 / 0.045" in text
    same = report(*(model(n, settings={"base_lr": 0.045}) for n in "TSK"))
    assert "differ in more" not in notes(same)


def test_the_best_of_several_settings_is_noted():
    made = report(model("T", decoding(a=1.0, settings=3), settings={}))
    assert "T, greedy_search, a: the best of 3 settings, beam_4" in notes(made)


def test_models_decoded_with_different_options_are_noted():
    made = report(
        model("T", decoding(a=1.0, suffix="epoch-3-avg-1-context-2")),
        model("S", decoding(a=1.0, suffix="epoch-9-avg-2-chunk-16")),
    )
    assert "different options (context-2; chunk-16)" in notes(made)


def test_options_that_differ_by_their_hyphens_alone_are_the_same():
    made = report(
        model("T", decoding(a=1.0, suffix="epoch-3-avg-1-context-2-x-1")),
        model("S", decoding(a=1.0, suffix="epoch-9_avg-2_context-2_x-1")),
    )
    assert "different options" not in notes(made)


def test_other_decodings_are_listed_and_not_compared():
    made = report(
        model("T", decoding(a=5.0), others=[decoding(suffix="epoch-2-avg-1", a=1.0)])
    )
    tables = [b for b in blocks_of(made) if isinstance(b, Table)]
    assert tables[-1].rows == [
        ["T", "greedy_search", "epoch 2, avg 1", "-", "WER a 1.00"]
    ]
    assert row_of(rate_table(made, "wer"), "greedy_search", "a") == ["5.00"]


def test_weights_are_told_by_where_they_begin_and_end():
    kd = {"kd_ctc_weight": "0:0,3:1"}
    k = model("K", settings=kd)
    k.runs[0].training.batches[:] = [
        LogLine(1, 0, {"loss": 1.0}, {"hard": 1.0, "ctc": 0.0}),
        LogLine(1, 9, {"loss": 1.0}, {"hard": 1.0, "ctc": 0.75}),
    ]
    tables = [b for b in blocks_of(report(k)) if isinstance(b, Table)]
    (table,) = (t for t in tables if t.head[0] == "term")
    assert table.rows == [["hard", "1"], ["ctc", "0 ... 0.75"]]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_model_with_nothing_but_a_log_makes_a_report(lang):
    assert blocks_of(report(model("T", settings={}, epochs=()), lang=lang))

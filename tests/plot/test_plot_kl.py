"""The sums of KL by kind of frame, against a naive sum."""

import pytest
import torch

from icefall_kd.forecast.divergences import split_kl
from icefall_kd.plot.kl import (
    KINDS,
    KLPicture,
    draw_kl,
    kinds_of,
    log_probs_of,
    sum_by_kind,
    table_rows,
)
from icefall_kd.plot.words import words_of


def names(bits):
    return [KINDS[i] for i in kinds_of(torch.tensor(bits).bool()).tolist()]


def test_a_blank_frame_beside_a_spike_is_a_neighbour():
    n, s, b = "neighbour", "spike", "blank"
    assert names([0, 0, 1, 0, 0, 0]) == [b, n, s, n, b, b]
    assert names([1, 0, 1, 1, 0]) == [s, n, s, s, n]
    assert names([0, 0, 0]) == [b, b, b]
    assert names([1]) == [s]


@pytest.fixture
def models(make_model):
    teacher = make_model(seed=1).eval()
    return teacher, {"a": make_model(seed=2).eval(), "same": teacher}


def test_the_sums_are_those_of_each_frame(models, features):
    """By a naive loop over frames; a batch with padding."""
    teacher, students = models
    totals = sum_by_kind(teacher, students, [features])
    expected = {kind: [0, 0.0] for kind in KINDS}
    x, lens = features
    pairs = zip(*(log_probs_of(m, x, lens) for m in (teacher, students["a"])))
    for p, q in pairs:
        spikes = [int(row.argmax()) != 0 for row in p]
        for t, (a, b) in enumerate(zip(p.double(), q.double())):
            beside = any(spikes[max(0, t - 1) : t + 2])
            kind = "spike" if spikes[t] else "neighbour" if beside else "blank"
            expected[kind][0] += 1
            expected[kind][1] += float((a.exp() * (a - b)).sum())
    assert sum(frames for frames, _ in expected.values()) == sum(
        len(p) for p in log_probs_of(teacher, x, lens)
    )
    for kind, (frames, kl) in expected.items():
        assert totals["a"][kind].frames == frames
        assert totals["a"][kind].kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert totals["same"][kind].kl == pytest.approx(0.0, abs=1e-9)
    assert sum(kl for _, kl in expected.values()) > 0.01


def test_shares_of_the_table_are_one_in_all(models, features):
    rows = table_rows(sum_by_kind(*models, [features, features]))
    of_a = [row for row in rows if row[0] == "a"]
    for column in (3, 4):
        total = sum(float(row[column].split()[0]) for row in of_a)
        assert total == pytest.approx(100, abs=0.2)
    # A student that is its teacher has no KL to share.
    assert {row[4] for row in rows if row[0] == "same"} == {"0.0 %"}


def test_the_drawing_has_the_divergence_of_each_frame(models, features, make_utterance):
    pytest.importorskip("matplotlib")
    teacher, students = models
    utterance = make_utterance()
    own, other = (
        log_probs_of(m, utterance.features, utterance.lens)[0]
        for m in (teacher, students["a"])
    )
    rows = {"a": split_kl(own, other, 0)}
    totals = sum_by_kind(teacher, {"a": students["a"]}, [features])
    picture = KLPicture(own, rows, totals, 3)
    texts = [f"t{i}" for i in range(11)]
    figure = draw_kl(picture, utterance, texts, 0, "c1", words_of("en"))
    blank, kl = figure.axes[:2]
    shown = blank.patches[0].get_data()
    assert list(shown.values) == pytest.approx(own[:, 0].exp().tolist())
    assert shown.edges[1] == pytest.approx(0.04)
    expected = (own.exp() * (own - other)).sum(-1)
    assert list(kl.patches[0].get_data().values) == pytest.approx(
        expected.tolist(), rel=1e-4, abs=1e-6
    )

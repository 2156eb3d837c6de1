"""Measures of tiny real models against a naive computation."""

import math

import numpy as np
import pytest
import torch

from icefall_kd import ModelTap
from icefall_kd.forecast.divergences import divergences, split_kl
from icefall_kd.forecast.intervals import log_ratio, rate
from icefall_kd.forecast.measure import Listener, measure
from icefall_kd.forecast.measures import BLANKS, SPIKES
from icefall_kd.forecast.students import is_sliced
from icefall_kd.student.build import build_student
from icefall_kd.student.scores import score_heads

Y = [[3, 4, 9, 4], [5], [7, 7, 2]]
NARROW = {"encoder_dim": "8,12", "encoder_unmasked_dim": "8,8"}


class Sp:
    """A word for each label."""

    def decode(self, ids):
        return [" ".join(f"w{i}" for i in y) for y in ids]


@pytest.fixture
def batches(features):
    """The three utterances in two batches."""
    x, lens = features
    return [(x[:2], lens[:2], Y[:2]), (x[2:, : lens[2]], lens[2:], Y[2:])]


@pytest.fixture
def teacher(make_model):
    return make_model(seed=2).eval()


@pytest.fixture
def student(make_model):
    return make_model(seed=3, **NARROW).eval()


def test_the_parts_of_a_divergence_add_up_to_it():
    p, q = (3 * torch.randn(7, 5, dtype=torch.float64) for _ in range(2))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    rows = split_kl(p, q, 2)
    for i in range(7):
        a, b = log_p[i].exp().tolist(), log_q[i].exp().tolist()
        blank = a[2] * math.log(a[2] / b[2])
        blank += (1 - a[2]) * math.log((1 - a[2]) / (1 - b[2]))
        assert float(rows.blank[i]) == pytest.approx(blank)
        others = [j for j in range(5) if j != 2]
        kl = sum(
            a[j] / (1 - a[2]) * math.log(a[j] / (1 - a[2]) / (b[j] / (1 - b[2])))
            for j in others
        )
        assert float(rows.tokens[i]) == pytest.approx((1 - a[2]) * kl)
        assert bool(rows.is_spike[i]) == (max(range(5), key=a.__getitem__) != 2)
    total = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(rows.blank + rows.tokens, total)
    torch.testing.assert_close(rows.entropy, -(log_p.exp() * log_p).sum(-1))


def test_a_token_of_probability_0_leaves_the_parts_finite():
    p = torch.tensor([[0.0, -torch.inf, 2.0]])
    rows = split_kl(p, torch.zeros(1, 3), 0)
    assert all(torch.isfinite(x.double()).all() for x in rows)


@torch.no_grad()
def test_divergences_are_means_over_frames_and_over_the_teacher_s_nodes(
    teacher, student, batches
):
    # So that its best token is blank at about half of the frames, and of the nodes.
    with ModelTap(teacher) as tap:
        out = tap.encode(*batches[0][:2])
        logits = (out.ctc_logits[0], tap.lattice(out, Y[:2]).logits[0].flatten(0, 1))
    layers = (teacher.ctc_output[1], teacher.joiner.output_linear)
    for layer, rows in zip(layers, logits):
        margins = (rows[:, 0] - rows[:, 1:].amax(-1)).sort().values
        layer.bias[0] -= margins[len(rows) // 2 :][:2].mean()  # no row is a tie
    expected = {}

    def note(key, weight, p, q):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        where = BLANKS if int(p.argmax()) == 0 else SPIKES
        kl = float((log_p.exp() * (log_p - log_q)).sum())
        entropy = -float((log_p.exp() * log_p).sum())
        sums = expected.setdefault((key, where), [0.0, 0.0, 0.0])
        for i, x in enumerate((1.0, kl, entropy)):
            sums[i] += weight * x

    for x, lens, y in batches:
        for i, labels in enumerate(y):  # alone
            one = x[i : i + 1, : lens[i]], lens[i : i + 1]
            with ModelTap(teacher) as a, ModelTap(student) as b:
                outs = a.encode(*one), b.encode(*one)
                lattice = a.lattice(outs[0], [labels])
            for p, q in zip(*(out.ctc_logits[0] for out in outs)):
                note("ctc", 1.0, p, q)
            decoder_out = student.decoder(torch.tensor([[0, *labels]]))
            for t, positions in enumerate(lattice.ranges[0].tolist()):
                for s, u in enumerate(positions):
                    occupancy = float(lattice.occupancy[0, t, s])
                    if occupancy > 1 / 510:
                        q = student.joiner(
                            outs[1].encoder_out[:, t : t + 1, None],
                            decoder_out[:, None, u : u + 1],
                        )
                        p = lattice.logits[0, t, s]
                        note("rnnt", occupancy, p, q.flatten())
    found = divergences(teacher, student, batches)
    by_kind = {(m.term, m.where): m for m in found if m.term != "hidden"}
    assert set(by_kind) == set(expected) and len(expected) == 4
    for key, (count, kl, entropy) in expected.items():
        m = by_kind[key]
        assert m.count == pytest.approx(count, rel=1e-4)
        assert m.value == pytest.approx(kl / count, rel=1e-3)
        assert m.entropy == pytest.approx(entropy / count, rel=1e-3)
        assert m.blank + m.tokens == pytest.approx(m.value)


def test_a_student_that_equals_its_teacher_is_at_distance_0(teacher, batches):
    for m in divergences(teacher, teacher, batches):
        assert m.value == pytest.approx(0.0, abs=1e-9)


def test_the_hidden_distance_is_that_after_the_best_linear_map(make_model, batches):
    """A copy whose output is mapped to another width is as near as can be."""
    teacher = make_model(seed=2).eval()
    copy = make_model(seed=2).eval()
    matrix = torch.eye(24) + 0.3 * torch.randn(24, 24)
    wide = torch.cat((matrix, torch.randn(24, 8)), 1)
    copy.encoder.register_forward_hook(lambda m, args, out: (out[0] @ wide, *out[1:]))
    for model in (teacher, copy):
        model.ctc_output = model.joiner = None
    x = torch.randn(8, 400, 20)
    cuts = [(x, torch.full((8,), 400), [[1]] * 8)]
    (m,) = divergences(teacher, copy, cuts)
    assert (m.term, m.count) == ("hidden", 4 * 98)
    assert m.value == pytest.approx(0.0, abs=1e-6)


def test_measures_have_the_scores_of_each_model(teacher, student, make_model, batches):
    calls = []
    epochs = [make_model(seed=4 + i, **NARROW).eval() for i in range(3)]
    listener = Listener(batches, Sp(), advance=lambda: calls.append(0))
    measures = measure(
        listener, teacher, student, zip((2, 3, 5), epochs), hours=(2.0, 1.0)
    )
    assert len(calls) == 2 * (1 + 1 + 3 + 1)
    assert (measures.cuts, measures.words) == (3, 8)
    assert (measures.transcribed, measures.untranscribed) == (2.0, 1.0)
    shown = [measures.teacher, measures.start, *measures.epochs]
    sums = []
    for model, of_model in zip((teacher, student, *epochs), shown):
        scores = score_heads(model, batches, Sp())
        sums.append(scores.ctc_wer + scores.transducer_wer)
        assert of_model.parameters == sum(p.numel() for p in model.parameters())
        for head in ("ctc", "transducer"):
            of_head = of_model.heads[head]
            assert of_head.loss == pytest.approx(getattr(scores, f"{head}_loss"))
            assert of_head.wer.value == pytest.approx(getattr(scores, f"{head}_wer"))
    assert [m.epoch for m in measures.epochs] == [2, 3, 5]
    best = min(range(3), key=lambda i: sums[2 + i])
    assert measures.best == (2, 3, 5)[best]
    assert measures.student is measures.epochs[best]
    errors = [round(m.heads["ctc"].wer.value * 8 / 100) for m in shown]
    gap = (errors[2 + best] + 0.5) / (errors[0] + 0.5)
    assert measures.gaps["ctc"].value == pytest.approx(math.log(gap))
    change = (errors[4] + 0.5) / (min(errors[2:4]) + 0.5)
    assert measures.last == 1
    assert measures.changes["ctc"].value == pytest.approx(math.log(change))
    found = divergences(teacher, epochs[best], batches)
    assert measures.terms == found


def test_without_epochs_the_student_before_training_is_compared(
    teacher, student, batches
):
    measures = measure(Listener(batches, Sp()), teacher, student)
    assert (measures.best, measures.gaps, measures.student) == (0, {}, None)
    assert measures.terms == divergences(teacher, student, batches)
    assert measures.worse is not None and measures.sliced is False


def test_the_share_of_cuts_where_the_teacher_is_worse(teacher, student, batches):
    def losses(model):
        found = []
        for x, lens, y in batches:
            for i, labels in enumerate(y):
                one = (x[i : i + 1, : lens[i]], lens[i : i + 1], [labels])
                found.append(score_heads(model, [one], Sp()).ctc_loss)
        return found

    pairs = list(zip(losses(teacher), losses(student)))
    measures = measure(Listener(batches, Sp()), teacher, student)
    assert measures.worse == pytest.approx(sum(a > b for a, b in pairs) / 3)
    turned = measure(Listener(batches, Sp()), student, teacher)
    assert turned.worse == pytest.approx(1 - measures.worse)
    assert measure(Listener(batches, Sp()), teacher, teacher).worse == 0


def test_slices_of_the_teacher_are_told_from_random_parameters(
    make_model, make_settings, recipe
):
    teacher, settings = make_model(seed=2).eval(), make_settings()
    for init, expected in (("teacher", True), ("random", False)):
        student, _ = build_student(
            teacher, settings, dict(NARROW), recipe.get_model, init
        )
        assert is_sliced(student, teacher) is expected


# Intervals


def test_intervals_are_those_of_resampled_utterances():
    rng = np.random.default_rng(7)
    errors, others = rng.integers(0, 3, 60), rng.integers(0, 2, 60)
    words = rng.integers(2, 7, 60)
    found = rate(errors, words)
    samples, logs = [], []
    for _ in range(4000):
        i = rng.integers(0, 60, 60)
        samples.append(100 * errors[i].sum() / words[i].sum())
        rates = ((x[i].sum() + 0.5) / words[i].sum() for x in (errors, others))
        logs.append(math.log(next(rates) / next(rates)))
    assert found.value == pytest.approx(100 * errors.sum() / words.sum())
    width = found.high - found.low
    assert (found.low, found.high) == pytest.approx(
        tuple(np.percentile(samples, (2.5, 97.5))), abs=0.05 * width
    )
    ratio = log_ratio(errors, others, words)
    width = ratio.high - ratio.low
    assert (ratio.low, ratio.high) == pytest.approx(
        tuple(np.percentile(logs, (2.5, 97.5))), abs=0.08 * width
    )


def test_errors_that_two_models_share_do_not_widen_their_difference():
    errors = list(range(30))
    same = log_ratio(errors, errors, [40] * 30)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert log_ratio([0, 0, 0], [1, 1, 1], [3, 3, 3]).value == pytest.approx(
        math.log(0.5 / 3.5)
    )

"""The transducer engine."""

import sys
from itertools import product
from types import ModuleType

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.rnnt import get_engine

NAMES = (
    "rnnt_loss_smoothed",
    "get_rnnt_prune_ranges",
    "do_rnnt_pruning",
    "rnnt_loss_pruned",
)


def naive_transducer_loss(logits, symbols):
    """-log of the probability of all paths; logits (T, S + 1, V), blank 0."""
    log_probs = logits.log_softmax(-1)
    t_max, s_max = logits.size(0), len(symbols)
    alpha = {(0, 0): torch.zeros((), dtype=logits.dtype)}
    for t, s in product(range(t_max), range(s_max + 1)):
        ways = []
        if t:
            ways.append(alpha[t - 1, s] + log_probs[t - 1, s, 0])
        if s:
            ways.append(alpha[t, s - 1] + log_probs[t, s - 1, symbols[s - 1]])
        if ways:
            alpha[t, s] = torch.logsumexp(torch.stack(ways), 0)
    return -(alpha[t_max - 1, s_max] + log_probs[t_max - 1, s_max, 0])


def test_k2_comes_first(monkeypatch):
    k2, fast_rnnt = ModuleType("k2"), ModuleType("fast_rnnt")
    monkeypatch.setitem(sys.modules, "k2", k2)
    monkeypatch.setitem(sys.modules, "fast_rnnt", fast_rnnt)
    assert get_engine() is k2


def test_fast_rnnt_stands_in_for_k2(monkeypatch):
    fast_rnnt = ModuleType("fast_rnnt")
    monkeypatch.setitem(sys.modules, "k2", None)  # import raises
    monkeypatch.setitem(sys.modules, "fast_rnnt", fast_rnnt)
    assert get_engine() is fast_rnnt


def test_neither_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "k2", None)
    monkeypatch.setitem(sys.modules, "fast_rnnt", None)
    with pytest.raises(KDError) as e:
        get_engine()
    assert "neither k2 nor fast_rnnt is installed" in str(e.value)
    assert "install_native.py fast_rnnt" in str(e.value)
    assert "\n" not in str(e.value)


def test_the_engine_has_what_the_recipe_calls():
    engine = get_engine()
    assert [n for n in NAMES if not callable(getattr(engine, n, None))] == []


def test_pruned_loss_on_the_whole_lattice_is_the_naive_loss():
    engine = get_engine()
    generator = torch.Generator().manual_seed(0)
    n, t, s, v = 1, 5, 3, 6
    symbols = torch.tensor([[2, 5, 1]])
    boundary = torch.tensor([[0, 0, s, t]])
    am = torch.randn(n, t, v, generator=generator)
    lm = torch.randn(n, s + 1, v, generator=generator)
    _, (px_grad, py_grad) = engine.rnnt_loss_smoothed(
        lm=lm,
        am=am,
        symbols=symbols,
        termination_symbol=0,
        lm_only_scale=0.25,
        am_only_scale=0.0,
        boundary=boundary,
        reduction="sum",
        return_grad=True,
    )
    ranges = engine.get_rnnt_prune_ranges(
        px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=s + 1
    )
    assert ranges.tolist() == [[list(range(s + 1))] * t]
    am_pruned, lm_pruned = engine.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)
    logits = torch.tanh(am_pruned + lm_pruned)
    loss = engine.rnnt_loss_pruned(
        logits=logits,
        symbols=symbols,
        ranges=ranges,
        termination_symbol=0,
        boundary=boundary,
        reduction="sum",
    )
    expected = naive_transducer_loss(logits[0], symbols[0].tolist())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)

"""The transducer engines agree: k2, fast_rnnt and torchaudio, with one another and with
a recursion in plain torch. So do two that can't be installed in one environment."""

from importlib import import_module
from itertools import combinations

import pytest
import torch

from icefall_kd.rnnt import ENGINES

INSTALL = {
    "k2": "no k2: pip install k2==1.23.4 torch==1.13.1 (tools/make_k2_env.sh)",
    "fast_rnnt": "no fast_rnnt: python3 tools/install_native.py fast_rnnt",
    "torchaudio": "no torchaudio: pip install torchaudio",
}
SIZES = ((7, 4), (4, 4), (5, 1))  # T, U
V = 6
BLANK = 2
DTYPES = [torch.float32, torch.float64]
SCALES = [(0.0, 0.0), (0.25, 0.0), (0.25, 0.1)]  # of lm and am alone
LOSSES = ["simple", "unpruned", "pruned whole", "pruned 2", "pruned 3"]
LOSSES += [f"smoothed {lm} {am}" for lm, am in SCALES]


def engine(name):
    return pytest.importorskip(name, reason=INSTALL[name])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def batch(dtype, seed=0):
    """am (N, T, V), lm (N, U + 1, V), symbols (N, U), boundary (N, 4)."""
    g = torch.Generator().manual_seed(seed)
    t, u = (max(x) for x in zip(*SIZES))
    shapes = (len(SIZES), t, V), (len(SIZES), u + 1, V)
    am, lm = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    symbols = torch.randint(0, V - 1, (len(SIZES), u), generator=g)
    symbols += (symbols >= BLANK).long()
    boundary = torch.tensor([[0, 0, y, x] for x, y in SIZES])
    return am.to(dtype), lm.to(dtype), symbols, boundary


def ranges_of(s_range):
    """A band of labels around the diagonal; the same for every engine."""
    t, u = (max(x) for x in zip(*SIZES))
    first = torch.zeros(len(SIZES), t, dtype=torch.int64)
    for n, (t_n, u_n) in enumerate(SIZES):
        at = (torch.arange(t).clamp(max=t_n - 1) * u_n) // max(1, t_n - 1)
        first[n] = (at - s_range // 2 + 1).clamp(0, max(0, u_n + 1 - s_range))
    return first.unsqueeze(-1) + torch.arange(s_range)


# In plain torch


def recursion(label, blank, sizes=SIZES):
    """-log of the sum over all alignments of log-probabilities (N, T, U + 1)."""
    losses = []
    for n, (t_n, u_n) in enumerate(sizes):
        alpha = {}
        for t in range(t_n):
            for u in range(u_n + 1):
                ways = [alpha[t - 1, u] + blank[n, t - 1, u]] if t else []
                ways += [alpha[t, u - 1] + label[n, t, u - 1]] if u else []
                start = [label.new_zeros(())] * (t == u == 0)
                alpha[t, u] = torch.stack(ways + start).logsumexp(0)
        losses.append(-alpha[t_n - 1, u_n] - blank[n, t_n - 1, u_n])
    return torch.stack(losses)


def arcs(log_probs, symbols):
    """log P(label) and log P(blank) of (N, T, U + 1, V)."""
    n, t, u, _ = log_probs.shape
    following = torch.nn.functional.pad(symbols, (0, 1))[:, None, :, None]
    label = log_probs.gather(-1, following.expand(n, t, u, 1)).squeeze(-1)
    return label, log_probs[..., BLANK]


def joined(am, lm):
    """Logits of a joiner that isn't linear, (N, T, U + 1, V)."""
    return 3 * torch.tanh(am.unsqueeze(2) + lm.unsqueeze(1))


def smoothed(am, lm, symbols, lm_scale, am_scale):
    """Of log-probabilities interpolated with those of lm and am alone
    (arXiv:2206.13236)."""
    both = (am.unsqueeze(2) + lm.unsqueeze(1)).log_softmax(-1)
    lm_only = lm.log_softmax(-1)
    unigram = lm.softmax(-1).mean((0, 1)).log()
    am_only = (am + unigram).log_softmax(-1)
    mixed = (1 - lm_scale - am_scale) * both
    mixed = mixed + lm_scale * lm_only.unsqueeze(1) + am_scale * am_only.unsqueeze(2)
    return recursion(*arcs(mixed, symbols))


def expected_loss(which, am, lm, symbols):
    kind, *rest = which.split()
    if kind in ("simple", "smoothed"):
        return smoothed(am, lm, symbols, *map(float, rest or (0, 0)))
    label, blank = arcs(joined(am, lm).log_softmax(-1), symbols)
    if kind == "pruned" and rest != ["whole"]:
        inside = torch.zeros_like(label, dtype=torch.bool)
        inside = inside.scatter(2, ranges_of(int(rest[0])), True)
        # Not -inf: where no path comes by, a logsumexp of those has no gradient.
        label, blank = (x.masked_fill(~inside, -1e10) for x in (label, blank))
    return recursion(label, blank)


# By an engine


def engine_loss(name, which, am, lm, symbols, boundary):
    module = import_module(name)
    options = {
        "symbols": symbols,
        "termination_symbol": BLANK,
        "boundary": boundary,
        "reduction": "none",
    }
    kind, *rest = which.split()
    if kind == "simple":
        return module.rnnt_loss_simple(lm=lm, am=am, **options)
    if kind == "smoothed":
        lm_scale, am_scale = map(float, rest)
        options.update(lm_only_scale=lm_scale, am_only_scale=am_scale)
        return module.rnnt_loss_smoothed(lm=lm, am=am, **options)
    logits = joined(am, lm)
    if kind == "unpruned":
        return module.rnnt_loss(logits=logits, **options)
    s_range = lm.size(1) if rest == ["whole"] else int(rest[0])
    ranges = ranges_of(s_range)
    index = ranges.unsqueeze(-1).expand(-1, -1, -1, V)
    logits = logits.gather(2, index)
    return module.rnnt_loss_pruned(logits=logits, ranges=ranges, **options)


def torchaudio_loss(am, lm, symbols, boundary):
    """It has the unpruned loss alone, in float32."""
    torchaudio = import_module("torchaudio")
    return torchaudio.functional.rnnt_loss(
        joined(am, lm).float().contiguous(),
        symbols.int(),
        boundary[:, 3].int(),
        boundary[:, 2].int(),
        blank=BLANK,
        reduction="none",
    )


def value_and_grads(value, *inputs):
    # Each utterance by another weight, so that no gradient stands for another's.
    weights = torch.arange(1, len(value) + 1, dtype=value.dtype)
    return value.detach(), torch.autograd.grad((weights * value).sum(), inputs)


def leaves(dtype):
    am, lm, symbols, boundary = batch(dtype)
    return am.requires_grad_(), lm.requires_grad_(), symbols, boundary


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", LOSSES)
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_agrees_with_a_recursion_in_plain_torch(name, which, dtype):
    engine(name)
    am, lm, symbols, boundary = leaves(dtype)
    found = engine_loss(name, which, am, lm, symbols, boundary)
    found = value_and_grads(found, am, lm)
    expected = value_and_grads(expected_loss(which, am, lm, symbols), am, lm)
    assert found[0].dtype == dtype and torch.isfinite(found[0]).all()
    close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", LOSSES)
@pytest.mark.parametrize("pair", list(combinations(ENGINES, 2)), ids="-".join)
def test_two_engines_of_one_environment_agree(pair, which, dtype):
    results = []
    for name in pair:
        engine(name)
        am, lm, symbols, boundary = leaves(dtype)
        loss = engine_loss(name, which, am, lm, symbols, boundary)
        results.append(value_and_grads(loss, am, lm))
    close(*results)


@pytest.mark.parametrize("which", ["unpruned", "pruned whole"])
@pytest.mark.parametrize("name", ENGINES)
def test_torchaudio_agrees_on_the_whole_lattice(name, which):
    engine(name), engine("torchaudio")
    am, lm, symbols, boundary = leaves(torch.float32)
    loss = engine_loss(name, which, am, lm, symbols, boundary)
    other = torchaudio_loss(am, lm, symbols, boundary)
    close(value_and_grads(loss, am, lm), value_and_grads(other, am, lm))


@pytest.mark.parametrize("s_range", [2, 3, 5])
@pytest.mark.parametrize("pair", list(combinations(ENGINES, 2)), ids="-".join)
def test_two_engines_prune_alike(pair, s_range):
    """The occupancies are the same, and so are the ranges found from them."""
    results = []
    for name in pair:
        module = engine(name)
        am, lm, symbols, boundary = batch(torch.float32)
        _, (px_grad, py_grad) = module.rnnt_loss_smoothed(
            lm=lm,
            am=am,
            symbols=symbols,
            termination_symbol=BLANK,
            boundary=boundary,
            reduction="sum",
            return_grad=True,
        )
        ranges = module.get_rnnt_prune_ranges(
            px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=s_range
        )
        results.append((ranges, px_grad, py_grad))
    assert torch.equal(results[0][0], results[1][0])
    close(results[0][1:], results[1][1:])


def test_a_range_over_all_labels_is_the_whole_lattice_in_the_plain_recursion_too():
    am, lm, symbols, _ = batch(torch.float64)
    whole = expected_loss("unpruned", am, lm, symbols)
    close(expected_loss(f"pruned {lm.size(1)}", am, lm, symbols), whole)
    narrow = expected_loss("pruned 2", am, lm, symbols)
    assert (narrow > whole - 1e-9).all() and (narrow > whole + 1e-3).any()

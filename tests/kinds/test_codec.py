"""Codecs: their names, what they keep, their bytes, and lattices."""

import math
import zlib

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from icefall_kd import ctc_kd_loss
from icefall_kd.errors import KDError
from icefall_kd.kinds.codec import Codec
from icefall_kd.kinds.lattice import LatticeCodec
from icefall_kd.types import PrunedLattice, SparseDistribution

INF = math.inf
NAMES = ["dense", "top:1", "top:8", "adaptive:0.999:32", "sampled:12"]
SPARSE = ["top:3", "top:8@2", "adaptive:.9:5", "adaptive:.99:9@0.5"]


def logits_of(rows=13, vocab_size=11, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocab_size, generator=g)


def there_and_back(name, logits, key="c1"):
    """What was kept, and what a reader finds of it."""
    codec = Codec.parse(name)
    kept = codec.reduce(logits, key)
    data = codec.encode(logits, key)
    return kept, codec.decode([data], [len(logits)], logits.size(1)), data


def mass_of(found):
    return found.log_probs.exp().sum(-1) + found.log_tail.exp()


# Names


@pytest.mark.parametrize(
    "name", [*NAMES, "top:8@2", "adaptive:0.5:1@0.5", "sampled:255@3", "top:255"]
)
def test_a_name_is_read_and_written_back(name):
    assert str(Codec.parse(name)) == name
    assert Codec.parse(str(Codec.parse(name))) == Codec.parse(name)


@given(
    mass=st.floats(1e-6, 1),
    entries=st.integers(1, 255),
    temperature=st.floats(1e-3, 1e3),
)
def test_a_codec_is_read_back_as_it_was_written(mass, entries, temperature):
    """A store's fingerprint holds the name alone."""
    mass, temperature = float(f"{mass:.6f}"), float(f"{temperature:.4f}")
    codec = Codec("adaptive", entries, mass, temperature)
    assert Codec.parse(str(codec)) == codec


def test_names_of_one_codec_are_equal():
    assert Codec.parse("adaptive:.999:32") == Codec.parse("adaptive:0.9990:32")
    assert Codec.parse("top:8@1") == Codec.parse("top:8")
    assert Codec.parse("top:8@2.0") == Codec.parse("top:8@2")


@pytest.mark.parametrize(
    "name",
    ["", "topp:3", "top", "top:", "top:0", "top:256", "top:2.5", "top:3:4", "top:-1"]
    + ["adaptive:.9", "adaptive:0:5", "adaptive:1.1:5", "adaptive:.9:0", "dense:3"]
    + ["sampled", "sampled:0", "sampled:300", "top:3@0", "top:3@", "dense@2", "TOP:3"]
    + ["top:1.2.3", "top:3@1.2.3", "top:nan", "top:3@inf", "top:.", " top:3"],
)
def test_a_name_of_no_codec_is_refused(name):
    with pytest.raises(KDError) as e:
        Codec.parse(name)
    assert repr(name) in str(e.value) and "adaptive:MASS:MAX" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, own", [("top:3", 1), ("sampled:5@4", 4)])
def test_a_sparse_store_serves_its_own_temperature_only(name, own):
    codec = Codec.parse(name)
    codec.check_temperature(float(own))
    with pytest.raises(KDError, match=f"`temperature` {own}, or .* form dense"):
        codec.check_temperature(2.0)
    Codec.parse("dense").check_temperature(2.0)


# What is kept


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_dense_keeps_log_probabilities(scale):
    logits = logits_of(scale=scale)
    kept, found, data = there_and_back("dense", logits + 5.0)
    torch.testing.assert_close(kept, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)
    assert len(data) == 2 * logits.numel()
    torch.testing.assert_close(found, kept, rtol=2**-10, atol=2**-8)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(13), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_keeps_the_most_probable_and_the_mass_of_the_rest(k, temperature):
    logits = logits_of()
    codec = Codec("top", k, 1.0, temperature)
    kept = codec.reduce(logits)
    p = (logits.double() / temperature).softmax(-1)
    top = p.sort(-1, descending=True)
    torch.testing.assert_close(kept.log_probs.exp().double(), top.values[:, :k])
    assert torch.equal(kept.indices, top.indices[:, :k])
    rest = top.values[:, k:].sum(-1)
    torch.testing.assert_close(kept.log_tail.exp().double(), rest, rtol=1e-4, atol=0)


@pytest.mark.parametrize("mass, most", [(0.5, 9), (0.9, 3), (0.999, 9), (1.0, 7)])
def test_adaptive_reaches_its_mass_or_its_cap_with_no_entry_too_many(mass, most):
    logits = logits_of(rows=57, scale=2.0)
    kept = Codec("adaptive", most, mass).reduce(logits)
    p = logits.double().softmax(-1)
    ordered = p.sort(-1, descending=True).values
    for row in range(57):
        chosen = kept.log_probs[row] > -INF
        n = int(chosen.sum())
        total = float(ordered[row, :n].sum())
        assert total >= mass - 1e-6 or n == most
        assert float(ordered[row, : n - 1].sum()) < mass + 1e-6  # the last was needed
        own = p[row, kept.indices[row][chosen]]
        torch.testing.assert_close(kept.log_probs[row][chosen].exp().double(), own)
        assert float(kept.log_tail[row].exp()) == pytest.approx(1 - total, abs=1e-5)
    counts = (kept.log_probs > -INF).sum(-1)
    assert counts.min() >= 1 and counts.max() <= most
    assert mass == 1.0 or counts.min() < counts.max() or most == 3


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_forms_come_back_within_a_step_of_the_root(name):
    logits = logits_of(rows=41, vocab_size=29)
    kept, found, _ = there_and_back(name, logits)
    assert isinstance(found, SparseDistribution)
    width = found.indices.size(1)
    chosen = kept.log_probs > -INF
    assert width == int(chosen.sum(-1).max())
    assert torch.equal(found.log_probs > -INF, chosen[:, :width])
    assert torch.equal(found.indices, kept.indices[:, :width])
    # Rounding moves a root by half a step, and the mass that is normalised by
    # sum of sqrt(p) / 255 <= sqrt(width + 1) / 255.
    step = 0 if name.startswith("sampled") else (1 + (width + 1) ** 0.5) / 2 / 255
    a, b = found.log_probs[chosen[:, :width]], kept.log_probs[chosen]
    assert ((a / 2).exp() - (b / 2).exp()).abs().max() <= step + 1e-6
    a, b = found.log_tail, kept.log_tail
    assert ((a / 2).exp() - (b / 2).exp()).abs().max() <= step + 1e-6
    torch.testing.assert_close(mass_of(found), torch.ones(41), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 20.0, 600.0])
@pytest.mark.parametrize("name", [*NAMES, "top:3@4"])
def test_what_is_read_is_a_distribution(name, scale):
    """Peaked and flat rows, with a tail below float16's range and none at all."""
    logits = logits_of(scale=scale)
    _, found, _ = there_and_back(name, logits)
    if isinstance(found, torch.Tensor):
        mass = found.exp().sum(-1)
        assert torch.isfinite(found).all()
    else:
        mass = mass_of(found)
        assert not found.log_probs.isnan().any() and not found.log_tail.isnan().any()
        assert found.log_probs.max() <= 1e-6 and found.log_tail.max() <= 1e-6
    torch.testing.assert_close(mass, torch.ones(13), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocab_size, width", [(11, 2), (65536, 2), (65537, 4)])
def test_indices_fit_the_vocabulary(vocab_size, width):
    logits = torch.zeros(2, vocab_size)
    logits[0, -1] = logits[1, 0] = 9.0
    _, found, data = there_and_back("top:1", logits)
    assert found.indices.tolist() == [[vocab_size - 1], [0]]
    assert len(zlib.decompress(data)) == 2 * (1 + 1 + width + 1)


@pytest.mark.parametrize("name", ["top:40", "adaptive:1:40", "top:11"])
def test_more_entries_than_symbols_keep_all(name):
    logits = logits_of(scale=1.0)
    _, found, _ = there_and_back(name, logits)
    assert found.indices.shape == (13, 11)
    torch.testing.assert_close(found.log_tail.exp(), torch.zeros(13))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_come_back_as_none(name):
    _, found, _ = there_and_back(name, torch.zeros(0, 11))
    rows = found if isinstance(found, torch.Tensor) else found.indices
    assert len(rows) == 0


# In the loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_symbols_give_the_dense_loss_and_gradient(temperature):
    logits = logits_of(seed=1)
    student = logits_of(seed=2)
    results = []
    for name in ("dense", f"top:11@{temperature:g}"):
        _, teacher, _ = there_and_back(name, logits)
        if isinstance(teacher, SparseDistribution):
            teacher = SparseDistribution(
                teacher.indices[None], teacher.log_probs[None], teacher.log_tail[None]
            )
        else:
            teacher = teacher[None]
        x = student[None].clone().requires_grad_()
        value = ctc_kd_loss(x, teacher, torch.tensor([13]), temperature=temperature)
        value.backward()
        results.append((value.detach(), x.grad))
    (dense, dense_grad), (sparse, sparse_grad) = results
    assert dense > 1
    torch.testing.assert_close(sparse, dense, rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(sparse_grad, dense_grad, rtol=0, atol=5e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_symbols_before_they_are_bytes_give_the_dense_loss(temperature):
    logits, student = logits_of(seed=1), logits_of(seed=2).double()[None]
    kept = Codec("top", 11, 1.0, temperature).reduce(logits)
    kept = SparseDistribution(
        kept.indices[None], kept.log_probs[None], kept.log_tail[None]
    )
    results = []
    for teacher in (kept, logits[None]):
        x = student.clone().requires_grad_()
        value = ctc_kd_loss(x, teacher, torch.tensor([13]), temperature=temperature)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


# Sampled


def test_a_sample_is_the_same_for_the_same_key():
    logits = logits_of()
    first = there_and_back("sampled:12", logits, "c1")[2]
    torch.manual_seed(99)
    assert there_and_back("sampled:12", logits, "c1")[2] == first
    assert there_and_back("sampled:12", logits, "c2")[2] != first


@pytest.mark.parametrize("n", [1, 12, 255])
def test_a_samples_shares_are_counts(n):
    logits = logits_of(rows=29)
    kept, found, data = there_and_back(f"sampled:{n}", logits)
    shares = found.log_probs.exp()
    torch.testing.assert_close(shares.sum(-1), torch.ones(29))
    counts = shares * n
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
    assert (found.log_tail == -INF).all()
    for row in range(29):  # each symbol once
        symbols = found.indices[row][found.log_probs[row] > -INF].tolist()
        assert len(set(symbols)) == len(symbols) <= n
    dense = torch.zeros(29, 11).scatter_add(1, found.indices, shares)
    given = torch.zeros(29, 11).scatter_add(1, kept.indices, kept.log_probs.exp())
    torch.testing.assert_close(dense, given)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sample_is_unbiased(temperature):
    """Over 3000 keys the mean of 7 draws has a standard error below 0.0035."""
    logits = logits_of(rows=5, scale=1.5)
    codec = Codec("sampled", 7, 1.0, temperature)
    total = torch.zeros(5, 11)
    for key in range(3000):
        kept = codec.reduce(logits, f"cut-{key}")
        total.scatter_add_(1, kept.indices, kept.log_probs.exp())
    p = (logits / temperature).softmax(-1)
    assert (total / 3000 - p).abs().max() < 4 * 0.0035


def test_a_symbol_of_probability_0_is_not_drawn():
    logits = torch.full((50, 11), -2000.0)
    logits[:, 4] = logits[:, 10] = 0.0
    _, found, _ = there_and_back("sampled:9", logits)
    drawn = found.indices[found.log_probs > -INF]
    assert set(drawn.tolist()) == {4, 10}


# Bytes that encode() did not make


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [1, 2, 7, 30])
def test_truncated_bytes_are_an_error(name, cut):
    codec = Codec.parse(name)
    _, _, data = there_and_back(name, logits_of())
    with pytest.raises(ValueError):
        codec.decode([data[:-cut]], [13], 11)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_too_many_are_an_error(name):
    _, _, data = there_and_back(name, logits_of())
    for more in (b"\0", b"\0" * 26):
        with pytest.raises(ValueError):
            Codec.parse(name).decode([data + more], [13], 11)


def bound_and_error(name, logits):
    """What the module's docstring says of each kept symbol and the tail; its error."""
    codec, v = Codec.parse(name), logits.size(1)
    found = codec.decode([codec.encode(logits)], [len(logits)], v)
    kept = found.log_probs > -INF
    p = logits.double().softmax(-1).gather(1, found.indices).masked_fill(~kept, 0.0)
    p = torch.cat((p, 1 - p.sum(-1, keepdim=True)), 1).clamp(min=0.0).sqrt()
    read = torch.cat((found.log_probs, found.log_tail[:, None]), 1).double().exp()
    h = 1 / 510
    d = h * (kept.sum(-1, keepdim=True) + 1.0).sqrt()
    counted = torch.nn.functional.pad(kept, (0, 1), value=True)
    bound = ((h + d * p) / (1 - d))[counted]
    return bound, (read.sqrt() - p).abs()[counted]


def half_steps(k, step, side, others=5000):
    """K symbols just beside where a byte is rounded, all to the same side."""
    root = (step + 0.5 + 0.02 * side) / 255
    rest = (1 - k * root**2) / others
    return torch.tensor([[root**2] * k + [rest] * others]).log()


@given(
    seed=st.integers(0, 2**31),
    v=st.integers(2, 600),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    name=st.sampled_from(
        ["top:1", "top:16", "top:255", "adaptive:.9:5", "adaptive:1:255"]
    ),
)
def test_a_bytes_error_is_within_its_bound(seed, v, scale, name):
    bound, error = bound_and_error(name, logits_of(5, v, seed, scale))
    assert (error <= bound + 1e-6).all()


@given(
    k=st.integers(1, 255),
    share=st.floats(0.001, 0.99),
    side=st.sampled_from([-1, 1]),
)
def test_rows_that_round_to_one_side_are_within_the_bound(k, share, side):
    step = int(255 * (share / k) ** 0.5)
    assume(k * ((step + 0.52) / 255) ** 2 < 1)  # the others have a mass left
    bound, error = bound_and_error(f"top:{k}", half_steps(k, step, side))
    assert (error <= bound + 1e-6).all()


def test_the_bound_is_nearly_reached():
    """And 0.004 sqrt(p), what it is without the sum of 1 and a byte's h^2, is not."""
    bound, error = bound_and_error("top:4", half_steps(4, 127, -1))
    assert (error / bound).max() > 0.95
    bound, error = bound_and_error("top:255", torch.zeros(1, 500))
    assert error[-1] > 0.011 and error[-1] < bound[-1] < 0.026  # of the tail


@given(
    seed=st.integers(0, 2**31),
    v=st.integers(2, 600),
    scale=st.sampled_from([0.0, 1.0, 4.0, 30.0]),
)
def test_a_dense_rows_error_is_within_its_bound(seed, v, scale):
    logits = logits_of(5, v, seed, scale)
    _, found, _ = there_and_back("dense", logits)
    log_p = logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    assert ((found - log_p).abs() <= 2**-11 * (log_p.abs() + entropy) + 1e-5).all()


def test_an_index_beyond_the_vocabulary_is_an_error():
    logits = torch.zeros(3, 11)
    logits[:, 10] = 5.0
    _, _, data = there_and_back("top:2", logits)
    with pytest.raises(ValueError, match="vocabulary"):
        Codec.parse("top:2").decode([data], [3], 10)


# Lattices


def lattice(t=7, y=(3, 4, 3), s=3, vocab_size=11, seed=0, padding=0):
    """Ranges that climb from 0 to U + 1 - S, and odd occupancies."""
    g = torch.Generator().manual_seed(seed)
    u = len(y)
    first = torch.linspace(0, u + 1 - s, t).floor().long()
    ranges = first[:, None] + torch.arange(s)
    shape = (t + padding, s)
    logits = 3 * torch.randn(*shape, vocab_size, generator=g)
    occupancy = torch.rand(shape, generator=g)
    occupancy[torch.rand(shape, generator=g) < 0.3] = 1e-4  # left out
    if padding:
        ranges = torch.cat((ranges, ranges[-1:].expand(padding, s)))
        occupancy[t:] = 0
    return PrunedLattice(
        ranges[None],
        torch.tensor([[0, 0, u, t]]),
        torch.tensor([[*y, *[0] * padding]]),
        logits[None],
        occupancy[None],
    )


@pytest.mark.parametrize("name", ["collapsed", *NAMES])
def test_a_lattice_codec_is_named_as_it_is_read(name):
    codec = LatticeCodec.parse(name, 2)
    assert str(codec) == name and codec.blank_id == 2
    with pytest.raises(KDError):
        LatticeCodec.parse("collapse", 0)


@pytest.mark.parametrize("name", ["collapsed", "dense", "top:3"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_lattices_frame_comes_back(name, padding):
    given = lattice(padding=padding)
    codec = LatticeCodec.parse(name, 0)
    found = codec.decode(codec.encode(given), 11)
    assert torch.equal(found.ranges, given.ranges[0, :7])
    assert found.labels.tolist() == [3, 4, 3]
    assert found.occupancy.shape == (7, 3)
    assert (found.occupancy - given.occupancy[0, :7]).abs().max() <= 0.5 / 255 + 1e-6
    rows = found.nodes
    rows = rows if isinstance(rows, torch.Tensor) else rows.indices
    assert len(rows) == int((found.occupancy > 0).sum()) < 21


def arcs_of(given, found, blank_id):
    """Blank and next label of each node; blank twice behind the last label."""
    y = [*given.labels[0].tolist(), blank_id]
    position = given.ranges[0][found.occupancy > 0].tolist()
    return torch.tensor([[blank_id, y[u]] for u in position])


@pytest.mark.parametrize("name", ["dense", "top:3", "adaptive:.9:5@2", "sampled:7"])
def test_nodes_are_kept_as_their_codec_keeps_them(name):
    given = lattice()
    codec = LatticeCodec.parse(name, 0)
    found = codec.decode(codec.encode(given, "c1"), 11)
    logits = given.logits[0][found.occupancy > 0]
    inner = Codec.parse(name)
    data = inner.encode(logits, "c1", arcs_of(given, found, 0))
    expected = inner.decode([data], [len(logits)], 11)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found.nodes, expected)
        torch.testing.assert_close(
            found.nodes, logits.log_softmax(-1), rtol=2**-10, atol=2**-8
        )
    else:
        for field in ("indices", "log_probs", "log_tail"):
            assert torch.equal(getattr(found.nodes, field), getattr(expected, field))


@pytest.mark.parametrize("blank_id", [0, 5])
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("name", ["adaptive:.9:5", "top:1", "top:255", "adaptive:.5:9"])
def test_a_sparse_node_keeps_next_label_and_blank_however_improbable(
    name, scale, blank_id
):
    given = lattice(s=4)
    given.logits *= scale
    codec = LatticeCodec.parse(name, blank_id)
    found = codec.decode(codec.encode(given), 11)
    p = given.logits[0][found.occupancy > 0].double().softmax(-1)
    nodes, arcs = found.nodes, arcs_of(given, found, blank_id)
    for symbols in arcs.t():
        at = (nodes.indices == symbols[:, None]) & (nodes.log_probs > -torch.inf)
        assert at.sum(1).eq(1).all()  # once each
        kept = nodes.log_probs.exp().masked_fill(~at, 0).sum(1).double()
        own = p.gather(1, symbols[:, None])[:, 0]
        # A step of the square root, and what the whole row was brought to 1 by.
        assert (kept.sqrt() - own.sqrt()).abs().max() < 2 / 255
        assert kept.min() > 0.9 / 255**2
    torch.testing.assert_close(mass_of(nodes), torch.ones(len(arcs)))
    kept = (nodes.log_probs > -torch.inf).sum(1)
    assert kept.max() <= codec.node_codec.entries + 2


def test_a_store_of_before_is_read_as_it_was_written():
    """Its nodes keep what the codec chose, and perhaps no next label."""
    given = lattice()
    data = LatticeCodec.parse("top:2", 0).encode(given)
    head = zlib.decompressobj()
    head.decompress(data)
    head = data[: len(data) - len(head.unused_data)]
    inner = Codec.parse("top:2")
    found = LatticeCodec.parse("top:2", 0).decode(data, 11)
    logits = given.logits[0][found.occupancy > 0]
    old = head + inner.encode(logits)
    nodes = LatticeCodec.parse("top:2", 0).decode(old, 11).nodes
    expected = logits.log_softmax(-1).topk(2).indices
    assert torch.equal(nodes.indices, expected)


@pytest.mark.parametrize("blank_id", [0, 5])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_collapsed_nodes_are_sums_over_classes(blank_id, scale):
    y = (3, 4, 3)
    given = lattice(y=y, s=4)  # all positions, the last one with no label behind
    given.logits *= scale
    codec = LatticeCodec.parse("collapsed", blank_id)
    found = codec.decode(codec.encode(given), 11)
    row = 0
    for t in range(7):
        for s in range(4):
            if found.occupancy[t, s] == 0:
                continue
            p = given.logits[0, t, s].double().softmax(-1)
            u = int(given.ranges[0, t, s])
            label = float(p[y[u]]) if u < len(y) else 0.0
            blank = float(p[blank_id])
            nodes = found.nodes
            assert nodes.log_probs[row, 0].exp() == pytest.approx(label, abs=2e-3)
            assert nodes.log_probs[row, 1].exp() == pytest.approx(blank, abs=2e-3)
            assert nodes.log_tail[row].exp() == pytest.approx(
                1 - label - blank, abs=4e-3
            )
            assert int(nodes.indices[row, 1]) == blank_id
            if u < len(y):
                assert int(nodes.indices[row, 0]) == y[u]
            row += 1
    assert row == len(found.nodes.indices)
    torch.testing.assert_close(mass_of(found.nodes), torch.ones(row))


def test_a_collapsed_lattice_of_a_sure_teacher_stays_a_distribution():
    given = lattice()
    given.logits *= 100
    codec = LatticeCodec.parse("collapsed", 0)
    found = codec.decode(codec.encode(given), 11).nodes
    assert not found.log_probs.isnan().any() and torch.isfinite(found.log_tail).all()
    torch.testing.assert_close(mass_of(found), torch.ones(len(found.indices)))


@pytest.mark.parametrize("name", ["collapsed", "dense", "top:3", "sampled:5"])
@pytest.mark.parametrize("cut", [1, 2, 9, 60])
def test_truncated_lattice_bytes_are_an_error(name, cut):
    codec = LatticeCodec.parse(name, 0)
    data = codec.encode(lattice())
    with pytest.raises(ValueError):
        codec.decode(data[:-cut], 11)
    with pytest.raises(ValueError):
        codec.decode(data + b"\0", 11)


def test_a_lattice_of_a_batch_is_an_error():
    one = lattice()
    two = PrunedLattice(
        *(
            torch.cat((x, x))
            for x in (one.ranges, one.boundary, one.labels, one.logits, one.occupancy)
        )
    )
    with pytest.raises(ValueError, match="2 utterances"):
        LatticeCodec.parse("collapsed", 0).encode(two)

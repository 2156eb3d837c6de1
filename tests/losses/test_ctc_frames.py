"""ctc_kd_loss: which frames count, delays, guards and diagnostics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_kd.errors import KDError
from icefall_kd.losses import kl
from icefall_kd.losses import late as late_module
from icefall_kd.losses.alignment import align_late_student
from icefall_kd.losses.ctc import ctc_kd_loss
from icefall_kd.losses.frames import (
    FRAME_WEIGHTINGS,
    ctc_diagnostics,
    flatten_frames,
    frame_weights,
)
from icefall_kd.losses.kl import row_kl
from icefall_kd.types import SparseDistribution

INF, NAN = math.inf, math.nan
every_frames = pytest.mark.parametrize("frames", FRAME_WEIGHTINGS)


def batch(seed=0, n=3, t=9, v=5, dtype=torch.float64, blank_id=0):
    """Logits of student and teacher, the teacher's mostly blank, and lengths."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, n, t, v, generator=g, dtype=torch.float64)
    teacher[..., blank_id] += 4
    lengths = torch.randint(0, t + 1, (n,), generator=g)
    if n:
        lengths[0] = t
    return student.to(dtype), teacher.to(dtype), lengths


def sparse_of(teacher, k, temperature=1.0):
    """The K best symbols of each frame, and the rest."""
    log_p = (teacher / temperature).log_softmax(-1)
    top, indices = log_p.topk(k)
    rest = log_p.scatter(-1, indices, -INF).logsumexp(-1)
    return SparseDistribution(indices, top, rest)


def form(teacher, k, temperature=1.0):
    return teacher if k is None else sparse_of(teacher, k, temperature)


def up_to(lengths, t):
    return torch.arange(t) < lengths.unsqueeze(1)


def value_and_grads(value, *inputs):
    return value.detach(), torch.autograd.grad(value, inputs)


def loss_and_grad(loss, student, *args, **options):
    student = student.detach().clone().requires_grad_()
    args, named = args[:2], zip(("temperature", "mask"), args[2:], strict=False)
    options = {**dict(named), **options}
    value, (grad,) = value_and_grads(loss(student, *args, **options), student)
    return value, grad


# The naive twin


def said(teacher, n, t, temperature):
    """The symbols of a frame with their probabilities, and that of all others."""
    if isinstance(teacher, SparseDistribution):
        p = teacher.log_probs[n, t].exp()
        kept = zip(teacher.indices[n, t].tolist(), p, strict=True)
        return {i: x for i, x in kept if x > 0}, teacher.log_tail[n, t].exp()
    return dict(enumerate((teacher[n, t] / temperature).softmax(-1))), torch.zeros(())


def naive_weights(teacher, valid, frames, blank_id=0, temperature=1.0):
    weights = torch.zeros(valid.shape, dtype=torch.float64)
    for n in range(len(valid)):
        times = valid[n].nonzero().squeeze(1).tolist()
        p = {t: said(teacher, n, t, temperature) for t in times}
        spikes = [t for t in times if max(p[t][0], key=p[t][0].get) != blank_id]
        h = {
            t: -sum(x * x.log() for x in (*kept.values(), tail) if x > 0)
            for t, (kept, tail) in p.items()
        }
        for t in times:
            weights[n, t] = {
                "all": 1.0,
                "non-blank": float(t in spikes),
                "symmetric": float(any(abs(t - s) <= 2 for s in spikes)),
                "entropy": (h[t] + 1e-5) / (sum(h.values()) / len(h) + 1e-5),
                "confidence": max(p[t][0].values()),
            }[frames]
    return weights


def naive_kl(p, tail, z, temperature):
    q = (z / temperature).softmax(-1)
    total = sum(x * (x.log() - q[i].log()) for i, x in p.items())
    if tail > 0:
        others = [i for i in range(len(q)) if i not in p]
        total = total + tail * (tail.log() - q[others].sum().log())
    return temperature**2 * total


def naive_loss(
    student,
    teacher,
    lengths,
    temperature=1.0,
    mask=None,
    *,
    frame_weighting,
    delay,
    blank_id=0,
):
    valid = up_to(lengths, student.size(1))
    valid = valid if mask is None else valid & mask
    weights = naive_weights(teacher, valid, frame_weighting, blank_id, temperature)
    total = 0 * student[valid].sum()

    def cost(n, t, s):
        p, tail = said(teacher, n, t, temperature)
        weight = max(weights[n, t], weights[n, s])
        return weight * naive_kl(p, tail, student[n, s], temperature)

    for n in range(len(valid)):
        end = -1  # frame by frame, the stretches of valid frames
        for begin in range(valid.size(1)):
            if begin <= end or not valid[n, begin]:
                continue
            end = begin
            while end + 1 < valid.size(1) and valid[n, end + 1]:
                end += 1
            best = {(begin - 1, begin - 1): 0 * total}
            for t in range(begin, end + 1):
                for s in range(t, min(t + delay, end) + 1):
                    before = [(t - 1, s - 1), (t - 1, s), (t, s - 1)]
                    least = min((best[x] for x in before if x in best), default=None)
                    if least is not None:
                        best[t, s] = least + cost(n, t, s)
            total = total + best[end, end]
    return total


def drawn(seed, n, t, v, k, temperature):
    blank_id = seed % v
    student, teacher, lengths = batch(seed, n, t, v, blank_id=blank_id)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, t, generator=g) < 0.8 if seed % 2 else None
    teacher = form(teacher, k and min(k, v), temperature)
    return student, (teacher, lengths, temperature, mask), blank_id


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 3),
    t=st.integers(0, 7),
    v=st.integers(1, 6),
    k=st.sampled_from([None, 1, 2, 6]),
    temperature=st.sampled_from([0.7, 1.0, 3.0]),
    frames=st.sampled_from(FRAME_WEIGHTINGS),
    delay=st.integers(0, 3),
)
def test_equals_the_naive_twin(seed, n, t, v, k, temperature, frames, delay):
    student, args, blank_id = drawn(seed, n, t, v, k, temperature)
    options = {"frame_weighting": frames, "delay": delay, "blank_id": blank_id}
    value, grad = loss_and_grad(ctc_kd_loss, student, *args, **options)
    expected = loss_and_grad(naive_loss, student, *args, **options)
    torch.testing.assert_close(value, expected[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(grad, expected[1], rtol=1e-8, atol=1e-9)


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("k", [None, 2])
def test_gradcheck(frames, delay, k):
    student, teacher, lengths = batch(n=2, t=5, v=4)
    teacher = form(teacher, k, 2.0)
    assert torch.autograd.gradcheck(
        lambda s: ctc_kd_loss(
            s, teacher, lengths, temperature=2.0, frame_weighting=frames, delay=delay
        ),
        student.requires_grad_(),
    )


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
def test_sparse_of_all_symbols_equals_dense(frames, delay):
    student, teacher, lengths = batch(seed=2, v=6)
    options = {"frame_weighting": frames, "delay": delay}
    args = (lengths, 1.5)
    dense = loss_and_grad(ctc_kd_loss, student, teacher, *args, **options)
    kept = sparse_of(teacher, 6, 1.5)
    sparse = loss_and_grad(ctc_kd_loss, student, kept, *args, **options)
    torch.testing.assert_close(sparse, dense)
    assert dense[0] > 0.1


@pytest.mark.parametrize("k", [None, 2])
def test_the_defaults_are_the_plain_row_kl_bit_for_bit(k):
    student, teacher, lengths = batch(seed=1, n=4, t=13, v=7, dtype=torch.float32)
    teacher = form(teacher, k)
    rows = up_to(lengths, 13).flatten().nonzero().squeeze(1)

    def plain(s):
        return row_kl(
            s.flatten(0, 1),
            flatten_frames(teacher, s.device),
            temperature=1.0,
            student_index=rows,
            teacher_index=rows,
        )

    expected = loss_and_grad(plain, student)
    for options in ({}, {"frame_weighting": "all", "delay": 0, "blank_id": 3}):
        found = loss_and_grad(ctc_kd_loss, student, teacher, lengths, **options)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


# Which frames


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 3),
    t=st.integers(0, 9),
    v=st.integers(1, 6),
    k=st.sampled_from([None, 1, 2, 6]),
    temperature=st.sampled_from([1.0, 3.0]),
    frames=st.sampled_from(FRAME_WEIGHTINGS),
)
def test_weights_equal_the_naive_ones(seed, n, t, v, k, temperature, frames):
    _, (teacher, lengths, _, mask), blank_id = drawn(seed, n, t, v, k, temperature)
    valid = up_to(lengths, t)
    valid = valid if mask is None else valid & mask
    found = frame_weights(
        teacher, valid, frames, blank_id=blank_id, temperature=temperature
    )
    expected = naive_weights(teacher, valid, frames, blank_id, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-9, atol=1e-12)
    assert found.shape == (n, t) and found[~valid].eq(0).all()


def spiky(spikes, t, v=4, symbols=None):
    """Logits with a symbol, by default 2, at some frames and blank at the others."""
    logits = torch.zeros(1, t, v)
    logits[..., 0] = 5
    logits[0, spikes, 2 if symbols is None else symbols] = 9
    return logits


@pytest.mark.parametrize(
    "spikes, length, expected",
    [
        ([4], 10, [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]),
        ([0], 10, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
        ([6], 8, [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]),
        ([2, 3, 8], 10, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ([], 10, [0] * 10),
        ([9], 7, [0] * 10),
    ],
)
def test_symmetric_keeps_two_blank_frames_on_either_side(spikes, length, expected):
    valid = up_to(torch.tensor([length]), 10)
    found = frame_weights(spiky(spikes, 10), valid, "symmetric")
    assert found[0].tolist() == expected


def test_a_spike_outside_the_mask_has_no_neighbours():
    valid = torch.ones(1, 10, dtype=torch.bool)
    valid[0, 4] = False
    assert not frame_weights(spiky([4], 10), valid, "symmetric").any()


@pytest.mark.parametrize("blank_id", [0, 2])
def test_non_blank_asks_for_the_blank_symbol(blank_id):
    valid = torch.ones(1, 6, dtype=torch.bool)
    found = frame_weights(spiky([1, 4], 6), valid, "non-blank", blank_id=blank_id)
    spikes = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert found[0].tolist() == [abs(x - (blank_id == 2)) for x in spikes]


@pytest.mark.parametrize("symbol", [0, 3])
def test_a_tail_is_no_symbol(symbol):
    """The best kept symbol has less mass than the tail."""
    valid = torch.ones(1, 1, dtype=torch.bool)
    kept = torch.tensor([[[symbol, 1]]]), torch.tensor([[[0.3, 0.1]]]).log()
    teacher = SparseDistribution(*kept, torch.tensor([[0.6]]).log())
    assert frame_weights(teacher, valid, "non-blank").item() == (symbol != 0)
    assert frame_weights(teacher, valid, "confidence").item() == pytest.approx(0.3)


@pytest.mark.parametrize("blank_id", [0, 3])
def test_a_frame_that_keeps_no_symbol_is_not_a_non_blank_one(blank_id):
    none = SparseDistribution(
        torch.zeros(1, 4, 2, dtype=torch.int64),
        torch.full((1, 4, 2), -INF),
        torch.zeros(1, 4),
    )
    valid = torch.ones(1, 4, dtype=torch.bool)
    for frames in ("non-blank", "symmetric", "confidence"):
        assert not frame_weights(none, valid, frames, blank_id=blank_id).any()
    assert frame_weights(none, valid, "entropy").tolist() == [[1.0] * 4]


@pytest.mark.parametrize("k", [None, 2])
def test_entropy_weights_have_mean_1_and_favour_uncertain_frames(k):
    _, teacher, lengths = batch(seed=5, n=4, t=11, v=6)
    lengths[1] = 3
    valid = up_to(lengths, 11)
    teacher[0, 4] = 0
    weights = frame_weights(form(teacher, k), valid, "entropy")
    mean = weights.sum(1) / valid.sum(1)
    torch.testing.assert_close(mean[lengths > 0], torch.ones(4).double()[lengths > 0])
    if k is None:
        assert weights[0].argmax() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [None, 1])
def test_a_teacher_without_entropy_weighs_all_frames_alike(dtype, k):
    student, _, lengths = batch(dtype=dtype)
    teacher = torch.full((3, 9, 5), -INF)
    teacher[..., 1] = 0
    weights = frame_weights(form(teacher, k), up_to(lengths, 9), "entropy")
    assert torch.equal(weights, up_to(lengths, 9).float())
    value, grad = loss_and_grad(
        ctc_kd_loss, student, form(teacher, k), lengths, frame_weighting="entropy"
    )
    assert torch.isfinite(value) and torch.isfinite(grad).all() and value > 1


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
def test_symbols_that_the_teacher_excludes_stay_finite(frames, delay):
    student, teacher, lengths = batch(v=6, dtype=torch.float32)
    teacher[..., 3] = -INF
    teacher[0, 2, 1:] = -INF
    teacher[0, 3] = -INF  # of which nothing is known
    options = {"frame_weighting": frames, "delay": delay}
    value, grad = loss_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0, **options)
    assert torch.isfinite(value) and torch.isfinite(grad).all() and value > 0


# Both together


@every_frames
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("k", [None, 5])
def test_a_student_that_equals_its_teacher_has_zero_loss(frames, delay, k):
    _, teacher, lengths = batch(dtype=torch.float32)
    options = {"frame_weighting": frames, "delay": delay}
    args = (teacher.clone(), form(teacher, k, 2.0), lengths, 2.0)
    value, grad = loss_and_grad(ctc_kd_loss, *args, **options)
    eps = 0 if k is None else 1e-6
    assert value.abs() <= 27 * eps and grad.abs().max() <= eps


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("garbage", [NAN, INF, 0.5])
def test_what_is_not_valid_is_never_read(frames, delay, k, garbage):
    student, teacher, lengths = batch(seed=3, n=4, dtype=torch.float32)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, 5] = False
    skipped = ~(mask & up_to(lengths, 9))
    teacher = form(teacher, k)
    args = (teacher, lengths, 1.0, mask)
    options = {"frame_weighting": frames, "delay": delay}
    expected = loss_and_grad(ctc_kd_loss, student, *args, **options)
    student[skipped] = garbage
    if k is None:
        teacher[skipped] = garbage
    else:
        teacher.indices[skipped] = 10**6
        teacher.log_probs[skipped] = teacher.log_tail[skipped] = garbage
    value, grad = loss_and_grad(ctc_kd_loss, student, *args, **options)
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])
    assert grad[skipped].eq(0).all() and value > 0


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
def test_more_padding_changes_nothing(frames, delay):
    student, teacher, lengths = batch(seed=4)
    options = {"frame_weighting": frames, "delay": delay}
    expected = loss_and_grad(ctc_kd_loss, student, teacher, lengths, **options)
    more = torch.full((3, 5, 5), 7.0, dtype=torch.float64)
    longer = [torch.cat([x, more], 1) for x in (student, teacher)]
    value, grad = loss_and_grad(ctc_kd_loss, *longer, lengths, **options)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(grad[:, :9], expected[1])


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("k", [None, 2])
def test_the_sum_over_a_batch_is_the_sum_of_its_utterances(frames, delay, k):
    student, teacher, _ = batch(seed=6, n=3)
    lengths = torch.tensor([9, 9, 5])
    options = {"frame_weighting": frames, "delay": delay}
    alone = [
        ctc_kd_loss(s[None], form(y[None], k), n[None], **options)
        for s, y, n in zip(student, teacher, lengths, strict=True)
    ]
    together = ctc_kd_loss(student, form(teacher, k), lengths, **options)
    torch.testing.assert_close(together, torch.stack(alone).sum())


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_valid_frame_gives_0_with_zero_gradient(frames, delay, k, dtype):
    student, teacher, lengths = batch(dtype=dtype)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    args = (form(teacher.float(), k), lengths, 2.0, mask)
    options = {"frame_weighting": frames, "delay": delay}
    value, grad = loss_and_grad(ctc_kd_loss, student, *args, **options)
    assert value == 0 and value.dtype == torch.float32
    assert grad.dtype == dtype and grad.eq(0).all()


@pytest.mark.parametrize("frames", ["non-blank", "symmetric"])
def test_an_utterance_without_a_spike_gives_0_with_zero_gradient(frames):
    student, _, _ = batch(n=1)
    value, grad = loss_and_grad(
        ctc_kd_loss, student, spiky([], 9, 5), torch.tensor([9]), frame_weighting=frames
    )
    assert value == 0 and grad.eq(0).all()


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(frames, delay, k, dtype):
    student, teacher, lengths = batch(seed=7, t=11, v=17, dtype=dtype)
    options = {"frame_weighting": frames, "delay": delay}
    args = (form(teacher.float(), k), lengths)
    expected = loss_and_grad(ctc_kd_loss, student.float(), *args, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = loss_and_grad(ctc_kd_loss, student, *args, **options)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(grad.float(), expected[1], rtol=2e-2, atol=1e-2)
    assert value > 0.1


@every_frames
@pytest.mark.parametrize("k", [None, 2])
def test_chunks_change_nothing(frames, k, monkeypatch):
    student, teacher, lengths = batch(seed=8)
    args = (student, form(teacher, k), lengths)
    expected = loss_and_grad(ctc_kd_loss, *args, frame_weighting=frames, delay=2)
    monkeypatch.setitem(kl.CHUNK, "cpu", 12)  # 2 rows
    found = loss_and_grad(ctc_kd_loss, *args, frame_weighting=frames, delay=2)
    torch.testing.assert_close(found, expected)


# Delays


def late(teacher, by):
    """A student that says what its teacher said, some frames later."""
    teacher[:, -by - 1 :] = teacher[:, -by - 1 :][:, :1]  # nothing new at the end
    student = teacher.roll(by, 1)
    student[:, :by] = teacher[:, :1]  # nor before the beginning
    return student


@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_frames
def test_a_student_that_is_late_has_zero_loss_at_its_delay(by, k, dtype, frames):
    _, teacher, _ = batch(seed=9, dtype=dtype)
    student = late(teacher, by)
    args = (form(teacher, k), torch.tensor([9, 9, 9]))
    value, grad = loss_and_grad(
        ctc_kd_loss, student, *args, delay=by, frame_weighting=frames
    )
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    assert value.abs() < bound and grad.abs().max() < bound
    if k is None:
        assert value == 0
    assert ctc_kd_loss(student, *args, delay=by - 1) > 1
    assert ctc_kd_loss(student, *args, delay=by + 1).abs() < bound


def test_frames_that_lag_by_turns_have_zero_loss():
    """Each label by another delay, and one kept for two frames: the same labels."""
    teacher = spiky([2, 5, 9], 13, symbols=[1, 2, 1])
    student = spiky([2, 7, 10, 11], 13, symbols=[1, 2, 1, 1])
    value, grad = loss_and_grad(
        ctc_kd_loss, student, teacher, torch.tensor([13]), delay=2
    )
    assert value == 0 and grad.abs().max() < 1e-6


WRONG = {
    "inserted behind": ([3, 5], [1, 2]),
    "inserted before": ([1, 3], [2, 1]),
    "inserted far away": ([3, 8], [1, 2]),
    "deleted": ([], []),
    "substituted": ([3], [2]),
    "substituted late": ([4], [2]),
    "too late": ([7], [1]),
    "early": ([2], [1]),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("delay", [1, 2, 3])
@every_frames
def test_a_wrong_label_costs_as_much_with_a_delay(wrong, k, delay, frames):
    """Where the label is, or was to be, the loss and its gradient are those without."""
    if wrong == "too late":
        delay = 3
    at, symbols = WRONG[wrong]
    teacher = form(spiky([3], 10, symbols=[1]), k)
    student = spiky(at, 10, symbols=symbols)
    args = (teacher, torch.tensor([10]))
    without, grad = loss_and_grad(ctc_kd_loss, student, *args, frame_weighting=frames)
    value, grad = loss_and_grad(
        ctc_kd_loss, student, *args, frame_weighting=frames, delay=delay
    )
    inserted = wrong.startswith("inserted") and frames in ("non-blank", "symmetric")
    if inserted and without < 1e-3:
        return  # these weights don't look there, with a delay or without
    if frames == "entropy":  # its weights are small where a teacher is sure
        assert value > 0.5 * without and grad.any()
        return
    assert value > 2 and grad.abs().max() > 0.1


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("frames", ["non-blank", "symmetric"])
@pytest.mark.parametrize("delay", [0, 2])
def test_rows_without_weight_may_be_anything(bad, k, frames, delay):
    """As in a float16 overflow: no loss, no gradient, and the others' as they are."""
    teacher, lengths = form(spiky([9], 13), k), torch.tensor([13])
    student = spiky([10], 13) + torch.randn(1, 13, 4)
    options = {"frame_weighting": frames, "delay": delay}
    expected = loss_and_grad(ctc_kd_loss, student, teacher, lengths, **options)
    student[0, 2, 1] = bad
    value, grad = loss_and_grad(ctc_kd_loss, student, teacher, lengths, **options)
    assert grad[0, 2].eq(0).all() and value > 0
    torch.testing.assert_close((value, grad), expected)


def test_stretches_of_valid_frames_are_aligned_each_by_itself():
    _, teacher, _ = batch(seed=11, n=1, t=13)
    student, _, _ = batch(seed=12, n=1, t=13)
    valid = torch.ones(1, 13, dtype=torch.bool)
    valid[0, 5] = valid[0, 9] = False
    lengths = torch.tensor([13])
    whole = ctc_kd_loss(student, teacher, lengths, mask=valid, delay=2)
    parts = [
        ctc_kd_loss(student[:, part], teacher[:, part], torch.tensor([n]), delay=2)
        for part, n in ((slice(0, 5), 5), (slice(6, 9), 3), (slice(10, 13), 3))
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_a_student_that_is_early_is_not_met():
    _, teacher, _ = batch(seed=9, n=1)
    student = teacher.roll(-1, 1)
    assert ctc_kd_loss(student, teacher, torch.tensor([9]), delay=3) > 1


@given(seed=st.integers(0, 2**31), frames=st.sampled_from(FRAME_WEIGHTINGS))
def test_a_longer_delay_never_adds_to_the_loss(seed, frames):
    args = batch(seed, t=7)
    values = [ctc_kd_loss(*args, frame_weighting=frames, delay=d) for d in range(8)]
    for longer, shorter in zip(values[1:], values, strict=False):
        assert longer <= shorter * (1 + 1e-12)
    assert values[6] == values[7]  # there are 7 frames


@every_frames
@pytest.mark.parametrize("k", [None, 2])
def test_no_frame_of_either_side_is_left_out(frames, k, monkeypatch):
    pairs = []

    def spy(*args):
        pairs.append(align_late_student(*args))
        return pairs[-1]

    monkeypatch.setattr(late_module, "align_late_student", spy)
    student, teacher, lengths = batch(seed=10, t=17)
    ctc_kd_loss(student, form(teacher, k), lengths, frame_weighting=frames, delay=3)
    (found,) = pairs
    ours, theirs = found.student, found.teacher
    frames = torch.arange(int(lengths.sum()))
    assert torch.equal(ours.unique(), frames) and torch.equal(theirs.unique(), frames)
    assert 0 <= (ours - theirs).min() and 2 <= (ours - theirs).max() <= 3


# Guards


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_probabilities_are_refused(dtype, whose):
    student, teacher, lengths = batch()
    pair = {"student": student, "teacher": teacher}
    pair[whose] = pair[whose].softmax(-1)
    student, teacher = (x.to(dtype) for x in pair.values())
    pattern = rf"{whose}'s logits are probabilities.*\[.*\] and sum to .*softmax"
    with pytest.raises(KDError, match=pattern):
        ctc_kd_loss(student, teacher, lengths)


def test_bfloat16_probabilities_are_refused():
    student, teacher, lengths = batch(v=50)
    with pytest.raises(KDError, match="student's logits are probabilities"):
        ctc_kd_loss(student.softmax(-1).bfloat16(), teacher, lengths)


def test_probabilities_in_padding_alone_are_not_looked_at():
    student, teacher, lengths = batch(n=4)
    lengths[1:] = 0
    student[1:], teacher[1:] = student[1:].softmax(-1), teacher[1:].softmax(-1)
    assert ctc_kd_loss(student, teacher, lengths) > 0


@pytest.mark.parametrize("change", ["one value", "one sum"])
def test_logits_close_to_probabilities_are_taken(change):
    student, teacher, _ = batch()
    student = student.softmax(-1)
    if change == "one value":
        student[2, 8] += torch.tensor([-1.1, 0, 0, 0, 1.1])
    else:
        student[2, 8] *= 0.9
    assert ctc_kd_loss(student, teacher, torch.tensor([9, 9, 9])) > 0


def test_one_symbol_or_one_frame_is_too_little_to_tell():
    ones = torch.ones(2, 3, 1)
    assert ctc_kd_loss(ones, ones, torch.tensor([3, 2])) == 0
    row = torch.tensor([[[0.25, 0.75]]])
    assert ctc_kd_loss(row, row, torch.tensor([1])) == 0


def test_log_probabilities_of_the_student_do_as_well():
    student, teacher, lengths = batch()
    options = {"frame_weighting": "symmetric", "delay": 1, "temperature": 2.0}
    for k in (None, 2):
        args = (form(teacher, k, 2.0), lengths)
        logits = student.clone().requires_grad_()
        expected = loss_and_grad(ctc_kd_loss, student, *args, **options)
        value = ctc_kd_loss(logits.log_softmax(-1), *args, **options)
        value.backward()
        torch.testing.assert_close(value.detach(), expected[0])
        torch.testing.assert_close(logits.grad, expected[1])
        direct = loss_and_grad(ctc_kd_loss, student.log_softmax(-1), *args, **options)
        torch.testing.assert_close(direct, expected)


@pytest.mark.parametrize("what", ["logits", "a symbol less", "5 % more"])
def test_a_sparse_teacher_whose_mass_is_not_1_is_refused(what):
    student, teacher, lengths = batch()
    sparse = sparse_of(teacher, 2)
    if what == "logits":
        sparse.log_probs = teacher.gather(-1, sparse.indices)
    elif what == "a symbol less":
        sparse.log_probs[..., 0] = -INF
    else:
        sparse.log_tail = sparse.log_tail.exp().add(0.05).log()
    with pytest.raises(KDError, match="sum to .* to .*must sum to 1.*not logits"):
        ctc_kd_loss(student, sparse, lengths)


def test_a_sparse_teacher_that_is_wrong_in_padding_alone_is_taken():
    student, teacher, lengths = batch(n=2)
    lengths[1] = 0
    sparse = sparse_of(teacher, 2)
    sparse.log_probs[1] = 7
    assert ctc_kd_loss(student, sparse, lengths) > 0


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_in_the_student_is_named_with_its_shape(frames, delay, k, bad):
    student, teacher, _ = batch()
    teacher[0, 4, 2] = 20
    student[0, 4, 1] = bad
    pattern = r"nan: the student's .*\(3, 9, 5\).* 1 of 22 valid frames"
    with pytest.raises(KDError, match=pattern):
        ctc_kd_loss(
            student,
            form(teacher, k),
            torch.tensor([9, 9, 4]),
            frame_weighting=frames,
            delay=delay,
        )


@pytest.mark.parametrize("delay", [0, 2])
def test_logits_that_overflow_at_the_temperature_are_refused(delay):
    student, teacher, lengths = batch(dtype=torch.float32)
    student[0, 3, 2] = 3e38
    with pytest.raises(KDError, match="nan.*finite.*`temperature`"):
        ctc_kd_loss(student, teacher, lengths, temperature=0.5, delay=delay)


@every_frames
@pytest.mark.parametrize("delay", [0, 2])
def test_nan_in_the_teacher_is_named_with_its_shape(frames, delay):
    student, teacher, lengths = batch()
    teacher[0, 4, 2] = NAN
    with pytest.raises(KDError, match=r"nan: the teacher's .*\(3, 9, 5\).* 1 of"):
        ctc_kd_loss(student, teacher, lengths, frame_weighting=frames, delay=delay)


@pytest.mark.parametrize(
    "options, pattern",
    [
        ({"frame_weighting": "nonblank"}, "'nonblank'.*all, non-blank, symmetric"),
        ({"delay": -1}, "delay. is -1"),
        ({"delay": 1.5}, "delay. is 1.5"),
        ({"blank_id": 5}, "blank_id. is 5.* 5 tokens"),
        ({"blank_id": -1}, "blank_id. is -1"),
    ],
)
def test_options_out_of_range_are_refused(options, pattern):
    with pytest.raises(KDError, match=pattern):
        ctc_kd_loss(*batch(), **options)


def test_weights_of_unknown_frames_are_refused():
    with pytest.raises(KDError, match="'spikes'.*confidence"):
        frame_weights(spiky([1], 4), torch.ones(1, 4, dtype=torch.bool), "spikes")


@every_frames
@pytest.mark.parametrize("k", [None, 2])
def test_the_inputs_are_left_alone(frames, k):
    student, teacher, lengths = batch(dtype=torch.float32)
    teacher = form(teacher, k)
    tensors = [student, lengths]
    tensors += [teacher] if k is None else list(vars(teacher).values())
    before = [x.clone() for x in tensors]
    ctc_kd_loss(student, teacher, lengths, frame_weighting=frames, delay=2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# Diagnostics


@pytest.mark.parametrize("k", [None, 2])
def test_diagnostics_count_frames(k):
    logits = torch.cat([spiky(s, 6) for s in ([], [1, 4], [5], [])])
    logits[0, 2, 0] = 30.0  # sure of blank
    logits[1, 4, 2] = 30.0  # sure of a symbol
    logits[3, :, 0] = 30.0
    lengths = torch.tensor([6, 6, 5, 0])
    found = ctc_diagnostics(form(logits, k), lengths)
    assert found == {"all_blank": 11.0, "peakiness": 2.0}
    assert all(isinstance(x, float) for x in found.values())
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 1] = mask[1, 4] = mask[2] = False
    found = ctc_diagnostics(form(logits, k), lengths, mask=mask)
    assert found == {"all_blank": 10.0, "peakiness": 1.0}
    found = ctc_diagnostics(form(logits, k), lengths, blank_id=2)
    assert found == {"all_blank": 0.0, "peakiness": 2.0}


def test_a_frame_is_peaky_above_a_probability_of_099():
    p = torch.tensor([[0.9899, 0.0101], [0.9901, 0.0099], [0.001, 0.999]])
    found = ctc_diagnostics(p.log()[None], torch.tensor([3]))
    assert found == {"all_blank": 0.0, "peakiness": 2.0}


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3), (0, 0)])
def test_diagnostics_of_no_frame_are_0(shape, k):
    logits = form(torch.full((*shape, 4), NAN), k)
    found = ctc_diagnostics(logits, torch.zeros(shape[0], dtype=torch.int64))
    assert found == {"all_blank": 0.0, "peakiness": 0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_diagnostics_do_not_depend_on_the_type(dtype):
    _, teacher, lengths = batch(seed=15, n=5, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ctc_diagnostics(3 * teacher, lengths)
    assert found == ctc_diagnostics(3 * teacher.double(), lengths)
    assert found["peakiness"] > 3


def test_diagnostics_hold_no_graph():
    student, _, lengths = batch()
    ctc_diagnostics(student.requires_grad_(), lengths)
    assert not frame_weights(student, up_to(lengths, 9), "entropy").requires_grad

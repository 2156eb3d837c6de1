"""ctc_kd_loss: the naive twin, the equal pair, padding, dtypes, temperature, and
teachers that keep some of their symbols."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icefall_kd import ctc_kd_loss
from icefall_kd.errors import KDError
from icefall_kd.types import SparseDistribution

INF, NAN = math.inf, math.nan


def batch(seed=0, n=3, t=7, v=5, scale=3.0, dtype=torch.float32):
    """Logits of student and teacher, and lengths from 0 to t."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, n, t, v, generator=g, dtype=torch.float64)
    lengths = torch.randint(0, t + 1, (n,), generator=g)
    if n:
        lengths[0] = t
    return student.to(dtype), teacher.to(dtype), lengths


def value_and_grad(loss, student, *args):
    student = student.detach().clone().requires_grad_()
    options = dict(zip(("temperature", "mask"), args[2:], strict=False))
    value = loss(student, *args[:2], **options)
    if value.requires_grad:
        value.backward()
    grad = torch.zeros_like(student) if student.grad is None else student.grad
    return value.detach(), grad


def padding_of(student, lengths):
    return torch.arange(student.size(1)) >= lengths.unsqueeze(1)


# The naive twin


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 3),
    t=st.integers(0, 7),
    v=st.integers(1, 9),
    scale=st.floats(0.01, 20),
    temperature=st.floats(0.2, 20),
)
def test_equals_the_naive_twin(naive_kd, seed, n, t, v, scale, temperature):
    student, teacher, lengths = batch(seed, n, t, v, scale, torch.float64)
    args = (teacher, lengths, temperature)
    value, grad = value_and_grad(ctc_kd_loss, student, *args)
    expected, expected_grad = value_and_grad(naive_kd, student, *args)
    # 1e-9: p (log p - log q) loses digits where two large logs are close.
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_float32_equals_the_naive_twin_in_float64(naive_kd, seed):
    student, teacher, lengths = batch(seed, n=4, t=13, v=29)
    value, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0)
    expected, expected_grad = value_and_grad(
        naive_kd, student.double(), teacher.double(), lengths, 2.0
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradcheck(temperature):
    student, teacher, lengths = batch(n=2, t=4, v=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: ctc_kd_loss(s, teacher, lengths, temperature=temperature),
        student.requires_grad_(),
    )


def test_the_gradient_follows_a_factor_behind_the_loss():
    student, teacher, lengths = batch()
    _, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0)
    _, scaled = value_and_grad(
        lambda s: -2.5 * ctc_kd_loss(s, teacher, lengths, temperature=2.0), student
    )
    torch.testing.assert_close(scaled, -2.5 * grad)
    assert grad.abs().max() > 0.1


def test_temperature_is_1_unless_given(naive_kd):
    args = batch(dtype=torch.float64)
    torch.testing.assert_close(ctc_kd_loss(*args), naive_kd(*args, 1.0))


def test_the_sum_over_a_batch_is_the_sum_of_its_utterances():
    student, teacher, lengths = batch(n=4, dtype=torch.float64)
    alone = [
        ctc_kd_loss(
            student[i : i + 1], teacher[i : i + 1], lengths[i : i + 1], temperature=2.0
        )
        for i in range(4)
    ]
    together = ctc_kd_loss(student, teacher, lengths, temperature=2.0)
    torch.testing.assert_close(together, torch.stack(alone).sum())


# Teacher and student equal


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_equal_pair_gives_exactly_0_with_zero_gradient(dtype, temperature):
    student, _, lengths = batch(dtype=dtype)
    value, grad = value_and_grad(
        ctc_kd_loss, student, student.clone(), lengths, temperature
    )
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(student))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_constant_per_frame_does_not_matter(temperature):
    student, _, lengths = batch(n=3, t=5)
    constants = 4 * torch.randn(3, 5, 1, generator=torch.Generator().manual_seed(5))
    value, grad = value_and_grad(
        ctc_kd_loss, student, student + constants, lengths, temperature
    )
    # Sums of float32 that differ in their last digit, for each valid frame.
    assert abs(value) / lengths.sum() < 1e-6
    assert grad.abs().max() < 1e-6 * temperature


def test_log_probabilities_serve_as_teacher_logits():
    student, teacher, lengths = batch(dtype=torch.float64)
    raw = ctc_kd_loss(student, teacher, lengths, temperature=3.0)
    log_probs = ctc_kd_loss(student, teacher.log_softmax(-1), lengths, temperature=3.0)
    torch.testing.assert_close(raw, log_probs)
    assert raw > 0.1


@given(seed=st.integers(0, 2**31), temperature=st.floats(0.2, 20))
def test_never_negative(seed, temperature):
    assert (
        ctc_kd_loss(*batch(seed, dtype=torch.float64), temperature=temperature)
        >= -1e-12
    )


# Padding


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30, 0.0])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_padding_frames_are_never_read(garbage, side):
    student, teacher, lengths = batch(n=4, t=6)
    expected, expected_grad = value_and_grad(
        ctc_kd_loss, student, teacher, lengths, 2.0
    )
    padding = padding_of(student, lengths)
    if side in ("student", "both"):
        student[padding] = garbage
    if side in ("teacher", "both"):
        teacher[padding] = garbage
    value, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0)
    assert padding.any()
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)
    assert torch.equal(grad[padding], torch.zeros_like(grad[padding]))


@pytest.mark.parametrize("extra", [1, 8])
def test_more_padding_changes_nothing(extra):
    student, teacher, lengths = batch()
    value, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0)
    more = torch.full((3, extra, 5), 7.0)
    longer, longer_grad = value_and_grad(
        ctc_kd_loss,
        torch.cat([student, more], 1),
        torch.cat([teacher, -more], 1),
        lengths,
        2.0,
    )
    assert torch.equal(longer, value)
    assert torch.equal(longer_grad[:, :7], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_valid_frame_gives_0_with_zero_gradient(dtype):
    student, teacher, _ = batch(dtype=dtype)
    student = student.requires_grad_()
    value = ctc_kd_loss(
        student, teacher, torch.zeros(3, dtype=torch.int64), temperature=2.0
    )
    value.backward()
    assert value == 0 and value.dtype == torch.float32
    assert torch.equal(student.grad, torch.zeros_like(student))


# Symbols of probability 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_symbol_that_both_exclude_adds_nothing(dtype):
    student, teacher, lengths = batch(v=6, dtype=dtype)
    kept = [0, 1, 2, 4, 5]
    expected, expected_grad = value_and_grad(
        ctc_kd_loss, student[..., kept], teacher[..., kept], lengths, 2.0
    )
    student[..., 3] = teacher[..., 3] = -INF
    value, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[..., kept], expected_grad)
    assert torch.equal(grad[..., 3], torch.zeros_like(grad[..., 3]))


def test_a_symbol_that_only_the_teacher_excludes():
    student, teacher, lengths = batch(dtype=torch.float64)
    teacher[..., 2] = -1e5  # exp gives 0 exactly
    expected, expected_grad = value_and_grad(
        ctc_kd_loss, student, teacher, lengths, 2.0
    )
    teacher[..., 2] = -INF
    value, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert grad[0, 0, 2] > 0  # the student is led away from it


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    student, teacher, lengths = batch(t=11, v=17, dtype=dtype)
    value, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0)
    expected, expected_grad = value_and_grad(
        ctc_kd_loss, student.float(), teacher.float(), lengths, 2.0
    )
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad.to(dtype))
    assert torch.isfinite(value) and torch.isfinite(grad).all()


def test_a_half_student_takes_a_float32_teacher():
    student, teacher, lengths = batch()
    value = ctc_kd_loss(student.half(), teacher, lengths, temperature=2.0)
    expected = ctc_kd_loss(student.half().float(), teacher, lengths, temperature=2.0)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_large_half_logits_stay_finite():
    student = torch.full((1, 40, 500), -60000.0, dtype=torch.float16)
    teacher = student.clone()
    student[..., 0], teacher[..., 1] = 60000.0, 60000.0
    value, grad = value_and_grad(ctc_kd_loss, student, teacher, torch.tensor([40]), 1.0)
    assert value == 40 * 120000.0
    assert torch.isfinite(grad).all() and grad[0, 0, 0] == 1


def test_autocast_changes_nothing():
    student, teacher, lengths = batch(t=11, v=17)
    expected, expected_grad = value_and_grad(
        ctc_kd_loss, student, teacher, lengths, 2.0
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


def test_logits_made_within_autocast():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5)
    _, teacher, lengths = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = layer(torch.randn(3, 7, 6))
        value = ctc_kd_loss(student, teacher, lengths, temperature=2.0)
    value.backward()
    assert student.dtype == torch.bfloat16 and value.dtype == torch.float32
    assert torch.isfinite(value) and torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.abs().max() > 0


# Temperature


def test_the_gradient_at_high_temperature_has_its_limit():
    """T (q - p) goes to (d - mean(d)) / V with d = z - z~: T^2 is there."""
    student, teacher, _ = batch(dtype=torch.float64)
    d = student - teacher
    d = d - d.mean(-1, keepdim=True)
    value, grad = value_and_grad(
        ctc_kd_loss, student, teacher, torch.full((3,), 7), 1e5
    )
    torch.testing.assert_close(grad, d / 5, rtol=0, atol=1e-3)
    torch.testing.assert_close(value, (d**2).sum() / (2 * 5), rtol=1e-3, atol=0)


# Refusals


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, INF, NAN, "2", None])
def test_a_temperature_out_of_range_is_refused(temperature):
    student, teacher, lengths = batch()
    with pytest.raises(KDError, match="temperature") as e:
        ctc_kd_loss(student, teacher, lengths, temperature=temperature)
    assert repr(temperature) in str(e.value) and "above 0" in str(e.value)


@pytest.mark.parametrize("shape", [(3, 7, 6), (3, 8, 5), (2, 7, 5), (21, 5)])
def test_other_shapes_are_refused(shape):
    student, _, lengths = batch()
    with pytest.raises(KDError) as e:
        ctc_kd_loss(student, torch.zeros(shape), lengths)
    assert "(3, 7, 5)" in str(e.value) and str(shape) in str(e.value)


def test_logits_of_two_dimensions_are_refused():
    with pytest.raises(KDError, match=r"\(7, 5\).*\(N, T, V\)"):
        ctc_kd_loss(torch.zeros(7, 5), torch.zeros(7, 5), torch.tensor([7]))


def test_lengths_beyond_the_frames_are_refused():
    student, teacher, _ = batch()
    with pytest.raises(KDError, match="up to 9, .* 7 frames"):
        ctc_kd_loss(student, teacher, torch.tensor([7, 9, 1]))


@pytest.mark.parametrize("lengths", [[7, 1], [7, 1, 1, 1], [7, -1, 2]])
def test_other_lengths_are_refused(lengths):
    student, teacher, _ = batch()
    with pytest.raises(KDError, match="3 numbers from 0 to 7") as e:
        ctc_kd_loss(student, teacher, torch.tensor(lengths))
    assert str(lengths) in str(e.value)


def test_the_teacher_gets_no_gradient():
    student, teacher, lengths = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    ctc_kd_loss(student, teacher, lengths, temperature=2.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_the_inputs_are_left_alone():
    args = batch()
    before = [a.clone() for a in args]
    value_and_grad(ctc_kd_loss, *args, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


# A mask


def test_frames_outside_the_mask_are_never_read():
    student, teacher, lengths = batch(n=4, t=6)
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(4, 6, generator=g) < 0.5
    valid = mask & ~padding_of(student, lengths)
    args = [torch.stack([x[valid]]) for x in (student, teacher)]
    expected, expected_grad = value_and_grad(
        ctc_kd_loss, *args, torch.tensor([int(valid.sum())]), 2.0
    )
    student[~valid] = teacher[~valid] = NAN
    value, grad = value_and_grad(ctc_kd_loss, student, teacher, lengths, 2.0, mask)
    assert 0 < valid.sum() < mask.sum()
    assert torch.equal(value, expected)
    assert torch.equal(grad[valid], expected_grad[0])
    assert grad[~valid].abs().max() == 0


def test_a_full_mask_changes_nothing():
    student, teacher, lengths = batch()
    ones = torch.ones(3, 7, dtype=torch.bool)
    assert torch.equal(
        ctc_kd_loss(student, teacher, lengths, temperature=2.0, mask=ones),
        ctc_kd_loss(student, teacher, lengths, temperature=2.0),
    )


def test_a_mask_of_another_shape_is_refused():
    student, teacher, lengths = batch()
    with pytest.raises(KDError, match=r"\(3, 8\) and must be \(3, 7\)"):
        ctc_kd_loss(student, teacher, lengths, mask=torch.ones(3, 8, dtype=torch.bool))


# Teachers that keep K of their symbols


def sparse_of(teacher, k, temperature=1.0, seed=0):
    """K symbols of each frame, drawn without regard to their mass, and the rest."""
    g = torch.Generator().manual_seed(seed)
    log_p = (teacher / temperature).log_softmax(-1)
    indices = torch.rand(log_p.shape, generator=g).argsort(-1)[..., :k]
    kept = log_p.gather(-1, indices)
    rest = log_p.scatter(-1, indices, -INF).logsumexp(-1)
    return SparseDistribution(indices, kept, rest)


def naive_sparse(student, sparse, lengths, temperature=1.0, mask=None):
    """The KL divergence of K + 1 classes, in probabilities, frame by frame."""
    total = student.new_zeros(())
    for n, length in enumerate(lengths.tolist()):
        for t in range(length):
            if mask is not None and not mask[n, t]:
                continue
            q = (student[n, t] / temperature).softmax(-1)
            kept = sparse.log_probs[n, t] > -INF
            index = sparse.indices[n, t][kept].tolist()
            p = sparse.log_probs[n, t][kept].exp()
            for i, p_i in zip(index, p, strict=True):
                total = total + p_i * (p_i.log() - q[i].log())
            others = [i for i in range(len(q)) if i not in index]
            p_tail = sparse.log_tail[n, t].exp()
            if p_tail > 0:
                total = total + p_tail * (p_tail.log() - q[others].sum().log())
    return total * temperature**2


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 3),
    t=st.integers(0, 7),
    v=st.integers(2, 9),
    k=st.integers(1, 8),
    scale=st.floats(0.01, 8),
    temperature=st.floats(0.5, 10),
)
def test_sparse_equals_the_naive_twin(seed, n, t, v, k, scale, temperature):
    student, teacher, lengths = batch(seed, n, t, v, scale, torch.float64)
    sparse = sparse_of(teacher, min(k, v - 1), temperature, seed)
    args = (sparse, lengths, temperature)
    value, grad = value_and_grad(ctc_kd_loss, student, *args)
    expected, expected_grad = value_and_grad(naive_sparse, student, *args)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_sparse_gradcheck(temperature, k):
    student, teacher, lengths = batch(n=2, t=4, v=5, dtype=torch.float64)
    sparse = sparse_of(teacher, k, temperature)
    assert torch.autograd.gradcheck(
        lambda s: ctc_kd_loss(s, sparse, lengths, temperature=temperature),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("seed", range(3))
def test_sparse_float32_equals_the_naive_twin_in_float64(seed):
    student, teacher, lengths = batch(seed, n=4, t=13, v=29)
    sparse = sparse_of(teacher, 6, 2.0, seed)
    value, grad = value_and_grad(ctc_kd_loss, student, sparse, lengths, 2.0)
    expected, expected_grad = value_and_grad(
        naive_sparse, student.double(), sparse, lengths, 2.0
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sparse_equal_pair_gives_0_with_zero_gradient(dtype, k):
    student, _, lengths = batch(dtype=dtype)
    sparse = sparse_of(student, k, 2.0)
    value, grad = value_and_grad(ctc_kd_loss, student, sparse, lengths, 2.0)
    eps = 1e-13 if dtype == torch.float64 else 5e-6
    assert abs(value) < eps * 3 * 7
    assert grad.abs().max() < eps


@given(seed=st.integers(0, 2**31), k=st.integers(1, 8), temperature=st.floats(0.3, 10))
def test_sparse_is_a_lower_bound_of_dense_and_not_negative(seed, k, temperature):
    student, teacher, lengths = batch(seed, v=9, dtype=torch.float64)
    sparse = sparse_of(teacher, k, temperature, seed)
    value = ctc_kd_loss(student, sparse, lengths, temperature=temperature)
    dense = ctc_kd_loss(student, teacher, lengths, temperature=temperature)
    assert -1e-12 <= value <= dense * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sparse_of_all_symbols_equals_dense(temperature):
    student, teacher, lengths = batch(v=6, dtype=torch.float64)
    sparse = sparse_of(teacher, 6, temperature)
    assert (sparse.log_tail == -INF).all()
    value, grad = value_and_grad(ctc_kd_loss, student, sparse, lengths, temperature)
    dense = value_and_grad(ctc_kd_loss, student, teacher, lengths, temperature)
    torch.testing.assert_close(value, dense[0])
    torch.testing.assert_close(grad, dense[1])


@pytest.mark.parametrize("order", [0, 1])
def test_the_order_of_kept_symbols_does_not_matter(order):
    student, teacher, lengths = batch(v=8, dtype=torch.float64)
    sparse = sparse_of(teacher, 4)
    perm = torch.tensor([[2, 0, 3, 1], [3, 2, 1, 0]][order])
    other = SparseDistribution(
        sparse.indices[..., perm], sparse.log_probs[..., perm], sparse.log_tail
    )
    torch.testing.assert_close(
        ctc_kd_loss(student, other, lengths), ctc_kd_loss(student, sparse, lengths)
    )


@pytest.mark.parametrize("keep_zero", [False, True])
def test_padding_entries_do_not_matter(keep_zero):
    """They have index 0, that of a symbol which may be kept or not."""
    student, teacher, lengths = batch(v=6, dtype=torch.float64)
    indices = torch.tensor([0, 2, 5] if keep_zero else [1, 2, 5]).expand(3, 7, 3)
    log_p = teacher.log_softmax(-1)
    rest = log_p.scatter(-1, indices, -INF).logsumexp(-1)
    sparse = SparseDistribution(indices, log_p.gather(-1, indices), rest)
    expected = value_and_grad(ctc_kd_loss, student, sparse, lengths)
    wider = SparseDistribution(
        torch.cat((indices, torch.zeros(3, 7, 2, dtype=torch.int64)), -1),
        torch.cat((sparse.log_probs, torch.full((3, 7, 2), -INF)), -1),
        rest,
    )
    value, grad = value_and_grad(ctc_kd_loss, student, wider, lengths)
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=1e-12, atol=1e-14)
    naive = value_and_grad(naive_sparse, student, wider, lengths)
    torch.testing.assert_close(grad, naive[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30, 0.0])
def test_sparse_padding_and_masked_frames_are_never_read(garbage):
    student, teacher, lengths = batch(n=4, t=6)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    skipped = padding_of(student, lengths) | ~mask
    sparse = sparse_of(teacher, 2)
    args = (sparse, lengths, 1.0, mask)
    expected = value_and_grad(ctc_kd_loss, student, *args)
    torch.testing.assert_close(
        expected[0], naive_sparse(student, sparse, lengths, 1.0, mask)
    )
    student[skipped] = garbage
    sparse.log_probs[skipped] = garbage
    sparse.log_tail[skipped] = garbage
    sparse.indices[skipped] = 10**6
    value, grad = value_and_grad(ctc_kd_loss, student, *args)
    assert skipped.any() and torch.equal(value, expected[0])
    assert torch.equal(grad, expected[1])
    assert grad[skipped].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_empty_mask_gives_0_with_zero_gradient(dtype, sparse):
    student, teacher, lengths = batch(dtype=dtype)
    teacher = sparse_of(teacher.float(), 2) if sparse else teacher
    mask = torch.zeros(3, 7, dtype=torch.bool)
    student.requires_grad_()
    value = ctc_kd_loss(student, teacher, lengths, temperature=2.0, mask=mask)
    value.backward()
    assert value == 0 and value.dtype == torch.float32
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_half_inputs_are_computed_in_float32(dtype):
    student, teacher, lengths = batch(t=11, v=17, dtype=dtype)
    sparse = sparse_of(teacher.float(), 5, 2.0)
    value, grad = value_and_grad(ctc_kd_loss, student, sparse, lengths, 2.0)
    expected = value_and_grad(ctc_kd_loss, student.float(), sparse, lengths, 2.0)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(value, expected[0])
    # Float16's gradient is scaled on its way, and so rounded twice.
    torch.testing.assert_close(grad, expected[1].to(dtype), rtol=2**-10, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            ctc_kd_loss(student, sparse, lengths, temperature=2.0), expected[0]
        )


def test_sparse_large_half_logits_stay_finite():
    """The teacher's mass lies where the student has none, and the other way round."""
    student = torch.full((1, 40, 50), -60000.0, dtype=torch.float16)
    student[..., 0] = 60000.0
    sparse = SparseDistribution(
        torch.ones(1, 40, 1, dtype=torch.int64),
        torch.zeros(1, 40, 1),
        torch.full((1, 40), -INF),
    )
    lengths = torch.tensor([40])
    value, grad = value_and_grad(ctc_kd_loss, student, sparse, lengths, 1.0)
    assert value == 40 * 120000.0
    assert torch.isfinite(grad).all() and grad[0, 0, 0] == 1 and grad[0, 0, 1] == -1


@pytest.mark.parametrize("gap", [50.0, 200.0, 2000.0])
def test_a_tail_that_the_student_excludes_stays_finite(gap):
    """The gradient of the tail is T q_i (1 - p_tail / q_tail) with q_tail near 0."""
    student = torch.zeros(1, 1, 5)
    student[..., 0] = gap
    sparse = SparseDistribution(
        torch.zeros(1, 1, 1, dtype=torch.int64),
        torch.full((1, 1, 1), math.log(0.5)),
        torch.full((1, 1), math.log(0.5)),
    )
    value, grad = value_and_grad(ctc_kd_loss, student, sparse, torch.tensor([1]), 1.0)
    assert torch.isfinite(value) and torch.isfinite(grad).all()
    expected = torch.tensor([[[0.5, *[-0.5 / 4] * 4]]])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    assert value == pytest.approx(0.5 * (gap - math.log(4)) - math.log(2), rel=1e-4)


def test_sparse_all_entries_of_a_frame_may_be_padding():
    """A frame whose whole mass is the tail asks nothing of the student."""
    student, _, lengths = batch(dtype=torch.float64)
    nothing = SparseDistribution(
        torch.zeros(3, 7, 2, dtype=torch.int64),
        torch.full((3, 7, 2), -INF, dtype=torch.float64),
        torch.zeros(3, 7, dtype=torch.float64),
    )
    value, grad = value_and_grad(ctc_kd_loss, student, nothing, lengths, 2.0)
    assert abs(value) < 1e-12 and grad.abs().max() < 1e-12


def test_sparse_symbols_beyond_the_students_are_refused():
    student, teacher, lengths = batch()
    sparse = sparse_of(teacher, 2)
    sparse.indices[0, 0, 1] = 5
    with pytest.raises(KDError, match="tokens .* to 5, .* logits 5 tokens"):
        ctc_kd_loss(student, sparse, lengths)


def test_sparse_frames_of_another_number_are_refused():
    student, teacher, lengths = batch()
    other = sparse_of(torch.zeros(3, 8, 5), 2)
    with pytest.raises(KDError, match=r"\(3, 8, 2\).*\(N, T\)"):
        ctc_kd_loss(student, other, lengths)


def test_the_sparse_inputs_are_left_alone():
    student, teacher, lengths = batch()
    sparse = sparse_of(teacher, 3)
    tensors = (student, sparse.indices, sparse.log_probs, sparse.log_tail)
    before = [x.clone() for x in tensors]
    value_and_grad(ctc_kd_loss, student, sparse, lengths, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))

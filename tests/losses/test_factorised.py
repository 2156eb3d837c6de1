"""ctc_kd_loss with a symbol weight: the naive twin, the plain loss at 1, teachers that
dropped blank, the equal pair, padding, dtypes, and numbers at the edge."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icefall_kd.errors import KDError
from icefall_kd.losses import kl
from icefall_kd.losses.ctc import ctc_kd_loss
from icefall_kd.losses.factorised import factorised_kl
from icefall_kd.losses.frames import FRAME_WEIGHTINGS, frame_weights
from icefall_kd.losses.kl import plain_kl
from icefall_kd.types import SparseDistribution

INF, NAN = math.inf, math.nan


def batch(seed=0, n=3, t=7, v=5, scale=3.0, dtype=torch.float64):
    """Logits of student and teacher, and lengths from 0 to t."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, n, t, v, generator=g, dtype=torch.float64)
    lengths = torch.randint(0, t + 1, (n,), generator=g)
    lengths[0] = t
    return student.to(dtype), teacher.to(dtype), lengths


def sparse_of(teacher, k, temperature=1.0, seed=0):
    """K tokens of each frame, drawn without regard to their mass, and the rest."""
    g = torch.Generator().manual_seed(seed)
    log_p = (teacher / temperature).log_softmax(-1)
    indices = torch.rand(log_p.shape, generator=g).argsort(-1)[..., :k]
    tail = log_p.scatter(-1, indices, -INF).logsumexp(-1)
    return SparseDistribution(indices, log_p.gather(-1, indices), tail)


def grad_of(value, student):
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


def loss_and_grad(student, *args, **options):
    student = student.detach().clone().requires_grad_()
    return grad_of(ctc_kd_loss(student, *args, **options), student)


def _divergence(p, q):
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q) if a > 0)


def naive_frame(q, teacher, weight, blank_id):
    """One frame in probabilities: q (V,), the teacher (V,) or its classes.

    Classes are the tokens of a dense teacher; those of a sparse one are its tokens, in
    a dictionary, and the tail, of which blank has the student's share, as a constant.
    """
    if isinstance(teacher, torch.Tensor):
        classes = [[i] for i in range(len(q)) if i != blank_id]
        p = [teacher[i] for (i,) in classes]
        b = teacher[blank_id]
    else:
        kept, tail = teacher
        b = kept.get(blank_id)
        classes = [[i] for i in kept if i != blank_id]
        p = [kept[i] for (i,) in classes]
        others = [i for i in range(len(q)) if i not in kept and i != blank_id]
        share = q[others].sum().detach() if others else torch.zeros(())
        if b is None:
            with_blank = share + q[blank_id].detach()
            b, tail = (
                tail * q[blank_id].detach() / with_blank,
                tail * share / with_blank,
            )
        if others:
            classes, p = [*classes, others], [*p, tail]
    q_b = q[blank_id]
    q_classes = [q[c].sum() for c in classes]
    of_blank = _divergence((b, 1 - b), (q_b, 1 - q_b))
    if 1 - b <= 0:
        return of_blank
    given = _divergence([x / (1 - b) for x in p], [x / (1 - q_b) for x in q_classes])
    return of_blank + weight * (1 - b) * given


def naive(student, teacher, lengths, weight, temperature=1.0, blank_id=0, frames=None):
    total = student.new_zeros(())
    for n, length in enumerate(lengths.tolist()):
        for t in range(length):
            q = (student[n, t] / temperature).softmax(-1)
            if isinstance(teacher, SparseDistribution):
                p = teacher.log_probs[n, t].exp()
                pairs = zip(teacher.indices[n, t].tolist(), p, strict=True)
                frame = {i: x for i, x in pairs if x > 0}, teacher.log_tail[n, t].exp()
            else:
                frame = (teacher[n, t] / temperature).softmax(-1)
            value = naive_frame(q, frame, weight, blank_id)
            total = total + value * (1.0 if frames is None else frames[n, t])
    return total * temperature**2


@given(
    seed=st.integers(0, 2**31),
    t=st.integers(1, 7),
    v=st.integers(2, 9),
    blank=st.integers(0, 8),
    scale=st.floats(0.01, 8),
    temperature=st.floats(0.3, 10),
    weight=st.sampled_from([0.0, 0.25, 2.0, 17.0]),
)
def test_equals_the_naive_twin(seed, t, v, blank, scale, temperature, weight):
    student, teacher, lengths = batch(seed, 2, t, v, scale)
    student.requires_grad_()
    blank = min(blank, v - 1)
    value, grad = loss_and_grad(
        student,
        teacher,
        lengths,
        temperature=temperature,
        symbol_weight=weight,
        blank_id=blank,
    )
    twin = naive(student, teacher, lengths, weight, temperature, blank)
    expected, expected_grad = grad_of(twin, student)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-8)


@given(
    seed=st.integers(0, 2**31),
    v=st.integers(2, 9),
    k=st.integers(1, 8),
    blank=st.integers(0, 8),
    scale=st.floats(0.01, 6),
    temperature=st.floats(0.5, 10),
    weight=st.sampled_from([0.0, 0.25, 2.0, 17.0]),
)
def test_sparse_equals_the_naive_twin(seed, v, k, blank, scale, temperature, weight):
    """With and without blank among the K tokens, which the draw decides."""
    student, teacher, lengths = batch(seed, 2, 5, v, scale)
    student.requires_grad_()
    sparse, blank = sparse_of(teacher, min(k, v - 1), temperature, seed), min(
        blank, v - 1
    )
    value, grad = loss_and_grad(
        student,
        sparse,
        lengths,
        temperature=temperature,
        symbol_weight=weight,
        blank_id=blank,
    )
    twin = naive(student, sparse, lengths, weight, temperature, blank)
    expected, expected_grad = grad_of(twin, student)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [None, 4])
def test_gradcheck(k, temperature):
    """Of a sparse teacher too, where each frame kept blank."""
    student, teacher, lengths = batch(n=2, t=4)
    if k:
        teacher = sparse_of(teacher, k, temperature)
        teacher.indices[..., 0] = 0
        teacher.indices[..., 1:] = torch.tensor([1, 3, 4])
        teacher.log_probs = torch.randn(2, 4, 5).double().log_softmax(-1)
        teacher.log_tail = teacher.log_probs[..., 4]
        teacher.log_probs = teacher.log_probs[..., :4]
    assert torch.autograd.gradcheck(
        lambda s: ctc_kd_loss(
            s, teacher, lengths, temperature=temperature, symbol_weight=3.0
        ),
        student.requires_grad_(),
    )


@given(
    seed=st.integers(0, 2**31),
    v=st.integers(1, 9),
    k=st.integers(0, 8),
    temperature=st.floats(0.3, 10),
)
def test_weight_1_is_the_plain_divergence(seed, v, k, temperature):
    """Of dense teachers and of sparse ones, also those that dropped blank."""
    student, teacher, _ = batch(seed, 1, 7, v)
    rows = (student[0], teacher[0])
    if 0 < k < v:
        sparse = sparse_of(teacher[0], k, temperature, seed)
        rows = (student[0], sparse)
    args = (*rows, temperature, torch.float64, None)
    value, grad = factorised_kl(*args, symbol_weight=1.0, blank_id=0)
    expected, expected_grad = plain_kl(*args)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


def test_weight_1_takes_the_path_of_the_plain_loss(monkeypatch):
    monkeypatch.setattr("icefall_kd.losses.ctc.factorised_kl", None)
    student, teacher, lengths = batch()
    assert torch.equal(
        ctc_kd_loss(student, teacher, lengths, symbol_weight=1),
        ctc_kd_loss(student, teacher, lengths),
    )


@given(seed=st.integers(0, 2**31), k=st.integers(0, 4))
def test_the_loss_is_linear_in_the_weight_and_its_factors_are_not_negative(seed, k):
    student, teacher, lengths = batch(seed)
    if k:
        teacher = sparse_of(teacher, k, seed=seed)
    blank, plain, tripled = (
        ctc_kd_loss(student, teacher, lengths, symbol_weight=w) for w in (0, 1, 3)
    )
    assert -1e-12 <= blank <= plain + 1e-9
    torch.testing.assert_close(tripled, plain + 2 * (plain - blank))


@given(seed=st.integers(0, 2**31), k=st.integers(0, 4), blank=st.integers(0, 4))
def test_each_weight_multiplies_its_own_part(seed, k, blank):
    """In value and gradient, so that the twins above hold for both weights."""
    student, teacher, _ = batch(seed, 1, 7, 5)
    rows = sparse_of(teacher[0], k, seed=seed) if k else teacher[0]

    def parts(blank_weight, symbol_weight):
        kl, gradient = factorised_kl(
            student[0],
            rows,
            1.0,
            torch.float64,
            None,
            blank_weight=blank_weight,
            symbol_weight=symbol_weight,
            blank_id=blank,
        )
        return torch.cat((kl[:, None], gradient), 1)

    of_blank, of_symbols = parts(1.0, 0.0), parts(0.0, 1.0)
    torch.testing.assert_close(parts(0.25, 3.0), 0.25 * of_blank + 3 * of_symbols)
    assert parts(0.0, 0.0).eq(0).all()


# Teacher and student equal, or only one factor wrong


@pytest.mark.parametrize("weight", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_equal_pair_gives_exactly_0_with_zero_gradient(dtype, weight):
    student, _, lengths = batch(dtype=dtype)
    value, grad = loss_and_grad(
        student, student.clone(), lengths, temperature=2.0, symbol_weight=weight
    )
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(student))


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sparse_equal_pair_gives_0_with_zero_gradient(dtype, k):
    student, _, lengths = batch(dtype=dtype)
    sparse = sparse_of(student, k, 2.0)
    kept_blank = (sparse.indices == 0).any(-1)
    assert not kept_blank.all()  # those that dropped it are looked at
    value, grad = loss_and_grad(
        student, sparse, lengths, temperature=2.0, symbol_weight=4.0
    )
    eps = 1e-13 if dtype == torch.float64 else 5e-6
    assert abs(value) < 4 * eps * 3 * 7
    assert grad.abs().max() < 4 * eps


def test_a_student_that_is_wrong_in_the_symbols_alone():
    """Weight 0 leaves it alone; blank's logit has no gradient from the symbols."""
    _, teacher, lengths = batch()
    log_p = teacher.log_softmax(-1)
    student = log_p.clone()
    student[..., 1:] = log_p[..., 1:].flip(-1)  # the same mass in another order
    value, grad = loss_and_grad(student, teacher, lengths, symbol_weight=0.0)
    assert abs(value) < 1e-12 and grad.abs().max() < 1e-12
    value, grad = loss_and_grad(student, teacher, lengths, symbol_weight=2.0)
    assert value > 0.1 and grad[..., 0].abs().max() < 1e-12
    assert grad[0, 0, 1:].abs().max() > 1e-3


def test_a_student_that_is_wrong_in_blank_alone():
    _, teacher, lengths = batch()
    student = teacher.clone()
    student[..., 0] += 2
    values = [
        ctc_kd_loss(student, teacher, lengths, symbol_weight=w) for w in (0.0, 1.0, 9.0)
    ]
    assert values[0] > 0.1
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


# Padding, frame weights and the weight of frames without a symbol


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("k", [None, 2])
def test_padding_and_masked_frames_are_never_read(garbage, k):
    student, teacher, lengths = batch(n=4, t=6)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    skipped = (torch.arange(6) >= lengths.unsqueeze(1)) | ~mask
    teacher = teacher if k is None else sparse_of(teacher, k)
    options = {"mask": mask, "symbol_weight": 3.0}
    expected = loss_and_grad(student, teacher, lengths, **options)
    student[skipped] = garbage
    for x in [teacher] if k is None else [teacher.log_probs, teacher.log_tail]:
        x[skipped] = garbage
    value, grad = loss_and_grad(student, teacher, lengths, **options)
    assert skipped.any() and expected[0] > 0.1
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])
    assert grad[skipped].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [None, 2])
def test_an_empty_mask_gives_0_with_zero_gradient(dtype, k):
    student, teacher, lengths = batch(dtype=dtype)
    teacher = teacher if k is None else sparse_of(teacher.float(), k)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    value, grad = loss_and_grad(student, teacher, lengths, mask=mask, symbol_weight=2.0)
    assert value == 0 and torch.equal(grad, torch.zeros_like(student))


@pytest.mark.parametrize("frame_weighting", FRAME_WEIGHTINGS)
@pytest.mark.parametrize("k", [None, 3])
def test_frame_weights_multiply_both_factors(frame_weighting, k):
    student, teacher, lengths = batch()
    teacher[..., 0] += 2
    student.requires_grad_()
    teacher = teacher if k is None else sparse_of(teacher, k, 2.0)
    options = {"temperature": 2.0}
    value, grad = loss_and_grad(
        student,
        teacher,
        lengths,
        symbol_weight=3.0,
        frame_weighting=frame_weighting,
        **options,
    )
    valid = torch.arange(7) < lengths.unsqueeze(1)
    frames = frame_weights(teacher, valid, frame_weighting, **options)
    twin = naive(student, teacher, lengths, 3.0, 2.0, frames=frames)
    expected, expected_grad = grad_of(twin, student)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_chunks_give_the_same_loss(monkeypatch):
    student, teacher, lengths = batch(n=4, t=9, v=6)
    expected = loss_and_grad(student, teacher, lengths, symbol_weight=2.0)
    monkeypatch.setitem(kl.CHUNK, "cpu", 5 * 6)
    value, grad = loss_and_grad(student, teacher, lengths, symbol_weight=2.0)
    torch.testing.assert_close(value, expected[0])
    # Not to the bit: where a row stands in a chunk decides how a CPU adds it up.
    torch.testing.assert_close(grad, expected[1], rtol=1e-12, atol=1e-12)


# Numbers at the edge


@pytest.mark.parametrize("k", [2, 5])
def test_sparse_of_all_tokens_equals_dense(k):
    student, teacher, lengths = batch(v=k)
    sparse = sparse_of(teacher, k)
    assert (sparse.log_tail == -INF).all()
    value, grad = loss_and_grad(student, sparse, lengths, symbol_weight=3.0)
    dense = loss_and_grad(student, teacher, lengths, symbol_weight=3.0)
    torch.testing.assert_close(value, dense[0])
    torch.testing.assert_close(grad, dense[1])


@pytest.mark.parametrize("keep_blank", [False, True])
def test_padding_entries_do_not_matter(keep_blank):
    """They have index 0, blank's, which the frame kept or dropped."""
    student, teacher, lengths = batch(v=6)
    indices = torch.tensor([0, 2, 5] if keep_blank else [1, 2, 5]).expand(3, 7, 3)
    log_p = teacher.log_softmax(-1)
    tail = log_p.scatter(-1, indices, -INF).logsumexp(-1)
    sparse = SparseDistribution(indices, log_p.gather(-1, indices), tail)
    wider = SparseDistribution(
        torch.cat((indices, torch.zeros(3, 7, 2, dtype=torch.int64)), -1),
        torch.cat((sparse.log_probs, torch.full((3, 7, 2), -INF)), -1),
        tail,
    )
    expected = loss_and_grad(student, sparse, lengths, symbol_weight=2.0)
    value, grad = loss_and_grad(student, wider, lengths, symbol_weight=2.0)
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=1e-12, atol=1e-14)


def test_a_frame_that_kept_nothing_asks_nothing():
    student, _, lengths = batch()
    nothing = SparseDistribution(
        torch.zeros(3, 7, 2, dtype=torch.int64),
        torch.full((3, 7, 2), -INF, dtype=torch.float64),
        torch.zeros(3, 7, dtype=torch.float64),
    )
    value, grad = loss_and_grad(student, nothing, lengths, symbol_weight=2.0)
    assert abs(value) < 1e-12 and grad.abs().max() < 1e-12


@pytest.mark.parametrize("gap", [20.0, 200.0, 2e4])
@pytest.mark.parametrize("k", [None, 1])
def test_a_student_sure_of_blank_still_learns_the_symbols(gap, k):
    """Its symbols have probabilities of 0 in float32, and their order is learned."""
    student = torch.tensor([[[gap, 0.0, 1.0, 2.0]]])
    teacher = torch.tensor([[[0.0, 9.0, 0.0, 0.0]]])
    if k:
        teacher = SparseDistribution(
            torch.tensor([[[1]]]), torch.tensor([[[-1e-3]]]), torch.tensor([[-6.9083]])
        )
    value, grad = loss_and_grad(student, teacher, torch.tensor([1]), symbol_weight=2.0)
    assert torch.isfinite(value) and value > 0.99 * gap - 1
    r = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    s = torch.tensor([1.0, 0.0, 0.0])
    expected = torch.cat((torch.ones(1), -r + 2 * (r - s)))
    torch.testing.assert_close(grad[0, 0], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("k", [None, 1])
def test_large_half_logits_stay_finite(k):
    student = torch.full((1, 4, 50), -60000.0, dtype=torch.float16)
    teacher = student.clone()
    student[..., 0], teacher[..., 1] = 60000.0, 60000.0
    if k:
        teacher = SparseDistribution(
            torch.ones(1, 4, 1, dtype=torch.int64),
            torch.zeros(1, 4, 1),
            torch.full((1, 4), -INF),
        )
    value, grad = loss_and_grad(student, teacher, torch.tensor([4]), symbol_weight=2.0)
    assert torch.isfinite(value) and torch.isfinite(grad).all()
    assert grad[0, 0, 0] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("token", [0, 3])
def test_a_token_that_both_exclude_is_finite(dtype, token):
    student, teacher, lengths = batch(dtype=dtype)
    student[..., token] = teacher[..., token] = -INF
    value, grad = loss_and_grad(student, teacher, lengths, symbol_weight=2.0)
    assert torch.isfinite(value) and torch.isfinite(grad).all() and value > 0.1
    assert torch.equal(grad[..., token], torch.zeros_like(grad[..., token]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [None, 5])
def test_half_inputs_are_computed_in_float32(dtype, k):
    student, teacher, lengths = batch(t=11, v=17, dtype=dtype)
    teacher = teacher if k is None else sparse_of(teacher.float(), k)
    expected = loss_and_grad(student.float(), teacher, lengths, symbol_weight=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = loss_and_grad(student, teacher, lengths, symbol_weight=2.0)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(value, expected[0])
    torch.testing.assert_close(grad, expected[1].to(dtype), rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("k", [None, 2])
def test_nan_is_refused(k):
    student, teacher, lengths = batch()
    teacher = teacher if k is None else sparse_of(teacher, k)
    student[0, 0, 1] = NAN
    with pytest.raises(KDError, match="student's output.* is not finite"):
        ctc_kd_loss(student, teacher, lengths, symbol_weight=2.0)


# Refusals


@pytest.mark.parametrize("weight", [-1, -0.1, INF, NAN, "2", None])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(KDError, match="symbol_weight.*from 0 on") as e:
        ctc_kd_loss(*batch(), symbol_weight=weight)
    assert repr(weight) in str(e.value)


def test_a_weight_with_a_delay_is_refused():
    with pytest.raises(KDError, match="`symbol_weight` is 2 and `delay` 3.*leave one"):
        ctc_kd_loss(*batch(), symbol_weight=2.0, delay=3)
    ctc_kd_loss(*batch(), symbol_weight=1.0, delay=3)

"""row_kl and linear_kl: the naive twin, chunks, weights, rows, a second backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icefall_kd.kinds.codec import Codec
from icefall_kd.losses import kl
from icefall_kd.losses.kl import linear_kl, row_kl
from icefall_kd.types import SparseDistribution


def rows(seed=0, m=11, v=7, scale=3.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, m, v, generator=g, dtype=torch.float64)
    weights = torch.rand(m, generator=g, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), weights.to(dtype)


def sparse_of(teacher, k, temperature):
    kept = Codec("top", k, 1.0, temperature).reduce(teacher)
    log_probs = (teacher / temperature).log_softmax(-1)  # keep() is in float32
    top = log_probs.gather(1, kept.indices)
    tail = log_probs.scatter(1, kept.indices, -torch.inf).logsumexp(-1)
    return SparseDistribution(kept.indices, top, tail)


def naive(student, teacher, weights, temperature, kept=None):
    """Class by class; ``kept`` (M, K) are the symbols that stand alone."""
    total = 0.0
    for r in range(len(student)):
        p = (teacher[r] / temperature).softmax(-1)
        q = (student[r] / temperature).softmax(-1)
        if kept is not None:
            alone = kept[r]
            others = [i for i in range(len(p)) if i not in alone.tolist()]
            p, q = (torch.cat((x[alone], x[others].sum()[None])) for x in (p, q))
            if not others:
                p, q = p[:-1], q[:-1]
        total = total + weights[r] * (p * (p / q).log()).sum()
    return temperature**2 * total


def value_and_grads(loss, *inputs):
    value = loss()
    return value.detach(), torch.autograd.grad(value, inputs)


@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 9),
    v=st.integers(1, 8),
    k=st.sampled_from([None, 1, 3, 8]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_equals_the_naive_twin(seed, m, v, k, temperature):
    student, teacher, weights = rows(seed, m, v)
    student.requires_grad_()
    said = teacher if k is None else sparse_of(teacher, min(k, v), temperature)
    found = value_and_grads(
        lambda: row_kl(student, said, temperature=temperature, weights=weights), student
    )
    kept = None if k is None else said.indices
    expected = value_and_grads(
        lambda: naive(student, teacher, weights, temperature, kept), student
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_layer_equals_the_layer_and_the_loss(k, bias):
    _, teacher, weights = rows()
    teacher = teacher if k is None else sparse_of(teacher, k, 2.0)
    torch.manual_seed(1)
    layer = torch.nn.Linear(5, 7, bias=bias).double()
    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    found = value_and_grads(
        lambda: linear_kl(x, layer, teacher, temperature=2.0, weights=weights), *inputs
    )
    expected = value_and_grads(
        lambda: row_kl(layer(x), teacher, temperature=2.0, weights=weights), *inputs
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("k", [None, 3])
def test_a_fused_layer_passes_gradcheck(k):
    _, teacher, weights = rows(m=4, v=5)
    teacher = teacher if k is None else sparse_of(teacher, k, 2.0)
    torch.manual_seed(1)
    layer = torch.nn.Linear(3, 5).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def loss(x, weight, bias):
        layer.weight, layer.bias = weight, bias
        return linear_kl(x, layer, teacher, temperature=2.0, weights=weights)

    weight, bias = layer.weight, layer.bias
    del layer.weight, layer.bias
    assert torch.autograd.gradcheck(loss, (x, weight, bias))


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("chosen", [False, True])
def test_the_size_of_a_chunk_does_not_matter(monkeypatch, k, chosen):
    student, teacher, weights = rows()
    student.requires_grad_()
    teacher = teacher if k is None else sparse_of(teacher, k, 2.0)
    which = torch.tensor([9, 2, 3, 7]) if chosen else None
    weights = weights[:4] if chosen else weights

    def run():
        return value_and_grads(
            lambda: row_kl(
                student,
                teacher,
                temperature=2.0,
                student_index=which,
                teacher_index=which,
                weights=weights,
            ),
            student,
        )

    expected = run()
    monkeypatch.setitem(kl.CHUNK, "cpu", 2 * 7 + 1)  # two rows
    torch.testing.assert_close(run(), expected)


def test_rows_that_are_not_chosen_have_no_gradient_and_are_not_read():
    student, teacher, _ = rows()
    expected = row_kl(student[[9, 2]], teacher[[1, 4]], temperature=2.0)
    student[[0, 1, 3]] = torch.nan
    teacher[[0, 2, 3]] = torch.nan
    student.requires_grad_()
    value = row_kl(
        student,
        teacher,
        temperature=2.0,
        student_index=torch.tensor([9, 2]),
        teacher_index=torch.tensor([1, 4]),
    )
    value.backward()
    torch.testing.assert_close(value, expected)
    assert student.grad[[0, 1, 3, 4, 5, 6, 7, 8, 10]].eq(0).all()
    assert torch.isfinite(student.grad).all() and student.grad[[2, 9]].ne(0).all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_second_backward_gives_the_same_gradient_again(fused):
    student, teacher, _ = rows()
    layer = torch.nn.Linear(7, 7).double()
    student.requires_grad_()
    if fused:
        value = linear_kl(student, layer, teacher)
    else:
        value = row_kl(student, teacher)
    first = torch.autograd.grad(value, student, retain_graph=True)[0].clone()
    again = torch.autograd.grad(3 * value, student, retain_graph=True)[0]
    torch.testing.assert_close(again, 3 * first)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], first)


def test_a_small_half_gradient_survives_until_it_is_scaled():
    """q - p is 1e-8 here, below float16's range; a scaler's 65536 comes later."""
    student = torch.tensor([[18.0, 0.0]], dtype=torch.float16, requires_grad=True)
    teacher = torch.tensor([[19.0, 0.0]])
    (65536 * row_kl(student, teacher)).backward()
    q, p = student.detach().double().softmax(-1), teacher.double().softmax(-1)
    expected = (q - p)[0, 1] * 65536
    assert float(student.grad[0, 1]) == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight, temperature", [(4000.0, 1.0), (1.0, 100.0)])
def test_a_half_gradient_is_finite_where_the_scaled_loss_lets_it_be(
    k, chosen, fused, weight, temperature
):
    """A loss of 1e-3 of it: the gradient is small, whatever the weight is alone."""
    student, teacher, weights = rows(dtype=torch.float32)
    weights = weight * weights
    said = teacher if k is None else sparse_of(teacher, k, temperature)
    which = torch.tensor([9, 2, 3, 7]) if chosen else None
    torch.manual_seed(1)
    layer = torch.nn.Linear(7, 7)

    def gradient(x):
        x = x.detach().requires_grad_()
        if fused:
            value = linear_kl(x, layer, said, temperature=temperature, weights=weights)
        else:
            some = weights[:4] if chosen else weights
            value = row_kl(
                x,
                said,
                temperature=temperature,
                student_index=which,
                teacher_index=which,
                weights=some,
            )
        (1e-3 * value).backward()
        return x.grad

    half = student.half()
    found, expected = gradient(half), gradient(half.float())
    assert found.dtype == torch.float16 and torch.isfinite(found).all()
    tolerance = 0.03 if fused else 2e-3
    torch.testing.assert_close(
        found.float(), expected, rtol=tolerance, atol=tolerance * float(expected.max())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_that_is_held_is_of_the_students_type(dtype):
    """So that no second copy of the logits waits for the backward pass."""
    student, teacher, _ = rows(dtype=dtype)
    student.requires_grad_()
    held = row_kl(student, teacher).grad_fn.grad
    assert held.dtype == dtype and held.shape == student.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fused_half_layer_is_close_to_float32(dtype):
    _, teacher, _ = rows(dtype=torch.float32)
    torch.manual_seed(1)
    layer = torch.nn.Linear(5, 7)
    x = torch.randn(11, 5).to(dtype).requires_grad_()
    value, grads = value_and_grads(
        lambda: linear_kl(x, layer, teacher), x, layer.weight
    )
    assert grads[0].dtype == dtype and grads[1].dtype == torch.float32
    wide = x.detach().float().requires_grad_()
    expected = value_and_grads(
        lambda: linear_kl(wide, layer, teacher), wide, layer.weight
    )
    torch.testing.assert_close(value, expected[0], rtol=3e-2, atol=0)
    torch.testing.assert_close(grads[1], expected[1][1], rtol=0, atol=0.3)


def test_no_rows_give_0_with_zero_gradient():
    student, teacher, _ = rows()
    student.requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    value = row_kl(
        student, teacher, temperature=1.0, student_index=none, teacher_index=none
    )
    value.backward()
    assert value == 0 and student.grad.eq(0).all()

"""Distances of hidden layers: naive twins, equality, padding, dtypes, refusals."""

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.losses.hidden import hidden_kd_loss

KINDS = ["mse", "cosine"]
SHAPES = [(1, 1, 1, 1), (2, 5, 2, 3), (3, 7, 1, 11)]


def case(shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
    lengths = torch.randint(0, shape[1] + 1, (shape[0],), generator=g)
    lengths[0] = shape[1]
    return x.requires_grad_(), y, lengths


def naive(x, y, lengths, kind):
    total = 0.0 * x.sum()
    for n, length in enumerate(lengths.tolist()):
        for t in range(length):
            for r in range(x.size(2)):
                a, b = x[n, t, r], y[n, t, r]
                if kind == "mse":
                    distance = ((a - b) ** 2).sum() / len(a)
                else:
                    distance = 1 - (a @ b) / (a.norm() * b.norm())
                total = total + distance / x.size(2)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_the_naive_ones(shape, kind):
    x, y, lengths = case(shape)
    loss, twin = hidden_kd_loss(x, y, lengths, distance=kind), naive(
        x, y, lengths, kind
    )
    torch.testing.assert_close(loss, twin)
    a, b = (torch.autograd.grad(v, x)[0] for v in (loss, twin))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x, y, lengths = case((2, 3, 2, 5))
    assert torch.autograd.gradcheck(
        lambda v: hidden_kd_loss(v, y, lengths, distance=kind), x
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_layers_have_no_loss_and_no_gradient(kind, dtype):
    x = case((2, 5, 2, 7), dtype=torch.float32)[0].detach().to(dtype)
    x[0, 0] = 0
    x.requires_grad_()
    loss = hidden_kd_loss(x, x.detach().clone(), torch.tensor([5, 3]), distance=kind)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e4])
def test_padding_is_never_read(kind, garbage):
    x, y, _ = case((2, 6, 2, 3))
    lengths = torch.tensor([6, 2])
    expected = hidden_kd_loss(x, y, lengths, distance=kind)
    gradient = torch.autograd.grad(expected, x)[0]
    padded, other = (
        torch.nn.functional.pad(v.detach(), (0, 0, 0, 0, 0, 3), value=garbage)
        for v in (x, y)
    )
    padded[1, 2:] = other[1, 2:] = garbage
    padded.requires_grad_()
    loss = hidden_kd_loss(padded, other, lengths, distance=kind)
    found = torch.autograd.grad(loss, padded)[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found[:, :6], gradient)
    assert not found[:, 6:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_empty_mask_gives_zero_and_zero_gradient(kind, dtype):
    x = torch.randn(2, 3, 2, 5).to(dtype).requires_grad_()
    empty = torch.zeros(2, 3, dtype=torch.bool)
    for lengths, mask in ((torch.tensor([3, 1]), empty), (torch.tensor([0, 0]), None)):
        loss = hidden_kd_loss(x, torch.ones_like(x), lengths, distance=kind, mask=mask)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_leaves_frames_out(kind):
    x, y, _ = case((1, 4, 2, 3))
    mask = torch.tensor([[True, False, True, True]])
    found = hidden_kd_loss(x, y, torch.tensor([3]), distance=kind, mask=mask)
    kept = [0, 2]
    expected = naive(x[:, kept], y[:, kept], torch.tensor([2]), kind)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_large_numbers_stay_finite(kind, dtype):
    x, y, lengths = case((2, 5, 2, 7), dtype=torch.float32)
    x, y = ((300 * v.detach()).to(dtype) for v in (x, y))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = hidden_kd_loss(x, y, lengths, distance=kind)
    (gradient,) = torch.autograd.grad(loss, x)
    expected = hidden_kd_loss(x.double(), y.double(), lengths, distance=kind)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert loss.dtype == torch.float32 and torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_of_zeros_has_a_finite_gradient(kind):
    x = torch.zeros(1, 2, 1, 3, requires_grad=True)
    loss = hidden_kd_loss(x, torch.ones(1, 2, 1, 3), torch.tensor([2]), distance=kind)
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(gradient).all()


def test_the_teacher_gets_no_gradient():
    x, y, lengths = case((2, 5, 2, 3))
    y.requires_grad_()
    hidden_kd_loss(x, y, lengths).backward()
    assert y.grad is None


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(distance="l1"), "distance` is 'l1'"),
        (dict(teacher=torch.zeros(2, 5, 2, 4)), r"\(2, 5, 2, 3\).*\(2, 5, 2, 4\)"),
        (dict(teacher=torch.zeros(2, 5, 3)), "projector"),
        (dict(lengths=torch.tensor([6, 1])), "lengths go up to 6.* 5 frames"),
        (dict(lengths=torch.tensor([5, -1])), r"\[5, -1\]"),
        (dict(lengths=torch.tensor([5])), r"lengths are \[5\]"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), r"\(2, 4\).*\(2, 5\)"),
        (dict(student=torch.full((2, 5, 2, 3), torch.nan)), "student's layer"),
        (dict(teacher=torch.full((2, 5, 2, 3), torch.inf)), "teacher's layer"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    given = dict(
        student=torch.zeros(2, 5, 2, 3),
        teacher=torch.zeros(2, 5, 2, 3),
        lengths=torch.tensor([5, 2]),
    )
    with pytest.raises(KDError, match=words):
        hidden_kd_loss(**{**given, **change})

"""KL divergence of rows, its gradient formed in the forward pass, chunk by chunk.

What the losses of this package come down to: M rows of student logits, a teacher's
distribution for each, and a weight. No second copy of the logits is made: beside the
gradient there are chunks that fit a cache. Where the logits are the output of a linear
layer, :func:`linear_kl` doesn't even make them whole.
"""

import math
from typing import Any, Callable, Optional, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.types import Distribution, SparseDistribution, index_rows, is_sparse

FLOOR = -1e30  # in place of -inf: 0 * FLOOR is 0
# Elements of a chunk: a few of them fit a CPU's cache; a GPU needs large ones.
CHUNK = {"cpu": 2**18, "cuda": 2**24}


def check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise KDError(
            f"the temperature is {temperature!r}, and must be a finite number above 0: "
            "2.0 is a good start"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a loss computes in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(device: torch.device, v: int) -> int:
    """How many rows of V symbols are worked on at once."""
    return max(1, CHUNK.get(device.type, CHUNK["cuda"]) // max(1, v))


def log_sum_exp(x: torch.Tensor, softmax: torch.Tensor) -> torch.Tensor:
    """logsumexp of rows whose softmax is known: max(x) - log(max softmax)."""
    return x.amax(-1) - softmax.amax(-1).log()


def _dense(
    x: torch.Tensor, teacher: torch.Tensor, out: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """KL of each row, and its gradient towards ``x``.

    Args:
      x: The student's rows; they are overwritten, and so are the teacher's.
      out: Where the gradient is to stand.
    """
    x.clamp_(min=FLOOR)
    y = teacher.clamp_(min=FLOOR)
    q, p = torch.softmax(x, -1, out=out), y.softmax(-1)
    offset = log_sum_exp(x, q) - log_sum_exp(y, p)
    q -= p
    kl = p.mul_(y.sub_(x)).sum(-1).add_(offset)
    return kl, q


def _sparse(
    x: torch.Tensor, teacher: SparseDistribution, out: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The same, the symbols that the teacher doesn't keep being one class.

    The softmax is taken of those alone, so that their mass may be as small as it will.
    """
    log_p, log_p_tail = teacher.log_probs, teacher.log_tail
    kept = log_p > -torch.inf
    x.clamp_(min=FLOOR)
    top = x.gather(1, teacher.indices).masked_fill_(~kept, -torch.inf)
    # Padding entries share index 0 with a symbol that may be kept: they add 0.
    x.scatter_add_(1, teacher.indices, kept.to(x.dtype).mul_(2 * FLOOR))
    rest = torch.softmax(x, -1, out=out)
    log_rest = log_sum_exp(x, rest)
    log_all = torch.logaddexp(log_rest, top.logsumexp(-1))
    log_q, log_q_tail = (top - log_all[:, None]), log_rest - log_all
    p, p_tail = log_p.exp(), log_p_tail.exp()
    kl = (p * (log_p.clamp(min=FLOOR) - log_q.clamp(min=FLOOR))).sum(-1)
    kl += p_tail * (log_p_tail.clamp(min=FLOOR) - log_q_tail.clamp(min=FLOOR))
    rest *= (log_q_tail.exp() - p_tail)[:, None]
    return kl, rest.scatter_add_(1, teacher.indices, log_q.exp() - p)


def cast_teacher(teacher: Distribution, dtype: torch.dtype, temperature: float):
    if is_sparse(teacher):  # at this temperature already
        log_probs, tail = teacher.log_probs.to(dtype), teacher.log_tail.to(dtype)
        return SparseDistribution(teacher.indices, log_probs, tail)
    return teacher.to(dtype) * (1 / temperature)


class _Rows:
    """The M rows of a loss, in chunks."""

    def __init__(
        self,
        teacher: Distribution,
        teacher_rows: Optional[torch.Tensor],
        student_rows: Optional[torch.Tensor],
        weights: Optional[torch.Tensor],
        temperature: float,
    ) -> None:
        self.teacher, self.temperature = teacher, temperature
        self.teacher_rows, self.student_rows = teacher_rows, student_rows
        self.weights = weights

    def sum(
        self, m: int, v: int, device: torch.device, dtype: torch.dtype, logits: Callable
    ) -> torch.Tensor:
        """Sum the loss over all rows.

        Args:
          logits: Given the rows of a chunk (a slice or indices), the student's logits
            there, where their gradient may be made, and what takes it.
        """
        if self.student_rows is not None:
            m = len(self.student_rows)
        step = chunk_rows(device, v)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for begin in range(0, m, step):
            part = slice(begin, min(m, begin + step))
            rows = part if self.student_rows is None else self.student_rows[part]
            x, out, take = logits(rows)
            x = x.to(dtype) * (1 / self.temperature)
            which = part if self.teacher_rows is None else self.teacher_rows[part]
            said = cast_teacher(
                index_rows(self.teacher, which), dtype, self.temperature
            )
            kl, grad = (_sparse if is_sparse(said) else _dense)(x, said, out)
            kl.clamp_(min=0.0)  # what rounding leaves of an equal pair
            if self.weights is not None:
                weights = self.weights[part].to(dtype)
                kl *= weights
                grad *= weights[:, None]
            total += kl.sum(dtype=torch.float64)
            take(grad.mul_(self.temperature))
        return (total * self.temperature**2).to(dtype)


class _RowKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: torch.Tensor, rows: _Rows) -> torch.Tensor:
        ctx.save_for_backward(student)
        ctx.rows = rows
        value, ctx.grad = _RowKL._both(student, rows, ctx.needs_input_grad[0])
        return value

    @staticmethod
    def _both(student, rows: _Rows, needed: bool):
        grad = None
        dtype = wide(student.dtype)
        whole = rows.student_rows is None
        # Of float16 inputs the gradient stays in float32 until the loss's own scale is
        # known: weights, temperature and 1e-8 of a symbol don't share float16's range.
        grad_dtype = dtype if student.dtype == torch.float16 else student.dtype
        if needed:
            make = torch.empty_like if whole else torch.zeros_like
            grad = make(student, dtype=grad_dtype)

        in_place = needed and whole and grad_dtype == dtype

        def logits(part) -> Tuple[torch.Tensor, Optional[torch.Tensor], Callable]:
            def take(g: torch.Tensor) -> None:
                if needed and not in_place:
                    grad[part] = g.to(grad_dtype)

            x = student[part] if whole else student.index_select(0, part)
            return x, grad[part] if in_place else None, take

        with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            value = rows.sum(*student.shape, student.device, dtype, logits)
        return value, grad

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> Tuple[torch.Tensor, None]:
        (student,) = ctx.saved_tensors
        # The first call hands out the gradient itself; another makes it again.
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            _, grad = _RowKL._both(student, ctx.rows, True)
        return grad.mul_(g).to(student.dtype), None


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows: _Rows) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.rows = rows
        ctx.needed = ctx.needs_input_grad[:3]
        value, ctx.grads = _LinearKL._both(x, weight, bias, rows, ctx.needed)
        return value

    @staticmethod
    def _both(x, weight, bias, rows: _Rows, needed):
        dtype = wide(x.dtype)
        inputs = (x, weight, bias)
        grads = [
            torch.zeros_like(i, dtype=dtype) if i is not None and n else None
            for i, n in zip(inputs, needed)
        ]
        # A matrix product in the input's type, as the layer itself would make it; older
        # torch has none in float16 on a CPU.
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float16
        kind = dtype if on_cpu else x.dtype
        w = weight.to(kind)
        b = None if bias is None else bias.to(kind)

        def logits(part) -> Tuple[torch.Tensor, None, Callable]:
            h = x[part]

            def take(g: torch.Tensor) -> None:
                if grads[0] is not None:
                    grads[0][part] = g @ weight.to(dtype)
                if grads[1] is not None:
                    grads[1].addmm_(g.t(), h.to(dtype))
                if grads[2] is not None:
                    grads[2] += g.sum(0)

            return torch.nn.functional.linear(h.to(kind), w, b), None, take

        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            value = rows.sum(len(x), len(weight), x.device, dtype, logits)
        return value, grads

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> Tuple[Any, ...]:
        inputs = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _LinearKL._both(*inputs, ctx.rows, ctx.needed)
        found = [None if y is None else y.mul_(g) for y in grads]
        return (
            *(y if y is None else y.to(i.dtype) for y, i in zip(found, inputs)),
            None,
        )


def valid_frames(
    rows: torch.Tensor,
    lengths: torch.Tensor,
    mask: Optional[torch.Tensor],
    name: str,
) -> torch.Tensor:
    """The frames of a batch that count, (N, T), bool.

    Args:
      rows: (N, T, ...), called ``name`` in errors.
      lengths: (N,), valid frames, 0 to T.
      mask: (N, T), bool: of the valid frames only these; None: all.

    Raises:
      KDError: lengths or a mask that do not fit ``rows``.
    """
    n, t = rows.shape[:2]
    if lengths.shape != (n,) or (n and not 0 <= int(lengths.min())):
        raise KDError(
            f"lengths are {lengths.tolist()} and must be {n} numbers from 0 to {t}"
        )
    if n and int(lengths.max()) > t:
        raise KDError(
            f"lengths go up to {int(lengths.max())}, and the {name} have {t} frames"
        )
    valid = torch.arange(t, device=rows.device) < lengths.to(rows.device).unsqueeze(1)
    if mask is not None:
        if mask.shape != valid.shape:
            raise KDError(
                f"the mask has shape {tuple(mask.shape)} and must be {(n, t)}"
            )
        valid &= mask.to(rows.device)
    return valid


def row_kl(
    student: torch.Tensor,
    teacher: Distribution,
    *,
    temperature: float = 1.0,
    student_rows: Optional[torch.Tensor] = None,
    teacher_rows: Optional[torch.Tensor] = None,
    weights: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """sum over rows r of w_r T^2 KL(softmax(z~_r / T) || softmax(z_r / T)).

    z is the student's, z~ the teacher's. With q = softmax(z / T) the gradient towards z
    is w T (q - p); of a sparse teacher, which is at this temperature already, the
    symbols that it doesn't keep are one class with the tail as its mass, and there the
    gradient is w T (q_tail - p_tail) q_i / q_tail. In float32, or float64 for float64.

    Args:
      student: (M, V), logits.
      teacher: (M', V), logits or log-probabilities, or sparse.
      temperature: T.
      student_rows: (R,), int64, the rows that count, each once; by default all.
      teacher_rows: (R,), int64, the teacher's row of each of those.
      weights: (R,), 0 or more; by default 1.
    """
    rows = _Rows(teacher, teacher_rows, student_rows, weights, float(temperature))
    return _RowKL.apply(student, rows)


def linear_kl(
    x: torch.Tensor,
    linear: torch.nn.Linear,
    teacher: Distribution,
    *,
    temperature: float = 1.0,
    weights: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """:func:`row_kl` of ``linear(x)``, whose logits never exist whole.

    Args:
      x: (M, H). Gradients flow to it and to the layer's parameters.
      linear: To V symbols.
      teacher: (M, V), logits or log-probabilities, or sparse.
    """
    rows = _Rows(teacher, None, None, weights, float(temperature))
    return _LinearKL.apply(x, linear.weight, linear.bias, rows)

"""KL divergence of rows, with its gradient formed in the forward pass, in chunks.

Losses of frames and nodes come down to this, but for the CTC loss with a delay, which
is in :mod:`icefall_kd.losses.late`: rows of student logits, a teacher's distribution
for each, and a weight. No second copy of the logits is made: beside the gradient there
are chunks that fit a cache. Where the logits are the output of a linear layer,
:func:`linear_kl` never holds all of them.
"""

from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import torch

from icefall_kd.rounding import factors
from icefall_kd.types import Distribution, SparseDistribution, index_rows, is_sparse

FLOOR = -1e30  # in place of -inf: 0 * FLOOR is 0
# Elements of a chunk: a few chunks fit a CPU's cache; a GPU needs large ones.
CHUNK = {"cpu": 2**18, "cuda": 2**24}
# From a chunk's student rows, teacher rows, temperature, type and memory to the KL of
# each row and the gradient, as _dense_kl.
ChunkKL = Callable[
    [torch.Tensor, Distribution, float, torch.dtype, Optional[torch.Tensor]],
    Tuple[torch.Tensor, torch.Tensor],
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what a loss of ``dtype`` computes in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(device: torch.device, v: int) -> int:
    """Return how many rows of ``v`` elements on ``device`` make a chunk."""
    return max(1, CHUNK.get(device.type, CHUNK["cuda"]) // max(1, v))


def scaled_logits(
    logits: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``logits`` / ``temperature`` in ``dtype``, a copy with FLOOR for -inf."""
    return (logits.to(dtype) * (1 / temperature)).clamp_(min=FLOOR)


def log_sum_exp(logits: torch.Tensor, softmax: torch.Tensor) -> torch.Tensor:
    """Return logsumexp of rows whose softmax is known: max(logits) - log(max softmax).

    Args:
      logits: (C, V).
      softmax: (C, V), of ``logits``.

    Returns:
      (C,).
    """
    return logits.amax(-1) - softmax.amax(-1).log()


def _dense_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    dtype: torch.dtype,
    out: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) of each row, (C,), and its gradient towards student / T, (C, V).

    With x = student / T and y = teacher / T, the KL divergence is
    sum p (y - x) + logsumexp(x) - logsumexp(y), and its gradient q - p. Both sides run
    through the same operations, so that for equal rows both are 0 to the last bit.

    Args:
      student: (C, V), logits.
      teacher: (C, V), logits or log-probabilities.
      temperature: T.
      dtype: What is computed in.
      out: (C, V), memory for the gradient; None: new memory.
    """
    x = scaled_logits(student, temperature, dtype)  # (C, V)
    y = scaled_logits(teacher, temperature, dtype)  # (C, V)
    q, p = torch.softmax(x, -1, out=out), y.softmax(-1)  # (C, V)
    norm = log_sum_exp(x, q) - log_sum_exp(y, p)  # (C,)
    gradient = q.sub_(p)
    kl = p.mul_(y.sub_(x)).sum(-1).add_(norm)  # (C,)
    return kl, gradient


def _sparse_kl(
    student: torch.Tensor,
    teacher: SparseDistribution,
    temperature: float,
    dtype: torch.dtype,
    out: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The same for a top-K teacher, the tokens that it dropped being one class.

    The student's mass of that class, the rest, may be so small that 1 - (mass of the
    kept tokens) has no correct digit. So a softmax over the dropped tokens alone is
    taken: the kept ones are lowered by 2e30 first, which makes theirs 0. Its normalizer
    is the rest's logit, and its entries are how the rest's gradient is shared out.

    Args:
      student: (C, V), logits.
      teacher: Of C rows, at the temperature T already.
      temperature: T.
      dtype: What is computed in.
      out: (C, V), memory for the gradient; None: new memory.
    """
    indices = teacher.indices  # (C, K)
    log_p, log_p_rest = teacher.log_probs.to(dtype), teacher.log_tail.to(dtype)
    is_token = log_p > -torch.inf  # (C, K); the others fill up a row, with index 0
    x = scaled_logits(student, temperature, dtype)  # (C, V)
    x_kept = x.gather(1, indices).masked_fill(~is_token, -torch.inf)  # (C, K)
    # An entry that fills up may have the index of a kept token: it adds 0 to it.
    x.scatter_add_(1, indices, is_token.to(dtype).mul_(2 * FLOOR))
    shares = torch.softmax(x, -1, out=out)  # (C, V), of the rest; 0 at kept tokens
    x_rest = log_sum_exp(x, shares)  # (C,)
    norm = torch.logaddexp(x_rest, x_kept.logsumexp(-1))  # (C,), over all tokens
    log_q, log_q_rest = x_kept - norm[:, None], x_rest - norm
    p, p_rest = log_p.exp(), log_p_rest.exp()
    kl = (p * (log_p.clamp(min=FLOOR) - log_q.clamp(min=FLOOR))).sum(-1)
    kl += p_rest * (log_p_rest.clamp(min=FLOOR) - log_q_rest.clamp(min=FLOOR))
    gradient = shares.mul_((log_q_rest.exp() - p_rest)[:, None])
    gradient.scatter_add_(1, indices, log_q.exp() - p)
    return kl, gradient


def plain_kl(
    student: torch.Tensor,
    teacher: Distribution,
    temperature: float,
    dtype: torch.dtype,
    out: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return KL(p || q) of each row, and its gradient towards student / T.

    Args:
      student: (C, V), logits.
      teacher: Of C rows; a sparse one is at the temperature T already.
      temperature: T.
      dtype: What is computed in.
      out: (C, V), memory for the gradient; None: new memory.

    Returns:
      (C,) and (C, V).
    """
    kl_of_rows = _sparse_kl if is_sparse(teacher) else _dense_kl
    return kl_of_rows(student, teacher, temperature, dtype, out)


@dataclass
class _Pairs:
    """The R pairs of a student's and a teacher's row that are compared."""

    teacher: Distribution  # of any number of rows
    temperature: float
    student_index: Optional[torch.Tensor]  # (R,), int64; None: all, in their order
    teacher_index: Optional[torch.Tensor]  # (R,), int64; None: all, in their order
    weights: Optional[torch.Tensor]  # (R,); None: 1
    chunk_kl: ChunkKL = plain_kl

    def chunks(self, student: torch.Tensor, v: int) -> Iterator[slice]:
        """Slices of the pairs, for rows of ``v`` logits."""
        r = len(student if self.student_index is None else self.student_index)
        step = chunk_rows(student.device, v)
        for begin in range(0, r, step):
            yield slice(begin, min(r, begin + step))

    def kl(
        self,
        part: slice,
        student: torch.Tensor,
        dtype: torch.dtype,
        out: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The sum of w KL over a chunk, in float64, and the gradient of T^2 times it.

        Args:
          part: The chunk's pairs.
          student: (C, V), its logits.
          dtype: What is computed in.
          out: (C, V), memory for the gradient; None: new memory.
        """
        rows = part if self.teacher_index is None else self.teacher_index[part]
        teacher = index_rows(self.teacher, rows)
        kl, gradient = self.chunk_kl(student, teacher, self.temperature, dtype, out)
        kl.clamp_(min=0.0)  # what rounding leaves of an equal pair
        if self.weights is not None:
            weights = self.weights[part].to(dtype)
            kl *= weights
            gradient *= weights[:, None]
        return kl.sum(dtype=torch.float64), gradient.mul_(self.temperature)


def _kl_and_gradient(
    student: torch.Tensor, pairs: _Pairs, needs_grad: bool
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """T^2 sum of w KL, and its gradient towards ``student``, (M, V)."""
    dtype = compute_dtype(student.dtype)
    # The gradient of float16 inputs stays in float32 until backward() scales it: times
    # the weights and the temperature, a probability of 1e-8 is 0 in float16.
    grad_dtype = dtype if student.dtype == torch.float16 else student.dtype
    all_rows = pairs.student_index is None
    grad = None
    if needs_grad:
        new = torch.empty_like if all_rows else torch.zeros_like
        grad = new(student, dtype=grad_dtype)
    # A chunk's gradient is formed where it belongs, if that is one piece of its type.
    in_place = needs_grad and all_rows and grad_dtype == dtype
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        for part in pairs.chunks(student, student.size(1)):
            rows = part if all_rows else pairs.student_index[part]
            x = student[rows] if all_rows else student.index_select(0, rows)
            out = grad[rows] if in_place else None
            kl, gradient = pairs.kl(part, x, dtype, out)
            total += kl
            if needs_grad and not in_place:
                grad[rows] = gradient.to(grad_dtype)
    return (total * pairs.temperature**2).to(dtype), grad


class _RowKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        ctx.save_for_backward(student)
        ctx.pairs = pairs
        value, ctx.grad = _kl_and_gradient(student, pairs, ctx.needs_input_grad[0])
        return value

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> Tuple[torch.Tensor, None]:
        (student,) = ctx.saved_tensors
        # The first call hands out the gradient itself; another makes it again.
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            _, grad = _kl_and_gradient(student, ctx.pairs, True)
        return grad.mul_(g).to(student.dtype), None


def _linear_kl(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    pairs: _Pairs,
    needs_grad: Sequence[bool],
) -> Tuple[torch.Tensor, List[Optional[torch.Tensor]]]:
    """T^2 sum of w KL, and its gradients towards ``x``, ``weight`` and ``bias``.

    Args:
      x: (M, H).
      weight: (V, H).
      bias: (V,), or None.
      pairs: Of all M rows.
      needs_grad: Of the three inputs, which need a gradient; that of others is None.
    """
    dtype = compute_dtype(x.dtype)
    grads = [
        torch.zeros_like(tensor, dtype=dtype) if tensor is not None and needed else None
        for tensor, needed in zip((x, weight, bias), needs_grad)
    ]
    x_grad, weight_grad, bias_grad = grads
    # A matrix product in the input's type, as the layer itself would make it; older
    # torch has none in float16 on a CPU.
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float16
    layer_dtype = dtype if on_cpu else x.dtype
    layer_weight = weight.to(layer_dtype)
    layer_bias = None if bias is None else bias.to(layer_dtype)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for part in pairs.chunks(x, len(weight)):
            h = x[part]  # (C, H)
            logits = torch.nn.functional.linear(
                h.to(layer_dtype), layer_weight, layer_bias
            )
            kl, gradient = pairs.kl(part, logits, dtype)  # (), (C, V)
            total += kl
            if x_grad is not None:
                x_grad[part] = gradient @ weight.to(dtype)
            if weight_grad is not None:
                weight_grad.addmm_(gradient.t(), h.to(dtype))
            if bias_grad is not None:
                bias_grad += gradient.sum(0)
    return (total * pairs.temperature**2).to(dtype), grads


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, pairs: _Pairs) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.pairs, ctx.needed = pairs, ctx.needs_input_grad[:3]
        value, ctx.grads = _linear_kl(x, weight, bias, pairs, ctx.needed)
        return value

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> Tuple[Any, ...]:
        inputs = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _linear_kl(*inputs, ctx.pairs, ctx.needed)
        return (
            *(
                None if grad is None else grad.mul_(g).to(tensor.dtype)
                for grad, tensor in zip(grads, inputs)
            ),
            None,
        )


def row_kl(
    student: torch.Tensor,
    teacher: Distribution,
    *,
    temperature: float = 1.0,
    student_index: Optional[torch.Tensor] = None,
    teacher_index: Optional[torch.Tensor] = None,
    weights: Optional[torch.Tensor] = None,
    chunk_kl: ChunkKL = plain_kl,
) -> torch.Tensor:
    """Return sum over rows r of w_r T^2 KL(softmax(z~_r / T) || softmax(z_r / T)).

    z is the student's, z~ the teacher's. With q = softmax(z / T) the gradient towards z
    is w T (q - p); of a sparse teacher, which is at this temperature already, the
    tokens that it dropped are one class with the tail as its mass, and there the
    gradient is w T (q_tail - p_tail) q_i / q_tail. In float32, or float64 for float64.

    Args:
      student: (M, V), logits. Gradients flow here only.
      teacher: (M', V), logits or log-probabilities, or sparse.
      temperature: T, above 0.
      student_index: (R,), int64, the rows that count, each once; by default all.
      teacher_index: (R,), int64, the teacher's row for each of those; by default all.
      weights: (R,), w, 0 or more; by default 1.
      chunk_kl: What is computed in place of the KL, such as
        :func:`icefall_kd.losses.factorised.factorised_kl`; it has the parameters and
        results of :func:`plain_kl`.

    Returns:
      A scalar, in nats.
    """
    pairs = _Pairs(
        teacher, float(temperature), student_index, teacher_index, weights, chunk_kl
    )
    return _RowKL.apply(student, pairs)


def linear_kl(
    x: torch.Tensor,
    linear: torch.nn.Linear,
    teacher: Distribution,
    *,
    temperature: float = 1.0,
    weights: Optional[torch.Tensor] = None,
    chunk_kl: ChunkKL = plain_kl,
) -> torch.Tensor:
    """Return :func:`row_kl` of ``linear(x)`` without making all of these logits.

    Args:
      x: (M, H). Gradients flow to it and to the layer's parameters.
      linear: The layer, from H to V.
      teacher: (M, V), logits or log-probabilities, or sparse.
      temperature: T, above 0.
      weights: (M,), w, 0 or more; by default 1.
      chunk_kl: As for :func:`row_kl`.

    Returns:
      A scalar, in nats.
    """
    pairs = _Pairs(teacher, float(temperature), None, None, weights, chunk_kl)
    x, weight = factors(linear, x)
    return _LinearKL.apply(x, weight, linear.bias, pairs)

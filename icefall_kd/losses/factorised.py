"""The KL divergence of rows in two parts: blank or not, and which symbol.

A symbol is a token other than blank.
"""

from typing import NamedTuple, Optional, Tuple

import torch

from icefall_kd.losses.kl import FLOOR, log_sum_exp, scaled_logits
from icefall_kd.types import Distribution, SparseDistribution, is_sparse


def factorised_kl(
    student: torch.Tensor,
    teacher: Distribution,
    temperature: float,
    dtype: torch.dtype,
    out: Optional[torch.Tensor],
    *,
    symbol_weight: float = 1.0,
    blank_weight: float = 1.0,
    blank_id: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return B KL_blank + W (1 - b) KL_symbols of each row, and its gradient.

    b is the teacher's probability of blank, KL_blank the divergence of the two classes
    blank and not blank, and KL_symbols that of the symbols given that it is not blank.
    By the chain rule the sum is the plain KL at B = W = 1, to rounding.

    A sparse teacher may have dropped blank, and then its b is not known. It is taken as
    the share of the tail that the student gives to blank among the tokens of the tail.
    So the sum is the plain KL at B = W = 1 here too, and 0 for an equal student. In the
    gradient this b is a constant, as if a teacher had given it.

    With r the student's softmax over the symbols, s the teacher's, q the student's
    probability of blank, the gradient towards student / T is B (q - b) at blank and
    B r (b - q) + W (1 - b) (r - s) at the symbols.

    Args:
      student: (C, V), logits.
      teacher: Of C rows; a sparse one is at the temperature T already.
      temperature: T.
      dtype: What is computed in.
      out: (C, V), memory for the gradient; None: new memory.
      symbol_weight: W, 0 or more.
      blank_weight: B, 0 or more.
      blank_id: The token id of blank.

    Returns:
      (C,), and the gradient towards student / T, (C, V).
    """
    x = scaled_logits(student, temperature, dtype)  # (C, V)
    weights = _Weights(blank_weight, symbol_weight)
    if is_sparse(teacher):
        return _sparse(x, teacher, out, weights, blank_id)
    y = scaled_logits(teacher, temperature, dtype)  # (C, V)
    return _dense(x, y, out, weights, blank_id)


class _Weights(NamedTuple):
    """Of the two parts."""

    blank: float  # B
    symbols: float  # W


class _Blank(NamedTuple):
    """Blank or not, in R rows, (R,) each."""

    log_blank: torch.Tensor
    log_symbols: torch.Tensor  # all of them together

    @staticmethod
    def of(blank: torch.Tensor, symbols: torch.Tensor) -> "_Blank":
        """From the logits of both, with any constant added."""
        norm = torch.logaddexp(blank, symbols)
        return _Blank(
            (blank - norm).clamp(min=FLOOR), (symbols - norm).clamp(min=FLOOR)
        )

    def kl(self, other: "_Blank") -> torch.Tensor:
        """The divergence of the two classes, of ``other`` from these."""
        return sum(p.exp() * (p - q) for p, q in zip(self, other))


def _take_blank(x: torch.Tensor, blank_id: int) -> torch.Tensor:
    """Take the logit of blank out of ``x``, (C, V), whose softmax is 0 there then."""
    blank = x[:, blank_id].clone()
    x[:, blank_id] += 2 * FLOOR
    return blank


def _dense(
    x: torch.Tensor,
    y: torch.Tensor,
    out: Optional[torch.Tensor],
    weights: _Weights,
    blank_id: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """:func:`factorised_kl` of scaled logits, (C, V), which are overwritten.

    For equal rows all is 0 to the last bit: both sides run through the same operations.
    """
    x_blank, y_blank = _take_blank(x, blank_id), _take_blank(y, blank_id)
    r, s = torch.softmax(x, -1, out=out), y.softmax(-1)  # (C, V), of the symbols
    x_symbols, y_symbols = log_sum_exp(x, r), log_sum_exp(y, s)  # (C,)
    log_q, log_p = _Blank.of(x_blank, x_symbols), _Blank.of(y_blank, y_symbols)
    q, b = log_q.log_blank.exp(), log_p.log_blank.exp()
    weight = weights.symbols * log_p.log_symbols.exp()  # W (1 - b)
    kl = y.sub_(x).mul_(s).sum(-1).add_(x_symbols - y_symbols)  # of the symbols
    kl = weights.blank * log_p.kl(log_q) + weight * kl.clamp_(min=0.0)
    of_blank = weights.blank * (q - b)
    gradient = r.mul_((weight - of_blank)[:, None]).sub_(s.mul_(weight[:, None]))
    gradient[:, blank_id] = of_blank
    return kl, gradient


def _sparse(
    x: torch.Tensor,
    teacher: SparseDistribution,
    out: Optional[torch.Tensor],
    weights: _Weights,
    blank_id: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """:func:`factorised_kl` of scaled logits, (C, V), which are overwritten.

    The classes are blank, the kept symbols and the symbols of the tail.
    """
    indices, log_p = teacher.indices, teacher.log_probs.to(x.dtype)  # (C, K)
    is_token = log_p != -torch.inf  # (C, K); the others fill up a row, with index 0
    is_symbol = is_token & (indices != blank_id)
    x_kept = x.gather(1, indices).masked_fill(~is_symbol, -torch.inf)  # (C, K)
    x_blank = _take_blank(x, blank_id)
    x.scatter_add_(1, indices, is_symbol.to(x.dtype).mul_(2 * FLOOR))
    shares = torch.softmax(x, -1, out=out)  # (C, V), of the tail's symbols
    x_tail = log_sum_exp(x, shares)  # (C,)
    x_symbols = torch.logaddexp(x_tail, x_kept.logsumexp(-1))
    log_q = _Blank.of(x_blank, x_symbols)

    kept = log_p.masked_fill(~is_symbol, -torch.inf)
    blank, tail = _teacher_blank_and_tail(teacher, blank_id, x_blank, x_tail)
    symbols = torch.logaddexp(tail, kept.logsumexp(-1))
    log_b = _Blank.of(blank, symbols)
    q, b = log_q.log_blank.exp(), log_b.log_blank.exp()

    # Of the kept symbols and, in the last column, of the tail's.
    log_r = torch.cat((x_kept, x_tail[:, None]), -1) - x_symbols[:, None]
    log_s = torch.cat((kept, tail[:, None]), -1) - symbols.clamp(min=FLOOR)[:, None]
    r, s = log_r.exp(), log_s.exp()  # (C, K + 1)
    weight = weights.symbols * log_b.log_symbols.exp()  # W (1 - b)
    kl = (s * (log_s.clamp(min=FLOOR) - log_r.clamp(min=FLOOR))).sum(-1)
    kl = weights.blank * log_b.kl(log_q) + weight * kl.clamp_(min=0.0)
    of_blank = weights.blank * (q - b)
    of_classes = r * (weight - of_blank)[:, None] - s * weight[:, None]
    gradient = shares.mul_(of_classes[:, -1:])
    gradient.scatter_add_(1, indices, of_classes[:, :-1])
    gradient[:, blank_id] = of_blank
    return kl, gradient


def _teacher_blank_and_tail(
    teacher: SparseDistribution,
    blank_id: int,
    x_blank: torch.Tensor,
    x_tail: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """log b and the log of the tail without blank, (C,) each.

    Args:
      teacher: Of C rows.
      blank_id: The token id of blank.
      x_blank: (C,), the student's logit of blank.
      x_tail: (C,), that of the dropped symbols together.
    """
    log_p, log_tail = (
        v.to(x_tail.dtype) for v in (teacher.log_probs, teacher.log_tail)
    )
    log_blank = log_p.masked_fill(teacher.indices != blank_id, -torch.inf).amax(-1)
    is_dropped = log_blank == -torch.inf
    tail = torch.logaddexp(x_blank, x_tail)  # with blank
    log_blank = torch.where(is_dropped, log_tail + (x_blank - tail), log_blank)
    log_tail = torch.where(is_dropped, log_tail + (x_tail - tail), log_tail)
    return log_blank, log_tail

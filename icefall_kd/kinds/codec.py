"""Distributions over tokens: dense to sparse to bytes, and back.

A form is a short text, the same on the command line and in a store's fingerprint:

===================  ================================================================
``dense``            every log-probability in float16
``top:8``            the 8 most probable tokens and the mass of the rest
``adaptive:.999:32`` as many as reach the mass .999, at most 32, and the rest's mass
``sampled:12``       12 tokens drawn from the distribution, with their counts
===================  ================================================================

With the tail as one more class the KL divergence of ``top`` and ``adaptive`` is that of
K + 1 classes, an exact divergence and a lower bound of the dense one; without it a
top-k KL is biased and can be negative (arXiv:2503.16870). ``sampled`` gives an unbiased
estimate of the gradient.

``@T`` after the form, as in ``adaptive:.999:32@2``, stores softmax(z / T) in place of
softmax(z). A sparse target can't be brought to another temperature: what its tail
would be there is not known. So a sparse store is made for one temperature, and read
at that one only; ``dense`` serves all.

The bytes of M rows, over a vocabulary of V tokens (little-endian)::

    dense   | log P, M x V float16 |

    sparse, deflated together (zlib), with E entries in all rows:
            | entries of each row | tail of each row | token ids    | values    |
            | M x uint8           | M x uint8        | E x uint16 * | E x uint8 |
            * uint32 where V > 65536

Of ``top`` and ``adaptive`` a value stands for the probability p of its token, and the
tail's byte for the tail's: each is the square root of p in steps of 1/255, and the row
is brought to a sum of 1 when it is read. ``sampled`` has counts and no tail. For a row
of n tokens and a tail, p' being read for p,

    |sqrt(p') - sqrt(p)| <= (h + d sqrt(p)) / (1 - d),  h = 1/510,  d = h sqrt(n + 1),

which is small where p is small: 0.002 + 0.003 sqrt(p) for n = 1, 0.002 + 0.008 sqrt(p)
for 16, 0.002 + 0.032 sqrt(p) for 255. A token below h^2 (4e-6) goes into the tail,
whose p counts it. ``dense`` rounds log p to float16, for an error of 2^-11 (|log p| +
H) at most, H the row's entropy.
"""

import hashlib
import math
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Optional, Sequence, Tuple

import numpy as np
import torch

from icefall_kd.errors import KDError, require
from icefall_kd.types import Distribution, SparseDistribution

FORMS = "dense, top:K, adaptive:MASS:MAX or sampled:N, with @T for a temperature"
MAX_ENTRIES = 255  # a row's count is one byte
LEAST_LOG_PROB = 2 * math.log(1 / 255)  # what a byte of 1 stands for


def _bad(text: str, reason: str) -> KDError:
    return KDError(f"the form is {text!r}, and {reason}: give {FORMS}")


@dataclass(frozen=True)
class Codec:
    """Turns the rows of a (M, V) distribution into bytes of one form, and back.

    Args:
      method: "dense", "top", "adaptive" or "sampled".
      entries: The most tokens that a row has, or how many are drawn.
      mass: "adaptive": the mass that a row's tokens reach where ``entries`` allow.
      temperature: T of the softmax(z / T) that is stored.
    """

    method: str = "dense"
    entries: int = 0
    mass: float = 1.0
    temperature: float = 1.0

    @staticmethod
    @lru_cache(maxsize=64)
    def parse(text: str) -> "Codec":
        """Return the codec of a form.

        Args:
          text: The form.

        Raises:
          KDError: another text.
        """
        match = re.fullmatch(r"([a-z]+)((?::[0-9.]+)*)(?:@([0-9.]+))?", text)
        if not match:
            raise _bad(text, "is of no known form")
        method, numbers, temperature = match.groups()
        try:
            values = [float(v) for v in numbers.split(":")[1:]]
            t = float(temperature or 1)
        except ValueError:
            raise _bad(text, "one of its numbers can't be read") from None
        numbers_of = {"dense": 0, "top": 1, "adaptive": 2, "sampled": 1}
        if numbers_of.get(method) != len(values):
            raise _bad(text, "is of no known form")
        if not 0 < t < math.inf:
            raise _bad(text, "its temperature must be above 0, and finite")
        if method == "dense":
            if t != 1:
                raise _bad(text, "dense serves every temperature without @T")
            return Codec()
        entries = values[-1]
        if not 1 <= entries <= MAX_ENTRIES or entries != int(entries):
            raise _bad(text, f"its number of entries must be 1 to {MAX_ENTRIES}")
        mass = values[0] if method == "adaptive" else 1.0
        if not 0 < mass <= 1:
            raise _bad(text, "its mass must be above 0 and at most 1")
        return Codec(method, int(entries), mass, t)

    def __str__(self) -> str:
        text = self.method
        if self.method == "adaptive":
            text += f":{_number(self.mass)}"
        if self.method != "dense":
            text += f":{self.entries}"
        return text + (f"@{_number(self.temperature)}" if self.temperature != 1 else "")

    def check_temperature(self, temperature: float, title: str = "targets") -> None:
        """Refuse to read a sparse form at another temperature than its own.

        Args:
          temperature: The loss's.
          title: What the message calls the targets.

        Raises:
          KDError: the form was made for another temperature.
        """
        require(
            self.method == "dense" or temperature == self.temperature,
            f"the {title} have the form {self}, for temperature {self.temperature:g}, "
            f"and the loss is at {temperature:g}: give `temperature` "
            f"{self.temperature:g}, or dump them in the form dense",
        )

    def reduce(
        self,
        logits: torch.Tensor,
        key: str = "",
        always: Optional[torch.Tensor] = None,
    ) -> Distribution:
        """Reduce logits to what the form stores, before it becomes bytes.

        Args:
          logits: (M, V), finite, up to a constant per row.
          key: "sampled" draws the same tokens for the same key.
          always: (M, A), int64, tokens that "top" and "adaptive" store beside those
            that they choose, however improbable: with the smallest probability that a
            byte holds, 1/255^2, or their own (so that its root may be 2 h off, where
            others' are h). "sampled" stays a draw.
        """
        log_probs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        if self.method == "dense":
            return log_probs
        if self.method == "sampled":
            return _sample(log_probs, self.entries, key)
        room = MAX_ENTRIES - (0 if always is None else always.size(1))
        k = min(self.entries, log_probs.size(1), room)
        top, indices = log_probs.topk(k, dim=-1)  # (M, k)
        chosen = torch.ones_like(top, dtype=torch.bool)
        if self.method == "adaptive":
            mass_before = top.exp().cumsum(-1) - top.exp()
            chosen = mass_before < self.mass
            chosen[:, 0] = True
        # What is not chosen makes the tail.
        rest = log_probs.scatter(1, indices, top.masked_fill(chosen, -torch.inf))
        if always is not None:
            # Columns 0 to A - 1 have the tokens of `always`, each once in a row. The
            # same tokens are dropped from the columns after them.
            forced = log_probs.gather(1, always).clamp(min=LEAST_LOG_PROB)
            chosen &= ~(indices.unsqueeze(2) == always.unsqueeze(1)).any(2)
            repeated = (always.unsqueeze(2) == always.unsqueeze(1)).tril(-1).any(2)
            top, indices = torch.cat((forced, top), 1), torch.cat((always, indices), 1)
            chosen = torch.cat((~repeated, chosen), 1)
            rest.scatter_(1, always, -torch.inf)
        return SparseDistribution(
            indices.masked_fill(~chosen, 0),
            top.masked_fill(~chosen, -torch.inf),
            rest.logsumexp(-1),
        )

    def encode(
        self,
        logits: torch.Tensor,
        key: str = "",
        always: Optional[torch.Tensor] = None,
    ) -> bytes:
        """Turn logits into bytes; see the top of the module for their layout.

        Args:
          logits: See :meth:`reduce`.
          key: See :meth:`reduce`.
          always: See :meth:`reduce`.
        """
        rows = self.reduce(logits, key, always)
        if not isinstance(rows, SparseDistribution):
            return rows.to(torch.float16).numpy().tobytes()
        values, tails = _value_bytes(rows, self.method == "sampled", self.entries)
        mask = values > 0  # (M, K)
        tokens = rows.indices.numpy()[mask].astype(token_type(logits.size(1)))
        return deflate([mask.sum(-1).astype(np.uint8), tails, tokens, values[mask]])

    def decode(
        self, data: Sequence[bytes], rows: Sequence[int], vocab_size: int
    ) -> Distribution:
        """Turn bytes into rows, of several encodings in one go.

        Args:
          data: One or more encodings.
          rows: The number of rows of each.
          vocab_size: V, the number of tokens.

        Returns:
          All rows, one encoding's after another's: log-probabilities, of a sum of 1
          in each row.

        Raises:
          ValueError: bytes that :meth:`encode` did not make.
        """
        if self.method == "dense":
            return _decode_dense(data, sum(rows), vocab_size)
        dtype = token_type(vocab_size)
        sections = [_sections(d, n, dtype) for d, n in zip(data, rows)]
        counts, tails, tokens, values = map(np.concatenate, zip(*sections))
        if counts.sum(dtype=np.int64) != len(values):
            raise ValueError(f"{len(values)} entries, and not {counts.sum()}")
        if len(tokens) and int(tokens.max()) >= vocab_size:
            raise ValueError("an index beyond the vocabulary")
        # From one list of entries to M rows of K, the longest row's; the rest is 0.
        width = max(1, int(counts.max(initial=0)))
        mask = np.arange(width) < counts[:, None]
        indices = np.zeros(mask.shape, np.int64)
        p = np.zeros(mask.shape, np.float32)
        indices[mask], p[mask] = tokens, values
        p, tail = torch.from_numpy(p), torch.from_numpy(tails.astype(np.float32))
        if self.method != "sampled":  # roots; draws are counts
            p, tail = p.square(), tail.square()
        mass = p.sum(-1) + tail
        return SparseDistribution(
            torch.from_numpy(indices), (p / mass[:, None]).log(), (tail / mass).log()
        )


def _decode_dense(data: Sequence[bytes], rows: int, vocab_size: int) -> torch.Tensor:
    flat = np.concatenate([np.frombuffer(d, np.float16) for d in data])
    values = torch.from_numpy(flat.reshape(-1, vocab_size).astype(np.float32))
    if len(values) != rows:
        raise ValueError(f"{len(values)} rows, and not {rows}")
    return values.log_softmax(-1)


def _sections(data: bytes, rows: int, dtype: np.dtype) -> Tuple[np.ndarray, ...]:
    """The counts, tails, tokens and values of one sparse encoding."""
    inflated, rest = inflate(data)
    if rest:
        raise ValueError(f"{len(rest)} bytes too many")
    entries, remainder = divmod(len(inflated) - 2 * rows, dtype.itemsize + 1)
    if remainder or entries < 0:
        raise ValueError(f"{len(inflated)} bytes for {rows} rows")
    reader = Reader(inflated)
    lengths = ((np.uint8, rows), (np.uint8, rows), (dtype, entries))
    return (*(reader.take(*x) for x in lengths), reader.take(np.uint8, entries))


def _value_bytes(
    rows: SparseDistribution, sampled: bool, draws: int
) -> Tuple[np.ndarray, np.ndarray]:
    """A byte for each entry, 0 where it is not stored, and one for each row's tail."""
    p = rows.log_probs.exp()
    if sampled:
        return (p * draws).round().byte().numpy(), np.zeros(len(p), np.uint8)
    values = (p.sqrt() * 255).round()
    # What is too small for a byte goes into the tail.
    tail = rows.log_tail.exp() + p.masked_fill(values > 0, 0).sum(-1)
    return values.byte().numpy(), (tail.sqrt() * 255).round().byte().numpy()


def token_type(vocab_size: int) -> np.dtype:
    """Return the type in which a token id is stored.

    Args:
      vocab_size: V, the number of tokens.
    """
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def deflate(arrays: Sequence[np.ndarray]) -> bytes:
    """Deflate the bytes of arrays together, one after another.

    Args:
      arrays: Of any shapes and types.
    """
    return zlib.compress(b"".join(array.tobytes() for array in arrays))


def inflate(data: bytes) -> Tuple[bytes, bytes]:
    """Return what was deflated, and the bytes after it.

    Args:
      data: Begins with what :func:`deflate` returned.

    Raises:
      ValueError: it does not.
    """
    inflator = zlib.decompressobj()
    try:
        head = inflator.decompress(data)
    except zlib.error as e:
        raise ValueError(str(e)) from None
    if not inflator.eof:
        raise ValueError("deflated bytes without their end")
    return head, inflator.unused_data


class Reader:
    """Takes arrays off bytes, one after another.

    Args:
      data: The bytes.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.offset = data, 0

    def take(self, dtype: Any, n: int) -> np.ndarray:
        """Return the next n numbers.

        Args:
          dtype: Their type.
          n: How many.

        Raises:
          ValueError: fewer bytes are left.
        """
        array = np.frombuffer(self.data, dtype, n, self.offset)
        self.offset += array.nbytes
        return array

    def finish(self) -> None:
        """Refuse bytes that are left."""
        if self.offset != len(self.data):
            raise ValueError(
                f"{len(self.data)} bytes, of which {self.offset} were read"
            )


def _number(value: float) -> str:
    """The shortest text that reads back as the value, without an exponent."""
    return np.format_float_positional(value, trim="-")


def _sample(log_probs: torch.Tensor, n: int, key: str) -> SparseDistribution:
    """Draw ``n`` tokens a row; each distinct one occurs once, with its share."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    uniform = np.random.Generator(np.random.PCG64(seed)).random((len(log_probs), n))
    cdf = log_probs.double().exp().cumsum(-1)  # (M, V)
    points = torch.from_numpy(uniform) * cdf[:, -1:]  # (M, n)
    drawn = torch.searchsorted(cdf, points, right=True)
    drawn = drawn.clamp_(max=log_probs.size(1) - 1).sort(-1).values
    # Of equal tokens, which are neighbours now, the first carries the share of all.
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    counts = (drawn.unsqueeze(-1) == drawn.unsqueeze(-2)).sum(-1)
    log_share = (counts.float() / n).log().masked_fill(~first, -torch.inf)
    return SparseDistribution(
        drawn.masked_fill(~first, 0),
        log_share,
        torch.full((len(log_probs),), -torch.inf),
    )

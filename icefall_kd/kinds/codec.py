"""Distributions over symbols: dense to sparse to bytes, and back.

A codec is named by a short text, the same on the command line and in a store's
fingerprint:

===================  ================================================================
``dense``            every log-probability in float16
``top:8``            the 8 most probable symbols and the mass of the rest
``adaptive:.999:32`` as many as reach the mass .999, at most 32, and the rest's mass
``sampled:12``       12 symbols drawn from the distribution, with their counts
===================  ================================================================

With the tail as one more class the KL divergence of ``top`` and ``adaptive`` is that of
K + 1 classes, an exact divergence and a lower bound of the dense one; without it a
top-k KL is biased and can be negative (arXiv:2503.16870). ``sampled`` gives an unbiased
estimate of the gradient.

Of a sparse row each probability p, the tail's too, is one byte, the square root of p in
steps of 1/255, and the row is brought to a sum of 1 when it is read. For a row of n
symbols and a tail, p' being read for p,

    |sqrt(p') - sqrt(p)| <= (h + d sqrt(p)) / (1 - d),  h = 1/510,  d = h sqrt(n + 1),

which is small where p is small: 0.002 + 0.003 sqrt(p) for n = 1, 0.002 + 0.008 sqrt(p)
for 16, 0.002 + 0.032 sqrt(p) for 255. A symbol below h^2 (4e-6) goes into the tail,
whose p counts it. All of an utterance's rows are deflated together (zlib). ``dense``
rounds log p to float16, for an error of 2^-11 (|log p| + H) at most, H the row's
entropy; ``sampled`` keeps its counts.

``@T`` behind the name, as in ``adaptive:.999:32@2``, keeps softmax(z / T) in place of
softmax(z). A sparse target can't be brought to another temperature: what its tail
would hold there is not known. So a sparse store is made for one temperature, and read
at that one only; ``dense`` serves all.
"""

import hashlib
import math
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional, Sequence, Tuple

import numpy as np
import torch

from icefall_kd.errors import KDError
from icefall_kd.lattice import best_path, passed_nodes
from icefall_kd.types import (
    Distribution,
    LatticeTargets,
    PrunedLattice,
    SparseDistribution,
)

FORMS = "dense, top:K, adaptive:MASS:MAX or sampled:N, with @T for a temperature"
MAX_ENTRIES = 255  # a row's count is one byte
LEAST_LOG_PROB = 2 * math.log(1 / 255)  # what a byte of 1 stands for


def _bad(text: str, reason: str) -> KDError:
    return KDError(f"the representation is {text!r}, and {reason}: give {FORMS}")


@dataclass(frozen=True)
class Codec:
    """How the rows of a (M, V) distribution are kept.

    Args:
      kind: "dense", "top", "adaptive" or "sampled".
      entries: Most symbols a row keeps, or how many are drawn.
      mass: "adaptive": the mass that the kept symbols reach where ``entries`` allow.
      temperature: What is kept is softmax(z / temperature).
    """

    kind: str = "dense"
    entries: int = 0
    mass: float = 1.0
    temperature: float = 1.0

    @staticmethod
    @lru_cache(maxsize=64)
    def parse(text: str) -> "Codec":
        """The codec that ``text`` names."""
        match = re.fullmatch(r"([a-z]+)((?::[0-9.]+)*)(?:@([0-9.]+))?", text)
        if not match:
            raise _bad(text, "is of no known form")
        kind, numbers, temperature = match.groups()
        try:
            values = [float(v) for v in numbers.split(":")[1:]]
            t = float(temperature or 1)
        except ValueError:
            raise _bad(text, "one of its numbers can't be read") from None
        wanted = {"dense": 0, "top": 1, "adaptive": 2, "sampled": 1}
        if wanted.get(kind) != len(values):
            raise _bad(text, "is of no known form")
        if not 0 < t < math.inf:
            raise _bad(text, "its temperature must be above 0, and finite")
        if kind == "dense":
            if t != 1:
                raise _bad(text, "dense serves every temperature without @T")
            return Codec()
        entries = values[-1]
        if not 1 <= entries <= MAX_ENTRIES or entries != int(entries):
            raise _bad(text, f"its number of entries must be 1 to {MAX_ENTRIES}")
        mass = values[0] if kind == "adaptive" else 1.0
        if not 0 < mass <= 1:
            raise _bad(text, "its mass must be above 0 and at most 1")
        return Codec(kind, int(entries), mass, t)

    def __str__(self) -> str:
        text = self.kind
        if self.kind == "adaptive":
            text += f":{_number(self.mass)}"
        if self.kind != "dense":
            text += f":{self.entries}"
        return text + (f"@{_number(self.temperature)}" if self.temperature != 1 else "")

    def check_temperature(self, temperature: float, option: str = "--keep") -> None:
        """Refuse to read a sparse store at another temperature than its own."""
        if self.kind != "dense" and temperature != self.temperature:
            raise KDError(
                f"the targets are kept as {self}, for temperature "
                f"{self.temperature:g}, and the loss asks for {temperature:g}: give "
                f"--kd-temperature {self.temperature:g}, or dump with {option} dense"
            )

    def keep(
        self,
        logits: torch.Tensor,
        key: str = "",
        always: Optional[torch.Tensor] = None,
    ) -> Distribution:
        """What stays of ``logits``, before it becomes bytes.

        Args:
          logits: (M, V), finite, up to a constant per row.
          key: "sampled" draws the same symbols for the same key.
          always: (M, A), int64, symbols that "top" and "adaptive" keep beside those
            that they choose, however improbable: with the smallest probability that a
            byte holds, 1/255^2, or their own (so that its root may be 2 h off, where
            others' are h). "sampled" stays a draw.
        """
        log_probs = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        if self.kind == "dense":
            return log_probs
        if self.kind == "sampled":
            return _sample(log_probs, self.entries, key)
        room = MAX_ENTRIES - (0 if always is None else always.size(1))
        k = min(self.entries, log_probs.size(1), room)
        top, indices = log_probs.topk(k, dim=-1)
        keep = torch.ones_like(top, dtype=torch.bool)
        if self.kind == "adaptive":
            before = top.exp().cumsum(-1) - top.exp()  # mass in front of each entry
            keep = before < self.mass
            keep[:, 0] = True
        rest = log_probs.scatter(1, indices, top.masked_fill(keep, -torch.inf))
        if always is not None:
            own = log_probs.gather(1, always).clamp(min=LEAST_LOG_PROB)
            keep &= ~(indices.unsqueeze(2) == always.unsqueeze(1)).any(2)
            once = (always.unsqueeze(2) == always.unsqueeze(1)).tril(-1).any(2)
            top, indices = torch.cat((own, top), 1), torch.cat((always, indices), 1)
            keep = torch.cat((~once, keep), 1)
            rest.scatter_(1, always, -torch.inf)
        return SparseDistribution(
            indices.masked_fill(~keep, 0),
            top.masked_fill(~keep, -torch.inf),
            rest.logsumexp(-1),
        )

    def encode(self, kept: Distribution, vocab_size: int) -> bytes:
        """The bytes of what :meth:`keep` left."""
        if not isinstance(kept, SparseDistribution):
            return _half(kept).tobytes()
        values, tail = _bytes(kept, self.kind == "sampled", self.entries)
        mask = values > 0
        indices = kept.indices.numpy()[mask].astype(_index_type(vocab_size))
        parts = (mask.sum(-1).astype(np.uint8), tail, indices, values[mask])
        return zlib.compress(b"".join(a.tobytes() for a in parts))

    def decode(
        self, data: Sequence[bytes], rows: Sequence[int], vocab_size: int
    ) -> Distribution:
        """The inverse of :meth:`encode`, of several encodings in one go.

        Args:
          data: One or more encodings.
          rows: How many rows each has.

        Returns:
          All rows, one encoding's behind the other's.

        Raises:
          ValueError: bytes that :meth:`encode` did not make.
        """
        if self.kind == "dense":
            flat = np.concatenate([np.frombuffer(d, np.float16) for d in data])
            values = torch.from_numpy(flat.reshape(-1, vocab_size).astype(np.float32))
            if len(values) != sum(rows):
                raise ValueError(f"{len(values)} rows, and not {sum(rows)}")
            return values.log_softmax(-1)
        kind = _index_type(vocab_size)
        parts = [_sections(_inflate_all(d), n, kind) for d, n in zip(data, rows)]
        counts, tail, flat_indices, flat = map(np.concatenate, zip(*parts))
        if counts.sum(dtype=np.int64) != len(flat):
            raise ValueError(f"{len(flat)} entries, and not {counts.sum()}")
        if len(flat_indices) and int(flat_indices.max()) >= vocab_size:
            raise ValueError("an index beyond the vocabulary")
        width = max(1, int(counts.max(initial=0)))
        mask = np.arange(width) < counts[:, None]
        indices = np.zeros(mask.shape, np.int64)
        p = np.zeros(mask.shape, np.float32)
        indices[mask], p[mask] = flat_indices, flat
        p, tail = torch.from_numpy(p), torch.from_numpy(tail.astype(np.float32))
        if self.kind != "sampled":
            p, tail = p.square(), tail.square()
        mass = p.sum(-1) + tail
        return SparseDistribution(
            torch.from_numpy(indices), (p / mass[:, None]).log(), (tail / mass).log()
        )


def _sections(data: bytes, rows: int, kind: np.dtype) -> Tuple[np.ndarray, ...]:
    """Counts, tails, indices and values of one encoding."""
    a = np.frombuffer(data, np.uint8)
    entries, rest = divmod(len(a) - 2 * rows, kind.itemsize + 1)
    if rest or entries < 0:
        raise ValueError(f"{len(a)} bytes for {rows} rows")
    indices = a[2 * rows : len(a) - entries]
    return a[:rows], a[rows : 2 * rows], indices.view(kind), a[len(a) - entries :]


def _bytes(
    kept: SparseDistribution, sampled: bool, draws: int
) -> Tuple[np.ndarray, np.ndarray]:
    """A byte for each entry, 0 for none, and one for the tail."""
    p = kept.log_probs.exp()
    if sampled:
        return (p * draws).round().byte().numpy(), np.zeros(len(p), np.uint8)
    values = (p.sqrt() * 255).round()
    tail = kept.log_tail.exp() + p.masked_fill(values > 0, 0).sum(-1)
    return values.byte().numpy(), (tail.sqrt() * 255).round().byte().numpy()


def _inflate_all(data: bytes) -> bytes:
    inflated, rest = _inflate(data)
    if rest:
        raise ValueError(f"{len(rest)} bytes too many")
    return inflated


def _inflate(data: bytes) -> Tuple[bytes, bytes]:
    """What was deflated, and what lies behind it."""
    inflator = zlib.decompressobj()
    try:
        head = inflator.decompress(data)
    except zlib.error as e:
        raise ValueError(str(e)) from None
    if not inflator.eof:
        raise ValueError("deflated bytes without their end")
    return head, inflator.unused_data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, kind, n: int) -> np.ndarray:
        array = np.frombuffer(self.data, kind, n, self.at)
        self.at += array.nbytes
        return array

    def finish(self) -> None:
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data)} bytes, of which {self.at} were read")


def _number(value: float) -> str:
    """As short as it can be read back, without an exponent."""
    return np.format_float_positional(value, trim="-")


def _half(values: torch.Tensor) -> np.ndarray:
    """Float16, with -inf for what is below its range."""
    return values.to(torch.float16).numpy()


def _sample(log_probs: torch.Tensor, n: int, key: str) -> SparseDistribution:
    """``n`` draws a row with replacement; each distinct symbol once, with its share."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    uniform = np.random.Generator(np.random.PCG64(seed)).random((len(log_probs), n))
    cdf = log_probs.double().exp().cumsum(-1)
    points = torch.from_numpy(uniform) * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, points, right=True)
    drawn = drawn.clamp_(max=log_probs.size(1) - 1).sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    counts = (drawn.unsqueeze(-1) == drawn.unsqueeze(-2)).sum(-1)
    log_share = (counts.float() / n).log().masked_fill(~first, -torch.inf)
    return SparseDistribution(
        drawn.masked_fill(~first, 0),
        log_share,
        torch.full((len(log_probs),), -torch.inf),
    )


@dataclass(frozen=True)
class LatticeCodec:
    """How the nodes of a pruned lattice are kept.

    Nodes that the path passes with a probability below 1/510 are left out, and the
    others' occupancy is a byte, in steps of 1/255. ``top`` and ``adaptive`` keep the
    next label and blank at every node, beside the symbols that they choose, so that
    what is made of those (collapsed forms, sums over paths) is as fine as the
    teacher's. Stores that were made before they did are read as they are.

    Args:
      nodes: For each node's distribution; None keeps {next label, blank, rest} alone
        (collapsed, arXiv:2011.06110), log-probabilities in float16.
      blank_id: Of the teacher.
      path: Keep the nodes of the best alignment alone, each with an occupancy of 1
        (arXiv:2110.03334).
    """

    nodes: Optional[Codec]
    blank_id: int
    path: bool = False

    @staticmethod
    def parse(text: str, blank_id: int) -> "LatticeCodec":
        """The codec that ``text`` names: "collapsed" or a :class:`Codec`'s name, with
        "path:" before it for the best alignment alone."""
        path, form = text.startswith("path:"), text.removeprefix("path:")
        nodes = None if form == "collapsed" else Codec.parse(form)
        return LatticeCodec(nodes, blank_id, path)

    def __str__(self) -> str:
        form = "collapsed" if self.nodes is None else str(self.nodes)
        return f"path:{form}" if self.path else form

    def check_temperature(self, temperature: float) -> None:
        """Refuse to read it at another temperature than its own."""
        if self.nodes is not None:
            self.nodes.check_temperature(temperature, "--keep-lattice")
        elif temperature != 1:
            raise KDError(
                f"the lattices are kept as {self}, for temperature 1, and the loss "
                f"asks for {temperature:g}: give --kd-temperature 1, or dump with "
                "--keep-lattice dense"
            )

    def encode(self, lattice: PrunedLattice, key: str = "") -> bytes:
        """The bytes of one utterance's lattice (N = 1)."""
        if lattice.ranges.size(0) != 1:
            raise ValueError(f"a lattice of {lattice.ranges.size(0)} utterances, not 1")
        u, t = lattice.boundary[0, 2:].tolist()
        ranges, symbols = lattice.ranges[0, :t].cpu(), lattice.labels[0, :u].cpu()
        logits = lattice.logits[0, :t].float().cpu()
        occupancy = lattice.occupancy[0, :t].cpu()
        if self.path:
            occupancy = best_path(lattice, self.blank_id)[0, :t].cpu().float()
        mask = passed_nodes(occupancy)
        steps = (occupancy * 255).round().clamp(min=1).masked_fill(~mask, 0)
        v = logits.size(-1)
        kind = _index_type(v)
        head = np.array([t, u, ranges.size(1)], np.uint32)
        parts = [head, ranges[:, 0].numpy().astype(np.uint16)]
        parts += [symbols.numpy().astype(kind), steps.to(torch.uint8).numpy()]
        data = zlib.compress(b"".join(p.tobytes() for p in parts))
        label = _next_labels(ranges[mask], symbols)
        if self.nodes is not None:
            blank = torch.full_like(label, self.blank_id)
            always = torch.stack((blank, torch.where(label < 0, blank, label)), -1)
            kept = self.nodes.keep(logits[mask], key, always)
            return data + self.nodes.encode(kept, v)
        log_probs = logits[mask].log_softmax(-1)
        log_y = log_probs.gather(1, label.clamp(min=0)[:, None])[:, 0]
        log_y = log_y.masked_fill(label < 0, -torch.inf)
        pair = torch.stack((log_y, log_probs[:, self.blank_id]), -1)
        return data + _half(pair).tobytes()

    def decode(self, data: bytes, vocab_size: int) -> LatticeTargets:
        """The inverse of :meth:`encode`."""
        kind = _index_type(vocab_size)
        head, data = _inflate(data)
        reader = _Reader(head)
        t, u, s = reader.take(np.uint32, 3).tolist()
        first = torch.from_numpy(reader.take(np.uint16, t).astype(np.int64))
        symbols = torch.from_numpy(reader.take(kind, u).astype(np.int64))
        occupancy = reader.take(np.uint8, t * s).reshape(t, s).astype(np.float32) / 255
        reader.finish()
        occupancy = torch.from_numpy(occupancy)
        ranges = first[:, None] + torch.arange(s)
        mask = occupancy > 0
        rows = int(mask.sum())
        if self.nodes is not None:
            nodes = self.nodes.decode([data], [rows], vocab_size)
            return LatticeTargets(ranges, symbols, occupancy, nodes)
        reader = _Reader(data)
        pair = reader.take(np.float16, 2 * rows).reshape(rows, 2).astype(np.float32)
        reader.finish()
        pair = torch.from_numpy(pair)
        rest = (1 - pair.exp().sum(-1)).clamp(min=1e-6).log()
        mass = torch.cat((pair, rest[:, None]), 1).logsumexp(-1)
        label = _next_labels(ranges[mask], symbols).clamp(min=0)
        blank = torch.full_like(label, self.blank_id)
        nodes = SparseDistribution(
            torch.stack((label, blank), -1), pair - mass[:, None], rest - mass
        )
        return LatticeTargets(ranges, symbols, occupancy, nodes)


def _index_type(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def _next_labels(position: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
    """The label that follows each position u; -1 behind the last."""
    padded = torch.cat((symbols, symbols.new_full((1,), -1)))
    return padded[position.clamp(max=len(symbols))]

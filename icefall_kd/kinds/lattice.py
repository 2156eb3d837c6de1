"""The transducer's distribution over tokens at the nodes of a pruned lattice.

The bytes of one utterance's lattice, of T frames, U labels, S label positions at a
frame and R nodes with an occupancy above 0 (little-endian; a token is uint16, or uint32
where the vocabulary has more than 65536)::

    deflated (zlib) +------------+-------------+-------------+------------------+
                    | T, U, S    | ranges[:, 0]| labels      | occupancy * 255  |
                    | 3 x uint32 | T x uint16  | U x token   | T * S x uint8    |
                    +------------+-------------+-------------+------------------+
    after it        | the R nodes' distributions, in the order of frames and positions:
                    | collapsed: R x (log P(next label), log P(blank)), float16
                    | else: as icefall_kd.kinds.codec encodes R rows
"""

from dataclasses import dataclass
from typing import List, Optional, Union

import numpy as np
import torch

from icefall_kd.errors import require
from icefall_kd.kinds.base import Parts, UtteranceKind, check_finite
from icefall_kd.kinds.codec import Codec, Reader, deflate, inflate, token_type
from icefall_kd.lattice import best_path, next_labels, passed_nodes
from icefall_kd.types import (
    Distribution,
    EncoderOut,
    LatticeTargets,
    NoPath,
    PrunedLattice,
    SparseDistribution,
)


@dataclass(frozen=True)
class LatticeCodec:
    """Turns the nodes of a pruned lattice into bytes, and back.

    Nodes that the path passes with a probability below 1/510 are left out, and the
    others' occupancy is a byte, in steps of 1/255. ``top`` and ``adaptive`` store the
    next label and blank at every node, beside the tokens that they choose, so that
    what is made of those (collapsed forms, sums over paths) is as fine as the
    teacher's. Stores that were made before they did are read as they are.

    Args:
      node_codec: For each node's distribution; None stores {next label, blank, rest}
        alone (collapsed, arXiv:2011.06110), log-probabilities in float16.
      blank_id: The teacher's blank.
      path: Whether the nodes of the best alignment are stored alone, each with an
        occupancy of 1 (arXiv:2110.03334).
    """

    node_codec: Optional[Codec]
    blank_id: int
    path: bool = False

    @staticmethod
    def parse(text: str, blank_id: int) -> "LatticeCodec":
        """Return the codec that a form names.

        Args:
          text: "collapsed" or a :class:`Codec`'s form, with "path:" before it for the
            best alignment alone.
          blank_id: The teacher's blank.

        Raises:
          KDError: another text.
        """
        path, form = text.startswith("path:"), text.removeprefix("path:")
        node_codec = None if form == "collapsed" else Codec.parse(form)
        return LatticeCodec(node_codec, blank_id, path)

    def __str__(self) -> str:
        form = "collapsed" if self.node_codec is None else str(self.node_codec)
        return f"path:{form}" if self.path else form

    def check_temperature(self, temperature: float) -> None:
        """Refuse to read a sparse form at another temperature than its own.

        Args:
          temperature: The loss's.

        Raises:
          KDError: the form was made for another temperature.
        """
        if self.node_codec is not None:
            self.node_codec.check_temperature(temperature, "lattices")
        require(
            self.node_codec is not None or temperature == 1,
            f"the lattices have the form {self}, for temperature 1, and the loss is at "
            f"{temperature:g}: give `temperature` 1, or dump them in the form dense",
        )

    def encode(self, lattice: PrunedLattice, key: str = "") -> bytes:
        """Turn one utterance's lattice into bytes.

        Args:
          lattice: With N = 1.
          key: "sampled" draws the same tokens for the same key.
        """
        if lattice.ranges.size(0) != 1:
            raise ValueError(f"a lattice of {lattice.ranges.size(0)} utterances, not 1")
        u, t = lattice.boundary[0, 2:].tolist()
        ranges = lattice.ranges[0, :t].cpu()  # (T, S)
        labels = lattice.labels[0, :u].cpu()  # (U,)
        logits = lattice.logits[0, :t].float().cpu()  # (T, S, V)
        if self.path:
            occupancy = best_path(lattice, self.blank_id)[0, :t].cpu().float()
        else:
            occupancy = lattice.occupancy[0, :t].cpu()
        mask = passed_nodes(occupancy)
        # A node that is passed has 1 step at least: 0 marks the others.
        steps = (occupancy * 255).round().clamp(min=1).masked_fill(~mask, 0)
        vocab_size = logits.size(-1)
        head = [
            np.array([t, u, ranges.size(1)], np.uint32),
            ranges[:, 0].numpy().astype(np.uint16),
            labels.numpy().astype(token_type(vocab_size)),
            steps.to(torch.uint8).numpy(),
        ]
        data = deflate(head)
        next_label = next_labels(labels, ranges[mask])  # (R,)
        if self.node_codec is None:
            return data + self._collapsed_bytes(logits[mask], next_label)
        blank = torch.full_like(next_label, self.blank_id)
        next_label = torch.where(next_label < 0, blank, next_label)
        always = torch.stack((blank, next_label), -1)
        return data + self.node_codec.encode(logits[mask], key, always)

    def _collapsed_bytes(self, logits: torch.Tensor, label: torch.Tensor) -> bytes:
        """log P(next label) and log P(blank) of nodes, (R, V), in float16."""
        log_probs = logits.log_softmax(-1)
        log_label = log_probs.gather(1, label.clamp(min=0)[:, None])[:, 0]
        log_label = log_label.masked_fill(label < 0, -torch.inf)
        pair = torch.stack((log_label, log_probs[:, self.blank_id]), -1)
        return pair.to(torch.float16).numpy().tobytes()

    def decode(self, data: bytes, vocab_size: int) -> LatticeTargets:
        """Return the lattice that :meth:`encode` turned into bytes.

        Args:
          data: Its bytes.
          vocab_size: V, the number of the teacher's tokens.

        Raises:
          ValueError: bytes that :meth:`encode` did not make.
        """
        head, nodes_data = inflate(data)
        reader = Reader(head)
        t, u, s = reader.take(np.uint32, 3).tolist()
        first = torch.from_numpy(reader.take(np.uint16, t).astype(np.int64))
        labels = reader.take(token_type(vocab_size), u).astype(np.int64)
        steps = reader.take(np.uint8, t * s).reshape(t, s)
        reader.finish()
        labels = torch.from_numpy(labels)
        occupancy = torch.from_numpy(steps.astype(np.float32) / 255)
        ranges = first[:, None] + torch.arange(s)
        mask = occupancy > 0
        if self.node_codec is None:
            next_label = next_labels(labels, ranges[mask])
            nodes = self._collapsed_nodes(nodes_data, next_label)
        else:
            nodes = self.node_codec.decode([nodes_data], [int(mask.sum())], vocab_size)
        return LatticeTargets(ranges, labels, occupancy, nodes)

    def _collapsed_nodes(self, data: bytes, label: torch.Tensor) -> Distribution:
        """The distribution of R nodes over next label, blank, and the rest as tail."""
        rows = len(label)
        reader = Reader(data)
        pair = reader.take(np.float16, 2 * rows).reshape(rows, 2).astype(np.float32)
        reader.finish()
        pair = torch.from_numpy(pair)
        rest = (1 - pair.exp().sum(-1)).clamp(min=1e-6).log()
        mass = torch.cat((pair, rest[:, None]), 1).logsumexp(-1)
        label = label.clamp(min=0)  # after the last label: of probability 0
        blank = torch.full_like(label, self.blank_id)
        indices = torch.stack((label, blank), -1)
        return SparseDistribution(indices, pair - mass[:, None], rest - mass)


class LatticeKind(UtteranceKind):
    """Lattices: a cut's :class:`PrunedLattice` with N = 1, or that it has none."""

    name = "lattice"
    title = "lattices"
    example = "--keep-lattice collapsed"

    def __init__(self, form: str, vocab_size: int, blank_id: int) -> None:
        self.codec = LatticeCodec.parse(form, blank_id)
        super().__init__(str(self.codec), vocab_size, blank_id)

    def take(self, out: EncoderOut) -> List[Union[PrunedLattice, NoPath]]:
        return out.lattices

    def check(self, value, cut_id: str) -> None:
        self.require_value(value, cut_id, "a lattice", self)
        if not isinstance(value, NoPath):
            check_finite(value.logits, f"lattice on cut {cut_id}")

    def frames(self, value: Union[PrunedLattice, NoPath]) -> List[int]:
        if isinstance(value, NoPath):
            return [value.frames]
        return [int(value.boundary[0, 3])]

    def encode(self, value: Union[PrunedLattice, NoPath], cut_id: str) -> Parts:
        if isinstance(value, NoPath):
            return {}
        return {self.name: self.codec.encode(value, cut_id)}

    def decode(self, record: Parts) -> Optional[LatticeTargets]:
        if self.name not in record:
            return None
        return self.codec.decode(record[self.name], self.vocab_size)

"""What kinds that are a distribution over tokens at each frame have in common."""

import math
from typing import ClassVar, Dict, List, Optional, Sequence, Tuple

import torch

from icefall_kd.errors import KDError, require
from icefall_kd.kinds.base import FrameKind, Parts, check_finite
from icefall_kd.kinds.codec import Codec
from icefall_kd.types import Distribution, EncoderOut, SparseDistribution, is_sparse


class DistributionKind(FrameKind):
    """(T, V) logits of a cut, stored by a :class:`Codec`.

    Attributes:
      head: What a message calls the logits' head.
    """

    head: ClassVar[str]

    def __init__(self, form: str, vocab_size: int, blank_id: int) -> None:
        self.codec = Codec.parse(form)
        super().__init__(str(self.codec), vocab_size, blank_id)

    @staticmethod
    def logits(out: EncoderOut) -> Optional[torch.Tensor]:
        """Return the head's logits, (N, T, V), of a model's outputs.

        Args:
          out: The outputs.
        """
        raise NotImplementedError

    def take(self, out: EncoderOut) -> List[torch.Tensor]:
        logits = self.logits(out).cpu()
        return [x[:n] for x, n in zip(logits, out.encoder_out_lens.tolist())]

    def check(self, value, cut_id: str) -> None:
        self.require_value(value, cut_id, f"{self.head} logits", self)
        shape = tuple(value.shape)
        require(
            len(shape) == 2 and shape[0] and shape[1] == self.vocab_size,
            f"the {self.head} logits of cut {cut_id} have shape {shape} and must be "
            f"(frames, {self.vocab_size}) with at least one frame",
        )
        check_finite(_on_cpu(value), f"{self.head} logits on cut {cut_id}")

    def frames(self, value) -> List[int]:
        return [len(value)]

    def encode(self, value, cut_id: str) -> Parts:
        return {self.name: self.codec.encode(_on_cpu(value), cut_id)}

    def decode(self, records: Sequence[Parts], frames: Sequence[int]) -> Distribution:
        parts = [record[self.name] for record in records]
        return self.codec.decode(parts, frames, self.vocab_size)

    @staticmethod
    def map_tokens(values: Distribution, token_ids: torch.Tensor) -> Distribution:
        """Map the tokens; where two become one, their probabilities add up."""
        size = int(token_ids.max()) + 1
        is_reordering = len(token_ids) == size
        if is_sparse(values):
            if not is_reordering:
                raise KDError(
                    f"{len(token_ids)} tokens of the teacher become {size} of the "
                    "student, and sparse targets can only be reordered: store them as "
                    "dense"
                )
            indices = token_ids[values.indices]
            return SparseDistribution(indices, values.log_probs, values.log_tail)
        if is_reordering:
            mapped = torch.empty_like(values)
            mapped[..., token_ids] = values
            return mapped
        sums = values.new_zeros((*values.shape[:-1], size))
        index = token_ids.expand(values.shape)
        return sums.scatter_add_(-1, index, values.softmax(-1)).log()

    def describe(self, rows: Distribution) -> Dict[str, Tuple[float, str]]:
        """Sum up the figures that a report has beside the targets' size.

        Args:
          rows: (T, V) log-probabilities, or sparse.

        Returns:
          By name: a sum over the T frames, and the format of its mean.
        """
        if is_sparse(rows):
            # The tail is one more class. -1e4 in place of -inf: 0 log 0 is 0.
            log_probs = torch.cat((rows.log_probs, rows.log_tail[:, None]), 1)
            stored = float((rows.log_probs > -math.inf).sum())
            tail = float(rows.log_tail.exp().sum())
            best = rows.indices.gather(1, rows.log_probs.argmax(1, keepdim=True))
        else:
            log_probs, stored, tail = rows, float(rows.numel()), 0.0
            best = rows.argmax(1)
        entropy = -float((log_probs.exp() * log_probs.clamp(min=-1e4)).sum())
        blanks = 100.0 * int((best == self.blank_id).sum())
        return {
            f"tokens stored in a frame, {self.name}": (stored, "{:.2f}"),
            f"mean tail, {self.name}": (tail, "{:.2e}"),
            f"entropy, {self.name} (nats a frame)": (entropy, "{:.4f}"),
            f"frames whose best is blank, {self.name}": (blanks, "{:.1f} %"),
        }


def _on_cpu(logits) -> torch.Tensor:
    return torch.as_tensor(logits).detach().float().cpu()

"""The parts of a model that become graphs of the plain form, and the whole model."""

import copy
from typing import List, Optional, Sequence

import torch
from torch import Tensor, nn

from icefall_kd.export.plain_modules import Valid, plain_copy
from icefall_kd.zipformer import MIN_FRAMES, stack_frames

TRANSDUCER, CTC = "transducer", "ctc"
HEADS = (TRANSDUCER, CTC)


class PlainEncoder(nn.Module):
    """The encoder and what follows it, for one length.

    Args:
      model: A recipe's model.
      num_frames: The length, in feature frames.
      heads: Of :data:`HEADS`, those that follow.
      takes_mean: Whether the mean of each utterance is taken off its features here.
    """

    def __init__(
        self,
        model: nn.Module,
        num_frames: int,
        heads: Sequence[str],
        takes_mean: bool = False,
    ) -> None:
        super().__init__()
        self.valid, self.takes_mean = Valid(), takes_mean
        self.stack_frames = stack_frames(num_frames)
        plain = plain_copy(model, self.stack_frames, self.valid)
        self.heads = Heads(plain, heads)
        self.encoder_embed, self.encoder = plain.encoder_embed, plain.encoder
        self.register_buffer("lengths", torch.tensor([num_frames]))

    def forward(self, features: Tensor, mask: Optional[Tensor] = None) -> List[Tensor]:
        """Encode an utterance.

        Args:
          features: (1, num_frames, F).
          mask: (1, num_frames), 1 for feature frames of the utterance and 0 behind it;
            None where it has the whole length.

        Returns:
          (1, T', C) of each head.
        """
        if self.takes_mean:
            features = features - self._mean(features, mask)
        if mask is not None:  # a stack frame needs the 9 feature frames from 2 s on
            mask = mask[:, MIN_FRAMES - 1 :: 2][:, : self.stack_frames]
        self.valid.set(mask)
        x, lengths = self.encoder_embed(features, self.lengths)
        x, _ = self.encoder(x.permute(1, 0, 2), lengths)
        return self.heads(x.permute(1, 0, 2))

    @staticmethod
    def _mean(features: Tensor, mask: Optional[Tensor]) -> Tensor:
        """(1, 1, F), over the frames of the utterance."""
        if mask is None:
            return features.mean(dim=1, keepdim=True)
        total = torch.matmul(mask.unsqueeze(1), features)
        return total / mask.sum(dim=1, keepdim=True).unsqueeze(-1)


class Heads(nn.Module):
    """What the searches take of encoder output.

    Args:
      model: A recipe's model.
      heads: Of :data:`HEADS`, those that the model has.
    """

    def __init__(self, model: nn.Module, heads: Sequence[str]) -> None:
        super().__init__()
        self.names, parts = [], []
        if TRANSDUCER in heads:
            self.names.append("encoder_out")
            parts.append(model.joiner.encoder_proj)
        if CTC in heads:
            self.names.append("ctc_log_probs")
            parts.append(model.ctc_output)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> List[Tensor]:
        """Encoder output (1, T, C) to (1, T, C') of each head."""
        return [part(x) for part in self.parts]


class PlainDecoder(nn.Module):
    """A stateless decoder behind its embedding.

    Args:
      model: A recipe's model with a transducer head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.context_size = int(model.decoder.context_size)
        self.conv, self.decoder_proj = model.decoder.conv, model.joiner.decoder_proj

    def forward(self, embeddings: Tensor) -> Tensor:
        """(1, context size, C), rows of the table, to (1, joiner's width)."""
        if self.context_size == 1:
            return self.decoder_proj(embeddings.reshape(len(embeddings), -1))
        x = self.conv(embeddings.permute(0, 2, 1)).relu()
        return self.decoder_proj(x.reshape(len(embeddings), -1))


class PlainJoiner(nn.Module):
    """The joiner of projected outputs.

    Args:
      model: A recipe's model with a transducer head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.output_linear = model.joiner.output_linear

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """Two of (1, joiner's width) to (1, V)."""
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class WholeModel:
    """The recipe's own model, as it computes an utterance alone.

    Args:
      model: A recipe's model; it stays as it is.
      heads: Of :data:`HEADS`.
      takes_mean: As of :class:`PlainEncoder`.
      dtype: What it computes in.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[str],
        takes_mean: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        model = copy.deepcopy(model).cpu().to(dtype).eval().requires_grad_(False)
        if getattr(model.encoder, "causal", False):
            # The whole utterance is one chunk, as in an offline export.
            model.encoder.chunk_size = model.encoder.left_context_frames = (-1,)
        self.model, self.names, self.takes_mean = model, tuple(heads), takes_mean
        self.heads = Heads(model, heads)

    def double(self) -> "WholeModel":
        """Return the same in float64; this one stays as it is."""
        return WholeModel(self.model, self.names, self.takes_mean, torch.float64)

    def encode(self, features: Tensor) -> List[Tensor]:
        """Return (1, T', C) of each head for ``features`` (1, T, F)."""
        if self.takes_mean:
            features = features - features.mean(dim=1, keepdim=True)
        lengths = torch.tensor([features.size(1)])
        x, lengths = self.model.encoder_embed(features, lengths)
        x, _ = self.model.encoder(x.permute(1, 0, 2), lengths)
        return self.heads(x.permute(1, 0, 2))

    def decode(self, contexts: Tensor) -> Tensor:
        """Return (N, joiner's width) of ``contexts`` (N, context size)."""
        out = self.model.decoder(contexts, need_pad=False)
        return self.model.joiner.decoder_proj(out).squeeze(1)

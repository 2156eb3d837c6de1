"""A copy of a recipe's model in the parts that are exported.

The recipes' modules have parts that a graph can't hold, or holds wrongly. A copy of the
model has others in their places, with the same parameters and the same output; the
model itself and its classes stay as they are.
"""

import copy
import math
from typing import Any, Callable, Dict, Tuple

import torch
from torch import Tensor, nn

from icefall_kd.errors import require
from icefall_kd.model_state import as_if_alone
from icefall_kd.zipformer import stack_frames

SILENCE = math.log(1e-10)  # features behind the end of an utterance in a batch

# Modules that do nothing outside training, by the names of their classes in icefall and
# in the package zipformer.
_OF_TRAINING = ("Balancer", "Dropout2", "Dropout3", "ScaleGrad", "Whiten")


class Downsample(nn.Module):
    """SimpleDownsample for any number of frames.

    When it is traced, the recipes' own keeps out the frames that lengthen the input to
    a multiple of the factor, for a causal model.

    Args:
      module: The recipe's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.bias, self.downsample = module.bias, int(module.downsample)

    def forward(self, src: Tensor) -> Tensor:
        """Downsample (T, N, C) to (T / factor, N, C), rounded up."""
        factor = self.downsample
        num_frames = (src.size(0) + factor - 1) // factor
        # As many copies of the last frame as are ever needed; the rest is cut off.
        last = src[-1:].expand(factor - 1, src.size(1), src.size(2))
        src = torch.cat((src, last), 0)[: num_frames * factor]
        src = src.reshape(num_frames, factor, src.size(1), src.size(2))
        weights = self.bias.softmax(dim=0).unsqueeze(-1).unsqueeze(-1)
        return (src * weights).sum(dim=1)


class PositionalEncoding(nn.Module):
    """CompactRelPositionalEncoding, computed for each length.

    The recipes' own is a table of 1000 stack frames, 20 s, that becomes a constant of
    a traced graph.

    Args:
      module: The recipe's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.embed_dim = int(module.embed_dim)
        self.width = self.embed_dim**0.5  # offsets that are told apart best
        self.scale = float(module.length_factor) * self.embed_dim / (2.0 * math.pi)
        self.log_width = math.log(self.width)

    def forward(self, x: Tensor, left_context_len: int = 0) -> Tensor:
        """The encodings of (T, N, C) after a left context: (1, left + 2 T - 1, C')."""
        num_frames = x.size(0)
        first = 1 - num_frames - left_context_len
        offsets = torch.arange(first, num_frames, device=x.device)
        offsets = offsets.to(torch.float32).unsqueeze(1)
        freqs = 1 + torch.arange(self.embed_dim // 2, device=x.device)
        logs = (offsets.abs() + self.width).log() - self.log_width
        compressed = self.width * offsets.sign() * logs
        angles = (compressed / self.scale).atan() * freqs
        rows = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)
        return torch.cat((rows[:, :-1], torch.ones_like(offsets)), 1).unsqueeze(0)


class CausalConvolution(nn.Module):
    """ChunkCausalDepthwiseConv1d of a whole utterance as one chunk, however short.

    Exporters of icefall have its edges in a form that takes no utterance shorter than
    the kernel, which at a downsampling of 8 is more than two seconds.

    Args:
      module: The recipe's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.causal_conv, self.chunkwise_conv = (
            module.causal_conv,
            module.chunkwise_conv,
        )
        self.chunkwise_conv_scale = module.chunkwise_conv_scale
        self.left_pad = int(module.kernel_size) // 2

    def forward(self, x: Tensor, chunk_size: int = -1) -> Tensor:
        """Convolve (N, C, T)."""
        causal = self.causal_conv(nn.functional.pad(x, (self.left_pad, 0)))
        return causal + self.chunkwise_conv(x) * self._scale(x)

    def streaming_forward(self, x: Tensor, cache: Tensor) -> Tuple[Tensor, Tensor]:
        """Convolve a chunk (N, C, T) behind ``cache`` (N, C, left), and renew that."""
        before = torch.cat((cache, x), dim=2)
        out = self.causal_conv(before) + self.chunkwise_conv(x) * self._scale(x)
        return out, before[..., -self.left_pad :]

    def _scale(self, x: Tensor) -> Tensor:
        """(C, T): what the edges of the chunk are multiplied by."""
        left, right = self.chunkwise_conv_scale[0], self.chunkwise_conv_scale[1]
        num_frames = x.size(2)
        ones = torch.ones_like(x[0])
        left = torch.cat((left, ones - ones), 1)[:, :num_frames]
        right = torch.cat((ones - ones, right), 1)[:, right.size(1) :]
        return ones + left + right


_REPLACED: Dict[str, Callable] = {
    "SimpleDownsample": Downsample,
    "CompactRelPositionalEncoding": PositionalEncoding,
    "ChunkCausalDepthwiseConv1d": CausalConvolution,
}


def exportable(model: nn.Module) -> nn.Module:
    """Return a copy of a model, on the CPU, whose modules a graph can hold.

    Args:
      model: A recipe's model.

    Raises:
      KDError: The model has not the parts of a Zipformer.
    """
    for name in ("encoder_embed", "encoder"):
        require(
            isinstance(getattr(model, name, None), nn.Module),
            f"the model {type(model).__name__} has no {name}, and the Zipformer's are "
            "what can be exported: use its recipe's own export script",
        )
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            kind = type(child).__name__
            if kind in _OF_TRAINING:
                setattr(module, child_name, nn.Identity())
            elif kind in _REPLACED:
                setattr(module, child_name, _REPLACED[kind](child).eval())
    return model


def less_mean(x: Tensor, x_lens: Tensor, silence: float = SILENCE) -> Tensor:
    """Take the mean over the valid frames of each utterance off its features.

    Args:
      x: (N, T, F), features.
      x_lens: (N,), valid feature frames.
      silence: The value of frames behind the end, which is a recipe's.

    Returns:
      (N, T, F).
    """
    frames = torch.arange(x.size(1), device=x.device)
    valid = (frames < x_lens.unsqueeze(1)).unsqueeze(-1)
    # Weighted before they are summed: the sum of a minute is too large for fp16.
    weights = valid / x_lens.to(x.dtype).unsqueeze(-1).unsqueeze(-1)
    mean = (x * weights).sum(dim=1, keepdim=True)
    return (x - mean).masked_fill(~valid, silence)


class OfflineEncoder(nn.Module):
    """Features to what a head takes of the encoder, for whole utterances.

    Args:
      model: Of :func:`exportable`.
      head: What follows the encoder: the joiner's ``encoder_proj``, the ``ctc_output``,
        or nn.Identity().
      takes_mean: Whether the mean of each utterance is taken off its features here.
    """

    def __init__(self, model: nn.Module, head: nn.Module, takes_mean: bool) -> None:
        super().__init__()
        self.encoder_embed, self.encoder = model.encoder_embed, model.encoder
        self.head, self.takes_mean = head, takes_mean

    def forward(
        self, features: Tensor, feature_lengths: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Encode (N, T, F) of lengths (N,): (N, T', C) and (N,), frames of 25 Hz."""
        x, x_lens = features, feature_lengths
        if self.takes_mean:
            x = less_mean(x, x_lens)
        x, x_lens = self.encoder_embed(x, x_lens)
        frames = torch.arange(x.size(1), device=x.device)
        padding = frames.unsqueeze(0) >= x_lens.unsqueeze(1)
        x, x_lens = self.encoder(x.permute(1, 0, 2), x_lens, padding)
        return self.head(x.permute(1, 0, 2)), x_lens


class EncoderAlone(nn.Module):
    """An encoder of which no utterance of a batch changes because of the others.

    It is for tracing: hooks can't be scripted.

    Args:
      encoder: The encoder.
    """

    def __init__(self, encoder: OfflineEncoder) -> None:
        super().__init__()
        self.of_batch = encoder

    def forward(self, x: Tensor, x_lens: Tensor) -> Tuple[Tensor, Tensor]:
        """As :class:`OfflineEncoder`."""
        with as_if_alone(self.of_batch, stack_frames(x_lens)):
            return self.of_batch(x, x_lens)


class ContextDecoder(nn.Module):
    """Contexts to what the joiner takes of the decoder.

    Args:
      model: Of :func:`exportable`, with a transducer head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder, self.decoder_proj = model.decoder, model.joiner.decoder_proj

    def forward(self, y: Tensor) -> Tensor:
        """(N, context size), token ids, -1 before the first, to (N, joiner's width)."""
        return self.decoder_proj(self.decoder(y, need_pad=False).squeeze(1))


class ProjectedJoiner(nn.Module):
    """Projected outputs of encoder and decoder to logits.

    Args:
      model: Of :func:`exportable`, with a transducer head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.output_linear = model.joiner.output_linear

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """Two of (N, joiner's width) to (N, V)."""
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class ScriptModel(nn.Module):
    """What icefall's ``jit_pretrained.py`` finds in a file of TorchScript.

    Args:
      model: Of :func:`exportable`.
      encoder: Its encoder, which takes features.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        for name in ("decoder", "joiner", "ctc_output"):
            part: Any = getattr(model, name, None)
            if part is not None:
                setattr(self, name, part)

"""A Zipformer's modules for one length: constants in place of what depends on it.

The recipes' modules look up positional encodings, shift them by a gather, and fill
masks under a condition. Here the positions are buffers, the shift is a slice of a
reshaped matrix, and a mask is a factor and an addend. An utterance shorter than the
length is padded; where its end is known (``Valid``), each module computes what it
computes for the utterance alone.
"""

import copy
from typing import Callable, Dict, Optional

import torch
from torch import Tensor, nn

from icefall_kd.errors import KDError, require

MASKED = 1000.0  # what the recipes' attention takes as minus infinity


class Valid:
    """Which stack frames belong to the utterance, while a model runs.

    Without a mask all of them do, and no module has operators for it.
    """

    def __init__(self) -> None:
        self._mask: Optional[Tensor] = None

    def set(self, mask: Optional[Tensor]) -> None:
        """Take the mask of what comes next.

        Args:
          mask: (1, S), 1 for stack frames of the utterance and 0 behind it, or None.
        """
        self._mask = mask

    def every(self, factor: int) -> Optional[Tensor]:
        """Return the mask of a stack: (1, S / factor), rounded up, or None.

        Args:
          factor: Stack frames in one of its frames.
        """
        return self._mask if self._mask is None else self._mask[:, ::factor]

    def last(self, factor: int) -> Optional[Tensor]:
        """Return (1, S / factor), 1 at the last valid frame and 0 elsewhere, or None.

        Args:
          factor: Stack frames in one of the stack's frames.
        """
        mask = self.every(factor)
        if mask is None:
            return None
        behind = nn.functional.pad(mask[:, 1:], (0, 1))
        return mask - behind


class Attention(nn.Module):
    """RelPositionMultiheadAttentionWeights over a fixed number of frames.

    Args:
      module: The recipe's.
      encoding: The stack's CompactRelPositionalEncoding.
      num_frames: Frames of the stack.
      factor: Stack frames in one of them.
      valid: Which stack frames belong to the utterance.
    """

    def __init__(
        self,
        module: nn.Module,
        encoding: nn.Module,
        num_frames: int,
        factor: int,
        valid: Valid,
    ) -> None:
        super().__init__()
        self.in_proj = module.in_proj
        self.heads = int(module.num_heads)
        self.query_dim = int(module.query_head_dim)
        self.pos_dim = int(module.pos_head_dim)
        self.num_frames, self.factor, self.valid = num_frames, factor, valid
        positions = encoding(module.in_proj.weight.new_zeros(num_frames, 1, 1))
        positions = module.linear_pos(positions)[0]
        positions = positions.reshape(-1, self.heads, self.pos_dim)
        self.register_buffer("positions", positions.permute(1, 2, 0).unsqueeze(1))

    def forward(
        self,
        x: Tensor,
        pos_emb: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
    ) -> Tensor:
        """Return (heads, 1, T, T) of ``x`` (T, 1, C); the other arguments are None."""
        width = self.heads * self.query_dim
        x = self.in_proj(x)
        query = self._by_head(x[..., :width], self.query_dim)
        key = self._by_head(x[..., width : 2 * width], self.query_dim)
        position = self._by_head(x[..., 2 * width :], self.pos_dim)
        scores = torch.matmul(query, key.transpose(2, 3))
        scores = scores + self._shifted(torch.matmul(position, self.positions))
        mask = self.valid.every(self.factor)
        if mask is not None:
            scores = scores * mask + (mask - 1.0) * MASKED
        return scores.softmax(dim=-1)

    def _by_head(self, x: Tensor, width: int) -> Tensor:
        """(T, 1, heads * width) to (heads, 1, T, width)."""
        x = x.reshape(self.num_frames, 1, self.heads, width)
        return x.permute(2, 1, 0, 3)

    def _shifted(self, scores: Tensor) -> Tensor:
        """Of (heads, 1, T, 2 T - 1), by offset, those of each pair: (heads, 1, T, T).

        Row i begins T - 1 - i further right. In rows that are one shorter each begins
        at the same place.
        """
        size = self.num_frames
        if size == 1:
            return scores
        rows, width = size, 2 * size - 2
        flat = scores.reshape(self.heads, 1, rows * (width + 1))
        flat = flat[..., size - 1 : size - 1 + rows * width]
        return flat.reshape(self.heads, 1, rows, width)[..., :size]


class Convolution(nn.Module):
    """A depthwise convolution, in one or two dimensions, blind behind the end.

    Args:
      conv: nn.Conv1d or nn.Conv2d.
      factor: Stack frames in one frame.
      valid: Which stack frames belong to the utterance.
    """

    def __init__(self, conv: nn.Module, factor: int, valid: Valid) -> None:
        super().__init__()
        self.conv, self.factor, self.valid = conv, factor, valid

    def forward(self, x: Tensor, chunk_size: int = -1) -> Tensor:
        """Convolve (1, C, T) or (1, C, T, F)."""
        mask = self.valid.every(self.factor)
        if mask is not None:
            x = x * (mask if x.dim() == 3 else mask.unsqueeze(1).unsqueeze(-1))
        return self.conv(x)


class CausalConvolution(nn.Module):
    """ChunkCausalDepthwiseConv1d of a whole utterance as one chunk.

    Args:
      module: The recipe's.
      num_frames: Frames of the stack.
      factor: Stack frames in one of them.
      valid: Which stack frames belong to the utterance.
    """

    def __init__(
        self, module: nn.Module, num_frames: int, factor: int, valid: Valid
    ) -> None:
        super().__init__()
        self.causal_conv = module.causal_conv
        self.chunkwise_conv = module.chunkwise_conv
        self.kernel, self.factor, self.valid = int(module.kernel_size), factor, valid
        self.num_frames = num_frames
        left, right = module.chunkwise_conv_scale
        left = nn.functional.pad(left, (0, num_frames))[:, :num_frames]
        self.register_buffer("left", 1.0 + left)
        end = nn.functional.pad(right, (num_frames, 0))[:, -num_frames:]
        self.register_buffer("edges", self.left + end)  # if all frames are valid
        # Frame t is weighed by the kernel at its distance to the last valid frame. As a
        # convolution of the one-hot row of that frame:
        self.register_buffer("right", right.flip(1).unsqueeze(1))

    def forward(self, x: Tensor, chunk_size: int = -1) -> Tensor:
        """Convolve (1, C, T)."""
        edges = self.edges
        mask, last = self.valid.every(self.factor), self.valid.last(self.factor)
        if mask is not None:
            x = x * mask
            last = nn.functional.pad(last.unsqueeze(1), (0, self.kernel - 1))
            edges = self.left + nn.functional.conv1d(last, self.right)
        before = nn.functional.pad(x, (self.kernel // 2, 0))
        return self.causal_conv(before) + self.chunkwise_conv(x) * edges


class Downsample(nn.Module):
    """SimpleDownsample of a fixed number of frames.

    Its last frame is completed by copies of the last valid one.

    Args:
      module: The recipe's.
      num_frames: Stack frames.
      valid: Which of them belong to the utterance.
    """

    def __init__(self, module: nn.Module, num_frames: int, valid: Valid) -> None:
        super().__init__()
        self.factor, self.num_frames = int(module.downsample), num_frames
        self.valid = valid
        weights = module.bias.softmax(dim=0)
        self.register_buffer("weights", weights.unsqueeze(-1).unsqueeze(-1))

    def forward(self, src: Tensor) -> Tensor:
        """Downsample (S, 1, C)."""
        mask, last = self.valid.every(1), self.valid.last(1)
        if mask is not None:
            column = mask.transpose(0, 1).unsqueeze(-1)  # (S, 1, 1)
            of_last = torch.matmul(last, src.reshape(self.num_frames, -1))
            of_last = of_last.unsqueeze(0)
            src = src * column + of_last * (1.0 - column)
        size = -(-self.num_frames // self.factor)
        copies = size * self.factor - self.num_frames
        src = torch.cat([src] + [src[self.num_frames - 1 :]] * copies, dim=0)
        src = src.reshape(size, self.factor, 1, -1)
        return (src * self.weights).sum(dim=1)


class Upsample(nn.Module):
    """SimpleUpsample of a fixed number of frames.

    Args:
      module: The recipe's.
      num_frames: Frames that go in.
    """

    def __init__(self, module: nn.Module, num_frames: int) -> None:
        super().__init__()
        self.factor, self.num_frames = int(module.upsample), num_frames

    def forward(self, src: Tensor) -> Tensor:
        """Repeat each of (T, 1, C)."""
        src = torch.cat([src.unsqueeze(1)] * self.factor, dim=1)
        return src.reshape(self.num_frames * self.factor, 1, -1)


class Norm(nn.Module):
    """BiasNorm over the last dimension, its scale a constant.

    Args:
      module: The recipe's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.register_buffer("bias", module.bias.detach().clone())
        self.register_buffer("scale", module.log_scale.exp())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C)."""
        square = (x - self.bias).square().mean(dim=-1, keepdim=True)
        return x * (self.scale / square.sqrt())


class Swoosh(nn.Module):
    """SwooshL or SwooshR: log(1 + exp(x - offset)) - 0.08 x - shift.

    Args:
      name: The name of the recipe's class.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.offset, self.shift = (
            (4.0, 0.035) if name == "SwooshL" else (1.0, 0.313261687)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what ``x`` becomes."""
        return nn.functional.softplus(x - self.offset) - 0.08 * x - self.shift


class SwooshLinear(nn.Module):
    """ActivationDropoutAndLinear outside training.

    Args:
      module: The recipe's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.swoosh = Swoosh(module.activation)
        self.weight, self.bias = module.weight, module.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return what (..., C) becomes."""
        return nn.functional.linear(self.swoosh(x), self.weight, self.bias)


class NoPositions(nn.Module):
    """In place of CompactRelPositionalEncoding: each layer has its own constants."""

    def forward(self, x: Tensor, left_context_len: int = 0) -> None:
        """Return None."""
        return None


_OF_TRAINING = ("Balancer", "Dropout2", "Dropout3", "Identity", "ScaleGrad", "Whiten")
_ANYWHERE: Dict[str, Callable[[nn.Module], nn.Module]] = {
    "ActivationDropoutAndLinear": SwooshLinear,
    "BiasNorm": Norm,
    "SwooshL": lambda module: Swoosh("SwooshL"),
    "SwooshR": lambda module: Swoosh("SwooshR"),
}


def plain_copy(model: nn.Module, stack_frames: int, valid: Valid) -> nn.Module:
    """Return a copy of a model for one length; the model itself stays as it is.

    Args:
      model: A recipe's model with a Zipformer.
      stack_frames: The length, in stack frames.
      valid: It will say which of them belong to the utterance.

    Raises:
      KDError: The model has not the modules of a Zipformer.
    """
    require_zipformer(model)
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    encoder = model.encoder
    if getattr(encoder, "causal", False):  # the whole utterance is one chunk
        encoder.chunk_size, encoder.left_context_frames = (-1,), (-1,)
    front = model.encoder_embed.convnext
    front.depthwise_conv = Convolution(front.depthwise_conv, 1, valid)
    for stack, factor in zip(encoder.encoders, encoder.downsampling_factor):
        num_frames = -(-stack_frames // factor)
        if factor != 1:
            stack.downsample = Downsample(stack.downsample, stack_frames, valid)
            stack.upsample = Upsample(stack.upsample, num_frames)
            stack = stack.encoder
        _fix_stack(stack, num_frames, factor, valid)
    at_the_end = encoder.downsample_output
    encoder.downsample_output = Downsample(at_the_end, stack_frames, valid)
    fix_parts(model)
    return model


def require_zipformer(model: nn.Module) -> None:
    """Refuse a model whose encoder can't be taken apart.

    Args:
      model: A recipe's model.

    Raises:
      KDError: It has not the modules of a Zipformer.
    """
    for path in (
        "encoder_embed.convnext.depthwise_conv",
        "encoder.downsampling_factor",
        "encoder.encoders",
        "encoder.downsample_output",
    ):
        part = model
        for name in path.split("."):
            part = getattr(part, name, None)
        require(
            part is not None,
            f"the model {type(model).__name__} has no {path}, and the plain form is "
            "made of a Zipformer's: export it in another form",
        )


def _fix_stack(stack: nn.Module, num_frames: int, factor: int, valid: Valid) -> None:
    """Replace what depends on the length in the layers of a stack."""
    for layer in stack.layers:
        layer.self_attn_weights = Attention(
            layer.self_attn_weights, stack.encoder_pos, num_frames, factor, valid
        )
        for module in (layer.conv_module1, layer.conv_module2):
            conv = module.depthwise_conv
            if isinstance(conv, nn.Conv1d):
                module.depthwise_conv = Convolution(conv, factor, valid)
            elif hasattr(conv, "chunkwise_conv_scale"):
                module.depthwise_conv = CausalConvolution(
                    conv, num_frames, factor, valid
                )
            else:
                raise KDError(
                    f"a layer convolves by {type(conv).__name__}, which the plain form "
                    "does not know: export it in another form"
                )
    stack.encoder_pos = NoPositions()


def fix_parts(model: nn.Module) -> None:
    """Replace modules that are the same for every length.

    Args:
      model: A copy of a recipe's model.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            if kind in _ANYWHERE:
                setattr(module, name, _ANYWHERE[kind](child))
            elif kind in _OF_TRAINING:
                setattr(module, name, nn.Identity())

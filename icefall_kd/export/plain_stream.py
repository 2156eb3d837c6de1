"""The plain form of a causal model: one chunk, its states as inputs and outputs.

A stream's shapes are all numbers anyway. What is left to take out are the gather of the
relative shift, and masks that are computed of a counter: here the mask of the left
context is an input.
"""

import copy
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from icefall_kd.errors import require
from icefall_kd.export.graph import CausalConvolution
from icefall_kd.export.plain_model import Heads
from icefall_kd.export.plain_modules import (
    MASKED,
    Attention,
    Downsample,
    NoPositions,
    Upsample,
    Valid,
    fix_parts,
    require_zipformer,
)
from icefall_kd.export.streaming import ChunkEncoder, state_names


class ChunkAttention(Attention):
    """RelPositionMultiheadAttentionWeights of a chunk and its left context.

    Args:
      module: The recipe's.
      encoding: The stack's CompactRelPositionalEncoding.
      num_frames: Frames of the chunk in the stack.
      left: Those of its left context.
      factor: Stack frames in one of them.
      valid: Which stack frames of left context and chunk belong to the utterance.
    """

    def __init__(
        self,
        module: nn.Module,
        encoding: nn.Module,
        num_frames: int,
        left: int,
        factor: int,
        valid: Valid,
    ) -> None:
        super().__init__(module, encoding, num_frames, factor, valid)
        self.left = left
        positions = encoding(module.in_proj.weight.new_zeros(num_frames, 1, 1), left)
        positions = module.linear_pos(positions)[0]
        positions = positions.reshape(-1, self.heads, self.pos_dim)
        self.positions = positions.permute(1, 2, 0).unsqueeze(1)

    def streaming_forward(
        self,
        x: Tensor,
        pos_emb: Optional[Tensor],
        cached_key: Tensor,
        left_context_len: int,
        key_padding_mask: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tensor]:
        """Return (heads, 1, T, left + T) of ``x`` (T, 1, C), and the renewed keys.

        ``cached_key`` is (left, 1, C'); the other arguments are those of the recipe's
        method, and are not looked at.
        """
        width = self.heads * self.query_dim
        x = self.in_proj(x)
        query = self._by_head(x[..., :width], self.query_dim)
        keys = torch.cat((cached_key, x[..., width : 2 * width]), dim=0)
        key = keys.reshape(self.left + self.num_frames, 1, self.heads, self.query_dim)
        position = self._by_head(x[..., 2 * width :], self.pos_dim)
        scores = torch.matmul(query, key.permute(2, 1, 3, 0))
        scores = scores + self._shifted(torch.matmul(position, self.positions))
        mask = self.valid.every(self.factor)
        scores = scores * mask + (mask - 1.0) * MASKED
        return scores.softmax(dim=-1), keys[self.num_frames :]

    def _shifted(self, scores: Tensor) -> Tensor:
        """Of (heads, 1, T, left + 2 T - 1), by offset: (heads, 1, T, left + T)."""
        rows, width = self.num_frames, self.left + 2 * self.num_frames - 2
        if rows == 1:
            return scores
        flat = scores.reshape(self.heads, 1, rows * (width + 1))
        flat = flat[..., rows - 1 : rows - 1 + rows * width]
        flat = flat.reshape(self.heads, 1, rows, width)
        return flat[..., : self.left + rows]


def plain_chunks_of(
    model: nn.Module, chunk_size: int, left_context: int, valid: Valid
) -> nn.Module:
    """Return a copy of a causal model for one chunk; the model itself stays as it is.

    Args:
      model: A recipe's causal model.
      chunk_size: Stack frames of a chunk.
      left_context: Those before it that it hears.
      valid: It will say which of both belong to the utterance.

    Raises:
      KDError: The model has not the modules of a causal Zipformer, or sizes that are
        not whole frames of each stack.
    """
    require_zipformer(model)
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    encoder, all_valid = model.encoder, Valid()
    require(
        getattr(encoder, "causal", False),
        f"the encoder {type(encoder).__name__} is not causal, so it can't be streamed: "
        "export it for whole utterances",
    )
    encoder.chunk_size, encoder.left_context_frames = (chunk_size,), (left_context,)
    for stack, factor in zip(encoder.encoders, encoder.downsampling_factor):
        require(
            chunk_size % factor == left_context % factor == 0,
            f"`chunk_size` {chunk_size} and `left_context_frames` {left_context} are "
            f"not whole frames of a stack that downsamples by {factor}: give multiples "
            "of that",
        )
        num_frames, left = chunk_size // factor, left_context // factor
        if factor != 1:
            stack.downsample = Downsample(stack.downsample, chunk_size, all_valid)
            stack.upsample = Upsample(stack.upsample, num_frames)
            stack = stack.encoder
        for layer in stack.layers:
            sizes = num_frames, left, factor, valid
            attention = layer.self_attn_weights
            layer.self_attn_weights = ChunkAttention(
                attention, stack.encoder_pos, *sizes
            )
            for module in (layer.conv_module1, layer.conv_module2):
                module.depthwise_conv = CausalConvolution(module.depthwise_conv)
        stack.encoder_pos = NoPositions()
    encoder.downsample_output = Downsample(
        encoder.downsample_output, chunk_size, all_valid
    )
    fix_parts(model)
    return model


class PlainChunkEncoder(nn.Module):
    """The encoder of one chunk and what follows it.

    Args:
      model: A recipe's causal model.
      chunk_size: Stack frames of a chunk.
      left_context: Those before it that it hears.
      heads: Of :data:`icefall_kd.export.plain_model.HEADS`, those that follow.
    """

    def __init__(
        self, model: nn.Module, chunk_size: int, left_context: int, heads: Sequence[str]
    ) -> None:
        super().__init__()
        self.valid = Valid()
        plain = plain_chunks_of(model, chunk_size, left_context, self.valid)
        self.heads = Heads(plain, heads)
        self.encoder_embed, self.encoder = plain.encoder_embed, plain.encoder
        self.sizes = ChunkEncoder(plain, self.heads)
        self.num_frames = self.sizes.num_frames
        self.register_buffer("lengths", torch.tensor([self.num_frames]))
        self.register_buffer("ones", torch.ones(1, chunk_size))
        # The recipe's own mask of padding, by which nothing is.
        whole = torch.zeros(1, left_context + chunk_size, dtype=torch.bool)
        self.register_buffer("no_padding", whole)

    def states(self) -> Dict[str, Tensor]:
        """Return the states before the first chunk, by the names of inputs."""
        *states, _ = self.sizes.initial_states()  # without the counter
        return dict(zip(state_names(len(states) - 1)[0], states))

    def forward(self, features: Tensor, mask: Tensor, *states: Tensor) -> List[Tensor]:
        """Encode a chunk.

        Args:
          features: (1, num_frames, F).
          mask: (1, left context), 1 for stack frames that have been heard and 0 before
            the utterance.
          states: Those of the last chunk.

        Returns:
          (1, T', C) of each head, and the states of the next chunk.
        """
        self.valid.set(torch.cat((mask, self.ones), dim=1))
        x, lengths, front = self.encoder_embed.streaming_forward(
            features, self.lengths, states[-1]
        )
        x, _, layers = self.encoder.streaming_forward(
            x.permute(1, 0, 2), lengths, list(states[:-1]), self.no_padding
        )
        return [*self.heads(x.permute(1, 0, 2)), *layers, front]


def chunks_of_recipe(
    model: nn.Module, chunk_size: int, left_context: int, heads: Sequence[str]
) -> ChunkEncoder:
    """Return the recipe's own encoder of a chunk, of a copy of the model.

    Args:
      model: A recipe's causal model; it stays as it is.
      chunk_size: Stack frames of a chunk.
      left_context: Those before it that it hears.
      heads: As of :class:`PlainChunkEncoder`.
    """
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    model.encoder.chunk_size = (chunk_size,)
    model.encoder.left_context_frames = (left_context,)
    return ChunkEncoder(model, Heads(model, heads))

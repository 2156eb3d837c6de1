"""A model that computes the same with channels of like size, so that int8 keeps them.

An int8 export rounds a weight by one scale and an activation by one range, so one large
channel makes the steps of all others as large. Where a channel is multiplied by a
factor, and what takes it in is divided by it, the model's output stays as it is. With
r_i the largest weight that makes channel i and c_i the largest that takes it in, the
factor s_i = sqrt(c_i / r_i) gives both the same size, sqrt(r_i c_i). This is
cross-layer equalization (Nagel et al., arXiv:1906.04721, equation 11), for the pairs of
Zipformer between which there is nothing but sums, products and averages over time:

* a value of an attention and the output projection behind it;
* both factors of a nonlinear attention's values and the output projection;
* a query and its key, a position's query and its key;
* what a convolution module makes for its depthwise convolution. That is not rounded, so
  these channels all get the same size, their median's.
"""

from typing import Sequence

import torch
from torch import Tensor, nn


def _largest(weight: Tensor) -> Tensor:
    """The largest absolute value of each row (rows, ...); 1 where all are 0."""
    largest = weight.flatten(1).abs().amax(1)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _scale(linear: nn.Module, rows: slice, factors: Tensor) -> None:
    """Multiply some of a layer's outputs by factors."""
    linear.weight[rows] *= factors.unsqueeze(1)
    if linear.bias is not None:
        linear.bias[rows] *= factors


def _equalize(linear: nn.Module, starts: Sequence[int], out: nn.Module) -> None:
    """Equalize one or more blocks of outputs, and the layer that takes their product.

    Args:
      linear: Makes the blocks.
      starts: Where each block's rows begin; as many as ``out`` has inputs.
      out: The layer behind them.
    """
    taken = _largest(out.weight.t())
    blocks = [slice(start, start + len(taken)) for start in starts]
    sizes = [_largest(linear.weight[rows]) for rows in blocks]
    size = taken.clone()
    for other in sizes:
        size *= other
    size = size ** (1 / (1 + len(blocks)))
    for rows, own in zip(blocks, sizes):
        _scale(linear, rows, size / own)
        out.weight *= own / size


def _equalize_keys(attention: nn.Module) -> None:
    """Equalize queries with keys, and queries of positions with these.

    Args:
      attention: Zipformer's attention weights.
    """
    size = attention.num_heads * attention.query_head_dim
    layer, positions = attention.in_proj, attention.linear_pos
    query, key, pos = slice(0, size), slice(size, 2 * size), slice(2 * size, None)
    for rows, other, other_rows in (
        (query, layer, key),
        (pos, positions, slice(None)),
    ):
        factors = _largest(other.weight[other_rows]) / _largest(layer.weight[rows])
        _scale(layer, rows, factors.sqrt())
        _scale(other, other_rows, 1 / factors.sqrt())


def _equalize_convolution(module: nn.Module) -> None:
    """Give the channels of a convolution module's input the same size.

    Args:
      module: Zipformer's.
    """
    convolutions = [m for m in module.depthwise_conv.modules() if hasattr(m, "weight")]
    rows = slice(0, len(convolutions[0].weight))
    own = _largest(module.in_proj.weight[rows])
    factors = own.median() / own
    _scale(module.in_proj, rows, factors)
    for convolution in convolutions:
        convolution.weight /= factors.view(-1, 1, 1)


@torch.no_grad()
def equalize(model: nn.Module) -> int:
    """Make channels of like size in place; the model's output stays as it is.

    The optimizer's states and the averages of a training don't fit the parameters any
    more: give it a model that is exported, or that a training begins with.

    Args:
      model: A recipe's Zipformer.

    Returns:
      How many modules were equalized.
    """
    count = 0
    for module in model.encoder.modules():
        kind = type(module).__name__
        if kind == "SelfAttention":
            _equalize(module.in_proj, [0], module.out_proj)
        elif kind == "NonlinAttention":
            hidden = module.hidden_channels
            _equalize(module.in_proj, [hidden, 2 * hidden], module.out_proj)
        elif kind == "RelPositionMultiheadAttentionWeights":
            _equalize_keys(module)
        elif kind == "ConvolutionModule":
            _equalize_convolution(module)
        else:
            continue
        count += 1
    return count

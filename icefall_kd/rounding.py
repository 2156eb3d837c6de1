"""Linear layers that compute what onnxruntime's int8 model of them computes.

``onnxruntime.quantization.quantize_dynamic`` replaces each product with a constant
matrix by one of 8-bit numbers. What that changes is that both factors are rounded:

* a weight once, to -127..127 times a scale, max|w| / 127 (QInt8, symmetric; one scale
  for the whole matrix, or with ``per_channel=True`` one for each channel that comes
  out);
* an activation whenever it is computed, to 0..255 minus a zero point, times one scale,
  (max(x, 0) - min(x, 0)) / 255 (ONNX's DynamicQuantizeLinear).

The sums are the same, in int32 there and in float32 here. Products of two activations,
as in attention, stay in float32, and so do convolutions where ``op_types_to_quantize``
is ``["MatMul"]``, as icefall's exports have it.

On x86 processors without VNNI instructions onnxruntime adds pairs of these products in
16 bits, which can overflow. That is not computed here; the session option
``session.x64quantprecision`` switches it off there.

The gradient is that of the layer without rounding, taken at the rounded values: the
straight-through estimator (Bengio et al., arXiv:1308.3432), as in Jacob et al.,
arXiv:1712.05877.
"""

from types import MethodType
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import torch
from torch import nn
from torch.nn import functional as F

# How many scales a weight has: one, or one for each channel that comes out.
TENSOR, CHANNEL = "tensor", "channel"
SCALES = (TENSOR, CHANNEL)
# The parts that an export has; the simple joiner's projections are for training alone.
EXPORTED = ("encoder_embed", "encoder", "decoder", "joiner", "ctc_output")
# In an export, encoder_proj is part of the encoder.
_BY_ROW = ("joiner.decoder_proj", "joiner.output_linear")
_OFFSETS = {"SwooshL": (4.0, 0.035), "SwooshR": (1.0, 0.313261687)}  # Zipformer's


class _StraightThrough(torch.autograd.Function):
    """Rounded values whose gradient is that of the values."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[torch.Tensor, None]:
        return grad, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Without graph, and in float32 where it is of a narrower type."""
    x = x.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def round_weight(weight: torch.Tensor, by_row: bool = False) -> torch.Tensor:
    """Return w as quantize_dynamic keeps it: s round(w / s), s = max|w| / 127.

    Args:
      weight: (out, in), of a linear layer.
      by_row: Whether each row, which is one channel that comes out, has a scale of its
        own, as with ``per_channel=True``, in place of one for the matrix.

    Returns:
      The rounded weight, of the same type; its gradient is the weight's.
    """
    if not weight.numel():
        return weight
    wide = _wide(weight)
    scale = wide.abs().amax(1, keepdim=True) if by_row else wide.abs().amax()
    scale = scale / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = (wide / scale).round_().mul_(scale)
    return _StraightThrough.apply(weight, rounded.to(weight.dtype))


def round_activation(x: torch.Tensor, alone: Sequence[int] = ()) -> torch.Tensor:
    """Return x as ONNX's DynamicQuantizeLinear and its inverse give it back.

    s = (max(x, 0) - min(x, 0)) / 255, z = round(-min(x, 0) / s), and the value is
    s clamp(round(x / s), -z, 255 - z). Values that are not finite stay as they are, and
    are not in the range.

    Args:
      x: (..., in), what enters a linear layer.
      alone: The dimensions along which each index has a range of its own: none for one
        range of the tensor, and the batch's for one of each utterance.

    Returns:
      The rounded values, of the same type; their gradient is that of ``x``.
    """
    if not x.numel():
        return x
    wide = _wide(x)
    finite = torch.isfinite(wide)
    known = wide.masked_fill(~finite, 0.0)
    together = [d for d in range(x.dim()) if d not in alone]
    least, most = known.amin(together, keepdim=True), known.amax(together, keepdim=True)
    least, most = least.clamp(max=0.0), most.clamp(min=0.0)
    scale = (most - least) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-least / scale).round_().clamp_(0.0, 255.0)
    rounded = known.div_(scale).round_()
    rounded = torch.minimum(torch.maximum(rounded, -zero), 255.0 - zero).mul_(scale)
    rounded = torch.where(finite, rounded, wide)
    return _StraightThrough.apply(x, rounded.to(x.dtype))


def exported_linears(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """Yield the layers whose products quantize_dynamic rounds, with their names.

    These are plain linear layers, and Zipformer's layers of an activation, dropout and
    a product in one, in the parts of the model that an export has.

    Args:
      model: A recipe's model, not in DDP.
    """
    for part in EXPORTED:
        module = getattr(model, part, None)
        if not isinstance(module, nn.Module):
            continue
        for name, layer in module.named_modules(prefix=part):
            if (
                isinstance(layer, nn.Linear)
                and type(layer).forward is nn.Linear.forward
            ):
                yield name, layer
            elif type(layer).__name__ == "ActivationDropoutAndLinear":
                yield name, layer


def linear_input(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what enters a layer's product.

    Args:
      layer: One of :func:`exported_linears`.
      x: (..., in), what enters the layer.

    Returns:
      ``x`` itself, or in Zipformer's layer of activation, dropout and product
      SwooshL(x) = log(1 + exp(x - 4)) - 0.08 x - 0.035, or SwooshR(x) = log(1 +
      exp(x - 1)) - 0.08 x - 0.313261687, with its dropout.
    """
    if isinstance(layer, nn.Linear):
        return x
    shift, constant = _OFFSETS[layer.activation]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # logaddexp(0, .) of torch has a NaN gradient at -inf; softplus has none.
    y = (F.softplus(wide - shift) - 0.08 * wide - constant).to(x.dtype)
    probability = float(layer.dropout_p) if layer.training else 0.0
    if not probability:
        return y
    shape = list(y.shape)
    if layer.dropout_shared_dim is not None:
        shape[layer.dropout_shared_dim] = 1
    kept = torch.rand(shape, device=y.device, dtype=y.dtype) > probability
    return y * (kept / (1.0 - probability)).to(y.dtype)


class RoundedLinears:
    """Lets a model's exported linear layers compute with rounded factors.

    ::

        rounded = RoundedLinears(model, lambda: True)
        model(...)          # as its int8 export would compute
        rounded.close()     # the model is as it was

    The parameters stay the model's own, and its state dict has no other keys. A deep
    copy or a pickle of the model does not round.

    Where a search asks for one frame or one context at a time, in the joiner behind
    ``encoder_proj``, each row has a range of its own. Elsewhere an utterance has one,
    as in a runtime that decodes it alone; its padding is in it. In models other than
    Zipformer of 2023, whose encoders may have their batch in any dimension, a range is
    that of the whole batch.

    Args:
      model: A recipe's model, in DDP or not.
      is_on: Called at each layer: whether it rounds now.
      scales: Of :data:`SCALES`, those of weights.

    Attributes:
      names: The names of the layers.
    """

    def __init__(
        self, model: nn.Module, is_on: Callable[[], bool], scales: str = TENSOR
    ) -> None:
        model = getattr(model, "module", model)
        encoder = type(getattr(model, "encoder", None)).__name__
        is_zipformer = encoder.startswith("Zipformer") and hasattr(
            model, "encoder_embed"
        )
        self._layers: List[nn.Module] = []
        self.names: List[str] = []
        for name, layer in exported_linears(model):
            ranges = _ranges(name, is_zipformer)
            forward = _rounding_forward(layer, is_on, ranges, scales == CHANNEL)
            layer.forward = MethodType(forward, layer)
            self._layers.append(layer)
            self.names.append(name)

    def close(self) -> None:
        """Give the layers their own forward passes back."""
        while self._layers:
            del self._layers.pop().forward


def factors(layer: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return what a layer multiplies when ``x`` enters it, rounded where it rounds.

    Losses call it that compute a layer's product themselves.

    Args:
      layer: A linear layer.
      x: (..., in), what enters the layer.

    Returns:
      The product's input (..., in) and its weight (out, in).
    """
    round_factors = getattr(layer.forward, "round_factors", None)
    factors = round_factors(layer, x) if round_factors else None
    return factors or (linear_input(layer, x), layer.weight)


def _ranges(name: str, is_zipformer: bool) -> Callable[[int], Sequence[int]]:
    """How to find the dimensions along which a layer's inputs have ranges of their own.

    Args:
      name: Of the layer.
      is_zipformer: Whether the model is Zipformer of 2023.

    Returns:
      A function of the number of dimensions of the input.
    """
    if name in _BY_ROW:
        return lambda num_dims: range(num_dims - 1)
    # All utterances have the same positions.
    if not is_zipformer or name.endswith("linear_pos"):
        return lambda num_dims: ()
    # The layers of its encoder have (T, N, C), other parts (N, T, C).
    batch = 1 if name.startswith("encoder.") else 0
    return lambda num_dims: (batch,) if num_dims > 2 else ()


def _rounding_forward(
    owner: nn.Module,
    is_on: Callable[[], bool],
    ranges: Callable[[int], Sequence[int]],
    weight_by_row: bool,
) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    def round_factors(layer, x):
        if layer is not owner or not is_on():
            return None
        x = round_activation(linear_input(layer, x), ranges(x.dim()))
        return x, round_weight(layer.weight, weight_by_row)

    # A bound method of this name: a pickled model finds its class's own, and a deep
    # copy binds it to the copied layer, which is not the owner.
    def forward(self, x):
        factors = round_factors(self, x)
        if factors is None:
            return type(self).forward(self, x)
        return F.linear(*factors, self.bias)

    forward.round_factors = round_factors
    return forward

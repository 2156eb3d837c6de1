"""Products of a head's matrices, as fast as a CPU has them.

A search on a CPU spends its time in three products, with the matrices of the joiner's
projections and of its output layer. On an AMD processor PyTorch's own product, Intel's
MKL, takes twice the time of oneDNN's, which PyTorch has as well, for matrices that were
packed once. The sums are of the same numbers in another order, so they differ in the
last bits as any two ways do.
"""

from typing import Optional

import torch

# Multiply-adds from which on a packed matrix is faster; a call of it costs more.
PACKED_FROM = 2**23


class Product:
    """x W^T + b, for any number of rows x.

    Args:
      weight: W, (O, I).
      bias: b, (O,).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        weight, self.bias = weight.detach(), bias.detach()
        self.size, self.transposed = weight.size(0), weight.t().contiguous()
        self.packed = _packed(weight, self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (..., O).

        Args:
          x: (..., I).
        """
        if self.packed is not None and x.numel() * self.size >= PACKED_FROM:
            return _packed_product(x, self.packed, self.bias)
        if x.dim() == 2:
            return torch.addmm(self.bias, x, self.transposed)
        product = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.transposed)
        return product.view(*x.shape[:-1], self.size)


def _packed_product(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _packed(weight: torch.Tensor, bias: torch.Tensor) -> Optional[torch.Tensor]:
    """Return a matrix as oneDNN wants it, or None where PyTorch has no such product."""
    usable = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not (usable and torch.backends.mkldnn.is_available()):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 64)
        _packed_product(weight[:1], packed, bias)  # the names are not public ones
    except (AttributeError, RuntimeError, TypeError):
        return None  # before PyTorch 2, or another processor
    return packed

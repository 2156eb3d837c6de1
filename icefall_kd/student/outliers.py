"""Which linear layers of a model lose most in 8 bits, and by what: an account.

An int8 export rounds a weight by one scale and an activation by one range. One large
value makes the steps of all others as large. The account has, for each layer that is
rounded, how far such values stand out, and what rounding does to the layer's product.
"""

from dataclasses import dataclass, fields
from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from icefall_kd.errors import require
from icefall_kd.rounding import (
    exported_linears,
    linear_input,
    round_activation,
    round_weight,
)
from icefall_kd.student.importance import FeatureBatch
from icefall_kd.tap import ModelTap
from icefall_kd.zipformer import has_ctc, has_transducer


@dataclass
class LayerAccount:
    """What stands out in a linear layer, and what rounding does to its outputs.

    Args:
      name: Of the layer.
      weight_peak: max|w| over the weight's root mean square.
      weight_spread: max|w| over the median of the rows' own maxima.
      activation_peak: The largest range of an utterance's input over the root mean
        square of all inputs.
      weight_error: The share of rounded weights' error in an output's power,
        sum ((w' - w) x)^2 / sum (w x)^2 over frames: the median of the layer's outputs,
        as a single large one would hide what happens to the others.
      row_error: The same with a scale for each row of the weight (``per_channel``).
      activation_error: The same of rounded activations,
        sum (w (x' - x))^2 / sum (w x)^2.
    """

    name: str
    weight_peak: float = 0.0
    weight_spread: float = 0.0
    activation_peak: float = 0.0
    weight_error: float = 0.0
    row_error: float = 0.0
    activation_error: float = 0.0

    @property
    def error(self) -> float:
        """The share of both errors in an output's power."""
        return self.weight_error + self.activation_error


class _Sums:
    """What a layer's inputs add up to, utterance by utterance."""

    def __init__(self, layer: nn.Module) -> None:
        weight = layer.weight.detach()
        self.changes = [round_weight(weight, by_row) - weight for by_row in (0, 1)]
        self.inputs = self.values = self.range = 0.0
        outputs = weight.new_zeros(len(weight), dtype=torch.float64)
        self.products = outputs.clone()
        self.errors = [outputs.clone() for _ in range(3)]

    def add(self, layer: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook of the layer."""
        x = linear_input(layer, args[0])
        known = x.new_zeros(1)
        self.range = max(
            self.range, float(torch.maximum(x.max(), known) - x.min().clamp(max=0))
        )
        self.inputs += float(x.double().square().sum())
        self.values += x.numel()
        self.products += _power(F.linear(x, layer.weight))
        for i, change in enumerate(self.changes):
            self.errors[i] += _power(F.linear(x, change))
        self.errors[2] += _power(F.linear(round_activation(x) - x, layer.weight))

    def account(self, name: str, layer: nn.Module) -> LayerAccount:
        """The layer's account."""
        sizes = layer.weight.detach().abs()
        largest = float(sizes.max())
        products = self.products.clamp(min=torch.finfo(torch.float64).tiny)
        shares = [float((error / products).median()) for error in self.errors]
        return LayerAccount(
            name,
            largest / (float(sizes.double().square().mean().sqrt()) or 1.0),
            largest / (float(sizes.amax(1).median()) or 1.0),
            self.range / ((self.inputs / max(self.values, 1)) ** 0.5 or 1.0),
            *shares,
        )


def _power(x: torch.Tensor) -> torch.Tensor:
    """The power of each output, summed over frames."""
    return x.flatten(0, -2).double().square().sum(0)


@torch.no_grad()
def account_of_outliers(
    model: nn.Module, batches: Sequence[FeatureBatch]
) -> List[LayerAccount]:
    """Return the account of each layer that an int8 export rounds, the worst first.

    Each utterance is computed alone, in fp32, so that ranges are those of a runtime.
    The joiner sees each frame with the label position at the same share of the
    transcript.

    Args:
      model: A recipe's model, in eval mode.
      batches: Features (N, T, F), lengths (N,) in feature frames, and token ids; see
        :func:`icefall_kd.student.cuts.read_batches`.

    Raises:
      KDError: There is no utterance.
    """
    require(batches, "there are no utterances to measure activations on: give cuts")
    layers = dict(exported_linears(model))
    sums = {name: _Sums(layer) for name, layer in layers.items()}
    handles = [
        layer.register_forward_pre_hook(sums[name].add)
        for name, layer in layers.items()
    ]
    try:
        with ModelTap(model, with_ctc=has_ctc(model)) as tap:
            for features, lens, labels in batches:
                for x, n, y in zip(features, lens.tolist(), labels):
                    out = tap.encode(x[None, :n], torch.tensor([n]))
                    if has_transducer(model):
                        _join(model, out.encoder_out, list(y))
    finally:
        for handle in handles:
            handle.remove()
    heard = [name for name in layers if sums[name].values]
    accounts = [sums[name].account(name, layers[name]) for name in heard]
    return sorted(accounts, key=lambda account: -account.error)


def _join(model: nn.Module, encoder_out: torch.Tensor, labels: List[int]) -> None:
    """Run decoder and joiner on an utterance's frames (1, T, C)."""
    blank_id, frames = int(model.decoder.blank_id), encoder_out.size(1)
    context = torch.tensor([[blank_id, *labels]], device=encoder_out.device)
    decoder_out = model.joiner.decoder_proj(model.decoder(context))[0]
    places = torch.arange(frames, device=encoder_out.device) * len(decoder_out)
    states = model.joiner.encoder_proj(encoder_out)[0] + decoder_out[places // frames]
    model.joiner.output_linear(states.tanh())


def table(accounts: Sequence[LayerAccount], count: int = 10) -> List[Dict[str, Any]]:
    """Return the worst accounts as dictionaries, and the mean of all as the last one.

    Args:
      accounts: Those of :func:`account_of_outliers`.
      count: How many layers.
    """
    names = [field.name for field in fields(LayerAccount)]
    rows = [{name: getattr(a, name) for name in names} for a in accounts[:count]]
    means = {
        name: sum(getattr(a, name) for a in accounts) / max(len(accounts), 1)
        for name in names[1:]
    }
    return [*rows, {"name": f"mean of {len(accounts)} layers", **means}]

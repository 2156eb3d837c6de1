"""Taps on a recipe's model: plain forward hooks, the model's code untouched."""

import random
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List

import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.types import EncoderOut

# Zipformer's front end makes (T - 7) // 2 frames of T.
MIN_FRAMES = 9


def ctc_linear(model: nn.Module) -> nn.Linear:
    """The linear layer of the CTC head: its output is what LogSoftmax takes."""
    head = getattr(model, "ctc_output", None)
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)] if head else []
    if not linears:
        raise KDError(
            f"the model {type(model).__name__} has no CTC head (ctc_output), and CTC "
            "distillation needs one: train it with --use-ctc 1"
        )
    return linears[-1]


# Plain functions: copy.deepcopy shares them, where it would copy a bound method
# together with its owner. So they run in a copy of the model too, and ignore it.
def _tap_encoder(store: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args, output):
        if module is not owner:
            return
        store["encoder_out"] = output[0].permute(1, 0, 2)
        store["encoder_out_lens"] = output[1]
        store.pop("ctc_logits", None)

    return hook


def _tap_ctc(store: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args, output):
        if module is owner:
            store["ctc_logits"] = output

    return hook


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Put back training flags and random states at the end."""
    flags = [(m, m.training) for m in model.modules()]
    state = random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[d.index for d in devices]):
            yield
    finally:
        random.setstate(state)
        for m, training in flags:
            m.training = training


class TeacherHook:
    """Reads encoder output and raw CTC logits off a recipe's Zipformer model.

    It taps ``encoder`` and the linear layer of ``ctc_output`` (a
    ``Sequential(Dropout, Linear, LogSoftmax)`` in icefall), so the logits are those
    before LogSoftmax.

    Two ways to use it::

        with TeacherHook(model) as hook:      # a teacher, asked by hand
            out = hook.encode(features, feature_lens)

        hook = TeacherHook(student)           # a model that is trained
        model(x=..., x_lens=..., y=...)       # its own forward pass
        out = hook.take()                     # with its graph

    Args:
      model: An icefall ``AsrModel`` (or that of the package zipformer), not
        wrapped by DDP. Tap it after the last ``copy.deepcopy`` of it.

    Raises:
      KDError: if the model lacks an encoder or a CTC head.
    """

    def __init__(self, model: nn.Module) -> None:
        for name in ("encoder_embed", "encoder"):
            if not isinstance(getattr(model, name, None), nn.Module):
                raise KDError(
                    f"the model {type(model).__name__} has no submodule {name!r}: "
                    "TeacherHook needs an icefall Zipformer model, not wrapped by DDP"
                )
        self.model = model
        self._store: Dict[str, Any] = {}
        self._handles: List[Any] = [
            module.register_forward_hook(tap(self._store, module))
            for module, tap in (
                (ctc_linear(model), _tap_ctc),
                (model.encoder, _tap_encoder),
            )
        ]

    def __enter__(self) -> "TeacherHook":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Take the taps off the model."""
        while self._handles:
            self._handles.pop().remove()
        self._store.clear()

    def take(self) -> EncoderOut:
        """Return what the last forward pass of the model gave, and forget it.

        Raises:
          KDError: if the model made no forward pass since the last call.
        """
        if "encoder_out" not in self._store:
            raise KDError(
                "TeacherHook has seen no forward pass of its model since the last "
                "take(): run the model first, or call encode()"
            )
        out = EncoderOut(**self._store)
        self._store.clear()
        return out

    @torch.no_grad()
    def encode(self, x: torch.Tensor, x_lens: torch.Tensor) -> EncoderOut:
        """Run encoder and CTC head in eval mode, without gradient.

        Python's and torch's random states and the modules' training flags are left
        as they were.

        Args:
          x: (N, T, F), features.
          x_lens: (N,), valid frames.

        Raises:
          KDError: if an utterance is too short for one frame of encoder output.
        """
        model = self.model
        shortest = int(x_lens.min())
        if shortest < MIN_FRAMES:
            raise KDError(
                f"an utterance has {shortest} feature frames and the encoder needs "
                f"{MIN_FRAMES} for one frame of output: leave it out"
            )
        with _as_found(model):
            model.eval()
            x, x_lens = model.encoder_embed(x, x_lens)
            frames = torch.arange(x.size(1), device=x.device)
            mask = frames.unsqueeze(0) >= x_lens.unsqueeze(1)
            out, _ = model.encoder(x.permute(1, 0, 2), x_lens, mask)
            ctc_linear(model)(out.permute(1, 0, 2))
        return self.take()

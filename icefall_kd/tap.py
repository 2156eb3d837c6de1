"""Taps on a recipe's model: plain forward hooks, the model's code untouched."""

from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.lattice import (
    decode_labels,
    node_occupancy,
    pad_labels,
    prune,
    pruned_logits,
)
from icefall_kd.model_state import as_if_alone, restoring_state
from icefall_kd.types import EncoderOut, PrunedLattice
from icefall_kd.zipformer import (
    MIN_FRAMES,
    OUT,
    Layer,
    ctc_linear,
    require_transducer,
    stack_frames,
)

UNFINISHED = "unfinished"  # among a hook's outputs while the model's forward() runs


# The hooks are plain functions: copy.deepcopy of a model shares them, where it would
# copy a bound method together with its object. So they run in a copy of the model too,
# and ignore it. They write fields of EncoderOut to `outputs`, by name.
def _tap_begin(outputs: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args):
        if module is owner:
            outputs.clear()
            outputs[UNFINISHED] = True

    return hook


def _tap_end(outputs: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args, output):  # torch calls it only where forward() returned
        if module is owner:
            outputs.pop(UNFINISHED, None)

    return hook


def _tap_encoder(
    outputs: Dict[str, Any], owner: nn.Module, takes_features: bool
) -> Callable:
    def hook(module, args, output):
        if module is not owner:
            return
        encoder_out, outputs["encoder_out_lens"] = output[:2]
        if takes_features:  # the older Zipformer: (N, T, C)
            outputs["encoder_out"], outputs["hidden_lens"] = encoder_out, None
        else:
            outputs["encoder_out"] = encoder_out.permute(1, 0, 2)
            outputs["hidden_lens"] = args[1] if len(args) > 1 else None
        if UNFINISHED not in outputs:  # the caller runs the model's parts one by one
            for name in ("ctc_logits", "simple_logits", "decoder_out", "labels"):
                outputs.pop(name, None)

    return hook


def _in_pass(outputs: Dict[str, Any]) -> bool:
    """Whether a head that runs now belongs to a pass that take() will return."""
    return UNFINISHED in outputs or "encoder_out" in outputs


def _tap_logits(outputs: Dict[str, Any], owner: nn.Module, name: str) -> Callable:
    def hook(module, args, output):
        if module is owner and _in_pass(outputs):
            outputs[name] = output

    return hook


def _tap_decoder(outputs: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args, output):
        # A loss may run the decoder again, on other labels, after take().
        if module is owner and _in_pass(outputs):
            outputs["decoder_out"], outputs["labels"] = output, args[0]

    return hook


def _tap_stack(outputs: Dict[str, Any], owner: nn.Module, index: int) -> Callable:
    def hook(module, args, output):
        if module is owner:
            outputs.setdefault("hidden", {})[index] = output.permute(1, 0, 2)

    return hook


class ModelTap:
    """Collects what the parts of a recipe's Zipformer model output.

    These are the encoder output, the raw CTC logits, and where they are asked for the
    outputs of stacks, of ``simple_am_proj`` and of the transducer's decoder.

    It puts forward hooks on ``encoder`` and on the linear layer of ``ctc_output``, so
    the logits are those before LogSoftmax. The older Zipformer of icefall's
    ``zipformer_ctc``, whose ``encoder`` takes features itself, is tapped likewise, but
    for its stacks. There are two ways to use it::

        with ModelTap(model) as tap:      # a teacher: the tap runs the encoder
            out = tap.encode(features, feature_lens)

        tap = ModelTap(student)           # a model that is trained
        model(x=..., x_lens=..., y=...)   # its own forward pass
        out = tap.take()                  # with its graph

    Args:
      model: An icefall ``AsrModel`` (or that of the package zipformer), or DDP around
        it. Tap it after the last ``copy.deepcopy`` of it.
      layers: Indices of the encoder's stacks whose outputs are wanted. The encoder's
        output, "out", is always there.
      with_ctc: Whether the CTC head's logits are wanted; False for a model without it.
      with_decoder: Whether the transducer's decoder output is wanted.
      with_simple: Whether the logits of the simple joiner's acoustic half,
        ``simple_am_proj``, are wanted.

    Raises:
      KDError: The model lacks an encoder, a CTC head, a transducer or a stack.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer] = (),
        with_ctc: bool = True,
        with_decoder: bool = False,
        with_simple: bool = False,
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        if not isinstance(getattr(model, "encoder", None), nn.Module):
            raise KDError(
                f"the model {type(model).__name__} has no submodule 'encoder': "
                "ModelTap needs an icefall Zipformer model"
            )
        self.model, self.with_ctc, self.with_simple = model, with_ctc, with_simple
        # The older Zipformer has its front end inside the encoder.
        self.encoder_takes_features = getattr(model, "encoder_embed", None) is None
        self._outputs: Dict[str, Any] = {}
        encoder = model.encoder
        hook = _tap_encoder(self._outputs, encoder, self.encoder_takes_features)
        hooks = [(encoder, hook)]
        if with_ctc:
            head = ctc_linear(model)
            hooks.append((head, _tap_logits(self._outputs, head, "ctc_logits")))
        if with_simple:
            require_transducer(
                model,
                "its simple joiner",
                "leave the simple targets and their term out",
            )
            head = model.simple_am_proj
            hooks.append((head, _tap_logits(self._outputs, head, "simple_logits")))
        if with_decoder:
            _require_transducer(model)
            hooks.append((model.decoder, _tap_decoder(self._outputs, model.decoder)))
        for index in layers:
            if index != OUT:
                stack = self._stack(index)
                hooks.append((stack, _tap_stack(self._outputs, stack, index)))
        hooks.append((model, _tap_end(self._outputs, model)))
        self._handles: List[Any] = [m.register_forward_hook(hook) for m, hook in hooks]
        begin = _tap_begin(self._outputs, model)
        self._handles.append(model.register_forward_pre_hook(begin))

    def _stack(self, index: int) -> nn.Module:
        stacks = getattr(self.model.encoder, "encoders", [])
        if self.encoder_takes_features:
            raise KDError(
                f"the hidden layer is stack {index}, and {type(self.model).__name__} "
                "has an older Zipformer, whose stacks are not tapped: give out, the "
                "encoder's output"
            )
        if not 0 <= index < len(stacks):
            raise KDError(
                f"the hidden layer is stack {index}, and the encoder has "
                f"{len(stacks)} stacks: give 0 to {len(stacks) - 1}"
            )
        return stacks[index]

    def __enter__(self) -> "ModelTap":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks from the model."""
        while self._handles:
            self._handles.pop().remove()
        self._outputs.clear()

    def take(self) -> EncoderOut:
        """Return the outputs of the model's last forward pass, and forget them.

        Raises:
          KDError: The model made no forward pass since the last call, or the last one
            failed.
        """
        if self._outputs.pop(UNFINISHED, False):
            self._outputs.clear()
            raise KDError(
                "the last forward pass of ModelTap's model failed before its end, "
                "and what it left is forgotten: run the model again before take()"
            )
        if "encoder_out" not in self._outputs:
            raise KDError(
                "ModelTap's model has made no forward pass since the last "
                "take(): run the model first, or call encode()"
            )
        out = EncoderOut(**self._outputs)
        self._outputs.clear()
        return out

    @torch.no_grad()
    def encode(self, x: torch.Tensor, x_lens: torch.Tensor) -> EncoderOut:
        """Run encoder and frame-wise heads in eval mode, without gradient.

        Each utterance's output is what it would be without the others. Python's and
        torch's random states and the modules' training flags are restored.

        Args:
          x: (N, T, F), features.
          x_lens: (N,), valid feature frames.

        Returns:
          The outputs, as :meth:`take` returns them.

        Raises:
          KDError: An utterance is too short for one frame of encoder output.
        """
        model = self.model
        shortest = int(x_lens.min())
        if shortest < MIN_FRAMES:
            raise KDError(
                f"an utterance has {shortest} feature frames and the encoder needs "
                f"{MIN_FRAMES} for one frame of output: leave it out"
            )
        self._outputs.clear()
        try:
            with restoring_state(model):
                model.eval()
                with as_if_alone(model, stack_frames(x_lens)):
                    self._run_encoder(x, x_lens)
                if self.with_ctc:
                    ctc_linear(model)(self._outputs["encoder_out"])
                if self.with_simple:
                    model.simple_am_proj(self._outputs["encoder_out"])
        except BaseException:
            self._outputs.clear()
            raise
        return self.take()

    def _run_encoder(self, x: torch.Tensor, x_lens: torch.Tensor) -> None:
        if self.encoder_takes_features:
            self.model.encoder(x, x_lens)
            return
        x, x_lens = self.model.encoder_embed(x, x_lens)  # (N, stack frames, C)
        frames = torch.arange(x.size(1), device=x.device)
        padding = frames.unsqueeze(0) >= x_lens.unsqueeze(1)
        self.model.encoder(x.permute(1, 0, 2), x_lens, padding)

    @torch.no_grad()
    def lattice(
        self,
        out: EncoderOut,
        y: Sequence[Sequence[int]],
        s_range: int = 5,
        ranges: Optional[torch.Tensor] = None,
    ) -> PrunedLattice:
        """Run the transducer on the model's own pruned lattice.

        The ranges are those of the recipe's pruned loss (Kuang et al.,
        arXiv:2206.13236). The occupancy of a node is the probability, under the full
        joiner, that the path passes it.

        Args:
          out: The outputs of :meth:`encode`.
          y: The labels of each utterance, one or more.
          s_range: Label positions at a frame; the longest utterance's labels and one
            more, or above, make the full lattice.
          ranges: (N, T, S), the ranges of another model, whose nodes are taken; None:
            the model's own.

        Returns:
          The lattice of all utterances.

        Raises:
          KDError: The model has no transducer head, or the labels do not fit.
        """
        model = self.model
        _require_transducer(model)
        blank_id = int(model.decoder.blank_id)
        _check_labels(y, out.encoder_out_lens)
        labels, boundary = pad_labels(y, out.encoder_out_lens, blank_id)
        # It is of another type where encode() ran within autocast.
        encoder_out = out.encoder_out.to(next(model.joiner.parameters()).dtype)
        with restoring_state(model):
            model.eval()
            decoder_out = decode_labels(model.decoder, labels, blank_id)
            if ranges is None:
                with torch.autocast(encoder_out.device.type, enabled=False):
                    lm = model.simple_lm_proj(decoder_out.to(encoder_out.dtype))
                    am = model.simple_am_proj(encoder_out)
                _, ranges = prune(
                    am.float(), lm.float(), labels, boundary, blank_id, s_range
                )
            am = model.joiner.encoder_proj(encoder_out)
            logits = pruned_logits(model.joiner, am, decoder_out, ranges)
        occupancy = node_occupancy(logits, ranges, labels, boundary, blank_id)
        return PrunedLattice(ranges, boundary, labels, logits, occupancy)


def _require_transducer(model: nn.Module) -> None:
    require_transducer(model, "a lattice", "distil the CTC head alone")


def _check_labels(y: Sequence[Sequence[int]], lens: torch.Tensor) -> None:
    """Refuse labels that make no lattice."""
    if len(y) != len(lens):
        raise KDError(
            f"there are labels of {len(y)} utterances and frames of {len(lens)}: give "
            "one list of labels for each"
        )
    for i, labels in enumerate(y):
        if not len(labels):
            raise KDError(
                f"utterance {i} of the batch has no labels, and a lattice needs one or "
                "more: leave it out"
            )
        if len(labels) > int(lens[i]):  # k2 refuses it too
            raise KDError(
                f"utterance {i} of the batch has {len(labels)} labels and "
                f"{int(lens[i])} frames, and a lattice needs as many frames: leave it "
                "out, as icefall's training does"
            )

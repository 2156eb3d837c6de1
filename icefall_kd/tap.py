"""Taps on a recipe's model: plain forward hooks, the model's code untouched."""

import random
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import OUT, Layer
from icefall_kd.lattice import node_occupancy
from icefall_kd.rnnt import get_engine
from icefall_kd.types import EncoderOut, PrunedLattice

# Zipformer's front end makes (T - 7) // 2 frames of T.
MIN_FRAMES = 9
UNFINISHED = "unfinished"  # in a hook's store while the model's forward() runs


def encoder_frames(num_frames: int) -> int:
    """Frames of Zipformer's output for so many feature frames."""
    return ((num_frames - 7) // 2 + 1) // 2


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
def _tap_begin(store: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args):
        if module is owner:
            store.clear()
            store[UNFINISHED] = True

    return hook


def _tap_end(store: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args, output):  # torch calls it only where forward() returned
        if module is owner:
            store.pop(UNFINISHED, None)

    return hook


def _tap_encoder(store: Dict[str, Any], owner: nn.Module, embeds: bool) -> Callable:
    def hook(module, args, output):
        if module is not owner:
            return
        # An older encoder has its front end inside, and puts utterances first.
        store["encoder_out"] = output[0] if embeds else output[0].permute(1, 0, 2)
        store["encoder_out_lens"] = output[1]
        store["hidden_lens"] = args[1] if len(args) > 1 and not embeds else None
        if UNFINISHED not in store:  # a pass of the model's parts, asked by hand
            for name in ("ctc_logits", "decoder_out", "labels"):
                store.pop(name, None)

    return hook


def _in_pass(store: Dict[str, Any]) -> bool:
    """Whether a head that is asked now belongs to a pass that take() will give."""
    return UNFINISHED in store or "encoder_out" in store


def _tap_ctc(store: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args, output):
        if module is owner and _in_pass(store):
            store["ctc_logits"] = output

    return hook


def _tap_decoder(store: Dict[str, Any], owner: nn.Module) -> Callable:
    def hook(module, args, output):
        # A loss may ask the decoder again, of other labels, behind take().
        if module is owner and _in_pass(store):
            store["decoder_out"], store["labels"] = output, args[0]

    return hook


def _tap_stack(store: Dict[str, Any], owner: nn.Module, index: int) -> Callable:
    def hook(module, args, output):
        if module is owner:
            store.setdefault("hidden", {})[index] = output.permute(1, 0, 2)

    return hook


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Put back training flags, chunk sizes and random states at the end."""
    flags = [(m, m.training) for m in model.modules()]
    state = random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    encoder = model.encoder
    chunks = getattr(encoder, "chunk_size", None)
    context = getattr(encoder, "left_context_frames", None)
    try:
        with torch.random.fork_rng(devices=[d.index for d in devices]):
            if isinstance(chunks, (tuple, list)):
                # A causal model draws one of these at each pass: take the widest.
                encoder.chunk_size = (-1 if -1 in chunks else max(chunks),)
            if isinstance(context, (tuple, list)):
                encoder.left_context_frames = (-1 if -1 in context else max(context),)
            yield
    finally:
        random.setstate(state)
        if chunks is not None:
            encoder.chunk_size = chunks
        if context is not None:
            encoder.left_context_frames = context
        for m, training in flags:
            m.training = training


@contextmanager
def _alone(model: nn.Module, lens: torch.Tensor) -> Iterator[None]:
    """Let each utterance of a batch come out as it would alone.

    Zipformer lets padding reach valid frames in two places: the ConvNeXt layer of its
    front end sees three frames on, and where a stack's length is no multiple of its
    downsampling the last group takes in padding. Alone, an utterance finds zeros in
    the first place and copies of its last frame in the second.

    Args:
      lens: (N,), valid frames at 50 Hz.
    """

    def zeros(module, args):
        x = args[0]  # (N, C, T50, F)
        frames = torch.arange(x.size(2), device=x.device)
        padding = frames >= lens.to(x.device).unsqueeze(1)
        return (x.masked_fill(padding[:, None, :, None], 0.0), *args[1:])

    def copies(module, args):
        x = args[0]  # (T50, N, C)
        frames = torch.arange(x.size(0), device=x.device).unsqueeze(1)
        index = torch.minimum(frames, lens.to(x.device).unsqueeze(0) - 1)
        return (x.gather(0, index.unsqueeze(-1).expand_as(x)), *args[1:])

    front = getattr(model, "encoder_embed", None)
    taps = [(getattr(front, "convnext", None), zeros)]
    taps.append((getattr(model.encoder, "downsample_output", None), copies))
    for stack in getattr(model.encoder, "encoders", []):
        taps.append((getattr(stack, "downsample", None), copies))
    handles = [
        module.register_forward_pre_hook(tap)
        for module, tap in taps
        if isinstance(module, nn.Module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _need_transducer(model: nn.Module) -> None:
    for name in ("decoder", "joiner", "simple_am_proj", "simple_lm_proj"):
        if getattr(model, name, None) is None:
            raise KDError(
                f"the model {type(model).__name__} has no {name}, and a lattice "
                "needs a transducer head: distil the CTC head alone"
            )


class ModelTap:
    """Reads encoder output and raw CTC logits off a recipe's Zipformer model.

    It taps ``encoder`` and the linear layer of ``ctc_output`` (a
    ``Sequential(Dropout, Linear, LogSoftmax)`` in icefall), so the logits are those
    before LogSoftmax.

    The older Zipformer of icefall's ``zipformer_ctc``, whose ``encoder`` takes features
    itself, is tapped likewise, but for its stacks.

    Two ways to use it::

        with ModelTap(model) as hook:      # a teacher, asked by hand
            out = hook.encode(features, feature_lens)

        hook = ModelTap(student)           # a model that is trained
        model(x=..., x_lens=..., y=...)       # its own forward pass
        out = hook.take()                     # with its graph

    Args:
      model: An icefall ``AsrModel`` (or that of the package zipformer), or DDP around
        it. Tap it after the last ``copy.deepcopy`` of it.
      hidden: Indices of the encoder's stacks whose output is taken too. The
        encoder's output, "out", is taken anyway.
      ctc: Whether to take the CTC head's logits; False for a model without that head.
      decoder: Whether to take the transducer's decoder output.

    Raises:
      KDError: if the model lacks an encoder, a CTC head or a stack.
    """

    def __init__(
        self,
        model: nn.Module,
        hidden: Sequence[Layer] = (),
        ctc: bool = True,
        decoder: bool = False,
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        if not isinstance(getattr(model, "encoder", None), nn.Module):
            raise KDError(
                f"the model {type(model).__name__} has no submodule 'encoder': "
                "ModelTap needs an icefall Zipformer model"
            )
        self.model = model
        self.embeds = getattr(model, "encoder_embed", None) is None
        self._store: Dict[str, Any] = {}
        taps = [(model.encoder, _tap_encoder(self._store, model.encoder, self.embeds))]
        if ctc:
            head = ctc_linear(model)
            taps.append((head, _tap_ctc(self._store, head)))
        self.ctc = ctc
        if decoder:
            _need_transducer(model)
            taps.append((model.decoder, _tap_decoder(self._store, model.decoder)))
        stacks = getattr(model.encoder, "encoders", [])
        for i in hidden:
            if i == OUT:
                continue
            if self.embeds:
                raise KDError(
                    f"the hidden layer is stack {i}, and {type(model).__name__} has an "
                    "older Zipformer, whose stacks are not tapped: give out, the "
                    "encoder's output"
                )
            if not 0 <= i < len(stacks):
                raise KDError(
                    f"the hidden layer is stack {i}, and the encoder has "
                    f"{len(stacks)} stacks: give 0 to {len(stacks) - 1}"
                )
            taps.append((stacks[i], _tap_stack(self._store, stacks[i], i)))
        taps.append((model, _tap_end(self._store, model)))
        self._handles: List[Any] = [m.register_forward_hook(tap) for m, tap in taps]
        begin = _tap_begin(self._store, model)
        self._handles.append(model.register_forward_pre_hook(begin))

    def __enter__(self) -> "ModelTap":
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
          KDError: if the model made no forward pass since the last call, or the last
            one failed.
        """
        if self._store.pop(UNFINISHED, False):
            self._store.clear()
            raise KDError(
                "the last forward pass of ModelTap's model failed before its end, "
                "and what it left is forgotten: run the model again before take()"
            )
        if "encoder_out" not in self._store:
            raise KDError(
                "ModelTap has seen no forward pass of its model since the last "
                "take(): run the model first, or call encode()"
            )
        out = EncoderOut(**self._store)
        self._store.clear()
        return out

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Keep nothing of a pass that fails."""
        try:
            yield
        except BaseException:
            self._store.clear()
            raise

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
        self._store.clear()
        with as_found(model), self._forgetting():
            model.eval()
            with _alone(model, (x_lens - 7) // 2):
                if self.embeds:
                    model.encoder(x, x_lens)
                else:
                    x, x_lens = model.encoder_embed(x, x_lens)
                    frames = torch.arange(x.size(1), device=x.device)
                    mask = frames.unsqueeze(0) >= x_lens.unsqueeze(1)
                    model.encoder(x.permute(1, 0, 2), x_lens, mask)
            if self.ctc:
                ctc_linear(model)(self._store["encoder_out"])
        return self.take()

    @torch.no_grad()
    def lattice(
        self,
        out: EncoderOut,
        y: Sequence[Sequence[int]],
        s_range: int = 5,
        ranges: Optional[torch.Tensor] = None,
    ) -> PrunedLattice:
        """The transducer's output on the model's own pruned lattice.

        The ranges are those that the recipe's pruned loss takes: found by the simple
        joiner, without smoothing (Kuang et al., arXiv:2206.13236). The occupancy of a
        node is the probability, under the full joiner, that the path passes it.

        Args:
          out: Of :meth:`encode`.
          y: Labels of each utterance.
          s_range: Label positions at a frame; the longest utterance's labels and one
            more, or above, make the full lattice.
          ranges: (N, T, S), another model's ranges, to stand on its nodes.

        Raises:
          KDError: a model without transducer head, or labels that do not fit.
        """
        model = self.model
        _need_transducer(model)
        blank = int(model.decoder.blank_id)
        # Of another type where encode() ran within autocast.
        kind = next(model.joiner.parameters()).dtype
        encoder_out, lens = out.encoder_out.to(kind), out.encoder_out_lens
        symbols, boundary = _padded(y, lens, blank)
        with as_found(model):
            model.eval()
            start = symbols.new_full((len(symbols), 1), blank)
            decoder_out = model.decoder(torch.cat((start, symbols), 1))
            if ranges is None:
                ranges = self._ranges(
                    encoder_out, decoder_out, symbols, boundary, blank, s_range
                )
            am, lm = get_engine().do_rnnt_pruning(
                am=model.joiner.encoder_proj(encoder_out),
                lm=model.joiner.decoder_proj(decoder_out),
                ranges=ranges,
            )
            logits = model.joiner(am, lm, project_input=False)
        occupancy = node_occupancy(logits, ranges, symbols, boundary, blank)
        return PrunedLattice(ranges, boundary, symbols, logits, occupancy)

    def _ranges(
        self, encoder_out, decoder_out, symbols, boundary, blank_id: int, s_range: int
    ) -> torch.Tensor:
        """Where the recipe's pruned loss would look."""
        with torch.autocast(encoder_out.device.type, enabled=False):
            _, (px_grad, py_grad) = get_engine().rnnt_loss_smoothed(
                lm=self.model.simple_lm_proj(decoder_out.to(encoder_out.dtype)).float(),
                am=self.model.simple_am_proj(encoder_out).float(),
                symbols=symbols,
                termination_symbol=blank_id,
                lm_only_scale=0.0,
                am_only_scale=0.0,
                boundary=boundary,
                reduction="sum",
                return_grad=True,
            )
        return get_engine().get_rnnt_prune_ranges(
            px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=s_range
        )


def _padded(
    y: Sequence[Sequence[int]], lens: torch.Tensor, blank_id: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Labels as (N, U), and k2's boundary."""
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
    longest = max((len(labels) for labels in y), default=0)
    symbols = torch.full((len(y), max(1, longest)), blank_id, dtype=torch.int64)
    boundary = torch.zeros(len(y), 4, dtype=torch.int64)
    for i, labels in enumerate(y):
        symbols[i, : len(labels)] = torch.as_tensor(labels, dtype=torch.int64)
        boundary[i, 2] = len(labels)
    boundary[:, 3] = lens.cpu()
    return symbols.to(lens.device), boundary.to(lens.device)

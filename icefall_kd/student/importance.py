"""Selects a student's layers, channels, heads and hidden units by their importance."""

from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import nn

from icefall_kd.student.count import stacks_of
from icefall_kd.student.front import FRONT_READERS, largest, select_front
from icefall_kd.student.presets import embed_channels, per_stack
from icefall_kd.student.selection import HEADS, Selection, select_first
from icefall_kd.tap import ModelTap

# Features (N, T, F), their lengths (N,) in feature frames, and the token ids of each
# utterance or None.
FeatureBatch = Tuple[torch.Tensor, torch.Tensor, Optional[Sequence[Sequence[int]]]]
_MODULES = (
    "feed_forward1",
    "feed_forward2",
    "feed_forward3",
    "conv_module1",
    "conv_module2",
    "nonlin_attention",
)
_ATTENTIONS = ("self_attn1", "self_attn2")
# The matrices that read the encoder's output, and the other ones of the transducer.
_READERS = ("simple_am_proj", "joiner.encoder_proj", "ctc_output.1")
_FRONT_NORM = "encoder_embed.out_norm"
_TRANSDUCER = ("joiner.output_linear", "joiner.decoder_proj")
_ACTIVATIONS: Dict[str, Callable] = {
    # Yao et al., arXiv:2310.11230, equations 6 and 7.
    "SwooshL": lambda x: torch.logaddexp(x - 4, x.new_zeros(())) - 0.08 * x - 0.035,
    "SwooshR": lambda x: torch.logaddexp(x - 1, x.new_zeros(()))
    - 0.08 * x
    - 0.313261687,
}


def encoder_layers(model: nn.Module) -> List[List[Tuple[str, nn.Module]]]:
    """For each stack of ``model``, an icefall Zipformer, the names and its layers."""
    stacks = []
    for i, stack in enumerate(model.encoder.encoders):
        prefix = f"encoder.encoders.{i}"
        if hasattr(stack, "encoder"):  # a stack that is downsampled wraps its layers
            prefix, stack = f"{prefix}.encoder", stack.encoder
        layers = enumerate(stack.layers)
        stacks.append([(f"{prefix}.layers.{j}", layer) for j, layer in layers])
    return stacks


@contextmanager
def _bypassed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Make ``layers`` return their input during a block."""
    handles = [m.register_forward_hook(lambda m, args, out: args[0]) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _select_layers(
    model: nn.Module,
    batches: Sequence[FeatureBatch],
    depths: Sequence[int],
    advance: Callable[[], Any],
) -> List[List[int]]:
    """For each stack its most important layers, as many as ``depths`` has.

    Greedily, the layer is removed without which the encoder's output changes least.
    """
    with ModelTap(model, with_ctc=False) as tap:

        def outputs() -> List[torch.Tensor]:
            """The encoder's output of each batch, (valid frames, C)."""
            rows = []
            for x, x_lens, _ in batches:
                out = tap.encode(x, x_lens)
                frames = torch.arange(out.encoder_out.size(1), device=x.device)
                valid = frames < out.encoder_out_lens.unsqueeze(1)
                rows.append(out.encoder_out[valid].float())
                advance()
            return rows

        references = outputs()
        selected = []
        for stack, depth in zip(encoder_layers(model), depths):
            remaining = list(range(len(stack)))
            while len(remaining) > depth:
                removed = [m for j, (_, m) in enumerate(stack) if j not in remaining]
                damage = {}
                for j in remaining:
                    with _bypassed([*removed, stack[j][1]]):
                        pairs = zip(references, outputs())
                        damage[j] = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
                remaining.remove(min(remaining, key=damage.__getitem__))
            selected.append(remaining)
    return selected


class _Shares:
    """For matrices y = W x, the share of each x_c in the output.

    That is E[x_c^2] ||W_c||^2, where W_c is the column that reads x_c, divided by its
    sum over all c. Wanda (Sun et al., arXiv:2306.11695) multiplies the norms of
    activation and weight likewise, for single weights. A convolution is a matrix whose
    columns have a number for each place of its kernel.
    """

    def __init__(self) -> None:
        self.squares: Dict[str, torch.Tensor] = {}  # (C,), sums of x_c^2
        self.matrices: Dict[str, torch.Tensor] = {}
        self.handles: List[Any] = []

    def tap(self, name: str, module: nn.Module) -> None:
        """Add up the squares of a matrix's input; for a BiasNorm those of x - b."""
        activation = _ACTIVATIONS.get(getattr(module, "activation", ""))
        is_norm = not hasattr(module, "weight")
        if not is_norm:
            self.matrices[name] = module.weight

        def hook(module, args):
            x = args[0].detach().float()
            if is_norm:
                x = x - module.bias.detach().float()
            if activation is not None:
                x = activation(x)
            if isinstance(module, nn.Conv2d):  # (N, C, T, F)
                x = x.movedim(1, -1)
            squares = (x**2).flatten(0, -2).sum(0, dtype=torch.float64)
            self.squares[name] = self.squares.get(name, 0) + squares

        self.handles.append(module.register_forward_pre_hook(hook))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def share(self, name: str) -> Optional[torch.Tensor]:
        """(C,), of sum 1; None for a matrix that computed nothing."""
        if name not in self.squares:
            return None
        columns = self.matrices[name].detach().double() ** 2
        columns = columns.transpose(0, 1).flatten(1).sum(1)
        share = (self.squares[name] * columns).cpu()
        return share / share.sum().clamp(min=1e-300)


def _utterances(batch: FeatureBatch) -> Iterator[FeatureBatch]:
    """Batches of one utterance, as in larger ones the matrices read padding too."""
    x, x_lens, y = batch
    for i, n in enumerate(x_lens.tolist()):
        yield x[i : i + 1, :n], x_lens[i : i + 1], None if y is None else [y[i]]


def _measure_shares(
    model: nn.Module, batches: Sequence[FeatureBatch], advance: Callable
) -> _Shares:
    """Run the teacher over the batches, with taps on all matrices."""
    shares = _Shares()
    modules = dict(model.named_modules())
    transducer = isinstance(modules.get("joiner.output_linear"), nn.Linear)
    try:
        for layers in encoder_layers(model):
            for name, layer in layers:
                parts = ["self_attn_weights.in_proj", "norm"]
                for part in (*_MODULES, *_ATTENTIONS):
                    parts += [f"{part}.in_proj", f"{part}.out_proj"]
                for part in parts:
                    shares.tap(f"{name}.{part}", layer.get_submodule(part))
        for name in (*_READERS, *_TRANSDUCER):
            if isinstance(modules.get(name), nn.Linear):
                shares.tap(name, modules[name])
        shares.tap(_FRONT_NORM, modules[_FRONT_NORM])
        for name in FRONT_READERS:
            if isinstance(modules.get(name), (nn.Conv2d, nn.Linear)):
                shares.tap(name, modules[name])
        with ModelTap(model, with_ctc="ctc_output.1" in shares.matrices) as tap:
            for batch in batches:
                for x, x_lens, y in _utterances(batch):
                    out = tap.encode(x, x_lens)
                    if transducer and y is not None:
                        tap.lattice(out, y)
                advance()
    finally:
        shares.close()
    return shares


def _select_stream(
    shares: _Shares, model: nn.Module, teacher: Dict[str, Any], student: Dict[str, Any]
) -> List[int]:
    """The channels of the residual stream that the student takes.

    All stacks share one stream: a stack of width w reads the first w channels of the
    one before, or pads with zeros. So the student's channel j is the same channel of
    the teacher in all stacks that have it, and lies within the teacher's width in each
    of them. Beginning with the narrowest stack, the channels are taken whose share,
    averaged over all matrices that read them in the stacks concerned, is largest.
    """
    stack_shares: List[torch.Tensor] = []
    for layers in encoder_layers(model):
        parts = (*_MODULES, *_ATTENTIONS, "self_attn_weights")
        readers = [f"{name}.{part}.in_proj" for name, _ in layers for part in parts]
        stack_shares.append(torch.stack([shares.share(r) for r in readers]).mean(0))
    heads = [shares.share(name) for name in _READERS]
    heads = [share for share in heads if share is not None]
    widths = per_stack(student, "encoder_dim")
    limits = per_stack(teacher, "encoder_dim")
    order: List[int] = []
    for width in sorted(set(widths)):
        stacks = [i for i, w in enumerate(widths) if w >= width]
        limit = min(limits[i] for i in stacks)
        share = torch.zeros(limit, dtype=torch.float64)
        for i in stacks:
            share += stack_shares[i][:limit]
        if heads:
            share += torch.stack(heads).mean(0)[:limit]
        share[[c for c in order if c < limit]] = -1.0  # taken already
        order += sorted(share.topk(width - len(order)).indices.tolist())
    return order


def _norm_shifts(
    shares: _Shares, model: nn.Module, student: Dict[str, Any], stream: List[int]
) -> Dict[str, float]:
    """Shifts of BiasNorm's log-scales that keep its mean scale that of the teacher.

    BiasNorm divides by the root of the mean over channels of (x - b)^2. Over the
    selected channels that mean is r times the former, so 1/2 log r is added to the
    log-scale.
    """
    shifts = {}
    widths = per_stack(student, "encoder_dim")
    norms = [(_FRONT_NORM, widths[0])]
    for layers, width in zip(encoder_layers(model), widths):
        norms += [(f"{name}.norm", width) for name, _ in layers]
    for name, width in norms:
        squares = shares.squares[name]
        ratio = squares[stream[:width]].mean() / squares.mean()
        shifts[name] = 0.5 * float(ratio.clamp(min=1e-300).log())
    return shifts


def _select_units(
    shares: _Shares, model: nn.Module, teacher: Dict[str, Any], student: Dict[str, Any]
) -> Dict[str, List[int]]:
    """The hidden units of each module and the heads of each layer that are taken."""
    units: Dict[str, List[int]] = {}
    sizes = zip(stacks_of(teacher), stacks_of(student))
    for layers, (old, new) in zip(encoder_layers(model), sizes):
        counts = (*new.feedforward_dims, new.dim, new.dim, new.nonlin_dim)
        for name, _ in layers:
            for part, count in zip(_MODULES, counts):
                share = shares.share(f"{name}.{part}.out_proj")
                units[f"{name}.{part}"] = largest(share, count)
            values = [shares.share(f"{name}.{part}.out_proj") for part in _ATTENTIONS]
            share = sum(v.view(old.heads, -1).sum(1) for v in values)
            share[0] = float("inf")  # the nonlinear attention uses its weights too
            units[name + HEADS] = largest(share, new.heads)
    joined = shares.share("joiner.output_linear")
    if joined is not None:
        units["joiner"] = largest(joined, int(student["joiner_dim"]))
        share = shares.share("joiner.decoder_proj")
        conv = getattr(getattr(model.decoder, "conv", None), "weight", None)
        group = 1 if conv is None else conv.size(1)  # channels that are read together
        share = share.view(-1, group).sum(1)
        groups = torch.tensor(largest(share, int(student["decoder_dim"]) // group))
        channels = groups.unsqueeze(1) * group + torch.arange(group)
        units["decoder"] = channels.flatten().tolist()
    if "embed_channels" in student:
        units.update(select_front(shares.share, embed_channels(student)))
    return units


def num_passes(
    teacher: Dict[str, Any],
    student: Dict[str, Any],
    num_batches: int,
    layers: bool = True,
    channels: bool = True,
) -> int:
    """How often :func:`select_important` runs the teacher on a batch.

    Args:
      teacher, student, layers, channels: As in :func:`select_important`.
      num_batches: The number of its batches.
    """
    stacks = zip(
        per_stack(teacher, "num_encoder_layers"),
        per_stack(student, "num_encoder_layers"),
    )
    tries = 1 + sum(sum(range(new + 1, old + 1)) for old, new in stacks)
    return num_batches * (tries * layers + channels)


def select_important(
    model: nn.Module,
    teacher: Dict[str, Any],
    student: Dict[str, Any],
    batches: Sequence[FeatureBatch],
    layers: bool = True,
    channels: bool = True,
    advance: Callable[[], Any] = lambda: None,
) -> Selection:
    """Select what matters most in a teacher, measured on some cuts.

    Layers are removed one after the other: in each stack the one without which the
    encoder's output x changes least, by the sum over frames of ||x - x'||^2, while all
    other stacks are complete. Channels of the residual stream, hidden units and whole
    heads are ranked by their share in the output of the matrices that read them,
    E[x_c^2] ||W_c||^2; all stacks share one set of channels. The scales of BiasNorm are
    shifted so that on average they stay the teacher's.

    Args:
      model: The teacher.
      teacher: Its settings, by the names of the recipe's params.
      student: The student's settings, no wider and no deeper.
      batches: Features (N, T, F), lengths (N,) in feature frames, and token ids, which
        the channels of joiner and decoder need; without them (None) the first of those
        are taken.
      layers: Whether to select layers by importance; else they are evenly spaced.
      channels: Whether to select channels, heads and hidden units by importance; else
        the first are taken.
      advance: A function that is called after each pass over a batch.
    """
    selection = select_first(teacher, student)
    if layers:
        depths = per_stack(student, "num_encoder_layers")
        selection.layers = _select_layers(model, batches, depths, advance)
    if channels:
        shares = _measure_shares(model, batches, advance)
        selection.stream = _select_stream(shares, model, teacher, student)
        selection.units = _select_units(shares, model, teacher, student)
        selection.norm_shifts = _norm_shifts(shares, model, student, selection.stream)
    return selection

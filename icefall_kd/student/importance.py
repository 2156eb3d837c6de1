"""How much a teacher's layers, channels, heads and hidden units matter, measured."""

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
from icefall_kd.student.keep import HEADS, Kept, keep_first
from icefall_kd.student.presets import per_stack
from icefall_kd.tap import ModelTap

# Features (N, T, F), their lengths (N,), and the labels of each utterance or None.
Batch = Tuple[torch.Tensor, torch.Tensor, Optional[Sequence[Sequence[int]]]]
_MODULES = (
    "feed_forward1",
    "feed_forward2",
    "feed_forward3",
    "conv_module1",
    "conv_module2",
    "nonlin_attention",
)
_ATTENTIONS = ("self_attn1", "self_attn2")
# What reads the encoder's output, and what else the transducer reads.
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
    """Of each stack its layers and their names."""
    found: List[List[Tuple[str, nn.Module]]] = []
    for i, stack in enumerate(model.encoder.encoders):
        inner = getattr(stack, "encoder", None)
        prefix = f"encoder.encoders.{i}" + (".encoder" if inner is not None else "")
        layers = (inner if inner is not None else stack).layers
        found.append([(f"{prefix}.layers.{j}", m) for j, m in enumerate(layers)])
    return found


@contextmanager
def _bypassed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let these layers hand their input on as it is."""
    handles = [m.register_forward_hook(lambda m, args, out: args[0]) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_layers(
    model: nn.Module,
    batches: Sequence[Batch],
    stacks: Sequence[int],
    advance: Callable[[], Any],
) -> List[List[int]]:
    """Of each stack the layers that stay, so many as ``stacks`` says."""
    with ModelTap(model, ctc=False) as hook:

        def outputs() -> List[torch.Tensor]:
            found = []
            for x, x_lens, _ in batches:
                out = hook.encode(x, x_lens)
                frames = torch.arange(out.encoder_out.size(1), device=x.device)
                valid = frames < out.encoder_out_lens.unsqueeze(1)
                found.append(out.encoder_out[valid].float())
                advance()
            return found

        whole = outputs()
        kept = []
        for stack, keep in zip(encoder_layers(model), stacks):
            left = list(range(len(stack)))
            while len(left) > keep:
                damage = {}
                gone = [m for k, (_, m) in enumerate(stack) if k not in left]
                for j in left:
                    with _bypassed([*gone, stack[j][1]]):
                        pairs = zip(whole, outputs())
                        damage[j] = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
                left.remove(min(left, key=damage.__getitem__))
            kept.append(left)
    return kept


class _Shares:
    """Of matrices y = W x, the share of each x_c in what comes out.

    E[x_c^2] ||W_c||^2, W_c the column that reads x_c, over the sum of that over all c:
    the norms of activation and weight together, as Wanda (Sun et al.,
    arXiv:2306.11695) takes them of single weights.
    """

    def __init__(self) -> None:
        self.squares: Dict[str, torch.Tensor] = {}
        self.matrices: Dict[str, torch.Tensor] = {}
        self.handles: List[Any] = []

    def tap(self, name: str, module: nn.Module) -> None:
        """Listen to what a matrix reads; of a BiasNorm, to what it measures, x - b."""
        activation = _ACTIVATIONS.get(getattr(module, "activation", ""))
        is_norm = not hasattr(module, "weight")
        if not is_norm:
            self.matrices[name] = module.weight

        def hook(module, args):
            x = args[0].detach().float()
            if is_norm:
                x = x - module.bias.detach().float()
            x = activation(x) if activation else x
            self.squares[name] = self.squares.get(name, 0) + (x**2).flatten(
                0, -2
            ).sum(0, dtype=torch.float64)

        self.handles.append(module.register_forward_pre_hook(hook))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def of(self, name: str) -> Optional[torch.Tensor]:
        """(C,), of sum 1; None where the matrix was not asked."""
        if name not in self.squares:
            return None
        columns = (self.matrices[name].detach().double() ** 2).sum(0)
        share = (self.squares[name] * columns).cpu()
        return share / share.sum().clamp(min=1e-300)


def _each(batch: Batch) -> Iterator[Batch]:
    """The utterances one by one: in a batch the matrices read its padding too."""
    x, x_lens, y = batch
    for i, n in enumerate(x_lens.tolist()):
        yield x[i : i + 1, :n], x_lens[i : i + 1], None if y is None else [y[i]]


def _listen(model: nn.Module, batches: Sequence[Batch], advance: Callable) -> _Shares:
    """Let the teacher hear the batches, and all its matrices tapped."""
    shares = _Shares()
    modules = dict(model.named_modules())
    transducer = isinstance(modules.get("joiner.output_linear"), nn.Linear)
    try:
        for layers in encoder_layers(model):
            for name, layer in layers:
                for part in (*_MODULES, *_ATTENTIONS):
                    for end in ("in_proj", "out_proj"):
                        module = layer.get_submodule(f"{part}.{end}")
                        shares.tap(f"{name}.{part}.{end}", module)
                for part in ("self_attn_weights.in_proj", "norm"):
                    shares.tap(f"{name}.{part}", layer.get_submodule(part))
        for name in (*_READERS, *_TRANSDUCER):
            if isinstance(modules.get(name), nn.Linear):
                shares.tap(name, modules[name])
        shares.tap(_FRONT_NORM, modules[_FRONT_NORM])
        with ModelTap(model, ctc="ctc_output.1" in shares.matrices) as hook:
            for batch in batches:
                for x, x_lens, y in _each(batch):
                    out = hook.encode(x, x_lens)
                    if transducer and y is not None:
                        hook.lattice(out, y)
                advance()
    finally:
        shares.close()
    return shares


def _keep_stream(
    shares: _Shares, model: nn.Module, teacher: Dict[str, Any], student: Dict[str, Any]
) -> List[int]:
    """The channels of the residual stream that the student keeps.

    All stacks share one stream: a stack of width w takes the first w channels of the
    one before, or fills up with zeros. So the student's channel j is one and the same
    of the teacher's in all stacks that have it, and lies within the teacher's width in
    each of them. From the narrowest stack on, those are taken whose share is the
    largest in the mean over all matrices that read them in the stacks concerned.
    """
    found: List[torch.Tensor] = []
    for layers in encoder_layers(model):
        parts = (*_MODULES, *_ATTENTIONS, "self_attn_weights")
        read = [shares.of(f"{name}.{p}.in_proj") for name, _ in layers for p in parts]
        found.append(torch.stack(read).mean(0))
    heads = [shares.of(name) for name in _READERS]
    heads = [share for share in heads if share is not None]
    widths = per_stack(student, "encoder_dim")
    limits = per_stack(teacher, "encoder_dim")
    order: List[int] = []
    for width in sorted(set(widths)):
        stacks = [i for i, w in enumerate(widths) if w >= width]
        limit = min(limits[i] for i in stacks)
        share = sum((found[i][:limit] for i in stacks), torch.zeros(limit).double())
        if heads:
            share = share + torch.stack(heads).mean(0)[:limit]
        share[[c for c in order if c < limit]] = -1.0
        order += sorted(share.topk(width - len(order)).indices.tolist())
    return order


def _norm_shifts(
    shares: _Shares, model: nn.Module, student: Dict[str, Any], stream: List[int]
) -> Dict[str, float]:
    """What brings each BiasNorm's scale to the teacher's in the mean.

    BiasNorm divides by the root of the mean over channels of (x - b)^2; over the kept
    channels that mean is r times what it was, and 1/2 log r goes to its log-scale.
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


def _best(share: torch.Tensor, n: int) -> List[int]:
    return sorted(share.topk(n).indices.tolist())


def _keep_units(
    shares: _Shares, model: nn.Module, teacher: Dict[str, Any], student: Dict[str, Any]
) -> Dict[str, List[int]]:
    """Of each module the hidden units, of each layer the heads that are kept."""
    kept: Dict[str, List[int]] = {}
    sizes = zip(stacks_of(teacher), stacks_of(student))
    for layers, (old, new) in zip(encoder_layers(model), sizes):
        for name, _ in layers:
            for part, n in zip(_MODULES, (*new.hidden, new.dim, new.dim, new.nonlin)):
                kept[f"{name}.{part}"] = _best(shares.of(f"{name}.{part}.out_proj"), n)
            values = [shares.of(f"{name}.{part}.out_proj") for part in _ATTENTIONS]
            share = sum(v.view(old.heads, -1).sum(1) for v in values)
            share[0] = float("inf")  # whose weights the nonlinear attention takes too
            kept[name + HEADS] = _best(share, new.heads)
    joined = shares.of("joiner.output_linear")
    if joined is not None:
        kept["joiner"] = _best(joined, int(student["joiner_dim"]))
        share = shares.of("joiner.decoder_proj")
        conv = getattr(getattr(model.decoder, "conv", None), "weight", None)
        group = 1 if conv is None else conv.size(1)  # channels that are read together
        share = share.view(-1, group).sum(1)
        groups = torch.tensor(_best(share, int(student["decoder_dim"]) // group))
        channels = groups.unsqueeze(1) * group + torch.arange(group)
        kept["decoder"] = channels.flatten().tolist()
    return kept


def num_passes(
    teacher: Dict[str, Any],
    student: Dict[str, Any],
    num_batches: int,
    layers: bool = True,
    channels: bool = True,
) -> int:
    """How often :func:`keep_important` lets the teacher hear a batch."""
    stacks = zip(
        per_stack(teacher, "num_encoder_layers"),
        per_stack(student, "num_encoder_layers"),
    )
    tries = 1 + sum(sum(range(b + 1, a + 1)) for a, b in stacks)
    return num_batches * (tries * layers + channels)


def keep_important(
    model: nn.Module,
    teacher: Dict[str, Any],
    student: Dict[str, Any],
    batches: Sequence[Batch],
    layers: bool = True,
    channels: bool = True,
    advance: Callable[[], Any] = lambda: None,
) -> Kept:
    """What a student keeps of its teacher by importance, measured on some cuts.

    Layers go one after the other: of those left in a stack, the one without which the
    encoder's output x changes least, by the sum over frames of ||x - x'||^2, all other
    stacks being whole. Channels of the residual stream, hidden units and whole heads
    are kept by their share in what the matrices that read them give out,
    E[x_c^2] ||W_c||^2; one set of channels along the residual stream. The scales of
    BiasNorm are set so that they stay the teacher's in the mean.

    Args:
      model: The teacher.
      teacher: Its settings.
      student: The student's, no wider and no deeper.
      batches: What the teacher hears: features (N, T, F), lengths (N,), and labels, by
        which the joiner's and the decoder's channels are measured; without them (None)
        the first of those are kept.
      layers: Whether to choose the layers; else they are evenly spaced.
      channels: Whether to choose all the others; else the first are kept.
      advance: Called after each pass over a batch.
    """
    kept = keep_first(teacher, student)
    if layers:
        stacks = per_stack(student, "num_encoder_layers")
        kept.layers = _keep_layers(model, batches, stacks, advance)
    if channels:
        shares = _listen(model, batches, advance)
        kept.stream = _keep_stream(shares, model, teacher, student)
        kept.units = _keep_units(shares, model, teacher, student)
        kept.norms = _norm_shifts(shares, model, student, kept.stream)
    return kept

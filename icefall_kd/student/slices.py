"""Cuts a student's parameters out of its teacher's."""

import re
from typing import Any, Dict, Optional, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.student.presets import per_stack
from icefall_kd.student.selection import CONVNEXT, FRONT_CONVS, HEADS, Selection

# A layer of a stack, with or without the wrapper that downsamples.
_LAYER = re.compile(r"^(encoder\.encoders\.(\d+)\.(?:encoder\.)?layers\.)(\d+)\.(.*)$")

# What a dimension of a parameter stands for: the residual stream; a module's hidden
# units; a layer's heads, with their query, key, position or value channels; or the
# last channels of the front end, with their frequencies. None: it is as large in the
# student.
Axis = Optional[Tuple[str, ...]]
_STREAM: Axis = ("stream",)
_JOINER: Axis = ("units", "joiner")
_DECODER: Axis = ("units", "decoder")
_FRONT_1, _FRONT_2, _FRONT_3 = (("units", name) for name in FRONT_CONVS)
_FRONT_HIDDEN: Axis = ("units", CONVNEXT)
_FRONT_OUT: Axis = ("frequencies", FRONT_CONVS[-1])
# Projections whose rows are several blocks of hidden units.
_BLOCKS = {
    "conv_module1.in_proj": 2,
    "conv_module2.in_proj": 2,
    "nonlin_attention.in_proj": 3,
}
_HEADS = {
    "self_attn_weights.in_proj": ("query_head_dim", "query_head_dim", "pos_head_dim"),
    "self_attn_weights.linear_pos": ("pos_head_dim",),
    "self_attn1": ("value_head_dim",),
    "self_attn2": ("value_head_dim",),
}
_REST: Dict[str, Tuple[Axis, ...]] = {
    "encoder_embed.conv.0.weight": (_FRONT_1,),
    "encoder_embed.conv.0.bias": (_FRONT_1,),
    "encoder_embed.conv.4.weight": (_FRONT_2, _FRONT_1),
    "encoder_embed.conv.4.bias": (_FRONT_2,),
    "encoder_embed.conv.7.weight": (_FRONT_3, _FRONT_2),
    "encoder_embed.conv.7.bias": (_FRONT_3,),
    "encoder_embed.convnext.depthwise_conv.weight": (_FRONT_3,),
    "encoder_embed.convnext.depthwise_conv.bias": (_FRONT_3,),
    "encoder_embed.convnext.pointwise_conv1.weight": (_FRONT_HIDDEN, _FRONT_3),
    "encoder_embed.convnext.pointwise_conv1.bias": (_FRONT_HIDDEN,),
    "encoder_embed.convnext.pointwise_conv2.weight": (_FRONT_3, _FRONT_HIDDEN),
    "encoder_embed.convnext.pointwise_conv2.bias": (_FRONT_3,),
    "encoder_embed.out.weight": (_STREAM, _FRONT_OUT),
    "encoder_embed.out.bias": (_STREAM,),
    "encoder_embed.out_norm.bias": (_STREAM,),
    "simple_am_proj.weight": (None, _STREAM),
    "simple_lm_proj.weight": (None, _DECODER),
    "ctc_output.1.weight": (None, _STREAM),
    "joiner.encoder_proj.weight": (_JOINER, _STREAM),
    "joiner.encoder_proj.bias": (_JOINER,),
    "joiner.decoder_proj.weight": (_JOINER, _DECODER),
    "joiner.decoder_proj.bias": (_JOINER,),
    "joiner.output_linear.weight": (None, _JOINER),
    "decoder.embedding.weight": (None, _DECODER),
    "decoder.conv.weight": (_DECODER,),
}


def _layer_axes(part: str) -> Tuple[Axis, ...]:
    """What the dimensions of a layer's parameter stand for."""
    module, _, leaf = part.rpartition(".")
    owner = module.split(".")[0]
    if owner == "norm" or leaf == "bypass_scale":
        return (_STREAM,)
    heads = _HEADS.get(module) or _HEADS.get(owner)
    rows: Axis = ("heads", *heads) if heads else ("units", owner)
    if leaf == "chunkwise_conv_scale":
        return (None, rows)
    if leaf not in ("weight", "bias"):
        return ()
    if module.endswith("out_proj"):
        return (_STREAM, rows) if leaf == "weight" else (_STREAM,)
    if module.endswith("linear_pos") or "depthwise_conv" in module:
        return (rows,)
    return (rows, _STREAM) if leaf == "weight" else (rows,)


class Slicer:
    """Cuts the parameters of a student out of its teacher's.

    Args:
      source: The teacher's ``state_dict``.
      selection: The layers, channels and units that the student takes.
      teacher: The teacher's settings.
      student: The student's settings.
    """

    def __init__(
        self,
        source: Dict[str, torch.Tensor],
        selection: Selection,
        teacher: Dict[str, Any],
        student: Dict[str, Any],
    ) -> None:
        self.source, self.selection = source, selection
        self.teacher, self.student = teacher, student

    def __call__(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Cut out one parameter of the student.

        Args:
          name: The student's parameter.
          shape: Its shape.

        Returns:
          A tensor of ``shape`` and of the teacher's dtype.

        Raises:
          KDError: a parameter that the teacher lacks, that is larger in the student, or
            that can't be cut.
        """
        origin, axes = name, _REST.get(name, ())
        stack, layer = 0, ""
        match = _LAYER.match(name)
        if match:
            stack = int(match.group(2))
            layer = (
                f"{match.group(1)}{self.selection.layers[stack][int(match.group(3))]}"
            )
            origin, axes = f"{layer}.{match.group(4)}", _layer_axes(match.group(4))
        elif name.endswith("out_combiner.bypass_scale"):
            axes = (_STREAM,)
        if origin not in self.source:
            raise KDError(
                f"the teacher has no parameter {origin} for the student's {name}: "
                "give the student the teacher's heads, or `init` random"
            )
        value = self.source[origin]
        if value.ndim != len(shape) or any(a < b for a, b in zip(value.shape, shape)):
            raise KDError(
                f"the student's {name} has shape {tuple(shape)} and its teacher's only "
                f"{tuple(value.shape)}: a student that starts from its teacher can't "
                "be wider; lower its `changes`, or give `init` random"
            )
        for dim, axis in enumerate(axes[: value.ndim]):
            if axis is not None:
                index = self._index(axis, origin, stack, layer, shape[dim])
                value = value.index_select(dim, index.to(value.device))
        if value.shape != shape or (not axes and self._needs_rule(name, bool(layer))):
            raise KDError(
                f"the student's {name} has shape {tuple(shape)} and its teacher's "
                f"{tuple(value.shape)}, and no rule says which of its numbers to take: "
                "keep its size, and the first channels of the encoder, or give "
                "`init` random"
            )
        norm, _, leaf = origin.rpartition(".")
        if leaf == "log_scale":
            return value + self.selection.norm_shifts.get(norm, 0.0)
        return value.clone()

    def _needs_rule(self, name: str, in_layer: bool) -> bool:
        """Whether a parameter without a rule may belong to channels that were selected.

        Outside the layers, icefall's own parameters without a rule read no channels,
        such as the bias of the logits.
        """
        icefall = ("encoder_embed.", "encoder.", "decoder.", "joiner.", "ctc_output.")
        simple = ("simple_am_proj.", "simple_lm_proj.")
        if name.startswith(icefall + simple) and not in_layer:
            return False
        stream = self.selection.stream
        reordered = stream != list(range(len(stream)))
        return reordered or (in_layer and bool(self.selection.units))

    def _index(
        self, axis: Tuple[str, ...], name: str, stack: int, layer: str, n: int
    ) -> torch.Tensor:
        """The teacher's indices along an axis that are the student's ``n``, (n,)."""
        if axis == _STREAM:
            return torch.tensor(self.selection.stream[:n])
        if axis[0] == "heads":
            return self._heads(axis[1:], stack, layer)
        if axis[0] == "frequencies":
            return self._frequencies(axis[1], self.source[name].size(1), n)
        if not layer:
            return self.selection.indices(axis[1], n)
        owner = f"{layer}.{axis[1]}"
        blocks = _BLOCKS.get(name[len(layer) + 1 :].rpartition(".")[0], 1)
        units = self.selection.indices(owner, n // blocks)
        size = self.source[name].size(0) // blocks
        return torch.cat([units + b * size for b in range(blocks)])

    def _frequencies(self, conv: str, old: int, n: int) -> torch.Tensor:
        """Indices of the selected channels' frequencies, a block for each channel.

        A front end without the convolution ``conv`` is not icefall's: one block.
        """
        width = old // len(self.source.get(f"{conv}.bias", [0]))
        channels = self.selection.indices(conv, n // width).unsqueeze(1)
        return (channels * width + torch.arange(width)).flatten()

    def _heads(self, dims: Tuple[str, ...], stack: int, layer: str) -> torch.Tensor:
        """Indices of the selected heads' channels, a block for each of ``dims``."""
        old, new = (
            per_stack(s, "num_heads")[stack] for s in (self.teacher, self.student)
        )
        heads = self.selection.indices(layer + HEADS, new)
        blocks, begin = [], 0
        for dim in dims:
            width = per_stack(self.teacher, dim)[stack]
            channels = heads.unsqueeze(1) * width + torch.arange(width)
            blocks.append(begin + channels.flatten())
            begin += old * width
        return torch.cat(blocks)

"""Picks a student's numbers out of its teacher's parameters."""

import re
from typing import Any, Dict, Optional, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.student.keep import HEADS, Kept
from icefall_kd.student.presets import per_stack

# A layer of a stack, with or without the wrapper that downsamples.
_LAYER = re.compile(r"^(encoder\.encoders\.(\d+)\.(?:encoder\.)?layers\.)(\d+)\.(.*)$")

# What a dimension of a parameter stands for: the residual stream; a module's hidden
# units; or a layer's heads, with their query, key, position or value channels. None:
# it is as large in the student.
Axis = Optional[Tuple[str, ...]]
_STREAM: Axis = ("stream",)
_JOINER: Axis = ("units", "joiner")
_DECODER: Axis = ("units", "decoder")
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
    "encoder_embed.out.weight": (_STREAM,),
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
    """The parameters of a student, cut out of its teacher's.

    Args:
      source: The teacher's ``state_dict``.
      kept: What the student takes.
      teacher: The teacher's settings.
      student: The student's.
    """

    def __init__(
        self,
        source: Dict[str, torch.Tensor],
        kept: Kept,
        teacher: Dict[str, Any],
        student: Dict[str, Any],
    ) -> None:
        self.source, self.kept = source, kept
        self.teacher, self.student = teacher, student

    def __call__(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The student's parameter ``name``, which is to have ``shape``.

        Raises:
          KDError: a parameter that the teacher lacks, that is larger in the student, or
            that can't be cut.
        """
        origin, axes = name, _REST.get(name, ())
        stack, layer = 0, ""
        match = _LAYER.match(name)
        if match:
            stack = int(match.group(2))
            layer = f"{match.group(1)}{self.kept.layers[stack][int(match.group(3))]}"
            origin, axes = f"{layer}.{match.group(4)}", _layer_axes(match.group(4))
        elif name.endswith("out_combiner.bypass_scale"):
            axes = (_STREAM,)
        if origin not in self.source:
            raise KDError(
                f"the teacher has no parameter {origin} for the student's {name}: "
                "give the student the teacher's heads, or --init random"
            )
        value = self.source[origin]
        if value.ndim != len(shape) or any(a < b for a, b in zip(value.shape, shape)):
            raise KDError(
                f"the student's {name} has shape {tuple(shape)} and its teacher's only "
                f"{tuple(value.shape)}: a student that starts from its teacher can't "
                "be wider; lower its --set values, or give --init random"
            )
        for dim, axis in enumerate(axes[: value.ndim]):
            if axis is not None:
                index = self._index(axis, origin, stack, layer, shape[dim])
                value = value.index_select(dim, index.to(value.device))
        if value.shape != shape or (not axes and self._moved(name, bool(layer))):
            raise KDError(
                f"the student's {name} has shape {tuple(shape)} and its teacher's "
                f"{tuple(value.shape)}, and no rule says which of its numbers to take: "
                "keep its size, and the first channels of the encoder, or give "
                "--init random"
            )
        norm, _, leaf = origin.rpartition(".")
        if leaf == "log_scale":
            return value + self.kept.norms.get(norm, 0.0)
        return value.clone()

    def _moved(self, name: str, in_layer: bool) -> bool:
        """Whether a parameter without a rule may find other channels than it knows."""
        ours = ("encoder_embed.", "encoder.", "decoder.", "joiner.", "ctc_output.")
        simple = ("simple_am_proj.", "simple_lm_proj.")
        if name.startswith(ours + simple) and not in_layer:
            return False  # one that reads no channels, such as the bias of the logits
        moved = self.kept.stream != list(range(len(self.kept.stream)))
        return moved or (in_layer and bool(self.kept.units))

    def _index(
        self, axis: Tuple[str, ...], name: str, stack: int, layer: str, n: int
    ) -> torch.Tensor:
        """Which of the teacher's numbers along an axis are the student's ``n``."""
        if axis == _STREAM:
            return torch.tensor(self.kept.stream[:n])
        if axis[0] == "heads":
            return self._heads(axis[1:], stack, layer)
        if not layer:
            return self.kept.of(axis[1], n)
        owner = f"{layer}.{axis[1]}"
        blocks = _BLOCKS.get(name[len(layer) + 1 :].rpartition(".")[0], 1)
        units = self.kept.of(owner, n // blocks)
        size = self.source[name].size(0) // blocks
        return torch.cat([units + b * size for b in range(blocks)])

    def _heads(self, dims: Tuple[str, ...], stack: int, layer: str) -> torch.Tensor:
        heads = per_stack(self.teacher, "num_heads")[stack]
        kept = self.kept.of(layer + HEADS, per_stack(self.student, "num_heads")[stack])
        index, begin = [], 0
        for dim in dims:
            width = per_stack(self.teacher, dim)[stack]
            channels = kept.unsqueeze(1) * width + torch.arange(width)
            index.append(begin + channels.flatten())
            begin += heads * width
        return torch.cat(index)

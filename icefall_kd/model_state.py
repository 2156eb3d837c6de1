"""How a recipe's model runs beside its training: nothing of it stays changed."""

import random
from contextlib import contextmanager
from typing import Iterator, Sequence

import torch
from torch import nn


@contextmanager
def restoring_state(model: nn.Module) -> Iterator[None]:
    """Restore training flags, chunk sizes and random states at the end.

    Meanwhile a causal model, which draws a chunk size and a left context at each pass,
    has the widest of them.

    Args:
      model: A recipe's model.
    """
    flags = [(module, module.training) for module in model.modules()]
    random_state = random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    encoder = model.encoder
    chunk_size = getattr(encoder, "chunk_size", None)
    left_context = getattr(encoder, "left_context_frames", None)
    try:
        with torch.random.fork_rng(devices=[d.index for d in devices]):
            if isinstance(chunk_size, (tuple, list)):
                encoder.chunk_size = (_widest(chunk_size),)
            if isinstance(left_context, (tuple, list)):
                encoder.left_context_frames = (_widest(left_context),)
            yield
    finally:
        random.setstate(random_state)
        if chunk_size is not None:
            encoder.chunk_size = chunk_size
        if left_context is not None:
            encoder.left_context_frames = left_context
        for module, training in flags:
            module.training = training


def _widest(sizes: Sequence[int]) -> int:
    return -1 if -1 in sizes else max(sizes)  # -1: unlimited


@contextmanager
def as_if_alone(model: nn.Module, lens: torch.Tensor) -> Iterator[None]:
    """Let the output of each utterance of a batch be what it would be without others.

    Zipformer lets padding reach valid frames in two places: the ConvNeXt layer of its
    front end sees three frames on, and where a stack's length is no multiple of its
    downsampling the last group takes in padding. Without other utterances, there are
    zeros in the first place and copies of the last frame in the second.

    Args:
      model: A recipe's model.
      lens: (N,), valid stack frames.
    """

    def zero_padding(module, args):
        x = args[0]  # (N, C, stack frames, F)
        frames = torch.arange(x.size(2), device=x.device)
        padding = frames >= lens.to(x.device).unsqueeze(1)
        return (x.masked_fill(padding[:, None, :, None], 0.0), *args[1:])

    def repeat_last_frame(module, args):
        x = args[0]  # (stack frames, N, C)
        frames = torch.arange(x.size(0), device=x.device).unsqueeze(1)
        index = torch.minimum(frames, lens.to(x.device).unsqueeze(0) - 1)
        return (x.gather(0, index.unsqueeze(-1).expand_as(x)), *args[1:])

    front_end = getattr(model, "encoder_embed", None)
    hooks = [(getattr(front_end, "convnext", None), zero_padding)]
    hooks.append((getattr(model.encoder, "downsample_output", None), repeat_last_frame))
    for stack in getattr(model.encoder, "encoders", []):
        hooks.append((getattr(stack, "downsample", None), repeat_last_frame))
    handles = [
        module.register_forward_pre_hook(hook)
        for module, hook in hooks
        if isinstance(module, nn.Module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

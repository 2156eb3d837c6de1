"""A causal model's encoder, chunk by chunk, with the states of its layers carried.

Its output is that of the whole utterance under the chunk mask: icefall's simulation of
streaming (``--causal 1 --chunk-size C --left-context-frames L`` of its decode.py). Of
icefall's ``streaming_decode.py`` it differs at the end alone: that one appends silence.
"""

from contextlib import contextmanager
from typing import Iterator, List, Optional

import torch
from torch import nn

from icefall_kd.decode.frames import Frames, widest
from icefall_kd.decode.windows import Features, checked
from icefall_kd.errors import require
from icefall_kd.tap import as_if_alone


class StreamingEncoder:
    """Encodes a recording of any length with a causal model.

    Features that need the mean of the utterance are not for streaming: that mean is
    known at the end.

    Args:
      model: A recipe's model that was trained with ``causal``, in eval mode.
      chunk_size: Stack frames (50 Hz) in a chunk; None: the model's only one.
      left_context_frames: Stack frames before a chunk that it attends to, a multiple of
        ``chunk_size``; None: the model's only number.

    Raises:
      KDError: The model is not causal, or a number does not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        chunk_size: Optional[int] = None,
        left_context_frames: Optional[int] = None,
    ) -> None:
        frames, encoder = Frames(model), model.encoder
        require(
            getattr(encoder, "causal", False),
            f"the model {type(model).__name__} is not causal, and cannot be streamed: "
            "train it with `causal` 1, or decode in windows",
        )
        if chunk_size is None:
            chunk_size = widest(encoder.chunk_size)
        if left_context_frames is None:
            left_context_frames = widest(encoder.left_context_frames)
        # Not Frames.least_common, which has the model's own chunks in it.
        factors = [int(n) for n in (*encoder.downsampling_factor, frames.out_factor)]
        require(
            chunk_size > 0 and all(chunk_size % n == 0 for n in factors),
            f"`chunk_size` is {chunk_size}, and the encoder downsamples by "
            f"{', '.join(map(str, sorted(set(factors))))}: give a multiple of all",
        )
        pairs = zip(encoder.cnn_module_kernel, encoder.downsampling_factor)
        least = max(int(kernel) // 2 * int(factor) for kernel, factor in pairs)
        require(
            left_context_frames >= least and left_context_frames % chunk_size == 0,
            f"`left_context_frames` is {left_context_frames}: give a multiple of "
            f"`chunk_size` {chunk_size}, {least} or more",
        )
        self.model, self.frames = model, frames
        self.chunk_size, self.left_context_frames = chunk_size, left_context_frames
        # The ConvNeXt layer sees this many stack frames on.
        self.look_ahead = int(model.encoder_embed.convnext.padding[0])

    @torch.no_grad()
    def __call__(self, features: Features) -> Iterator[torch.Tensor]:
        """Yield the encoder output of a recording, chunk by chunk.

        Args:
          features: (T, F), or chunks of it of any size.

        Yields:
          (1, T, C) each.

        Raises:
          KDError: The recording is shorter than one frame, or a feature not finite.
        """
        model, kernel = self.model, self.frames.kernel
        stride, size = self.frames.front_stride, self.chunk_size
        needed = stride * (size + self.look_ahead - 1) + kernel  # feature frames
        device = next(model.encoder.parameters()).device
        with self._chunks():
            states = model.encoder.get_init_states(1, device)
        states.append(model.encoder_embed.get_init_states(1, device))
        processed, rest = 0, None  # stack frames, and feature frames ahead of them
        for chunk in checked(features):
            chunk = chunk.to(device)
            rest = chunk if rest is None else torch.cat((rest, chunk))
            while len(rest) >= needed:
                yield self._encode(rest[:needed], states, processed, size)
                processed, rest = processed + size, rest[stride * size :]
        total = 0 if rest is None else len(rest)
        require(
            processed or total >= kernel,
            f"the recording has {total} feature frames and the encoder needs {kernel} "
            "for one frame of output: leave it out",
        )
        left = (total - kernel) // stride + 1 if total >= kernel else 0
        while left > 0:
            valid = min(left, size)
            yield self._encode(rest[:needed], states, processed, valid)
            rest = rest[stride * size :]
            processed, left = processed + valid, left - valid

    @contextmanager
    def _chunks(self) -> Iterator[None]:
        """Give the encoder the numbers of this object meanwhile."""
        encoder = self.model.encoder
        before = encoder.chunk_size, encoder.left_context_frames
        encoder.chunk_size = (self.chunk_size,)
        encoder.left_context_frames = (self.left_context_frames,)
        try:
            yield
        finally:
            encoder.chunk_size, encoder.left_context_frames = before

    def _encode(
        self, x: torch.Tensor, states: List[torch.Tensor], processed: int, valid: int
    ) -> torch.Tensor:
        """Return the output of a chunk, and replace the states.

        Args:
          x: (T, F), the features of the chunk and of what it looks ahead; fewer at the
            end of the recording.
          states: Of the encoder's layers and at last the front end's.
          processed: Stack frames before this chunk.
          valid: Stack frames in it; fewer than ``chunk_size`` at the end.

        Returns:
          (1, T, C).
        """
        model, frames = self.model, self.frames
        stride, kernel = frames.front_stride, frames.kernel
        # Convolutions scale the edges of a chunk. So the last one keeps its size, and
        # what lies behind the end is masked. An utterance shorter than one chunk is the
        # exception: its length is the size of its chunk.
        size = self.chunk_size if processed else valid
        ahead = min(max(0, (len(x) - kernel) // stride + 1), size + self.look_ahead)
        needed = stride * (size + self.look_ahead - 1) + kernel
        x = nn.functional.pad(x, (0, 0, 0, needed - len(x))).unsqueeze(0)
        lens = torch.tensor([valid], device=x.device)

        def zero_behind_end(module, args, output):  # (1, C, stack frames, F)
            behind = output.size(2) - ahead
            return nn.functional.pad(output[:, :, :ahead], (0, 0, 0, behind))

        before = torch.arange(self.left_context_frames, 0, -1, device=x.device)
        here = torch.arange(size, device=x.device)
        padding = torch.cat((before > processed, here >= valid)).unsqueeze(0)
        hook = model.encoder_embed.conv.register_forward_hook(zero_behind_end)
        try:
            with self._chunks(), as_if_alone(model, lens):
                x, _, states[-1] = model.encoder_embed.streaming_forward(
                    x, torch.tensor([needed], device=x.device), states[-1]
                )
                out, _, states[:-1] = model.encoder.streaming_forward(
                    x.transpose(0, 1), lens, states[:-1], padding
                )
        finally:
            hook.remove()
        return out.transpose(0, 1)[:, : -(-valid // frames.out_factor)]

"""Recordings of any length: windows with overlap, each encoded once, searched once.

Encoder output is made piece by piece, and a search goes on from piece to piece, so no
word is doubled or lost where two windows meet, and memory does not grow with the
recording::

    encoder = WindowedEncoder(model)
    for result in search_pieces(GreedySearch(model), encoder(features)):
        ...                                     # what is known so far
    result.hypotheses[0]                        # of the whole recording

``features`` is a tensor, or an iterable of tensors that is read as they are needed,
such as :func:`icefall_kd.decode.recording.feature_chunks` makes of audio.
"""

import math
from typing import Any, Iterable, Iterator, List, NamedTuple, Union

import torch
from torch import nn

from icefall_kd.decode.beam import BeamSearch
from icefall_kd.decode.frames import FEATURE_FRAMES, Frames
from icefall_kd.decode.types import SearchReport, SearchResult
from icefall_kd.errors import NotFiniteError, require
from icefall_kd.tap import ModelTap

# Measured with benchmarks/long_audio.py: windows of 16 and 24 s cost more, as attention
# grows with their square, and lost no fewer words; without overlap more were lost.
WINDOW, OVERLAP = 8.0, 0.8  # seconds

Features = Union[torch.Tensor, Iterable[torch.Tensor]]  # (T, F), or chunks of it


class Stretch(NamedTuple):
    """Neighbouring rows with overlap, as :func:`overlapping` cuts them out."""

    rows: Any  # (T, ...)
    left: int  # units of overlap before those of its own
    is_last: bool


def overlapping(
    chunks: Iterable[Any], size: int, overlap: int, unit: int, overhang: int, more: int
) -> Iterator[Stretch]:
    """Cut a long tensor or array, of which chunks come, into stretches that overlap.

    A stretch has ``size`` units of its own and ``overlap`` of them at both sides. The
    first has none at its left. The last one has none at its right, and of its own up to
    ``size + overlap``.

    Args:
      chunks: Parts of the whole, (T_i, ...), one after another.
      size: Units in a stretch, without overlap.
      overlap: Units at each side, ``size`` at most.
      unit: Rows that a unit is ahead of the one before.
      overhang: Rows that a unit needs beyond these.
      more: Rows that must follow a stretch if it is not the last.
    """
    parts: List[Any] = []
    have = left = 0
    for chunk in chunks:
        parts.append(chunk)
        have += len(chunk)
        end = (left + size + overlap) * unit + overhang
        while have >= end + more:
            rows = _join(parts)
            yield Stretch(rows[:end], left, False)
            rows = rows[(left + size - overlap) * unit :]
            parts, have, left = [rows], len(rows), overlap
            end = (left + size + overlap) * unit + overhang
    if parts:
        yield Stretch(_join(parts), left, True)


def _join(parts: List[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    import numpy as np

    return np.concatenate(parts)


def checked(features: Features) -> Iterator[torch.Tensor]:
    """Yield chunks of feature frames that are finite.

    Args:
      features: (T, F), or chunks of it.

    Raises:
      KDError: Features with other dimensions, or that are not finite.
    """
    frames = 0
    for chunk in (features,) if isinstance(features, torch.Tensor) else features:
        require(
            chunk.dim() == 2,
            f"`features` has {chunk.dim()} dimensions, give it as (T, F)",
        )
        finite = torch.isfinite(chunk).all(dim=1)
        if not finite.all():
            first = frames + int(finite.logical_not().nonzero()[0])
            raise NotFiniteError(
                f"`features` are not finite at {first / FEATURE_FRAMES:.2f} s of the "
                "recording: make them again, or leave the recording out"
            )
        frames += len(chunk)
        yield chunk


class WindowedEncoder:
    """Encodes recordings of any length in windows, and joins the output.

    A recording of up to ``window + overlap`` seconds is encoded as a whole. A causal
    model with chunks needs no windows: :class:`~.streaming.StreamingEncoder` gives what
    the whole recording gives.

    Args:
      model: A recipe's model with a front end, ``encoder_embed``.
      window: Seconds that a window adds to the output.
      overlap: Seconds that a window hears before and after these; their output is
        dropped. The encoder's cost is 1 + 2 ``overlap / window`` times the least.
        Both are rounded to what the encoder's downsampling divides.
      batch_size: Windows that are encoded at once.
      mean: Seconds around a feature frame whose mean is taken off; 0: none. A recipe
        that takes off the mean of each utterance needs it: give about the length of its
        utterances, and the features as they are.

    Raises:
      KDError: A window or overlap that the encoder can't take.
    """

    def __init__(
        self,
        model: nn.Module,
        window: float = WINDOW,
        overlap: float = OVERLAP,
        batch_size: int = 1,
        mean: float = 0.0,
    ) -> None:
        self.frames = frames = Frames(model)
        require(batch_size >= 1, f"`batch_size` is {batch_size}: give 1 or more")
        require(
            0 <= overlap <= window < math.inf,
            f"`window` is {window:g} s and `overlap` {overlap:g} s: give an overlap "
            "from 0 to the window",
        )
        # Frames are cut where all stacks begin a new frame, and a chunk begins.
        seconds = frames.seconds(frames.step)
        self.window, self.overlap = (
            frames.step * round(x / seconds) for x in (window, overlap)
        )
        require(mean >= 0, f"`mean` is {mean:g} s: give 0 or more")
        require(
            self.window > 0,
            f"`window` is {window:g} s, and the least that this encoder divides is "
            f"{seconds:g} s: give that or more",
        )
        self.model, self.batch_size, self.mean = model, batch_size, mean

    @torch.no_grad()
    def __call__(self, features: Features) -> Iterator[torch.Tensor]:
        """Yield the encoder output of a recording, piece by piece.

        Args:
          features: (T, F), or chunks of it of any size.

        Yields:
          (1, T, C) each, the frames behind those of the piece before.

        Raises:
          KDError: The recording is shorter than one frame, or a feature not finite.
        """
        frames, waiting = self.frames, []
        windows = overlapping(
            checked(features), self.window, self.overlap, frames.stride,
            frames.overhang, frames.front_stride,
        )  # fmt: skip
        total = 0
        with ModelTap(self.model, with_ctc=False) as tap:
            for window in windows:
                total += len(window.rows)
                # One without overlap at a side is shorter; a batch is unpadded, as
                # padding would move the edge of a causal convolution.
                if waiting and len(window.rows) != len(waiting[0].rows):
                    yield self._encode(tap, waiting)
                    waiting = []
                waiting.append(window)
                if len(waiting) == self.batch_size:
                    yield self._encode(tap, waiting)
                    waiting = []
            if waiting:
                yield self._encode(tap, waiting)
        require(total, "the recording is empty: leave it out")

    def _encode(self, tap: ModelTap, windows: List[Stretch]) -> torch.Tensor:
        """Return (1, T, C), the output of neighbouring windows without overlap."""
        device = next(self.model.encoder.parameters()).device
        x = torch.stack(
            [mean_off(window.rows.to(device), self.mean) for window in windows]
        )
        lens = torch.full((len(x),), x.size(1), device=x.device)
        rows = []
        for out, (_, left, is_last) in zip(tap.encode(x, lens).encoder_out, windows):
            rows.append(out[left:] if is_last else out[left : left + self.window])
        return torch.cat(rows).unsqueeze(0)


def mean_off(x: torch.Tensor, seconds: float) -> torch.Tensor:
    """Return features less their mean over the seconds around each frame.

    Near the ends it is the mean of the first and the last ``seconds``, as in Kaldi's
    sliding normalisation. Of shorter features it is that of all, to the bit as numpy
    has it.

    Args:
      x: (T, F).
      seconds: 0 for none, infinity for all.
    """
    if not seconds:
        return x
    if len(x) <= seconds * FEATURE_FRAMES:
        return x - torch.from_numpy(x.cpu().numpy().mean(axis=0)).to(x)
    size = max(1, round(seconds * FEATURE_FRAMES))
    total = nn.functional.pad(x.double().cumsum(0), (0, 0, 1, 0))
    begin = (torch.arange(len(x), device=x.device) - size // 2).clamp(0, len(x) - size)
    return x - ((total[begin + size] - total[begin]) / size).to(x)


def search_pieces(
    search: Any, pieces: Iterable[torch.Tensor]
) -> Iterator[SearchResult]:
    """Search encoder output that comes piece by piece.

    Args:
      search: A :class:`GreedySearch` or :class:`BeamSearch`.
      pieces: (1, T, C) each, as an encoder of this package yields them.

    Yields:
      After each piece, what was found from the beginning, and what it cost in all. It
      is the same object each time.
    """
    whole = SearchResult([], [], SearchReport(""))
    for piece in pieces:
        lens = torch.full((1,), piece.size(1), device=piece.device)
        result = search(piece, lens, whole.states or None)
        whole.report.way = result.report.way
        whole.report.add(result.report)
        whole.states = result.states
        if not whole.hypotheses or isinstance(search, BeamSearch):
            whole.hypotheses = result.hypotheses
        else:
            so_far, more = whole.hypotheses[0], result.hypotheses[0]
            so_far.tokens += more.tokens
            so_far.frames += more.frames
            so_far.log_probs += more.log_probs
        yield whole

"""The frames of a batch, projected once, and the joiner's answers for some of them."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

from icefall_kd.decode.transducer import Context, Transducer
from icefall_kd.errors import require

# Two ways to sum the same products differ in the last bits: by less than this, in nats.
# Where two tokens are no further apart, the frame is asked alone, as icefall does.
MARGIN = 1e-4

MAX_WINDOW = 64  # frames that an utterance is asked at once

# Rows of a call of the joiner: on a CPU as many as its cache holds.
CHUNK = {"cpu": 512, "other": 32768}


class Batch:
    """The projected frames of a batch, one utterance behind the other, unpadded.

    Args:
      transducer: The model's head.
      encoder_out: (N, T, C).
      encoder_out_lens: (N,), valid frames, 0 to T.
      states: One for each utterance, or None; they are counted alone.
      blank_penalty: It is subtracted from blank's logit.

    Raises:
      KDError: A dimension or a length does not fit.
    """

    def __init__(
        self,
        transducer: Transducer,
        encoder_out: torch.Tensor,
        encoder_out_lens: torch.Tensor,
        states: Optional[Sequence[Any]] = None,
        blank_penalty: float = 0.0,
    ) -> None:
        self.lengths = checked_lengths(encoder_out, encoder_out_lens, states)
        self.transducer, self.encoder_out = transducer, encoder_out
        self.blank_penalty = blank_penalty
        self.begins: List[int] = []  # of each utterance, in the frames of all
        self.num_frames = 0
        for n in self.lengths:
            self.begins.append(self.num_frames)
            self.num_frames += n
        if all(n == encoder_out.size(1) for n in self.lengths):
            self.valid = encoder_out.flatten(0, 1)  # (sum of lengths, C)
        else:
            rows = [x[:n] for x, n in zip(encoder_out, self.lengths)]
            self.valid = torch.cat(rows)
        self.frames = transducer.project(self.valid)  # (sum of lengths, J)
        self._padded: Optional[torch.Tensor] = None
        self._windows: Dict[int, torch.Tensor] = {}
        self.chunk = CHUNK["cpu" if encoder_out.device.type == "cpu" else "other"]
        self._alone: Dict[int, torch.Tensor] = {}

    def tensor(self, values: Sequence[Any]) -> torch.Tensor:
        """Return integers as a tensor on the batch's device.

        Args:
          values: Integers, or rows of them.
        """
        device = self.encoder_out.device
        return torch.tensor(values, dtype=torch.int64, device=device)

    def ask(
        self, places: List[int], window: int, contexts: List[Context]
    ) -> torch.Tensor:
        """Return the joiner's logits (A * W, V) for windows of frames.

        Args:
          places: A places among the frames of all, where the windows begin.
          window: W, at most ``MAX_WINDOW``.
          contexts: One for each window.
        """
        transducer = self.transducer
        row_places = transducer.row_places(contexts)
        frames = self._only_window(places, window)
        if frames is not None:
            row = transducer.rows[row_places[0] : row_places[0] + 1]
            return transducer.logits(frames, row, self.blank_penalty)
        # One tensor for both, as making it costs more than what is done with it.
        begins, row_index = self.tensor([places, row_places]).unbind()
        frames = self._all_windows(window).index_select(0, begins)
        rows = transducer.rows.index_select(0, row_index).unsqueeze(1)
        return transducer.logits(frames, rows, self.blank_penalty).flatten(0, 1)

    def windows(self, places: List[int], window: int) -> torch.Tensor:
        """Return (A, W, J), the frames that follow some places.

        Args:
          places: A places among the frames of all.
          window: W, at most ``MAX_WINDOW``. A window may run into what follows the
            utterance.
        """
        frames = self._only_window(places, window)
        if frames is not None:
            return frames.unsqueeze(0)
        return self._all_windows(window).index_select(0, self.tensor(places))

    def _all_windows(self, window: int) -> torch.Tensor:
        """Return (frames of all, W, J), a view: the window that begins at each."""
        if window not in self._windows:
            width = self.frames.size(1)
            if self._padded is None:  # so that no window ends behind the last row
                rest = self.frames.new_zeros(MAX_WINDOW, width)
                self._padded = torch.cat((self.frames, rest))
            self._windows[window] = self._padded.as_strided(
                (self.num_frames, window, width), (width, width, 1)
            )
        return self._windows[window]

    def _only_window(self, places: List[int], window: int) -> Optional[torch.Tensor]:
        """Return (W, J) without a copy: one window that ends in the frames, or None."""
        if len(places) == 1 and places[0] + window <= self.num_frames:
            return self.frames[places[0] : places[0] + window]
        return None

    def best_two(
        self, frames: torch.Tensor, rows: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities (..., 2) and ids of the joiner's two best tokens.

        Args:
          frames: (..., J), projected.
          rows: (..., J), projected decoder output; broadcast against ``frames``.
        """
        logits = self.transducer.logits(frames, rows, self.blank_penalty)
        return logits.log_softmax(-1).topk(2)

    def ask_alone(self, n: int, place: int, context: Context) -> int:
        """Return the best token of one frame, computed as icefall computes it.

        Args:
          n: The utterance's row of the batch.
          place: The frame's, among the frames of all.
          context: The last tokens.
        """
        if n not in self._alone:
            alone = self.encoder_out[n : n + 1, : self.lengths[n]]
            self._alone[n] = self.transducer.joiner.encoder_proj(alone)
        return self.transducer.ask_alone(
            self._alone[n], place - self.begins[n], context, self.blank_penalty
        )


def checked_lengths(
    encoder_out: torch.Tensor, lens: torch.Tensor, states: Optional[Sequence[Any]]
) -> List[int]:
    """Refuse a batch whose parts do not fit, and return its lengths.

    Args:
      encoder_out: (N, T, C).
      lens: (N,), valid frames.
      states: One for each utterance, or None.

    Raises:
      KDError: A dimension or a length does not fit.
    """
    require(
        encoder_out.dim() == 3,
        f"`encoder_out` has {encoder_out.dim()} dimensions, give it as (N, T, C)",
    )
    n, t = encoder_out.shape[:2]
    lengths = lens.tolist()
    require(
        len(lengths) == n,
        f"`encoder_out_lens` has {len(lengths)} lengths, and `encoder_out` {n} "
        "utterances: give one for each",
    )
    require(
        all(0 <= length <= t for length in lengths),
        f"`encoder_out_lens` is {min(lengths, default=0)} to "
        f"{max(lengths, default=0)}, and `encoder_out` has {t} frames: give lengths "
        f"from 0 to {t}",
    )
    require(
        states is None or len(states) == n,
        f"`states` has {len(states or [])} states for {n} utterances: give those that "
        "the last chunk of the same utterances returned",
    )
    return lengths

"""Label looping: greedy search with a call of the joiner a token, not a frame.

icefall asks the joiner once a frame, and waits for the answer, because a token changes
the context of all frames after it. Most answers are blank, though, and blank changes
nothing. So a window of the next frames is asked at once with the context of now. Up to
the first token all answers are right; behind it the next window begins. The utterances
of a batch take their steps together, each at its own frame.

Few utterances make a small call, which costs nearly as much as a large one. So a long
utterance is cut into segments that take their steps like a batch. Where a segment's
path begins its context is not known yet, and a guess. The path before it goes on into
the segment, until both paths have the same context before the same frame: from there on
they are one, as a context is the last c tokens. That takes c tokens or a few more.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import lru_cache
from typing import List, Optional, Tuple

import torch

from icefall_kd.decode.batch import MARGIN, MAX_WINDOW, Batch
from icefall_kd.decode.transducer import Context
from icefall_kd.decode.types import Hypothesis, SearchReport

MAX_SYMBOLS = 1000  # in an utterance, of icefall's greedy_search

# What a call of the joiner costs beside its rows, in multiply-adds of rows.
CALL_COST = {"cpu": 8e6, "other": 1e9}
SEGMENT = 36  # frames at least
# Paths that take their steps together at most, by cutting.
ACTIVE = {"cpu": 12, "other": 256}
WINDOWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, MAX_WINDOW)


@dataclass
class Path:
    """The greedy path of an utterance or segment, as far as it is known."""

    row: int  # of the batch
    context: Context
    end: int  # of the utterance
    frame: int = 0  # the next one to be asked
    emitted: int = 0  # tokens of earlier chunks
    at_frame: int = 0  # tokens that this frame has already
    found: Hypothesis = field(default_factory=Hypothesis)

    def __post_init__(self) -> None:
        self.begin, self.start = self.frame, self.context
        self.segments: List["Path"] = [self]  # of this utterance, in order
        self.limit = self.end  # where the next segment begins
        # The path that this one has met, and how many tokens it has there.
        self.met: Optional[Tuple["Path", int]] = None

    def context_at(self, tokens: int) -> Context:
        """Return the context after so many tokens of the path.

        Args:
          tokens: Their number.
        """
        c = len(self.start)
        last = self.found.tokens[max(tokens - c, 0) : tokens]
        return (*self.start[len(last) :], *last)

    def meet(self) -> bool:
        """Return whether the path has met that of a later segment, and remember it."""
        if self.frame < self.limit or self.limit == self.end:
            return False
        segments = self.segments
        other = segments[bisect_left([s.begin for s in segments], self.frame + 1) - 1]
        if other is self or other.frame < self.frame:
            return False
        tokens = bisect_left(other.found.frames, self.frame)
        if other.context_at(tokens) != self.context:
            return False
        self.met = (other, tokens)
        return True


class LabelLooping:
    """The steps that bring paths to the ends of their utterances.

    Args:
      batch: The projected frames of a batch.
      report: Where the cost is counted.
      max_sym_per_frame: None for one token a frame; see
        :class:`~icefall_kd.decode.greedy.GreedySearch`.
    """

    def __init__(
        self,
        batch: Batch,
        report: SearchReport,
        max_sym_per_frame: Optional[int] = None,
    ) -> None:
        self.batch, self.report = batch, report
        self.transducer = batch.transducer
        self.max_sym_per_frame = max_sym_per_frame
        kind = "cpu" if batch.frames.device.type == "cpu" else "other"
        size = batch.frames.size(1) * self.transducer.vocab_size
        self.call_rows, self.max_active = int(CALL_COST[kind] / size), ACTIVE[kind]

    def follow(self, paths: List[Path]) -> None:
        """Bring paths to the ends of their utterances.

        Args:
          paths: They are moved on.
        """
        active = [path for path in paths if not self._is_over(path)]
        if not active:
            return
        if self.max_sym_per_frame is None and len(active) <= self.max_active // 2:
            share = self.max_active // len(active)
            active = [part for path in active for part in self._cut(path, share)]
        rows = self.transducer.decoder_rows([path.context for path in active])
        self.report.decoder_rows += len(active)
        advanced, emitted = 8, 1  # frames and tokens so far, as if of a first token
        while active:
            window = self._window(advanced // emitted, active)
            before = sum([path.frame for path in active])
            hits = self._step(active, rows, window)
            advanced += sum([path.frame for path in active]) - before
            emitted += len(hits)
            if hits:
                new = self.transducer.decoder_rows([active[i].context for i in hits])
                self.report.decoder_rows += len(hits)
                if len(hits) == len(active):
                    rows = new
                else:
                    rows[self.batch.tensor(hits)] = new
            going = [i for i, path in enumerate(active) if not self._is_over(path)]
            if len(going) < len(active):
                active = [active[i] for i in going]
                rows = rows[self.batch.tensor(going)]
        for path in paths:
            _join(path)

    def _cut(self, path: Path, share: int) -> List[Path]:
        """Return ``share`` segments of a path or fewer, each long enough."""
        length = path.end - path.frame
        share = max(min(share, length // SEGMENT), 1)
        for i in range(1, share):
            frame = path.frame + length * i // share
            path.segments.append(Path(path.row, self.transducer.start, path.end, frame))
        for segment, following in zip(path.segments, path.segments[1:]):
            segment.limit = following.begin
        for segment in path.segments:
            segment.segments = path.segments
        return path.segments

    def _window(self, frames_per_token: int, active: List[Path]) -> int:
        """Return how many frames each of the active paths is asked next."""
        left = max([path.end - path.frame for path in active])
        return min(best_window(frames_per_token, len(active), self.call_rows), left)

    def _step(self, active: List[Path], rows: torch.Tensor, window: int) -> List[int]:
        """Ask each path a window of frames; return which paths have a new token.

        Args:
          active: A paths.
          rows: (A, J), the decoder's output for their contexts.
          window: W.
        """
        begins = self.batch.begins
        at = [begins[path.row] + path.frame for path in active]
        values, tokens = self.batch.best_two(
            self.batch.windows(at, window), rows.unsqueeze(1)
        )  # (A, W, 2)
        self.report.rounds += 1
        self.report.joiner_rows += values.size(0) * values.size(1)
        answers = zip(active, tokens.tolist(), values.tolist())
        return [i for i, answer in enumerate(answers) if self._advance(*answer)]

    def _advance(
        self, path: Path, tokens: List[List[int]], values: List[List[float]]
    ) -> bool:
        """Move a path on to its first token in a window, or behind the window.

        Args:
          path: It is moved on.
          tokens: The two best tokens of each frame of the window.
          values: Their log-probabilities.

        Returns:
          Whether there is a token.
        """
        for offset in range(min(len(tokens), path.end - path.frame)):
            token, (best, second) = tokens[offset][0], values[offset]
            if not best - second > MARGIN:  # also for NaN
                self.report.asked_again += 1
                frame = path.frame + offset
                token = self.batch.ask_alone(path.row, frame, path.context)
            if token not in self.transducer.silent:
                self._emit(path, token, offset)
                path.found.log_probs.append(best)
                return True
        path.frame = min(path.frame + len(tokens), path.end)
        path.at_frame = 0
        return False

    def _emit(self, path: Path, token: int, offset: int) -> None:
        """Put a token, found ``offset`` frames ahead, at the end of a path."""
        path.frame += offset
        path.found.tokens.append(token)
        path.found.frames.append(path.frame)
        path.at_frame = path.at_frame + 1 if offset == 0 else 1
        if path.at_frame >= (self.max_sym_per_frame or 1):
            path.frame, path.at_frame = path.frame + 1, 0
        context = path.context
        if self.max_sym_per_frame is not None and context == self.transducer.start:
            # The empty context of icefall's greedy_search: blanks, once there is a
            # token.
            context = (self.transducer.blank_id,) * len(context)
        path.context = (*context[1:], token)

    def _is_over(self, path: Path) -> bool:
        """Return whether a path needs no more steps."""
        if path.frame >= path.end or self.max_sym_per_frame == 0 or path.meet():
            return True
        emitted = path.emitted + len(path.found.tokens)
        return self.max_sym_per_frame is not None and emitted >= MAX_SYMBOLS


def _join(path: Path) -> None:
    """Put the tokens of the segments' paths that a path met behind its own."""
    part, found = path, path.found
    while part.met is not None:
        part, known = part.met
        found.tokens += part.found.tokens[known:]
        found.frames += part.found.frames[known:]
        found.log_probs += part.found.log_probs[known:]
    if part is not path:
        path.context, path.frame = part.context, part.frame


@lru_cache(maxsize=4096)
def best_window(frames_per_token: int, active: int, call_rows: int) -> int:
    """Return the window that goes through an utterance at the least cost.

    If each frame has a token with probability p, a window of W frames brings the path
    on by (1 - (1 - p)^W) / p frames. It costs W rows of each path, and a share of a
    call.

    Args:
      frames_per_token: 1 / p.
      active: Paths that share a call.
      call_rows: What a call costs in rows.
    """
    p = min(1 / max(frames_per_token, 1), 0.9)

    def cost(window: int) -> float:
        return (call_rows / active + window) * p / (1 - (1 - p) ** window)

    return min(WINDOWS, key=cost)

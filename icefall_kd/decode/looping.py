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

from icefall_kd.decode.batch import MARGIN, MAX_WINDOW, Batch
from icefall_kd.decode.transducer import Context
from icefall_kd.decode.types import MAX_SYMBOLS, Hypothesis, SearchReport

# What a call of the joiner costs beside its rows, as a number of rows.
CALL_ROWS = {"cpu": 40, "other": 4000}
SEGMENT = 36  # frames at least
# Paths that take their steps together at most, by cutting.
ACTIVE = {"cpu": 20, "other": 256}
WINDOWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, MAX_WINDOW)


@dataclass
class Path:
    """The greedy path of an utterance or segment, as far as it is known.

    Places are frames, counted from the first one of the batch.
    """

    row: int  # of the batch
    context: Context
    place: int  # the next one to be asked
    end: int  # of the utterance
    emitted: int = 0  # tokens of earlier chunks
    at_frame: int = 0  # tokens that this frame has already
    # Of the last token since the context began; None if there is none. It is known
    # where contexts are reset, and so is whether that token was the first behind a
    # pause.
    last_place: Optional[int] = None
    is_first: bool = False
    hypothesis: Hypothesis = field(default_factory=Hypothesis)

    def __post_init__(self) -> None:
        self.begin, self.start = self.place, self.context
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
        last = self.hypothesis.tokens[max(tokens - c, 0) : tokens]
        return (*self.start[len(last) :], *last)

    def meet(self) -> bool:
        """Return whether the path has met that of a later segment, and remember it."""
        if self.place < self.limit or self.limit == self.end:
            return False
        segments = self.segments
        other = segments[bisect_left([s.begin for s in segments], self.place + 1) - 1]
        if other is self or other.place < self.place:
            return False
        tokens = bisect_left(other.hypothesis.frames, self.place)
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
      reset_after: After so many frames without a token the context begins anew; None:
        never.
    """

    def __init__(
        self,
        batch: Batch,
        report: SearchReport,
        max_sym_per_frame: Optional[int] = None,
        reset_after: Optional[int] = None,
    ) -> None:
        self.batch, self.report = batch, report
        self.transducer = batch.transducer
        self.max_sym_per_frame, self.reset_after = max_sym_per_frame, reset_after
        # Segments' paths meet where their contexts are the same, if no more counts.
        self.may_cut = max_sym_per_frame is None and reset_after is None
        kind = "cpu" if batch.frames.device.type == "cpu" else "other"
        self.call_rows, self.max_active = CALL_ROWS[kind], ACTIVE[kind]
        # Frames and tokens of all steps so far, as if of a first token.
        self.advanced, self.emitted = 8, 1

    def follow(self, paths: List[Path]) -> None:
        """Bring paths to the ends of their utterances.

        Args:
          paths: They are moved on.
        """
        active = [path for path in paths if not self._is_over(path)]
        if not active:
            return
        if self.reset_after is not None:
            self._forget(active)
        if self.may_cut and len(active) <= self.max_active // 2:
            share = self.max_active // len(active)
            active = [part for path in active for part in self._cut(path, share)]
        self.report.decoder_rows += len(active)
        while active:
            window = best_window(
                self.advanced // self.emitted, len(active), self.call_rows
            )
            reaches = [self._reach(path) for path in active]
            changed = self._step(active, reaches, min(window, max(reaches)))
            if self.reset_after is not None:
                changed += self._forget(active)
            self.report.decoder_rows += changed
            active = [path for path in active if not self._is_over(path)]
        for path in paths:
            _join(path)

    def _reach(self, path: Path) -> int:
        """Return how many of a path's next frames can be asked with its context."""
        if self.reset_after is None or path.last_place is None:
            return path.end - path.place
        return min(path.end, path.last_place + self.reset_after + 1) - path.place

    def _forget(self, active: List[Path]) -> int:
        """Begin the contexts anew of paths whose last token is long ago.

        Args:
          active: A paths.

        Returns:
          How many paths these are.
        """
        count = 0
        for path in active:
            last = path.last_place
            if last is not None and path.place - last > self.reset_after:
                path.context, path.last_place = self.transducer.start, None
                count += 1
        return count

    def _cut(self, path: Path, share: int) -> List[Path]:
        """Return ``share`` segments of a path or fewer, each long enough."""
        length = path.end - path.place
        share = max(min(share, length // SEGMENT), 1)
        for i in range(1, share):
            place = path.place + length * i // share
            path.segments.append(Path(path.row, self.transducer.start, place, path.end))
        for segment, following in zip(path.segments, path.segments[1:]):
            segment.limit = following.begin
        for segment in path.segments:
            segment.segments = path.segments
        return path.segments

    def _step(self, active: List[Path], reaches: List[int], window: int) -> int:
        """Ask each active path's next frames, and move it on.

        A path moves to its first token, or behind the window.

        Args:
          active: A paths.
          reaches: How many of its next frames each path may be asked for.
          window: W.

        Returns:
          How many of the paths have a new token.
        """
        logits = self.batch.ask(
            [path.place for path in active], window, [path.context for path in active]
        )
        self.report.rounds += 1
        self.report.joiner_rows += window * len(active)
        leads = self.transducer.leads(logits, self.batch.blank_penalty).tolist()
        stopped, stop_rows = self._pass_blanks(active, reaches, leads, window)
        if not stopped:
            return 0
        if len(stopped) == 1:
            logits = logits[stop_rows[0] : stop_rows[0] + 1]
        else:
            logits = logits.index_select(0, self.batch.tensor(stop_rows))
        values, tokens = logits.log_softmax(-1).topk(2)
        extended = 0
        for i, row, (best, second), (token, _) in zip(
            stopped, stop_rows, values.tolist(), tokens.tolist()
        ):
            # Both are false for NaN.
            is_sure = abs(leads[row]) > MARGIN and best - second > MARGIN
            extended += self._emit(active[i], token, best, is_sure)
        return extended

    def _pass_blanks(
        self,
        active: List[Path],
        reaches: List[int],
        leads: List[float],
        window: int,
    ) -> Tuple[List[int], List[int]]:
        """Move each path over the frames of its window that surely have no token.

        Args:
          active: A paths.
          reaches: How many of its next frames each path may be asked for.
          leads: (A * W,), how far a token is above blank.
          window: W.

        Returns:
          Which of the paths stopped within their windows, and the row of ``leads`` of
          the frame before which each stopped.
        """
        stopped, stop_rows = [], []
        begin = 0
        for i, (path, reach) in enumerate(zip(active, reaches)):
            row, end = begin, begin + min(window, reach)
            while row < end and leads[row] < -MARGIN:  # surely none; false for NaN
                row += 1
            if row > begin:
                path.place += row - begin
                path.at_frame = 0
            self.advanced += row - begin
            if row < end:
                stopped.append(i)
                stop_rows.append(row)
            begin += window
        return stopped, stop_rows

    def _emit(self, path: Path, token: int, log_prob: float, is_sure: bool) -> bool:
        """Put the token of a path's next frame at its end; False if it has none.

        Args:
          path: It is moved on.
          token: The frame's best.
          log_prob: The token's.
          is_sure: Whether it is the best by more than rounding.
        """
        if not is_sure:
            self.report.asked_again += 1
            token = self.batch.ask_alone(path.row, path.place, path.context)
        self.advanced += 1
        if token in self.transducer.silent or (
            # The first token behind a pause, heard once more.
            path.last_place is not None
            and path.is_first
            and token == path.context[-1]
        ):
            path.place, path.at_frame = path.place + 1, 0
            return False
        if self.reset_after is not None:
            is_begin = path.emitted + len(path.hypothesis.tokens) == 0
            path.is_first = path.last_place is None and not is_begin
            path.last_place = path.place
        hypothesis = path.hypothesis
        hypothesis.tokens.append(token)
        hypothesis.frames.append(path.place)
        hypothesis.log_probs.append(log_prob)
        self.emitted += 1
        path.at_frame += 1
        if path.at_frame >= (self.max_sym_per_frame or 1):
            path.place, path.at_frame = path.place + 1, 0
        context = path.context
        if self.max_sym_per_frame is not None and context == self.transducer.start:
            # The empty context of icefall's greedy_search: blanks, once there is a
            # token.
            context = (self.transducer.blank_id,) * len(context)
        path.context = (*context[1:], token)
        return True

    def _is_over(self, path: Path) -> bool:
        """Return whether a path needs no more steps."""
        if path.place >= path.limit and (path.place >= path.end or path.meet()):
            return True
        if self.max_sym_per_frame is None:
            return False
        emitted = path.emitted + len(path.hypothesis.tokens)
        return self.max_sym_per_frame == 0 or emitted >= MAX_SYMBOLS


def _join(path: Path) -> None:
    """Put the tokens of the segments' paths that a path met behind its own."""
    part, hypothesis = path, path.hypothesis
    while part.met is not None:
        part, known = part.met
        hypothesis.tokens += part.hypothesis.tokens[known:]
        hypothesis.frames += part.hypothesis.frames[known:]
        hypothesis.log_probs += part.hypothesis.log_probs[known:]
    if part is not path:
        path.context, path.place = part.context, part.place


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

"""icefall's modified beam search, with windows of frames in place of single ones.

At each frame the best ``beam`` of all extensions of all hypotheses stay: by blank, or
by one token. Those with the same tokens become one, whose probability is their sum.
icefall asks decoder and joiner for all hypotheses of a frame, and then for the next
frame.

Here the joiner is asked for a context at a window of frames, before it is known whether
a hypothesis with this context will be there. A hypothesis that is extended by blank
keeps its context, and hypotheses that end alike share one. So most frames find all they
need in windows of earlier calls. Of each row the best ``beam`` tokens are enough: no
other one can be among the best ``beam`` of all. The rest is a walk over small lists.

The utterances of a batch walk until each needs a new window, and ask together.

Sums of the same numbers differ in the last bits. Where that could change which
hypotheses stay, the utterance is searched again alone, with the operations and shapes
of icefall's ``modified_beam_search`` for a batch of one.
"""

from dataclasses import dataclass, field
from heapq import nlargest
from math import exp, inf, log1p
from operator import itemgetter
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.decode.batch import MARGIN, Batch
from icefall_kd.decode.transducer import Context, Transducer
from icefall_kd.decode.types import Hypothesis, SearchReport, SearchResult
from icefall_kd.errors import require

WINDOW = {"cpu": 8, "other": 32}  # frames that a context is asked at once

Row = Tuple[List[float], List[int]]  # the best log-probabilities, and their tokens


class Prefix:
    """The tokens of a hypothesis, as a place in the tree of all of an utterance.

    Args:
      context: The last tokens.
      length: How many tokens it has, those of the first context included.
    """

    __slots__ = ("context", "length", "longer")

    def __init__(self, context: Context, length: int) -> None:
        self.context, self.length = context, length
        self.longer: Dict[int, "Prefix"] = {}

    def extended(self, token: int) -> "Prefix":
        """Return the prefix with one more token, the same object each time.

        Args:
          token: Its id.
        """
        longer = self.longer.get(token)
        if longer is None:
            longer = Prefix((*self.context[1:], token), self.length + 1)
            self.longer[token] = longer
        return longer


@dataclass
class Active:
    """A hypothesis on the beam."""

    prefix: Prefix
    score: float  # log-probability, in nats
    # Its tokens, the last first: (earlier, token, frame, log-probability) or None.
    history: Any = None

    def hypothesis(self) -> Hypothesis:
        """Return the tokens with their frames and log-probabilities."""
        hypothesis, history = Hypothesis(score=self.score), self.history
        while history is not None:
            history, token, frame, log_prob = history
            hypothesis.tokens.append(token)
            hypothesis.frames.append(frame)
            hypothesis.log_probs.append(log_prob)
        for values in (hypothesis.tokens, hypothesis.frames, hypothesis.log_probs):
            values.reverse()
        return hypothesis


@dataclass
class BeamState:
    """The beam of an utterance between two chunks, the most probable one first."""

    beam: List[Active]
    frame: int = 0  # frames of the chunks so far


@dataclass
class _Windows:
    """What the joiner has answered for an utterance: windows of rows by context."""

    ends: Dict[Context, int] = field(default_factory=dict)  # behind the last frame
    rows: Dict[Context, List[Row]] = field(default_factory=dict)

    def row(self, context: Context, frame: int) -> Row:
        return self.rows[context][frame - self.ends[context]]


class BeamSearch:
    """icefall's ``modified_beam_search``: at most one token a frame.

    Args:
      model: A recipe's model in eval mode with a stateless decoder. Its parameters may
        not change afterwards.
      beam: Hypotheses that stay at each frame, 1 or more.
      temperature: The divisor of the logits, above 0.
      blank_penalty: It is subtracted from blank's logit.

    Raises:
      KDError: An impossible value, a model without transducer head, or a decoder with
        a state.
    """

    def __init__(
        self,
        model: nn.Module,
        beam: int = 4,
        temperature: float = 1.0,
        blank_penalty: float = 0.0,
    ) -> None:
        require(beam >= 1, f"`beam` is {beam}: give 1 or more")
        require(temperature > 0, f"`temperature` is {temperature}: give more than 0")
        self.transducer = Transducer(model)
        self.beam, self.temperature = beam, temperature
        self.blank_penalty = blank_penalty

    @torch.no_grad()
    def __call__(
        self,
        encoder_out: torch.Tensor,
        encoder_out_lens: torch.Tensor,
        states: Optional[Sequence[BeamState]] = None,
    ) -> SearchResult:
        """Search a batch of utterances, or of their next chunks.

        Args:
          encoder_out: (N, T, C).
          encoder_out_lens: (N,), valid frames; 0 is allowed.
          states: Those that the chunk before returned; None for an utterance's first.

        Returns:
          The best hypothesis of each utterance by log-probability a token, of all
          chunks so far. The states have the whole beam.

        Raises:
          KDError: Parts of the batch do not fit.
        """
        batch = Batch(
            self.transducer, encoder_out, encoder_out_lens, states, self.blank_penalty
        )
        report = SearchReport("beam search, windows", frames=len(batch.frames))
        if states is None:
            start = self.transducer.start
            states = [
                BeamState([Active(Prefix(start, len(start)), 0.0)])
                for _ in batch.lengths
            ]
        beams = self._walk_together(batch, states, report)
        after, hypotheses = [], []
        for n, (beam, state) in enumerate(zip(beams, states)):
            best = None if beam is None else _best_of(beam, sure=True)
            if best is None:
                report.asked_again += batch.lengths[n]
                beam = self._search_alone(batch, n, state)
                best = _best_of(beam, sure=False)
            hypotheses.append(best.hypothesis())
            after.append(BeamState(beam, state.frame + batch.lengths[n]))
        return SearchResult(hypotheses, after, report)

    def _walk_together(
        self, batch: Batch, states: Sequence[BeamState], report: SearchReport
    ) -> List[Optional[List[Active]]]:
        """Return each utterance's beam at its end; None where it is not sure."""
        beams: List[Optional[List[Active]]] = [None] * len(states)
        windows = [_Windows() for _ in states]
        walks = {
            n: self._walk(state, length, windows[n])
            for n, (state, length) in enumerate(zip(states, batch.lengths))
        }
        while walks:
            wanted = []
            for n in list(walks):
                try:
                    wanted += [(n, *request) for request in next(walks[n])]
                except StopIteration as end:
                    beams[n] = end.value
                    del walks[n]
            if wanted:
                self._ask(batch, wanted, windows, report)
        return beams

    def _walk(
        self, state: BeamState, length: int, windows: _Windows
    ) -> Iterator[List[Tuple[Context, int]]]:
        """Search an utterance; yield what must be in ``windows`` to go on.

        Returns:
          The beam at the end, or None where it can't be sure of it.
        """
        beam = state.beam
        for t in range(length):
            contexts = {active.prefix.context for active in beam}
            missing = [c for c in contexts if windows.ends.get(c, 0) <= t]
            if missing:
                yield [(c, t) for c in missing]
            extensions = []
            for active in beam:
                values, tokens = windows.row(active.prefix.context, t)
                for value, token in zip(values, tokens):
                    extensions.append((active.score + value, token, value, active))
            best = nlargest(self.beam + 1, extensions, key=itemgetter(0))
            if len(best) > self.beam:
                last, next_one = best[self.beam - 1][0], best.pop()[0]
                if not last - next_one > _rounding(last):
                    return None
            beam = self._merged(best, state.frame + t)
            if beam is None:
                return None
        return beam

    def _merged(
        self, extensions: List[Tuple], frame: int, sure: bool = True
    ) -> Optional[List[Active]]:
        """Return the beam of some extensions, those with the same tokens as one.

        One has the frames of its more probable part.

        Args:
          extensions: The most probable one first.
          frame: Where they are.
          sure: Whether to return None where parts are as probable, but for rounding.
        """
        beam: Dict[int, Active] = {}
        for score, token, value, active in extensions:
            if token in self.transducer.silent:
                prefix, history = active.prefix, active.history
            else:
                prefix = active.prefix.extended(token)
                history = (active.history, token, frame, value)
            known = beam.get(id(prefix))
            if known is None:
                beam[id(prefix)] = Active(prefix, score, history)
            else:
                if sure and not known.score - score > _rounding(score):
                    return None
                known.score = _log_add(known.score, score)
        return list(beam.values())

    def _ask(
        self,
        batch: Batch,
        wanted: List[Tuple[int, Context, int]],
        windows: List[_Windows],
        report: SearchReport,
    ) -> None:
        """Ask the joiner for windows, each of an utterance, a context and a frame."""
        size = WINDOW["cpu" if batch.frames.device.type == "cpu" else "other"]
        size = min(size, max(batch.lengths[n] - t for n, _, t in wanted))
        rows = self.transducer.decoder_rows([context for _, context, _ in wanted])
        frames = batch.windows([batch.begins[n] + t for n, _, t in wanted], size)
        report.rounds += 1
        report.decoder_rows += len(wanted)
        report.joiner_rows += frames.size(0) * frames.size(1)
        logits = self.transducer.logits(frames, rows.unsqueeze(1), self.blank_penalty)
        if self.temperature != 1:
            logits /= self.temperature
        # One more than stay, to see how near the next one is.
        count = min(self.beam + 1, logits.size(-1))
        values, tokens = logits.log_softmax(-1).topk(count)
        for (n, context, t), v, k in zip(wanted, values.tolist(), tokens.tolist()):
            windows[n].rows[context] = list(zip(v, k))
            # A negative index then counts from the end of the window.
            windows[n].ends[context] = t + len(v)

    def _search_alone(self, batch: Batch, n: int, state: BeamState) -> List[Active]:
        """Return the beam as icefall computes it, frame by frame, of one utterance."""
        model, transducer = self.transducer.model, self.transducer
        projected = model.joiner.encoder_proj(batch.encoder_out[n, : batch.lengths[n]])
        device = projected.device
        beam = state.beam
        for t in range(batch.lengths[n]):
            scores = torch.tensor([[active.score] for active in beam], device=device)
            contexts = batch.tensor([active.prefix.context for active in beam])
            decoder_out = model.decoder(contexts, need_pad=False).unsqueeze(1)
            decoder_out = model.joiner.decoder_proj(decoder_out)
            frame = projected[t : t + 1, None, None]
            frame = frame.index_select(0, contexts.new_zeros(len(beam)))
            logits = model.joiner(frame, decoder_out, project_input=False)
            logits = logits.squeeze(1).squeeze(1)
            if self.blank_penalty:
                logits[:, transducer.blank_id] -= self.blank_penalty
            own = (logits / self.temperature).log_softmax(-1)
            log_probs = own + scores
            count = min(self.beam, log_probs.numel())
            values, places = log_probs.flatten().topk(count)
            extensions = []
            for value, place in zip(values.tolist(), places.tolist()):
                i, token = divmod(place, own.size(1))
                extensions.append((value, token, float(own[i, token]), beam[i]))
            beam = self._merged(extensions, state.frame + t, sure=False)
        return beam


def _rounding(score: float) -> float:
    """Return what a sum of log-probabilities may differ by, in nats."""
    return MARGIN + 1e-6 * abs(score)


def _best_of(beam: List[Active], sure: bool) -> Optional[Active]:
    """Return the hypothesis with the best log-probability a token.

    The tokens of the first context count, as in icefall.

    Args:
      beam: One hypothesis or more.
      sure: Whether to return None where the second best is as good, but for rounding.
    """
    ranked = sorted(beam, key=lambda a: a.score / a.prefix.length, reverse=True)
    if sure and len(ranked) > 1:
        first, second = ranked[:2]
        ahead = first.score / first.prefix.length - second.score / second.prefix.length
        if not ahead * first.prefix.length > _rounding(first.score):
            return None
    return ranked[0]


def _log_add(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == -inf else a + log1p(exp(b - a))

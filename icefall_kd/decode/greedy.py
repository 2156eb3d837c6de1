"""Greedy search with a transducer head: the tokens and frames of icefall's, sooner."""

from dataclasses import dataclass
from typing import List, Optional, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.decode.batch import Batch, checked_lengths
from icefall_kd.decode.looping import LabelLooping, Path
from icefall_kd.decode.speculation import Speculation, collapsed
from icefall_kd.decode.stateful import StatefulLooping, StatefulState, search_each
from icefall_kd.decode.transducer import Context, Transducer, is_stateless
from icefall_kd.decode.types import SearchReport, SearchResult
from icefall_kd.errors import require
from icefall_kd.zipformer import ctc_linear, has_ctc

DRAFTS = ("auto", "ctc", "none")


@dataclass
class GreedyState:
    """Where greedy search of an utterance stands between two chunks."""

    context: Context  # the last tokens
    frame: int = 0  # frames of the chunks so far
    emitted: int = 0  # tokens so far
    # Where contexts are reset: the frame of the last token since the context began, and
    # whether it was the first behind a pause.
    last_frame: Optional[int] = None
    is_first: bool = False


class GreedySearch:
    """icefall's greedy search with a model's transducer head.

    Args:
      model: A recipe's model in eval mode. Its parameters may not change afterwards. A
        decoder that is not stateless is searched without tables, and the report says
        so.
      max_sym_per_frame: None for the rules of icefall's ``greedy_search_batch``: one
        token a frame. A number for those of its ``greedy_search`` with this number: at
        most so many a frame, 1000 in all, and an empty context that consists of blanks
        once there is a token, which matters where the context is 3 or more.
      blank_penalty: It is subtracted from blank's logit, also in ``log_probs``.
      draft: ``ctc`` to check a draft of the model's CTC head, ``none`` for label
        looping, ``auto`` for what is expected to be faster.
      reset_after: Frames; after so many without a token the context is again that of an
        utterance's beginning, and the first token behind such a pause can't follow upon
        itself without one. It is for recordings of several utterances, is not
        icefall's search, and takes no draft. None: the context is never reset.

    Raises:
      KDError: The model has no transducer head, or an impossible value.
    """

    def __init__(
        self,
        model: nn.Module,
        max_sym_per_frame: Optional[int] = None,
        blank_penalty: float = 0.0,
        draft: str = "auto",
        reset_after: Optional[int] = None,
    ) -> None:
        require(
            max_sym_per_frame is None or max_sym_per_frame >= 0,
            f"`max_sym_per_frame` is {max_sym_per_frame}: give 0 or more, or None",
        )
        require(draft in DRAFTS, f"`draft` is {draft}: give one of {', '.join(DRAFTS)}")
        require(
            draft != "ctc" or has_ctc(model),
            f"`draft` is ctc, and the model {type(model).__name__} has no CTC head "
            "(ctc_output): give auto or none",
        )
        require(
            reset_after is None or reset_after >= 1,
            f"`reset_after` is {reset_after} frames: give 1 or more, or None",
        )
        self.draft, self.reset_after = draft, reset_after
        self.stateful = None
        if getattr(model, "decoder", None) is not None and not is_stateless(model):
            require(
                reset_after is None,
                f"`reset_after` is {reset_after}, and the decoder "
                f"{type(model.decoder).__name__} has a state in place of a context of "
                "a few tokens: give None",
            )
            self.stateful = StatefulLooping(model, max_sym_per_frame, blank_penalty)
            return
        self.transducer = Transducer(model)
        self._drafts, self._given_up = 0, 0  # of the CTC head, if auto
        self.max_sym_per_frame = max_sym_per_frame
        self.blank_penalty = blank_penalty

    @torch.inference_mode()
    def __call__(
        self,
        encoder_out: torch.Tensor,
        encoder_out_lens: torch.Tensor,
        states: Optional[Sequence[GreedyState]] = None,
        draft: Optional[torch.Tensor] = None,
    ) -> SearchResult:
        """Search a batch of utterances, or of their next chunks.

        Args:
          encoder_out: (N, T, C).
          encoder_out_lens: (N,), valid frames; 0 is allowed.
          states: Those that the chunk before returned; None for an utterance's first.
          draft: (N, T), a guess of each frame's token, blank for none; see
            :func:`~icefall_kd.decode.speculation.draft_of`. None for the CTC head's,
            or none, as the search was made. With ``max_sym_per_frame`` or
            ``reset_after`` it is not used.

        Returns:
          The tokens of each utterance, of a chunk those that it added.

        Raises:
          KDError: Parts of the batch do not fit, or the draft has unknown tokens.
        """
        if self.stateful is not None:
            return self._search_stateful(encoder_out, encoder_out_lens, states)
        batch = Batch(
            self.transducer, encoder_out, encoder_out_lens, states, self.blank_penalty
        )
        if states is None:
            states = [GreedyState(self.transducer.start) for _ in batch.lengths]
        paths = [
            _path(row, state, begin, length)
            for row, (state, begin, length) in enumerate(
                zip(states, batch.begins, batch.lengths)
            )
        ]
        report = SearchReport("label looping", frames=batch.num_frames)
        auto = draft is None and self.draft == "auto"
        one_a_frame = self.max_sym_per_frame is None
        if not one_a_frame or self.reset_after is not None or not batch.num_frames:
            draft = None
        elif draft is None and self._shall_draft(batch):
            draft = self._ctc_draft(batch)
        if draft is not None:
            report.way = "speculation"
            self._speculate(batch, paths, draft, report, auto)
        how = (self.max_sym_per_frame, self.reset_after)
        LabelLooping(batch, report, *how).follow(paths)
        return _result(batch, paths, states, report)

    def _search_stateful(
        self,
        encoder_out: torch.Tensor,
        encoder_out_lens: torch.Tensor,
        states: Optional[Sequence[StatefulState]],
    ) -> SearchResult:
        """Search with a decoder that has a state."""
        lengths = checked_lengths(encoder_out, encoder_out_lens, states)
        report = SearchReport(
            "label looping without tables, as the decoder has a state",
            frames=sum(lengths),
        )
        hypotheses, after = search_each(
            self.stateful, encoder_out, lengths, states, report
        )
        return SearchResult(hypotheses, after, report)

    def _shall_draft(self, batch: Batch) -> bool:
        """Return whether the CTC head makes a draft of this batch.

        On a CPU label looping was faster at all sizes that were measured: the CTC head
        costs as much as the joiner. Elsewhere calls cost more than rows, and a draft
        takes fewer; unless most drafts so far were given up.
        """
        if self.draft != "auto":
            return self.draft == "ctc"
        if batch.frames.device.type == "cpu" or not has_ctc(self.transducer.model):
            return False
        return self._drafts < 4 or self._given_up < self._drafts / 2

    def _ctc_draft(self, batch: Batch) -> torch.Tensor:
        """Return the CTC head's draft (N, T)."""
        logits = ctc_linear(self.transducer.model)(batch.valid)
        best = pad_sequence(logits.argmax(-1).split(batch.lengths), batch_first=True)
        return collapsed(best, self.transducer.blank_id)

    def _speculate(
        self,
        batch: Batch,
        paths: List[Path],
        draft: torch.Tensor,
        report: SearchReport,
        auto: bool,
    ) -> None:
        """Bring ``paths`` as far as the joiner's answers to a draft are known."""
        contexts = [path.context for path in paths]
        speculation = Speculation(batch, contexts, draft, report)
        given_up = not speculation.run()
        if given_up:
            report.way = "speculation, then label looping"
        if auto:
            self._drafts, self._given_up = self._drafts + 1, self._given_up + given_up
        for path, (place, hypothesis) in zip(paths, speculation.known()):
            path.hypothesis, path.place, path.begin = hypothesis, place, place
            path.context = path.context_at(len(hypothesis.tokens))


def _path(row: int, state: GreedyState, begin: int, length: int) -> Path:
    """Return the path that goes on where an utterance's last chunk ended."""
    path = Path(row, state.context, begin, begin + length, state.emitted)
    if state.last_frame is not None:
        path.last_place = state.last_frame - state.frame + begin
        path.is_first = state.is_first
    return path


def _result(
    batch: Batch,
    paths: List[Path],
    states: Sequence[GreedyState],
    report: SearchReport,
) -> SearchResult:
    """Count frames from each utterance's first one, and make the next states."""
    hypotheses, after = [], []
    for path, state, begin in zip(paths, states, batch.begins):
        hypothesis, shift = path.hypothesis, state.frame - begin
        if shift:
            hypothesis.frames = [place + shift for place in hypothesis.frames]
        hypotheses.append(hypothesis)
        emitted = state.emitted + len(hypothesis.tokens)
        last = None if path.last_place is None else path.last_place + shift
        frame = path.end + shift
        after.append(GreedyState(path.context, frame, emitted, last, path.is_first))
    return SearchResult(hypotheses, after, report)


def transducer_greedy(
    model: nn.Module, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor
) -> List[List[int]]:
    """The best token of each frame under the joiner, at most one a frame.

    Args:
      model: A recipe's model in eval mode, with ``decoder`` and ``joiner``.
      encoder_out: (N, T, C).
      encoder_out_lens: (N,), valid frames.

    Returns:
      The token ids of each utterance.
    """
    result = GreedySearch(model)(encoder_out, encoder_out_lens)
    return [hypothesis.tokens for hypothesis in result.hypotheses]

"""Searches for the words in encoder output: the same as icefall's, and faster.

A search is made once from a model, and then called with encoder output as often as
needed, for whole utterances or chunk by chunk::

    search = GreedySearch(model)                       # or BeamSearch(model, beam=4)
    result = search(encoder_out, encoder_out_lens)     # (N, T, C), (N,)
    for hypothesis in result.hypotheses:               # one for each utterance
        hypothesis.tokens, hypothesis.frames, hypothesis.log_probs

    states = None                                      # streaming
    for chunk, lens in chunks:
        result = search(chunk, lens, states)
        states = result.states                         # one for each utterance
        result.hypotheses       # greedy search: the new tokens; beam search: all so far

The tensors may be on any device. Token ids, frames and log-probabilities come back as
Python lists. Frames are counted from the first one of the utterance, across chunks.
``result.report`` says which way was taken and what it cost (:class:`SearchReport`).

:class:`GreedySearch` is exact: its tokens and frames are those of icefall's
``greedy_search_batch``, or with ``max_sym_per_frame`` of its ``greedy_search``, for
each utterance alone, whatever else is in the batch. With ``draft`` it checks someone's
guess instead of searching from nothing.
:class:`BeamSearch` is icefall's ``modified_beam_search``, and :class:`CtcSearch` its
``ctc_greedy_search``.
Its ``reset_after`` is for recordings of several utterances: the context begins anew
behind a pause, which is not icefall's search.
``skip_blanks`` takes out frames that the CTC head is sure of; that is not exact.
"""

from icefall_kd.decode.beam import BeamSearch, BeamState
from icefall_kd.decode.ctc import CtcSearch, KeptFrames, ctc_greedy, skip_blanks
from icefall_kd.decode.greedy import GreedySearch, GreedyState, transducer_greedy
from icefall_kd.decode.speculation import ctc_draft, draft_of
from icefall_kd.decode.types import Hypothesis, SearchReport, SearchResult

__all__ = [
    "BeamSearch",
    "BeamState",
    "CtcSearch",
    "GreedySearch",
    "GreedyState",
    "Hypothesis",
    "KeptFrames",
    "SearchReport",
    "SearchResult",
    "ctc_draft",
    "ctc_greedy",
    "draft_of",
    "skip_blanks",
    "transducer_greedy",
]

"""The context of greedy search begins anew behind a pause, wherever chunks end."""

import pytest
import torch
from torch import nn

from icefall_kd import KDError
from icefall_kd.decode import GreedySearch


@pytest.fixture(params=[(1, 0), (2, 4), (3, 0)], ids=str)
def head(request, make_head):
    context, blank_id = request.param
    return make_head(context=context, blank_id=blank_id, seed=context, rate=0.2)


@torch.no_grad()
def frame_by_frame(head, frames, reset_after, max_sym=None, once=True):
    """The reference: one frame after another, each asked alone."""
    blank, c = head.decoder.blank_id, head.decoder.context_size
    start = [-1] * (c - 1) + [blank]
    context, tokens, places = start, [], []
    pause, behind_pause, first = 0, False, None
    for t, frame in enumerate(frames):
        at_frame = 0
        while at_frame < (max_sym or 1):
            row = head.decoder(torch.tensor([context]), need_pad=False)[:, 0]
            logits = head.joiner(frame[None], row)[0]
            token = int(logits.argmax())
            if token == blank or (once and token == first):
                break
            tokens.append(token)
            places.append(t)
            if max_sym is not None and context == start:
                context = [blank] * c
            context = [*context[1:], token]
            at_frame, first = at_frame + 1, token if behind_pause else None
            behind_pause = False
        pause = 0 if at_frame else pause + 1
        if tokens and pause >= reset_after and not behind_pause:
            context, behind_pause, first = start, True, None
    return tokens, places


def found_by(search, *batch):
    return [(h.tokens, h.frames) for h in search(*batch).hypotheses]


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("max_sym", [None, 1, 2])
def test_the_search_equals_that_of_each_frame_alone(head, make_batch, n, max_sym):
    matters = repeats = 0
    for reset_after in (1, 3, 8):
        search = GreedySearch(head, max_sym, reset_after=reset_after)
        encoder_out, lens = make_batch(n, 61, reset_after)
        found = found_by(search, encoder_out, lens)
        utterances = [x[:length] for x, length in zip(encoder_out, lens.tolist())]
        how = (reset_after, max_sym)
        assert found == [frame_by_frame(head, x, *how) for x in utterances]
        matters += found != found_by(GreedySearch(head, max_sym), encoder_out, lens)
        repeats += found != [frame_by_frame(head, x, *how, False) for x in utterances]
    assert matters
    assert repeats or n == 1  # else nothing was seen of tokens that are heard twice


def test_a_pause_that_never_comes_changes_nothing(head, make_batch):
    batch = make_batch(4, 50)
    found = found_by(GreedySearch(head, reset_after=51), *batch)
    assert found == found_by(GreedySearch(head), *batch)


def test_chunks_of_any_size_give_what_the_whole_gives(head, make_batch):
    encoder_out = make_batch(2, 90, 5)[0]
    lens = torch.full((2,), encoder_out.size(1))
    search = GreedySearch(head, reset_after=4)
    whole = found_by(search, encoder_out, lens)
    for size in (1, 3, 4, 5, 17):
        states, tokens, frames = None, [[], []], [[], []]
        for chunk in encoder_out.split(size, dim=1):
            result = search(chunk, torch.full((2,), chunk.size(1)), states)
            states = result.states
            for i, hypothesis in enumerate(result.hypotheses):
                tokens[i] += hypothesis.tokens
                frames[i] += hypothesis.frames
        assert list(zip(tokens, frames)) == whole


def test_no_draft_is_taken(make_head, make_batch):
    head = make_head()
    batch = make_batch(3, 40)
    result = GreedySearch(head, draft="ctc", reset_after=3)(*batch)
    assert result.report.way == "label looping" and not result.report.drafted
    found = [(h.tokens, h.frames) for h in result.hypotheses]
    assert found == found_by(GreedySearch(head, draft="none", reset_after=3), *batch)


def test_what_no_reset_is_possible_with_is_refused(make_head):
    with pytest.raises(KDError, match="`reset_after` is 0 frames: give 1 or more"):
        GreedySearch(make_head(), reset_after=0)
    model = nn.Module()
    model.decoder, model.joiner = nn.LSTM(2, 2), nn.Linear(2, 2)
    model.decoder.blank_id = 0
    with pytest.raises(KDError, match="`reset_after` is 5, and the decoder LSTM has"):
        GreedySearch(model, reset_after=5)

"""Greedy search gives what the recipes' own searches give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zipformer.decode.search import ctc_greedy_search, greedy_search

from icefall_kd.student.greedy import ctc_greedy, transducer_greedy

LENGTHS = [17, 3, 1, 12, 8]


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# CTC


@given(st.integers(0, 50), st.integers(1, 4), st.integers(0, 2))
def test_ctc_equals_icefalls(seed, vocab_size, blank_id):
    """Of few symbols, so that many are repeated."""
    logits = random(3, 9, vocab_size, seed=seed)
    lengths = torch.tensor([9, 4, 1])
    expected = ctc_greedy_search(logits, lengths, blank_id)
    assert ctc_greedy(logits, lengths, blank_id) == expected


def test_ctc_by_hand():
    best = [[2, 2, 0, 2, 1, 1, 3], [0, 0, 0, 1, 1, 1, 1]]
    logits = torch.nn.functional.one_hot(torch.tensor(best), 4).float()
    lengths = torch.tensor([7, 3])
    assert ctc_greedy(logits, lengths) == [[2, 2, 1, 3], []]
    assert ctc_greedy(logits, lengths, blank_id=2) == [[0, 1, 3], [0]]
    assert ctc_greedy(logits, torch.tensor([0, 4])) == [[], [1]]


# Transducer


@pytest.fixture(params=[1, 2, 3], ids="context-{}".format)
def context_size(request):
    return request.param


@pytest.fixture(params=[0, 6], ids="blank-{}".format)
def model(request, make_model, context_size):
    model = make_model(seed=4, blank_id=request.param, context_size=context_size)
    with torch.no_grad():
        model.joiner.output_linear.bias[request.param] += 1.0
    return model.eval()


def heard(model, lengths, seed=0):
    """What an encoder might give: frames that differ much."""
    return 8 * random(len(lengths), max(lengths), 24, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_the_transducer_equals_icefalls(model, seed):
    encoder_out, lengths = heard(model, LENGTHS, seed), torch.tensor(LENGTHS)
    found = transducer_greedy(model, encoder_out, lengths)
    with torch.no_grad():
        assert found == greedy_search(model, encoder_out, lengths)
    emitted = sum(map(len, found))
    assert 5 < emitted < sum(LENGTHS)  # blanks and others
    assert len({s for y in found for s in y}) > 2


def test_what_was_emitted_matters(model):
    """The decoder is asked again, with the labels so far."""
    encoder_out, lengths = heard(model, LENGTHS), torch.tensor(LENGTHS)
    found = transducer_greedy(model, encoder_out, lengths)
    forward, asked = model.decoder.forward, []

    def ask(y, need_pad=True):
        asked.append(y.tolist())
        return forward(y, need_pad)

    model.decoder.forward = ask
    assert transducer_greedy(model, encoder_out, lengths) == found
    context, blank = model.decoder.context_size, model.decoder.blank_id
    start = [-1] * (context - 1) + [blank]
    assert asked[0] == [start] * len(LENGTHS)
    assert asked[-1] == [(start + y)[-context:] for y in found]
    assert all(len(rows) == len(LENGTHS) for rows in asked)


def test_a_batch_equals_its_rows_alone_and_padding_does_not_matter(model):
    encoder_out, lengths = heard(model, LENGTHS), torch.tensor(LENGTHS)
    found = transducer_greedy(model, encoder_out, lengths)
    for row, n, y in zip(encoder_out, LENGTHS, found, strict=True):
        alone = row[:n].unsqueeze(0)
        assert transducer_greedy(model, alone, torch.tensor([n])) == [y]
    for row, n in zip(encoder_out, LENGTHS, strict=True):
        row[n:] = 100.0
    longer = torch.cat((encoder_out, heard(model, LENGTHS, 9)), 1)
    assert transducer_greedy(model, longer, lengths) == found


def test_rows_without_frames_say_nothing(model):
    encoder_out = heard(model, [17, 17])
    (alone,) = transducer_greedy(model, encoder_out[1:], torch.tensor([17]))
    found = transducer_greedy(model, encoder_out, torch.tensor([0, 17]))
    assert found == [[], alone] and alone
    assert transducer_greedy(model, encoder_out, torch.tensor([0, 0])) == [[], []]


def test_no_graph_is_kept(model):
    encoder_out = heard(model, [5]).requires_grad_()
    transducer_greedy(model, encoder_out, torch.tensor([5]))
    assert encoder_out.grad is None and torch.is_grad_enabled()

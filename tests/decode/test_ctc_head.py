"""The CTC head: greedy search as the recipes', and frames that are left out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zipformer.decode.search import ctc_greedy_search

from icefall_kd import KDError
from icefall_kd.decode import (
    CtcSearch,
    GreedySearch,
    Hypothesis,
    ctc_greedy,
    skip_blanks,
)


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("blank_id", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_searchs_tokens_begin_with_their_run_and_have_its_highest_log_prob(
    make_head, seed, blank_id
):
    """Of three tokens, so that many are repeated."""
    head = make_head(vocab=3, seed=seed)
    encoder_out, lens = random(4, 11, 12, seed=seed), torch.tensor([11, 5, 1, 0])
    result = CtcSearch(head, blank_id)(encoder_out, lens)
    assert result.report.frames == 17
    with torch.no_grad():
        log_probs = head.ctc_output(encoder_out)
    found = result.hypotheses
    assert [h.tokens for h in found] == ctc_greedy(log_probs, lens, blank_id)
    assert any(len(h.tokens) > 1 for h in found)
    for hypothesis, row, n in zip(found, log_probs, lens.tolist()):
        expected, score = [], 0.0
        for t in range(n):
            best = int(row[t].argmax())
            value = float(row[t, best])
            score += value
            if best != blank_id and (t == 0 or best != int(row[t - 1].argmax())):
                expected.append([best, t, value])
            elif best != blank_id:
                expected[-1][2] = max(expected[-1][2], value)
        triples = zip(hypothesis.tokens, hypothesis.frames, hypothesis.log_probs)
        assert [list(triple) for triple in triples] == expected
        assert hypothesis.score == score


def test_frames_of_sure_blanks_are_left_out():
    blank = torch.tensor([[0.9, 0.2, 0.995, 0.3], [0.999, 0.9995, 0.1, 0.1]])
    logits = torch.stack((blank, 1 - blank), -1).log()
    encoder_out = torch.arange(8.0).reshape(2, 4, 1)
    kept = skip_blanks(encoder_out, torch.tensor([4, 2]), logits, 0.99)
    assert kept.frames == [[0, 1, 3], []] and kept.encoder_out_lens.tolist() == [3, 0]
    assert kept.encoder_out[0, :, 0].tolist() == [0, 1, 3] and kept.share == 0.5
    found = [Hypothesis([7, 8], [0, 2], [-1.0, -2.0]), Hypothesis()]
    assert kept.restore(found) == [Hypothesis([7, 8], [0, 3], [-1.0, -2.0]), found[1]]
    kept = skip_blanks(encoder_out, torch.tensor([4, 2]), logits, 0.5, blank_id=1)
    assert kept.frames == [[0, 2], [0, 1]]


def test_at_threshold_1_all_frames_stay(make_head, make_batch):
    head = make_head()
    encoder_out, lens = make_batch(4, 30)
    with torch.no_grad():
        kept = skip_blanks(encoder_out, lens, head.ctc_output(encoder_out), 1.0)
    search = GreedySearch(head)
    found = kept.restore(search(kept.encoder_out, kept.encoder_out_lens).hypotheses)
    assert found == search(encoder_out, lens).hypotheses and kept.share == 1


def test_refusals():
    x, lens = torch.zeros(2, 5, 3), torch.tensor([5, 2])
    with pytest.raises(KDError, match="`threshold` is 1.5"):
        skip_blanks(x, lens, torch.zeros(2, 5, 4), 1.5)
    with pytest.raises(KDError, match=r"\(2, 4\) utterances and frames"):
        skip_blanks(x, lens, torch.zeros(2, 4, 4))

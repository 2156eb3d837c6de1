"""Beam search gives the hypotheses and scores of icefall's modified_beam_search."""

import pytest
import torch
from zipformer.decode.search import modified_beam_search

from icefall_kd import KDError
from icefall_kd.decode import BeamSearch
from icefall_kd.decode import beam as beam_module


@pytest.fixture(params=[(1, None), (2, None), (2, 3), (3, None)], ids=str)
def head(request, make_head):
    context, unk_id = request.param
    return make_head(context=context, unk_id=unk_id, seed=context)


def icefalls(head, encoder_out, lens, beam=4, **options):
    encoder_out = encoder_out[:, : int(lens.max())]
    with torch.no_grad():
        found = modified_beam_search(
            head, encoder_out, lens, beam=beam, return_timestamps=True, **options
        )
    return list(zip(found.hyps, found.timestamps))


def naive(head, encoder_out, n, beam, temperature=1.0, penalty=0.0):
    """All hypotheses of one utterance in float64: {tokens: log-probability}."""
    head = head.double()
    c, blank = head.decoder.context_size, head.decoder.blank_id
    silent = (blank, getattr(head, "unk_id", blank))
    start = (-1,) * (c - 1) + (blank,)
    hyps = {start: 0.0}
    for t in range(n):
        extensions = []
        for ys, score in hyps.items():
            rows = head.decoder(torch.tensor([ys[-c:]]), need_pad=False)
            x = encoder_out[None, None, t : t + 1].double()
            logits = head.joiner(x, rows[None]).flatten()
            logits[blank] -= penalty
            log_probs = (logits / temperature).log_softmax(-1) + score
            extensions += [(float(p), ys, y) for y, p in enumerate(log_probs)]
        hyps = {}
        for p, ys, y in sorted(extensions, reverse=True)[:beam]:
            ys = ys if y in silent else (*ys, y)
            both = torch.tensor([hyps.get(ys, -torch.inf), p], dtype=torch.float64)
            hyps[ys] = float(both.logsumexp(0))
    head.float()
    return {ys[c:]: p for ys, p in hyps.items()}


def found_by(search, *batch):
    return [(h.tokens, h.frames) for h in search(*batch).hypotheses]


@pytest.mark.parametrize("beam", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_hypotheses_equal_icefalls(head, make_batch, beam, n):
    search = BeamSearch(head, beam)
    for seed in range(3):
        batch = make_batch(n, 25, seed)
        assert found_by(search, *batch) == icefalls(head, *batch, beam=beam)


def test_options_are_as_icefalls(head, make_batch):
    batch = make_batch(4, 25)
    for options in ({"temperature": 2.0}, {"blank_penalty": 1.5}):
        search = BeamSearch(head, 4, **options)
        assert found_by(search, *batch) == icefalls(head, *batch, **options)


@pytest.mark.parametrize("beam", [1, 3, 6])
def test_the_whole_beam_and_its_scores(head, make_batch, beam):
    encoder_out, lens = make_batch(3, 18, beam)
    result = BeamSearch(head, beam, 1.5, 0.5)(encoder_out, lens)
    for n, (state, best) in enumerate(zip(result.states, result.hypotheses)):
        found = {}
        for active in state.beam:
            hypothesis = active.hypothesis()
            found[tuple(hypothesis.tokens)] = hypothesis.score
        expected = naive(head, encoder_out[n], int(lens[n]), beam, 1.5, 0.5)
        assert found.keys() == expected.keys()
        for ys, score in found.items():
            assert score == pytest.approx(expected[ys], abs=1e-4)
        c = head.decoder.context_size
        assert tuple(best.tokens) == max(found, key=lambda y: found[y] / (len(y) + c))
        assert best.score == found[tuple(best.tokens)]
        assert len(best.tokens) == len(best.frames) == len(best.log_probs)


def test_the_search_alone_is_the_same_search(head, make_batch, monkeypatch):
    """What is done where a rounding could decide, done everywhere."""
    batch = make_batch(4, 25)
    search = BeamSearch(head)
    expected = search(*batch)
    assert expected.report.asked_again < expected.report.frames
    monkeypatch.setattr(beam_module, "_rounding", lambda score: float("inf"))
    alone = search(*batch)
    assert alone.report.asked_again == alone.report.frames
    for found, other in zip(alone.hypotheses, expected.hypotheses):
        assert (found.tokens, found.frames) == (other.tokens, other.frames)
        assert found.score == pytest.approx(other.score, abs=1e-4)


def test_equal_tokens_are_searched_alone(head, make_batch):
    with torch.no_grad():
        linear = head.joiner.output_linear
        linear.bias[1] += 2.0  # so that it is found
        linear.weight[2], linear.bias[2] = linear.weight[1], linear.bias[1] + 3e-5
    encoder_out, lens = make_batch(4, 30, 2)
    result = BeamSearch(head, beam=1)(encoder_out, lens)
    assert result.report.asked_again > 0
    for x, n, found in zip(encoder_out, lens.tolist(), result.hypotheses):
        alone = icefalls(head, x[None, :n], torch.tensor([n]), beam=1)[0]
        assert (found.tokens, found.frames) == alone


def test_chunks_of_any_size_give_the_whole(head, make_batch):
    search = BeamSearch(head)
    for seed in range(3):
        encoder_out, lens = make_batch(4, 40, seed)
        expected, states = found_by(search, encoder_out, lens), None
        while encoder_out.size(1):
            size = int(torch.randint(1, 9, ()))
            chunk, encoder_out = encoder_out[:, :size], encoder_out[:, size:]
            result = search(chunk, lens.clamp(0, chunk.size(1)), states)
            lens, states = (lens - size).clamp(min=0), result.states
        assert [(h.tokens, h.frames) for h in result.hypotheses] == expected


def test_the_joiner_is_asked_less_often_than_there_are_frames(make_head, make_batch):
    head = make_head(rate=0.1)
    report = BeamSearch(head)(*make_batch(1, 200, 1)).report
    assert report.rounds < report.frames / 2


def test_rows_without_frames_say_nothing(head, make_batch):
    encoder_out, _ = make_batch(2, 9)
    assert (
        found_by(BeamSearch(head), encoder_out, torch.tensor([0, 0])) == [([], [])] * 2
    )


def test_refusals(make_head):
    head = make_head()
    for options, words in (
        ({"beam": 0}, "`beam` is 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
    ):
        with pytest.raises(KDError, match=words):
            BeamSearch(head, **options)
    del head.decoder.context_size
    with pytest.raises(KDError, match="has a state and no lookup tables"):
        BeamSearch(head)

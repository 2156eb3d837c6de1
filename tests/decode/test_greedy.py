"""Greedy search gives the tokens and frames of icefall's, whatever the draft is."""

import pytest
import torch
from zipformer.decode.search import greedy_search

from icefall_kd import KDError
from icefall_kd.decode import (
    GreedySearch,
    Hypothesis,
    ctc_draft,
    draft_of,
    looping,
    products,
    speculation,
    transducer,
    transducer_greedy,
)

UNK = 3


@pytest.fixture(params=[1, 2, 3], ids="context-{}".format)
def context(request):
    return request.param


@pytest.fixture(params=[(0, None), (6, None), (0, UNK)], ids=str)
def head(request, make_head, context):
    blank_id, unk_id = request.param
    return make_head(context=context, blank_id=blank_id, unk_id=unk_id, seed=context)


def icefalls(head, encoder_out, lens, **options):
    """The reference: tokens and frames of each utterance, in batch mode."""
    encoder_out = encoder_out[:, : int(lens.max())]
    with torch.no_grad():
        found = greedy_search(
            head, encoder_out, lens, return_timestamps=True, **options
        )
    return list(zip(found.hyps, found.timestamps))


def icefalls_alone(head, encoder_out, n, max_sym=1, penalty=0.0):
    """icefall's greedy_search of one utterance, with its operations and shapes."""
    blank, c = head.decoder.blank_id, head.decoder.context_size
    silent = (blank, getattr(head, "unk_id", blank))
    context, hyp, frames, t, at_frame = [-1] * (c - 1) + [blank], [blank] * c, [], 0, 0
    projected = head.joiner.encoder_proj(encoder_out[None, :n])
    while t < n and len(frames) < 1000:
        if at_frame >= max_sym:
            at_frame, t = 0, t + 1
            continue
        rows = head.decoder(torch.tensor([context]), need_pad=False)
        rows = head.joiner.decoder_proj(rows).unsqueeze(1)
        frame = projected[:, t : t + 1].unsqueeze(2)
        logits = head.joiner(frame, rows, project_input=False).detach().flatten()
        logits[blank] -= penalty
        y = int(logits.argmax())
        if y in silent:
            at_frame, t = 0, t + 1
        else:
            hyp.append(y)
            frames.append(t)
            context, at_frame = hyp[-c:], at_frame + 1
    return hyp[c:], frames


def found_by(search, *batch, **options):
    result = search(*batch, **options)
    return [(h.tokens, h.frames) for h in result.hypotheses]


# Label looping


@pytest.mark.parametrize("n", [1, 4, 16])
def test_label_looping_equals_icefalls(head, make_batch, n):
    search = GreedySearch(head)
    for seed in range(4):
        batch = make_batch(n, 37, seed)
        assert found_by(search, *batch) == icefalls(head, *batch)


@pytest.mark.parametrize("vocab", [500, 5000])
def test_large_vocabularies(make_head, make_batch, vocab):
    """No table of all contexts fits, and those of single tokens do."""
    head = make_head(vocab=vocab)
    for draft in ("none", "ctc"):
        search = GreedySearch(head, draft=draft)
        assert search.transducer.tables and search.transducer.all_rows is None
        batch = make_batch(4, 60)
        assert found_by(search, *batch) == icefalls(head, *batch)


def test_long_utterances_are_cut_into_segments_that_meet(head, make_batch):
    for seed in range(5):
        encoder_out = make_batch(2, 400, seed)[0]
        lens = torch.tensor([encoder_out.size(1), encoder_out.size(1) * 2 // 3])
        result = GreedySearch(head)(encoder_out, lens)
        found = [(h.tokens, h.frames) for h in result.hypotheses]
        assert found == icefalls(head, encoder_out, lens)
        assert all(len(h.log_probs) == len(h.tokens) for h in result.hypotheses)
        tokens = max(len(h.tokens) for h in result.hypotheses)
        assert result.report.rounds < tokens  # else nothing was gained


def test_segments_that_never_meet_are_searched_from_the_left(
    head, make_batch, monkeypatch
):
    monkeypatch.setattr(looping.Path, "meet", lambda self: False)
    encoder_out, lens = make_batch(1, 10, 5)[0][:1].repeat(1, 30, 1), None
    encoder_out += 0.1 * torch.randn(encoder_out.shape)
    lens = torch.tensor([encoder_out.size(1)])
    assert found_by(GreedySearch(head), encoder_out, lens) == icefalls(
        head, encoder_out, lens
    )


def test_several_tokens_a_frame_and_the_limit_of_1000(head, make_batch):
    for max_sym in (0, 1, 2, 5):
        search = GreedySearch(head, max_sym)
        encoder_out, lens = make_batch(3, 25, max_sym)
        expected = [
            icefalls_alone(head, x, n, max_sym)
            for x, n in zip(encoder_out, lens.tolist())
        ]
        assert found_by(search, encoder_out, lens) == expected
    with torch.no_grad():
        head.joiner.output_linear.bias[head.decoder.blank_id] -= 100
    encoder_out = torch.zeros(1, 300, 12)
    (hypothesis,) = GreedySearch(head, 5)(encoder_out, torch.tensor([300])).hypotheses
    expected = icefalls_alone(head, encoder_out[0], 300, 5)
    assert (hypothesis.tokens, hypothesis.frames) == expected
    assert hasattr(head, "unk_id") or len(hypothesis.tokens) == 1000


def test_blank_penalty(head, make_batch):
    batch = make_batch(4, 20)
    found = found_by(GreedySearch(head, blank_penalty=2.5), *batch)
    assert found == [
        icefalls_alone(head, x, n, penalty=2.5) if head.decoder.context_size < 3 else y
        for x, n, y in zip(batch[0], batch[1].tolist(), found)
    ]
    assert found != found_by(GreedySearch(head), *batch)


def test_log_probs_are_those_of_the_joiner(head, make_batch):
    encoder_out, lens = make_batch(4, 30)
    c, blank = head.decoder.context_size, head.decoder.blank_id
    for draft in ("none", "ctc"):
        for n, found in enumerate(
            GreedySearch(head, draft=draft)(encoder_out, lens).hypotheses
        ):
            tokens = [-1] * (c - 1) + [blank] + found.tokens
            for i, (t, value) in enumerate(zip(found.frames, found.log_probs)):
                rows = head.decoder(torch.tensor([tokens[i : i + c]]), need_pad=False)
                logits = head.joiner(encoder_out[n, t][None, None, None], rows[None])
                expected = logits.flatten().log_softmax(-1)[found.tokens[i]]
                assert value == pytest.approx(float(expected), abs=1e-4)


def test_rows_without_frames_and_empty_batches(head, make_batch):
    encoder_out, _ = make_batch(3, 9)
    n = encoder_out.size(1)
    for draft in ("none", "ctc"):
        search = GreedySearch(head, draft=draft)
        found = found_by(search, encoder_out, torch.tensor([0, n, 0]))
        assert (
            found[0] == found[2] == ([], [])
            and found[1] == found_by(search, encoder_out[1:2], torch.tensor([n]))[0]
        )
        assert found_by(search, encoder_out[:0], torch.tensor([], dtype=int)) == []
        assert (
            found_by(search, encoder_out[:, :0], torch.zeros(3, dtype=int))
            == [([], [])] * 3
        )


@pytest.mark.parametrize("packed_from", [0, 2**60])
def test_equal_tokens_are_asked_alone(head, make_batch, monkeypatch, packed_from):
    """Tokens 1 and 2 are equal twins: the last bit would decide, and icefall does."""
    monkeypatch.setattr(products, "PACKED_FROM", packed_from)
    with torch.no_grad():
        linear = head.joiner.output_linear
        linear.bias[1] += 2.0  # so that it is found
        linear.weight[2], linear.bias[2] = linear.weight[1], linear.bias[1] + 3e-6
    encoder_out, lens = make_batch(4, 30)
    for options in ({"draft": "none"}, {"draft": "ctc"}, {"max_sym_per_frame": 1}):
        if options.get("draft") and head.decoder.context_size == 3:
            continue  # icefall's two functions differ in the first contexts
        result = GreedySearch(head, **options)(encoder_out, lens)
        assert result.report.asked_again > 0
        for x, n, found in zip(encoder_out, lens.tolist(), result.hypotheses):
            assert (found.tokens, found.frames) == icefalls_alone(head, x, n)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_frames_that_are_not_finite_are_asked_alone(head, make_batch, value):
    """A NaN is no reason to call a frame silent: icefall's argmax decides."""
    encoder_out, lens = make_batch(3, 30)
    encoder_out[:, ::5] = float(value)
    result = GreedySearch(head, 1)(encoder_out, lens)
    for x, n, found in zip(encoder_out, lens.tolist(), result.hypotheses):
        assert (found.tokens, found.frames) == icefalls_alone(head, x, n)
    if value == "nan":
        assert result.report.asked_again > 0


def test_no_graph_is_kept(head, make_batch):
    encoder_out, lens = make_batch(1, 9)
    encoder_out.requires_grad_()
    GreedySearch(head)(encoder_out, lens)
    assert encoder_out.grad is None and torch.is_grad_enabled()


# Speculation


def drafts(head, expected, lens, longest):
    """Right ones, late ones, bad ones."""
    blank, vocab = head.decoder.blank_id, head.joiner.output_linear.out_features
    n = len(lens)

    def shifted(by):
        found = [Hypothesis(y, [t + by for t in frames]) for y, frames in expected]
        return draft_of(found, longest, blank)

    yield "right", shifted(0)
    yield "early", shifted(-1)
    yield "earlier", shifted(-4)
    yield "late", shifted(2)
    yield "all blank", torch.full((n, longest), blank)
    yield "all wrong", torch.randint(0, vocab, (n, longest))
    yield "one token", torch.full((n, longest), (blank + 1) % vocab)
    yield "longer than T", torch.randint(0, vocab, (n, 2 * longest + 1))
    yield "empty", torch.zeros(n, 0, dtype=torch.int64)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_no_draft_changes_the_result(head, make_batch, n):
    search = GreedySearch(head)
    for seed in range(3):
        encoder_out, lens = make_batch(n, 37, seed)
        expected = icefalls(head, encoder_out, lens)
        for name, draft in drafts(head, expected, lens, encoder_out.size(1)):
            result = search(encoder_out, lens, draft=draft)
            found = [(h.tokens, h.frames) for h in result.hypotheses]
            assert found == expected, name
            report = result.report
            assert report.joiner_rows <= 8 * report.frames, name
            if name == "right":
                assert report.rounds == 1 and report.joiner_rows == report.frames
                assert (
                    report.accepted
                    == report.drafted
                    == sum(len(y) for y, _ in expected)
                )
            if name in ("all blank", "empty"):
                assert report.drafted == 0


def test_the_ctc_heads_draft(head, make_batch):
    encoder_out, lens = make_batch(5, 37)
    with torch.no_grad():
        draft = ctc_draft(head.ctc_output(encoder_out), head.decoder.blank_id)
    own = GreedySearch(head, draft="ctc")(encoder_out, lens)
    given = GreedySearch(head, draft="none")(encoder_out, lens, draft=draft)
    assert own.hypotheses == given.hypotheses and own.report == given.report
    assert own.report.way.startswith("speculation") and own.report.drafted > 0


def test_a_draft_by_hand():
    best = torch.tensor([[2, 2, 0, 2, 1, 1, 3]])
    logits = torch.nn.functional.one_hot(best, 4)
    assert ctc_draft(logits).tolist() == [[2, 0, 0, 2, 1, 0, 3]]
    found = [Hypothesis([5, 6, 7, 8], [0, 2, 2, 9]), Hypothesis()]
    assert draft_of(found, 4).tolist() == [[5, 0, 7, 0], [0, 0, 0, 0]]


def test_a_bad_draft_is_given_up(make_head, make_batch, monkeypatch):
    head = make_head(rate=0.6)
    monkeypatch.setattr(speculation, "MAX_ROUNDS", 2)
    batch = make_batch(4, 60)
    result = GreedySearch(head, draft="ctc")(*batch)
    assert result.report.way == "speculation, then label looping"
    assert [(h.tokens, h.frames) for h in result.hypotheses] == icefalls(head, *batch)


# Chunks


@pytest.mark.parametrize("draft", ["none", "ctc"])
def test_chunks_of_any_size_give_the_whole(head, make_batch, draft):
    search = GreedySearch(head, draft=draft)
    for seed in range(5):
        encoder_out, lens = make_batch(4, 60, seed)
        expected = found_by(search, encoder_out, lens)
        states, found = None, [([], []) for _ in expected]
        while encoder_out.size(1):
            size = int(torch.randint(1, 14, ()))
            chunk, encoder_out = encoder_out[:, :size], encoder_out[:, size:]
            result = search(chunk, lens.clamp(0, chunk.size(1)), states)
            lens, states = (lens - size).clamp(min=0), result.states
            for (tokens, frames), new in zip(found, result.hypotheses):
                tokens += new.tokens
                frames += new.frames
        assert found == expected


# 10,000 lattices


@pytest.mark.parametrize("vocab, batch_size", [(5, 40), (40, 25), (500, 20)])
def test_ten_thousand_random_lattices(make_head, make_batch, vocab, batch_size):
    """3,400 of each vocabulary, with contexts 1 to 3, both ways."""
    each = 3400 // 6 // batch_size + 1
    for seed, context in enumerate((1, 2, 3, 1, 2, 3)):
        unk_id = 2 if seed > 2 else None
        head = make_head(
            vocab, context, 0, unk_id, seed, rate=(0.1, 0.3, 0.6)[seed % 3]
        )
        for k in range(each):
            search = GreedySearch(head, draft="none" if k % 2 else "ctc")
            batch = make_batch(batch_size, 15, 100 * seed + k)
            assert found_by(search, *batch) == icefalls(head, *batch)


# Other models, and refusals


def test_another_decoder_is_searched_without_tables(head, make_batch):
    """Nothing is guessed: its outputs differ from those of the tables."""
    forward = head.decoder.forward
    head.decoder.forward = lambda y, need_pad=True: 0.5 * forward(y, need_pad)
    batch = make_batch(3, 20)
    search = GreedySearch(head)
    assert not search.transducer.tables and search.transducer.all_rows is None
    assert found_by(search, *batch) == icefalls(head, *batch)


def test_another_joiner_is_called_itself(head, make_batch):
    forward = head.joiner.forward
    head.joiner.forward = lambda *a, **k: forward(*a, **k).relu()
    batch = make_batch(3, 20)
    search = GreedySearch(head)
    assert not search.transducer.plain_joiner
    assert found_by(search, *batch) == icefalls(head, *batch)


def test_refusals(make_head, make_batch):
    head = make_head()
    encoder_out, lens = make_batch(3, 9)
    longest = encoder_out.size(1)
    search = GreedySearch(head)
    for batch, draft, words in (
        ((encoder_out[0], lens), None, "2 dimensions"),
        ((encoder_out, lens[:2]), None, "2 lengths, and `encoder_out` 3 utterances"),
        ((encoder_out, lens + 99), None, f"has {longest} frames"),
        ((encoder_out, lens, [1]), None, "1 states for 3 utterances"),
        ((encoder_out, lens), torch.full((3, longest), 11), "11, and the model has 11"),
        ((encoder_out, lens), torch.full((3, longest), -1), "-1 to -1"),
        ((encoder_out, lens), torch.zeros(2, longest).long(), "there are 3 utterances"),
    ):
        with pytest.raises(KDError, match=words):
            search(*batch, draft=draft)
    with pytest.raises(KDError, match="`max_sym_per_frame` is -1"):
        GreedySearch(head, -1)
    with pytest.raises(KDError, match="`draft` is student"):
        GreedySearch(head, draft="student")
    head.ctc_output = None
    with pytest.raises(KDError, match="no CTC head"):
        GreedySearch(head, draft="ctc")
    head.joiner = None
    with pytest.raises(KDError, match="has no joiner"):
        GreedySearch(head)


def test_the_function_gives_tokens(head, make_batch):
    batch = make_batch(4, 20)
    found = transducer_greedy(head, *batch)
    assert found == [tokens for tokens, _ in icefalls(head, *batch)]


def test_rows_of_contexts_are_remembered_as_long_as_there_is_place(
    make_head, make_batch, monkeypatch
):
    """Contexts of 5000 tokens have no table; what is remembered never shows."""
    head = make_head(vocab=5000, rate=0.5)
    batches = [make_batch(3, 40, seed) for seed in range(3)]
    expected = [icefalls(head, *batch) for batch in batches]
    for places in (transducer.MAX_SEEN // 20, 9, 2, 0):
        monkeypatch.setattr(transducer, "MAX_SEEN", 20 * places)
        search, computed = GreedySearch(head, draft="none"), []
        rows_of = search.transducer._rows_of_contexts

        def counted(contexts, rows_of=rows_of, computed=computed):
            computed.append(len(contexts))
            return rows_of(contexts)

        search.transducer._rows_of_contexts = counted
        for _ in range(2):
            assert [found_by(search, *batch) for batch in batches] == expected
        seen = search.transducer._places
        if places > 9:  # each was computed once
            different = sum(computed)
            assert different == len(seen)
        else:
            assert sum(computed) > different
            assert len(seen) <= max(places, max(computed))

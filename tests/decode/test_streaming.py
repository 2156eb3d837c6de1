"""Streaming: chunk by chunk the causal model's output under the chunk mask."""

import pytest
import torch
from test_windows import chunks_of, join, recording

from icefall_kd import KDError, ModelTap
from icefall_kd.decode.beam import BeamSearch
from icefall_kd.decode.greedy import GreedySearch
from icefall_kd.decode.streaming import StreamingEncoder
from icefall_kd.decode.windows import search_pieces

CAUSAL = {"causal": True, "chunk_size": "8", "left_context_frames": "32"}
DEEP = {**CAUSAL, "downsampling_factor": "1,4", "cnn_module_kernel": "7,15"}


def whole(model, features):
    """The output of the utterance under the model's own chunk mask."""
    with ModelTap(model, with_ctc=False) as tap:
        lens = torch.tensor([len(features)])
        return tap.encode(features.unsqueeze(0), lens).encoder_out


@pytest.mark.parametrize("changes", [CAUSAL, DEEP], ids="2 4".split())
@pytest.mark.parametrize("length", [9, 10, 15, 22, 23, 24, 25, 26, 30, 31, 32, 39, 40])
def test_a_short_utterance_is_as_under_the_mask(make_model, changes, length):
    model = make_model(**changes).eval()
    features = recording(length)
    out = join(StreamingEncoder(model)(features))
    torch.testing.assert_close(out, whole(model, features), rtol=0, atol=2e-5)


@pytest.mark.parametrize("changes", [CAUSAL, DEEP], ids="2 4".split())
@pytest.mark.parametrize("length", [300, *range(401, 418)])
def test_a_long_utterance_is_as_under_the_mask(make_model, changes, length):
    model = make_model(**changes).eval()
    features = recording(length)
    out = join(StreamingEncoder(model)(chunks_of(features, [3, 17, 160])))
    torch.testing.assert_close(out, whole(model, features), rtol=0, atol=2e-5)


@pytest.mark.parametrize("search_of", [GreedySearch, BeamSearch])
@pytest.mark.parametrize("length", [301, 640])
def test_the_tokens_are_those_under_the_mask(make_model, search_of, length):
    model = make_model(**DEEP).eval()
    features, search = recording(length), search_of(model)
    out = whole(model, features)
    (expected,) = search(out, torch.tensor([out.size(1)])).hypotheses
    pieces = StreamingEncoder(model)(chunks_of(features, [1, 7, 100]))
    *_, result = search_pieces(search, pieces)
    (found,) = result.hypotheses
    assert len(expected.tokens) > 5
    assert (found.tokens, found.frames) == (expected.tokens, expected.frames)


def test_other_features_behind_what_a_chunk_sees_change_nothing(make_model):
    model = make_model(**CAUSAL).eval()
    features = recording(200)
    first = next(StreamingEncoder(model)(features))
    features[8 * 2 + 13 :] = 7.0
    assert torch.equal(next(StreamingEncoder(model)(features)), first)
    features[8 * 2 + 12] = 7.0  # the last that it does see
    assert not torch.equal(next(StreamingEncoder(model)(features)), first)


def test_two_recordings_may_be_streamed_in_turn(make_model):
    model = make_model(**CAUSAL).eval()
    encoder = StreamingEncoder(model)
    one, other = recording(200, 1), recording(200, 2)
    pairs = list(zip(encoder(one), encoder(other)))
    assert torch.equal(join(a for a, _ in pairs), join(encoder(one)))
    assert torch.equal(join(b for _, b in pairs), join(encoder(other)))


def test_the_model_keeps_its_chunks_and_hooks(make_model):
    model = make_model(causal=True, chunk_size="8,16", left_context_frames="32,64")
    model.eval()
    encoder = StreamingEncoder(model, 16, 32)
    list(encoder(recording(200)))
    assert tuple(model.encoder.chunk_size) == (8, 16)
    assert tuple(model.encoder.left_context_frames) == (32, 64)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_features_are_asked_for_when_they_are_needed(make_model):
    model, given = make_model(**CAUSAL).eval(), 0

    def features():
        nonlocal given
        for chunk in chunks_of(recording(300), [1]):
            given += 1
            yield chunk

    pieces = StreamingEncoder(model)(features())
    for n in range(1, 10):
        next(pieces)
        assert given == 16 * n + 13


@pytest.mark.parametrize(
    "changes, options, said",
    [
        ({}, {}, "is not causal, and cannot be streamed"),
        ({**CAUSAL, "chunk_size": "8,-1"}, {}, "`chunk_size` is -1"),
        (DEEP, {"chunk_size": 6}, "`chunk_size` is 6, .* by 1, 2, 4"),
        ({**CAUSAL, "left_context_frames": "-1"}, {}, "`left_context_frames` is -1"),
        (CAUSAL, {"left_context_frames": 36}, "a multiple of `chunk_size` 8"),
        (DEEP, {"left_context_frames": 24}, "28 or more"),
    ],
)
def test_what_cannot_be_streamed_is_refused(make_model, changes, options, said):
    with pytest.raises(KDError, match=said):
        StreamingEncoder(make_model(**changes), **options)


@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_recording_shorter_than_a_frame_is_refused(make_model, length):
    encoder = StreamingEncoder(make_model(**CAUSAL).eval())
    with pytest.raises(KDError, match=f"{length} feature frames .* needs 9"):
        list(encoder(recording(length)))


def test_features_that_are_not_finite_are_refused(make_model):
    encoder = StreamingEncoder(make_model(**CAUSAL).eval())
    features = recording(100)
    features[50] = float("nan")
    with pytest.raises(KDError, match="not finite at 0.50 s"):
        list(encoder(features))

"""Windows: a recording of any length is encoded with overlap, and searched once."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from icefall_kd import KDError, ModelTap
from icefall_kd.decode.beam import BeamSearch
from icefall_kd.decode.frames import Frames
from icefall_kd.decode.greedy import GreedySearch
from icefall_kd.decode.windows import (
    WindowedEncoder,
    mean_off,
    overlapping,
    search_pieces,
)

DEEP = {"downsampling_factor": "1,4"}
CAUSAL = {"causal": True, "chunk_size": "8,16", "left_context_frames": "16,32"}
ATTENTION = re.compile(r"(attn\d|attention)\.out_proj")
MODELS = pytest.mark.parametrize(
    "changes", [{}, DEEP, CAUSAL], ids="2 4 causal".split()
)


def recording(frames, seed=3):
    return torch.randn(frames, 20, generator=torch.Generator().manual_seed(seed))


def whole(model, features):
    with ModelTap(model, with_ctc=False) as tap:
        lens = torch.tensor([len(features)])
        return tap.encode(features.unsqueeze(0), lens).encoder_out


def chunks_of(features, sizes):
    at = 0
    for size in itertools.cycle(sizes):
        if at >= len(features):
            return
        yield features[at : at + size]
        at += size


def join(pieces):
    return torch.cat(list(pieces), dim=1)


# Where frames lie


@pytest.mark.parametrize("length", range(9, 40))
def test_frames_are_those_of_the_front_end(make_model, length):
    model = make_model().eval()
    frames = Frames(model)
    out = whole(model, recording(length))
    stack = (length - frames.kernel) // frames.front_stride + 1
    assert out.size(1) == -(-stack // frames.out_factor)


def test_a_window_begins_where_all_stacks_and_chunks_do(make_model):
    assert Frames(make_model()).step == 1
    assert Frames(make_model(downsampling_factor="1,8")).step == 4
    assert Frames(make_model(**CAUSAL)).step == 8
    encoder = WindowedEncoder(make_model(downsampling_factor="1,8"), 1.0, 0.1)
    assert (encoder.window, encoder.overlap) == (24, 4)


@pytest.mark.parametrize("n", [0, 1, 57, 58, 59, 60, 61, 200, 201])
@pytest.mark.parametrize("overlap", [0, 3, 5])
def test_stretches_cover_all_rows_once_with_their_context(n, overlap):
    rows = np.arange(n)
    parts = list(overlapping(chunks_of(rows, [7, 1, 30]), 5, overlap, 4, 3, 2))
    begin = 0
    for i, (part, left, is_last) in enumerate(parts):
        assert is_last == (i == len(parts) - 1)
        assert left == (overlap if i else 0)
        end = n if is_last else 4 * (begin + 5 + overlap) + 3
        assert (part == rows[4 * (begin - left) : end]).all()
        begin += 5
    assert len(parts) == (n > 0) if n <= 4 * (5 + overlap) + 3 + 1 else len(parts) > 1


# Encoder output


@MODELS
@pytest.mark.parametrize("length", [9, 10, 100, 165, 167])
def test_a_recording_of_one_window_is_encoded_as_ever(make_model, changes, length):
    model = make_model(**changes).eval()
    encoder = WindowedEncoder(model, 1.28, 0.32)
    features = recording(length)
    pieces = list(encoder(chunks_of(features, [13, 1, 50])))
    assert len(pieces) == 1
    assert torch.equal(pieces[0], whole(model, features))


@MODELS
@pytest.mark.parametrize("length", [168, 169, 500, 777])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_frame_is_that_of_its_window(make_model, changes, length, batch_size):
    model = make_model(**changes).eval()
    encoder = WindowedEncoder(model, 1.28, 0.32, batch_size)
    features = recording(length)
    out = join(encoder(chunks_of(features, [13, 100])))
    assert out.size(1) == whole(model, features).size(1)
    for begin in range(0, out.size(1), encoder.window):
        first = max(begin - encoder.overlap, 0)
        last = begin + encoder.window + encoder.overlap
        if last + encoder.overlap >= out.size(1):
            continue  # the last window goes on to the end
        window = features[4 * first : 4 * last + 7]
        expected = whole(model, window)[:, begin - first :][:, : encoder.window]
        torch.testing.assert_close(
            out[:, begin : begin + encoder.window], expected, rtol=0, atol=2e-5
        )


def test_the_frames_of_a_window_are_where_the_whole_has_them(make_model):
    """With attention switched off the encoder sees as far as its convolutions."""
    model = make_model().eval()
    for name, p in model.encoder.named_parameters():
        if ATTENTION.search(name):
            torch.nn.init.zeros_(p)
    features = recording(901)
    out = join(WindowedEncoder(model, 2.0, 1.6)(features))
    torch.testing.assert_close(out, whole(model, features), rtol=0, atol=2e-5)
    short = join(WindowedEncoder(model, 2.0, 0.0)(features))
    assert (short - out).abs().max() > 1e-2


def test_chunks_of_any_size_give_the_same_bits(make_model):
    encoder = WindowedEncoder(make_model().eval(), 1.28, 0.32)
    features = recording(700)
    expected = join(encoder(features))
    for sizes in ([1], [5, 90], [700], [0, 333]):
        assert torch.equal(join(encoder(chunks_of(features, sizes))), expected)


def test_the_encoder_runs_over_each_window_once(make_model):
    model, heard = make_model().eval(), []
    model.encoder_embed.register_forward_pre_hook(
        lambda module, args: heard.append(tuple(args[0].shape[:2]))
    )
    join(WindowedEncoder(model, 1.28, 0.16, batch_size=2)(recording(128 * 6)))
    assert heard == [(1, 151), (2, 167), (2, 167), (1, 144)]


def test_no_more_than_a_batch_of_windows_is_read_ahead(make_model):
    model, given = make_model().eval(), 0

    def features():
        nonlocal given
        for chunk in chunks_of(recording(4000), [10]):
            given += len(chunk)
            yield chunk

    pieces = WindowedEncoder(model, 1.28, 0.32)(features())
    for n in range(1, 20):
        next(pieces)
        assert given <= 128 * n + 64


def test_a_short_recording_has_the_mean_of_the_recipe(make_model):
    model = make_model().eval()
    features = recording(100) + 5.0
    array = features.numpy() - features.numpy().mean(axis=0)
    expected = whole(model, torch.from_numpy(array))
    for mean in (1.0, math.inf):
        encoder = WindowedEncoder(model, 1.28, 0.32, mean=mean)
        assert torch.equal(join(encoder(features)), expected)


def test_a_long_recording_has_the_mean_around_each_frame():
    features = 3.0 + recording(257)
    found = mean_off(features, 0.5)
    for t in (0, 10, 25, 26, 100, 231, 232, 256):
        begin = min(max(t - 25, 0), 257 - 50)
        expected = features[t] - features[begin : begin + 50].mean(0)
        torch.testing.assert_close(found[t], expected, rtol=0, atol=1e-5)
    assert torch.equal(mean_off(features, 0.0), features)
    torch.testing.assert_close(mean_off(features, 0.5), mean_off(features - 9.0, 0.5))


# Search


@pytest.mark.parametrize("search_of", [GreedySearch, BeamSearch])
@pytest.mark.parametrize("window", [0.16, 1.28])
def test_a_search_goes_on_from_piece_to_piece(make_model, search_of, window):
    """What a search of the joined output finds, it finds in the pieces."""
    model = make_model().eval()
    search, encoder = search_of(model), WindowedEncoder(model, window, 0.16)
    features = recording(1501)
    out = join(encoder(features))
    (expected,) = search(out, torch.tensor([out.size(1)])).hypotheses
    assert len(expected.tokens) > 20
    frames = 0
    for result in search_pieces(search, encoder(chunks_of(features, [40]))):
        (found,) = result.hypotheses
        frames += result.report.frames - frames
        assert all(t < frames for t in found.frames)
    assert (found.tokens, found.frames) == (expected.tokens, expected.frames)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
    assert result.report.frames == out.size(1)


# Bad input


@pytest.mark.parametrize(
    "features, said",
    [
        (recording(0), "0 feature frames and the encoder needs 9"),
        ([], "the recording is empty"),
        (recording(8), "8 feature frames and the encoder needs 9"),
        (recording(200).unsqueeze(0), "`features` has 3 dimensions"),
        (recording(200).index_fill(0, torch.tensor([57]), float("nan")), "at 0.57 s"),
        (recording(999).index_fill(0, torch.tensor([980]), float("inf")), "at 9.80 s"),
    ],
    ids="none nothing short batch nan inf".split(),
)
def test_a_bad_recording_is_refused(make_model, features, said):
    encoder = WindowedEncoder(make_model().eval(), 1.28, 0.32)
    with pytest.raises(KDError, match=said):
        list(encoder(features))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"window": 0.01, "overlap": 0.0}, "least that this encoder divides is 0.08 s"),
        ({"window": 1.0, "overlap": 1.1}, "overlap from 0 to the window"),
        ({"window": 1.0, "overlap": -0.1}, "overlap from 0 to the window"),
        ({"window": float("nan")}, "overlap from 0 to the window"),
        ({"window": float("inf")}, "overlap from 0 to the window"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"mean": -1.0}, "`mean` is -1 s"),
    ],
)
def test_a_bad_window_is_refused(make_model, options, said):
    with pytest.raises(KDError, match=said):
        WindowedEncoder(make_model(**DEEP), **options)


def test_a_model_without_a_front_end_is_refused(make_model):
    model = make_model()
    del model.encoder_embed
    with pytest.raises(KDError, match="it is not known where its frames lie"):
        WindowedEncoder(model)

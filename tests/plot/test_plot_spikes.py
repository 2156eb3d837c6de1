"""Where the picture of spikes puts tokens."""

import pytest
import torch

from icefall_kd import ModelTap
from icefall_kd.decode.ctc import ctc_greedy
from icefall_kd.errors import KDError
from icefall_kd.plot.spikes import draw_spikes, spikes_in, track_of
from icefall_kd.plot.words import words_of


def log_probs(*rows):
    return torch.tensor(rows).log()


def test_a_spike_is_at_the_argmax_of_its_run():
    rows = [(0.9, 0.05, 0.05), (0.2, 0.6, 0.2), (0.1, 0.8, 0.1), (0.3, 0.5, 0.2)]
    rows += [(0.2, 0.1, 0.7), (0.9, 0.05, 0.05), (0.3, 0.1, 0.6)]
    found = spikes_in(log_probs(*rows))
    assert [(s.frame, s.token) for s in found] == [(2, 1), (4, 2), (6, 2)]
    assert [s.probability for s in found] == pytest.approx([0.8, 0.7, 0.6])


def test_another_blank_and_silence():
    rows = log_probs((0.1, 0.8, 0.1), (0.1, 0.1, 0.8))
    assert [(s.frame, s.token) for s in spikes_in(rows, blank_id=1)] == [(1, 2)]
    assert spikes_in(rows[:1], blank_id=1) == []


def test_a_track_has_the_tokens_of_greedy_search(make_model, make_utterance):
    model, utterance = make_model(seed=4).eval(), make_utterance()
    track = track_of("a", model, utterance)
    with ModelTap(model) as tap:
        out = tap.encode(utterance.features, utterance.lens)
    tokens = ctc_greedy(out.ctc_logits, out.encoder_out_lens)[0]
    assert [s.token for s in track.spikes] == tokens != []
    best = out.ctc_logits[0].argmax(-1)
    assert all(best[s.frame] == s.token for s in track.spikes)
    blank = out.ctc_logits[0].softmax(-1)[:, 0]
    assert torch.allclose(track.not_blank, 1 - blank, atol=1e-6)
    assert all(0 <= frame < len(blank) for frame, _ in track.emitted)


def test_a_model_without_a_ctc_head_is_refused(make_model, make_utterance):
    model = make_model(use_ctc=False)
    with pytest.raises(KDError, match="has no CTC head"):
        track_of("a", model, make_utterance())


def test_the_drawing_has_a_text_at_each_spike(make_model, make_utterance):
    pytest.importorskip("matplotlib")
    utterance = make_utterance()
    tracks = [track_of(n, make_model(seed=4), utterance) for n in ("a", "b")]
    texts = [f"t{i}" for i in range(11)]
    figure = draw_spikes(utterance, tracks, texts, "c1", words_of("zh"))
    spectrogram, *drawn = figure.axes
    assert spectrogram.images[0].get_array().shape == (20, 91)
    for axes, track in zip(drawn, tracks):
        at = {(round(t.get_position()[0], 3), t.get_text()) for t in axes.texts}
        expected = {
            (round(0.04 * s.frame + 0.02, 3), texts[s.token]) for s in track.spikes
        }
        assert expected <= at and len(expected) == len(track.spikes)
        assert axes.get_ylabel() == track.name

"""Models are timed in turn, part by part, and what is timed is the model."""

import pytest
import torch
from exporting import encoded

from icefall_kd.export import timing
from icefall_kd.export.files import DECODER, ENCODER, JOINER
from icefall_kd.export.graph import exportable
from icefall_kd.export.streaming import ChunkEncoder, torch_step
from icefall_kd.export.timing import _open, measure, one_thread
from icefall_kd.student.times import SIDES

SETTINGS = {"feature_dim": 20, "joiner_dim": 20, "context_size": 2}
SHORT = {"num_encoder_layers": "1,1", "feature_dim": 20}


class Clock:
    """Stands still but for what the timed parts say they take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, seconds):
        def run(*tensors):
            self.now += seconds(*tensors)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    def open_parts(side, model, settings, folder):
        factor = {"a": 1, "b": 4}[model] * (1 + SIDES.index(side))
        return {
            ENCODER: clock.taking(lambda x, lens: factor * x.size(1) * 1e-5),
            JOINER: clock.taking(lambda x, y: factor * 1e-6),
            DECODER: clock.taking(lambda y: factor * 1e-4),
        }

    monkeypatch.setattr(timing, "_open", open_parts)
    monkeypatch.setattr(timing, "exportable", lambda model: model)
    monkeypatch.setattr(timing.gc, "collect", lambda: None)  # of all tests' objects
    return clock


def test_encoder_and_search_are_timed_apart_as_seconds_for_a_second(clock):
    found = measure("ab", lambda name: (name, SETTINGS), lambda: None, clock, rounds=2)
    assert list(found) == ["a", "b"]
    for name, factor in (("a", 1), ("b", 4)):
        for i, side in enumerate(SIDES):
            rtf = found[name][side]
            assert rtf["encoder"] == pytest.approx(factor * (i + 1) * 1e-3)
            # 248 frames, and 0.2 tokens a frame.
            seconds = 248 * 1e-6 + 49 * 1e-4
            assert rtf["search"] == pytest.approx(factor * (i + 1) * seconds / 10)


def test_a_stream_is_timed_by_its_chunks(clock):
    """31 chunks of 0.32 s, of which the first takes 13 feature frames more."""
    chunks = {"causal": True, "chunk_size": "16", "left_context_frames": "64"}
    settings = {**SETTINGS, **chunks}
    found = measure("a", lambda name: (name, settings), lambda: None, clock, rounds=1)
    rtf = found["a"][SIDES[0]]
    assert rtf["encoder"] == pytest.approx((13 + 31 * 32) * 1e-5 / (31 * 0.32))
    assert rtf["search"] == pytest.approx((248 * 1e-6 + 49 * 1e-4) / 10)


def test_models_are_timed_in_turn(clock):
    made, advanced = [], []

    def make(name):
        made.append(name)
        return name, SETTINGS

    measure("ab", make, lambda: advanced.append(len(made)), clock, rounds=3)
    assert made == list("ababab") and advanced == [1, 2, 3, 4, 5, 6]


def test_one_disturbed_round_of_three_changes_nothing(clock):
    quiet = measure("ab", lambda name: (name, SETTINGS), lambda: None, clock)
    rounds = []

    def make(name):
        rounds.append(name)
        disturbed = rounds.count(name) == 2
        return ("b" if disturbed else name), SETTINGS

    found = measure("ab", make, lambda: None, clock)
    assert found["a"][SIDES[0]] == pytest.approx(quiet["a"][SIDES[0]])


def test_torch_has_its_threads_again():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert torch.get_num_threads() == before and torch.is_grad_enabled()


@torch.no_grad()
def test_what_is_timed_computes_what_the_model_does(make_model, tmp_path):
    pytest.importorskip("onnxruntime")
    model = make_model(**SHORT).eval()
    x, x_lens = torch.randn(1, 83, 20), torch.tensor([83])
    expected = model.joiner.encoder_proj(encoded(model, x, x_lens)[0])
    settings = {**SETTINGS, "feature_dim": 20}
    outputs = {}
    for side in SIDES:
        parts = _open(side, exportable(model), settings, tmp_path / "files")
        assert set(parts) == {ENCODER, DECODER, JOINER}
        outputs[side] = torch.as_tensor(parts[ENCODER](x, x_lens)[0])
        context = torch.zeros(1, 2, dtype=torch.int64)
        decoder_out = torch.as_tensor(parts[DECODER](context)[0]).view(1, -1)
        parts[JOINER](outputs[side][:, 0], decoder_out)
    for engine in ("onnxruntime", "torch"):
        exact, rounded = (outputs[f"{engine} {form}"] for form in ("fp32", "int8"))
        assert torch.allclose(exact, expected, atol=1e-4)
        error = float((rounded - expected).norm() / expected.norm())
        assert 0 < error < 0.2, engine


@torch.no_grad()
def test_what_is_timed_of_a_stream_is_the_model_chunk_by_chunk(make_model, tmp_path):
    pytest.importorskip("onnxruntime")
    sizes = {"causal": True, "chunk_size": "8", "left_context_frames": "16"}
    model = make_model(**SHORT, **sizes, cnn_module_kernel="7,5").eval()
    x, x_lens = torch.randn(1, 13 + 16 * 4, 20), torch.tensor([13 + 16 * 4])
    chunks = ChunkEncoder(model, model.joiner.encoder_proj).eval()
    expected = torch.from_numpy(chunks.encode(torch_step(chunks), x.numpy()))
    outputs = {}
    for side in SIDES:
        settings = {**SETTINGS, **sizes, "feature_dim": 20}
        parts = _open(side, exportable(model), settings, tmp_path / "files")
        assert set(parts) == {ENCODER, DECODER, JOINER}
        outputs[side] = torch.as_tensor(parts[ENCODER](x, x_lens)[0][0])
    assert len(expected) == 4 * 4
    for engine in ("onnxruntime", "torch"):
        exact, rounded = (outputs[f"{engine} {form}"] for form in ("fp32", "int8"))
        assert torch.allclose(exact, expected, atol=1e-4)
        error = float((rounded - expected).norm() / expected.norm())
        assert 0 < error < 0.2, engine

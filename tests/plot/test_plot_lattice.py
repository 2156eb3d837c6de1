"""The numbers in the picture of a lattice."""

import pytest
import torch

from icefall_kd import ModelTap
from icefall_kd.errors import KDError
from icefall_kd.plot.lattice import draw_lattice, lattice_picture
from icefall_kd.plot.words import words_of

LABELS = [3, 7, 3, 9, 5, 4]
TEXTS = [f"t{i}" for i in LABELS]


@pytest.fixture
def picture(make_model, make_utterance):
    model = make_model(seed=3).eval()
    return lattice_picture(model, make_utterance(), LABELS, TEXTS, s_range=3)


def test_the_occupancy_of_a_frame_is_one_and_its_expected_tokens(picture):
    frames, positions = picture.occupancy.shape
    assert positions == len(LABELS) + 1
    of_frames = picture.occupancy.sum(1)
    assert float(of_frames.min()) >= 1 - 1e-4
    total = frames + len(LABELS)
    assert float(of_frames.sum()) == pytest.approx(total, rel=1e-4)
    # Each path passes each label position.
    assert float(picture.occupancy.sum(0).min()) >= 1 - 1e-4


def test_the_best_path_goes_from_corner_to_corner_by_single_steps(picture):
    frames, positions = picture.occupancy.shape
    assert picture.path[0] == (0, 0)
    assert picture.path[-1] == (frames - 1, positions - 1)
    steps = {(b[0] - a[0], b[1] - a[1]) for a, b in zip(picture.path, picture.path[1:])}
    assert steps == {(0, 1), (1, 0)}
    assert len(picture.emissions) == len(LABELS)
    assert picture.emissions == sorted(picture.emissions)


def test_the_ranges_are_those_that_the_models_own_lattice_is_pruned_to(
    picture, make_model, make_utterance
):
    model, utterance = make_model(seed=3).eval(), make_utterance()
    with ModelTap(model, with_ctc=False) as tap:
        out = tap.encode(utterance.features, utterance.lens)
        ranges = tap.lattice(out, [LABELS], 3).ranges[0]
    assert torch.equal(picture.low, ranges[:, 0])
    assert torch.equal(picture.high, ranges[:, -1])
    inside = sum(
        float(picture.occupancy[t, low : high + 1].sum())
        for t, (low, high) in enumerate(zip(picture.low, picture.high))
    )
    share = 1 - inside / float(picture.occupancy.sum())
    assert 0 < share < 1
    assert picture.outside == pytest.approx(share, abs=1e-5)


def test_ranges_of_all_positions_leave_nothing_out(make_model, make_utterance):
    model = make_model(seed=3).eval()
    for s_range in (7, 50):
        picture = lattice_picture(model, make_utterance(), LABELS, TEXTS, s_range)
        assert picture.outside == 0.0
        assert picture.low.tolist() == [0] * len(picture.low)
        assert picture.high.tolist() == [len(LABELS)] * len(picture.high)


def test_one_token_makes_a_lattice(make_model, make_utterance):
    model = make_model(seed=3).eval()
    picture = lattice_picture(model, make_utterance(23), [4], ["x"])
    assert picture.occupancy.shape[1] == 2 and len(picture.emissions) == 1


@pytest.mark.parametrize("s_range", [0, 1, -3])
def test_a_range_that_can_not_be_drawn_is_refused(make_model, make_utterance, s_range):
    with pytest.raises(KDError, match=f"`s_range` is {s_range}.*give 2 or more"):
        lattice_picture(make_model(), make_utterance(), [4], ["x"], s_range)


def test_the_drawing_names_each_row_by_its_token(picture):
    pytest.importorskip("matplotlib")
    figure = draw_lattice(picture, "c1: zero", words_of("en"))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["(start)", *TEXTS]
    assert axes.get_title(loc="left") == "c1: zero"
    shown = axes.images[0].get_array()
    assert shown.shape == tuple(picture.occupancy.T.shape)

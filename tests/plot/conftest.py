"""Utterances of random features for small models."""

import pytest
import torch

from icefall_kd.plot.utterance import Utterance


@pytest.fixture
def make_utterance(make_cut):
    """An utterance of so many feature frames; 40 ms a frame."""

    def make(num_frames=91, text="zero one", cut_id="c1"):
        cut = make_cut(cut_id, num_frames, text=text)
        features = torch.from_numpy(cut.load_features()).unsqueeze(0)
        return Utterance(cut, features, torch.tensor([num_frames]), 0.01, 0.04)

    return make

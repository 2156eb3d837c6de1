"""Nodes, and lattices of a real model."""

import pytest
import torch

from icefall_kd.tap import ModelTap
from icefall_kd.types import Nodes


@pytest.fixture
def nodes():
    g = torch.Generator().manual_seed(2)
    return Nodes(
        row=torch.tensor([0, 0, 1, 1, 1]),
        frame=torch.tensor([0, 4, 3, 2, 0]),
        position=torch.tensor([0, 1, 2, 3, 1]),
        label=torch.tensor([3, 2, 1, -1, 6]),
        occupancy=torch.rand(5, generator=g, dtype=torch.float64),
        teacher=2 * torch.randn(5, 7, generator=g, dtype=torch.float64),
    )


@pytest.fixture
def lattice_of(make_model, features):
    def lattice(y, seed, s_range):
        with ModelTap(make_model(seed=seed)) as hook:
            return hook.lattice(hook.encode(*features), y, s_range)

    return lattice

"""Cuts that carry targets."""

import pytest

# Not in the order of their durations.
LENGTHS = {"c1": 33, "c2": 90, "c3": 61, "c4": 12, "c5": 62}


@pytest.fixture
def cuts(make_cut, make_store):
    """Cuts that carry targets."""
    return make_store([make_cut(name, n) for name, n in LENGTHS.items()])


@pytest.fixture
def stored(stored_form):
    return stored_form


@pytest.fixture
def noise(make_cut):
    cut = make_cut("noise", 150)
    cut.supervisions = []
    return cut

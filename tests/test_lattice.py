"""Labels of a lattice: which one follows a position, and how a batch's are collated."""

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.lattice import check_s_range, next_labels, pad_labels

LABELS = [[3, 4, 3], [5], [6, 7]]


def test_the_label_behind_each_position_of_one_utterance():
    position = torch.tensor([[0, 2], [1, 3], [3, 9]])
    labels = next_labels(torch.tensor(LABELS[0]), position)
    assert labels.tolist() == [[3, 3], [4, -1], [-1, -1]]


def test_the_label_behind_each_position_of_a_batch():
    padded, boundary = pad_labels(LABELS, torch.tensor([9, 2, 5]), blank_id=1)
    row = torch.tensor([0, 0, 1, 1, 2, 2])
    position = torch.tensor([2, 3, 0, 1, 1, 2])
    labels = next_labels(padded, position, row, boundary[:, 2])
    assert labels.tolist() == [3, -1, 5, -1, 7, -1]


def test_no_label_follows_where_there_is_none():
    position = torch.tensor([0, 4])
    nothing = torch.zeros(0, dtype=torch.int64)
    assert next_labels(nothing, position).tolist() == [-1, -1]


def test_labels_are_padded_with_blank_and_bounded_as_k2_has_it():
    padded, boundary = pad_labels(LABELS, torch.tensor([9, 2, 5]), blank_id=1)
    assert padded.tolist() == [[3, 4, 3], [5, 1, 1], [6, 7, 1]]
    assert boundary.tolist() == [[0, 0, 3, 9], [0, 0, 1, 2], [0, 0, 2, 5]]


@pytest.mark.parametrize("s_range", [1, -1])
def test_a_range_that_no_path_gets_through_is_refused(s_range):
    with pytest.raises(KDError, match=f"`s_range` is {s_range}, and no path"):
        check_s_range(s_range)
    for positions in (0, 2, 9):
        check_s_range(positions)

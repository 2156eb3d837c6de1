"""strongest_front: of the front end the channels of the largest weights are taken."""

import pytest
import torch

from icefall_kd.student.front import FRONT_READERS, strongest_front
from icefall_kd.student.selection import CONVNEXT, FRONT_CONVS

CHANNELS = (6, 9, 14)


@pytest.fixture
def embed(make_model):
    return make_model(seed=2, embed_channels="6,9,14").encoder_embed


def strongest(embed, *channels):
    parameters = embed.state_dict(prefix="encoder_embed.")
    return strongest_front(parameters, channels)


def naive(embed, conv, readers):
    """Of each channel: squares of the weights that compute it, times the readers'."""
    total = torch.zeros(len(conv.weight), dtype=torch.float64)
    for reader in readers:
        given = []
        for c, own in enumerate(conv.weight.detach().double()):
            width = reader.weight.size(1) // len(conv.weight)
            read = reader.weight.detach().double()[:, c * width : (c + 1) * width]
            given.append(float((own**2).sum() * (read**2).sum()))
        total += torch.tensor(given) / sum(given)
    return total


def test_the_channels_of_the_largest_products_of_weights_are_taken(embed):
    convnext = embed.convnext
    cases = {
        FRONT_CONVS[0]: (embed.conv[0], [embed.conv[4]], 4),
        FRONT_CONVS[1]: (embed.conv[4], [embed.conv[7]], 5),
        FRONT_CONVS[2]: (embed.conv[7], [convnext.pointwise_conv1, embed.out], 3),
        CONVNEXT: (convnext.pointwise_conv1, [convnext.pointwise_conv2], 9),
    }
    units = strongest(embed, 4, 5, 3)
    assert set(units) == set(cases)
    for name, (conv, readers, count) in cases.items():
        order = naive(embed, conv, readers).argsort(descending=True).tolist()
        assert units[name] == sorted(order[:count]) != list(range(count)), name


def test_all_channels_are_taken_in_their_order(embed):
    units = strongest(embed, *CHANNELS)
    assert [units[conv] for conv in FRONT_CONVS] == [list(range(n)) for n in CHANNELS]
    assert units[CONVNEXT] == list(range(3 * 14))


@pytest.mark.parametrize("silent", ["computed", "read"])
def test_a_channel_that_is_not_computed_or_not_read_is_not_taken(embed, silent):
    with torch.no_grad():
        if silent == "computed":
            embed.conv[4].weight[[0, 7]] = 0
        else:
            embed.conv[7].weight[:, [0, 7]] = 0
    units = strongest(embed, 6, 7, 14)
    assert units[FRONT_CONVS[1]] == [1, 2, 3, 4, 5, 6, 8]


def test_the_readers_are_modules_of_the_model(make_model):
    names = dict(make_model().named_modules())
    assert set(FRONT_READERS) <= set(names)

"""Selects the channels of the front end that a narrower student takes."""

from typing import Callable, Dict, List, Mapping, Sequence

import torch

from icefall_kd.student.selection import CONVNEXT, FRONT_CONVS

# For each of the front end's convolutions, the matrices that read its channels.
_READERS = (
    (FRONT_CONVS[1],),
    (FRONT_CONVS[2],),
    (f"{CONVNEXT}.pointwise_conv1", "encoder_embed.out"),
)
_HIDDEN, _HIDDEN_READER = (f"{CONVNEXT}.pointwise_conv{i}" for i in (1, 2))
FRONT_READERS = (*sum(_READERS, ()), _HIDDEN_READER)


def largest(share: torch.Tensor, count: int) -> List[int]:
    """The ``count`` largest of ``share``, (C,), as sorted indices."""
    return sorted(share.topk(count).indices.tolist())


def select_front(
    share: Callable[[str], torch.Tensor], channels: Sequence[int]
) -> Dict[str, List[int]]:
    """Select channels and hidden units by their shares in what the matrices compute.

    The last convolution's channels are read twice, by the ConvNeXt and, frequency by
    frequency, by the output layer. There a channel's share is the sum over both.

    Args:
      share: A function from the name of a module of :data:`FRONT_READERS` to the share
        of each of its input channels, (C,).
      channels: The numbers of channels of the student's three convolutions.

    Returns:
      Indices, as :class:`~icefall_kd.student.selection.Selection` has them in
      ``units``.
    """
    units = {}
    for conv, (reader, *others), count in zip(FRONT_CONVS, _READERS, channels):
        total = share(reader)
        for name in others:  # with a column for each frequency of a channel
            total = total + share(name).view(len(total), -1).sum(1)
        units[conv] = largest(total, count)
    hidden = share(_HIDDEN_READER)
    ratio = len(hidden) // len(total)  # hidden units for each channel
    units[CONVNEXT] = largest(hidden, ratio * channels[-1])
    return units


def strongest_front(
    parameters: Mapping[str, torch.Tensor], channels: Sequence[int]
) -> Dict[str, List[int]]:
    """Select the channels and hidden units of the front end that have large weights.

    A channel's share is ||V_c||^2 ||W_c||^2, where V_c are the weights that compute it
    and W_c those that read it. It stands for the share that
    :func:`~icefall_kd.student.importance.select_important` measures on cuts.

    Args:
      parameters: The teacher's, by name.
      channels: As in :func:`select_front`.

    Returns:
      As :func:`select_front`.
    """
    computed_by = {_HIDDEN_READER: _HIDDEN}
    for conv, readers in zip(FRONT_CONVS, _READERS):
        computed_by.update(dict.fromkeys(readers, conv))

    def share(reader: str) -> torch.Tensor:
        computing = parameters[f"{computed_by[reader]}.weight"].double() ** 2
        reading = parameters[f"{reader}.weight"].double() ** 2
        squares = computing.flatten(1).sum(1)
        columns = reading.transpose(0, 1).reshape(len(squares), -1).sum(1)
        share = squares * columns
        return share / share.sum().clamp(min=1e-300)

    return select_front(share, channels)

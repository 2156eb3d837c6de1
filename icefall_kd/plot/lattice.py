"""The transducer's lattice of one utterance: occupancy, pruning ranges, best path."""

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.errors import require
from icefall_kd.lattice import best_path, check_s_range
from icefall_kd.plot.utterance import Utterance
from icefall_kd.tap import ModelTap

LEAST = 1e-4  # an occupancy that is still seen
OUTLINE, PATH = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class LatticePicture:
    """What is drawn of a lattice with T frames and U labels.

    Args:
      tokens: The U tokens of the transcript, as text.
      occupancy: (T, U + 1), the probability that the path passes each node of the full
        lattice; its sum is T + U, and that of a frame is 1 and the expected number of
        tokens at it.
      low: (T,), the first label position of the pruning range of each frame.
      high: (T,), the last one.
      path: The nodes (t, u) of the best path, in its order.
      frame: Seconds between two frames.
    """

    tokens: List[str]
    occupancy: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    path: List[Tuple[int, int]]
    frame: float

    @property
    def outside(self) -> float:
        """The share of the occupancy that the pruning ranges leave out."""
        positions = torch.arange(self.occupancy.size(1))
        low, high = self.low.unsqueeze(1), self.high.unsqueeze(1)
        is_inside = (low <= positions) & (positions <= high)
        return float(self.occupancy[~is_inside].sum() / self.occupancy.sum())

    @property
    def emissions(self) -> List[int]:
        """The frame at which the best path emits each token."""
        pairs = zip(self.path, self.path[1:])
        return [t for (t, u), (_, after) in pairs if after > u]


def lattice_picture(
    model: nn.Module,
    utterance: Utterance,
    labels: Sequence[int],
    tokens: Sequence[str],
    s_range: int = 5,
) -> LatticePicture:
    """Compute the full lattice of an utterance, and the ranges that would prune it.

    The ranges are those of the model's own simple joiner, as in the recipe's pruned
    loss and in stored lattices (Kuang et al., arXiv:2206.13236).

    Args:
      model: An icefall AsrModel with a transducer head.
      utterance: The utterance.
      labels: Its U token ids, one or more.
      tokens: Their texts.
      s_range: Label positions at a frame, 2 or more.

    Raises:
      KDError: no transducer head, or an impossible ``s_range``.
    """
    check_s_range(s_range)
    require(s_range, "`s_range` is 0, and no range is drawn of it: give 2 or more")
    all_positions = len(labels) + 1
    with ModelTap(model, with_ctc=False) as tap:
        out = tap.encode(utterance.features, utterance.lens)
        full = tap.lattice(out, [list(labels)], max(2, all_positions))
        ranges = full.ranges
        if s_range < all_positions:
            ranges = tap.lattice(out, [list(labels)], s_range).ranges
    t = int(full.boundary[0, 3])
    blank_id = int(model.decoder.blank_id)
    nodes = best_path(full, blank_id)[0].nonzero().tolist()
    first = full.ranges[0, :, 0].tolist()
    return LatticePicture(
        tokens=list(tokens),
        occupancy=full.occupancy[0, :t, :all_positions],
        low=ranges[0, :t, 0],
        high=ranges[0, :t, -1].clamp(max=len(labels)),
        path=sorted((frame, first[frame] + s) for frame, s in nodes),
        frame=utterance.frame,
    )


def draw_lattice(picture: LatticePicture, title: str, words: Dict[str, str]) -> Any:
    """Draw a lattice: shades of occupancy, the ranges' outline, the best path.

    A node (t, u) is a cell; its row is named by the token that is emitted last.

    Args:
      picture: What is drawn.
      title: The cut's id and text.
      words: Of :func:`icefall_kd.plot.words.words_of`.

    Returns:
      A figure of matplotlib.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    frames, rows = picture.occupancy.shape
    size = (min(11.0, max(6.0, 0.12 * frames)), min(9.0, max(2.8, 1.2 + 0.24 * rows)))
    figure = Figure(figsize=size)
    axes = figure.subplots()
    image = axes.imshow(
        picture.occupancy.T.clamp(min=LEAST).numpy(),
        norm=LogNorm(LEAST, 1),
        cmap="Greys",
        aspect="auto",
        origin="lower",
        interpolation="none",
        extent=(-0.5, frames - 0.5, -0.5, rows - 0.5),
    )
    for edge, label in (
        (picture.low - 0.5, words["ranges"]),
        (picture.high + 0.5, None),
    ):
        x = [-0.5, *(i + 0.5 for i in range(frames))]
        y = [*edge.tolist(), float(edge[-1])]
        axes.step(x, y, where="post", color=OUTLINE, lw=1.3, label=label)
    axes.plot(*zip(*picture.path), color=PATH, lw=1.0, label=words["best_path"])
    points = [(t, i) for i, t in enumerate(picture.emissions)]
    axes.plot(*zip(*points), ls="none", marker="^", ms=5, color=PATH, mec="white")
    axes.set_yticks(range(rows), [words["start"], *picture.tokens], fontsize=8)
    axes.grid(visible=False)
    axes.set_xlim(-0.5, frames - 0.5)
    axes.set_ylim(-0.7, rows - 0.3)
    axes.set_xlabel(words["frame_axis"].format(ms=f"{1000 * picture.frame:g}"))
    axes.set_ylabel(words["last_token"])
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(loc="upper left", frameon=True, framealpha=0.9, fontsize=8)
    bar = figure.colorbar(image, ax=axes, pad=0.015, format="%g")
    bar.set_label(words["occupancy"])
    return figure

"""Where the divergence of the CTC frames lies: over time, and by kind of frame."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.forecast.divergences import SplitKL, split_kl
from icefall_kd.plot.spikes import spikes_in
from icefall_kd.plot.utterance import Utterance, seconds_of
from icefall_kd.report.plots import COLOURS
from icefall_kd.tap import ModelTap

BLANK, NEIGHBOUR, SPIKE = KINDS = ("blank", "neighbour", "spike")


def kinds_of(is_spike: torch.Tensor) -> torch.Tensor:
    """Return the kind of each frame of an utterance, as an index of ``KINDS``.

    A spike is a frame at which the teacher's best token is not blank, a neighbour one
    of its blank frames beside a spike.

    Args:
      is_spike: (T,), bool.

    Returns:
      (T,), int64.
    """
    beside = torch.zeros_like(is_spike)
    beside[1:] |= is_spike[:-1]
    beside[:-1] |= is_spike[1:]
    kinds = torch.full(is_spike.shape, KINDS.index(BLANK))
    kinds[beside] = KINDS.index(NEIGHBOUR)
    kinds[is_spike] = KINDS.index(SPIKE)
    return kinds


@dataclass
class KindSums:
    """Sums over the frames of one kind.

    Args:
      frames: Their number.
      blank: Of the divergence of blank against all other tokens, in nats.
      tokens: Of that among the other tokens; both together are the KL.
    """

    frames: int = 0
    blank: float = 0.0
    tokens: float = 0.0

    @property
    def kl(self) -> float:
        """The sum of KL(teacher || student)."""
        return self.blank + self.tokens


Sums = Dict[str, KindSums]  # by kind


def add_rows(sums: Sums, rows: SplitKL) -> None:
    """Add the frames of one utterance.

    Args:
      sums: Changed in place.
      rows: Of the T frames.
    """
    kinds = kinds_of(rows.is_spike)
    for i, kind in enumerate(KINDS):
        is_kind = kinds == i
        sums[kind].frames += int(is_kind.sum())
        sums[kind].blank += float(rows.blank[is_kind].sum())
        sums[kind].tokens += float(rows.tokens[is_kind].sum())


def log_probs_of(
    model: nn.Module, x: torch.Tensor, x_lens: torch.Tensor
) -> List[torch.Tensor]:
    """Return the CTC head's log-probabilities of each utterance, (T_n, V).

    Args:
      model: An icefall AsrModel with a CTC head.
      x: (N, F, C), features.
      x_lens: (N,), valid feature frames.
    """
    with ModelTap(model) as tap:
        out = tap.encode(x, x_lens)
    log_probs = out.ctc_logits.float().log_softmax(-1)
    return [row[:n] for row, n in zip(log_probs, out.encoder_out_lens.tolist())]


def sum_by_kind(
    teacher: nn.Module,
    students: Dict[str, nn.Module],
    batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
    blank_id: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> Dict[str, Sums]:
    """Sum KL(teacher || student) over the frames of each kind.

    Args:
      teacher: An icefall AsrModel with a CTC head.
      students: By name, of the same tokens and frame rate.
      batches: Features (N, F, C) and their lengths (N,).
      blank_id: The token id of blank.
      advance: A function that is called after each batch.

    Returns:
      The sums of each student.
    """
    totals = {name: {kind: KindSums() for kind in KINDS} for name in students}
    for x, x_lens in batches:
        taught = log_probs_of(teacher, x, x_lens)
        for name, model in students.items():
            for p, q in zip(taught, log_probs_of(model, x, x_lens)):
                add_rows(totals[name], split_kl(p, q, blank_id))
        advance()
    return totals


def table_rows(totals: Dict[str, Sums]) -> List[List[str]]:
    """Return rows of numbers: for each student and kind frames, shares and means.

    Args:
      totals: Of :func:`sum_by_kind`.
    """
    rows = []
    for name, sums in totals.items():
        frames = sum(of_kind.frames for of_kind in sums.values())
        kl = sum(of_kind.kl for of_kind in sums.values())
        for kind in KINDS:
            of_kind = sums[kind]
            count = max(1, of_kind.frames)
            shares = (of_kind.frames / max(1, frames), of_kind.kl / kl if kl else 0.0)
            means = (of_kind.kl / count, of_kind.blank / count, of_kind.tokens / count)
            cells = [f"{100 * share:.1f} %" for share in shares]
            cells += [f"{mean:.4f}" for mean in means]
            rows.append([name, kind, f"{of_kind.frames:,}", *cells])
    return rows


@dataclass(frozen=True)
class KLPicture:
    """The frames of one utterance, and the sums of many.

    Args:
      teacher: (T, V), the teacher's log-probabilities.
      rows: The divergence of each student at each of the T frames.
      totals: Of :func:`sum_by_kind`.
      cuts: The number of cuts in ``totals``.
    """

    teacher: torch.Tensor
    rows: Dict[str, SplitKL]
    totals: Dict[str, Sums]
    cuts: int


def draw_kl(
    picture: KLPicture,
    utterance: Utterance,
    texts: Sequence[str],
    blank_id: int,
    title: str,
    words: Dict[str, str],
) -> Any:
    """Draw the divergence over time of one utterance, and bars by kind of frame.

    Args:
      picture: What is drawn.
      utterance: The utterance.
      texts: The text of each token id.
      blank_id: The token id of blank.
      title: The cut's id and text.
      words: Of :func:`icefall_kd.plot.words.words_of`.

    Returns:
      A figure of matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.2))
    over_time, by_kind = figure.add_gridspec(2, 1, height_ratios=(3, 1.9), hspace=0.42)
    times = over_time.subgridspec(2, 1, height_ratios=(1, 1.8), hspace=0.12)
    kinds = by_kind.subgridspec(1, 2, wspace=0.3)
    upper = figure.add_subplot(times[0])
    middle = figure.add_subplot(times[1], sharex=upper)
    edges = seconds_of(range(len(picture.teacher) + 1), utterance)
    blank = picture.teacher[:, blank_id].exp().tolist()
    upper.stairs(blank, edges, fill=True, color="#bbbbbb")
    for spike in spikes_in(picture.teacher, blank_id):
        x = (spike.frame + 0.5) * utterance.frame
        upper.text(x, 1.05, texts[spike.token], ha="center", fontsize=8)
        middle.axvline(x, color="#bbbbbb", lw=0.8, ls="--")
    upper.set_ylim(0, 1)
    upper.set_ylabel(words["p_blank"])
    upper.set_title(title, fontsize=10, loc="left", pad=16)
    upper.tick_params(axis="x", labelbottom=False)
    for i, (name, rows) in enumerate(picture.rows.items()):
        kl = (rows.blank + rows.tokens).tolist()
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        middle.stairs(kl, edges, color=colour, lw=1.4, label=name)
    middle.set_ylim(0, 1.3 * middle.get_ylim()[1])  # room for the legend
    middle.set_xlim(0, edges[-1])
    middle.set_ylabel(words["kl_axis"])
    middle.set_xlabel(words["seconds_axis"])
    columns = len(picture.rows)
    middle.legend(loc="upper right", ncol=columns, frameon=False, fontsize=9)
    bars = [figure.add_subplot(kinds[i]) for i in range(2)]
    _draw_shares(bars[0], picture, words)
    _draw_means(bars[1], picture, words)
    return figure


def _draw_shares(axes: Any, picture: KLPicture, words: Dict[str, str]) -> None:
    """Bars of shares: of the frames, and of each student's KL, by kind."""
    first = next(iter(picture.totals.values()))
    rows = [(words["of_frames"], [first[kind].frames for kind in KINDS])]
    for name, sums in picture.totals.items():
        label = words["of_kl"].format(name=name)
        rows.append((label, [sums[kind].kl for kind in KINDS]))
    shades = ("#dddddd", "#56B4E9", "#D55E00")
    for y, (_, values) in enumerate(rows):
        left, total = 0.0, sum(values) or 1.0
        for kind, value, shade in zip(KINDS, values, shades):
            share = 100 * value / total
            label = words[kind] if y == 0 else None
            axes.barh(y, share, left=left, color=shade, height=0.7, label=label)
            if share >= 7:
                axes.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center")
            left += share
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(visible=False)
    axes.set_xlabel(words["share_axis"].format(cuts=f"{picture.cuts:,}"))
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncol=3, frameon=False, fontsize=8
    )


def _draw_means(axes: Any, picture: KLPicture, words: Dict[str, str]) -> None:
    """Bars of the mean KL at a frame by kind, that of blank and that of tokens."""
    count = len(picture.totals)
    for i, sums in enumerate(picture.totals.values()):
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        for x, kind in enumerate(KINDS):
            frames = max(1, sums[kind].frames)
            blank, tokens = sums[kind].blank / frames, sums[kind].tokens / frames
            place = x + (i - (count - 1) / 2) * 0.8 / count
            bar = {"width": 0.72 / count, "edgecolor": colour}
            axes.bar(place, blank, color=colour, **bar)
            axes.bar(place, tokens, bottom=blank, color="white", hatch="////", **bar)
    axes.bar(0, 0, color="#777777", label=words["blank_part"])
    style = {"color": "white", "edgecolor": "#777777", "hatch": "////"}
    axes.bar(0, 0, label=words["token_part"], **style)
    axes.set_xticks(range(len(KINDS)), [words[kind] for kind in KINDS])
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(words["mean_axis"])
    axes.legend(loc="upper left", frameon=False, fontsize=8)

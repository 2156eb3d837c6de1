"""A spectrogram, and where teacher and students put their tokens."""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.decode.greedy import GreedySearch
from icefall_kd.plot.utterance import Utterance, seconds_of
from icefall_kd.report.plots import COLOURS
from icefall_kd.tap import ModelTap
from icefall_kd.zipformer import has_transducer

MOST_TEXT = 12  # letters of a token that are shown


@dataclass(frozen=True)
class Spike:
    """A token of the CTC head, where it is most probable.

    Args:
      frame: Of the encoder's output.
      token: Its id.
      probability: There.
    """

    frame: int
    token: int
    probability: float


@dataclass(frozen=True)
class Track:
    """What one model says of an utterance with T frames.

    Args:
      name: The model's.
      spikes: The tokens of the CTC head's best path.
      not_blank: (T,), 1 - p(blank) of the CTC head.
      emitted: Frames and tokens of the transducer's greedy search; [] without one.
    """

    name: str
    spikes: List[Spike]
    not_blank: torch.Tensor
    emitted: List[Tuple[int, int]] = field(default_factory=list)


def spikes_in(log_probs: torch.Tensor, blank_id: int = 0) -> List[Spike]:
    """Find the tokens of CTC's best path, each at the best frame of its run.

    Args:
      log_probs: (T, V), log-probabilities.
      blank_id: The token id of blank.
    """
    best_log_probs, best = log_probs.max(-1)
    spikes, begin = [], 0
    for token, run in groupby(best.tolist()):
        end = begin + len(list(run))
        if token != blank_id:
            frame = begin + int(best_log_probs[begin:end].argmax())
            spikes.append(Spike(frame, token, float(best_log_probs[frame].exp())))
        begin = end
    return spikes


def track_of(
    name: str, model: nn.Module, utterance: Utterance, blank_id: int = 0
) -> Track:
    """Let a model hear an utterance.

    Args:
      name: The model's.
      model: An icefall AsrModel with a CTC head.
      utterance: The utterance.
      blank_id: The token id of blank.

    Raises:
      KDError: the model has no CTC head.
    """
    with ModelTap(model) as tap:
        out = tap.encode(utterance.features, utterance.lens)
    frames = int(out.encoder_out_lens[0])
    log_probs = out.ctc_logits[0, :frames].float().log_softmax(-1)
    emitted: List[Tuple[int, int]] = []
    if has_transducer(model):
        search = GreedySearch(model, draft="none")
        found = search(out.encoder_out, out.encoder_out_lens).hypotheses[0]
        emitted = list(zip(found.frames, found.tokens))
    not_blank = 1 - log_probs[:, blank_id].exp()
    return Track(name, spikes_in(log_probs, blank_id), not_blank, emitted)


def draw_spikes(
    utterance: Utterance,
    tracks: Sequence[Track],
    texts: Sequence[str],
    title: str,
    words: Dict[str, str],
) -> Any:
    """Draw the spectrogram, and below it a track for each model.

    Args:
      utterance: The utterance.
      tracks: Of one model each.
      texts: The text of each token id.
      title: The cut's id and text.
      words: Of :func:`icefall_kd.plot.words.words_of`.

    Returns:
      A figure of matplotlib.
    """
    from matplotlib.figure import Figure

    shown = utterance.features[0, : int(utterance.lens[0])]
    seconds = len(shown) * utterance.shift
    figure = Figure(figsize=(min(12.0, max(7.0, 2.6 * seconds)), 2 + len(tracks)))
    heights = [2.0, *(1.0 for _ in tracks)]
    grid = figure.subplots(
        len(heights), sharex=True, gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(hspace=0.12)
    first = grid[0]
    first.imshow(
        shown.T.numpy(),
        aspect="auto",
        origin="lower",
        cmap="magma",
        interpolation="none",  # the cells themselves, and a small file
        extent=(0, seconds, 0, shown.size(1)),
    )
    first.set_ylabel(words["filter"])
    first.set_title(title, fontsize=10, loc="left")
    first.grid(visible=False)
    for i, (axes, track) in enumerate(zip(grid[1:], tracks)):
        _draw_track(axes, utterance, track, texts, COLOURS[i % len(COLOURS)])
    for spike in tracks[0].spikes:
        (x,) = seconds_of([spike.frame], utterance)
        first.axvline(x + utterance.frame / 2, color="white", lw=0.8, ls="--")
    grid[-1].set_xlim(0, seconds)
    grid[-1].set_xlabel(words["seconds_axis"])
    grid[-1].annotate(
        words["spikes_note"],
        (0, 0),
        xycoords="axes fraction",
        xytext=(0, -34),
        textcoords="offset points",
        fontsize=8,
        va="top",
    )
    return figure


def _draw_track(
    axes: Any, utterance: Utterance, track: Track, texts: Sequence[str], colour: str
) -> None:
    """The probability of a token by frame, texts at spikes, marks of the transducer."""
    count = len(track.not_blank)
    edges = seconds_of(range(count + 1), utterance)
    axes.stairs(track.not_blank.tolist(), edges, fill=True, color=colour, alpha=0.25)
    axes.stairs(track.not_blank.tolist(), edges, color=colour, lw=1.0)
    half = utterance.frame / 2
    right = -1.0
    for i, spike in enumerate(track.spikes):
        x = spike.frame * utterance.frame + half
        # Where texts would touch, every other one stands higher.
        is_near, right = x < right, x + 0.045 * len(_text(texts, spike.token))
        y = 1.32 if is_near and i % 2 else 1.06
        axes.text(x, y, _text(texts, spike.token), ha="center", fontsize=8)
    for frame, _ in track.emitted:
        x = frame * utterance.frame + half
        axes.plot(x, -0.12, marker="^", ms=5, color=colour, clip_on=False)
    axes.set_ylim(-0.25, 1.65)
    axes.set_yticks([0, 1])
    axes.set_ylabel(
        track.name, rotation=0, ha="right", va="center", labelpad=12, color=colour
    )


def _text(texts: Sequence[str], token: int) -> str:
    text = texts[token]
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"

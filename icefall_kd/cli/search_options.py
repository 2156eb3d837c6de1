"""The options by which commands search for text with a recipe's model."""

import os
from dataclasses import dataclass
from functools import wraps
from typing import Any, Callable, Dict, Optional

import click
import torch

from icefall_kd.cli.options import MOST_THREADS, Count, Number, YesNo
from icefall_kd.cli.torchrun import number_of
from icefall_kd.errors import require
from icefall_kd.targets.batches import FeatureReader
from icefall_kd.targets.fingerprint import STREAMING
from icefall_kd.transcripts.audio import AudioReader
from icefall_kd.transcripts.decoding import remedy_for_memory
from icefall_kd.transcripts.recognizer import CAUSAL_PADDING, GREEDY, METHODS, Method


@dataclass(frozen=True)
class SearchOptions:
    """How a model searches for text.

    Args:
      method: The search.
      window: Seconds of a window; None where all cuts are encoded as a whole.
      rate: Samples a second of the audio that features are computed from; None where
        they are stored.
      max_duration: Seconds of audio in a batch, padding counted.
      num_workers: Processes that read features; 0: this one.
      num_threads: CPU threads of the model; 0: one for each core.
    """

    method: Method
    window: Optional[float]
    rate: Optional[int]
    max_duration: float
    num_workers: int
    num_threads: int

    def device(self) -> torch.device:
        """Where the model runs; a CPU gets its threads."""
        torch.set_num_threads(self.num_threads or os.cpu_count() or 1)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", number_of("LOCAL_RANK") or 0)

    def reader(self, num_features: int) -> torch.utils.data.Dataset:
        """What gives the features of a batch.

        Args:
          num_features: Features in a frame that the model takes.
        """
        remedy = remedy_for_memory(self.max_duration)
        if self.rate is None:
            return FeatureReader(remedy)
        return AudioReader(num_features, self.rate, remedy)


_OPTIONS = [
    click.option(
        "--decoding-method",
        type=click.Choice(METHODS),
        default=GREEDY,
        help="The search, by icefall's names; the last is for the CTC head.",
    ),
    click.option(
        "--beam-size",
        type=Count(1, 100),
        default=4,
        metavar="N",
        help="Hypotheses that modified_beam_search keeps.",
    ),
    click.option(
        "--max-sym-per-frame",
        type=Count(1, 1000),
        default=1,
        metavar="N",
        help="The most tokens of a frame that greedy_search finds.",
    ),
    click.option(
        "--draft",
        type=click.Choice(("auto", "ctc", "none")),
        default="auto",
        help="What greedy_search checks in place of searching from nothing: the CTC "
        "head's tokens, or nothing, or what is faster, on a CPU nothing. The "
        "result is the same.",
    ),
    click.option(
        "--skip-blanks",
        type=Number(0, 1),
        default=None,
        metavar="P",
        help="Leave out frames to whose blank the CTC head gives a probability above "
        "P, such as 0.99. It is faster, and not exact: where the two heads have "
        "their tokens at other frames, words are lost. Compare the error rates.",
    ),
    click.option(
        "--window",
        type=Number(0, 10**4),
        default=None,
        metavar="SECONDS",
        help="Encode longer cuts in windows of so many seconds that overlap, such as "
        "8. Memory then hardly grows with a recording's length; the result is "
        "not exact.",
    ),
    click.option(
        "--reset-context-after",
        type=Number(0, 10**4),
        default=None,
        metavar="SECONDS",
        help="For recordings of several utterances: greedy_search begins anew after "
        "so many seconds without a token, such as 0.6, as if an utterance began "
        "there. Choose it on other cuts than those of the test: too short a "
        "pause doubles words.",
    ),
    click.option(
        "--causal-padding",
        type=Count(0, 1000),
        default=CAUSAL_PADDING,
        metavar="FRAMES",
        help="Feature frames of silence behind each utterance for a causal model, as "
        "in icefall's decoding. Give 0 if the recipe takes off the mean of each "
        "utterance: silence is none there, and words are inserted.",
    ),
    click.option(
        "--on-the-fly-feats",
        type=YesNo(),
        default=False,
        metavar="BOOL",
        help="Compute lhotse's Fbank of the audio, in place of stored features. It "
        "is for recipes that do so in training, without normalisation.",
    ),
    click.option(
        "--sampling-rate",
        type=Count(1000, 192_000),
        default=16_000,
        metavar="HZ",
        help="The rate of the audio that --on-the-fly-feats takes.",
    ),
    click.option(
        "--max-duration",
        type=Number(0, 10**6),
        default=200.0,
        metavar="SECONDS",
        help="Seconds of audio in a batch, padding counted. 0.01: one cut at a time.",
    ),
    click.option(
        "--num-workers",
        type=Count(0, MOST_THREADS),
        default=1,
        metavar="N",
        help="Processes that read features. 0: the model's own.",
    ),
    click.option(
        "--num-threads",
        type=Count(0, MOST_THREADS),
        default=0,
        metavar="N",
        help="CPU threads of the model. 0: one for each core.",
    ),
]
NAMES = [
    *("decoding_method", "beam_size", "max_sym_per_frame", "draft", "skip_blanks"),
    *("window", "reset_context_after", "causal_padding", "on_the_fly_feats"),
    *("sampling_rate", "max_duration", "num_workers", "num_threads"),
]


def search_options(function: Callable) -> Callable:
    """Give a command the options of a search.

    The function gets ``search``, a :class:`SearchOptions`, in their place.

    Args:
      function: The command's.
    """

    @wraps(function)
    def run(**values: Any) -> Any:
        (
            *of_method,
            window,
            reset,
            padding,
            on_the_fly,
            rate,
            max_duration,
            num_workers,
            num_threads,
        ) = [values.pop(name) for name in NAMES]
        search = SearchOptions(
            Method(*of_method, padding, reset),
            window,
            rate if on_the_fly else None,
            max_duration,
            num_workers,
            num_threads,
        )
        return function(search=search, **values)

    for option in reversed(_OPTIONS):
        run = option(run)
    return run


def check_one_chunk_size(settings: Dict[str, Any]) -> None:
    """Refuse a causal model whose chunks or left context have several sizes.

    Args:
      settings: The model's.

    Raises:
      KDError: such a model.
    """
    for option in STREAMING if settings.get("causal") else ():
        value = str(settings.get(option))
        require(
            "," not in value,
            f"--{option.replace('_', '-')} is {value} in training, and a causal model "
            "is decoded with one size: give --chunk-size and --left-context-frames, "
            "such as 32 and 128",
        )

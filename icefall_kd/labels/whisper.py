"""A Whisper as the teacher of labels: windows of cuts, their texts and scores."""

import zlib
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Tuple

import numpy as np
from lhotse.cut import Cut, MultiCut

from icefall_kd.decode.recording import load_audio
from icefall_kd.errors import require
from icefall_kd.labels.pseudo_label import PseudoLabel
from icefall_kd.labels.whisper_model import RATE, Heard, Whisper
from icefall_kd.targets.batches import DumpBatch

LONGEST = 30.0  # seconds that a Whisper hears, with padding
SHORTEST = 2 / 3  # of the longest window: it ends where it is quietest behind this
HOP = 0.02  # seconds between places where a window may end
PAUSE = 0.3  # seconds that must be quiet there


class Window(NamedTuple):
    """A part of a cut.

    Args:
      begin: Its place in the cut, in seconds.
      samples: (samples,), float32 at 16 kHz.
    """

    begin: float
    samples: np.ndarray


class WhisperTeacher:
    """Labels what a Whisper says.

    A longer cut than a window is heard in windows that end where it is quietest, so
    that they share no word and cut none in two.

    Args:
      whisper: The model.
      max_duration: Seconds of audio in a batch; each window counts as 30 s.
      window: Seconds of the longest window; the shortest has two thirds of it.

    Raises:
      KDError: a window of more than 30 s.
    """

    def __init__(
        self, whisper: Whisper, max_duration: float, window: float = LONGEST
    ) -> None:
        require(
            1 <= window <= LONGEST,
            f"`window` is {window:g}, and a Whisper hears {LONGEST:g} s: give 1 to "
            f"{LONGEST:g}",
        )
        self.whisper, self.max_duration = whisper, max_duration
        self.window = window
        self.name, self.settings = whisper.name(), whisper.settings()
        self.settings["window"] = window
        self.at_once = max(1, int(max_duration // LONGEST))

    def problem(self, cut: Cut) -> str:
        """Why a cut can't be labelled, as the rest of a sentence; "" if it can.

        Args:
          cut: The cut.
        """
        if not cut.has_recording:
            return "has no recording, and a Whisper hears audio: give cuts with one"
        if isinstance(cut, MultiCut):
            return (
                f"has {cut.num_channels} channels, and a Whisper hears one: choose it "
                "with lhotse's cut.to_mono()"
            )
        return ""

    def __call__(
        self, plan: Iterable[DumpBatch]
    ) -> Iterator[Tuple[DumpBatch, List[PseudoLabel]]]:
        """Label the cuts of batches.

        Args:
          plan: The batches.

        Yields:
          Parts of the batches, each with the labels of its cuts.

        Raises:
          KDError: audio that can't be read.
        """
        for batch in plan:
            for i in range(0, max(1, len(batch.cuts)), self.at_once):
                cuts = batch.cuts[i : i + self.at_once]
                is_last = i + self.at_once >= len(batch.cuts)
                part = DumpBatch(cuts, batch.stretch if is_last else None)
                yield part, self._label(cuts)

    def _label(self, cuts: List[Cut]) -> List[PseudoLabel]:
        found: List[List[Heard]] = [[] for _ in cuts]
        waiting: List[Tuple[int, Window]] = []
        for number, cut in enumerate(cuts):
            for window in windows_of(cut, self.window):
                waiting.append((number, window))
                if len(waiting) == self.at_once:
                    self._hear(waiting, found)
                    waiting = []
        if waiting:
            self._hear(waiting, found)
        return [self._join(heard) for heard in found]

    def _hear(
        self, waiting: List[Tuple[int, Window]], found: List[List[Heard]]
    ) -> None:
        heard = self.whisper.hear([window.samples for _, window in waiting])
        for (number, _), said in zip(waiting, heard):
            found[number].append(said)

    def _join(self, heard: List[Heard]) -> PseudoLabel:
        """The label of a cut from those of its windows."""
        texts = [self.whisper.text(said.tokens) for said in heard]
        log_probs = [x for said in heard for x in said.log_probs]
        scores: Dict[str, Any] = {
            "token": sum(log_probs) / max(1, len(log_probs)),
            "worst-token": min(log_probs, default=0.0),
            "compression": min((-compression(text) for text in texts), default=0.0),
        }
        speech = [said.speech for said in heard if said.speech is not None]
        if speech:
            scores["speech"] = min(speech)
        text = " ".join(text for text in texts if text)
        return PseudoLabel(text, {name: round(x, 5) for name, x in scores.items()})


def compression(text: str) -> float:
    """How many times shorter zlib makes a text; of loops it is high.

    Args:
      text: The text.
    """
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def windows_of(cut: Cut, longest: float = LONGEST) -> Iterator[Window]:
    """Parts of a cut, which end where it is quiet.

    Args:
      cut: A cut of one channel.
      longest: Seconds of a window, at most.

    Raises:
      KDError: audio that can't be read, or that has several channels.
    """
    if cut.sampling_rate != RATE:
        cut = cut.resample(RATE)
    begin = 0.0
    while round((cut.duration - begin) * RATE) > 0:
        rest = cut.duration - begin
        part = cut.truncate(offset=begin, duration=min(longest, rest), preserve_id=True)
        samples = load_audio(part)
        require(
            len(samples) == 1,
            f"the audio of cut {cut.id} has {len(samples)} channels, and a Whisper "
            "hears one: mix them, or choose one",
        )
        if rest <= longest:
            yield Window(begin, samples[0])
            return
        end = quietest(samples[0], RATE, SHORTEST * longest)
        yield Window(begin, samples[0, : round(end * RATE)])
        begin = round(begin + end, 6)


def quietest(samples: np.ndarray, rate: int, least: float) -> float:
    """The middle of the quietest pause behind ``least`` seconds.

    Args:
      samples: (samples,).
      rate: Samples a second.
      least: Seconds before which no pause is looked for.

    Returns:
      Seconds; of pauses that are equal the last.
    """
    hop, width = round(HOP * rate), round(PAUSE / HOP)
    hops = samples[: len(samples) // hop * hop].reshape(-1, hop)
    energy = np.concatenate([[0.0], np.cumsum(np.square(hops, dtype="f8").sum(1))])
    sums = energy[width:] - energy[:-width]  # of the pauses that begin at each hop
    first = round(least / HOP)
    last_first = len(sums) - 1 - int(np.argmin(sums[first:][::-1]))
    return (last_first + width / 2) * HOP

"""What a search returns: hypotheses, the states to go on with, and what it cost."""

from dataclasses import dataclass, field
from typing import Any, List

MAX_SYMBOLS = 1000  # in an utterance, of icefall's greedy_search


@dataclass
class Hypothesis:
    """What was found in an utterance, or in a chunk of it."""

    tokens: List[int] = field(default_factory=list)  # token ids, without blanks
    frames: List[int] = field(default_factory=list)  # of each token, from 0
    log_probs: List[float] = field(default_factory=list)  # of each token, in nats
    # Of the whole path, blanks included, in nats. Greedy search does not compute it.
    score: float = float("nan")


@dataclass
class SearchReport:
    """Which way a search took for a batch, and what it cost."""

    way: str  # such as "label looping"
    frames: int = 0  # valid frames of the batch
    rounds: int = 0  # calls of the joiner
    joiner_rows: int = 0  # (frame, context) pairs that the joiner was asked
    decoder_rows: int = 0  # contexts that decoder and projection were computed for
    asked_again: int = 0  # frames whose margin was too small, asked alone
    drafted: int = 0  # tokens of the draft
    accepted: int = 0  # drafted tokens that were found, at their frame

    def add(self, other: "SearchReport") -> None:
        """Add the counts of another batch; the way stays.

        Args:
          other: What another batch cost.
        """
        for name, value in vars(other).items():
            if name != "way":
                setattr(self, name, getattr(self, name) + value)


@dataclass
class SearchResult:
    """What a search returns for a batch: one hypothesis and state an utterance."""

    hypotheses: List[Hypothesis]
    states: List[Any]  # what the same search goes on with in the next chunk
    report: SearchReport

"""The labels of transcripts: whether the tokens cover them, and frames hold them."""

import logging
from typing import Any, List

from lhotse.cut import Cut

from icefall_kd.errors import require
from icefall_kd.targets.model_input import input_frames
from icefall_kd.zipformer import encoder_frames

SPACE = "\u2581"  # sentencepiece's


def labels_of(
    cuts: List[Cut],
    tokenizer: Any,
    use: str = "a lattice",
    remedy: str = "dump without --keep-lattice",
) -> List[List[int]]:
    """The labels of each cut's transcript.

    Args:
      cuts: Cuts of one supervision.
      tokenizer: The teacher's.
      use: What needs the labels, for the error.
      remedy: What to do with a cut that has none, beside leaving it out.

    Raises:
      KDError: a cut without a transcript.
    """
    for cut in cuts:
        require(
            len(cut.supervisions) == 1 and (cut.supervisions[0].text or "").strip(),
            f"the cut {cut.id} has no transcript, and {use} needs one: leave it out, "
            f"or {remedy}",
        )
    return tokenizer.encode([c.supervisions[0].text for c in cuts], out_type=int)


def fits(cut: Cut, labels: List[int]) -> bool:
    """Whether the teacher computes as many frames as there are labels.

    Where it doesn't, no path gets through a lattice, and icefall's training leaves the
    cut out.

    Args:
      cut: The cut, for its frames.
      labels: Those of its transcript.
    """
    return len(labels) <= encoder_frames(input_frames(cut))


def why_long(cut: Cut, labels: List[int], use: str) -> str:
    """Why a cut has too many labels, as the rest of a sentence; "" if it has not.

    Args:
      cut: The cut, for its frames.
      labels: Those of its transcript.
      use: What needs a frame for each label.
    """
    if fits(cut, labels):
        return ""
    return (
        f"has {len(labels)} labels and the teacher outputs "
        f"{encoder_frames(input_frames(cut))} frames, and {use} needs as many frames"
    )


class TranscriptCheck:
    """Counts the transcripts that no lattice can be made of; called with each cut.

    Args:
      tokenizer: The teacher's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.no_word = {tokenizer.unk_id(), tokenizer.piece_to_id(SPACE)}
        self.unknown = 0  # transcripts of which the tokens cover nothing
        self.long = 0  # transcripts with more labels than frames
        self.first_long = ""

    def __call__(self, cut: Cut) -> None:
        (labels,) = labels_of([cut], self.tokenizer)
        self.unknown += self.no_word.issuperset(labels)
        if not fits(cut, labels):
            self.long += 1
            self.first_long = self.first_long or cut.id

    def check(self, total: int, path: str) -> None:
        """Refuse tokens that cover too few transcripts; warn of long ones.

        Args:
          total: The number of cuts.
          path: Their manifest.

        Raises:
          KDError: more than half of the transcripts have no token.
        """
        require(
            2 * self.unknown <= total,
            f"the tokens cover nothing of {self.unknown} of the {total} transcripts in "
            f"{path}: give the tokens that the recipe trains with, which byte-level "
            "BPE can't be here, or dump without --keep-lattice",
        )
        if self.long:
            logging.warning(
                f"{self.long} of {total} cuts have more labels than frames, "
                f"{self.first_long} the first: they go without lattices, as icefall "
                "trains without them"
            )

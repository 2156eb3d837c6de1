"""A recipe's model as the teacher of labels, by the searches of decode/."""

from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from lhotse.cut import Cut

from icefall_kd.labels.pseudo_label import PseudoLabel
from icefall_kd.targets.batches import DumpBatch
from icefall_kd.transcripts.cascade import MEASURES, measures_of
from icefall_kd.transcripts.cuts import CutsToDecode
from icefall_kd.transcripts.decoding import recognize
from icefall_kd.transcripts.recognizer import Recognized, Recognizer
from icefall_kd.zipformer import has_ctc


class RecipeTeacher:
    """Labels what `icefall-kd decode` finds, to the last token.

    Args:
      name: The model's, in which all parameters are hashed.
      recognizer: Runs encoder and search.
      reader: Gives the features of a batch.
      tokenizer: The model's.
      num_features: Features in a frame that the model takes.
      rate: Samples a second of the audio that features are computed from; None where
        they are stored.
      max_duration: Seconds of audio in a batch, padding counted.
      num_workers: Processes that read features; 0: this one.
    """

    def __init__(
        self,
        name: str,
        recognizer: Recognizer,
        reader: torch.utils.data.Dataset,
        tokenizer: Any,
        num_features: int,
        rate: Optional[int],
        max_duration: float,
        num_workers: int,
    ) -> None:
        method = recognizer.method.options()
        self.name, self.settings = name, {"method": method, "sampling_rate": rate}
        if recognizer.windows is not None:
            self.settings["window"] = recognizer.longest / 100
        self.recognizer, self.reader, self.tokenizer = recognizer, reader, tokenizer
        self.max_duration, self.num_workers = max_duration, num_workers
        self.known = CutsToDecode("", num_features, rate)
        header = {"ctc": has_ctc(recognizer.model), "method": method}
        self.measures = measures_of(header)
        self.has_both = header["ctc"] and recognizer.ctc is not None

    def problem(self, cut: Cut) -> str:
        """Why a cut can't be labelled, as the rest of a sentence; "" if it can.

        Args:
          cut: The next one of the manifest.
        """
        return self.known.problem(cut)

    def __call__(
        self, plan: Iterable[DumpBatch]
    ) -> Iterator[Tuple[DumpBatch, List[PseudoLabel]]]:
        """Label the cuts of batches.

        Args:
          plan: The batches.

        Yields:
          Each batch with the labels of its cuts.
        """
        for batch, recognized, _ in recognize(
            plan, self.reader, self.recognizer, self.max_duration, self.num_workers
        ):
            yield batch, [self._label(found) for found in recognized]

    def _label(self, found: Recognized) -> PseudoLabel:
        utterance: Dict[str, Any] = vars(found)
        return PseudoLabel(
            self._text(found.tokens),
            {name: round(MEASURES[name][1](utterance), 5) for name in self.measures},
            self._text(found.ctc_tokens) if self.has_both else None,
        )

    def _text(self, tokens: List[int]) -> str:
        return " ".join(self.tokenizer.decode(tokens).split()) if tokens else ""

"""Rows without transcripts, on which the recipe's own losses have to run."""

from typing import Any, Dict, Optional

import torch
from lhotse import CutSet
from lhotse.utils import fastcopy

from icefall_kd.errors import KDError
from icefall_kd.targets.model_input import check_supervision
from icefall_kd.targets.transcript import has_no_text

ROWS = "kd_transcribed"  # the field of a batch


def transcribed_rows(batch: Dict[str, Any]) -> Optional[torch.Tensor]:
    """Return which rows of a batch have transcripts, (N,), bool; None where all have.

    Args:
      batch: The recipe's, of :class:`StandInTranscripts` or of another dataset.
    """
    rows = batch.get(ROWS)
    return None if rows is None or rows.all() else rows


def stand_in(bpe: Any, blank_id: int) -> str:
    """Return a transcript of the fewest labels, none of them the blank.

    Args:
      bpe: A tokenizer.
      blank_id: The student's blank.

    Raises:
      KDError: the tokenizer makes no such text.
    """
    texts = []
    for i in range(bpe.get_piece_size()):
        text = bpe.decode([i])
        labels = bpe.encode(text)
        if labels and not {blank_id, bpe.unk_id()}.intersection(labels):
            texts.append((len(labels), i, text))
    if not texts:
        raise KDError(
            f"the tokenizer's {bpe.get_piece_size()} tokens make no transcript to "
            "stand in where cuts have none: train on transcribed cuts, or label them "
            "first"
        )
    _, _, text = min(texts)
    return text


class StandInTranscripts(torch.utils.data.Dataset):
    """A transcript for rows that have none, so that the recipe's losses can run.

    ``batch["kd_transcribed"]``, (N,), is False for these rows, and what the recipe's
    losses make of them does not count. The cuts themselves stay without.

    Args:
      dataset: A :class:`icefall_kd.targets.TargetDataset`, or the recipe's dataset.
      text: The transcript, of :func:`stand_in`; "" refuses cuts without transcripts.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, text: str) -> None:
        self.dataset, self.text = dataset, text

    def __getitem__(self, cuts: CutSet) -> Dict[str, Any]:
        without_text = ""
        for cut in cuts:
            check_supervision(cut)
            if has_no_text(cut):
                without_text = without_text or cut.id
        if without_text and not self.text:
            raise KDError(
                f"the cut {without_text} has no transcript, and it takes a tokenizer "
                "to make one that stands in: give --bpe-model, or leave the cut out"
            )
        if without_text:  # lhotse collates no None
            cuts = CutSet.from_cuts(
                cut.map_supervisions(lambda s: fastcopy(s, text=s.text or ""))
                for cut in cuts
            )
        batch = self.dataset[cuts]
        supervisions = batch["supervisions"]
        texts = supervisions["text"]
        rows = torch.ones(len(batch["inputs"]), dtype=torch.bool)
        for i, row in enumerate(supervisions["sequence_idx"]):
            if not texts[i].strip():
                rows[int(row)] = False
                texts[i] = self.text
        batch[ROWS] = rows
        return batch

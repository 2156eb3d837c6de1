"""Batches without transcripts, on which the recipe's own losses have to run."""

from typing import Any, Dict

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import fastcopy

from icefall_kd.errors import KDError
from icefall_kd.targets.model_input import check_supervision


def has_no_text(cut: Cut) -> bool:
    """Return whether a cut has no transcript.

    Args:
      cut: The cut.
    """
    return not any((s.text or "").strip() for s in cut.supervisions)


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
    """A transcript for batches that have none, so that the recipe's losses can run.

    ``batch["kd_transcribed"]`` is False there, and the joint loss leaves the recipe's
    loss out. The cuts themselves stay without.

    Args:
      dataset: A :class:`icefall_kd.targets.TargetDataset`, or the recipe's dataset.
      text: The transcript, of :func:`stand_in`; "" refuses batches without transcripts.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, text: str) -> None:
        self.dataset, self.text = dataset, text

    def __getitem__(self, cuts: CutSet) -> Dict[str, Any]:
        ids: Dict[bool, str] = {}
        for cut in cuts:
            check_supervision(cut)
            ids.setdefault(has_no_text(cut), cut.id)
        if len(ids) == 2:
            raise KDError(
                f"the cuts {ids[True]}, without a transcript, and {ids[False]}, with "
                "one, are in the same batch, and the recipe's loss is of a whole "
                "batch: label the former, or sample them apart, as lhotse's "
                "RoundRobinSampler does"
            )
        without_text = True in ids
        if without_text and not self.text:
            raise KDError(
                f"the cut {ids[True]} has no transcript, and it takes a tokenizer to "
                "make one that stands in: give --bpe-model, or leave the cut out"
            )
        if without_text:  # lhotse collates no None
            cuts = CutSet.from_cuts(
                cut.map_supervisions(lambda s: fastcopy(s, text="")) for cut in cuts
            )
        batch = self.dataset[cuts]
        batch["kd_transcribed"] = not without_text
        if without_text:
            supervisions = batch["supervisions"]
            supervisions["text"] = [self.text] * len(supervisions["text"])
        return batch

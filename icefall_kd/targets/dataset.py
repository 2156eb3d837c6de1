"""Reads targets in the dataset's workers, and lines them up with the batch."""

import logging
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut, MixedCut, MixTrack, MonoCut

from icefall_kd.errors import KDError
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.writer import FIELD
from icefall_kd.types import Targets

REMEDY = "run `icefall-kd dump` on the cuts that are trained on"


def _carriers(cut: Cut) -> List[Tuple[float, MonoCut]]:
    """The MonoCuts in ``cut`` that carry targets, with their offsets in seconds.

    Lhotse leaves None as the target of a cut that was extended beyond its data.
    """
    tracks = cut.tracks if isinstance(cut, MixedCut) else [MixTrack(cut)]
    return [
        (t.offset, t.cut)
        for t in tracks
        if isinstance(t.cut, MonoCut) and (t.cut.custom or {}).get(FIELD) is not None
    ]


def _carrier(cut: Cut) -> MonoCut:
    """The one MonoCut of ``cut`` that carries targets, at the cut's own start."""
    carriers = _carriers(cut)
    if not carriers:
        raise KDError(f"the cut {cut.id} has no targets ({FIELD}): {REMEDY}")
    if len(carriers) == 1 and carriers[0][0] == 0:
        return carriers[0][1]
    raise KDError(
        f"the cut {cut.id} is a {type(cut).__name__} whose targets don't stand at its "
        "start: train without --concatenate-cuts, and " + REMEDY
    )


def _read(cut: Cut) -> torch.Tensor:
    cut = _carrier(cut)
    try:
        array = cut.load_custom(FIELD)
    except (OSError, ValueError, EOFError) as e:
        stored = cut.custom[FIELD].array
        raise KDError(
            f"the targets of cut {cut.id} can't be read from "
            f"{stored.storage_path}/{stored.storage_key} ({type(e).__name__}): run "
            "`icefall-kd dump --overwrite`"
        ) from None
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def collate_targets(cuts: List[Cut]) -> Targets:
    """Read and pad the targets of ``cuts``, one row a cut.

    Padding frames hold the uniform distribution; losses don't read them.
    """
    rows = [_read(c) for c in cuts]
    lens = torch.tensor([len(r) for r in rows])
    logits = torch.zeros(len(rows), int(lens.max()), rows[0].size(1))
    for i, row in enumerate(rows):
        logits[i, : len(row)] = row
    return Targets(ctc_logits=logits, lens=lens)


def store_fingerprint(cuts: Iterable[Cut]) -> Fingerprint:
    """The fingerprint of the one store that carries the targets of ``cuts``.

    Raises:
      KDError: if any cut has no targets, or if there is more than one store.
    """
    missing, total, first, stores = 0, 0, "", set()
    for cut in cuts:
        total += 1
        carriers = _carriers(cut)
        stores.update(c.custom[FIELD].array.storage_path for _, c in carriers)
        if not carriers:
            missing += 1
            first = first or cut.id
    if missing:
        raise KDError(
            f"{missing} of {total} training cuts have no targets ({FIELD}), {first} "
            f"the first: {REMEDY}, or switch distillation off with --kd-ctc-weight 0"
        )
    if not stores:
        raise KDError("there are no training cuts: check --manifest-dir")
    prints = {path: Fingerprint.read(Path(path)) for path in sorted(stores)}
    path, found = next(iter(prints.items()))
    for other, value in prints.items():
        value.check_same(found, other)
    return found


def _keep(record: logging.LogRecord) -> bool:
    # Targets end a little before their cut; lhotse would say so of each cut read.
    message = str(record.msg)
    return not ("possibly mismatched" in message and FIELD in message)


class KDDataset(torch.utils.data.Dataset):
    """``K2SpeechRecognitionDataset`` plus ``batch["kd_targets"]``.

    Args:
      dataset: The recipe's dataset. It must give the cuts back; ``return_cuts`` is
        switched on.
    """

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        if not hasattr(dataset, "return_cuts"):
            raise KDError(
                f"{type(dataset).__name__} has no return_cuts, and targets need the "
                "cuts of a batch: use lhotse's K2SpeechRecognitionDataset"
            )
        dataset.return_cuts = True
        self.dataset = dataset

    def __getitem__(self, cuts: CutSet) -> Dict[str, Any]:
        logging.getLogger().addFilter(_keep)  # in each worker; twice does no harm
        batch = self.dataset[cuts]
        supervisions = batch["supervisions"]
        # The dataset sorts cuts; only these two say which row is whose.
        rows: List[Any] = [None] * len(batch["inputs"])
        for cut, row in zip(supervisions["cut"], supervisions["sequence_idx"]):
            rows[int(row)] = cut
        batch["kd_targets"] = collate_targets(rows)
        return batch

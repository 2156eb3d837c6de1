"""Decodes all cuts of a manifest, batch by batch, and goes on where it was stopped."""

from typing import Any, Container, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
from lhotse.cut import Cut
from tqdm.auto import tqdm

from icefall_kd.memory import Heap, enough_memory
from icefall_kd.targets.batches import STRETCH, DumpBatch, batches, stretches
from icefall_kd.transcripts.costs import peak_memory
from icefall_kd.transcripts.journal import Journal
from icefall_kd.transcripts.recognizer import BatchCost, Recognized, Recognizer

WARM_UP = 5  # batches


class DecodingPlan:
    """The batches that are not decoded yet.

    They are the same whatever was done before, so what is found in a cut is the same to
    the last bit.

    Args:
      cuts: All of them, in their order.
      max_duration: Seconds in a batch, padding counted.
      wanted: Ids of the cuts that are to be decoded.
      done: Ids of those that are decoded.
    """

    def __init__(
        self,
        cuts: Iterable[Cut],
        max_duration: float,
        wanted: Container[str],
        done: Container[str] = (),
    ) -> None:
        self.cuts, self.max_duration = cuts, max_duration
        self.wanted, self.done = wanted, done

    def __iter__(self) -> Iterator[DumpBatch]:
        cuts = (cut for cut in self.cuts if cut.id in self.wanted)
        for stretch in stretches(cuts, STRETCH):
            for batch in batches(stretch, self.max_duration):
                if not all(cut.id in self.done for cut in batch):
                    yield DumpBatch(batch, None)


def decode_cuts(
    cuts: Iterable[Cut],
    reader: torch.utils.data.Dataset,
    recognizer: Recognizer,
    journal: Journal,
    max_duration: float,
    num_workers: int,
    ids: Sequence[str],
) -> None:
    """Decode the cuts that the journal does not have yet, and add them to it.

    Args:
      cuts: Cuts in the order of the manifest.
      reader: Gives the features of a :class:`DumpBatch`.
      recognizer: Runs on them.
      journal: Keeps what was found.
      max_duration: Seconds of audio in a batch, padding counted.
      num_workers: Processes that read features; 0: this one.
      ids: The cuts that are decoded; others are passed over.

    Raises:
      KDError: features that can't be read, or memory that is full.
    """
    plan = DecodingPlan(cuts, max_duration, set(ids), journal.utterances)
    audio = took = 0.0
    with tqdm(desc="Decoding", unit=" cuts", total=len(ids)) as bar:
        bar.update(len(journal.utterances))
        for batch, recognized, cost in recognize(
            plan, reader, recognizer, max_duration, num_workers
        ):
            journal.append(record_of(batch.cuts, recognized, cost, recognizer.device))
            bar.update(len(batch.cuts))
            audio += sum(cut.duration for cut in batch.cuts)
            took += cost.encoder + cost.search
            bar.set_postfix_str(f"RTF {took / max(audio, 1e-9):.4f}")


def recognize(
    plan: Iterable[DumpBatch],
    reader: torch.utils.data.Dataset,
    recognizer: Recognizer,
    max_duration: float,
    num_workers: int,
) -> Iterator[Tuple[DumpBatch, List[Recognized], BatchCost]]:
    """Run a model on batches.

    Args:
      plan: The batches.
      reader: Gives the features of a :class:`DumpBatch`.
      recognizer: Runs on them.
      max_duration: Seconds of audio in a batch, padding counted.
      num_workers: Processes that read features; 0: this one.

    Yields:
      Each batch, what was found in each of its cuts, and what it cost.

    Raises:
      KDError: features that can't be read, or memory that is full.
    """
    loader = torch.utils.data.DataLoader(
        reader, sampler=plan, batch_size=None, num_workers=num_workers
    )
    remedy = remedy_for_memory(max_duration)
    heap = Heap(WARM_UP)
    for batch, x, x_lens in loader:
        with enough_memory(f"the model's pass over {batch}", remedy):
            recognized, cost = recognizer(x, x_lens)
        yield batch, recognized, cost
        heap.after_batch()


def rehearse(
    cut: Cut,
    reader: torch.utils.data.Dataset,
    recognizer: Recognizer,
    max_duration: float,
) -> None:
    """Decode one cut, and store nothing.

    Args:
      cut: A short one.
      reader: That of :func:`decode_cuts`.
      recognizer: That of :func:`decode_cuts`.
      max_duration: Seconds of audio in a batch.

    Raises:
      KDError: what :func:`decode_cuts` would refuse for this cut.
    """
    batch, x, x_lens = reader[DumpBatch([cut], None)]
    with enough_memory(
        f"the model's pass over {batch}", remedy_for_memory(max_duration)
    ):
        recognizer(x, x_lens)


def remedy_for_memory(max_duration: float) -> str:
    """What helps where memory runs out in decoding.

    Args:
      max_duration: Seconds of audio in a batch.
    """
    return (
        f"give `max_duration` less than {max_duration:g}, or for a long recording "
        "`window`, such as 8; the same command then goes on where this one stopped"
    )


def record_of(
    cuts: List[Cut], recognized: List[Recognized], cost: BatchCost, device: torch.device
) -> Dict[str, Any]:
    """A batch as the journal has it.

    Args:
      cuts: Its cuts.
      recognized: What was found in each.
      cost: What it cost.
      device: Where the model runs.
    """
    utterances = [
        {"id": cut.id, "duration": cut.duration, **vars(of_cut)}
        for cut, of_cut in zip(cuts, recognized)
    ]
    return {
        "seconds": {
            "encoder": cost.encoder,
            "search": cost.search,
            "confidence": cost.confidence,
        },
        "memory": peak_memory(device),
        "search": dict(vars(cost.report)),
        "utterances": utterances,
    }

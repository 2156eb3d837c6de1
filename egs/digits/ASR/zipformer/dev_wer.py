"""The WER on the dev cuts after each epoch, which tells when a training is over."""

import csv
import logging
import math
from pathlib import Path
from typing import List, NamedTuple, Tuple

import kaldialign
import torch
from greedy import METHODS, Recogniser
from zipformer.utils import AttributeDict

from icefall_kd import KDError, load_model
from icefall_kd.files import replacing

# Percent. Before a model outputs words its WER stays near 100 for some epochs.
FIRST_WORDS = 90.0


class DevWer(NamedTuple):
    """What is known after an epoch; WERs are in percent, of the averaged model."""

    epoch: int
    steps: int
    seconds: float  # of training alone, from the start on
    ctc: float
    transducer: float

    @property
    def mean(self) -> float:
        """The mean of both heads' WERs, by which epochs are compared."""
        return (self.ctc + self.transducer) / 2


def num_averaged(epoch: int, avg: int) -> int:
    """Return how many epochs up to ``epoch`` are averaged: ``avg``, or all so far."""
    return max(min(avg, epoch - 1), 1)


def read_dev_wers(exp_dir: Path) -> List[DevWer]:
    """Return what a training in ``exp_dir`` wrote after its epochs, [] if nothing.

    Raises:
      KDError: a file that is not as :func:`write_dev_wers` wrote it.
    """
    path = exp_dir / "dev-wer.csv"
    if not path.is_file():
        return []
    kinds = DevWer.__annotations__
    try:
        with open(path, encoding="utf8", newline="") as f:
            header, *lines = csv.reader(f)
        if header != list(kinds):
            raise ValueError(f"its first line is not {','.join(kinds)}")
        rows = [
            DevWer(*(kind(x) for kind, x in zip(kinds.values(), line, strict=True)))
            for line in lines
        ]
        if not all(math.isfinite(x) and x >= 0 for row in rows for x in row):
            raise ValueError("a number is negative or not finite")
        epochs = [row.epoch for row in rows]
        if epochs != sorted(set(epochs)):
            raise ValueError("its epochs are not in order")
    except (ValueError, csv.Error) as e:
        raise KDError(
            f"{path} is damaged ({e}): remove it, and the training begins to count anew"
        ) from None
    return rows


def write_dev_wers(exp_dir: Path, rows: List[DevWer]) -> None:
    """Write ``rows`` to ``exp_dir``, where :func:`read_dev_wers` finds them.

    ``best-epoch`` there has the number of the best one.
    """
    with replacing(exp_dir / "best-epoch") as temporary:
        temporary.write_text(f"{best_of(rows).epoch}\n", "utf8")
    with replacing(exp_dir / "dev-wer.csv") as temporary:
        with open(temporary, "w", encoding="utf8", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(DevWer._fields)
            writer.writerows(
                [r.epoch, r.steps, f"{r.seconds:.1f}", f"{r.ctc:.2f}"]
                + [f"{r.transducer:.2f}"]
                for r in rows
            )


def best_of(rows: List[DevWer]) -> DevWer:
    """Return the best of ``rows``, the first of equal ones."""
    return min(rows, key=lambda row: row.mean)


@torch.no_grad()
def decode_dev(model, dev_dl, sp) -> Tuple[float, float]:
    """Return the WERs of both heads in percent, by greedy search.

    Args:
      model: The model, in eval mode.
      dev_dl: Batches of the dev cuts.
      sp: The tokens.
    """
    num_words, errors = 0, dict.fromkeys(METHODS, 0)
    recognise = Recogniser(model, sp)
    for batch in dev_dl:
        references = [text.split() for text in batch["supervisions"]["text"]]
        num_words += sum(map(len, references))
        for method, hyps in recognise(batch).items():
            for reference, hyp in zip(references, hyps):
                errors[method] += kaldialign.edit_distance(reference, hyp)["total"]
    if not num_words:
        raise KDError("the dev cuts have no words: make the data again")
    ctc, transducer = (100 * errors[method] / num_words for method in METHODS)
    return ctc, transducer


def is_over(rows: List[DevWer], patience: int) -> bool:
    """Return whether a training is over.

    It is over when none of the last ``patience`` epochs has a lower mean of both heads'
    WERs than an earlier epoch. It is not over before that mean is below 90 %: until a
    model begins to output words, its WER does not say how far it is.

    Args:
      rows: Those of its epochs.
      patience: A number of epochs, 1 or more.
    """
    if not rows or best_of(rows).mean >= FIRST_WORDS:
        return False
    return rows[-1].epoch - best_of(rows).epoch >= patience


def dev_wers_until(
    params: AttributeDict, dev_dl, sp, anew: bool = True
) -> List[DevWer]:
    """Return the rows of the epochs up to ``params.cur_epoch``, which is done.

    The dev cuts are decoded. The rows are then in ``dev-wer.csv`` of the experiment
    folder, so a training that goes on knows them. The first epoch has none: there is no
    earlier one to average from.

    Args:
      params: The training's, with ``cur_epoch``, ``avg``, ``batch_idx_train`` and
        ``train_seconds``.
      dev_dl: Batches of the dev cuts.
      sp: The tokens.
      anew: Whether to decode also if this epoch has a row, of a training before.

    Raises:
      KDError: a damaged ``dev-wer.csv``, or checkpoints that can't be averaged.
    """
    epoch = params.cur_epoch
    rows = [row for row in read_dev_wers(params.exp_dir) if row.epoch <= epoch]
    if rows and rows[-1].epoch == epoch and anew:
        del rows[-1]
    if epoch < 2 or (rows and rows[-1].epoch == epoch):
        return rows
    avg, folder = num_averaged(epoch, params.avg), Path(__file__).parent
    model, _ = load_model(folder, params.exp_dir, epoch, 0, avg, True)
    # Rounded as in the file, so that a training that goes on compares the same numbers.
    ctc, transducer = (round(wer, 2) for wer in decode_dev(model, dev_dl, sp))
    seconds = round(params.train_seconds, 1)
    rows.append(DevWer(epoch, params.batch_idx_train, seconds, ctc, transducer))
    write_dev_wers(params.exp_dir, rows)
    best = best_of(rows)
    logging.info(
        f"Epoch {epoch}: dev WER {ctc:.2f} % (CTC), {transducer:.2f} % (transducer);"
        f" best: epoch {best.epoch}, {best.ctc:.2f} %, {best.transducer:.2f} %"
    )
    return rows

"""What a plugged recipe calls.

In ``train.py``::

    from icefall_kd.training import session as kd

    kd.add_arguments(parser)                              # in get_parser()
    kd.attach(params, model)                              # in run(), after DDP
    kd.begin(batch)                                       # compute_loss()'s first line
    loss = kd.joint_loss(loss, info, model, batch)        # and after its loss

and in its data module, once the training dataset exists::

    train = kd.wrap_dataset(train, cuts_train)

``icefall-kd plug`` puts these lines, and their import, into a copy of a recipe.

With all weights of KD terms at 0, nothing to freeze and nothing to round, the default,
all of them leave everything as it is.
"""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any, Dict, Iterable, Optional

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.errors import disk_errors, install_excepthook
from icefall_kd.files import text_encoding
from icefall_kd.training.options import (
    add_options,
    distils,
    flags_in_errors,
    flags_of_parameters,
)

if TYPE_CHECKING:
    import torch
    from lhotse.cut import Cut

_current: Optional[Session] = None


class Session:
    """Distillation, frozen parts and rounded layers in one training process.

    Args:
      params: The recipe's params.
      model: The student in its last form, in DDP or not.

    Attributes:
      clock: Counts the epochs.
      checkpoint: The file ``kd.pt``.
      freezing: The frozen parts, or None.
      int8: The student's rounded layers, or None.
      distillation: The distillation, or None where all weights of terms are 0.

    Raises:
      KDError: An option has a value that can't be used, or that does not fit the
        student, the teacher or the other options.
    """

    def __init__(self, params: Dict[str, Any], model: torch.nn.Module) -> None:
        from icefall_kd.training.checkpoint import KDCheckpoint
        from icefall_kd.training.clock import EpochClock

        self.clock = EpochClock(params)
        self.checkpoint = KDCheckpoint(params, self.clock)
        parts = params, model, self.clock, self.checkpoint
        self.freezing = self.int8 = self.distillation = None
        if params["kd_freeze"]:
            from icefall_kd.training.freezing import Freezing

            self.freezing = Freezing(*parts)
        if distils(params):
            from icefall_kd.training.distillation import Distillation

            self.distillation = Distillation(*parts)
            logging.info(f"Distillation is on: loss = {self.distillation.joint}")
        if params["kd_int8_from"]:
            from icefall_kd.training.int8 import Int8Awareness

            self.int8 = Int8Awareness(params, model, self.clock)
        has_state = self.distillation is not None and self.distillation.has_state
        thaws = self.freezing is not None and self.freezing.freezer.pending
        begins_later = self.int8 is not None and self.int8.first_epoch > 0
        if has_state or thaws or begins_later:
            self.checkpoint.start()
        if self.freezing is not None:
            self.freezing.start()

    def close(self) -> None:
        """Leave the model as it was before, and write ``kd.pt`` no more."""
        for part in (self.distillation, self.freezing, self.int8, self.checkpoint):
            if part is not None:
                part.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--kd-*`` options; the recipe calls it in ``get_parser()``.

    Args:
      parser: The recipe's.

    Raises:
      KDError: The file of ``--kd-config`` can't be read, or has an unknown option.
    """
    # In main() too, where the errors of mp.spawn's processes arrive.
    install_excepthook(flags_of_parameters())
    add_options(parser)


@flags_in_errors()
@disk_errors()
def attach(params: Dict[str, Any], model: torch.nn.Module) -> None:
    """Begin a session, in place of a former one.

    The recipe calls it in ``run()``, when the model has its last form: after DDP, and
    before its optimizer is built.

    Args:
      params: The recipe's params, with the values of the ``--kd-*`` options.
      model: The student, in DDP or not.

    Raises:
      KDError: An option has a value that can't be used, or that does not fit the
        student, the teacher or the other options.
    """
    global _current
    detach()
    install_excepthook(flags_of_parameters())
    if not (distils(params) or params["kd_freeze"] or params["kd_int8_from"]):
        return
    if text_encoding() != "utf-8":
        logging.warning(
            f"Lhotse reads manifests as {text_encoding()} in this locale, and they are "
            "UTF-8: set PYTHONUTF8=1 where cut ids, paths or transcripts are not ASCII"
        )
    _current = Session(params, model)


def current() -> Optional[Session]:
    """Return the session of this process; None where nothing is distilled,
    frozen or rounded."""
    return _current


def detach() -> None:
    """End the session: the model is as it was before :func:`attach`."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def resume(session: Optional[Session]) -> None:
    """Let a session of this process be the current one, without closing another.

    So two trainings can take turns in one process.

    Args:
      session: One that is not closed, or None for a training without a session.
    """
    global _current
    _current = session


@flags_in_errors()
@disk_errors()
def wrap_dataset(
    dataset: torch.utils.data.Dataset, cuts: Iterable[Cut]
) -> torch.utils.data.Dataset:
    """Return the training dataset, which puts the targets of its cuts into each batch.

    The recipe's data module calls it before it builds the sampler.

    Args:
      dataset: The recipe's training dataset, such as lhotse's
        ``K2SpeechRecognitionDataset``.
      cuts: The training cuts.

    Raises:
      KDError: Cuts have no targets, or these are of other tokens than the student's.
    """
    if _current is None:
        return dataset
    from icefall_kd.targets.first_look import FirstLook

    # All processes look at all cuts at once; the first one shows the progress.
    first_look = FirstLook(cuts, silent=rank_and_world_size()[0] != 0)
    clock, parts = _current.clock, (_current.freezing, _current.int8)
    if _current.distillation is not None:
        dataset = _current.distillation.wrap_dataset(dataset, first_look)
    needs_fractions = any(part is not None and part.needs_fractions for part in parts)
    if needs_fractions and not clock.cuts_per_epoch:
        clock.cuts_per_epoch = first_look.all()
    return dataset


@flags_in_errors()
def begin(batch: Dict[str, Any]) -> None:
    """Begin a batch; it is the first line of the recipe's ``compute_loss()``.

    Args:
      batch: The recipe's, of training or of validation.

    Raises:
      KDError: Cuts with and without transcripts in one batch, where the recipe's losses
        can't be told apart by rows.
    """
    if _current is not None and _current.distillation is not None:
        _current.distillation.begin(batch)


@flags_in_errors()
def joint_loss(
    loss: torch.Tensor,
    info: Dict[str, float],
    model: torch.nn.Module,
    batch: Dict[str, Any],
) -> torch.Tensor:
    """Return the recipe's loss with the terms of distillation.

    The recipe calls it in ``compute_loss()``. Validation batches keep the recipe's
    loss, so that it compares across runs; the log has there how blank and how peaky the
    CTC head is.

    Args:
      loss: A scalar, the recipe's loss, a sum over frames. It requires a gradient in
        training, and none in validation.
      info: The recipe's ``MetricsTracker`` of this batch; the terms are added.
      model: The student, as it was given to :func:`attach`.
      batch: The recipe's.

    Raises:
      KDError: The batch has no targets, or those of other frames or tokens; or many
        batches in a row have terms that are not finite.
    """
    if _current is None:
        return loss
    if _current.distillation is not None:
        device = next(model.parameters()).device
        return _current.distillation.joint_loss(loss, info, batch, device)
    if loss.requires_grad:
        _current.checkpoint.before_batch()
        _current.clock.count(len(batch["supervisions"]["text"]))
    else:
        _current.checkpoint.save()
    return loss

"""What a plugged recipe calls.

Usage, in the recipe's ``train.py``::

    from icefall_kd.recipe import session as kd

    kd.add_arguments(parser)                              # in get_parser()
    kd.attach(params, model)                              # in run(), after DDP
    loss = kd.joint_loss(loss, info, model, batch)        # in compute_loss()

and in its data module, once the training dataset exists::

    train = kd.wrap_dataset(train, cuts_train)

With ``--kd-ctc-weight 0``, the default, all of them leave everything as it is.
"""

import argparse
import logging
from pathlib import Path
from typing import Any, Dict, Optional

from icefall_kd.errors import KDError, install_excepthook

_session: Optional["Session"] = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--kd-*`` options to a recipe's parser."""
    install_excepthook()  # in main() too, where mp.spawn's errors arrive
    group = parser.add_argument_group("knowledge distillation (icefall_kd)")
    group.add_argument(
        "--kd-ctc-weight",
        type=float,
        default=0.0,
        help="Weight of the CTC frame KL against the teacher's stored targets; "
        "0 switches distillation off.",
    )
    group.add_argument(
        "--kd-hard-weight",
        type=float,
        default=1.0,
        help="Weight of the recipe's own loss beside the KD terms. Without "
        "distillation the recipe's loss keeps its weight of 1.",
    )
    group.add_argument(
        "--kd-temperature",
        type=float,
        default=1.0,
        help="Temperature of the CTC frame KL.",
    )


class Session:
    """One process's distillation: taps on the student, and the joint loss."""

    def __init__(self, params: Dict[str, Any], model) -> None:
        from icefall_kd.hook import TeacherHook
        from icefall_kd.losses.joint import JointKDLoss

        self.joint = JointKDLoss(
            ctc_weight=params["kd_ctc_weight"],
            hard_weight=params["kd_hard_weight"],
            temperature=params["kd_temperature"],
        )
        self.vocab_size = params["vocab_size"]
        self.blank_id = params["blank_id"]
        self.bpe_model = params.get("bpe_model")
        _refuse_time_warp(params)
        self.hook = TeacherHook(getattr(model, "module", model))

    def check_store(self, cuts) -> None:
        from icefall_kd.targets.dataset import store_fingerprint
        from icefall_kd.targets.fingerprint import hash_tokens

        tokens = None
        if self.bpe_model and Path(self.bpe_model).is_file():
            tokens = hash_tokens(self.bpe_model)
        store_fingerprint(cuts).check_student(self.vocab_size, self.blank_id, tokens)


def _refuse_time_warp(params: Dict[str, Any]) -> None:
    warp = int(params.get("spec_aug_time_warp_factor", 0) or 0)
    on = params.get("enable_spec_aug", False) or params.get("use_cr_ctc", False)
    if on and warp >= 1:
        raise KDError(
            f"SpecAugment's time warp (--spec-aug-time-warp-factor {warp}) moves "
            "frames away from the teacher's stored targets: add "
            "--spec-aug-time-warp-factor 0"
        )
    if params.get("use_cr_ctc", False):
        raise KDError(
            "--use-cr-ctc 1 doubles each batch, and stored targets are of the batch "
            "as it is: add --use-cr-ctc 0, or switch KD off with --kd-ctc-weight 0"
        )


def attach(params: Dict[str, Any], model) -> None:
    """Begin a session; call it in ``run()`` when the model has its last form.

    Raises:
      KDError: a weight or temperature out of range, a model without CTC head, or
        an augmentation that moves frames.
    """
    global _session
    if _session is not None:
        _session.hook.close()
        _session = None
    install_excepthook()
    if params["kd_ctc_weight"] == 0:
        return
    _session = Session(params, model)
    joint = _session.joint
    logging.info(
        f"Distillation is on: loss = {joint.hard_weight} * loss + "
        f"{joint.ctc_weight} * kd_ctc_loss, temperature {joint.temperature}"
    )


def wrap_dataset(dataset, cuts):
    """Let the training dataset bring the targets of its cuts along.

    Raises:
      KDError: cuts without targets, or targets of other tokens than the student's.
    """
    if _session is None:
        return dataset
    from icefall_kd.targets.dataset import KDDataset

    _session.check_store(cuts)
    return KDDataset(dataset)


def joint_loss(loss, info, model, batch):
    """Add the KD terms to a training batch's ``loss``, and their names to ``info``.

    Validation batches keep the recipe's loss, so that it compares across runs.
    """
    if _session is None:
        return loss
    student = _session.hook.take()
    if not model.training:
        return loss
    if "kd_targets" not in batch:
        raise KDError(
            "a training batch has no kd_targets: let the data module call "
            "wrap_dataset(train, cuts_train) after session.attach() ran"
        )
    loss, terms = _session.joint(loss, student, batch["kd_targets"])
    info.update(terms)
    return loss

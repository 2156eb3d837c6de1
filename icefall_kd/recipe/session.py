"""What a plugged recipe calls.

Usage, in the recipe's ``train.py``::

    from icefall_kd.recipe import session as kd

    kd.add_arguments(parser)                              # in get_parser()
    kd.attach(params, model)                              # in run(), after DDP
    loss = kd.joint_loss(loss, info, model, batch)        # in compute_loss()

and in its data module, once the training dataset exists::

    train = kd.wrap_dataset(train, cuts_train)

With ``--kd-ctc-weight 0 --kd-rnnt-weight 0``, the default, all of them leave everything
as it is.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

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
        help="Weight of the CTC frame KL against the teacher's targets.",
    )
    group.add_argument(
        "--kd-rnnt-weight",
        type=float,
        default=0.0,
        help="Weight of the transducer's KL on the nodes of the teacher's pruned "
        "lattice. With this and --kd-ctc-weight at 0 distillation is off.",
    )
    group.add_argument(
        "--kd-rnnt-form",
        type=str,
        default="nodes",
        help="nodes: over all symbols that the teacher's lattice tells; collapsed: "
        "over {next label, blank, rest}.",
    )
    group.add_argument(
        "--kd-rnnt-shift",
        type=int,
        default=0,
        help="Frames by which a streaming student may lag behind its teacher.",
    )
    group.add_argument(
        "--kd-s-range",
        type=int,
        default=5,
        help="With --kd-teacher-exp-dir: label positions of its lattice at a frame.",
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
        help="Temperature of the KD terms.",
    )
    group.add_argument(
        "--kd-missing",
        type=str,
        choices=("refuse", "hard"),
        default="refuse",
        help="What becomes of training cuts without targets: refuse, or train on "
        "them by the recipe's own loss alone; kd_frames in the log is the share of "
        "frames that have targets.",
    )
    group.add_argument(
        "--kd-teacher-exp-dir",
        type=str,
        default="",
        help="Ask the teacher of this experiment folder in the training process, in "
        "place of reading stored targets; several, with commas, are averaged.",
    )
    group.add_argument(
        "--kd-teacher-epoch", type=int, default=30, help="The teacher's epoch-N.pt."
    )
    group.add_argument(
        "--kd-teacher-avg", type=int, default=1, help="How many epochs are averaged."
    )
    group.add_argument(
        "--kd-teacher-recipe",
        type=str,
        default="",
        help="Folder of the teacher's train.py; default: that of this script.",
    )
    group.add_argument(
        "--kd-cache-dir",
        type=str,
        default="",
        help="With --kd-teacher-exp-dir: store what the teacher says on each cut as it "
        "is, and read that from the second epoch on. At the end each process leaves "
        "the manifest of the cuts it heard there, such as cuts.jsonl.gz.",
    )
    group.add_argument(
        "--kd-keep",
        type=str,
        default="dense",
        help="With --kd-cache-dir: how targets are kept, as `icefall-kd dump --keep` "
        "has it.",
    )


class Session:
    """One process's distillation: taps on the student, and the joint loss."""

    def __init__(self, params: Dict[str, Any], model) -> None:
        from icefall_kd.codec import Codec
        from icefall_kd.hook import TeacherHook
        from icefall_kd.losses.joint import JointKDLoss

        self.joint = JointKDLoss(
            ctc_weight=params["kd_ctc_weight"],
            hard_weight=params["kd_hard_weight"],
            temperature=params["kd_temperature"],
            rnnt_weight=params["kd_rnnt_weight"],
            rnnt_form=params["kd_rnnt_form"],
            rnnt_shift=params["kd_rnnt_shift"],
        )
        self.settings = dict(params)
        self.vocab_size = params["vocab_size"]
        self.blank_id = params["blank_id"]
        self.bpe_model = params.get("bpe_model")
        self.missing = params["kd_missing"]
        self.teacher, self.teacher_name = _online_teacher(params)
        self.cache_dir = params["kd_cache_dir"]
        if self.cache_dir and self.teacher is None:
            raise KDError(
                f"--kd-cache-dir is {self.cache_dir} and there is no teacher to ask: "
                "give --kd-teacher-exp-dir"
            )
        _refuse_time_warp(params, stored=self.teacher is None or bool(self.cache_dir))
        ctc, rnnt = self.joint.ctc_weight > 0, self.joint.rnnt_weight > 0
        if rnnt and self.cache_dir:
            raise KDError(
                "--kd-cache-dir keeps CTC targets, and --kd-rnnt-weight needs "
                "lattices: dump them with `icefall-kd dump --keep-lattice`, or ask the "
                "teacher without a cache"
            )
        if self.cache_dir:
            Codec.parse(params["kd_keep"]).check_temperature(self.joint.temperature)
        self.hook = TeacherHook(model, ctc=ctc, decoder=rnnt)
        self.joiner = getattr(self.hook.model, "joiner", None)
        self.cache = None
        self.bpe = None

    def _pieces(self) -> Optional[List[str]]:
        from icefall_kd.targets.fingerprint import load_bpe_model, pieces

        if self.bpe_model and Path(self.bpe_model).is_file():
            return pieces(load_bpe_model(self.bpe_model))
        return None

    def read_store(self, cuts) -> Dict[str, Any]:
        """Check the store of ``cuts``; say how :class:`KDDataset` is to read it."""
        from icefall_kd.targets.dataset import store_fingerprint
        from icefall_kd.targets.fingerprint import hash_tokens, symbol_map

        found, store = store_fingerprint(cuts, self.missing)
        how: Dict[str, Any] = {"missing": self.missing}
        self._check_kept(found, store)
        how["lattice"] = self.joint.rnnt_weight > 0
        names = self._pieces()
        tokens = names and hash_tokens(names)
        if tokens and found.tokens and tokens != found.tokens:
            how["symbols"] = symbol_map(store, names, found.tokens)
        if how.get("symbols") is None:
            found.check_student(self.vocab_size, self.blank_id, tokens)
        else:
            logging.warning(
                f"The teacher's symbols in {store} stand in another order than the "
                "student's: targets are reordered"
            )
        factor = int(self.settings.get("subsampling_factor", 4))
        shift = factor * found.feature_shift
        if abs(shift - found.frame_shift) > 1e-6:
            logging.warning(
                f"The teacher gives a frame every {found.frame_shift} s and the "
                f"student every {shift} s: targets are resampled in time"
            )
            how["frame_shift"] = shift
        return how

    def _check_kept(self, found, store: str) -> None:
        """Refuse a store that lacks what the loss asks for."""
        joint, (ctc, lattice) = self.joint, found.codecs()
        for name, weight, codec, remedy in (
            ("CTC targets", joint.ctc_weight, ctc, "--keep dense"),
            ("lattices", joint.rnnt_weight, lattice, "--keep-lattice collapsed"),
        ):
            if weight and codec is None:
                raise KDError(
                    f"the store {store} keeps no {name}, and their weight is {weight}: "
                    f"dump with {remedy}, or set that weight to 0"
                )
        if joint.ctc_weight:
            ctc.check_temperature(joint.temperature)
        if joint.rnnt_weight:
            lattice.check_temperature(joint.temperature)

    def ask(self, batch, device):
        """What the online teacher says on a batch."""
        supervisions = batch["supervisions"]
        self.teacher.to(device)
        if not self.cache_dir:
            x = batch["inputs"].to(device)
            lens = supervisions["num_frames"].to(device)
            y = self._labels(supervisions["text"]) if self.joint.rnnt_weight else None
            return self.teacher.targets(
                x, lens, y=y, s_range=self.settings["kd_s_range"]
            )
        from icefall_kd.targets.dataset import cuts_of_rows

        cuts = cuts_of_rows(batch)
        if self.cache is None:
            self.cache = self._open_cache(cuts[0])
        return self.cache.targets(cuts, device)

    def _labels(self, texts: List[str]) -> List[List[int]]:
        from icefall_kd.targets.fingerprint import load_bpe_model

        if self.bpe is None:
            self.bpe = load_bpe_model(self.bpe_model or "--bpe-model")
        return self.bpe.encode(texts, out_type=int)

    def _open_cache(self, cut):
        import atexit

        from icefall_kd.targets.fingerprint import Fingerprint, hash_tokens
        from icefall_kd.targets.writer import LogitWriter
        from icefall_kd.teacher import CachingTeacher
        from icefall_kd.teacher.online import speech_of

        names = self._pieces()
        tokens = names and hash_tokens(names)
        fingerprint = Fingerprint.of(
            self.teacher_name,
            self.settings,
            speech_of(cut).features,
            tokens,
            ctc=self.settings["kd_keep"],
        )
        rank, ranks = process_of()
        writer = LogitWriter(
            Path(self.cache_dir) / "cuts.jsonl.gz",
            self.cache_dir,
            fingerprint,
            job=rank,
            num_jobs=ranks,
        )
        atexit.register(_finish, writer)
        return CachingTeacher(self.teacher, writer)


def _finish(writer) -> None:
    """Leave a whole manifest of what the teacher was asked."""
    try:
        writer.finish()
        logging.info(
            f"{writer.manifest}: {len(writer)} cuts with the teacher's targets"
        )
    except KDError as e:
        logging.error(e.sentence)


def process_of():
    """This process's rank, and how many there are."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _online_teacher(params: Dict[str, Any]):
    """The teachers that ``--kd-teacher-exp-dir`` names, or None, and their name."""
    if not params["kd_teacher_exp_dir"]:
        return None, ""
    from icefall_kd.recipe.loader import load_recipe_model
    from icefall_kd.targets.fingerprint import name_of
    from icefall_kd.teacher import OnlineTeacher

    models, names = [], []
    for folder in params["kd_teacher_exp_dir"].split(","):
        model, settings = load_recipe_model(
            params["kd_teacher_recipe"] or Path(sys.argv[0]).resolve().parent,
            folder,
            params["kd_teacher_epoch"],
            avg=params["kd_teacher_avg"],
            use_averaged_model=params.get("use_averaged_model", True),
        )
        for name in ("vocab_size", "blank_id"):
            if settings[name] != params[name]:
                raise KDError(
                    f"the student's {name} is {params[name]} and that of the teacher "
                    f"in {folder} is {settings[name]}: train the student with the "
                    "teacher's --bpe-model"
                )
        models.append(model)
        if params["kd_cache_dir"]:  # a hash of all parameters takes its time
            names.append(name_of(model, settings))
    return OnlineTeacher(models), ",".join(names)


def _refuse_time_warp(params: Dict[str, Any], stored: bool) -> None:
    warp = int(params.get("spec_aug_time_warp_factor", 0) or 0)
    on = params.get("enable_spec_aug", False) or params.get("use_cr_ctc", False)
    if stored and on and warp >= 1:
        raise KDError(
            f"SpecAugment's time warp (--spec-aug-time-warp-factor {warp}) moves "
            "frames away from the teacher's stored targets: add "
            "--spec-aug-time-warp-factor 0"
        )
    if params.get("use_cr_ctc", False):
        raise KDError(
            "--use-cr-ctc 1 doubles each batch, and the teacher's targets are of the "
            "batch as it is: add --use-cr-ctc 0, or switch KD off with "
            "--kd-ctc-weight 0"
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
    if params["kd_ctc_weight"] == 0 and params["kd_rnnt_weight"] == 0:
        return
    _session = Session(params, model)
    logging.info(f"Distillation is on: loss = {_session.joint}")


def wrap_dataset(dataset, cuts):
    """Let the training dataset bring the targets of its cuts along.

    Raises:
      KDError: cuts without targets, or targets of other tokens than the student's.
    """
    if _session is None:
        return dataset
    from icefall_kd.targets.dataset import KDDataset

    if _session.teacher is not None:
        dataset.return_cuts = True
        return dataset
    return KDDataset(dataset, **_session.read_store(cuts))


def joint_loss(loss, info, model, batch):
    """Add the KD terms to a training batch's ``loss``, and their names to ``info``.

    Validation batches keep the recipe's loss, so that it compares across runs.
    """
    if _session is None:
        return loss
    student = _session.hook.take()
    if not model.training:
        return loss
    if _session.teacher is not None:
        targets = _session.ask(batch, next(model.parameters()).device)
    elif "kd_targets" in batch:
        targets = batch["kd_targets"]
    else:
        raise KDError(
            "a training batch has no kd_targets: let the data module call "
            "wrap_dataset(train, cuts_train) after session.attach() ran"
        )
    loss, terms = _session.joint(
        loss, student, targets, _session.joiner, _session.blank_id
    )
    info.update(terms)
    return loss

"""What a plugged recipe calls.

In ``train.py``::

    from icefall_kd.training import session as kd

    kd.add_arguments(parser)                              # in get_parser()
    kd.attach(params, model)                              # in run(), after DDP
    kd.begin(batch)                                       # compute_loss()'s first line
    loss = kd.joint_loss(loss, info, model, batch)        # and behind its loss

and in its data module, once the training dataset exists::

    train = kd.wrap_dataset(train, cuts_train)

``icefall-kd plug`` puts these lines, and their import, into a copy of a recipe.

With all weights of KD terms at 0 and nothing to freeze, the default, all of them leave
everything as it is.
"""

import argparse
import logging
from typing import Any, Dict, List, Optional

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.errors import KDError, disk_errors, install_excepthook
from icefall_kd.files import text_encoding
from icefall_kd.training import checks
from icefall_kd.training.options import WEIGHTS, add_options
from icefall_kd.training.time_warp import TimeWarp

_session: Optional["Session"] = None
_freezing = None  # a Freezing, where parts of the student are frozen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--kd-*`` options to a recipe's parser."""
    install_excepthook()  # in main() too, where mp.spawn's errors arrive
    add_options(parser)


def joint_of(params: Dict[str, Any], num_epochs: float):
    """The joint loss that ``params`` describe, for so many epochs."""
    from icefall_kd.terms.joint import JointKDLoss
    from icefall_kd.terms.layers import HiddenLayers, parse_layers
    from icefall_kd.terms.schedule import Schedule

    hidden = None
    if params["kd_hidden_layers"]:
        pairs = parse_layers(params["kd_hidden_layers"])
        hidden = HiddenLayers(
            pairs, params["kd_hidden_kind"], params["kd_projector_lr"]
        )
    return JointKDLoss(
        **{f"{name}_weight": params[f"kd_{name}_weight"] for name in WEIGHTS},
        hard_weight=params["kd_hard_weight"],
        temperature=params["kd_temperature"],
        rnnt_form=params["kd_rnnt_form"],
        rnnt_shift=params["kd_rnnt_shift"],
        node_weights=params["kd_node_weights"],
        ctc_frames=params["kd_ctc_frames"],
        ctc_delay=params["kd_ctc_delay"],
        hidden=hidden,
        schedule=Schedule(params["kd_schedule"], num_epochs, params["kd_last_epochs"]),
    )


class Session:
    """One process's distillation: taps on the student, and the joint loss."""

    def __init__(self, params: Dict[str, Any], model, progress) -> None:
        from icefall_kd.tap import ModelTap
        from icefall_kd.training.online import online_teacher, tokens_file

        self.settings = dict(params)
        self.progress = progress
        self.joint = joint_of(params, self.progress.num_epochs)
        model = getattr(model, "module", model)
        checks.leave_out_heads(self.joint, model)
        self.vocab_size = params["vocab_size"]
        self.blank_id = params.get("blank_id", 0)  # k2's, where there is CTC alone
        self.bpe_model = tokens_file(params)
        self.missing = params["kd_missing"]
        self.cache_dir = params["kd_cache_dir"]
        asked = bool(params["kd_teacher_exp_dir"])
        checks.check_online(params, self.joint, asked)
        if params["kd_teacher_ranges"]:
            checks.check_ranges(self.joint, asked)
        stored = self.joint.needs_targets and (not asked or bool(self.cache_dir))
        self.time_warp = TimeWarp(params, self.joint, stored, bool(self.cache_dir))
        hidden = self.joint.hidden
        self.teacher, self.teacher_name = None, ""
        if self.joint.needs_targets:
            self.teacher, self.teacher_name = online_teacher(
                params,
                hidden.teacher_layers if hidden else [],
                ctc=self.joint.needs_ctc_targets,
            )
        nbest = "nbest" in self.joint.terms
        self.hook = ModelTap(
            model,
            hidden.student_layers if hidden else (),
            ctc=self.joint.needs_ctc_targets or (nbest and checks.has_ctc(model)),
            decoder=self.joint.needs_lattice
            or (nbest and checks.has_transducer(model)),
        )
        self.ranges = None
        if params["kd_teacher_ranges"]:
            from icefall_kd.training.pruning import TeacherRanges

            self.ranges = TeacherRanges(model)
        self.cache = None
        self.bpe = None
        self.untranscribed = 0
        self.searched = False  # the last batch, for what fills the memory
        self.reading: Any = None
        if hidden or self.joint.moves:
            self.progress.keep(hidden)
            # A plain function, which copies of the model share.
            self.reading = model._register_state_dict_hook(
                lambda *_: self.before_checkpoint()
            )

    def _pieces(self) -> Optional[List[str]]:
        from icefall_kd.tokens import token_names

        return token_names(self._bpe()) if self.bpe_model else None

    def wrap(self, dataset, cuts):
        """The training dataset, with what distillation needs of each batch."""
        return self._with_targets(self.time_warp.apply(dataset), cuts)

    def _with_targets(self, dataset, cuts):
        """The training dataset, with targets and transcripts for all of its cuts."""
        from icefall_kd.targets.dataset import KDDataset
        from icefall_kd.targets.transcripts import StandInTranscripts, stand_in

        read = _first_look(cuts)
        if self.teacher is None and self.joint.needs_targets:
            how = self.read_store(read)
            dataset = KDDataset(dataset, **how, time_warp=self.time_warp.followed)
        else:
            dataset.return_cuts = True
            if self.teacher is None or self.joint.moves:
                read.all()
        self.progress.per_epoch, self.untranscribed = read.total, read.untranscribed
        if read.total and not read.untranscribed:
            return dataset
        text = ""
        if read.untranscribed or self.bpe_model:
            text = stand_in(self._bpe(), self.blank_id)
        return StandInTranscripts(dataset, text)

    def read_store(self, cuts) -> Dict[str, Any]:
        """Check the store of ``cuts``; say how :class:`KDDataset` is to read it."""
        from icefall_kd.targets.dataset import store_fingerprint
        from icefall_kd.targets.places import look_beside
        from icefall_kd.tokens import hash_tokens, token_map

        folder = str(self.settings.get("manifest_dir") or "")
        look_beside(folder)
        found, store = store_fingerprint(cuts, self.missing)
        how: Dict[str, Any] = {"missing": self.missing, "manifest_dir": folder}
        checks.check_kept(self.joint, found, store)
        checks.check_path(self.settings, self.joint, found, store)
        how["lattice"] = self.joint.needs_lattice
        if self.joint.hidden:
            self.joint.hidden.learn_widths(_first_layers(cuts.cuts))
            how["hidden"] = True
        names = self._pieces()
        tokens = names and hash_tokens(names)
        if tokens and found.tokens and tokens != found.tokens:
            how["symbols"] = token_map(store, names, found.tokens)
        if how.get("symbols") is None:
            found.check_student(self.vocab_size, self.blank_id, tokens)
        else:
            checks.check_lattices_stay(self.joint, "the orders of symbols", store)
            logging.warning(
                f"The teacher's symbols in {store} stand in another order than the "
                "student's: targets are reordered"
            )
        factor = int(self.settings.get("subsampling_factor", 4))
        shift = factor * found.feature_shift
        if abs(shift - found.frame_shift) > 1e-6:
            checks.check_lattices_stay(self.joint, "the frame rates", store)
            logging.warning(
                f"The teacher gives a frame every {found.frame_shift} s and the "
                f"student every {shift} s: targets are resampled in time"
            )
            how["frame_shift"] = shift
        return how

    def ask(self, batch, student, device):
        """What the online teacher says on a batch."""
        from icefall_kd.targets.dataset import cuts_of_rows

        supervisions = batch["supervisions"]
        self.teacher.to(device)
        if not self.cache_dir:
            x = batch["inputs"].to(device)
            lens = supervisions["num_frames"].to(device)
            y = None
            if self.joint.needs_lattice and batch.get("kd_transcribed", True):
                # The recipe's own labels, whatever it makes them with.
                rows = student.labels[: len(x), 1:].tolist()
                y = [[s for s in row if s != self.blank_id] for row in rows]
            return self.teacher.targets(
                x,
                lens,
                cuts_of_rows(batch),
                y=y,
                s_range=self.settings["kd_s_range"],
                path_only=bool(self.settings["kd_path_only"]),
                missing=self.missing,
            )
        from icefall_kd.training.online import open_cache

        cuts = cuts_of_rows(batch)
        if self.cache is None:
            self.cache = open_cache(
                self.teacher, self.teacher_name, self.settings, cuts[0], self._pieces()
            )
        return self.cache.targets(cuts, device)

    def _bpe(self):
        from icefall_kd.tokens import load_tokenizer

        if self.bpe is None:
            name = self.settings.get("bpe_model") or self.settings.get("lang_dir")
            self.bpe = load_tokenizer(self.bpe_model or name or "--bpe-model")
        return self.bpe

    def _labels(self, texts: List[str]) -> List[List[int]]:
        return self._bpe().encode(texts, out_type=int)

    def nbest(self, batch):
        """The n-best lists that the batch's cuts carry, as the student's labels."""
        from icefall_kd.kinds.nbest import read_nbest
        from icefall_kd.targets.dataset import cuts_of_rows

        lists = [read_nbest(cut) for cut in cuts_of_rows(batch)]
        return [
            list(zip(self._labels([t for t, _ in row]), [s for _, s in row]))
            for row in lists
        ]

    def before_checkpoint(self) -> None:
        """The recipe reads the student's parameters, perhaps for a checkpoint."""
        if self.joint.hidden is not None:
            if rank_and_world_size()[1] > 1:
                return  # the projectors learn in all processes at once, and not here
            self._learn()
        self.progress.before_checkpoint()

    def before_batch(self) -> None:
        """Let the projectors learn from the last batch, if they have not yet."""
        self._learn()
        self.searched = self.progress.searches
        self.progress.mark()

    def _learn(self) -> None:
        hidden = self.joint.hidden
        if hidden is not None:
            if self.searched:
                hidden.forget()
            else:
                hidden.step()

    def diagnose(self, info, student) -> None:
        """Say of a validation batch how blank and how peaky the CTC head is."""
        from icefall_kd.losses.ctc import ctc_diagnostics

        if student.ctc_logits is None:
            return
        found = ctc_diagnostics(
            student.ctc_logits, student.encoder_out_lens, blank_id=self.blank_id
        )
        info.update({f"kd_{name}": value for name, value in found.items()})

    def close(self) -> None:
        self.hook.close()
        self.progress.close()
        if self.reading is not None:
            self.reading.remove()
        if self.ranges is not None:
            self.ranges.close()

    def add_terms(self, loss, info, student, targets, batch):
        """The joint loss of a training batch; its names go to ``info``."""
        if "nbest" in self.joint.terms:
            targets.parts["nbest"] = self.nbest(batch)
        supervisions = batch["supervisions"]
        epoch = self.progress.saw(len(supervisions["text"]))
        transcribed = bool(batch.get("kd_transcribed", True))
        loss, terms = self.joint(
            loss,
            student,
            targets,
            self.hook.model,
            self.blank_id,
            epoch=epoch,
            transcribed=transcribed,
        )
        info.update(terms)
        factor = int(self.settings.get("subsampling_factor", 4))
        frames = float((supervisions["num_frames"] // factor).sum())
        if self.joint.moves:  # icefall divides by frames what it logs
            for name, value in self.joint.weights(epoch).items():
                info[f"kd_{name}_weight"] = value * frames
        if self.untranscribed:
            info["kd_hard_frames"] = frames if transcribed else 0.0
        return loss


def _first_look(cuts):
    """All processes look at all cuts at once; one of them says how far it is."""
    from icefall_kd.targets.look import FirstLook

    return FirstLook(cuts, silent=rank_and_world_size()[0] != 0)


def _first_layers(cuts) -> Dict:
    """The hidden layers of one cut with targets."""
    from icefall_kd.targets.dataset import collate_targets
    from icefall_kd.targets.store import tracks_with_targets

    for cut in cuts:
        if tracks_with_targets(cut):
            return collate_targets([cut], hidden=True).parts["hidden"]
    return {}


@disk_errors()
def attach(params: Dict[str, Any], model) -> None:
    """Begin a session; call it in ``run()`` when the model has its last form.

    Raises:
      KDError: a weight or temperature out of range, a model without the heads that all
        terms need, an augmentation that moves frames, or parts that can't be frozen.
    """
    global _session, _freezing
    for one in (_session, _freezing):
        if one is not None:
            one.close()
    _session = _freezing = None
    install_excepthook()
    on = any(params[f"kd_{name}_weight"] != 0 for name in WEIGHTS)
    if not (on or params["kd_freeze"]):
        return
    from icefall_kd.training.progress import Progress

    if text_encoding() != "utf-8":
        logging.warning(
            f"Lhotse reads manifests as {text_encoding()} in this locale, and they are "
            "UTF-8: set PYTHONUTF8=1 where cut ids, paths or transcripts are not ASCII"
        )
    progress = Progress(params)
    freezing = None
    if params["kd_freeze"]:
        from icefall_kd.training.freezing import Freezing

        freezing = Freezing(params, model, progress)
    if on:
        _session = Session(params, model, progress)
        logging.info(f"Distillation is on: loss = {_session.joint}")
    if freezing is not None:
        freezing.start()
        _freezing = freezing


@disk_errors()
def wrap_dataset(dataset, cuts):
    """Let the training dataset bring the targets of its cuts along.

    Raises:
      KDError: cuts without targets, or targets of other tokens than the student's.
    """
    if _session is not None:
        dataset = _session.wrap(dataset, cuts)
    if _freezing is not None and _freezing.asks_for_fractions:
        progress = _freezing.progress
        progress.per_epoch = progress.per_epoch or _first_look(cuts).all()
    return dataset


def begin(batch: Dict[str, Any]) -> None:
    """Begin a batch; call it at the head of ``compute_loss()``.

    Args:
      batch: The recipe's, of training or of validation.
    """
    if _session is not None and _session.ranges is not None:
        _session.ranges.begin(batch.get("kd_targets"))


def joint_loss(loss, info, model, batch):
    """Add the KD terms to a training batch's ``loss``, and their names to ``info``.

    Validation batches keep the recipe's loss, so that it compares across runs; ``info``
    says there how blank and how peaky the CTC head is.
    """
    if _session is None:
        if _freezing is not None:
            _freezing.after_batch(loss.requires_grad, batch)
        return loss
    from icefall_kd.types import Targets

    student = _session.hook.take()
    if _session.ranges is not None:
        student.ranges, student.lattice_logits = _session.ranges.take()
    # Recipes with adapters leave the model itself in eval mode while they train it.
    if not loss.requires_grad:
        _session.progress.save()
        _session.diagnose(info, student)
        return loss
    _session.before_batch()
    if not _session.joint.needs_targets:
        rows = len(batch["inputs"])
        targets = Targets(student.encoder_out_lens[:rows])
    elif _session.teacher is not None:
        targets = _session.ask(batch, student, next(model.parameters()).device)
    elif "kd_targets" in batch:
        targets = batch["kd_targets"]
    else:
        raise KDError(
            "a training batch has no kd_targets: let the data module call "
            "wrap_dataset(train, cuts_train) after session.attach() ran"
        )
    return _session.add_terms(loss, info, student, targets, batch)

"""Distilling one student: its tap, its teacher's targets and the joint loss."""

from collections import Counter
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.errors import require
from icefall_kd.kinds.nbest import read_nbest
from icefall_kd.losses.frames import ctc_diagnostics
from icefall_kd.tap import ModelTap
from icefall_kd.targets.clean import CleanFeatures
from icefall_kd.targets.dataset import cuts_of_rows
from icefall_kd.targets.first_look import FirstLook
from icefall_kd.targets.stand_in import StandInTranscripts, stand_in, transcribed_rows
from icefall_kd.targets.transcript import ORIGINS, TRANSCRIBED, origin_of
from icefall_kd.terms.joint import JointKDLoss
from icefall_kd.training import checks
from icefall_kd.training.checkpoint import KDCheckpoint
from icefall_kd.training.clock import EpochClock
from icefall_kd.training.hard_rows import HardRows
from icefall_kd.training.online import OnlineTargets
from icefall_kd.training.pruning import TeacherRanges
from icefall_kd.training.stored import StoredTargets
from icefall_kd.training.time_warp import TimeWarp
from icefall_kd.training.tokenizer import StudentTokenizer
from icefall_kd.types import EncoderOut, Targets
from icefall_kd.zipformer import subsampling_factor


class Distillation:
    """Distils one student in a recipe's training.

    Args:
      params: The recipe's params.
      model: The student, as the recipe trains it.
      clock: The session's clock.
      checkpoint: The session's file, which keeps the projectors.

    Attributes:
      joint: The joint loss.
      online: The teacher that runs in this process, or None.
      tap: The student's tap.
      ranges: Teacher-guided pruning, or None.
      hard_rows: Leaves rows without transcripts out of the recipe's losses.
      has_untranscribed_cuts: Whether some training cuts have no transcript.
      counts_origins: Whether some have none, or one of a teacher; None while that is
        not known, as nobody has read all cuts.

    Raises:
      KDError: An option has a value that can't be used or does not fit the student, the
        teacher or the other options.
    """

    def __init__(
        self,
        params: Dict[str, Any],
        model: torch.nn.Module,
        clock: EpochClock,
        checkpoint: KDCheckpoint,
    ) -> None:
        self.clock, self.checkpoint = clock, checkpoint
        self.joint = JointKDLoss.from_params(params, clock.num_epochs)
        model = getattr(model, "module", model)
        self.joint.leave_out_terms(model)
        self.params = dict(params)
        self.blank_id = params.get("blank_id", 0)  # no such param: k2's, with CTC alone
        self.tokenizer = StudentTokenizer(params)
        has_teacher = bool(params["kd_teacher_exp_dir"])
        has_cache = bool(params["kd_teacher_cache_dir"])
        checks.check_online(params, self.joint, has_teacher)
        if params["kd_stored_ranges"]:
            checks.check_ranges(self.joint, has_teacher)
        reads_store = bool(self.joint.teacher_kinds) and (has_cache or not has_teacher)
        of_unwarped = reads_store or bool(params["kd_teacher_clean"])
        self.time_warp = TimeWarp(params, self.joint, of_unwarped, has_cache)
        self.online = None
        if has_teacher and self.joint.teacher_kinds:
            self.online = OnlineTargets(params, self.joint, self.tokenizer)
        heads = self.joint.heads(model)
        self.tap = ModelTap(
            model,
            self.joint.student_layers,
            with_ctc="ctc" in heads,
            with_decoder="transducer" in heads,
            with_simple="simple" in heads,
        )
        self.ranges = TeacherRanges(model) if params["kd_stored_ranges"] else None
        self.hard_rows = HardRows(model)
        self.has_untranscribed_cuts = False
        self.counts_origins: Optional[bool] = False
        self._last_batch_trained = True
        self._state_dict_hook: Any = None
        if self.joint.projectors is not None:
            checkpoint.register("hidden", self.joint.projectors, "projectors")
        if self.has_state:
            # A plain function, which copies of the model share.
            self._state_dict_hook = model._register_state_dict_hook(
                lambda *_: self._before_checkpoint()
            )

    @property
    def has_state(self) -> bool:
        """Whether anything changes while the student trains, beside its parameters."""
        return self.joint.projectors is not None or not self.joint.is_constant

    def close(self) -> None:
        """Take all hooks off the model and the engine."""
        self.tap.close()
        if self._state_dict_hook is not None:
            self._state_dict_hook.remove()
        if self.ranges is not None:
            self.ranges.close()
        self.hard_rows.close()

    def begin(self, batch: Dict[str, Any]) -> None:
        """Prepare the recipe's forward pass.

        Args:
          batch: The recipe's, of training or of validation.

        Raises:
          KDError: Rows with and without transcripts, which can't be told apart.
        """
        if self.ranges is not None:
            self.ranges.begin(batch.get("kd_targets"))
        self.hard_rows.begin(batch)

    def wrap_dataset(
        self, dataset: torch.utils.data.Dataset, cuts: FirstLook
    ) -> torch.utils.data.Dataset:
        """Return the training dataset with the targets and transcripts of all cuts.

        Args:
          dataset: The recipe's.
          cuts: The training cuts.
        """
        dataset = self.time_warp.apply(dataset)
        if self.joint.teacher_kinds and self.online is None:
            stored = StoredTargets(self.params, self.joint, self.tokenizer)
            dataset = stored.wrap(dataset, cuts, self.time_warp.record)
        else:
            dataset.return_cuts = True
            if self.online is not None and self.online.hears_clean:
                dataset = CleanFeatures(dataset, self.time_warp.record)
            if self.online is None or not self.joint.is_constant:
                cuts.all()
        self.clock.cuts_per_epoch = cuts.total
        self.has_untranscribed_cuts = bool(cuts.untranscribed)
        self.counts_origins = None
        if cuts.total:
            self.counts_origins = bool(set(cuts.origins) - {TRANSCRIBED})
        if cuts.total and not cuts.untranscribed:
            return dataset
        text = ""
        if cuts.untranscribed or self.tokenizer.path:
            text = stand_in(self.tokenizer.tokenizer, self.blank_id)
        return StandInTranscripts(dataset, text)

    def joint_loss(
        self,
        loss: torch.Tensor,
        info: Dict[str, float],
        batch: Dict[str, Any],
        device: torch.device,
    ) -> torch.Tensor:
        """Return the joint loss of a training batch, or the loss of a validation batch.

        Args:
          loss: A scalar, the recipe's loss.
          info: What the recipe logs of the batch; the terms are added, in validation
            how blank and how peaky the CTC head is.
          batch: The recipe's.
          device: The student's.

        Raises:
          KDError: The batch has no targets, or those of other frames or tokens; or many
            batches in a row have terms that are not finite.
        """
        student = self.tap.take()
        if self.ranges is not None:
            student.ranges, student.lattice_logits = self.ranges.take()
        self.hard_rows.take(batch)
        # Recipes with adapters leave the model itself in eval mode while they train it.
        if not loss.requires_grad:
            self.checkpoint.save()
            self._log_ctc_head(info, student)
            return loss
        self.step_projectors()
        self.checkpoint.before_batch()
        targets = self._targets(batch, student, device)
        epoch = self.clock.count(len(batch["supervisions"]["text"]))
        transcribed = transcribed_rows(batch)
        if self.joint.condition and student.labels is None:
            student.labels = self._labels(batch, student)
        loss, terms = self.joint(
            loss,
            student,
            targets,
            self.tap.model,
            self.blank_id,
            epoch=epoch,
            transcribed=transcribed,
        )
        factor = subsampling_factor(self.params)
        frames = float((batch["supervisions"]["num_frames"] // factor).sum())
        if self.joint.condition:  # icefall divides by frames what it logs
            terms["kd_taught"] *= frames
        info.update(terms)
        if not self.joint.is_constant:
            for name, weight in self.joint.weights(epoch).items():
                info[f"kd_{name}_weight"] = weight * frames
        self._log_origins(info, batch, frames)
        return loss

    def _log_origins(
        self, info: Dict[str, float], batch: Dict[str, Any], frames: float
    ) -> None:
        """Log how many cuts of a batch have a transcript, and whose it is."""
        supervisions = batch["supervisions"]
        rows = transcribed_rows(batch)
        if rows is not None:  # of an online teacher's cuts nobody knew before
            self.has_untranscribed_cuts = True
        if self.has_untranscribed_cuts:
            factor = subsampling_factor(self.params)
            lens = supervisions["num_frames"] // factor
            if rows is not None:
                lens = lens[rows[supervisions["sequence_idx"].long()]]
            info["kd_hard_frames"] = float(lens.sum())
        if self.counts_origins is False:
            return
        counts = Counter(origin_of(cut) for cut in supervisions["cut"])
        if self.counts_origins or set(counts) - {TRANSCRIBED}:
            self.counts_origins = True
            for origin in ORIGINS:  # icefall divides by frames what it logs
                info[f"kd_{origin}_cuts"] = counts[origin] * frames

    def step_projectors(self) -> None:
        """Let the projectors learn from the last batch, if they have not yet."""
        self._step()
        self._last_batch_trained = not self.clock.is_memory_scan

    def _step(self) -> None:
        projectors = self.joint.projectors
        if projectors is not None:
            if self._last_batch_trained:
                projectors.step()
            else:
                projectors.forget()

    def _before_checkpoint(self) -> None:
        """The recipe reads the student's parameters, perhaps for a checkpoint."""
        if self.joint.projectors is not None:
            if rank_and_world_size()[1] > 1:
                return  # the projectors learn in all processes at once, not in one
            self._step()
        self.checkpoint.before_checkpoint()

    def _log_ctc_head(self, info: Dict[str, float], student: EncoderOut) -> None:
        """Log how blank and how peaky the CTC head is on a validation batch."""
        if student.ctc_logits is None:
            return
        diagnostics = ctc_diagnostics(
            student.ctc_logits, student.encoder_out_lens, blank_id=self.blank_id
        )
        info.update({f"kd_{name}": value for name, value in diagnostics.items()})

    def _targets(
        self, batch: Dict[str, Any], student: EncoderOut, device: torch.device
    ) -> Targets:
        """Return the targets of a training batch: stored, computed or none."""
        if self.online is not None:
            targets = self.online.targets(batch, student, device)
        elif self.joint.teacher_kinds:
            require(
                "kd_targets" in batch,
                "a training batch has no kd_targets: let the data module call "
                "wrap_dataset(train, cuts_train) after session.attach() ran",
            )
            targets = batch["kd_targets"]
        else:
            targets = Targets(student.encoder_out_lens[: len(batch["inputs"])])
        if "nbest" in self.joint.kinds:
            targets.parts["nbest"] = self.nbest_lists(batch)
        return targets

    def _labels(self, batch: Dict[str, Any], student: EncoderOut) -> torch.Tensor:
        """The labels of a student that has no transducer, as its decoder would get
        them: (N, U + 1), N the rows of the student, of CR-CTC twice the batch's."""
        texts = self.tokenizer.encode(batch["supervisions"]["text"])
        rows = [torch.tensor([self.blank_id, *labels]) for labels in texts]
        labels = pad_sequence(rows, batch_first=True, padding_value=self.blank_id)
        copies = len(student.encoder_out_lens) // len(rows)
        return labels.repeat(copies, 1).to(student.encoder_out.device)

    def nbest_lists(self, batch: Dict[str, Any]) -> List[List[Tuple[List[int], float]]]:
        """Return the n-best list of each row: token ids and the log score of each
        hypothesis.

        Args:
          batch: The recipe's, with its cuts.
        """
        lists = []
        for cut in cuts_of_rows(batch):
            hypotheses = read_nbest(cut)
            labels = self.tokenizer.encode([text for text, _ in hypotheses])
            scores = [score for _, score in hypotheses]
            lists.append(list(zip(labels, scores)))
        return lists

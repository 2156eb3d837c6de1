"""What a term is computed from: a batch's outputs of the student and its targets."""

from functools import cached_property
from typing import Optional, Tuple

import torch

from icefall_kd.errors import KDError
from icefall_kd.losses.nodes import stored_nodes
from icefall_kd.losses.student_nodes import StudentNodes
from icefall_kd.types import Distribution, EncoderOut, Nodes, Targets, index_rows


class TermInputs:
    """One batch of N rows with a student's outputs and its teacher's targets.

    Args:
      student: The student's outputs, T_student frames a row at most.
      targets: The teacher's, T_teacher frames a row at most, on the student's device.
      model: The student, for the terms of its transducer.
      blank_id: The student's blank.
      node_logits: Whether a term needs the student's logits at all nodes, so that they
        are computed once for all terms.

    Attributes:
      lens: (N,), the frames of each row that both have.
      mask: (N, T), bool, the frames that have targets, where T is the largest of lens.
    """

    def __init__(
        self,
        student: EncoderOut,
        targets: Targets,
        model: Optional[torch.nn.Module] = None,
        blank_id: int = 0,
        node_logits: bool = False,
    ) -> None:
        self.student, self.targets = student, targets
        self.model, self.blank_id = model, blank_id
        self.node_logits = node_logits
        self._student_nodes: Optional[StudentNodes] = None
        # A part of a cut may have fewer frames than the teacher's targets of it, which
        # were cut out of the whole cut's.
        lens = student.encoder_out_lens.to(targets.mask.device)
        t = min(int(lens.max()), targets.mask.size(1))
        valid = torch.arange(t, device=lens.device) < lens[:, None]
        self.mask = targets.mask[:, :t] & valid
        self.lens = lens.clamp(max=t)

    def ctc_logits(self) -> Optional[Tuple[torch.Tensor, Distribution]]:
        """Return the CTC outputs of student and teacher, each (N, T, V); None where no
        frame of the batch has CTC targets.

        Raises:
          KDError: the two have different vocabularies.
        """
        return self._logits(self.student.ctc_logits, "ctc", "CTC head")

    def simple_logits(self) -> Optional[Tuple[torch.Tensor, Distribution]]:
        """Return the acoustic halves of both simple joiners, each (N, T, V); None where
        no frame of the batch has such targets.

        Raises:
          KDError: the two have different vocabularies.
        """
        return self._logits(self.student.simple_logits, "simple", "simple joiner")

    def _logits(
        self, logits: torch.Tensor, kind: str, head: str
    ) -> Optional[Tuple[torch.Tensor, Distribution]]:
        """A head's logits of the frames that both have, and the targets of its kind."""
        teacher = self.targets.parts.get(kind)
        if teacher is None or not self.mask.any():
            return None
        if isinstance(teacher, torch.Tensor) and teacher.size(-1) != logits.size(-1):
            raise KDError(
                f"the student's {head} has {logits.size(-1)} tokens and the "
                f"teacher's targets have {teacher.size(-1)}: both need the same "
                "tokenizer"
            )
        frames = slice(self.mask.size(1))
        return logits[:, frames], index_rows(teacher, (slice(None), frames))

    @cached_property
    def nodes(self) -> Optional[Nodes]:
        """The nodes of the teacher's lattices; None where no row has a lattice.

        Raises:
          KDError: a lattice of another transcript than the student's.
        """
        nodes = self.targets.parts.get("nodes")
        if nodes is None:
            nodes = stored_nodes(self.targets.parts.get("lattice") or [])
        if nodes is not None:
            check_labels(self.student.labels, nodes)
        return nodes

    def student_nodes(self, nodes: Nodes) -> StudentNodes:
        """Return the student's transducer at nodes; terms with the same nodes share it.

        Args:
          nodes: :attr:`nodes`, or those of a shifted lattice.
        """
        if self._student_nodes is None or self._student_nodes.nodes is not nodes:
            student = self.student
            self._student_nodes = StudentNodes(
                self.model.joiner,
                student.encoder_out,
                student.decoder_out,
                nodes,
                student.encoder_out_lens,
            )
            if student.lattice_logits is not None:
                self._student_nodes.take_logits(student.ranges, student.lattice_logits)
            if self.node_logits and nodes is self.nodes:
                self._student_nodes.logits()
        return self._student_nodes

    def count_frames(self, rows: torch.Tensor) -> float:
        """Return the student's frames in some rows.

        Args:
          rows: Their indexes, or a mask of them, (N,).
        """
        return float(self.student.encoder_out_lens.to(rows.device)[rows].sum())

    def zero_of_transducer(self) -> torch.Tensor:
        """Return 0 with a gradient of 0 for all that a transducer's term reads."""
        student, joiner = self.student, self.model.joiner
        states = (student.encoder_out, student.decoder_out)
        return self.zero(*states, *joiner.parameters())

    @staticmethod
    def zero(*tensors: torch.Tensor) -> torch.Tensor:
        """Return 0 with a gradient of 0 for each tensor, whatever the tensors hold.

        A term without targets in a batch returns it, since DistributedDataParallel
        waits for a gradient of each parameter.

        Args:
          tensors: What the term would have been computed from, one tensor at least.
        """
        return sum(x.flatten()[:0].sum() for x in tensors)


def count_copies(student: EncoderOut, targets: Targets) -> int:
    """Return how often the student has the rows of the targets: twice under CR-CTC.

    Args:
      student: The student's outputs.
      targets: The teacher's targets.

    Raises:
      KDError: the targets belong to another batch.
    """
    rows, target_rows = len(student.encoder_out_lens), len(targets.lens)
    if rows not in (target_rows, 2 * target_rows):
        raise KDError(
            f"the student has {rows} rows and the teacher's targets {target_rows}: "
            "give targets of the student's batch"
        )
    return 2 if target_rows and rows == 2 * target_rows else 1


def check_frames(student: EncoderOut, targets: Targets) -> None:
    """Refuse a whole cut whose numbers of frames differ.

    Args:
      student: The student's outputs.
      targets: The teacher's targets of the same rows.

    Raises:
      KDError: a row that is whole has other frames in the targets.
    """
    lens = student.encoder_out_lens
    differs = targets.whole.cpu() & (targets.lens.cpu() != lens.cpu())
    if targets.mask.any() and differs.any():
        raise KDError(
            f"the student gives {lens.tolist()} frames for the cuts of a batch and "
            f"the teacher's targets have {targets.lens.tolist()}: the cuts were "
            "changed after the targets were made, or the frame rates differ; run "
            "`icefall-kd dump` on the cuts that are trained on"
        )


def check_labels(labels: torch.Tensor, nodes: Nodes) -> None:
    """Refuse a lattice of another transcript than the student's.

    Args:
      labels: (N, U + 1), the student's labels after a leading blank.
      nodes: R nodes of the teacher's lattices.

    Raises:
      KDError: a node's next label is not the student's label at its position.
    """
    labelled = (nodes.label >= 0).nonzero().squeeze(1)
    row, position = nodes.row[labelled], nodes.position[labelled] + 1
    inside = position < labels.size(1)
    label = labels[row, position.clamp(max=labels.size(1) - 1)]
    wrong = ~inside | (label != nodes.label[labelled].to(label.dtype))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise KDError(
            f"label {int(position[i])} of row {int(row[i])} of the batch is "
            f"{int(label[i])} for the student and {int(nodes.label[labelled[i]])} in "
            "the teacher's lattice: the transcripts or their tokenizer changed after "
            "the targets were made; run `icefall-kd dump` on the cuts that are trained "
            "on"
        )

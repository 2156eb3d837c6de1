"""Whether a batch of the student and the targets of a teacher are of one batch."""

import torch

from icefall_kd.errors import KDError
from icefall_kd.types import EncoderOut, Nodes, Targets


def count_copies(student: EncoderOut, targets: Targets) -> int:
    """How often the student has the rows of the targets: twice under CR-CTC."""
    rows, said = len(student.encoder_out_lens), len(targets.lens)
    if rows not in (said, 2 * said):
        raise KDError(
            f"the student has {rows} rows and the teacher's targets {said}: give "
            "targets of the batch that the student heard"
        )
    return 2 if said and rows == 2 * said else 1


def check_frames(student: EncoderOut, targets: Targets) -> None:
    """Refuse a whole cut whose numbers of frames differ."""
    lens = student.encoder_out_lens
    moved = targets.whole.cpu() & (targets.lens.cpu() != lens.cpu())
    if targets.mask.any() and moved.any():
        raise KDError(
            f"the student gives {lens.tolist()} frames for the cuts of a batch and "
            f"the teacher's targets have {targets.lens.tolist()}: the cuts were "
            "changed after the targets were made, or the frame rates differ; run "
            "`icefall-kd dump` on the cuts that are trained on"
        )


def check_labels(symbols: torch.Tensor, nodes: Nodes) -> None:
    """Refuse a lattice of other transcripts than the student's."""
    some = (nodes.label >= 0).nonzero().squeeze(1)
    row, position = nodes.row[some], nodes.position[some] + 1
    inside = position < symbols.size(1)
    mine = symbols[row, position.clamp(max=symbols.size(1) - 1)]
    wrong = ~inside | (mine != nodes.label[some].to(mine.dtype))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise KDError(
            f"label {int(position[i])} of row {int(row[i])} of the batch is "
            f"{int(mine[i])} for the student and {int(nodes.label[some[i]])} in the "
            "teacher's lattice: the transcripts or their BPE model changed after the "
            "targets were made; run `icefall-kd dump` on the cuts that are trained on"
        )

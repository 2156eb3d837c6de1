"""The recipe's dataset with the targets of each batch, as its student takes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Type

import torch
from lhotse import CutSet
from lhotse.cut import Cut

from icefall_kd.errors import KDError, require
from icefall_kd.kinds import KINDS, TargetKind
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.first_look import FirstLook
from icefall_kd.targets.places import look_beside
from icefall_kd.targets.reading import ONE_TEACHER, read_targets
from icefall_kd.targets.store import FIELD, REMEDY, is_left_out, tracks_with_targets
from icefall_kd.targets.warp import WarpRecord
from icefall_kd.types import Targets

MISSING = ("refuse", "hard")


def resample_frames(
    targets: Targets, frame_shift: float, student_frame_shift: float
) -> Targets:
    """Bring targets to the frame rate of a student.

    The student's frame j takes the teacher's frame at its middle, floor((j + 1/2)
    student_frame_shift / frame_shift); the mask goes with it.

    Args:
      targets: The teacher's.
      frame_shift: Seconds between two frames of the teacher.
      student_frame_shift: Seconds between two frames of the student.

    Returns:
      The targets, without the kinds that can't be resampled.
    """
    # In whole microseconds: 3 frames / (0.01 s / 0.03 s) are 8.999 in floating point.
    old, new = round(1e6 * frame_shift), round(1e6 * student_frame_shift)
    if old == new:
        return targets
    frames = torch.arange(targets.mask.size(1) * old // new)
    index = (slice(None), (2 * frames + 1) * new // (2 * old))
    return Targets(
        targets.lens * old // new,
        targets.mask[index],
        torch.zeros_like(targets.whole),  # front ends differ at the edges
        _of_each_kind(targets, lambda kind, x: kind.index_frames(x, index)),
    )


def map_tokens(targets: Targets, token_ids: torch.Tensor) -> Targets:
    """Express targets in the student's tokens.

    Args:
      targets: Over the teacher's V tokens.
      token_ids: (V,), the student's id of each. Where two of the teacher's become one,
        their probabilities add up. All the student's tokens must occur.

    Returns:
      The targets, without the kinds that can't be mapped.

    Raises:
      KDError: ids that leave out a token of the student's, or sparse targets where two
        tokens become one.
    """
    size, count = int(token_ids.max()) + 1, len(torch.unique(token_ids))
    require(
        count == size and int(token_ids.min()) >= 0,
        f"the tokens map to {count} of the student's {size}: all of them must occur",
    )
    parts = _of_each_kind(targets, lambda kind, x: kind.map_tokens(x, token_ids))
    return replace(targets, parts=parts)


def _of_each_kind(
    targets: Targets, function: Callable[[Type[TargetKind], Any], Any]
) -> Dict[str, Any]:
    """Apply a function to each kind's values; leave out what it returns None for."""
    parts = {name: function(KINDS[name], x) for name, x in targets.parts.items()}
    return {name: x for name, x in parts.items() if x is not None}


def store_fingerprint(
    cuts: Iterable[Cut], missing: str = "refuse"
) -> Tuple[Fingerprint, str]:
    """Return the fingerprint of the stores that hold the targets of ``cuts``.

    Args:
      cuts: The training cuts, or a
        :class:`~icefall_kd.targets.first_look.FirstLook` at them.
      missing: Whether to "refuse" cuts without targets, or to train "hard" on them.

    Returns:
      The fingerprint, and the first store's folder.

    Raises:
      KDError: if any cut has no targets (with ``missing="hard"``: if none has), or if
        the stores are of different teachers.
    """
    without_targets, left_out, total, first_cut, stores = 0, 0, 0, "", set()
    for cut in cuts if isinstance(cuts, FirstLook) else FirstLook(cuts):
        total += 1
        stores_of_cut = {pointer.store for _, _, pointer in tracks_with_targets(cut)}
        stores.update(stores_of_cut)
        if not stores_of_cut:
            without_targets += 1
            left_out += is_left_out(cut)
            first_cut = first_cut or cut.id
    if without_targets and (missing == "refuse" or without_targets == total):
        _refuse_cuts_without_targets(
            without_targets,
            total,
            first_cut,
            missing == "refuse" and without_targets == left_out,
        )
    require(stores, "there are no training cuts: check --manifest-dir")
    fingerprints = {path: Fingerprint.read(Path(path)) for path in sorted(stores)}
    first_store, first_fingerprint = next(iter(fingerprints.items()))
    for path, fingerprint in fingerprints.items():
        fingerprint.check_same(first_fingerprint, path, first_store, ONE_TEACHER)
    return first_fingerprint, first_store


def _refuse_cuts_without_targets(
    without_targets: int, total: int, cut_id: str, all_left_out: bool
) -> None:
    """Refuse training cuts of which some have no targets, ``cut_id`` the first."""
    words = (
        f"{without_targets} of {total} training cuts have no targets ({FIELD}), "
        f"{cut_id} "
    )
    if all_left_out:
        raise KDError(
            f"{words}the first, as `icefall-kd dump` left them out: let such cuts "
            "have the hard loss alone with --kd-missing hard, or leave them out of "
            "the training"
        )
    raise KDError(
        f"{words}the first: {REMEDY}, let such cuts have the hard loss alone with "
        "--kd-missing hard, or switch distillation off with all --kd weights at 0"
    )


def cuts_of_rows(batch: Dict[str, Any]) -> List[Cut]:
    """Return the cut of each row of a batch's features.

    Args:
      batch: Of lhotse's ``K2SpeechRecognitionDataset``, with its cuts.
    """
    supervisions = batch["supervisions"]
    # The dataset sorts cuts; only these two tell which row is whose.
    rows: List[Any] = [None] * len(batch["inputs"])
    for cut, row in zip(supervisions["cut"], supervisions["sequence_idx"]):
        rows[int(row)] = cut
    return rows


class TargetDataset(torch.utils.data.Dataset):
    """``K2SpeechRecognitionDataset`` plus ``batch["kd_targets"]``.

    Args:
      dataset: The recipe's dataset. It must return the cuts too; ``return_cuts`` is
        switched on.
      missing: What becomes of a cut without targets: "refuse" or "hard".
      kinds: The kinds of targets to be read; None for all that the store holds.
      frame_shift: Seconds between two frames of the student's encoder; by default the
        teacher's. See :func:`resample_frames`.
      token_ids: (V,), the student's id of each of the teacher's tokens, where they
        differ. See :func:`map_tokens`.
      time_warp: Records the dataset's time warps, which the targets follow.
      manifest_dir: The manifest's folder, in which a store is looked for that is not in
        the folder that its cuts name.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        missing: str = "refuse",
        kinds: Optional[Sequence[str]] = None,
        frame_shift: Optional[float] = None,
        token_ids: Optional[torch.Tensor] = None,
        time_warp: Optional[WarpRecord] = None,
        manifest_dir: str = "",
    ) -> None:
        require(
            hasattr(dataset, "return_cuts"),
            f"{type(dataset).__name__} has no return_cuts, and targets need the cuts "
            "of a batch: use lhotse's K2SpeechRecognitionDataset",
        )
        require(
            missing in MISSING, f"missing is {missing!r}, and must be one of {MISSING}"
        )
        dataset.return_cuts = True
        self.dataset = dataset
        self.missing = missing
        self.kinds = kinds
        self.frame_shift = frame_shift
        self.token_ids = token_ids
        self.time_warp = time_warp
        self.manifest_dir = manifest_dir
        look_beside(manifest_dir)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Restore the dataset in a worker that is a new process, and not forked."""
        self.__dict__.update(state)
        look_beside(self.manifest_dir)

    def __getitem__(self, cuts: CutSet) -> Dict[str, Any]:
        batch = self.dataset[cuts]
        rows = cuts_of_rows(batch)
        targets, fingerprint = read_targets(rows, self.missing, self.kinds)
        if fingerprint is not None:  # else no row has targets
            targets = self._fit_student(targets, fingerprint)
        batch["kd_targets"] = targets
        return batch

    def _fit_student(self, targets: Targets, fingerprint: Fingerprint) -> Targets:
        """The targets at the student's frame rate, tokens and warped time."""
        shift = self.frame_shift or fingerprint.frame_shift
        targets = resample_frames(targets, fingerprint.frame_shift, shift)
        if self.token_ids is not None:
            targets = map_tokens(targets, self.token_ids)
        if self.time_warp is not None:
            factor = round(shift / fingerprint.feature_shift)
            targets = self.time_warp.move(targets, factor)
        return targets

"""Reads targets in the workers of the data loader, and lines them up with the batch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Type

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.utils import compute_num_frames

from icefall_kd.errors import KDError, require
from icefall_kd.kinds import KINDS, TargetKind
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.first_look import FirstLook
from icefall_kd.targets.places import look_beside
from icefall_kd.targets.store import (
    FIELD,
    REMEDY,
    Pointer,
    check_unmoved,
    fingerprint_of,
    is_left_out,
    read_fingerprint,
    tracks_with_targets,
)
from icefall_kd.targets.warp import WarpRecord
from icefall_kd.types import Targets

MISSING = ("refuse", "hard")
ONE_TEACHER = (
    "store the targets of all cuts that are read together with one teacher and in one "
    "form, with `icefall-kd dump`"
)
ROUNDING = 1e-6  # seconds; above the rounding errors of sums of times


@dataclass
class _Piece:
    """The frames of one record that a row has."""

    begin: int  # the row's frame where they begin
    first: int  # frame of the record
    stop: int  # the frame after the last of them
    pointer: Pointer
    is_whole: bool  # whether the row's cut begins as the cut that was dumped, unchanged

    @property
    def end(self) -> int:
        """The row's frame after the last of them."""
        return self.begin + self.stop - self.first


def _frames(seconds: float, frame_shift: float) -> int:
    """Lhotse's rounding of its temporal arrays: half up."""
    if seconds < frame_shift / 4:
        return 0
    return compute_num_frames(seconds, frame_shift, sampling_rate=100_000)


def _piece(offset: float, cut: MonoCut, pointer: Pointer) -> _Piece:
    """The frames of a record that are left in ``cut``.

    Frames are counted from the start of the cut that was dumped, and rounded to the
    nearest, as Lhotse rounds its temporal arrays.

    Args:
      offset: Seconds from the start of the row's cut.
      cut: A part of the cut that was dumped, or that cut itself.
      pointer: That of ``cut``.
    """
    check_unmoved(cut, pointer)
    shift = fingerprint_of(pointer).frame_shift
    begin = _frames(offset, shift)
    change = max(abs(cut.start - pointer.start), abs(cut.duration - pointer.duration))
    if change < ROUNDING:
        return _Piece(begin, 0, pointer.frames, pointer, offset == 0)
    first = _frames(cut.start - pointer.start, shift)
    stop = first + max(1, _frames(cut.duration, shift))
    first = min(first, pointer.frames)
    return _Piece(begin, first, min(stop, pointer.frames), pointer, False)


def _pieces(cut: Cut, missing: str) -> List[_Piece]:
    """The frames that the tracks of ``cut`` carry targets for, in the order of time."""
    pieces = [_piece(*track) for track in tracks_with_targets(cut)]
    if not pieces and missing == "refuse":
        raise KDError(
            f"the cut {cut.id} has no targets ({FIELD}): {REMEDY}, or let such cuts "
            "have the hard loss alone with --kd-missing hard"
        )
    pieces.sort(key=lambda piece: piece.begin)
    for piece, following in zip(pieces, pieces[1:]):
        overlap = piece.end - following.begin
        if overlap > 1:
            raise KDError(
                f"the cut {cut.id} mixes two cuts whose targets overlap at frames "
                f"{following.begin} to {min(piece.end, following.end) - 1}: mix with "
                "cuts that carry none, such as noise"
            )
        if overlap == 1:  # both were rounded up
            piece.stop -= 1
    return pieces


def collate_targets(
    cuts: List[Cut], missing: str = "refuse", kinds: Optional[Sequence[str]] = None
) -> Targets:
    """Read and pad the targets of ``cuts``, one row a cut.

    A mixed cut has the targets of each of its tracks, at that track's place; where none
    of them has any, in noise and padding, ``mask`` is False.

    Args:
      cuts: MonoCuts or MixedCuts.
      missing: What becomes of a cut without targets: "refuse", or "hard", a row whose
        mask is False throughout.
      kinds: The kinds of targets to be read; None for all that the store holds.

    Raises:
      KDError: a cut without targets that is to be refused, whose time has moved, or
        that mixes speech with speech; a record that is damaged; stores of different
        teachers, or without one of ``kinds``.
    """
    return read_targets(cuts, missing, kinds)[0]


def read_targets(
    cuts: List[Cut], missing: str = "refuse", kinds: Optional[Sequence[str]] = None
) -> Tuple[Targets, Optional[Fingerprint]]:
    """Read targets as :func:`collate_targets`, and the fingerprint of their stores.

    Args:
      cuts: See :func:`collate_targets`.
      missing: See :func:`collate_targets`.
      kinds: See :func:`collate_targets`.

    Returns:
      The targets, and the fingerprint; None where no row has targets.
    """
    pieces_of_rows = [_pieces(cut, missing) for cut in cuts]
    # First: this refuses a damaged pointer, whose number of frames may be anything.
    records = [piece.pointer.read() for row in pieces_of_rows for piece in row]
    lens = [max((p.end for p in pieces), default=0) for pieces in pieces_of_rows]
    # The records of the batch, numbered row by row and in the order of time. Their
    # frames are numbered too, one record's after another's; `index` has the number
    # of the frame that each frame of each row takes, -1 for one without targets:
    #
    #   record 0 of 5 frames, record 1 of 3     0 1 2 3 4 | 5 6 7
    #   a row: record 0 without its first two
    #   frames, two frames of noise, record 1   2 3 4 -1 -1 5 6 7
    pieces: List[_Piece] = []
    index = np.full((len(cuts), max(lens, default=0)), -1)
    record_of_row: List[Optional[int]] = []  # None unless it is one whole record
    frames_before = 0
    for row, pieces_of_row in enumerate(pieces_of_rows):
        is_whole = len(pieces_of_row) == 1 and pieces_of_row[0].is_whole
        record_of_row.append(len(pieces) if is_whole else None)
        for piece in pieces_of_row:
            index[row, piece.begin : piece.end] = np.arange(
                frames_before + piece.first, frames_before + piece.stop
            )
            frames_before += piece.pointer.frames
            pieces.append(piece)
    index = torch.from_numpy(index)
    is_whole = torch.tensor([record is not None for record in record_of_row])
    targets = Targets(torch.tensor(lens), index >= 0, is_whole)
    if not pieces:
        return targets, None
    pointers = [piece.pointer for piece in pieces]
    fingerprint = _common_fingerprint(pointers)
    targets.parts = _read_parts(
        pointers, fingerprint, records, index.clamp(min=0), record_of_row, kinds
    )
    return targets, fingerprint


def _common_fingerprint(pointers: List[Pointer]) -> Fingerprint:
    """The fingerprint that the stores of all pointers must share."""
    store = pointers[0].store
    fingerprint = read_fingerprint(store)
    for other_store in {p.store for p in pointers} - {store}:
        other = read_fingerprint(other_store)
        fingerprint.check_same(other, store, other_store, ONE_TEACHER)
    return fingerprint


def _read_parts(
    pointers: List[Pointer],
    fingerprint: Fingerprint,
    records: List[Dict[str, bytes]],
    index: torch.Tensor,
    record_of_row: List[Optional[int]],
    names: Optional[Sequence[str]],
) -> Dict[str, Any]:
    """The values of each kind, for ``Targets.parts``."""
    frames = [p.frames for p in pointers]
    parts = {}
    for name in fingerprint.kinds if names is None else names:
        require(
            name in KINDS,
            f"stores hold no kind of target {name!r}: give some of {', '.join(KINDS)}",
        )
        kind = fingerprint.kinds.get(name)
        require(
            kind is not None,
            f"the store {pointers[0].store} keeps no {KINDS[name].title}: dump with "
            f"{KINDS[name].example}",
        )
        try:
            parts[name] = kind.collate(records, frames, index, record_of_row)
        except (ValueError, KeyError, RuntimeError) as e:
            raise KDError(
                f"the targets of cuts {pointers[0].cut} to {pointers[-1].cut} can't be "
                f"read ({type(e).__name__}: {e}): make them again with `icefall-kd "
                "dump --overwrite`"
            ) from None
    return parts


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

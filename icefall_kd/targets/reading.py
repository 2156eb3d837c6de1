"""Reads the targets of a batch's rows, and lines them up with the rows' frames."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from lhotse.cut import Cut, MonoCut
from lhotse.utils import compute_num_frames

from icefall_kd.errors import KDError, require
from icefall_kd.kinds import KINDS
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.store import (
    FIELD,
    REMEDY,
    Pointer,
    check_unmoved,
    fingerprint_of,
    read_fingerprint,
    tracks_with_targets,
)
from icefall_kd.types import Targets

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

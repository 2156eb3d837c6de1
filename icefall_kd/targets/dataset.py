"""Reads targets in the dataset's workers, and lines them up with the batch."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut, MonoCut
from lhotse.utils import compute_num_frames

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import Layer
from icefall_kd.targets.fingerprint import Fingerprint
from icefall_kd.targets.look import FirstLook
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
from icefall_kd.types import (
    Distribution,
    LatticeTargets,
    SparseDistribution,
    Targets,
    index_rows,
)

MISSING = ("refuse", "hard")
ROUNDING = 1e-6  # seconds; what sums and differences of times leave is below


@dataclass
class _Piece:
    """Frames first to last of a record, and the frame of the cut where they begin."""

    at: int
    first: int
    last: int
    pointer: Pointer
    whole: bool  # the cut as the teacher heard it, at the start of the row's cut

    @property
    def end(self) -> int:
        return self.at + self.last - self.first


def _frames(seconds: float, frame_shift: float) -> int:
    """Lhotse's rounding of its temporal arrays: half up."""
    if seconds < frame_shift / 4:
        return 0
    return compute_num_frames(seconds, frame_shift, sampling_rate=100_000)


def _piece(offset: float, cut: MonoCut, pointer: Pointer) -> _Piece:
    """What ``cut`` has kept of its record.

    Frames are counted from the start of the cut that the teacher heard, and rounded
    to the nearest, as Lhotse rounds its temporal arrays.
    """
    check_unmoved(cut, pointer)
    shift = fingerprint_of(pointer).frame_shift
    at = _frames(offset, shift)
    moved = max(abs(cut.start - pointer.start), abs(cut.duration - pointer.duration))
    if moved < ROUNDING:
        return _Piece(at, 0, pointer.frames, pointer, offset == 0)
    first = _frames(cut.start - pointer.start, shift)
    last = first + max(1, _frames(cut.duration, shift))
    first = min(first, pointer.frames)
    return _Piece(at, first, min(last, pointer.frames), pointer, False)


def _pieces(cut: Cut, missing: str) -> List[_Piece]:
    """What the tracks of ``cut`` carry, in time's order."""
    pieces = [_piece(*track) for track in tracks_with_targets(cut)]
    if not pieces and missing == "refuse":
        raise KDError(
            f"the cut {cut.id} has no targets ({FIELD}): {REMEDY}, or let such cuts "
            "have the hard loss alone with --kd-missing hard"
        )
    pieces.sort(key=lambda p: p.at)
    for a, b in zip(pieces, pieces[1:]):
        if a.end > b.at + 1:
            raise KDError(
                f"the cut {cut.id} mixes two cuts with targets, and both speak at "
                f"frames {b.at} to {min(a.end, b.end) - 1}: mix with cuts that carry "
                "none, such as noise"
            )
        a.last = min(a.last, a.first + b.at - a.at)
    return pieces


@contextmanager
def _told(pieces: List[_Piece]) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as e:
        raise KDError(
            f"the targets of cuts {pieces[0].pointer.cut} to {pieces[-1].pointer.cut} "
            f"can't be read ({type(e).__name__}: {e}): make them again with "
            "`icefall-kd dump --overwrite`"
        ) from None


def _decode(
    pieces: List[_Piece], records: List[Dict[str, bytes]]
) -> Optional[Distribution]:
    """All frames of all records, one record's behind the other's."""
    found = read_fingerprint(pieces[0].pointer.store)
    codec, _ = found.codecs()
    if codec is None:
        return None
    frames = [p.pointer.frames for p in pieces]
    with _told(pieces):
        return codec.decode([r["ctc"] for r in records], frames, found.vocab_size)


def _decode_hidden(
    pieces: List[_Piece], records: List[Dict[str, bytes]]
) -> Dict[Layer, torch.Tensor]:
    found = read_fingerprint(pieces[0].pointer.store)
    if not found.hidden:
        raise KDError(
            f"the store {pieces[0].pointer.store} keeps no hidden layers: dump with "
            "--keep-hidden out:half"
        )
    layers = {}
    for codec in found.hidden_codecs():
        with _told(pieces):
            layers[codec.layer] = torch.cat(
                [
                    codec.decode(r[codec.part], p.pointer.frames)
                    for p, r in zip(pieces, records)
                ]
            )
    return layers


def _lattice(piece: _Piece, record: Dict[str, bytes]) -> Optional[LatticeTargets]:
    """The lattice of a cut; None where no path gets through it."""
    found = read_fingerprint(piece.pointer.store)
    _, codec = found.codecs()
    if codec is None:
        raise KDError(
            f"the store {piece.pointer.store} keeps no lattices: dump with "
            "--keep-lattice collapsed"
        )
    if "lattice" not in record:
        return None
    with _told([piece]):
        return codec.decode(record["lattice"], found.vocab_size)


def kept_frames(cut: MonoCut, pointer: Pointer) -> int:
    """How many frames of its record ``cut`` has kept."""
    piece = _piece(0.0, cut, pointer)
    return piece.last - piece.first


def read_ctc(cut: MonoCut, pointer: Pointer) -> Optional[Distribution]:
    """The CTC targets of the frames that ``cut`` has kept; None where there are none.

    Raises:
      KDError: a cut whose time has moved, or a record that is damaged.
    """
    piece = _piece(0.0, cut, pointer)
    rows = _decode([piece], [pointer.read()])
    return None if rows is None else index_rows(rows, slice(piece.first, piece.last))


def collate_targets(
    cuts: List[Cut],
    missing: str = "refuse",
    lattice: bool = False,
    hidden: bool = False,
) -> Targets:
    """Read and pad the targets of ``cuts``, one row a cut.

    A mixed cut has the targets of each of its tracks, at that track's place; where none
    of them speaks, in noise and padding, ``mask`` is False.

    Args:
      cuts: MonoCuts or MixedCuts.
      missing: What becomes of a cut without targets: "refuse", or "hard", a row whose
        mask is False throughout.
      lattice: Read lattices too; of whole cuts only.
      hidden: Read hidden layers too.
    """
    batch = [_pieces(cut, missing) for cut in cuts]
    lens = [max((p.end for p in pieces), default=0) for pieces in batch]
    pieces = [p for row in batch for p in row]
    records = [p.pointer.read() for p in pieces]  # first: it refuses a wrong pointer
    index = np.full((len(cuts), max(lens, default=0)), -1)
    begin = 0
    for i, row in enumerate(batch):
        for p in row:
            index[i, p.at : p.end] = np.arange(begin + p.first, begin + p.last)
            begin += p.pointer.frames
    whole = [len(row) == 1 and row[0].whole for row in batch]
    index = torch.from_numpy(index)
    parts: Dict[str, Any] = {}
    for store in {p.pointer.store for p in pieces}:
        first = pieces[0].pointer.store
        read_fingerprint(first).check_same(read_fingerprint(store), first)
    if pieces:
        flat, at = _decode(pieces, records), index.clamp(min=0)
        if flat is not None:
            parts["ctc"] = index_rows(flat, at)
        if hidden:
            parts["hidden"] = index_rows(_decode_hidden(pieces, records), at)
    if lattice:
        read = iter(records)
        parts["lattice"] = lattices = []
        for row, complete in zip(batch, whole):
            of_row = [(p, next(read)) for p in row]
            lattices.append(_lattice(*of_row[0]) if complete else None)
    lens, whole = torch.tensor(lens), torch.tensor(whole)
    return Targets(lens, index >= 0, whole, parts)


def resample_frames(
    targets: Targets, frame_shift: float, wanted_shift: float
) -> Targets:
    """Targets of one frame rate for a student of another.

    The student's frame j takes the teacher's frame that is spoken at its middle,
    floor((j + 1/2) wanted_shift / frame_shift); the mask goes with it.
    """
    # In whole microseconds: 3 frames / (0.01 s / 0.03 s) are 8.999 in floating point.
    mine, wanted = round(1e6 * frame_shift), round(1e6 * wanted_shift)
    if mine == wanted:
        return targets
    frames = torch.arange(targets.mask.size(1) * mine // wanted)
    at = (slice(None), (2 * frames + 1) * wanted // (2 * mine))
    lens = targets.lens * mine // wanted
    whole = torch.zeros_like(targets.whole)  # front ends differ at the edges
    parts = {k: x for k, x in targets.parts.items() if k in ("ctc", "hidden")}
    return Targets(lens, targets.mask[at], whole, index_rows(parts, at))


def map_symbols(targets: Targets, symbols: torch.Tensor) -> Targets:
    """Targets over the student's symbols.

    Args:
      targets: Over the teacher's V symbols.
      symbols: (V,), the student's index of each. Where two of the teacher's become
        one, their probabilities add up. All the student's symbols must occur.
    """
    size = int(symbols.max()) + 1
    if len(torch.unique(symbols)) != size or int(symbols.min()) < 0:
        raise KDError(
            f"the symbols map to {len(torch.unique(symbols))} of the student's {size}: "
            "all of them must occur"
        )
    ctc = targets.parts.get("ctc")
    if ctc is None:
        pass
    elif isinstance(ctc, SparseDistribution):
        ctc = SparseDistribution(symbols[ctc.indices], ctc.log_probs, ctc.log_tail)
        if len(symbols) != size:
            raise KDError(
                f"{len(symbols)} symbols of the teacher become {size} of the student, "
                "and sparse targets can only be reordered: dump with --keep dense"
            )
    elif len(symbols) == size:
        out = torch.empty_like(ctc)
        out[..., symbols] = ctc
        ctc = out
    else:
        out = ctc.new_zeros((*ctc.shape[:-1], size))
        index = symbols.expand(ctc.shape)
        ctc = out.scatter_add_(-1, index, ctc.softmax(-1)).log()
    parts = {k: x for k, x in targets.parts.items() if k != "lattice"}
    return replace(targets, parts={**parts, **({} if ctc is None else {"ctc": ctc})})


def store_fingerprint(
    cuts: Iterable[Cut], missing: str = "refuse"
) -> Tuple[Fingerprint, str]:
    """The fingerprint of the stores that carry the targets of ``cuts``, and the first
    store's folder.

    Args:
      cuts: The training cuts, or a :class:`~icefall_kd.targets.look.FirstLook` at them.
      missing: Whether to "refuse" cuts without targets, or to train "hard" on them.

    Raises:
      KDError: if any cut has no targets (with ``missing="hard"``: if none has), or if
        the stores are of different teachers.
    """
    bare, left_out, total, first, stores = 0, 0, 0, "", Counter()
    for cut in cuts if isinstance(cuts, FirstLook) else FirstLook(cuts):
        total += 1
        found = {pointer.store for _, _, pointer in tracks_with_targets(cut)}
        stores.update(found)
        if not found:
            bare += 1
            left_out += is_left_out(cut)
            first = first or cut.id
    if bare and (missing == "refuse" or bare == total):
        words = f"{bare} of {total} training cuts have no targets ({FIELD}), {first} "
        if missing == "refuse" and bare == left_out:
            raise KDError(
                f"{words}the first, as `icefall-kd dump` left them out: let such cuts "
                "have the hard loss alone with --kd-missing hard, or leave them out of "
                "the training"
            )
        raise KDError(
            f"{words}the first: {REMEDY}, let such cuts have the hard loss alone with "
            "--kd-missing hard, or switch distillation off with --kd-ctc-weight 0"
        )
    if not stores:
        raise KDError("there are no training cuts: check --manifest-dir")
    prints = {path: Fingerprint.read(Path(path)) for path in sorted(stores)}
    path, found = next(iter(prints.items()))
    for other, value in prints.items():
        value.check_same(found, other)
    return found, path


def cuts_of_rows(batch: Dict[str, Any]) -> List[Cut]:
    """The cut of each row of a batch's features."""
    supervisions = batch["supervisions"]
    # The dataset sorts cuts; only these two say which row is whose.
    rows: List[Any] = [None] * len(batch["inputs"])
    for cut, row in zip(supervisions["cut"], supervisions["sequence_idx"]):
        rows[int(row)] = cut
    return rows


class KDDataset(torch.utils.data.Dataset):
    """``K2SpeechRecognitionDataset`` plus ``batch["kd_targets"]``.

    Args:
      dataset: The recipe's dataset. It must give the cuts back; ``return_cuts`` is
        switched on.
      missing: What becomes of a cut without targets: "refuse" or "hard".
      frame_shift: Seconds between two frames of the student's encoder; by default the
        teacher's. See :func:`resample_frames`.
      symbols: The student's index of each of the teacher's symbols, where they differ.
        See :func:`map_symbols`. Lattices are not mapped, and go without.
      lattice: Read lattices too, the part "lattice".
      hidden: Read hidden layers too, the part "hidden".
      time_warp: What the dataset's time warps do, which targets are to follow.
      manifest_dir: The manifest's folder, in which a store is looked for that is no
        longer where its cuts say.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        missing: str = "refuse",
        frame_shift: Optional[float] = None,
        symbols: Optional[torch.Tensor] = None,
        lattice: bool = False,
        hidden: bool = False,
        time_warp: Optional[WarpRecord] = None,
        manifest_dir: str = "",
    ) -> None:
        if not hasattr(dataset, "return_cuts"):
            raise KDError(
                f"{type(dataset).__name__} has no return_cuts, and targets need the "
                "cuts of a batch: use lhotse's K2SpeechRecognitionDataset"
            )
        if missing not in MISSING:
            raise KDError(f"missing is {missing!r}, and must be one of {MISSING}")
        dataset.return_cuts = True
        self.dataset = dataset
        self.missing = missing
        self.frame_shift = frame_shift
        self.symbols = symbols
        self.lattice = lattice
        self.hidden = hidden
        self.time_warp = time_warp
        self.manifest_dir = manifest_dir
        look_beside(manifest_dir)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """In a worker that is a new process, and not forked."""
        self.__dict__.update(state)
        look_beside(self.manifest_dir)

    def __getitem__(self, cuts: CutSet) -> Dict[str, Any]:
        batch = self.dataset[cuts]
        rows = cuts_of_rows(batch)
        targets = collate_targets(rows, self.missing, self.lattice, self.hidden)
        teacher = _first_fingerprint(rows)
        if teacher is None:  # no row has targets
            batch["kd_targets"] = targets
            return batch
        shift = self.frame_shift or teacher.frame_shift
        targets = resample_frames(targets, teacher.frame_shift, shift)
        if self.symbols is not None:
            targets = map_symbols(targets, self.symbols)
        if self.time_warp is not None:
            factor = round(shift / teacher.feature_shift)
            targets = self.time_warp.move(targets, factor)
        batch["kd_targets"] = targets
        return batch


def _first_fingerprint(cuts: List[Cut]) -> Optional[Fingerprint]:
    """That of the first targets that a batch's cuts carry; all of them share it."""
    for cut in cuts:
        for _, _, pointer in tracks_with_targets(cut):
            return read_fingerprint(pointer.store)
    return None

"""Pointers: how a cut finds its record in a store.

A store is a folder: ``fingerprint.json``, and one append-only file of records for each
job that wrote to it. A cut points at its record by a plain dictionary in its custom
fields, so a manifest loads, truncates, mixes and saves with Lhotse alone. In a Shar the
dictionary holds the record too, and the Shar the store's small files. A store that was
moved is looked for by :mod:`icefall_kd.targets.places`.
"""

import os
import zlib
from base64 import b64decode
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Dict, Optional, Tuple, Union

from lhotse.cut import Cut, MonoCut

from icefall_kd.errors import KDError
from icefall_kd.targets.fingerprint import MOVED, Fingerprint
from icefall_kd.targets.json_records import typed
from icefall_kd.targets.places import place_of

FIELD = "kd_targets"
# Seconds. Resampling moves a recording's end by less; no change of speed does.
SLACK = 1e-3
REMEDY = "run `icefall-kd dump` on the cuts that are trained on"


def source_duration(cut: MonoCut) -> float:
    """Return the seconds of the recording of ``cut``, after speed and tempo.

    Args:
      cut: Any; 0 without a recording. Lhotse changes speed and tempo only where there
        is one.
    """
    return round(cut.recording.duration, 6) if cut.has_recording else 0.0


@dataclass
class Pointer:
    """The place of a cut's record, and what the cut was when it was dumped."""

    store: str  # folder
    file: str  # in the folder
    offset: int  # bytes
    sizes: Dict[str, int]  # bytes of each part, in their order in the record
    crc32: int  # of all other fields but `store`, and of the record
    cut: str  # id
    frames: int  # T
    start: float  # seconds in the recording
    duration: float  # seconds
    source: float  # seconds of the recording; 0 for none
    fingerprint: str = ""  # digest of the store's fingerprint
    record: Optional[str] = None  # in a Shar: the record itself, in base 64

    @staticmethod
    def for_record(cut: MonoCut, record: bytes, **values: Any) -> "Pointer":
        """Return the pointer that finds a record, with its checksum.

        Args:
          cut: The cut that is dumped.
          record: The record's bytes.
          values: The fields ``store``, ``file``, ``offset``, ``sizes``, ``frames`` and
            ``fingerprint``.
        """
        pointer = Pointer(
            cut=cut.id,
            start=cut.start,
            duration=cut.duration,
            source=source_duration(cut),
            crc32=0,
            **values,
        )
        pointer.crc32 = pointer.checksum(record)
        return pointer

    @property
    def size(self) -> int:
        """Bytes of the record."""
        return sum(self.sizes.values())

    @staticmethod
    def of_cut(cut: MonoCut) -> Optional["Pointer"]:
        """Return the pointer that ``cut`` carries, or None.

        Args:
          cut: The cut; the store is looked for, see
            :func:`icefall_kd.targets.places.place_of`.

        Raises:
          KDError: a field that is damaged.
        """
        value = (cut.custom or {}).get(FIELD)
        if value is None:
            return None
        pointer = parse_pointer(value, cut.id)
        shard = cut.custom.get("shard_origin") if pointer.record else None
        pointer.store = place_of(pointer.store, pointer.fingerprint, str(shard or ""))
        return pointer

    def to_dict(self) -> Dict[str, Any]:
        """Return the dictionary that a manifest has."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def checksum(self, record: bytes) -> int:
        """Return the CRC of a record and of the pointer's fields but ``store``.

        Args:
          record: The record's bytes.
        """
        values = (self.file, self.offset, *self.sizes.items(), self.cut)
        values += (self.frames, self.start, self.duration, self.source)
        values += (self.fingerprint,)
        return zlib.crc32(record, zlib.crc32(repr(values).encode()))

    def _record(self, path: str) -> bytes:
        try:
            if self.record is not None:
                return b64decode(self.record)
            return _bytes_at(path, self.size, self.offset)
        except (ValueError, OverflowError, MemoryError):
            return b""  # which has another checksum
        except OSError as e:
            raise KDError(
                f"the targets of cut {self.cut} can't be read from {path} "
                f"({e.strerror}): {MOVED}, or {REMEDY}"
            ) from None

    def read(self) -> Dict[str, bytes]:
        """Read the record; returns the bytes of each part.

        Raises:
          KDError: if the record is not there whole, or a byte of it has changed.
        """
        path = f"{self.store}/{self.file}"
        record = self._record(path)
        checksum = self.checksum(record)
        if checksum != self.crc32:
            raise KDError(
                f"the targets of cut {self.cut} in {path} are damaged: checksum "
                f"{checksum:08x}, and {self.crc32:08x} was written: make them again "
                "with `icefall-kd dump --overwrite`"
            )
        parts, begin = {}, 0
        for name, size in self.sizes.items():
            parts[name] = record[begin : begin + size]
            begin += size
        return parts


def parse_pointer(value: Any, cut_id: str) -> Pointer:
    """Return the pointer of a manifest's value of ``kd_targets``.

    Args:
      value: The value, whatever its type.
      cut_id: The cut that carries it, for messages.

    Raises:
      KDError: fields that are missing, unknown or of another type.
    """
    try:
        return typed(Pointer, value)
    except TypeError:
        raise KDError(
            f"the field {FIELD} of cut {cut_id} is damaged or of another version: "
            "make the targets again with `icefall-kd dump --overwrite`"
        ) from None


def leave_out(cut: Dict[str, Any]) -> None:
    """Mark a cut's dictionary: `icefall-kd dump` left it without targets.

    A mixed cut has no custom fields of its own: its first track carries the mark.

    Args:
      cut: The dictionary, as a manifest has it.
    """
    owner = cut["tracks"][0]["cut"] if cut.get("tracks") else cut
    owner["custom"] = {**(owner.get("custom") or {}), FIELD: None}


def is_left_out(cut: Union[Cut, Dict[str, Any]]) -> bool:
    """Return whether a cut has the mark of :func:`leave_out`.

    Args:
      cut: The cut, or its dictionary.
    """
    if isinstance(cut, dict):
        owner = cut["tracks"][0]["cut"] if cut.get("tracks") else cut
        custom = owner.get("custom") or {}
    else:
        tracks = getattr(cut, "tracks", None)
        custom = (tracks[0].cut if tracks else cut).custom or {}
    return FIELD in custom and custom[FIELD] is None


def _bytes_at(path: str, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(_open_file(path, os.getpid()).descriptor, size, offset)
    with open(path, "rb") as f:  # on Windows
        f.seek(offset)
        return f.read(size)


# A dataset's worker reads a record of a file again and again: the 256 files that it
# read last stay open. The process is part of the key, since a forked worker must not
# share the descriptors of its parent.
@lru_cache(maxsize=256)
def _open_file(path: str, pid: int) -> "_OpenFile":
    return _OpenFile(path)


class _OpenFile:
    """A file descriptor that is closed when the cache drops it."""

    descriptor = -1

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def fingerprint_of(pointer: Pointer) -> Fingerprint:
    """Read the fingerprint of a record's store.

    Args:
      pointer: The record's.

    Raises:
      KDError: the record was made under another fingerprint.
    """
    fingerprint = read_fingerprint(pointer.store)
    if pointer.fingerprint != fingerprint.digest:
        raise KDError(
            f"the targets of cut {pointer.cut} were made under the fingerprint "
            f"{pointer.fingerprint or 'of no name'} and {pointer.store} has "
            f"{fingerprint.digest} now: another teacher or another form was dumped "
            f"there; {REMEDY} again"
        )
    return fingerprint


@lru_cache(maxsize=64)
def read_fingerprint(store: str) -> Fingerprint:
    """Read the fingerprint of a store, once in a process.

    Args:
      store: The store's folder.
    """
    return Fingerprint.read(store)


def check_unmoved(cut: MonoCut, pointer: Pointer) -> None:
    """Refuse a cut whose time runs otherwise than when it was dumped.

    Args:
      cut: A part of the cut that was dumped, or that cut itself.
      pointer: The pointer that it carries.

    Raises:
      KDError: another speed or tempo, or a cut that reaches beyond its targets.
    """
    source = source_duration(cut)
    if source and pointer.source and abs(source - pointer.source) > SLACK:
        raise KDError(
            f"the recording of cut {cut.id} lasts {source} s and lasted "
            f"{pointer.source} s when its targets were made, so its speed or tempo was "
            f"changed since: {REMEDY}, with the change applied"
        )
    early = pointer.start - cut.start
    late = cut.duration - early - pointer.duration
    if max(early, late) > SLACK:
        raise KDError(
            f"the cut {cut.id} spans {cut.start} to {cut.end} s of its recording and "
            f"its targets {pointer.start} to "
            f"{round(pointer.start + pointer.duration, 6)} s: {REMEDY}"
        )


def tracks_with_targets(cut: Cut) -> Tuple[Tuple[float, MonoCut, Pointer], ...]:
    """Find the MonoCuts in a cut that carry targets.

    Args:
      cut: Any cut.

    Returns:
      For each its offset in seconds from the start of ``cut``, itself, and its pointer.
    """
    tracks = []
    for track in getattr(cut, "tracks", None) or [None]:
        inner = cut if track is None else track.cut
        if isinstance(inner, MonoCut):
            pointer = Pointer.of_cut(inner)
            if pointer is not None:
                tracks.append((0.0 if track is None else track.offset, inner, pointer))
    return tuple(tracks)

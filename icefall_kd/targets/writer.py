"""Stores what a teacher said on Lhotse cuts."""

import errno
import json
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Set, Union

import numpy as np
import torch
from lhotse.cut import MonoCut

from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.hidden import HiddenCodec, Layer
from icefall_kd.targets.fingerprint import FILENAME, Fingerprint
from icefall_kd.targets.manifest import (
    job_manifest,
    lines_of,
    open_manifest,
    partial_of,
)
from icefall_kd.targets.store import FIELD, Pointer, read_fingerprint, source_duration
from icefall_kd.types import NoPath, PrunedLattice

try:
    import fcntl
except ImportError:  # Windows, where targets are read alone
    fcntl = None

SHAR_NOTES = ("shard_origin", "shar_epoch", "dataloading_info")


@dataclass(frozen=True)
class Record:
    """A cut's targets as bytes."""

    frames: int  # of the teacher's encoder
    parts: Dict[str, bytes]


class LogitWriter:
    """Writes targets beside cuts, and the manifest that carries them.

    Each cut gets a field ``kd_targets``, a dictionary that says where its record lies
    (:class:`icefall_kd.targets.store.Pointer`). What a record holds, and how, stands in
    the fingerprint: ``ctc``, ``lattice`` and ``hidden`` name a representation each
    (:mod:`icefall_kd.codec`, :mod:`icefall_kd.hidden`).

    The record is written first, its manifest line second. A run that was cut short
    leaves ``<manifest>.partial``, which the next one continues; the manifest itself
    appears whole, on :meth:`finish`. It is an ordinary Lhotse manifest.

    Args:
      manifest: The manifest to write, ``.jsonl.gz`` or ``.jsonl``.
      storage_dir: Folder for records and fingerprint.
      fingerprint: Of the teacher, the cuts, and what is kept.
      overwrite: Forget what is there already.
      job: Which of ``num_jobs`` writers this is, from 0 on. Each writes files of its
        own; :func:`combine` joins their manifests.
      num_jobs: How many writers share the folder.

    Raises:
      KDError: if the folder holds targets of another teacher, or the manifest is
        there and its cuts have no targets in that folder; on a system without POSIX
        file locks.
    """

    def __init__(
        self,
        manifest: Union[str, Path],
        storage_dir: Union[str, Path],
        fingerprint: Fingerprint,
        overwrite: bool = False,
        job: int = 0,
        num_jobs: int = 1,
    ) -> None:
        if not 0 <= job < num_jobs:
            raise KDError(
                f"the job is {job} of {num_jobs}, and must be 0 to {num_jobs - 1}"
            )
        if fcntl is None:
            raise KDError(
                f"targets can't be written on {sys.platform}, where Python has no file "
                "locks (the module fcntl): dump them on Linux or macOS, and copy the "
                "manifest and its store here to train on them"
            )
        self.manifest = job_manifest(manifest, job, num_jobs)
        self.partial = partial_of(self.manifest)
        self.whole, self.num_jobs = Path(manifest), num_jobs
        self.storage_dir = Path(storage_dir)
        self.fingerprint = fingerprint
        self.ctc, self.lattice = fingerprint.codecs()
        self.hidden = fingerprint.hidden_codecs()
        self._quantizers: Dict[Layer, Any] = {}
        if not (self.ctc or self.lattice or self.hidden):
            raise KDError(
                f"the store {storage_dir} would keep nothing: name a form for CTC "
                "targets, lattices or hidden layers"
            )
        self.bytes_written = 0
        if not overwrite and (self.storage_dir / FILENAME).exists():
            Fingerprint.read(self.storage_dir).check_same(fingerprint, storage_dir)
        name = "targets.bin" if num_jobs == 1 else f"targets.{job}-of-{num_jobs}.bin"
        self._path = self.storage_dir / name
        self._done: Set[str] = set()
        if not overwrite:
            self._refuse_strangers()
        with self._told():
            self.manifest.parent.mkdir(parents=True, exist_ok=True)
            self.storage_dir.mkdir(parents=True, exist_ok=True)
            self._records = open(self._path, "ab")
            self._lock()
            if overwrite:  # first, lest another teacher's cuts be taken for these
                self.manifest.unlink(missing_ok=True)
                self.partial.unlink(missing_ok=True)
                read_fingerprint.cache_clear()
            fingerprint.write(self.storage_dir)
            end = self._start_partial()
            self._records.truncate(end)
            self._records.seek(end)
            self._lines = open(self.partial, "ab")

    def _refuse_strangers(self) -> None:
        """Refuse records that no manifest or fingerprint here knows of."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size and not (self.storage_dir / FILENAME).exists():
            raise KDError(
                f"{self._path} has {size} bytes of records and no {FILENAME} beside "
                "it, so that their teacher is not known: name another folder, or give "
                "--overwrite"
            )
        if size and not (self.manifest.exists() or self.partial.exists()):
            raise KDError(
                f"{self._path} has {size} bytes of another manifest's targets, and "
                f"{self.manifest} is not there: name another folder for the targets of "
                "this manifest, or give --overwrite to lose those"
            )

    def _lock(self) -> None:
        """Keep out a second run of the same job, where the file system can."""
        try:
            # Not flock(): a killed run's data loading workers would hold it on.
            fcntl.lockf(self._records, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks
            self._records.close()
            raise KDError(
                f"{self._path} is being written by another process: wait for it, or "
                "give each of several jobs its own --job"
            ) from None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say what a failed disk leaves."""
        try:
            yield
        except OSError as e:
            raise KDError(
                f"{self.storage_dir} or {self.manifest.parent} can't be written to "
                f"({e.strerror or e}) after {len(self._done)} cuts, which are kept: "
                "free space or mend the path, and give the same command again"
            ) from None

    def _start_partial(self) -> int:
        """Begin the partial manifest with the whole lines of earlier runs.

        Returns the end of the last record that they point at.
        """
        size = self._path.stat().st_size if self._path.exists() else 0
        end = 0
        with replacing(self.partial) as temporary, open(temporary, "wb") as out:
            for path in (self.manifest, self.partial):
                if path.exists():
                    end = max(end, self._take_over(path, out, size))
        return end

    def _take_over(self, path: Path, out: BinaryIO, size: int) -> int:
        end = 0
        with open_manifest(path, "rb") as f:
            for line in lines_of(f, path):
                try:
                    cut = json.loads(line)
                except ValueError:
                    continue  # where an earlier run was cut short
                stored = (cut.get("custom") or {}).get(FIELD) or {}
                folder = stored.get("store")
                if folder is None or not _is_same(folder, self.storage_dir):
                    raise KDError(
                        f"{path} is there, and its cut {cut.get('id')} has targets in "
                        f"{folder} and not in {self.storage_dir}: name another "
                        "manifest, give --overwrite, or if the store was moved there "
                        f"run `icefall-kd repoint {path} --storage-dir "
                        f"{self.storage_dir}`"
                    )
                pointer = Pointer(**stored)
                if pointer.fingerprint != self.fingerprint.digest:
                    raise KDError(
                        f"{path} has targets of another teacher or form (fingerprint "
                        f"{pointer.fingerprint}, and this one is "
                        f"{self.fingerprint.digest}), cut {cut['id']} the first: name "
                        "another manifest, or give --overwrite"
                    )
                if cut["id"] in self._done:
                    continue
                if pointer.file == self._path.name:
                    if pointer.offset + pointer.size > size:
                        continue  # a record that a crash of the machine lost
                    end = max(end, pointer.offset + pointer.size)
                self._done.add(cut["id"])
                out.write(line.rstrip(b"\n") + b"\n")
        return end

    def __enter__(self) -> "LogitWriter":
        return self

    def __exit__(self, kind, *exc) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def __contains__(self, cut_id: str) -> bool:
        return cut_id in self._done

    def partials(self) -> List[Path]:
        """The manifests that this and the other jobs are writing."""
        jobs = (
            job_manifest(self.whole, j, self.num_jobs) for j in range(self.num_jobs)
        )
        return [partial_of(path) for path in jobs]

    def __len__(self) -> int:
        return len(self._done)

    def write(
        self,
        cut: MonoCut,
        logits: Union[torch.Tensor, np.ndarray, None] = None,
        lattice: Union[PrunedLattice, NoPath, None] = None,
        hidden: Optional[Dict[Layer, torch.Tensor]] = None,
    ) -> Pointer:
        """Store one cut's targets.

        Args:
          cut: A MonoCut, as it will be trained on.
          logits: (T, V), the teacher's raw CTC logits on that cut, without padding.
          lattice: Of that cut alone (N = 1), or that there is none.
          hidden: By layer, its rows (T, R, C), :func:`icefall_kd.hidden.hidden_rows`.
            Of these three, what the fingerprint names must be there.

        Raises:
          KDError: not a MonoCut, a wrong shape, numbers that are not finite or beyond
            float16, a cut id that was written before, or a disk that is full.
        """
        return self.append(cut, self.encode(cut, logits, lattice, hidden))

    def encode(
        self,
        cut: MonoCut,
        logits: Union[torch.Tensor, np.ndarray, None] = None,
        lattice: Union[PrunedLattice, NoPath, None] = None,
        hidden: Optional[Dict[Layer, torch.Tensor]] = None,
    ) -> Record:
        """What :meth:`write` stores, made and checked and not yet stored."""
        parts, frames = {}, []
        if self.ctc is not None:
            if logits is None:
                raise _missing(cut, "CTC logits", self.ctc)
            logits = torch.as_tensor(logits).detach().float().cpu()
            parts["ctc"] = self._ctc_part(cut, logits)
            frames.append(len(logits))
        if self.lattice is not None:
            if lattice is None:
                raise _missing(cut, "a lattice", self.lattice)
            if isinstance(lattice, NoPath):
                frames.append(lattice.frames)
            else:
                check_finite(lattice.logits, f"lattice on cut {cut.id}")
                parts["lattice"] = self.lattice.encode(lattice, cut.id)
                frames.append(int(lattice.boundary[0, 3]))
        for codec in self.hidden:
            rows = (hidden or {}).get(codec.layer)
            if rows is None:
                raise _missing(cut, f"layer {codec.layer}", codec)
            quantizer = self._quantizer(codec)
            codec.check(rows, quantizer, cut.id)
            parts[codec.part] = codec.encode(rows.detach(), quantizer)
            frames.append(len(rows))
        if len(set(frames)) > 1 or not frames[0]:
            raise KDError(
                f"the cut {cut.id} comes with {frames} frames of {list(parts)}: give "
                "each the same number, one or more"
            )
        return Record(frames[0], parts)

    def _quantizer(self, codec: HiddenCodec) -> Any:
        if codec.layer not in self._quantizers:
            found = codec.stored_quantizer(self.storage_dir)
            self._quantizers[codec.layer] = found
        return self._quantizers[codec.layer]

    def append(self, cut: MonoCut, encoded: Record) -> Pointer:
        """Store what :meth:`encode` made of ``cut``."""
        if not isinstance(cut, MonoCut):
            raise KDError(
                f"the cut {cut.id} is a {type(cut).__name__}, and targets are stored "
                "on MonoCuts: dump the teacher before mixing, padding or appending"
            )
        if cut.id in self._done:
            raise KDError(f"the cut id {cut.id} occurs twice: make cut ids unique")
        record = b"".join(encoded.parts.values())
        pointer = Pointer(
            store=str(self.storage_dir),
            file=self._path.name,
            offset=self._records.tell(),
            sizes={name: len(part) for name, part in encoded.parts.items()},
            crc32=0,
            cut=cut.id,
            frames=encoded.frames,
            start=cut.start,
            duration=cut.duration,
            source=source_duration(cut),
            fingerprint=self.fingerprint.digest,
        )
        pointer = replace(pointer, crc32=pointer.checksum(record))
        # A copy, the caller's cut stays as it is, and without what a Shar put there.
        cut = cut.drop_in_memory_data().with_id(cut.id)
        custom = {k: v for k, v in (cut.custom or {}).items() if k not in SHAR_NOTES}
        cut.custom = {**custom, FIELD: pointer.to_dict()}
        line = json.dumps(cut.to_dict(), ensure_ascii=False) + "\n"
        with self._told():
            self._records.write(record)
            self._records.flush()
            self._lines.write(line.encode())
            self._lines.flush()
        self.bytes_written += len(record)
        self._done.add(cut.id)
        return pointer

    def _ctc_part(self, cut: MonoCut, logits: torch.Tensor) -> bytes:
        v = self.fingerprint.vocab_size
        if logits.ndim != 2 or logits.size(1) != v or not len(logits):
            raise KDError(
                f"the logits of cut {cut.id} have shape {tuple(logits.shape)} and must "
                f"be (frames, {v}) with at least one frame"
            )
        check_finite(logits, f"logits on cut {cut.id}")
        return self.ctc.encode(self.ctc.keep(logits, cut.id), v)

    def close(self) -> None:
        """Leave what was written for another run to continue."""
        for file in (self._records, self._lines):
            try:
                file.close()
            except OSError:
                pass  # of a full disk; what counts was flushed

    def finish(self) -> None:
        """Make the manifest of all that was written, and drop the partial one."""
        with self._told():
            self._records.close()
            self._lines.close()
            with replacing(self.manifest) as temporary:
                with (
                    open(self.partial, "rb") as f,
                    open_manifest(temporary, "wb") as out,
                ):
                    shutil.copyfileobj(f, out)
            self.partial.unlink()


def _is_same(folder: str, other: Path) -> bool:
    """Whether two paths are of one folder, be one of them relative."""
    return Path(folder) == other or Path(folder).resolve() == other.resolve()


def _missing(cut: MonoCut, name: str, kept: Any) -> KDError:
    return KDError(
        f"the cut {cut.id} comes without {name}, and the store keeps that as {kept}: "
        "give it to write()"
    )


def check_finite(logits: torch.Tensor, name: str) -> None:
    """Refuse what float16 can't hold."""
    if not torch.isfinite(logits).all():
        raise KDError(
            f"the teacher's {name} are not finite: check the teacher's checkpoint and "
            "the cut's features"
        )
    spread = float((logits.amax(-1) - logits.amin(-1)).max()) if logits.numel() else 0
    if spread > 6e4:
        raise KDError(
            f"the teacher's {name} span {spread:.3g} in a frame, and float16 holds "
            "60000: check the teacher's checkpoint and the cut's features"
        )

"""Writes a teacher's targets beside Lhotse cuts."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, BinaryIO, ContextManager, Dict, List, Set, Union

from lhotse.cut import Cut, MonoCut

from icefall_kd.errors import KDError, disk_errors
from icefall_kd.files import (
    CAN_LOCK,
    is_same_folder,
    lock_file,
    missing_folders,
    replacing,
)
from icefall_kd.targets.fingerprint import FILENAME, Fingerprint
from icefall_kd.targets.manifest import (
    cut_of,
    job_manifest,
    lines_of,
    open_manifest,
    partial_of,
)
from icefall_kd.targets.record import Record, RecordEncoder
from icefall_kd.targets.store import (
    FIELD,
    Pointer,
    is_left_out,
    leave_out,
    parse_pointer,
    read_fingerprint,
)

SHAR_NOTES = ("shard_origin", "shar_epoch", "dataloading_info")


class TargetWriter:
    """Writes targets beside cuts, and the manifest that carries them.

    Each cut gets a field ``kd_targets``, a dictionary that finds its record
    (:class:`icefall_kd.targets.store.Pointer`). The kinds of targets in a record, and
    the form of each, are named by the fingerprint (:mod:`icefall_kd.kinds`).

    The record is written first, its manifest line second. A run that was cut short
    leaves ``<manifest>.partial``, which the next one continues; the manifest itself
    appears whole, on :meth:`finish`. It is an ordinary Lhotse manifest.

    Args:
      manifest: The manifest to write, ``.jsonl.gz`` or ``.jsonl``.
      storage_dir: Folder for records and fingerprint.
      fingerprint: That of the teacher, the cuts and the forms.
      overwrite: Whether what is there already is deleted.
      job: The number of this writer among ``num_jobs``, from 0 on. Each writes files of
        its own; :func:`icefall_kd.targets.manifest.combine` joins their manifests.
      num_jobs: The number of writers that share the folder.

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
        if not CAN_LOCK:
            raise KDError(
                f"targets can't be written on {sys.platform}, where Python has no file "
                "locks (the module fcntl): dump them on Linux or macOS, and copy the "
                "manifest and its store here to train on them"
            )
        self.manifest = job_manifest(manifest, job, num_jobs)
        self.partial = partial_of(self.manifest)
        self.manifest_of_all, self.job = Path(manifest), job
        self.num_jobs = num_jobs
        self.storage_dir = Path(storage_dir)
        self.fingerprint = fingerprint
        self.encoder = RecordEncoder(
            fingerprint, lambda codec: codec.stored_quantizer(self.storage_dir)
        )
        self.bytes_written = 0
        if not overwrite and (self.storage_dir / FILENAME).exists():
            Fingerprint.read(self.storage_dir).check_same(fingerprint, storage_dir)
        name = "targets.bin" if num_jobs == 1 else f"targets.{job}-of-{num_jobs}.bin"
        self._path = self.storage_dir / name
        self._done: Set[str] = set()
        self.left_out: Set[str] = set()  # cuts of the manifest without targets
        if not overwrite:
            self._refuse_unknown_records()
        with self._disk_errors():
            self._open(overwrite)

    def _open(self, overwrite: bool) -> None:
        """Make the folders and open the files; nothing new is left if that fails."""
        new_folders = missing_folders(self.storage_dir)
        new_folders += missing_folders(self.manifest.parent)
        is_new = not self._path.exists()
        self.manifest.parent.mkdir(parents=True, exist_ok=True)
        self.storage_dir.mkdir(parents=True, exist_ok=True)
        self._records = open(self._path, "ab")
        lock_file(self._records, "give each of several jobs its own --job")
        try:
            if overwrite:  # first, lest another teacher's cuts be taken for these
                self.manifest.unlink(missing_ok=True)
                self.partial.unlink(missing_ok=True)
                read_fingerprint.cache_clear()
            end = self._start_partial()
            self.fingerprint.write(self.storage_dir)
        except BaseException:
            if is_new:
                self._path.unlink()
            self._records.close()
            for folder in dict.fromkeys(new_folders):
                if not any(folder.iterdir()):
                    folder.rmdir()
            raise
        self._records.truncate(end)
        self._records.seek(end)
        self._lines = open(self.partial, "ab")

    def _refuse_unknown_records(self) -> None:
        """Refuse records without a manifest or a fingerprint beside them."""
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

    def _disk_errors(self) -> ContextManager[None]:
        place = f"{self.storage_dir} or {self.manifest.parent}"
        return disk_errors(place, self._done)

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
                cut = cut_of(line, path)
                if cut is None:
                    continue  # where an earlier run was cut short
                if is_left_out(cut):
                    if cut["id"] not in self:
                        self.left_out.add(cut["id"])
                        out.write(line.rstrip(b"\n") + b"\n")
                    continue
                value = (cut.get("custom") or {}).get(FIELD)
                pointer = None if value is None else parse_pointer(value, cut["id"])
                folder = pointer and pointer.store
                if pointer is None or not is_same_folder(folder, self.storage_dir):
                    raise KDError(
                        f"{path} is there, and its cut {cut['id']} has targets in "
                        f"{folder} and not in {self.storage_dir}: name another "
                        "manifest, give --overwrite, or if the store was moved there "
                        f"run `icefall-kd repoint {path} --storage-dir "
                        f"{self.storage_dir}`"
                    )
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

    def __enter__(self) -> "TargetWriter":
        return self

    def __exit__(self, kind, *exc) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def __contains__(self, cut_id: str) -> bool:
        """Whether the manifest has that cut, be it without targets."""
        return cut_id in self._done or cut_id in self.left_out

    def partials(self) -> List[Path]:
        """The manifests that this and the other jobs are writing."""
        jobs = (
            job_manifest(self.manifest_of_all, j, self.num_jobs)
            for j in range(self.num_jobs)
        )
        return [partial_of(path) for path in jobs]

    def __len__(self) -> int:
        """How many cuts have targets."""
        return len(self._done)

    def write(self, cut: MonoCut, ctc: Any = None, **values: Any) -> Pointer:
        """Store one cut's targets.

        Args:
          cut: A MonoCut, as it will be trained on.
          ctc: (T, V), the teacher's CTC logits on that cut, without padding, up to a
            constant in each frame: log-probabilities will do.
          values: The value of each further kind of target, by the kind's name. Each
            kind that the fingerprint names must be there:

            lattice: the :class:`~icefall_kd.types.PrunedLattice` of that cut alone (N =
            1), or :class:`~icefall_kd.types.NoPath`.

            hidden: for each layer its rows (T, R, C), of
            :func:`icefall_kd.kinds.hidden.hidden_rows`.

        Returns:
          The pointer that the cut has in the manifest.

        Raises:
          KDError: not a MonoCut, a wrong shape, numbers that are not finite or beyond
            float16, a cut id that was written before, or a disk that is full.
        """
        return self.append(cut, self.encoder.encode(cut, ctc=ctc, **values))

    def append(self, cut: MonoCut, encoded: Record) -> Pointer:
        """Store a record.

        Args:
          cut: The cut.
          encoded: What ``encoder.encode`` made of its targets.

        Returns:
          The pointer that the cut has in the manifest.

        Raises:
          KDError: not a MonoCut, or one whose id was written before, or a disk that is
            full.
        """
        if not isinstance(cut, MonoCut):
            raise KDError(
                f"the cut {cut.id} is a {type(cut).__name__}, and targets are stored "
                "on MonoCuts: dump the teacher before mixing, padding or appending"
            )
        self._check_new(cut)
        record = b"".join(encoded.parts.values())
        pointer = Pointer.for_record(
            cut,
            record,
            store=str(self.storage_dir),
            file=self._path.name,
            offset=self._records.tell(),
            sizes={name: len(part) for name, part in encoded.parts.items()},
            frames=encoded.frames,
            fingerprint=self.fingerprint.digest,
        )
        line = _without_shar(cut)
        line["custom"] = {**(line.get("custom") or {}), FIELD: pointer.to_dict()}
        self._write(record, line)
        self.bytes_written += len(record)
        self._done.add(cut.id)
        return pointer

    def leave_out(self, cut: Cut) -> None:
        """Write a cut without targets into the manifest.

        Args:
          cut: Any cut; :attr:`left_out` gets its id.
        """
        self._check_new(cut)
        line = _without_shar(cut)
        leave_out(line)
        self._write(b"", line)
        self.left_out.add(cut.id)

    def _check_new(self, cut: Cut) -> None:
        if cut.id in self:
            raise KDError(f"the cut id {cut.id} occurs twice: make cut ids unique")

    def _write(self, record: bytes, line: Dict[str, Any]) -> None:
        with self._disk_errors():
            self._records.write(record)
            self._records.flush()
            self._lines.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            self._lines.flush()

    def close(self) -> None:
        """Leave what was written for another run to continue."""
        for file in (self._records, self._lines):
            try:
                file.close()
            except OSError:
                pass  # of a full disk; what counts was flushed

    def finish(self) -> None:
        """Make the manifest of all that was written, and drop the partial one."""
        with self._disk_errors():
            self._records.close()
            self._lines.close()
            with replacing(self.manifest) as temporary:
                with (
                    open(self.partial, "rb") as f,
                    open_manifest(temporary, "wb") as out,
                ):
                    shutil.copyfileobj(f, out)
            self.partial.unlink()


def _without_shar(cut: Cut) -> Dict[str, Any]:
    """The dictionary of ``cut``, without arrays and what a Shar put there."""
    values = cut.drop_in_memory_data().to_dict()
    custom = values.get("custom")
    if custom:
        values["custom"] = {k: v for k, v in custom.items() if k not in SHAR_NOTES}
    return values

"""Stores what a teacher said on Lhotse cuts."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO, Set, Union

import numpy as np
import torch
from lhotse.array import TemporalArray
from lhotse.cut import MonoCut
from lhotse.features.io import NumpyFilesWriter

from icefall_kd.errors import KDError
from icefall_kd.targets.fingerprint import FILENAME, Fingerprint

FIELD = "kd_ctc_logits"


def _beside(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")


def _open(path: Path, mode: str) -> BinaryIO:
    return (gzip.open if path.suffix == ".gz" else open)(path, mode)


class LogitWriter:
    """Writes CTC targets beside cuts, and the manifest that carries them.

    Each cut gets a ``TemporalArray`` named ``kd_ctc_logits``: (T, V) log-probabilities
    in float16. They are logits up to a constant per frame, so any temperature can be
    applied later, and float16 is finest near 0, where the mass is (a symbol of
    probability p is kept to a relative error of at most 2^-11 |log p|).

    The array is written first, its manifest line second. A run that was cut short
    leaves ``<manifest>.partial``, which the next one continues; the manifest itself
    appears whole, on :meth:`finish`. It is an ordinary Lhotse manifest.

    Args:
      manifest: The manifest to write, ``.jsonl.gz`` or ``.jsonl``.
      storage_dir: Folder for arrays and fingerprint.
      fingerprint: Of the teacher and the cuts.
      overwrite: Forget what is there already.

    Raises:
      KDError: if the folder holds targets of another teacher, or the manifest is
        there and its cuts have no targets in that folder.
    """

    def __init__(
        self,
        manifest: Union[str, Path],
        storage_dir: Union[str, Path],
        fingerprint: Fingerprint,
        overwrite: bool = False,
    ) -> None:
        self.manifest = Path(manifest)
        self.partial = self.manifest.with_name(self.manifest.name + ".partial")
        self.storage_dir = Path(storage_dir)
        self.fingerprint = fingerprint
        self.bytes_written = 0
        if not overwrite and (self.storage_dir / FILENAME).exists():
            Fingerprint.read(self.storage_dir).check_same(fingerprint, storage_dir)
        self.manifest.parent.mkdir(parents=True, exist_ok=True)
        fingerprint.write(self.storage_dir)
        self._done: Set[str] = set()
        if overwrite:  # its arrays are about to be replaced
            self.manifest.unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)
        self._start_partial()
        self._file = open(self.partial, "a", encoding="utf8")
        self._arrays = NumpyFilesWriter(self.storage_dir)

    def _start_partial(self) -> None:
        """Begin the partial manifest with the whole lines of earlier runs."""
        temporary = _beside(self.partial)
        try:
            with open(temporary, "wb") as out:
                for path in (self.manifest, self.partial):
                    if path.exists():
                        self._take_over(path, out)
            temporary.replace(self.partial)
        finally:
            temporary.unlink(missing_ok=True)

    def _take_over(self, path: Path, out: BinaryIO) -> None:
        with _open(path, "rb") as f:
            for line in f:
                try:
                    cut = json.loads(line)
                except ValueError:
                    continue  # where an earlier run was cut short
                stored = (cut.get("custom") or {}).get(FIELD) or {}
                folder = (stored.get("array") or {}).get("storage_path")
                if folder is None or Path(folder) != self.storage_dir:
                    raise KDError(
                        f"{path} is there, and its cut {cut.get('id')} has targets in "
                        f"{folder} and not in {self.storage_dir}: name another "
                        "manifest, or give --overwrite"
                    )
                if cut["id"] not in self._done:
                    self._done.add(cut["id"])
                    out.write(line.rstrip(b"\n") + b"\n")

    def __enter__(self) -> "LogitWriter":
        return self

    def __exit__(self, kind, *exc) -> None:
        if kind is None:
            self.finish()
        else:
            self._file.close()

    def __contains__(self, cut_id: str) -> bool:
        return cut_id in self._done

    def __len__(self) -> int:
        return len(self._done)

    def write(self, cut: MonoCut, logits: Union[torch.Tensor, np.ndarray]) -> None:
        """Store one cut's targets.

        Args:
          cut: A MonoCut, as it will be trained on.
          logits: (T, V), the teacher's raw CTC logits on that cut, without padding.

        Raises:
          KDError: not a MonoCut, a wrong shape, numbers that are not finite, or a
            cut id that was written before.
        """
        if not isinstance(cut, MonoCut):
            raise KDError(
                f"the cut {cut.id} is a {type(cut).__name__}, and targets are stored "
                "on MonoCuts: dump the teacher before mixing, padding or appending"
            )
        if cut.id in self._done:
            raise KDError(f"the cut id {cut.id} occurs twice: make cut ids unique")
        logits = torch.as_tensor(logits).detach().float().cpu()
        if logits.ndim != 2 or logits.size(1) != self.fingerprint.vocab_size:
            raise KDError(
                f"the logits of cut {cut.id} have shape {tuple(logits.shape)} and must "
                f"be (frames, {self.fingerprint.vocab_size})"
            )
        if not torch.isfinite(logits).all():
            raise KDError(
                f"the teacher's logits on cut {cut.id} are not finite: check the "
                "teacher's checkpoint and the cut's features"
            )
        array = torch.log_softmax(logits, dim=-1).to(torch.float16).numpy()
        self.bytes_written += array.nbytes
        cut = cut.with_id(cut.id)  # a copy: the caller's cut stays as it is
        cut.custom = dict(cut.custom or {})
        cut.custom[FIELD] = self._store(cut, array)
        self._file.write(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n")
        self._file.flush()
        self._done.add(cut.id)

    def _store(self, cut: MonoCut, array: np.ndarray) -> TemporalArray:
        return self._arrays.store_array(
            key=cut.id,
            value=array,
            frame_shift=self.fingerprint.frame_shift,
            temporal_dim=0,
            start=cut.start,
        )

    def finish(self) -> None:
        """Make the manifest of all that was written, and drop the partial one."""
        self._file.close()
        temporary = _beside(self.manifest)
        with open(self.partial, "rb") as f, _open(temporary, "wb") as out:
            shutil.copyfileobj(f, out)
        temporary.replace(self.manifest)
        self.partial.unlink()

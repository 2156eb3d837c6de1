"""The manifests of a dump: one of each job while it runs, one of all at the end."""

import gzip
import json
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Iterator, Optional, Tuple, Union

from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.targets.store import FIELD, Pointer, is_left_out, parse_pointer


def open_manifest(path: Path, mode: str) -> BinaryIO:
    """Open a manifest, compressed if its name ends in ``.gz``.

    Args:
      path: The manifest.
      mode: Python's, of bytes.
    """
    return (gzip.open if path.suffix == ".gz" else open)(path, mode)


def lines_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines of a manifest, and refuse one that is cut off.

    Args:
      file: The open manifest.
      path: Its path, for messages.
    """
    try:
        yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise KDError(
            f"the manifest {path} is damaged ({type(e).__name__}): delete it and give "
            "the same command again with --overwrite"
        ) from None


def cut_of(line: bytes, path: Path) -> Optional[Dict[str, Any]]:
    """Return the dictionary of the cut in a line of a manifest.

    Args:
      line: The line.
      path: The manifest.

    Returns:
      The dictionary, in which the id is a text, and the custom fields are a dictionary
      or None, those of a mixed cut's tracks too. None for a line of a partial manifest
      that is no JSON: a killed run may leave one torn.

    Raises:
      KDError: a line that is no cut.
    """
    try:
        cut = json.loads(line)
    except (ValueError, RecursionError):
        if path.suffix == ".partial":
            return None
        cut = None
    if not _is_cut(cut):
        raise KDError(
            f"{path} is no manifest of Lhotse, or damaged, as a line of it begins with "
            f"{line[:40].decode(errors='replace')!r}: make it again with `icefall-kd "
            "dump --overwrite`, or name another"
        )
    return cut


def _is_cut(values: Any) -> bool:
    if not isinstance(values, dict) or not isinstance(values.get("id"), str):
        return False
    tracks = values.get("tracks") or []
    return (
        isinstance(values.get("custom") or {}, dict)
        and isinstance(tracks, list)
        and all(isinstance(t, dict) and _is_cut(t.get("cut")) for t in tracks)
    )


def job_manifest(manifest: Union[str, Path], job: int, num_jobs: int) -> Path:
    """Return the manifest that one of several jobs writes, beside that of all.

    Args:
      manifest: That of all.
      job: The job's number, from 0 on.
      num_jobs: The number of jobs.
    """
    path = Path(manifest)
    if num_jobs == 1:
        return path
    stem, dot, suffix = path.name.partition(".jsonl")
    return path.with_name(f"{stem}.job-{job}-of-{num_jobs}{dot}{suffix}")


def partial_of(manifest: Path) -> Path:
    """Return the file in which a manifest is written until it is whole.

    Args:
      manifest: The manifest.
    """
    return manifest.with_name(manifest.name + ".partial")


def read_pointers(partial: Path, offset: int) -> Tuple[Dict[str, Pointer], int]:
    """Read the pointers in a manifest that is being written.

    Args:
      partial: The manifest.
      offset: The byte from which it is read.

    Returns:
      The pointers by cut id, and the offset of the next ones.
    """
    pointers: Dict[str, Pointer] = {}
    if not partial.exists():
        return pointers, offset
    with open(partial, "rb") as f:
        f.seek(offset)
        for line in f:
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            cut = cut_of(line, partial)
            if cut and not is_left_out(cut):
                value = (cut.get("custom") or {}).get(FIELD)
                pointers[cut["id"]] = parse_pointer(value, cut["id"])
    return pointers, offset


def combine(
    manifest: Union[str, Path], num_jobs: int, order: Iterable[str]
) -> Dict[str, int]:
    """Join the manifests of all jobs into one.

    Memory does not grow with the corpus: each job's manifest is in order already.

    Args:
      manifest: The manifest to write.
      num_jobs: The number of jobs.
      order: The cut ids in the order of the manifest that was dumped.

    Returns:
      For each job's manifest its number of cuts with targets.

    Raises:
      KDError: a job's manifest that is not there or damaged, or cuts of no job.
    """
    paths = [job_manifest(manifest, job, num_jobs) for job in range(num_jobs)]
    for job, path in enumerate(paths):
        if not path.is_file():
            raise KDError(
                f"the manifest {path} of job {job} does not exist: let "
                f"`icefall-kd dump --num-jobs {num_jobs} --job {job}` finish first"
            )
    target = Path(manifest)
    counts = {str(path): 0 for path in paths}
    with ExitStack() as stack:
        # Jobs that end together may all write it.
        temporary = stack.enter_context(replacing(target, shared=True))
        lines = [
            lines_of(stack.enter_context(open_manifest(p, "rb")), p) for p in paths
        ]
        heads = [next(it, None) for it in lines]
        cuts = [head and cut_of(head, path) for head, path in zip(heads, paths)]
        with open_manifest(temporary, "wb") as out:
            for cut_id in order:
                ids = [cut and cut["id"] for cut in cuts]
                if cut_id not in ids:
                    raise KDError(
                        f"the cut {cut_id} has targets of none of the {num_jobs} jobs: "
                        "let all jobs run on the same manifest, then combine again"
                    )
                job = ids.index(cut_id)
                out.write(heads[job])
                counts[str(paths[job])] += not is_left_out(cuts[job])
                heads[job] = next(lines[job], None)
                cuts[job] = heads[job] and cut_of(heads[job], paths[job])
        ids = [cut and cut["id"] for cut in cuts]
        left = [i for i in ids if i]
        if left:
            raise KDError(
                f"the cut {left[0]} has targets and is not in the manifest that was "
                "dumped: combine with the manifest that all jobs ran on"
            )
    return counts

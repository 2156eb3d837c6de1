"""Files that are there whole or not at all."""

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Sequence
from uuid import uuid4

from icefall_kd.errors import KDError

MANIFEST = (".jsonl.gz", ".jsonl")  # what Lhotse reads line by line


def check_new_file(path: str, name: str, suffixes: Sequence[str] = ()) -> None:
    """Refuse a path that no file can be written to, before the work for it begins.

    Args:
      path: As the user gave it.
      name: What the user knows it by, such as OUT_CUTS.
      suffixes: One of which its name must have; none: any name will do.
    """
    remedy = "give it the name of a file"
    if suffixes:
        remedy += f" that ends with {' or '.join(suffixes)}"
    if not path:
        raise KDError(f"{name} is empty: {remedy}")
    if path.endswith("/") or Path(path).is_dir():
        raise KDError(f"{name} is the folder {path}: {remedy}")
    stem = Path(path).name
    if suffixes and not any(stem.endswith(x) and stem != x for x in suffixes):
        raise KDError(f"{name} is {path}: {remedy}, so that Lhotse can read it")
    check_new_folder(str(Path(path).parent), f"the folder of {name}")


def check_new_folder(path: str, name: str) -> None:
    """Refuse a path that no folder can be made at: it, or one above it, is a file."""
    for folder in (Path(path), *Path(path).parents):
        if folder.exists():
            if not folder.is_dir():
                raise KDError(f"{name} is {path}, and {folder} is a file: give another")
            return


def missing_folders(path: Path) -> List[Path]:
    """The folders that ``path.mkdir(parents=True)`` would make, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place if all goes well.

    Args:
      path: In a folder that exists.
      shared: Several processes, on several machines perhaps, may write it at once.
    """
    name = f"{uuid4().hex}.{path.name}" if shared else path.name
    temporary = path.with_name(f".tmp.{name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

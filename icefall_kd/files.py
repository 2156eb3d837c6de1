"""Files that are there whole or not at all."""

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator
from uuid import uuid4


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

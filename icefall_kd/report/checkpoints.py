"""Reads how many steps a checkpoint was trained for, without its tensors."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, Optional


class _Anything(dict):
    """What stands for any object of a checkpoint that is not a plain number."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Take an item of a list."""

    def extend(self, items: Any) -> None:
        """Take the items of a list."""


class _NumbersOnly(pickle.Unpickler):
    """An unpickler that imports nothing, and so runs nothing of the file."""

    def find_class(self, module: str, name: str) -> Any:
        return _Anything

    def persistent_load(self, pid: Any) -> None:
        return None


def read_steps(checkpoint: Path) -> Optional[int]:
    """The number of training steps that icefall wrote into a checkpoint.

    Args:
      checkpoint: Such as ``epoch-30.pt``.

    Returns:
      Its ``batch_idx_train``, or None where there is no such file or number.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            with archive.open(name) as f:
                content = _NumbersOnly(f).load()
    except Exception:  # a damaged pickle raises any of them
        return None
    steps = content.get("batch_idx_train") if isinstance(content, dict) else None
    return steps if isinstance(steps, int) else None

"""Where a store lies now: as its cuts say, in their Shar, or beside their manifest.

A cut says where its store was when the targets were made. Manifest and store may have
been copied or renamed since, or another working folder makes nothing of a relative
path. What is taken in a store's place is known by its fingerprint, and each record by
its checksum, so nothing else can be taken for it.
"""

import shutil
from pathlib import Path, PureWindowsPath
from typing import Dict, Iterator, List, Tuple, Union

from icefall_kd.errors import KDError
from icefall_kd.targets.fingerprint import FILENAME, Fingerprint
from icefall_kd.tokens import TOKENS

# In a Shar: the small files of its targets' store. Lhotse takes each name up to its
# first dot for a field, and of the field "cuts" the jsonl files alone.
SHAR_STORE = "cuts.kd_targets"

_folders: List[str] = []  # of manifests, the last one first
_found: Dict[Tuple[str, str, str], str] = {}


def look_beside(folder: Union[str, Path]) -> None:
    """Let stores be looked for in ``folder`` too, that of a manifest, in this process.

    "" does nothing.
    """
    if not str(folder):
        return
    if str(folder) in _folders:
        _folders.remove(str(folder))
    _folders.insert(0, str(folder))
    _found.clear()


def forget() -> None:
    """Look nowhere but where cuts say, and anew."""
    _folders.clear()
    _found.clear()


def place_of(store: str, digest: str, shard: str = "") -> str:
    """The folder of a store.

    Args:
      store: What a cut says.
      digest: Of the store's fingerprint.
      shard: The file of the Shar that the cut was read from; "" for none.

    Returns:
      The first folder with such a fingerprint; ``store`` itself where there is none.
    """
    in_shar = str(Path(shard).parent / SHAR_STORE) if shard else ""
    key = (store, digest, in_shar)
    if key not in _found:
        places = filter(None, (in_shar, store, *beside(store, _folders)))
        own = (place for place in places if has_fingerprint(place, digest))
        _found[key] = next(own, store)
    return _found[key]


def beside(store: str, folders: List[str]) -> Iterator[str]:
    """Where a store may lie that was copied with the manifest in one of ``folders``."""
    name = PureWindowsPath(store).name  # which knows both kinds of slashes
    for folder in folders:
        yield str(Path(folder) / name)
        yield folder  # a cache's manifest lies in its store


def has_fingerprint(store: str, digest: str) -> bool:
    try:
        return Fingerprint.read(store).digest == digest
    except (KDError, OSError):  # OSError: a folder that can't be looked into
        return False


def copy_small_files(store: Union[str, Path], folder: Path) -> None:
    """Copy a store's fingerprint, symbols and quantizers, all that is no record."""
    folder.mkdir(exist_ok=True)
    for path in (*Path(store).glob("quantizer.*.pt"), Path(store) / TOKENS):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    shutil.copyfile(Path(store) / FILENAME, folder / FILENAME)
    _found.clear()

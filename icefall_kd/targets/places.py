"""Finds a store: where its cuts name it, in their Shar, or beside their manifest.

A cut names the folder of its store at the time of the dump. Manifest and store may have
been copied or renamed since, or a relative path leads nowhere from another working
folder. A store is recognised by its fingerprint, and each record by its checksum, so no
other can be taken for it.
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
_place_of_key: Dict[Tuple[str, str, str], str] = {}


def look_beside(folder: Union[str, Path]) -> None:
    """Let stores be looked for beside a manifest too, in this process.

    Args:
      folder: The manifest's folder; "" does nothing.
    """
    if not str(folder):
        return
    if str(folder) in _folders:
        _folders.remove(str(folder))
    _folders.insert(0, str(folder))
    _place_of_key.clear()


def forget() -> None:
    """Drop the manifests' folders, and the places of stores that are known."""
    _folders.clear()
    _place_of_key.clear()


def place_of(store: str, digest: str, shard: str = "") -> str:
    """Find the folder of a store.

    Args:
      store: The folder that a cut names.
      digest: That of the store's fingerprint.
      shard: The file of the Shar that the cut was read from; "" for none.

    Returns:
      The first folder with such a fingerprint; ``store`` itself where there is none.
    """
    in_shar = str(Path(shard).parent / SHAR_STORE) if shard else ""
    key = (store, digest, in_shar)
    if key not in _place_of_key:
        places = filter(None, (in_shar, store, *beside(store, _folders)))
        fitting = (place for place in places if has_fingerprint(place, digest))
        _place_of_key[key] = next(fitting, store)
    return _place_of_key[key]


def beside(store: str, folders: List[str]) -> Iterator[str]:
    """Yield the folders of a store that was copied along with its manifest.

    Args:
      store: The folder that a cut names.
      folders: The folders that the manifest may lie in.
    """
    name = PureWindowsPath(store).name  # which knows both kinds of slashes
    for folder in folders:
        yield str(Path(folder) / name)
        yield folder  # a cache's manifest lies in its store


def has_fingerprint(store: str, digest: str) -> bool:
    """Return whether a folder is a store with a certain fingerprint.

    Args:
      store: The folder.
      digest: That of the fingerprint.
    """
    try:
        return Fingerprint.read(store).digest == digest
    except (KDError, OSError):  # OSError: a folder that can't be looked into
        return False


def copy_small_files(store: Union[str, Path], folder: Path) -> None:
    """Copy a store's fingerprint, tokens and quantizers: all that is no record.

    Args:
      store: The store.
      folder: The folder that gets the copies.
    """
    folder.mkdir(exist_ok=True)
    for path in (*Path(store).glob("quantizer.*.pt"), Path(store) / TOKENS):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    shutil.copyfile(Path(store) / FILENAME, folder / FILENAME)
    _place_of_key.clear()

"""Lets a manifest point at its targets where these lie now."""

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import click
from tqdm.auto import tqdm

from icefall_kd.cli.options import Place, command
from icefall_kd.errors import KDError, require
from icefall_kd.files import is_same_folder, replacing
from icefall_kd.targets.cuts import shards_of
from icefall_kd.targets.manifest import cut_of, lines_of, open_manifest
from icefall_kd.targets.places import (
    SHAR_STORE,
    beside,
    copy_small_files,
    has_fingerprint,
)
from icefall_kd.targets.store import FIELD, Pointer, parse_pointer

# What the lines of a damaged shard raise.
DAMAGED = (
    *(ValueError, TypeError, KeyError, RecursionError),
    *(EOFError, StopIteration, zlib.error),
)


def _stored_in(value: Any) -> Iterator[Dict[str, Any]]:
    """The pointers in a cut's dictionary, those of a mixed cut's tracks too."""
    if isinstance(value, list):
        for item in value:
            yield from _stored_in(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name != FIELD:
                yield from _stored_in(item)
            elif item is not None:
                yield item


class _Stores:
    """Where the stores of a manifest lie now.

    Args:
      path: The manifest.
      folders: Where to look; () for beside the manifest.
    """

    def __init__(self, path: Path, folders: Sequence[str]) -> None:
        self.path, self.folders = path, folders
        # By the store and the file that a cut names: the folder, and bytes in its file.
        self.places: Dict[Tuple[str, str], Tuple[str, int]] = {}

    def place(self, pointer: Pointer) -> str:
        """The folder of a cut's record, whose first cut was read there.

        It is absolute: the mended manifest may be read from any working folder.
        """
        key = (pointer.store, pointer.file)
        end = pointer.offset + pointer.size
        if key not in self.places:
            place = os.path.abspath(self._look_for(pointer))
            file = Path(place) / pointer.file
            self.places[key] = place, 0 if pointer.record else file.stat().st_size
        place, size = self.places[key]
        require(
            end <= size or pointer.record,
            f"the record of cut {pointer.cut} ends at byte {end} of {place}/"
            f"{pointer.file}, which has {size}: copy the store again",
        )
        return place

    def _look_for(self, pointer: Pointer) -> str:
        near = list(beside(pointer.store, [str(self.path.parent)]))
        for place in (*(self.folders or near), pointer.store):
            if has_fingerprint(place, pointer.fingerprint):
                try:
                    replace(pointer, store=place).read()
                    return place
                except KDError:
                    continue
        looked_in = ", ".join(self.folders or near)
        raise KDError(
            f"the targets of cut {pointer.cut}, made in {pointer.store} under the "
            f"fingerprint {pointer.fingerprint}, are not in {looked_in}: give "
            "--storage-dir the folder of their fingerprint.json and records"
        )


def _rewrite(path: Path, stores: _Stores) -> int:
    """Write a manifest anew, whole or not at all; return how many cuts have targets."""
    n = 0
    with replacing(path) as temporary:
        with open_manifest(path, "rb") as f, open_manifest(temporary, "wb") as out:
            for line in tqdm(lines_of(f, path), desc="Cuts", unit=" cuts", delay=2):
                cut = cut_of(line, path)
                if cut is None:  # torn
                    out.write(line)
                    continue
                pointers = list(_stored_in(cut))
                for stored in pointers:
                    stored["store"] = stores.place(parse_pointer(stored, cut["id"]))
                if pointers:
                    line = json.dumps(cut, ensure_ascii=False).encode() + b"\n"
                n += bool(pointers)
                out.write(line)
        require(
            n,
            f"no cut of {path} has targets ({FIELD}): give the manifest that "
            "`icefall-kd dump` wrote",
        )
    return n


def _fill_shar(folder: Path, folders: Sequence[str]) -> str:
    """Copy a store's small files into a Shar; return where they were."""
    shards = shards_of(folder, FIELD)
    require(
        shards,
        f"the folder {folder} is no Shar with targets: put them into it with "
        "`icefall-kd shar`, or give a manifest",
    )
    try:
        with open_manifest(shards[0], "rb") as f:
            # A cut that was left out has null there.
            lines = map(json.loads, f)
            first = next(x for x in lines if x[FIELD] is not None)
    except DAMAGED as e:
        raise KDError(
            f"{shards[0]} is damaged ({type(e).__name__}): make it again with "
            "`icefall-kd shar`"
        ) from None
    pointer = parse_pointer(first[FIELD], str(first.get("cut_id")))
    copy = folder / SHAR_STORE
    near = [str(copy), pointer.store, *beside(pointer.store, [str(folder.parent)])]
    for place in folders or near:
        if has_fingerprint(place, pointer.fingerprint):
            if not is_same_folder(copy, place):
                copy_small_files(place, copy)
            return place
    raise KDError(
        f"the store of {folder}, made in {pointer.store} under the fingerprint "
        f"{pointer.fingerprint}, is not in {', '.join(folders or near)}: give "
        "--storage-dir the folder of its fingerprint.json"
    )


EXAMPLE = """
icefall-kd repoint data/kd/librispeech_cuts_train-clean-100.jsonl.gz \\
  --storage-dir /mnt/new/librispeech_cuts_train-clean-100_kd
"""


@command(example=EXAMPLE)
@click.argument("cuts_path", type=Place(), metavar="CUTS")
@click.option(
    "--storage-dir",
    "folders",
    type=Place(),
    multiple=True,
    metavar="FOLDER",
    help="The folder where a store is now, if it is not beside CUTS. The option may be "
    "given more than once.",
)
def repoint(cuts_path: str, folders: Sequence[str]) -> None:
    """Let CUTS point at their targets where these are now.

    CUTS is a manifest that `icefall-kd dump` wrote, and is written anew; or the folder
    of a Shar with targets, into which the store's small files are copied. A store that
    lies beside its manifest under its old name is found without this.
    """
    path = Path(cuts_path)
    require(path.exists(), f"the manifest {path} does not exist: mend CUTS")
    for folder in folders:
        require(
            Path(folder).is_dir(),
            f"--storage-dir {folder} is no folder: mend the path",
        )
    try:
        if path.is_dir():
            place = _fill_shar(path, folders)
            click.echo(f"{path}: has what its targets need, of {place}")
            return
        stores = _Stores(path, folders)
        n = _rewrite(path, stores)
    except PermissionError as e:
        raise KDError(
            f"{path} can't be rewritten ({e.strerror}): copy it into a folder that can "
            "be written to, and give the copy"
        ) from None
    places: List[str] = sorted({place for place, _ in stores.places.values()})
    click.echo(f"{path}: {n} cuts point at {', '.join(places)}")

"""Puts targets into a Lhotse Shar, for storage that is read in sequence."""

import gzip
import json
import shutil
import zlib
from base64 import b64encode
from pathlib import Path
from typing import Iterator, Optional

import click
from lhotse.cut import Cut
from lhotse.serialization import load_jsonl
from tqdm.auto import tqdm

from icefall_kd.cli.options import Place, command
from icefall_kd.errors import KDError, disk_errors, require
from icefall_kd.files import is_same_folder
from icefall_kd.targets.cuts import ManifestCuts, shards_of
from icefall_kd.targets.places import SHAR_STORE, copy_small_files
from icefall_kd.targets.store import (
    FIELD,
    Pointer,
    fingerprint_of,
    is_left_out,
    read_fingerprint,
)

# What reading a damaged file raises.
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, ValueError, KeyError, TypeError)


class _Values:
    """The pointers of cuts, each with its record.

    Args:
      storage_dir: The folder that they are to name; "" for that of each.
    """

    def __init__(self, storage_dir: str) -> None:
        self.storage_dir = storage_dir
        self.first: Optional[Pointer] = None

    def __call__(self, cut: Cut) -> Optional[dict]:
        """The value of ``cut``; None if it was left out."""
        if is_left_out(cut):
            return None
        pointer = Pointer.of_cut(cut)
        require(
            pointer is not None,
            f"the cut {cut.id} has no targets ({FIELD}): give the manifest that "
            "`icefall-kd dump` wrote",
        )
        self.first = self.first or pointer
        require(
            pointer.fingerprint == self.first.fingerprint,
            f"the targets of cut {cut.id} are of the fingerprint "
            f"{pointer.fingerprint} and those of {self.first.cut} of "
            f"{self.first.fingerprint}: put those of one dump into a Shar",
        )
        record = b"".join(pointer.read().values())
        values = {**pointer.to_dict(), "record": b64encode(record).decode()}
        return {**values, "store": self.storage_dir or pointer.store}


def _write_shard(shard: Path, path: Path, cuts: Iterator[Cut], values: _Values) -> int:
    n = 0
    with gzip.open(path, "wt", encoding="utf8") as out:
        for line in load_jsonl(shard):
            cut = next(cuts, None)
            if cut is None or cut.id != line["id"]:
                raise KDError(
                    f"cut {n} of {shard} is {line['id']} and the manifest has "
                    f"{cut.id if cut else 'no more cuts'} there: both need the same "
                    "cuts in the same order; dump the Shar itself"
                )
            value = {"cut_id": cut.id, FIELD: values(cut)}
            out.write(json.dumps(value, ensure_ascii=False) + "\n")
            n += 1
    return n


def _put_small_files(
    folder: Path, storage_dir: str, pointer: Optional[Pointer]
) -> None:
    """Copy what the Shar needs of its store, unless that is to be read elsewhere."""
    copy = folder / SHAR_STORE
    if storage_dir or pointer is None:
        shutil.rmtree(copy, ignore_errors=True)
    elif not is_same_folder(copy, pointer.store):
        fingerprint_of(pointer)
        copy_small_files(pointer.store, copy)
        read_fingerprint.cache_clear()


EXAMPLE = """
icefall-kd shar data/kd/train.jsonl.gz data/shar/train
"""


@command(example=EXAMPLE)
@click.argument("cuts_path", metavar="CUTS", type=Place())
@click.argument("shar_dir", type=Place())
@click.option(
    "--storage-dir",
    type=Place(optional=True),
    default="",
    metavar="FOLDER",
    help="The folder where training will find fingerprint.json, tokens.txt and "
    "quantizers. Default: in the Shar, into which they are copied.",
)
def shar(cuts_path: str, shar_dir: str, storage_dir: str) -> None:
    """Put the targets of CUTS into SHAR_DIR, the Lhotse Shar of the same cuts.

    CUTS is what `icefall-kd dump SHAR_DIR CUTS` wrote. The targets become one more
    field of the Shar, kd_targets.NNNNNN.jsonl.gz, and are read with it.
    """
    require(
        not Path(storage_dir).is_file(),
        f"--storage-dir {storage_dir} is a file: give the folder of a store",
    )
    cuts = iter(ManifestCuts(cuts_path))
    folder = Path(shar_dir).resolve()
    if storage_dir and is_same_folder(storage_dir, folder / SHAR_STORE):
        storage_dir = ""  # they are to stay in the Shar
    shards = shards_of(folder)
    require(
        shards,
        f"the folder {folder} holds no cuts.*.jsonl.gz: make the Shar first with "
        "`lhotse shar export`",
    )
    # Hidden folders would be fields to Lhotse: so the new shards wait outside.
    waiting = folder.with_name(f".tmp.{folder.name}.{FIELD}")
    shutil.rmtree(waiting, ignore_errors=True)  # of a run that was killed
    written, n, values = [], 0, _Values(storage_dir)
    with disk_errors(folder):
        waiting.mkdir()
        try:
            for shard in tqdm(shards, desc="Shards", unit=" shards"):
                number = shard.name.split(".jsonl")[0][len("cuts") :]
                written.append(waiting / f"{FIELD}{number}.jsonl.gz")
                n += _write_shard(shard, written[-1], cuts, values)
            surplus = next(cuts, None)
            if surplus is not None:
                raise KDError(
                    f"the cut {surplus.id} of {cuts_path} is not in {folder}: both "
                    "need the same cuts in the same order; dump the Shar itself"
                )
            _put_small_files(folder, storage_dir, values.first)
            for path in written:
                path.replace(folder / path.name)
        except DAMAGE as e:
            raise KDError(
                f"{shard} or {cuts_path} is damaged ({type(e).__name__}): make it again"
            ) from None
        finally:
            shutil.rmtree(waiting, ignore_errors=True)
    click.echo(f"{folder}: targets of {n} cuts in {len(written)} shards of {FIELD}")
    click.echo("Next: train on the Shar; the manifest and its store are not needed.")

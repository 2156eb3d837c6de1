"""Puts targets into a Lhotse Shar, for storage that is read in sequence."""

import gzip
import json
import shutil
import zlib
from base64 import b64encode
from pathlib import Path
from typing import Iterator

import click
from lhotse.cut import Cut
from lhotse.serialization import load_jsonl
from tqdm.auto import tqdm

from icefall_kd.cli.cuts import open_cuts, readable
from icefall_kd.errors import KDError
from icefall_kd.targets.store import FIELD, Pointer


def _value(cut: Cut, store: str) -> dict:
    """The pointer of ``cut``, and its record with it."""
    pointer = Pointer.of(cut)
    if pointer is None:
        raise KDError(
            f"the cut {cut.id} has no targets ({FIELD}): give the manifest that "
            "`icefall-kd dump` wrote"
        )
    record = b"".join(pointer.read().values())
    values = {**pointer.to_dict(), "record": b64encode(record).decode()}
    return {**values, "store": store or pointer.store}


def _write_shard(shard: Path, path: Path, cuts: Iterator[Cut], store: str) -> int:
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
            value = {"cut_id": cut.id, FIELD: _value(cut, store)}
            out.write(json.dumps(value, ensure_ascii=False) + "\n")
            n += 1
    return n


def shar(cuts_path: str, shar_dir: str, store: str) -> None:
    if Path(store).is_file():
        raise KDError(f"--store {store} is a file: give the folder of a store")
    cuts = readable(open_cuts(cuts_path), cuts_path)
    folder = Path(shar_dir).resolve()
    shards = sorted(folder.glob("cuts.*"))
    if not shards:
        raise KDError(
            f"the folder {folder} holds no cuts.*.jsonl.gz: make the Shar first with "
            "`lhotse shar export`"
        )
    # Hidden folders would be fields to Lhotse: so the new shards wait outside.
    waiting = folder.with_name(f".tmp.{folder.name}.{FIELD}")
    shutil.rmtree(waiting, ignore_errors=True)  # of a run that was killed
    waiting.mkdir()
    written, n = [], 0
    try:
        for shard in tqdm(shards, desc="Shards", unit=" shards"):
            name = FIELD + shard.name.split(".jsonl")[0][len("cuts") :] + ".jsonl.gz"
            written.append(waiting / name)
            n += _write_shard(shard, written[-1], cuts, store)
        left = next(cuts, None)
        if left is not None:
            raise KDError(
                f"the cut {left.id} of {cuts_path} is not in {folder}: both need the "
                "same cuts in the same order; dump the Shar itself"
            )
        for path in written:
            path.replace(folder / path.name)
    except (EOFError, zlib.error, ValueError, KeyError, TypeError) as e:
        if isinstance(e, KDError):
            raise
        raise KDError(
            f"{shard} or {cuts_path} is damaged ({type(e).__name__}): make it again"
        ) from None
    except OSError as e:
        raise KDError(
            f"{folder} can't be written to ({e.strerror or e}): free space or mend the "
            "path, and give the same command again"
        ) from None
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    click.echo(f"{folder}: targets of {n} cuts in {len(written)} shards of {FIELD}")

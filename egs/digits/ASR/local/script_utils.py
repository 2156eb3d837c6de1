"""Common functions of this folder's scripts: refusals, logging, staged outputs and
manifests as plain JSON lines."""

import argparse
import gzip
import json
import logging
import shutil
import sys
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence

from icefall_kd import KDError
from icefall_kd.errors import disk_errors, require

MOST = 10**6  # the upper bound of options that count something
MOST_THREADS = 1024
LOG_FORMAT = "%(asctime)s %(levelname)s [%(filename)s:%(lineno)d] %(message)s"


def run_script(main: Callable[[], None]) -> None:
    """Run ``main``; a refusal becomes one line on stderr and exit status 1."""
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO)
    try:
        with disk_errors():
            main()
    except KDError as e:
        print(f"{Path(sys.argv[0]).name}: error: {e.sentence}", file=sys.stderr)
        sys.exit(1)


def str2bool(value: str) -> bool:
    """Return the truth of ``value``; the type of a switch, as in icefall's scripts."""
    if value.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if value.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"true or false expected, got {value!r}")


def check_range(value: int, least: int, option: str, most: int = MOST) -> None:
    """Refuse a value of an option outside of ``least`` to ``most``."""
    require(
        value >= least,
        f"{option} is {value} but must be at least {least}, give a larger number",
    )
    require(
        value <= most,
        f"{option} is {value} but must be at most {most}, give a smaller number",
    )


@contextmanager
def staged_dir(parent: Path) -> Iterator[Path]:
    """Yield a scratch folder inside ``parent``, which is removed at the end.

    Finished files are renamed from it to their place, so that no output is ever
    half-written. If the body fails, new parents are removed too.
    """
    new_folders = [p for p in [parent, *parent.parents] if not p.exists()]
    scratch = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=parent))
        yield scratch
    except BaseException:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for p in new_folders:
            if p.is_dir() and not any(p.iterdir()):
                p.rmdir()
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def replace_dir(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, which is replaced if it exists."""
    if target.exists():
        target.rename(source.with_name(source.name + ".old"))
    source.rename(target)


def read_rows(path: Path, keys: Sequence[str]) -> List[Dict[str, Any]]:
    """Read a JSON list of dictionaries from ``path``, each with all ``keys``."""
    try:
        rows = json.loads(path.read_text("utf8"))
    except ValueError as e:
        raise KDError(f"{path} is damaged ({e}), make it again") from None
    if not rows or not isinstance(rows, list):
        raise KDError(f"{path} holds no list of rows, make it again")
    for row in rows:
        lacking = set(keys) - set(row if isinstance(row, dict) else ())
        if lacking:
            raise KDError(f"a row of {path} lacks {min(lacking)}, make it again")
    return rows


def words_of(text: str, option: str) -> List[str]:
    """Return the words of ``text``, the value of ``option``; there must be one."""
    words = text.split()
    if not words:
        raise KDError(f"{option} is {text!r} and names nothing, give a name or more")
    return words


def write_manifest(path: Path, items: Iterable[Dict[str, Any]]) -> None:
    """Write ``items`` to ``path`` as .jsonl.gz.

    There is no time stamp in it, so that equal items give equal bytes.
    """
    with open(path, "wb") as raw:
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as f:
            for item in items:
                f.write((json.dumps(item, ensure_ascii=False) + "\n").encode())


def read_manifest(path: Path) -> List[Dict[str, Any]]:
    """Read the cuts of ``path``, a .jsonl.gz or .jsonl, as dictionaries."""
    if not path.is_file():
        raise KDError(
            f"the manifest {path} does not exist, run the stage that makes it or name "
            "another"
        )
    try:
        opened = gzip.open if path.name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as f:
            items = [json.loads(line) for line in f if line.strip()]
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as e:
        raise KDError(
            f"the manifest {path} is damaged ({e}), make it again from the start"
        ) from e
    if not items:
        raise KDError(f"the manifest {path} holds 0 cuts, make it again with some")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict) or "id" not in item:
            raise KDError(
                f"line {number} of {path} is not a cut, name a manifest of cuts"
            )
    return items

#!/usr/bin/env python3
"""Plug every Zipformer recipe of icefall, and all revisions of one train.py.

Usage:

  tools/plug_table.py --icefall ~/icefall [--json plug.json]

The checkout is only read: its files at HEAD, and at all commits that touched
librispeech's train.py, are unpacked elsewhere first. `plugged` stands only where
all of this holds: the file compiles; at most 12 lines were inserted into a training
script and 4 into a data module, and no other changed; plugging again, and plugging the
copy, give the same bytes; `--undo` gives back those of the recipe; the recipe itself is
as it was. Exit status 1: something was plugged, and one of these does not hold.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

from icefall_kd.errors import KDError
from icefall_kd.plug.copies import Plan
from icefall_kd.plug.plug import FOREIGN, PLUGGED, examine, plug, undo

TRAIN = "egs/librispeech/ASR/zipformer/train.py"


def unpack(icefall: Path, commit: str, folder: str, to: Path) -> Path:
    """The files of ``folder`` at ``commit``, below ``to``."""
    with tempfile.TemporaryFile() as archive:
        command = ["git", "-C", str(icefall), "archive", commit, folder]
        subprocess.run(command, check=True, stdout=archive)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            # Links between recipes lead out of their folders, and stay links.
            safe = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
            tar.extractall(to, **safe)
    return to


def snapshot(folder: Path) -> Dict[str, Any]:
    return {
        str(p.relative_to(folder)): p.readlink() if p.is_symlink() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def inserted(before: bytes, after: bytes) -> int:
    """How many lines were inserted; -1 if any other was changed or lost."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    rest = iter(new)
    return len(new) - len(old) if all(line in rest for line in old) else -1


def faults(plan: Plan, new: Path) -> List[str]:
    """What does not hold of a copy that was just made; afterwards it is undone."""
    problems = []
    for name, after in plan.plugged.items():
        compile(after, name, "exec", dont_inherit=True)
        most = 12 if name.startswith(("train", "finetune")) else 4
        if not 0 < inserted((plan.recipe / name).read_bytes(), after) <= most:
            problems.append(f"{name}: more lines than {most}, or others changed")
    first = snapshot(new)
    if plug(plan.recipe, new, plan.left_out) is not None or snapshot(new) != first:
        problems.append("plugging again differs")
    again = new.with_name(f"{new.name}_again")
    plug(new, again, plan.left_out)
    if any((again / name).read_bytes() != first[name] for name in plan.plugged):
        problems.append("plugging the copy differs")
    if examine(new).state != PLUGGED:
        problems.append("--check does not say plugged")
    undo(new)
    if examine(new).state != FOREIGN:
        problems.append("--check does not say foreign after --undo")
    for name in (*plan.plugged, *plan.copied):
        if (new / name).read_bytes() != (plan.recipe / name).read_bytes():
            problems.append(f"--undo does not give back {name}")
    return problems


def plug_what_can_be(folder: Path, new: Path, names: List[str]) -> Tuple[Any, Dict]:
    """The plan of what could be plugged, or None; and why a script could not."""
    refused: Dict[str, str] = {}
    while True:
        try:
            return plug(folder, new, refused), refused
        except KDError as e:
            reason = e.sentence.split("; or leave it")[0]
            bad = [n for n in names if f"/{n} " in reason and n not in refused]
            if not bad or len(refused) + 1 >= len(names):
                left = {n: reason for n in names if n not in refused}
                return None, {**refused, **left}
            refused[bad[0]] = reason


def rows_of(root: Path, scratch: Path, only: str = "") -> List[Dict[str, Any]]:
    """A row for each training script of each Zipformer recipe below ``root``."""
    rows = []
    for folder in sorted(root.glob("egs/*/ASR/zipformer*")):
        names = [p.name for p in sorted(folder.glob("*.py"))]
        names = [n for n in names if n.startswith(("train", "finetune"))]
        if not names or (only and folder != (root / only).parent):
            continue
        before = snapshot(folder)
        new = Path(tempfile.mkdtemp(dir=scratch)) / folder.name
        plan, refused = plug_what_can_be(folder, new, names)
        problems = faults(plan, new) if plan else []
        if snapshot(folder) != before:
            problems.append("the recipe was changed")
        for name in names:
            row = {"file": str((folder / name).relative_to(root)), "lines": 0}
            row["link"] = (folder / name).is_symlink()
            if plan and name in plan.plugged:
                data = [n for n in plan.plugged if n not in names]
                row["lines"] = inserted(plan.before[name], plan.plugged[name])
                row["data_lines"] = sum(
                    inserted(plan.before[n], plan.plugged[n]) for n in data
                )
                row["result"] = "FAULTY" if problems else "plugged"
                row["why"] = "; ".join([*problems, *plan.notes])
            elif name in refused:
                row["result"] = "refused"
                row["why"] = refused[name]
            else:
                continue  # not one that trains
            row["why"] = row["why"].replace(f"{root}/", "")
            rows.append(row)
    return rows


def show(title: str, rows: List[Dict[str, Any]]) -> None:
    real = [r for r in rows if not r["link"]]
    done = sum(r["result"] == "plugged" for r in real)
    links = f", and {len(rows) - len(real)} link" if len(rows) > len(real) else ""
    print(f"\n{title}: {done} of {len(real)} plugged{links}\n")
    print("| file | | lines | in its data module | remark |")
    print("|---|---|---|---|---|")
    for r in rows:
        cells = (r["file"], r["result"], r["lines"], r.get("data_lines", 0), r["why"])
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--icefall", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="Write the rows there, too.")
    args = parser.parse_args()

    def git(*words: str) -> List[str]:
        command = ["git", "-C", str(args.icefall), *words]
        done = subprocess.run(command, check=True, capture_output=True, encoding="utf8")
        return done.stdout.split("\n")[:-1]

    head = git("log", "-1", "--format=%h, %cs")[0]
    commits = git("log", "--format=%h, %cs", "--", TRAIN)
    with tempfile.TemporaryDirectory() as scratch:
        tmp = Path(scratch)
        current = rows_of(unpack(args.icefall, "HEAD", "egs", tmp / "head"), tmp)
        history = []
        for commit in commits:
            name = commit.split(",")[0]
            root = unpack(args.icefall, name, str(Path(TRAIN).parents[1]), tmp / name)
            for row in rows_of(root, tmp, only=TRAIN):
                if row["file"] == TRAIN:
                    history.append({**row, "file": commit})
    show(f"Zipformer recipes of icefall ({head})", current)
    show(f"Revisions of {TRAIN}", history)
    if args.json:
        tables = {"icefall": head, "recipes": current, "revisions": history}
        args.json.write_text(json.dumps(tables, indent=1) + "\n", "utf8")
    sys.exit(any(r["result"] == "FAULTY" for r in current + history))


if __name__ == "__main__":
    main()

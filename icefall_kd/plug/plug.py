"""Makes a plugged copy of a recipe, checks it, and takes the lines out again.

The recipe itself is never written to, nor are the files that it links to.

The file ``.icefall_kd.json`` of the copy names its recipe, and holds the SHA-256 of
each file that is not a link, without the inserted lines. So a later change on either
side is noticed.
"""

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

from icefall_kd import __version__
from icefall_kd.errors import KDError
from icefall_kd.files import replacing, temporary_name
from icefall_kd.plug.copies import (
    Plan,
    hash_unplugged,
    make_plan,
    recipe_folder,
    sha256,
    training_scripts,
)
from icefall_kd.plug.lines import StaleLines
from icefall_kd.plug.source import is_marked, unplug

RECORD = ".icefall_kd.json"
PLUGGED, STALE, FOREIGN = "plugged", "stale", "foreign"


@dataclass
class Report:
    """The state of a recipe folder, from :func:`examine`."""

    state: str  # PLUGGED, STALE or FOREIGN
    reasons: List[str] = field(default_factory=list)  # why it is stale or foreign
    edited: List[str] = field(default_factory=list)  # files changed by hand


def read_record(folder: Path) -> Optional[Dict[str, Any]]:
    """Read the ``.icefall_kd.json`` of a copy.

    Args:
      folder: Any recipe folder.

    Returns:
      The file's content; None where the folder has none, and so is no copy.

    Raises:
      KDError: The file is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf8"))
        if any(Path(name).name != name for name in dict(record["files"])):
            raise ValueError("a file outside the folder")
        if not set(record["plugged"]) <= set(record["files"]):
            raise ValueError("plugged files that it does not have")
        kinds = {"recipe": str, "version": str, "leave_out": list, "plugged": list}
        for key, kind in {**kinds, "files": dict}.items():
            if not isinstance(record[key], kind):
                raise TypeError(key)
        return {key: record[key] for key in (*kinds, "files")}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KDError(
            f"{path} is damaged: plug the recipe anew, into another folder"
        ) from None


def _write_copy(plan: Plan, new: Path, stage: Path) -> None:
    """Write a copy into ``stage``, with links that lead right once it is ``new``."""
    for name, data in {**plan.plugged, **plan.copied}.items():
        (stage / name).write_bytes(data)
        mode = (plan.recipe / name).stat().st_mode
        (stage / name).chmod(mode & 0o777 | 0o200)
    origin = Path(os.path.relpath(plan.recipe.resolve(), new.resolve()))
    try:
        for name in plan.linked:
            (stage / name).symlink_to(origin / name)
    except (OSError, NotImplementedError) as e:
        raise KDError(
            f"symbolic links can't be made for {new} ({getattr(e, 'strerror', e)}), "
            "and a working copy has one for each file that stays as it is: give a "
            "folder on another file system, or on Windows switch on its developer mode"
        ) from None
    record = {
        "recipe": str(origin),
        "version": __version__,
        "leave_out": plan.left_out,
        "plugged": list(plan.plugged),
        "files": plan.hashes(),
    }
    (stage / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf8")


def plug(
    recipe_dir: object, new_dir: object, leave_out: Iterable[str] = ()
) -> Optional[Plan]:
    """Make a plugged copy of a recipe, all of it or nothing.

    Args:
      recipe_dir: The folder of the recipe's train.py.
      new_dir: The folder of the copy. It does not exist, or is empty, or is a copy of
        the same recipe whose lines were taken out.
      leave_out: The training scripts that are not to be plugged.

    Returns:
      The copy's files; None where the copy exists and is up to date.

    Raises:
      KDError: The recipe can't be plugged, or ``new_dir`` can't be the copy.
    """
    leave_out = sorted(set(leave_out))
    plan = make_plan(recipe_dir, leave_out)
    new, recipe = Path(new_dir), plan.recipe.resolve()
    target = new.resolve()
    if recipe in (target, *target.parents) or target in recipe.parents:
        raise KDError(
            f"the new folder {new} and the recipe {plan.recipe} must not lie in each "
            f"other: give one beside it, such as {plan.recipe}_kd"
        )
    if not target.parent.is_dir():
        raise KDError(
            f"the new folder {new} can't be made, as {new.parent} is no folder: mend "
            "the path"
        )
    is_empty_folder = new.is_dir() and not any(new.iterdir())
    exists = os.path.lexists(new) and not is_empty_folder
    if exists and _is_up_to_date(new, recipe, leave_out):
        return None
    stage = temporary_name(target)
    try:
        stage.mkdir()
        _write_copy(plan, new, stage)
        if exists:
            for name in sorted(os.listdir(stage), key=lambda name: name == RECORD):
                # A file in the place of a link may be the user's own by now.
                if name not in plan.linked or not os.path.lexists(target / name):
                    os.replace(stage / name, target / name)
        else:
            os.replace(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return plan


def _is_up_to_date(new: Path, recipe: Path, leave_out: List[str]) -> bool:
    """Whether ``new`` is a plugged copy; False for one whose lines were taken out.

    Anything else that would be lost is refused.
    """
    record = read_record(new)
    if record is None:
        raise KDError(
            f"{new} exists, and is no working copy that icefall-kd made: give another "
            "folder, or move it away"
        )
    _check_origin(new, record, recipe)
    report = examine(new)
    if report.state == PLUGGED and record["leave_out"] == leave_out:
        return True
    if report.state != FOREIGN:
        left_out = ",".join(record["leave_out"]) or "nothing"
        reasons = [*report.reasons, f"it was made with `leave_out` {left_out}"]
        raise KDError(
            f"{new} is a working copy already, but {reasons[0]}: run `icefall-kd plug "
            f"--undo {new}`, then plug again"
        )
    if report.edited:
        raise KDError(
            f"{new}/{report.edited[0]} was changed by hand since it was made, and "
            "would be lost: give another folder, or move the file away"
        )
    return False


def _check_origin(folder: Path, record: Dict[str, Any], recipe_dir: object) -> None:
    origin, wanted = (folder / record["recipe"]).resolve(), Path(recipe_dir).resolve()
    if origin != wanted:
        raise KDError(
            f"{folder} is a working copy of {origin}, and not of {wanted}: mend one of "
            "the two folders"
        )


def examine(folder: object, recipe_dir: object = None) -> Report:
    """Find out whether a folder is plugged, with this version's lines.

    Args:
      folder: A copy, or any recipe.
      recipe_dir: The recipe that it must be a copy of; None for the one that its
        ``.icefall_kd.json`` names.

    Raises:
      KDError: It is no recipe, a copy of another one, or its record is damaged.
    """
    folder = recipe_folder(folder)
    record = read_record(folder)
    if record is None:
        return _examine_recipe(folder)
    if recipe_dir is not None:
        _check_origin(folder, record, recipe_dir)
    reasons = _changes_of_original(folder, record)
    edited, marked = [], []
    for name, expected in record["files"].items():
        path = folder / name
        if not path.is_file():
            reasons.append(f"{path} is gone")
            continue
        data = path.read_bytes()
        is_plugged = name in record["plugged"]
        if (hash_unplugged(data, path) if is_plugged else sha256(data)) != expected:
            edited.append(name)
        if is_plugged and _has_our_lines(data, path):
            marked.append(name)
    if not marked:
        return Report(FOREIGN, ["its lines were taken out"], edited)
    try:
        plan = make_plan(folder, record["leave_out"])
        for name, data in plan.plugged.items():
            if name in record["plugged"] and data != plan.before[name]:
                reasons.append(f"{folder / name} has lost its lines")
    except KDError as e:
        reasons.append(e.sentence)
    return Report(STALE if reasons else PLUGGED, reasons, edited)


def _changes_of_original(folder: Path, record: Dict[str, Any]) -> List[str]:
    """What has changed in the original since the copy was made, in words."""
    origin = (folder / record["recipe"]).resolve()
    try:
        plan = make_plan(folder / record["recipe"], record["leave_out"])
    except KDError as e:
        return [f"its original can't be plugged any more: {e.sentence}"]
    hashes = plan.hashes()
    changes = [
        f"{origin / name} has changed since"
        for name in sorted({*record["files"], *hashes})
        if hashes.get(name) != record["files"].get(name)
    ]
    return changes + [
        f"{origin / name} is missing here"
        for name in plan.linked
        if name.endswith(".py") and not os.path.lexists(folder / name)
    ]


def _has_our_lines(data: bytes, path: Path) -> bool:
    """Whether a file carries lines of icefall_kd, even if it does not parse."""
    try:
        return is_marked(data, path)
    except KDError:
        return b"icefall_kd" in data


def _examine_recipe(folder: Path) -> Report:
    """The state of a folder that is no copy."""
    marked = [
        path.name
        for path in sorted(folder.glob("*.py"))
        if path.is_file() and _has_our_lines(path.read_bytes(), path)
    ]
    if not marked:
        training_scripts(folder, ())  # a folder without any is no recipe at all
        return Report(FOREIGN, ["none of its files has a line of icefall_kd"])
    try:
        plan = make_plan(folder)
    except StaleLines as e:
        return Report(STALE, [e.sentence])
    lost = [n for n, d in plan.plugged.items() if d != plan.before[n]]
    if lost:
        return Report(STALE, [f"{folder / n} has not its lines" for n in lost])
    return Report(PLUGGED)


def undo(folder: object, recipe_dir: object = None) -> List[str]:
    """Take the lines out of a copy.

    Args:
      folder: The copy.
      recipe_dir: The recipe that it must be a copy of; None for the one that its
        ``.icefall_kd.json`` names.

    Returns:
      The names of the files that had lines.

    Raises:
      KDError: It is no copy, or its lines are not where they are inserted.
    """
    folder = recipe_folder(folder)
    record = read_record(folder)
    if record is None:
        raise KDError(
            f"{folder} is no working copy that icefall-kd made (it has no {RECORD}): "
            "take the lines of icefall_kd out by hand"
        )
    if recipe_dir is not None:
        _check_origin(folder, record, recipe_dir)
    unplugged = {}
    for name in record["plugged"]:
        path = folder / name
        if path.is_file():
            data = path.read_bytes()
            if is_marked(data, path):
                if path.is_symlink():
                    raise KDError(
                        f"{path} has become a link to {path.resolve()}, which would be "
                        "changed: make it a file of its own"
                    )
                unplugged[name] = unplug(data, path)
    with ExitStack() as stack:  # none takes its place before all are written
        for name, data in unplugged.items():
            temporary = stack.enter_context(replacing(folder / name))
            temporary.write_bytes(data)
            temporary.chmod((folder / name).stat().st_mode & 0o777)
    return sorted(unplugged)

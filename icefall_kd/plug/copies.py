"""The files of a plugged copy of a recipe.

The training scripts and their data module carry the lines of
:mod:`icefall_kd.plug.lines`. A script that imports one of them, directly or through
others, is copied: Python looks for a script's imports beside the file that a link leads
to, so a linked ``decode.py`` would import the original's ``train``. All other files are
links.
"""

import ast
import difflib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Set, Tuple

from icefall_kd.errors import KDError, require
from icefall_kd.plug.lines import data_module, plug_data_module, plug_train
from icefall_kd.plug.source import parse, scope, unplug

_OUTPUT = (".log", ".out", ".pt", ".pyc")  # of a training, not of a recipe


@dataclass
class Plan:
    """The files of a copy, by name."""

    recipe: Path
    left_out: List[str]  # training scripts that are not to be plugged
    before: Dict[str, bytes]  # the plugged files, as they are in the recipe
    plugged: Dict[str, bytes]  # the same files, with the lines
    copied: Dict[str, bytes]  # scripts that import a plugged file
    linked: List[str]
    notes: List[str]  # on scripts that can't use the copy's train

    def hashes(self) -> Dict[str, str]:
        """Return the SHA-256 of each plugged or copied file, without the lines."""
        plugged = {
            name: hash_unplugged(data, name) for name, data in self.before.items()
        }
        copied = {name: sha256(data) for name, data in self.copied.items()}
        return {**plugged, **copied}


def hash_unplugged(data: bytes, path: object) -> str:
    """Return the SHA-256 of a file without the lines that plug it.

    Args:
      data: The bytes of the file.
      path: Its name.
    """
    try:
        return sha256(unplug(data, path))
    except KDError:  # not a file that was plugged
        return sha256(data)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def recipe_folder(path: object) -> Path:
    """Return ``path`` as a folder, or refuse it."""
    folder = Path(path)
    problem = "is a file" if folder.is_file() else "does not exist"
    require(
        folder.is_dir(),
        f"the recipe folder {folder} {problem}: give the folder of the recipe's "
        "train.py, such as ./zipformer",
    )
    return folder


def _trains(name: str, data: bytes, path: Path) -> bool:
    """Whether a file is a script that trains, or can't be told from one."""
    if name in ("train.py", "finetune.py"):
        return True
    try:
        body = parse(data, path).body
    except KDError:
        return True
    return any(getattr(n, "name", "") == "compute_loss" for n in body)


def training_scripts(folder: Path, leave_out: Iterable[str]) -> Dict[str, bytes]:
    """Return the training scripts of a recipe, by file name.

    Args:
      folder: The recipe's.
      leave_out: The names of scripts that are left out.

    Raises:
      KDError: There are none, or a name of ``leave_out`` is no file.
    """
    scripts = {}
    for path in sorted(folder.glob("*.py")):
        name = path.name
        if name.startswith(("train", "finetune")) and path.is_file():
            data = path.read_bytes()
            if name not in leave_out and _trains(name, data, path):
                scripts[name] = data
    for name in leave_out:
        require(
            (folder / name).is_file(),
            f"`leave_out` {name}: {folder} holds no such file: mend the name",
        )
    require(
        scripts,
        f"the recipe folder {folder} holds no train.py or finetune.py to plug: give "
        "the folder of the recipe's train.py, such as ./zipformer",
    )
    return scripts


def _imports(tree: ast.Module) -> Iterator[Tuple[str, List[str]]]:
    """The modules that a file imports, with the names that it takes from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], []
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [a.name for a in node.names]
            module, _, inner = node.module.partition(".")
            yield module, [] if inner else names


def _defines(tree: ast.Module) -> Set[str]:
    """The names at a module's top level."""
    names = set()
    for node in scope(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _lacking(name: str, folder: Path, trees: Dict[str, ast.Module]) -> str:
    """What a script imports from its own folder that ``folder`` lacks; "" for nothing.

    A script's own folder is the one that a link leads to.
    """
    home = (folder / name).resolve().parent
    if home == folder.resolve():
        return ""
    for module, names in _imports(trees[name]):
        if not (home / f"{module}.py").is_file():
            continue
        if f"{module}.py" not in trees:
            return module
        known = _defines(trees[f"{module}.py"])
        for wanted in names:
            if wanted not in known and not {"*"} & {wanted, *known}:
                return f"{module}.{wanted}"
    return ""


def make_plan(recipe_dir: object, leave_out: Iterable[str] = ()) -> Plan:
    """Return the files of a plugged copy of a recipe; nothing is written.

    Args:
      recipe_dir: The folder of the recipe's train.py.
      leave_out: The training scripts that are not to be plugged.

    Raises:
      KDError: A training script or its data module can't be plugged.
    """
    folder = recipe_folder(recipe_dir)
    before = training_scripts(folder, leave_out)
    plugged = {}
    classes: Dict[str, Set[str]] = {}
    for name, data in before.items():
        path = folder / name
        try:
            require(
                path.resolve().parent == folder.resolve(),
                f"{path} is a link to {path.resolve()}, so Python takes its data "
                "module and its model from there: plug that recipe",
            )
            plugged[name] = plug_train(data, path)
            module = data_module(plugged[name], path)
            require(
                (folder / f"{module.name}.py").is_file(),
                f"{path} (line {module.line}) imports its data module from "
                f"{module.name}, and {folder} has no {module.name}.py: put it there",
            )
        except KDError as e:
            if len(before) == 1:
                raise
            message = f"{e.sentence}; or leave it as it is by `leave_out` {name}"
            raise type(e)(message) from None
        classes.setdefault(f"{module.name}.py", set()).add(module.class_name)
    for name, class_names in classes.items():
        before[name] = (folder / name).read_bytes()
        plugged[name] = plug_data_module(before[name], folder / name, class_names)

    plan = Plan(folder, sorted(leave_out), before, plugged, {}, [], [])
    _add_scripts(plan)
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in {**plugged, **plan.copied} or name.startswith((".", "__pycache__")):
            continue
        holds_programs = path.is_dir() and any(path.glob("*.py"))
        if holds_programs or (path.is_file() and not name.endswith(_OUTPUT)):
            plan.linked.append(name)
    return plan


def _add_scripts(plan: Plan) -> None:
    """Add the scripts that import a plugged file, directly or through others."""
    sources, trees = {}, {}
    for path in sorted(plan.recipe.glob("*.py")):
        if path.is_file():
            sources[path.name] = path.read_bytes()
            try:
                trees[path.name] = parse(sources[path.name], path)
            except KDError:  # it can't run either, wherever it stands
                continue
    not_linked, size = set(plan.plugged), 0
    while len(not_linked) > size:
        size = len(not_linked)
        for name, tree in trees.items():
            if any(f"{module}.py" in not_linked for module, _ in _imports(tree)):
                not_linked.add(name)
    for name in sorted(not_linked - set(plan.plugged)):
        lacking = _lacking(name, plan.recipe, trees)
        if lacking:
            plan.notes.append(
                f"{name} stays a link, and uses the recipe that it leads to: it wants "
                f"{lacking}, which {plan.recipe} does not have"
            )
        else:
            plan.copied[name] = sources[name]


def diff(plan: Plan, new_dir: object) -> bytes:
    """Return the patch that plugs a recipe, as ``diff -u`` writes it.

    Args:
      plan: The copy's files.
      new_dir: The folder of the copy, which the patch names.
    """
    patch = []
    for name, after in plan.plugged.items():
        for line in difflib.diff_bytes(
            difflib.unified_diff,
            _lines(plan.before[name]),
            _lines(after),
            os.fsencode(plan.recipe / name),
            os.fsencode(Path(str(new_dir)) / name),
        ):
            end = b"" if line.endswith(b"\n") else b"\n\\ No newline at end of file\n"
            patch.append(line + end)
    return b"".join(patch)


def _lines(data: bytes) -> List[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", data)  # as patch counts them

#!/usr/bin/env python3
"""
Print docs/refusals.md: every refusal of the package, from the code itself.

Usage: tools/refusals_table.py > docs/refusals.md
"""

import ast
import re
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

PACKAGE = Path(__file__).resolve().parents[1] / "icefall_kd"
# Calls that refuse, and the place of their sentence among the arguments.
CALLS = {"KDError": 0, "NotFiniteError": 0, "UsageError": 0, "require": 1}
GAP = "…"
# Without one of these a text is part of a sentence, and not one.
VERB = re.compile(r"\b(is|are|has|have|holds|goes|takes|lacks|Missing|gives|can't)\b")
# Each area of the page: its title, and its folders and modules.
AREAS = {
    "Commands and their options": "cli errors.py files.py memory.py distributed.py",
    "Recipes that are plugged": "plug recipe.py",
    "Teachers": "teacher tap.py zipformer.py rnnt.py model_state.py",
    "Tokens": "tokens",
    "Targets and their stores": "targets kinds types.py lattice.py",
    "Students": "student rounding.py",
    "Losses": "losses terms",
    "Training": "training",
    "Pseudo-labels": "labels",
    "Decoding": "decode transcripts",
    "Export": "export",
    "Report and forecast": "report forecast",
}
INTRODUCTION = f"""# All refusals

`tools/refusals_table.py` makes this page from the code. It has each sentence that ends
a command or a training. `{GAP}` stands for a name, a path or a value of yours. Search
the page for some words of your sentence. A name in backticks is a parameter; commands
say their option in its place. [When it goes wrong](en/errors.md) explains the most
frequent ones, also in [Chinese](zh/errors.md).
"""


def texts(node: ast.AST, module: ast.Module, depth: int = 0) -> List[str]:
    """Return what an expression may say, with gaps for values.

    Args:
      node: An expression that gives a sentence.
      module: The file's tree, in which names and functions are looked up.
      depth: How many names were looked up on the way.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else GAP for v in node.values)
        return ["".join(parts)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left = texts(node.left, module, depth) or [GAP]
        right = texts(node.right, module, depth) or [GAP]
        return [a + b for a in left for b in right]
    if isinstance(node, ast.IfExp):
        return texts(node.body, module, depth) + texts(node.orelse, module, depth)
    if depth > 2:
        return []
    found = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for function in ast.walk(module):
            named = isinstance(function, ast.FunctionDef)
            if named and function.name == node.func.id:
                returns = (n for n in ast.walk(function) if isinstance(n, ast.Return))
                values = [n.value for n in returns if n.value is not None]
                found += [x for v in values for x in texts(v, module, depth + 1)]
    elif isinstance(node, ast.Name):
        for assignment in ast.walk(module):
            if isinstance(assignment, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == node.id for t in assignment.targets
            ):
                found += texts(assignment.value, module, depth + 1)
    return found


def refusals(path: Path) -> Iterator[str]:
    """The sentences of a file's refusals.

    Args:
      path: A file of Python.
    """
    module = ast.parse(path.read_text("utf8"))
    for call in ast.walk(module):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        place = CALLS.get(name, len(call.args))
        if place < len(call.args):
            for text in texts(call.args[place], module):
                yield " ".join(text.split())


def cause_and_cure(sentence: str) -> Tuple[str, str]:
    """Split a refusal where its remedy begins; either part may be empty.

    Args:
      sentence: The sentence of a refusal.
    """
    cause, colon, cure = sentence.rpartition(": ")
    if colon and len(cure) > len(GAP):
        return cause, cure
    cause, must, cure = sentence.partition(" must be ")
    if must:
        return cause.removesuffix(" and").removesuffix(","), f"It must be {cure}"
    return (sentence, "") if VERB.search(sentence) else ("", "")


def cell(text: str) -> str:
    """A text as a table's cell; code in backticks stays as it is.

    Args:
      text: A part of a sentence.
    """
    parts = text.replace("|", "\\|").split("`")
    if len(parts) % 2 == 0:
        parts = ["".join(parts)]
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*\[\]_~])", r"\\\1", parts[i]).replace("<", "&lt;")
    return "`".join(parts)


def area_files(names: str) -> Iterator[Path]:
    """The files of an area.

    Args:
      names: Its folders and modules, separated by spaces.
    """
    for name in names.split():
        path = PACKAGE / name
        yield from [path] if path.suffix else sorted(path.rglob("*.py"))


def section(title: str, names: str) -> List[str]:
    """The lines of an area: a title, and a table in the order of its sentences.

    Args:
      title: The area's title.
      names: Its folders and modules, separated by spaces.
    """
    places: Dict[Tuple[str, str], Set[str]] = {}
    for path in area_files(names):
        for sentence in refusals(path):
            cause, cure = cause_and_cure(sentence)
            if cause.strip(GAP + " "):
                place = str(path.relative_to(PACKAGE))
                places.setdefault((cause, cure), set()).add(f"`{place}`")
    lines = [f"## {title}", "", "| what it says | what to do | file |", "|---|---|---|"]
    for (cause, cure), files in sorted(places.items()):
        files_cell = ", ".join(sorted(files))
        lines.append(f"| {cell(cause)} | {cell(cure)} | {files_cell} |")
    return lines


def main() -> None:
    lines = [INTRODUCTION]
    for title, names in AREAS.items():
        lines += [*section(title, names), ""]
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    main()

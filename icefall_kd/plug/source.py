"""A recipe's file: its bytes, lines and syntax tree, and taking our lines out of it.

A file is only ever added to, by whole lines, so whatever its layout, encoding and line
endings are, they stay.
"""

import ast
import warnings
from typing import Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

from icefall_kd.errors import KDError

BY_HAND = "plug it by hand, as the docstring of icefall_kd.training.session shows"

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_COMPOUND = ("body", "cases")  # what statements that hold statements have


class Place(NamedTuple):
    """A line to be inserted."""

    index: int  # it becomes the file's line of this index, counted from 0
    indent: bytes  # that of the statement beside it
    code: str


def parse(data: bytes, path: object) -> ast.Module:
    """The syntax tree of a file.

    Raises:
      KDError: it is no Python that this Python reads.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on escapes such as "\d"
            return ast.parse(data)
    except (SyntaxError, ValueError, RecursionError) as e:
        line = getattr(e, "lineno", None)
        what = getattr(e, "msg", None) or str(e)
        raise KDError(
            f"{path}{f' (line {line})' if line else ''} is not valid Python: {what}: "
            "mend it, until `python3 -m py_compile` takes it"
        ) from None


def scope(node: ast.AST, skip: tuple = _SCOPES) -> Iterator[ast.AST]:
    """What stands below ``node``, but not in functions and classes of its own."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, skip):
            yield from scope(child, skip)


def binds(statement: ast.AST, *names: str) -> bool:
    """Whether a statement gives one of these variables a value."""
    nodes = [statement, *scope(statement, (*_SCOPES, *_COMPREHENSIONS))]
    return any(
        isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in names
        for n in nodes
    )


def called(node: ast.AST) -> str:
    """The last part of the name that a call calls; "" where there is no call."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def assigned(node: ast.AST, *functions: str) -> str:
    """NAME in ``NAME = FUNCTION(...)``, else ""."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return ""
    if functions and called(node.value) not in functions:
        return ""
    targets = getattr(node, "targets", None) or [node.target]
    return getattr(targets[0], "id", "") if len(targets) == 1 else ""


class RecipeFile:
    """A file of a recipe: its bytes, lines and syntax tree."""

    def __init__(self, data: bytes, path: object) -> None:
        self.data, self.path = data, path
        self.tree = parse(data, path)
        self.lines = data.splitlines(keepends=True)  # as Python counts them

    def refusal(self, where: object, reason: str, remedy: str = BY_HAND) -> KDError:
        line = getattr(where, "lineno", where)
        return KDError(f"{self.path} (line {line}): {reason}: {remedy}")

    def function(self, name: str) -> ast.FunctionDef:
        found = [n for n in self.tree.body if getattr(n, "name", "") == name]
        if len(found) != 1 or not isinstance(found[0], ast.FunctionDef):
            where = found[-1].lineno if found else len(self.lines)
            raise self.refusal(
                where, f"there are {len(found)} functions {name}, and must be one"
            )
        return found[0]

    def one(self, where: object, what: str, found: Iterable[str]) -> str:
        """The one name in ``found``, where "" stands for what is no name."""
        names = sorted({name or "an expression" for name in found})
        if len(names) != 1 or not names[0].isidentifier():
            given = " and ".join(names) or "none"
            raise self.refusal(where, f"one {what} is expected, and found: {given}")
        return names[0]

    def index(self, body: List[ast.stmt], node: ast.AST) -> int:
        """The index of the statement of ``body`` that holds ``node``."""
        return next(i for i, s in enumerate(body) if node in (s, *scope(s)))

    def _indent(self, statement: ast.stmt) -> bytes:
        indent = self.lines[statement.lineno - 1][: statement.col_offset]
        if indent.strip():
            raise self.refusal(
                statement, "a statement shares its line with another", "break the line"
            )
        return indent

    def before(self, statement: ast.stmt, code: str) -> Place:
        return Place(statement.lineno - 1, self._indent(statement), code)

    def after(self, body: List[ast.stmt], index: int, code: str) -> Place:
        """A line behind a statement that is not the last of its block."""
        here, following = body[index], body[index + 1]
        if following.lineno <= here.end_lineno:
            raise self.refusal(
                following, "a statement shares its line with another", "break the line"
            )
        return Place(here.end_lineno, self._indent(here), code)

    def insert(self, places: List[Place]) -> bytes:
        lines = list(self.lines)
        for place in sorted(places, reverse=True):
            ending = b"\n"
            for known in (b"\r\n", b"\r"):
                if self.lines[place.index - 1].endswith(known):
                    ending = known
                    break
            lines.insert(place.index, place.indent + place.code.encode() + ending)
        return b"".join(lines)


# Where the session lives, and where it lived before: a copy that was plugged then is
# stale, and its lines come out like any others.
SESSION_ROOMS = ("icefall_kd.training.", "icefall_kd.recipe.")


def marks(tree: ast.Module) -> Tuple[List[ast.stmt], Optional[ast.AST]]:
    """The statements that plug a file, and what else speaks of the session."""
    names: Set[str] = set()
    found: List[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            continue
        if any(f"{name}.".startswith(SESSION_ROOMS) for name in full):
            found.append(node)
            names |= {a.asname or a.name.partition(".")[0] for a in node.names}
    if not names:
        return found, None
    mentioned = [n for n in ast.walk(tree) if getattr(n, "id", None) in names]
    for node in ast.walk(tree):
        compound = any(hasattr(node, field) for field in _COMPOUND)
        if isinstance(node, ast.stmt) and not compound:
            mine = [n for n in ast.walk(node) if n in mentioned]
            if mine:
                found.append(node)
                mentioned = [n for n in mentioned if n not in mine]
    return found, mentioned[0] if mentioned else None


def is_marked(data: bytes, path: object) -> bool:
    """Whether a file carries lines that plug it, of whatever version."""
    return bool(marks(parse(data, path))[0])


def unplug(data: bytes, path: object) -> bytes:
    """The file without the lines that plug it.

    Raises:
      KDError: those lines stand where nothing inserts them.
    """
    file = RecipeFile(data, path)
    found, other = marks(file.tree)
    if not found:
        return data
    remedy = "take the lines of icefall_kd out by hand"
    if other is not None:
        raise file.refusal(other, "icefall_kd stands within another statement", remedy)
    drop: Set[int] = set()
    for statement in found:
        last = file.lines[statement.end_lineno - 1][statement.end_col_offset :].strip()
        first = file.lines[statement.lineno - 1][: statement.col_offset].strip()
        if first or (last and not last.startswith(b"#")):
            raise file.refusal(
                statement, "icefall_kd shares its line with another statement", remedy
            )
        drop |= set(range(statement.lineno - 1, statement.end_lineno))
    bare = b"".join(line for i, line in enumerate(file.lines) if i not in drop)
    try:
        parse(bare, path)
    except KDError:
        raise file.refusal(
            found[-1], "without icefall_kd's lines no program is left", remedy
        ) from None
    return bare

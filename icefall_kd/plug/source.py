"""A recipe's file: its bytes, lines and syntax tree; and taking our lines out of it.

A file is changed by adding whole lines only, so its layout, encoding and line endings
stay as they are.
"""

import ast
import warnings
from typing import Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

from icefall_kd.errors import KDError

BY_HAND = "plug it by hand, as the docstring of icefall_kd.training.session shows"

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_COMPOUND = ("body", "cases")  # fields of statements that contain statements
_SHARED_LINE = ("a statement shares its line with another", "break the line")

# The module that plugged recipes import, and the one that former versions had. The
# lines of a copy that was plugged then are stale, and are taken out like any others.
SESSION_PACKAGES = ("icefall_kd.training.", "icefall_kd.recipe.")


class Place(NamedTuple):
    """A line to be inserted."""

    index: int  # it becomes the file's line of this index, counted from 0
    indent: bytes  # that of the statement beside it
    code: str


def parse(data: bytes, path: object) -> ast.Module:
    """Return the syntax tree of a file.

    Args:
      data: The bytes of the file.
      path: Its name, for messages.

    Raises:
      KDError: This Python can't parse it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on escapes such as "\d"
            return ast.parse(data)
    except (SyntaxError, ValueError, RecursionError) as e:
        line = f" (line {e.lineno})" if getattr(e, "lineno", None) else ""
        problem = getattr(e, "msg", None) or str(e)
        raise KDError(
            f"{path}{line} is not valid Python: {problem}: mend it, until "
            "`python3 -m py_compile` takes it"
        ) from None


def scope(node: ast.AST, skip: tuple = _SCOPES) -> Iterator[ast.AST]:
    """Yield the nodes below ``node`` that are in its own scope.

    Args:
      node: A function or statement.
      skip: Types of nodes that are yielded, and whose inner nodes are not.
    """
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, skip):
            yield from scope(child, skip)


def binds(statement: ast.AST, *names: str) -> bool:
    """Whether ``statement`` gives one of the variables ``names`` a value."""
    nodes = [statement, *scope(statement, (*_SCOPES, *_COMPREHENSIONS))]
    return any(
        isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in names
        for n in nodes
    )


def called(node: ast.AST) -> str:
    """Return the last part of the name that ``node`` calls; "" if it is no call."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def assigned(node: ast.AST, *functions: str) -> str:
    """Return NAME if ``node`` is ``NAME = FUNCTION(...)``, else "".

    Args:
      node: A statement.
      functions: The names that FUNCTION may have; none: any value may be assigned.
    """
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return ""
    if functions and called(node.value) not in functions:
        return ""
    targets = getattr(node, "targets", None) or [node.target]
    return getattr(targets[0], "id", "") if len(targets) == 1 else ""


class RecipeFile:
    """A file of a recipe: its bytes, lines and syntax tree.

    Args:
      data: The bytes of the file.
      path: Its name, for messages.

    Raises:
      KDError: This Python can't parse it.
    """

    def __init__(self, data: bytes, path: object) -> None:
        self.data, self.path = data, path
        self.tree = parse(data, path)
        self.lines = data.splitlines(keepends=True)  # as Python counts them

    def refusal(self, location: object, reason: str, remedy: str = BY_HAND) -> KDError:
        """Return the error that names a line of this file.

        Args:
          location: A node of the syntax tree, or the number of a line.
          reason: What is wrong in that line.
          remedy: What the user can do.
        """
        line = getattr(location, "lineno", location)
        return KDError(f"{self.path} (line {line}): {reason}: {remedy}")

    def function(self, name: str) -> ast.FunctionDef:
        """Return the file's only function ``name``.

        Raises:
          KDError: There is none of that name, or several.
        """
        functions = [n for n in self.tree.body if getattr(n, "name", "") == name]
        if len(functions) != 1 or not isinstance(functions[0], ast.FunctionDef):
            raise self.refusal(
                functions[-1].lineno if functions else len(self.lines),
                f"there are {len(functions)} functions {name}, and must be one",
            )
        return functions[0]

    def only_name(
        self, location: object, description: str, candidates: Iterable[str]
    ) -> str:
        """Return the one name that all of ``candidates`` are.

        Args:
          location: A node or the number of a line, for the message.
          description: What the name is of, for the message.
          candidates: Names; "" stands for an expression that is no name.

        Raises:
          KDError: There are several names, none, or an expression.
        """
        names = sorted({name or "an expression" for name in candidates})
        if len(names) != 1 or not names[0].isidentifier():
            listed = " and ".join(names) or "none"
            raise self.refusal(
                location, f"one {description} is expected, and found: {listed}"
            )
        return names[0]

    def index(self, body: List[ast.stmt], node: ast.AST) -> int:
        """Return the index of the statement of ``body`` that contains ``node``."""
        return next(i for i, s in enumerate(body) if node in (s, *scope(s)))

    def _indent(self, statement: ast.stmt) -> bytes:
        indent = self.lines[statement.lineno - 1][: statement.col_offset]
        if indent.strip():
            raise self.refusal(statement, *_SHARED_LINE)
        return indent

    def before(self, statement: ast.stmt, code: str) -> Place:
        """Return the place of a new line ``code`` before ``statement``."""
        return Place(statement.lineno - 1, self._indent(statement), code)

    def after(self, body: List[ast.stmt], index: int, code: str) -> Place:
        """Return the place of a new line after a statement that is not the last one.

        Args:
          body: The statements of a block.
          index: That of the statement in ``body``.
          code: The new line.
        """
        statement, following = body[index], body[index + 1]
        if following.lineno <= statement.end_lineno:
            raise self.refusal(following, *_SHARED_LINE)
        return Place(statement.end_lineno, self._indent(statement), code)

    def insert(self, places: List[Place]) -> bytes:
        """Return the file with the lines of ``places`` in it."""
        lines = list(self.lines)
        for place in sorted(places, reverse=True):
            ending = b"\n"
            for known in (b"\r\n", b"\r"):
                if self.lines[place.index - 1].endswith(known):
                    ending = known
                    break
            lines.insert(place.index, place.indent + place.code.encode() + ending)
        return b"".join(lines)


def marks(tree: ast.Module) -> Tuple[List[ast.stmt], Optional[ast.AST]]:
    """Return the statements that plug a file.

    Args:
      tree: The file's syntax tree.

    Returns:
      The imports of the session and the simple statements that use it; and a node that
      uses it within another statement, or None.
    """
    names: Set[str] = set()
    statements: List[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        if any(f"{module}.".startswith(SESSION_PACKAGES) for module in modules):
            statements.append(node)
            names |= {a.asname or a.name.partition(".")[0] for a in node.names}
    if not names:
        return statements, None
    uses = [n for n in ast.walk(tree) if getattr(n, "id", None) in names]
    for node in ast.walk(tree):
        compound = any(hasattr(node, field) for field in _COMPOUND)
        if isinstance(node, ast.stmt) and not compound:
            inner_uses = [n for n in ast.walk(node) if n in uses]
            if inner_uses:
                statements.append(node)
                uses = [n for n in uses if n not in inner_uses]
    return statements, uses[0] if uses else None


def is_marked(data: bytes, path: object) -> bool:
    """Whether a file carries lines that plug it, of whatever version.

    Args:
      data: The bytes of the file.
      path: Its name, for messages.
    """
    return bool(marks(parse(data, path))[0])


def unplug(data: bytes, path: object) -> bytes:
    """Return the file without the lines that plug it.

    Args:
      data: The bytes of the file.
      path: Its name, for messages.

    Raises:
      KDError: Those lines are not where they are inserted.
    """
    file = RecipeFile(data, path)
    statements, inner_use = marks(file.tree)
    if not statements:
        return data
    remedy = "take the lines of icefall_kd out by hand"
    if inner_use is not None:
        raise file.refusal(
            inner_use, "icefall_kd is used within another statement", remedy
        )
    dropped: Set[int] = set()
    for statement in statements:
        after = file.lines[statement.end_lineno - 1][statement.end_col_offset :]
        after = after.strip()
        before = file.lines[statement.lineno - 1][: statement.col_offset].strip()
        if before or (after and not after.startswith(b"#")):
            raise file.refusal(
                statement, "icefall_kd shares its line with another statement", remedy
            )
        dropped |= set(range(statement.lineno - 1, statement.end_lineno))
    unplugged = b"".join(line for i, line in enumerate(file.lines) if i not in dropped)
    try:
        parse(unplugged, path)
    except KDError:
        raise file.refusal(
            statements[-1], "without icefall_kd's lines no program is left", remedy
        ) from None
    return unplugged

"""The lines that plug a recipe, and where they go.

The places are found in the syntax tree:

================== =====================================================================
import             behind the last import before the first function or class
kd.add_arguments   before the ``return`` of ``get_parser()``
kd.attach          before the optimizer and behind DDP, in the function that calls
                   ``train_dataloaders()``
kd.joint_loss      in ``compute_loss()``, where the loss and its ``MetricsTracker`` are
                   there, and the one is not yet written into the other
kd.wrap_dataset    in ``train_dataloaders()``, behind the last assignment of the dataset
                   and before the sampler
================== =====================================================================

The names in the lines are the recipe's own. A file of another shape is refused with the
line where it differs. That the file parses, that the lines stand alone, and that taking
them out gives the same bytes, is checked each time.
"""

import ast
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Tuple

from icefall_kd import __version__
from icefall_kd.errors import KDError
from icefall_kd.plug.source import (
    FUNCTIONS,
    Place,
    RecipeFile,
    assigned,
    binds,
    called,
    marks,
    parse,
    scope,
    unplug,
)

IMPORT = "from icefall_kd.training import session as kd"


class StaleLines(KDError):
    """Lines of icefall_kd that are not the ones which this version writes."""


class Module(NamedTuple):
    """Where a recipe's training data come from."""

    name: str  # of the module, without .py
    class_name: str
    line: int  # where train.py imports it


def _import_place(file: RecipeFile) -> Place:
    body = file.tree.body
    for node in ast.walk(file.tree):
        name = getattr(node, "asname", None) or getattr(node, "name", None)
        argument = node.arg if isinstance(node, ast.arg) else None
        if "kd" in (name, getattr(node, "id", None), argument):
            raise file.refusal(
                getattr(node, "lineno", 1), "kd is a name of the recipe", "rename it"
            )
    ends = [i for i, n in enumerate(body) if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
    end = ends[0] if ends else len(body)
    imports = [
        i for i in range(end) if isinstance(body[i], (ast.Import, ast.ImportFrom))
    ]
    if not imports or imports[-1] + 1 == len(body):
        raise file.refusal(1, "nothing is imported before the first function")
    return file.after(body, imports[-1], IMPORT)


def _parser_place(file: RecipeFile) -> Place:
    function = file.function("get_parser")
    last = function.body[-1]
    returns = [n for n in scope(function) if isinstance(n, ast.Return)]
    if returns != [last] or not isinstance(last.value, ast.Name):
        where = returns[0] if returns else function
        raise file.refusal(where, "get_parser does not end with its only return NAME")
    return file.before(last, f"kd.add_arguments({last.value.id})")


def _run_function(file: RecipeFile) -> Tuple[ast.FunctionDef, ast.Call]:
    """The function that trains, and its call of ``train_dataloaders``."""
    found = [
        (f, n)
        for f in file.tree.body
        if isinstance(f, ast.FunctionDef)
        for n in scope(f)
        if called(n) == "train_dataloaders"
    ]
    if len(found) != 1:
        where = found[1][1] if found else len(file.lines)
        raise file.refusal(
            where, f"train_dataloaders is called {len(found)} times, and must be once"
        )
    return found[0]


def _attach_place(file: RecipeFile) -> Place:
    run, _ = _run_function(file)
    nodes = list(scope(run))
    made = (assigned(n, "get_params") for n in nodes)
    params = file.one(run, "NAME = get_params()", filter(None, made))
    wrapped = [n for n in nodes if assigned(n, "DDP", "DistributedDataParallel")]
    model = file.one(
        wrapped[0] if wrapped else run, "NAME = DDP(...)", map(assigned, wrapped)
    )
    ddp = file.index(run.body, wrapped[-1])
    for at in range(ddp + 1, len(run.body)):
        if "optim" in assigned(run.body[at]) and called(run.body[at].value):
            break
    else:
        raise file.refusal(wrapped[-1], "no optimizer is built behind DDP")
    for statement in run.body[at:]:
        for node in (statement, *scope(statement)):
            if called(node) == "deepcopy" and any(
                getattr(n, "id", "") == model for n in ast.walk(node)
            ):
                raise file.refusal(node, "the model is copied behind the optimizer")
    return file.after(run.body, at - 1, f"kd.attach({params}, {model})")


def _loss_place(file: RecipeFile) -> Place:
    function = file.function("compute_loss")
    body, last = function.body, function.body[-1]
    nodes = list(scope(function))
    returns = [n for n in nodes if isinstance(n, ast.Return)]
    value = getattr(last, "value", None)
    pair = [getattr(n, "id", "") for n in getattr(value, "elts", [])]
    if returns != [last] or len(pair) != 2 or not all(pair):
        where = returns[0] if returns else function
        raise file.refusal(
            where, "compute_loss does not end with its only return, (loss, info)"
        )
    loss, info = pair
    arguments = function.args.posonlyargs + function.args.args
    arguments = {a.arg for a in arguments + function.args.kwonlyargs}
    model = file.one(
        function,
        "argument of compute_loss that is called, the model,",
        (
            n.func.id
            for n in nodes
            if isinstance(n, ast.Call) and getattr(n.func, "id", "") in arguments
        ),
    )
    batch = file.one(
        function,
        "argument of compute_loss with a field supervisions, the batch,",
        (
            n.value.id
            for n in nodes
            if isinstance(n, ast.Subscript)
            and getattr(n.slice, "value", "") == "supervisions"
            and getattr(n.value, "id", "") in arguments
        ),
    )
    if not any(assigned(s, "MetricsTracker") == info for s in body):
        raise file.refusal(last, f"{info} is no MetricsTracker of compute_loss")
    if not any(binds(s, loss) for s in body):
        raise file.refusal(last, f"{loss} is not computed in compute_loss")
    at = max(i for i, s in enumerate(body) if binds(s, loss, info))
    for node in nodes:
        written = (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") == info
            and getattr(node.slice, "value", "") == "loss"
        )
        if written and file.index(body, node) <= at:
            raise file.refusal(
                node, f'{info}["loss"] is written before {loss} has its last value'
            )
    code = f"{loss} = kd.joint_loss({loss}, {info}, {model}, {batch})"
    return file.after(body, at, code)


def _dataset_place(file: RecipeFile, class_name: str) -> Place:
    methods = [
        m
        for c in file.tree.body
        if isinstance(c, ast.ClassDef) and c.name == class_name
        for m in c.body
        if isinstance(m, ast.FunctionDef) and m.name == "train_dataloaders"
    ]
    if len(methods) != 1:
        raise file.refusal(
            methods[1] if methods else len(file.lines),
            f"the class {class_name} has {len(methods)} methods train_dataloaders of "
            "its own, and must have one",
        )
    method, body = methods[0], methods[0].body
    nodes = list(scope(method))
    loaders = [n for n in nodes if called(n) == "DataLoader"]

    def given(name: str, position: int) -> Iterator[str]:
        for call in loaders:
            found = [k.value for k in call.keywords if k.arg == name]
            found += call.args[position : position + 1]
            yield getattr(found[0], "id", "") if found else ""

    dataset = file.one(method, "variable that DataLoader reads", given("dataset", 0))
    sampler = file.one(method, "variable that is its sampler", given("sampler", 2))
    samplers = [n for n in nodes if assigned(n) == sampler and called(n.value)]
    cuts = file.one(
        method,
        "variable of cuts that its sampler takes",
        (getattr((n.value.args or [None])[0], "id", "") for n in samplers),
    )
    first = file.index(body, samplers[0])
    if not any(binds(s, dataset) for s in body[:first]):
        raise file.refusal(samplers[0], f"{dataset} is not built before its sampler")
    late = [s for s in body[first:] if binds(s, dataset, cuts)]
    if late:
        raise file.refusal(late[0], f"{dataset} or {cuts} changes behind the sampler")
    at = max(i for i in range(first) if binds(body[i], dataset, cuts))
    code = f"{dataset} = kd.wrap_dataset({dataset}, {cuts})"
    return file.after(body, at, code)


def data_module(data: bytes, path: object) -> Module:
    """The module and class that a ``train.py`` gets its training data from."""
    file = RecipeFile(data, path)
    run, call = _run_function(file)
    name = getattr(call.func.value, "id", "") if hasattr(call.func, "value") else ""
    made = [n for n in scope(run) if name and assigned(n) == name]
    class_name = file.one(
        call,
        "NAME = CLASS(...) whose train_dataloaders is called",
        (called(n.value) for n in made),
    )
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if class_name == (alias.asname or alias.name):
                    return Module(node.module, alias.name, node.lineno)
    raise file.refusal(call, f"{class_name} comes from no module of the recipe")


def _shape(data: bytes, path: object) -> Tuple[List[str], List[str]]:
    """A plugged file as others may lay it out: isort moves the import."""
    tree = parse(data, path)
    found = [n for n in marks(tree)[0] if isinstance(n, (ast.Import, ast.ImportFrom))]
    rest = [ast.dump(n) for n in tree.body if n not in found]
    return [ast.unparse(n) for n in found], rest


def _bare_lines(data: bytes, path: object) -> Dict[Tuple[int, str], int]:
    """The line of each statement that plugs a file, by its place in the bare file."""
    found = sorted(marks(parse(data, path))[0], key=lambda n: n.lineno)
    above, lines = 0, {}
    for node in found:
        lines[node.lineno - above, ast.unparse(node)] = node.lineno
        above += node.end_lineno - node.lineno + 1
    return lines


def _plugged(
    data: bytes, path: object, places: Callable[[RecipeFile], List[Place]]
) -> bytes:
    bare = unplug(data, path)
    file = RecipeFile(bare, path)
    wanted = places(file)
    new = file.insert(wanted)
    if bare != data:
        if _shape(data, path) == _shape(new, path):
            return data
        expected = _bare_lines(new, path)
        found = _bare_lines(data, path)
        odd = [line for key, line in found.items() if key not in expected]
        line = min(odd, default=max(found.values()))
        raise StaleLines(
            f"{path} (line {line}) carries other lines of icefall_kd than version "
            f"{__version__} writes: take them out, with `icefall-kd plug --undo` or by "
            "hand, and plug it again"
        )
    try:
        kept = len(marks(parse(new, path))[0]) == len(wanted)
        kept = kept and unplug(new, path) == bare
    except KDError:
        kept = False
    if not kept:
        raise file.refusal(
            wanted[0].index, "no line can stand alone where icefall_kd's have to"
        )
    return new


def plug_train(data: bytes, path: object) -> bytes:
    """A ``train.py`` with its four lines.

    Args:
      data: The file, plugged or not.
      path: Its name, for messages.

    Raises:
      StaleLines: it is plugged in another way.
      KDError: it does not parse, or is of unknown shape.
    """
    return _plugged(
        data,
        path,
        lambda file: [
            _import_place(file),
            _parser_place(file),
            _attach_place(file),
            _loss_place(file),
        ],
    )


def plug_data_module(data: bytes, path: object, class_names: Iterable[str]) -> bytes:
    """A data module with its lines: an import, and one for each class.

    Raises:
      StaleLines: it is plugged in another way.
      KDError: it does not parse, or is of unknown shape.
    """
    names = sorted(set(class_names))
    return _plugged(
        data,
        path,
        lambda file: [_import_place(file), *(_dataset_place(file, n) for n in names)],
    )

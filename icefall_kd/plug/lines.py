"""The lines that plug a recipe, and the places where they are inserted.

The places are looked up in the syntax tree:

================== =====================================================================
import             after the last import before the first function or class
kd.add_arguments   before the ``return`` of ``get_parser()``, when the parser has all of
                   the recipe's own options
kd.attach          after DDP and before the optimizer, in the function that calls
                   ``train_dataloaders()``: the checkpoint is loaded by then and the
                   model has its last form, and no data loader exists yet; the
                   optimizer only marks the place, which is the same in all recipes
kd.begin           at the head of ``compute_loss()``, before it reads the batch:
                   teacher-guided pruning begins before the model is called
kd.joint_loss      in ``compute_loss()``, after the last value of the loss and of its
                   ``MetricsTracker``, before the loss is logged: so the joint loss is
                   what is logged and returned
kd.wrap_dataset    in ``train_dataloaders()``, after the last assignment of the dataset
                   and before the sampler: the session reads the cuts that are sampled,
                   and the data loader gets the wrapped dataset
================== =====================================================================

The lines use the recipe's own variable names. A file of another shape is refused with
the line where it differs. Each time it is checked that the new file parses, that each
inserted line is a statement of its own, and that taking the lines out gives the same
bytes.
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
    """A file carries other lines of icefall_kd than this version writes."""


class DataModule(NamedTuple):
    """The module and class that a recipe's training data come from."""

    name: str  # of the module, without .py
    class_name: str
    line: int  # the line of train.py that imports the class


def _import_place(file: RecipeFile) -> Place:
    body = file.tree.body
    for node in ast.walk(file.tree):
        alias = getattr(node, "asname", None) or getattr(node, "name", None)
        argument = node.arg if isinstance(node, ast.arg) else None
        if "kd" in (alias, getattr(node, "id", None), argument):
            raise file.refusal(
                getattr(node, "lineno", 1), "kd is a name of the recipe", "rename it"
            )
    definitions = [n for n in body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
    end = body.index(definitions[0]) if definitions else len(body)
    imports = [n for n in body[:end] if isinstance(n, (ast.Import, ast.ImportFrom))]
    if not imports or imports[-1] is body[-1]:
        raise file.refusal(1, "nothing is imported before the first function")
    return file.after(body, body.index(imports[-1]), IMPORT)


def _parser_place(file: RecipeFile) -> Place:
    function = file.function("get_parser")
    parser = function.body[-1]
    returns = _returns(function)
    if returns != [parser] or not isinstance(parser.value, ast.Name):
        raise file.refusal(
            returns[0] if returns else function,
            "get_parser does not end with its only return NAME",
        )
    return file.before(parser, f"kd.add_arguments({parser.value.id})")


def _returns(function: ast.FunctionDef) -> List[ast.Return]:
    return [node for node in scope(function) if isinstance(node, ast.Return)]


def _run_function(file: RecipeFile) -> Tuple[ast.FunctionDef, ast.Call]:
    """The function that trains, and its call of ``train_dataloaders``."""
    calls = [
        (function, node)
        for function in file.tree.body
        if isinstance(function, ast.FunctionDef)
        for node in scope(function)
        if called(node) == "train_dataloaders"
    ]
    if len(calls) != 1:
        raise file.refusal(
            calls[1][1] if calls else len(file.lines),
            f"train_dataloaders is called {len(calls)} times, and must be once",
        )
    return calls[0]


def _attach_place(file: RecipeFile) -> Place:
    run, _ = _run_function(file)
    body, nodes = run.body, list(scope(run))
    params_names = filter(None, (assigned(n, "get_params") for n in nodes))
    params = file.only_name(run, "NAME = get_params()", params_names)
    wrapped = [n for n in nodes if assigned(n, "DDP", "DistributedDataParallel")]
    model = file.only_name(
        wrapped[0] if wrapped else run, "NAME = DDP(...)", map(assigned, wrapped)
    )
    after_ddp = file.index(body, wrapped[-1]) + 1
    optimizers = [
        statement
        for statement in body[after_ddp:]
        if "optim" in assigned(statement) and called(statement.value)
    ]
    if not optimizers:
        raise file.refusal(wrapped[-1], "no optimizer is built after DDP")
    optimizer = body.index(optimizers[0])
    for statement in body[optimizer:]:
        for node in (statement, *scope(statement)):
            names = [getattr(n, "id", "") for n in ast.walk(node)]
            if called(node) == "deepcopy" and model in names:
                raise file.refusal(node, "the model is copied after the optimizer")
    return file.after(body, optimizer - 1, f"kd.attach({params}, {model})")


def _loss_places(file: RecipeFile) -> List[Place]:
    """The places of ``kd.begin`` and ``kd.joint_loss``."""
    function = file.function("compute_loss")
    body, nodes = function.body, list(scope(function))
    returns = _returns(function)
    pair = getattr(getattr(body[-1], "value", None), "elts", [])
    names = [getattr(n, "id", "") for n in pair]
    if returns != [body[-1]] or len(names) != 2 or not all(names):
        raise file.refusal(
            returns[0] if returns else function,
            "compute_loss does not end with its only return, (loss, info)",
        )
    loss, info = names
    signature = function.args
    arguments = {
        a.arg for a in signature.posonlyargs + signature.args + signature.kwonlyargs
    }
    called_names = [getattr(n.func, "id", "") for n in nodes if isinstance(n, ast.Call)]
    model = file.only_name(
        function,
        "argument of compute_loss that is called, the model,",
        [name for name in called_names if name in arguments],
    )
    read_names = [
        getattr(n.value, "id", "")
        for n in nodes
        if isinstance(n, ast.Subscript)
        and getattr(n.slice, "value", "") == "supervisions"
    ]
    batch = file.only_name(
        function,
        "argument of compute_loss with a field supervisions, the batch,",
        [name for name in read_names if name in arguments],
    )
    if not any(assigned(s, "MetricsTracker") == info for s in body):
        raise file.refusal(body[-1], f"{info} is no MetricsTracker of compute_loss")
    if not any(binds(s, loss) for s in body):
        raise file.refusal(body[-1], f"{loss} is not computed in compute_loss")
    last_value = max(i for i, s in enumerate(body) if binds(s, loss, info))
    for node in nodes:
        logs_the_loss = (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") == info
            and getattr(node.slice, "value", "") == "loss"
        )
        if logs_the_loss and file.index(body, node) <= last_value:
            raise file.refusal(
                node, f'{info}["loss"] is written before {loss} has its last value'
            )
    first = body[1] if ast.get_docstring(function, clean=False) is not None else body[0]
    code = f"{loss} = kd.joint_loss({loss}, {info}, {model}, {batch})"
    return [
        file.before(first, f"kd.begin({batch})"),
        file.after(body, last_value, code),
    ]


def _argument_names(
    calls: Iterable[ast.Call], keyword: str, position: int
) -> Iterator[str]:
    """The variable that each call gets for an argument; "" where it is none."""
    for call in calls:
        values = [k.value for k in call.keywords if k.arg == keyword]
        values += call.args[position : position + 1]
        yield getattr(values[0], "id", "") if values else ""


def _dataset_place(file: RecipeFile, class_name: str) -> Place:
    methods = [
        method
        for node in file.tree.body
        if isinstance(node, ast.ClassDef) and node.name == class_name
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "train_dataloaders"
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
    dataset = file.only_name(
        method,
        "variable that DataLoader reads",
        _argument_names(loaders, "dataset", 0),
    )
    sampler = file.only_name(
        method,
        "variable that is its sampler",
        _argument_names(loaders, "sampler", 2),
    )
    samplers = [n for n in nodes if assigned(n) == sampler and called(n.value)]
    cuts = file.only_name(
        method,
        "variable of cuts that its sampler takes",
        [getattr((n.value.args or [None])[0], "id", "") for n in samplers],
    )
    first = file.index(body, samplers[0])
    if not any(binds(s, dataset) for s in body[:first]):
        raise file.refusal(samplers[0], f"{dataset} is not built before its sampler")
    late = [s for s in body[first:] if binds(s, dataset, cuts)]
    if late:
        raise file.refusal(late[0], f"{dataset} or {cuts} changes after the sampler")
    last_value = max(i for i in range(first) if binds(body[i], dataset, cuts))
    code = f"{dataset} = kd.wrap_dataset({dataset}, {cuts})"
    return file.after(body, last_value, code)


def data_module(data: bytes, path: object) -> DataModule:
    """Return the module and class that a ``train.py`` gets its training data from.

    Args:
      data: The bytes of the file.
      path: Its name, for messages.

    Raises:
      KDError: The class is not imported from a module of the recipe.
    """
    file = RecipeFile(data, path)
    run, call = _run_function(file)
    name = getattr(getattr(call.func, "value", None), "id", "")
    values = [n.value for n in scope(run) if name and assigned(n) == name]
    class_name = file.only_name(
        call, "NAME = CLASS(...) whose train_dataloaders is called", map(called, values)
    )
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if class_name == (alias.asname or alias.name):
                    return DataModule(node.module, alias.name, node.lineno)
    raise file.refusal(call, f"{class_name} comes from no module of the recipe")


def _without_layout(data: bytes, path: object) -> Tuple[List[str], List[str]]:
    """A plugged file's imports of the session, and the rest of it.

    Two files are plugged alike if these are equal: isort moves the import, and black
    changes spaces.
    """
    tree = parse(data, path)
    imports = [n for n in marks(tree)[0] if isinstance(n, (ast.Import, ast.ImportFrom))]
    rest = [ast.dump(n) for n in tree.body if n not in imports]
    return [ast.unparse(n) for n in imports], rest


def _plugging_lines(data: bytes, path: object) -> Dict[Tuple[int, str], int]:
    """The line of each statement that plugs a file, by its line without them."""
    statements = sorted(marks(parse(data, path))[0], key=lambda n: n.lineno)
    above, lines = 0, {}
    for node in statements:
        lines[node.lineno - above, ast.unparse(node)] = node.lineno
        above += node.end_lineno - node.lineno + 1
    return lines


def _plugged(
    data: bytes, path: object, find_places: Callable[[RecipeFile], List[Place]]
) -> bytes:
    unplugged = unplug(data, path)
    file = RecipeFile(unplugged, path)
    places = find_places(file)
    new = file.insert(places)
    if unplugged != data:
        if _without_layout(data, path) == _without_layout(new, path):
            return data
        expected = _plugging_lines(new, path)
        present = _plugging_lines(data, path)
        unexpected = [line for key, line in present.items() if key not in expected]
        line = min(unexpected, default=max(present.values()))
        raise StaleLines(
            f"{path} (line {line}) carries other lines of icefall_kd than version "
            f"{__version__} writes: take them out, with `icefall-kd plug --undo` or by "
            "hand, and plug it again"
        )
    try:
        comes_out = len(marks(parse(new, path))[0]) == len(places)
        comes_out = comes_out and unplug(new, path) == unplugged
    except KDError:
        comes_out = False
    if not comes_out:
        raise file.refusal(
            places[0].index, "no line can stand alone where icefall_kd's have to"
        )
    return new


def plug_train(data: bytes, path: object) -> bytes:
    """Return a ``train.py`` with its five lines.

    Args:
      data: The bytes of the file, plugged or not.
      path: Its name, for messages.

    Raises:
      StaleLines: The file carries other lines of icefall_kd.
      KDError: The file does not parse, or is of unknown shape.
    """
    return _plugged(
        data,
        path,
        lambda file: [
            _import_place(file),
            _parser_place(file),
            _attach_place(file),
            *_loss_places(file),
        ],
    )


def plug_data_module(data: bytes, path: object, class_names: Iterable[str]) -> bytes:
    """Return a data module with its lines: an import, and one for each class.

    Args:
      data: The bytes of the file, plugged or not.
      path: Its name, for messages.
      class_names: The classes whose ``train_dataloaders`` the training scripts call.

    Raises:
      StaleLines: The file carries other lines of icefall_kd.
      KDError: The file does not parse, or is of unknown shape.
    """
    names = sorted(set(class_names))
    return _plugged(
        data,
        path,
        lambda file: [_import_place(file), *(_dataset_place(file, n) for n in names)],
    )

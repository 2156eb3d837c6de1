"""ONNX graphs in which every shape is a number, and what operators they have."""

import importlib
import io
import warnings
from collections import Counter
from typing import Dict, List, Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from icefall_kd.errors import KDError, first_line, require

MIN_OPSET = 11  # before it, slices and paddings are written in other ways
# What the plain form may not have: chips refuse them, or their shape is not a number.
FORBIDDEN = (
    "Compress",
    "ConstantOfShape",
    "Gather",
    "GatherElements",
    "GatherND",
    "If",
    "Loop",
    "NonZero",
    "OneHot",
    "Range",
    "Scan",
    "Scatter",
    "ScatterElements",
    "ScatterND",
    "Shape",
    "Size",
    "TopK",
    "Unique",
    "Where",
)


def max_opset() -> int:
    """Return the highest opset that this torch's exporter of traces can write."""
    for name in (
        "torch.onnx._constants",
        "torch.onnx._internal.torchscript_exporter._constants",
    ):
        try:
            constants = importlib.import_module(name)
        except ImportError:
            continue
        for limit in ("ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET", "ONNX_MAX_OPSET"):
            if hasattr(constants, limit):
                return int(getattr(constants, limit))
    return 17  # of torch 1.13, and all later ones can write it


def require_opset(opset: int) -> None:
    """Refuse an opset that can't be written.

    Args:
      opset: The version of ONNX's operators.

    Raises:
      KDError: It is none of those that can be had.
    """
    require(
        MIN_OPSET <= opset <= max_opset(),
        f"`opset` is {opset}, and torch {torch.__version__} writes the plain form in "
        f"{MIN_OPSET} to {max_opset()}: give one of these",
    )


def make_graph(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], opset: int
) -> onnx.ModelProto:
    """Trace a module for the shapes of its inputs.

    Args:
      module: In eval mode.
      inputs: By name, in the order of its ``forward``.
      outputs: Their names.
      opset: The version of ONNX's operators.

    Returns:
      The graph, with constants in place of all that does not depend on the inputs.

    Raises:
      KDError: The opset can't be had, torch can't write the graph, or an operator of
        ``FORBIDDEN`` or a shape that is not a number is left.
    """
    require_opset(opset)
    older = {} if torch.__version__.startswith(("1.", "2.0")) else {"dynamo": False}
    if older and "dynamo" not in torch.onnx.export.__code__.co_varnames:
        older = {}
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of assertions that become constants
        try:
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                file,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                **older,
            )
        except Exception as error:  # the exporter raises many classes
            raise KDError(
                f"torch {torch.__version__} can't write {type(module).__name__} in "
                f"opset {opset} ({first_line(error)}): export it in another form"
            ) from error
    graph = folded(onnx.load_model_from_string(file.getvalue()))
    _require_plain(graph, type(module).__name__)
    return graph


def operators(model: onnx.ModelProto) -> Dict[str, int]:
    """Return how many operators of each type a graph has.

    Args:
      model: A graph.
    """
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute what does not depend on the inputs; the rest of the graph stays.

    The recipes' modules ask for shapes while they are traced, which leaves Shape,
    Gather and more, although all shapes are known.

    Args:
      model: A graph whose inputs have fixed shapes.

    Returns:
      The graph; its constants are initializers.
    """
    while True:
        del model.graph.value_info[:]  # torch's are of another shape now and then
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        _choose(model)
        if not _fold_once(model):
            return _without_unused(model)


def _fold_once(model: onnx.ModelProto) -> bool:
    """Replace nodes of constants by initializers; whether there were any."""
    shapes = _shapes(model)
    constants = {i.name: i for i in model.graph.initializer}
    kept: List[onnx.NodeProto] = []
    before = len(model.graph.node)
    for node in model.graph.node:
        values = None
        if node.op_type == "Shape" and not node.attribute and node.input[0] in shapes:
            values = [np.asarray(shapes[node.input[0]], np.int64)]
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            values = [numpy_helper.to_array(node.attribute[0].t)]
        elif _is_of(node, constants):
            given = {n: numpy_helper.to_array(constants[n]) for n in node.input if n}
            values = _computed(node, given, model)
        if values is None:
            kept.append(node)
            continue
        for name, value in zip(node.output, values):
            constants[name] = numpy_helper.from_array(np.asarray(value), name)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants.values())
    return len(kept) < before


def _choose(model: onnx.ModelProto) -> None:
    """Let what takes the choice of a Where take what is always chosen.

    Masks that mask nothing are left of the recipes' modules.
    """
    shapes, chosen = _shapes(model), {}
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = chosen.get(name, name)
        if node.op_type != "Where" or node.input[0] not in constants:
            continue
        condition = numpy_helper.to_array(constants[node.input[0]])
        source = node.input[1 if condition.all() else 2]
        if condition.all() == condition.any() and shapes.get(source) == shapes.get(
            node.output[0], ()
        ):
            chosen[node.output[0]] = source


def _is_of(node: onnx.NodeProto, constants: Mapping[str, object]) -> bool:
    """Whether a node depends on constants alone."""
    has_graph = any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)
    return not has_graph and all(not n or n in constants for n in node.input)


def _computed(
    node: onnx.NodeProto, given: Dict[str, np.ndarray], model: onnx.ModelProto
) -> Sequence[np.ndarray]:
    """What a node of constants computes."""
    value_of = {n: onnx.helper.make_tensor_value_info(n, 0, None) for n in given}
    graph = onnx.helper.make_graph(
        [node],
        "constant",
        list(value_of.values()),
        [onnx.helper.make_tensor_value_info(n, 0, None) for n in node.output],
    )
    one = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    one.ir_version = model.ir_version
    return ReferenceEvaluator(one).run(None, given)


def _shapes(model: onnx.ModelProto) -> Dict[str, List[int]]:
    """The shapes of all values of which every dimension is a number."""
    graph, shapes = model.graph, {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        sizes = [
            d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim
        ]
        if tensor.HasField("shape") and -1 not in sizes:
            shapes[value.name] = sizes
    for tensor in graph.initializer:
        shapes[tensor.name] = list(tensor.dims)
    return shapes


def _without_unused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Leave out nodes and constants that no output depends on."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    constants = [i for i in model.graph.initializer if i.name in needed]
    values = [v for v in model.graph.value_info if v.name in needed]
    for field, left in (
        (model.graph.node, reversed(kept)),
        (model.graph.initializer, constants),
        (model.graph.value_info, values),
    ):
        left = list(left)
        del field[:]
        field.extend(left)
    return model


def _require_plain(model: onnx.ModelProto, name: str) -> None:
    """Refuse a graph that is not plain."""
    found = sorted(set(operators(model)).intersection(FORBIDDEN))
    require(
        not found,
        f"the graph of {name} has {', '.join(found)}, which the plain form may not "
        "have: export it in another form",
    )
    shapes = _shapes(model)
    for node in model.graph.node:
        for output in node.output:
            require(
                output in shapes,
                f"the graph of {name} has an output of {node.op_type} whose shape is "
                "not known: export it in another form",
            )

"""Writes a model's parts as TorchScript and ONNX, with sherpa-onnx's metadata."""

import inspect
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.export.graph import (
    ContextDecoder,
    EncoderAlone,
    OfflineEncoder,
    ProjectedJoiner,
    ScriptModel,
)
from icefall_kd.export.packages import need
from icefall_kd.files import replacing

OPSETS = range(13, 18)  # that torch 1.13 and onnxruntime both have
# Bytes of parameters with which one file of ONNX, of less than 2 GiB, is not enough.
LARGE = 2**31 - 2**26
ENCODER, DECODER, JOINER, CTC = "encoder", "decoder", "joiner", "model"
# sherpa-onnx's names of tensors, of each part: inputs, outputs.
_TENSORS = {
    ENCODER: (("x", "x_lens"), ("encoder_out", "encoder_out_lens")),
    CTC: (("x", "x_lens"), ("log_probs", "log_probs_len")),
    DECODER: (("y",), ("decoder_out",)),
    JOINER: (("encoder_out", "decoder_out"), ("logit",)),
}
_FRAMES = ("x", "encoder_out", "log_probs")  # with an axis of frames in an encoder
_TRACED = (83, 71)  # feature frames of the utterances that a graph is traced with


def write_torchscript(
    model: nn.Module, path: Path, encoder: Callable[[], nn.Module]
) -> None:
    """Write the whole model as icefall's ``export.py --jit 1`` does.

    Args:
      model: Of :func:`icefall_kd.export.graph.exportable`.
      path: The file.
      encoder: Makes its encoder, which takes features.

    Raises:
      KDError: a model that can't be scripted.
    """
    with _refusing("TorchScript"):
        whole = ScriptModel(model, encoder()).eval()
        scripted = torch.jit.script(whole)
    with replacing(path, shared=True) as temporary:
        scripted.save(str(temporary))


def offline_part(model: nn.Module, part: str, takes_mean: bool) -> nn.Module:
    """The module that becomes a file.

    Args:
      model: Of :func:`icefall_kd.export.graph.exportable`.
      part: encoder, decoder, joiner, or model for encoder and CTC head.
      takes_mean: Whether the mean of each utterance is taken off its features inside.
    """
    if part == DECODER:
        return ContextDecoder(model).eval()
    if part == JOINER:
        return ProjectedJoiner(model).eval()
    head = model.ctc_output if part == CTC else model.joiner.encoder_proj
    return EncoderAlone(OfflineEncoder(model, head, takes_mean)).eval()


def write_offline(
    model: nn.Module, settings: Dict[str, Any], part: str, path: Path, **options: Any
) -> None:
    """Write a part of a model for whole utterances as ONNX in fp32.

    Args:
      model: Of :func:`icefall_kd.export.graph.exportable`.
      settings: The recipe's params.
      part: See :func:`offline_part`.
      path: The file.
      options: ``takes_mean``, of :func:`offline_part`, and ``opset``.

    Raises:
      KDError: onnx is not installed, or a model that can't be traced.
    """
    module = offline_part(model, part, options["takes_mean"])
    inputs, outputs = _TENSORS[part]
    axes: Dict[str, Dict[int, str]] = {}
    for name in (*inputs, *outputs):
        axes[name] = {0: "N"}
        if part in (ENCODER, CTC) and name in _FRAMES:
            axes[name][1] = "T" if name == "x" else "T_out"
    example = _example(part, settings, model)
    write_onnx(module, example, path, inputs, outputs, axes, options["opset"])
    write_metadata(path, offline_metadata(model, part))


def _example(part: str, settings: Dict[str, Any], model: nn.Module) -> Tuple:
    """Inputs to trace a part with."""
    if part in (ENCODER, CTC):
        lens = torch.tensor(_TRACED)
        return torch.zeros(len(lens), max(_TRACED), int(settings["feature_dim"])), lens
    if part == DECODER:
        return (torch.zeros(2, int(model.decoder.context_size), dtype=torch.int64),)
    width = model.joiner.output_linear.in_features
    return torch.zeros(2, width), torch.zeros(2, width)


def offline_metadata(model: nn.Module, part: str) -> Dict[str, str]:
    """What sherpa-onnx reads from a part's file.

    Args:
      model: The model.
      part: See :func:`offline_part`.
    """
    if part == DECODER:
        decoder = model.decoder
        return {
            "context_size": str(int(decoder.context_size)),
            "vocab_size": str(decoder.embedding.num_embeddings),
        }
    if part == JOINER:
        return {"joiner_dim": str(model.joiner.output_linear.in_features)}
    is_ctc = part == CTC
    return {
        "model_type": "zipformer2_ctc" if is_ctc else "zipformer2",
        "version": "1",
        "model_author": "k2-fsa",
        "comment": "non-streaming zipformer2" + (" CTC" if is_ctc else ""),
    }


@torch.no_grad()
def write_onnx(
    module: nn.Module,
    example: Tuple,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Dict[str, Dict[int, str]],
    opset: int,
) -> None:
    """Trace a module, and write its graph.

    Args:
      module: The module.
      example: Its inputs.
      path: The file.
      inputs: The names of its inputs.
      outputs: The names of its outputs.
      axes: The names of axes of any length, by tensor and axis.
      opset: The version of ONNX's operators.

    Raises:
      KDError: onnx is not installed, or a module that can't be traced.
    """
    need("onnx", "the form ONNX")
    options: Dict[str, Any] = {}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # newer torch's default, which fixes lengths
    with _refusing("ONNX"), _written(module, path) as temporary:
        torch.onnx.export(
            module,
            example,
            str(temporary),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=opset,
            **options,
        )


def weights_of(path: Path) -> Path:
    """The file with the weights of a large file of ONNX, by icefall's name for it.

    Args:
      path: The file.
    """
    return path.with_suffix(".weights")


@contextmanager
def _written(module: nn.Module, path: Path) -> Iterator[Path]:
    """Where a block writes a module's file; the weights of a large one are moved out.

    Torch writes each weight of a large module into a file of its own. Their names stay
    those of parameters, so they need a folder of their own.
    """
    if sum(p.numel() * p.element_size() for p in module.parameters()) < LARGE:
        with replacing(path, shared=True) as temporary:
            yield temporary
        weights_of(path).unlink(missing_ok=True)  # of a former model
        return
    onnx = need("onnx", "the form ONNX")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        model = onnx.load(str(temporary))
        whole = Path(folder) / "whole"
        whole.mkdir()
        weights = weights_of(path)
        onnx.save_model(
            model,
            str(whole / path.name),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=weights.name,
        )
        for name in (weights.name, path.name):
            (whole / name).replace(path.with_name(name))


@contextmanager
def _refusing(form: str) -> Iterator[None]:
    """Refuse in one sentence what torch can't export, and keep its warnings quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each shape that is traced has one
            yield
    except (KDError, OSError):
        raise
    except Exception as e:  # whatever the recipe's code and torch raise
        first = " ".join(str(e).split())[:200]
        raise KDError(
            f"torch {torch.__version__} can't make {form} of this model "
            f"({type(e).__name__}: {first}): use the recipe's own export script, or "
            "leave the form out"
        ) from None


def write_metadata(path: Path, values: Dict[str, str]) -> None:
    """Put metadata into a file of ONNX, in place of what it has by the same names.

    Args:
      path: The file.
      values: The metadata.
    """
    onnx = need("onnx", "the form ONNX")
    model = onnx.load(str(path), load_external_data=False)
    known = {prop.key: prop.value for prop in model.metadata_props}
    onnx.helper.set_model_props(model, {**known, **values})
    with replacing(path, shared=True) as temporary:
        onnx.save(model, str(temporary))


def inputs_and_outputs(path: Path) -> Dict[str, Any]:
    """Names, types and shapes of a file's inputs and outputs; letters are any number.

    Args:
      path: A file of ONNX.
    """
    onnx = need("onnx", "the form ONNX")
    graph = onnx.load(str(path), load_external_data=False).graph

    def described(value: Any) -> Dict[str, Any]:
        tensor = value.type.tensor_type
        shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        return {"name": value.name, "type": kind, "shape": shape}

    return {
        "inputs": [described(value) for value in graph.input],
        "outputs": [described(value) for value in graph.output],
    }

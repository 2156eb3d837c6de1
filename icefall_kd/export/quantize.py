"""Smaller files of ONNX: matrix products with weights of 8 bits, or half precision."""

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Set

from icefall_kd.errors import KDError
from icefall_kd.export.packages import need
from icefall_kd.files import replacing
from icefall_kd.rounding import CHANNEL, TENSOR

ENCODINGS = "encoder_pos"  # in names of nodes, the recipes' name of that module


def write_int8(source: Path, path: Path, scales: str = TENSOR) -> None:
    """Write a file whose matrix products have weights of 8 bits.

    It is onnxruntime's dynamic quantization, as icefall's exporters do it: activations
    are rounded as they come.

    Args:
      source: The file in fp32.
      path: The new file.
      scales: Of :data:`icefall_kd.rounding.SCALES`: a weight has one, as in icefall's
        exporters, or one for each channel that comes out.

    Raises:
      KDError: onnxruntime is missing, or can't quantize it.
    """
    quantization = need("onnxruntime.quantization", "the form int8")
    with replacing(path, shared=True) as temporary, _refusing("int8", source):
        quantization.quantize_dynamic(
            model_input=str(source),
            model_output=str(temporary),
            op_types_to_quantize=["MatMul"],
            per_channel=scales == CHANNEL,
            weight_type=quantization.QuantType.QInt8,
        )


def write_fp16(source: Path, path: Path) -> None:
    """Write a file that computes in half precision; inputs and outputs stay fp32.

    Args:
      source: The file in fp32.
      path: The new file.

    Raises:
      KDError: onnxconverter-common is missing, or can't convert it.
    """
    onnx = need("onnx", "the form fp16")
    float16 = need("onnxconverter_common", "the form fp16").float16
    with replacing(path, shared=True) as temporary, _refusing("fp16", source):
        model = onnx.load(str(source))
        nodes = model.graph.node
        # Positional encodings turn large offsets into angles: they need all digits.
        in_fp32 = [node.name for node in nodes if ENCODINGS in node.name]
        casts = {node.name for node in nodes if node.op_type == "Cast"} - set(in_fp32)
        half = float16.convert_float_to_float16(
            model, keep_io_types=True, node_block_list=in_fp32
        )
        _cast_to_half(onnx, half, casts)
        onnx.save(half, str(temporary))


def _cast_to_half(onnx: Any, model: Any, names: Set[str]) -> None:
    """Let a graph's own casts to fp32 be casts to fp16, which the converter forgets."""
    for node in model.graph.node:
        for attribute in node.attribute if node.name in names else ():
            if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16


@contextmanager
def _refusing(form: str, source: Path) -> Iterator[None]:
    """One sentence where a package fails, and no advice of it on the way."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as e:  # whatever the packages raise
        raise KDError(
            f"{source.name} can't be made {form} ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:160]}): leave the form out"
        ) from None
    finally:
        logging.disable(logging.NOTSET)

"""The packages that exported files need, which are no requirement of this one."""

import importlib
from types import ModuleType

from icefall_kd.errors import KDError

_PIP = {
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxruntime.quantization": "onnx onnxruntime",
    "onnxconverter_common": "onnxconverter-common",
    "sherpa_onnx": "sherpa-onnx",
}


def need(module: str, purpose: str) -> ModuleType:
    """Import a module, or say how to install it.

    Args:
      module: One of those above.
      purpose: What needs it; it begins the sentence.

    Raises:
      KDError: it can't be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as e:  # a broken installation raises anything
        raise KDError(
            f"{purpose} needs the package {_PIP[module].split()[-1]}, which can't be "
            f"imported ({type(e).__name__}: {' '.join(str(e).split())[:120]}): run "
            f"`pip install {_PIP[module]}`"
        ) from None

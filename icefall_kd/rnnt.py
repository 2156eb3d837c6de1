"""The transducer engine: k2 where it is installed, else fast_rnnt.

Both give ``rnnt_loss_smoothed``, ``get_rnnt_prune_ranges``, ``do_rnnt_pruning``
and ``rnnt_loss_pruned`` with the same arguments.
"""

from importlib import import_module
from types import ModuleType

from icefall_kd.errors import KDError

ENGINES = ("k2", "fast_rnnt")


def get_engine() -> ModuleType:
    """Return the module that computes transducer losses.

    Raises:
      KDError: if neither k2 nor fast_rnnt can be imported.
    """
    for name in ENGINES:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise KDError(
        "neither k2 nor fast_rnnt is installed, and a transducer loss needs one of "
        "them: run `python3 tools/install_native.py fast_rnnt`, or install k2 for "
        "your torch"
    )

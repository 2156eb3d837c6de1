"""The kinds of targets, by name, in the order of their parts in a record.

n-best lists (:mod:`icefall_kd.kinds.nbest`) are no part of a record: cuts carry them as
text.
"""

from typing import Dict, Type

from icefall_kd.kinds.base import FrameKind, TargetKind, UtteranceKind
from icefall_kd.kinds.ctc import CtcKind
from icefall_kd.kinds.hidden import HiddenKind
from icefall_kd.kinds.lattice import LatticeKind
from icefall_kd.kinds.simple import SimpleKind

__all__ = ["KINDS", "FrameKind", "TargetKind", "UtteranceKind", "register_kind"]

KINDS: Dict[str, Type[TargetKind]] = {}


def register_kind(kind: Type[TargetKind]) -> Type[TargetKind]:
    """Let stores hold a kind of target; may decorate its class.

    Args:
      kind: The class, with a name that no other kind has.
    """
    KINDS[kind.name] = kind
    return kind


for _kind in (CtcKind, LatticeKind, HiddenKind, SimpleKind):
    register_kind(_kind)

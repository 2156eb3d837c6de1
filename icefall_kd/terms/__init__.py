"""The terms of the joint loss.

This list is the one place that knows them all: what is added here has its options, its
log names and its column in the report.
"""

from typing import List, Sequence, Type

from icefall_kd.terms.base import Option, Term
from icefall_kd.terms.ctc import CtcTerm
from icefall_kd.terms.full_sum import FullSumTerm
from icefall_kd.terms.hidden import HiddenTerm
from icefall_kd.terms.nbest import NbestTerm
from icefall_kd.terms.transducer import TransducerTerm

TERMS: List[Type[Term]] = [
    CtcTerm,
    TransducerTerm,
    FullSumTerm,
    HiddenTerm,
    NbestTerm,
]


def term_names() -> Sequence[str]:
    """Return the names of all terms, in the order of the log."""
    return [term.name for term in TERMS]


def term_options() -> Sequence[Option]:
    """Return the options of all terms, each once."""
    return list({option.name: option for t in TERMS for option in t.options}.values())

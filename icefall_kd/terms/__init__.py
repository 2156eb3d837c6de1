"""The terms of the joint loss, by name, in the order of the log.

What is registered here has its ``--kd-*`` options, its names in the log and its column
in the report.
"""

from typing import Dict, Sequence, Type

from icefall_kd.terms.base import Option, Term
from icefall_kd.terms.ctc import CtcTerm
from icefall_kd.terms.full_sum import FullSumTerm
from icefall_kd.terms.hidden import HiddenTerm
from icefall_kd.terms.nbest import NbestTerm
from icefall_kd.terms.simple import SimpleTerm
from icefall_kd.terms.transducer import TransducerTerm

TERMS: Dict[str, Type[Term]] = {}


def register_term(term: Type[Term]) -> Type[Term]:
    """Let the joint loss have a term; may decorate its class.

    Args:
      term: The class, with a name that no other term has.
    """
    TERMS[term.name] = term
    return term


for _term in (
    CtcTerm,
    SimpleTerm,
    TransducerTerm,
    FullSumTerm,
    HiddenTerm,
    NbestTerm,
):
    register_term(_term)


def term_options() -> Sequence[Option]:
    """Return the options of all terms, each once."""
    options = (option for term in TERMS.values() for option in term.options)
    return list({option.name: option for option in options}.values())

"""What a loss term is: a class with its options, its needs, its checks and its value.

To add a term, write one file with a subclass of :class:`Term` and register the class in
:mod:`icefall_kd.terms`. The ``--kd-*`` options, the joint loss, the session,
``icefall-kd doctor`` and the report read the registered classes.

The modules of terms import torch in their functions alone, so that the parser of a
recipe and the commands can read their options without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Dict, Optional, Sequence, Tuple

from icefall_kd.errors import KDError, require
from icefall_kd.terms.schedule import Curve, Weight
from icefall_kd.zipformer import has_ctc, has_transducer

if TYPE_CHECKING:
    import torch

    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.terms.inputs import TermInputs
    from icefall_kd.types import EncoderOut, Targets

# Whether a model has a head, and how a message names the head.
TRANSDUCER = "transducer (--use-transducer 1)"
HEADS = {
    "ctc": (has_ctc, "CTC head (--use-ctc 1)"),
    "transducer": (has_transducer, TRANSDUCER),
    "simple": (has_transducer, TRANSDUCER),  # its simple joiner's acoustic half
}
UNSTORED_KINDS = ("nbest",)  # which cuts carry themselves


@dataclass(frozen=True)
class Option:
    """One ``--kd-*`` option of a plugged recipe, and one line of its YAML file.

    Args:
      name: The name after ``--kd-``, such as "rnnt-form".
      parameter: The parameter of the class that gets the value, such as "form".
      type: int, float, str, bool, or :class:`~icefall_kd.terms.schedule.Curve` for a
        number or numbers by epoch, which stay text.
      default: The value without the option.
      help: One or more sentences, with the unit and an example.
      bounds: The least and the largest value of an int.
    """

    name: str
    parameter: str
    type: type
    default: Any
    help: str
    bounds: Optional[Tuple[int, int]] = None

    @property
    def flag(self) -> str:
        """The option on the command line, ``--kd-rnnt-form``."""
        return f"--kd-{self.name}"

    @property
    def dest(self) -> str:
        """The option's name in the recipe's params, ``kd_rnnt_form``."""
        return f"kd_{self.name.replace('-', '_')}"


TEMPERATURE = Option(
    "temperature",
    "temperature",
    float,
    1.0,
    "Temperature T of the CTC term, the simple term and the transducer's term: the "
    "logits of teacher and student are divided by T, and the term is multiplied by "
    "T^2. It is above 0, such as 2.",
)


class Term:
    """One addend of the joint loss: a weight, and a value on each batch.

    A subclass sets the class attributes, calls ``super().__init__(weight)`` in its
    constructor and defines :meth:`value`. What depends on the parameters of a term may
    be set by its constructor, such as the kinds of :class:`TransducerTerm`.

    Attributes:
      name: The name in the log (``kd_NAME_loss``) and in the weight's option.
      options: The options that the constructor's parameters are read from.
      kinds: The kinds of targets that the term reads: "ctc", "simple", "lattice",
        "hidden" or "nbest".
      heads: The heads that the student must have: "ctc", "transducer", "simple".
      optional_heads: The heads that the term uses where the student has them.
      needs_node_logits: Whether the term needs the student's logits at all nodes of the
        teacher's lattices; the other terms then read these too.
      teacher_layers: The hidden layers that the term reads of the teacher.
      student_layers: The hidden layers that the term reads of the student.
      weight: The weight by epoch.
      temperature: The temperature of the teacher's and the student's softmax; None for
        a term without one.
    """

    name: ClassVar[str]
    options: ClassVar[Sequence[Option]] = ()
    kinds: Sequence[str] = ()
    heads: Sequence[str] = ()
    optional_heads: Sequence[str] = ()
    needs_node_logits: ClassVar[bool] = False
    teacher_layers: Sequence[Any] = ()
    student_layers: Sequence[Any] = ()
    temperature: Optional[float] = None

    def __init__(self, weight: Weight = 1.0) -> None:
        self.weight = Curve.parse(weight, self.parameter("weight"))

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> "Term":
        """Construct the term that the ``--kd-*`` options describe.

        Args:
          params: The recipe's params, with a value of each of ``options``.
        """
        return cls(**{o.parameter: params[o.dest] for o in cls.options})

    @classmethod
    def parameter(cls, name: str) -> str:
        """A parameter of the constructor as errors name it: CtcTerm.delay in backticks.

        Args:
          name: The parameter.
        """
        return f"`{cls.__name__}.{name}`"

    def require_one_of(self, name: str, value: str, choices: Sequence[str]) -> None:
        """Refuse a parameter that is none of its choices.

        Args:
          name: The parameter.
          value: What it is.
          choices: What it may be.

        Raises:
          KDError: ``value`` is not among ``choices``.
        """
        require(
            value in choices,
            f"{self.parameter(name)} is {value!r}: give one of {', '.join(choices)}",
        )

    def require_frames(self, name: str, value: Any) -> None:
        """Refuse a parameter that is no number of frames.

        Args:
          name: The parameter.
          value: What it is.

        Raises:
          KDError: ``value`` is not a whole number from 0 on.
        """
        require(
            isinstance(value, int) and value >= 0,
            f"{self.parameter(name)} is {value!r}: give 0 or more frames",
        )

    def note(self) -> str:
        """Describe the parameters that are not at their defaults, for the log."""
        return ""

    @property
    def frames_name(self) -> str:
        """The name in the log of the number of frames that the value sums over."""
        return f"kd_{self.name}_frames"

    def missing_heads(self, model: torch.nn.Module) -> Sequence[str]:
        """Return the messages' names of needed heads that a student lacks.

        Args:
          model: The student.
        """
        return [HEADS[h][1] for h in self.heads if h not in heads_of(model)]

    def check_store(self, fingerprint: Fingerprint, store: str) -> None:
        """Refuse a store that lacks what the term reads.

        A subclass that needs more than the kinds extends it.

        Args:
          fingerprint: The store's.
          store: Its folder, for messages.

        Raises:
          KDError: the store lacks a kind of target of the term.
        """
        from icefall_kd.kinds import KINDS

        for kind in self.kinds:
            if kind in UNSTORED_KINDS or kind in fingerprint.forms:
                continue
            raise KDError(
                f"the store {store} keeps no {KINDS[kind].title}, and the term "
                f"kd_{self.name}_loss needs them: dump with {KINDS[kind].example}, or "
                f"set {self.parameter('weight')} to 0"
            )

    def prepare(self, student: EncoderOut, targets: Targets) -> None:
        """Get ready for a batch; called for each batch, also where the weight is 0.

        All processes of a training call it for the same batches.

        Args:
          student: The student's outputs.
          targets: The teacher's, on the student's device.
        """

    def value(self, batch: TermInputs) -> Tuple[torch.Tensor, float]:
        """Compute the unweighted term.

        Args:
          batch: The student's outputs and the teacher's targets.

        Returns:
          A scalar, the sum over the frames (or utterances) of the batch, and the number
          of frames that it sums over; ``zero(...)`` and 0.0 where the batch has
          no targets for this term.
        """
        raise NotImplementedError


def heads_of(model: torch.nn.Module) -> Sequence[str]:
    """Return the names in :data:`HEADS` of the heads that an icefall model has.

    Args:
      model: The model.
    """
    return [head for head, (has_head, _) in HEADS.items() if has_head(model)]

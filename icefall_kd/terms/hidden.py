"""The term of hidden layers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, List, Sequence, Tuple

from icefall_kd.errors import KDError, require
from icefall_kd.terms.base import Option, Term
from icefall_kd.terms.schedule import Curve, Weight
from icefall_kd.zipformer import OUT

if TYPE_CHECKING:
    import torch

    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.terms.inputs import TermInputs
    from icefall_kd.terms.projectors import Pair
    from icefall_kd.types import EncoderOut, Targets


class HiddenTerm(Term):
    """The distance between hidden layers, summed over pairs of layers.

    The distance of vectors is :func:`icefall_kd.losses.hidden_kd_loss`, with a
    projector of the student's vectors where the widths differ. Where the teacher's
    targets are MVQ codes it is the cross-entropy of predicting them (MVQ-KD,
    arXiv:2211.00508): the mean over codebooks and over the vectors of a frame, summed
    over frames.

    Args:
      weight: The weight in the joint loss, 0 or more.
      layers: Pairs TEACHER:STUDENT with commas, such as "3:2,out:out"; see
        :func:`parse_layers`. It may be "" where the weight is 0.
      distance: "mse" or "cosine", of vectors.
      projector_lr: Learning rate of the projectors and of the predictors of codes.

    Attributes:
      pairs: The teacher's and the student's layer of each pair.
      projectors: The modules between them, which train beside the student.

    Raises:
      KDError: a parameter that can't be used, or a weight above 0 without layers.
    """

    name = "hidden"
    kinds = ("hidden",)
    options = (
        Option(
            "hidden-weight",
            "weight",
            Curve,
            0.0,
            "Weight of the hidden term: the distance between the layers of "
            "--kd-hidden-layers, summed over frames. It is a number such as 10, or "
            "numbers by epoch.",
        ),
        Option(
            "hidden-layers",
            "layers",
            str,
            "",
            "Pairs TEACHER:STUDENT of layers, with commas. A layer is a stack's index, "
            "from 0 on, or out, the encoder's output: 3:2,out:out.",
        ),
        Option(
            "hidden-distance",
            "distance",
            str,
            "mse",
            "The distance between the vectors of two layers: mse or cosine. Where the "
            "teacher's targets are MVQ codes, the student predicts the codes instead.",
        ),
        Option(
            "hidden-projector-lr",
            "projector_lr",
            float,
            1e-3,
            "Learning rate of Adam for the projectors between layers of different "
            "widths, which train beside the student, such as 0.001.",
        ),
    )

    def __init__(
        self,
        weight: Weight = 1.0,
        layers: str = "",
        distance: str = "mse",
        projector_lr: float = 1e-3,
    ) -> None:
        from icefall_kd.losses.hidden import DISTANCES
        from icefall_kd.terms.projectors import Projectors

        super().__init__(weight)
        require(
            layers or not self.weight.highest,
            f"{self.parameter('weight')} is above 0 and no layers are named: give "
            f"{self.parameter('layers')}, such as out:out",
        )
        self.require_one_of("distance", distance, DISTANCES)
        self.distance = distance
        self.pairs = parse_layers(layers) if layers else []
        self.projectors = Projectors(self.pairs, projector_lr)
        self.teacher_layers = sorted({t for t, _ in self.pairs}, key=str)
        self.student_layers = sorted({s for _, s in self.pairs}, key=str)

    def note(self) -> str:
        pairs = ",".join(f"{teacher}:{student}" for teacher, student in self.pairs)
        return f"{self.distance} of {pairs}"

    def check_store(self, fingerprint: Fingerprint, store: str) -> None:
        """Refuse a ``store`` whose ``fingerprint`` lacks a layer of the teacher."""
        super().check_store(fingerprint, store)
        stored = fingerprint.kinds["hidden"].layers
        for layer in self.teacher_layers:
            require(
                layer in stored,
                f"the store {store} keeps the layers {fingerprint.hidden} and not "
                f"{layer}, which {self.parameter('layers')} names: dump with "
                f"--keep-hidden {layer}:half, or set {self.parameter('weight')} to 0",
            )

    def prepare(self, student: EncoderOut, targets: Targets) -> None:
        """Make the projectors between the layers of ``student`` and ``targets``."""
        self.projectors.build(student, targets.parts.get("hidden", {}))

    def value(self, batch: TermInputs) -> Tuple[torch.Tensor, float]:
        """Sum the distances over the pairs of layers and the frames of ``batch``."""
        from icefall_kd.kinds.hidden import hidden_rows

        total, hidden, t = None, batch.targets.parts.get("hidden"), batch.mask.size(1)
        for pair in self.pairs:
            student = hidden_rows(batch.student, pair[1])  # (N, T, R, C)
            if hidden:
                teacher = hidden[pair[0]].to(student.device)
                value = self.projectors.distance(
                    pair, student[:, :t], teacher[:, :t], batch.mask, self.distance
                )
            else:
                value = batch.zero(student)
            total = value if total is None else total + value
        return total, float(batch.mask.sum()) if hidden else 0.0


def parse_layers(text: str) -> Sequence[Pair]:
    """Parse pairs of the teacher's and the student's layer.

    Args:
      text: Pairs with commas, such as "3:2,out:out". A layer is a stack's index or
        "out"; one without a colon is that of both sides.

    Returns:
      The pairs, in their order.

    Raises:
      KDError: another form, a pair that occurs twice, or a stack beside "out", whose
        frame rates differ.
    """
    parameter = HiddenTerm.parameter("layers")
    pairs: List[Pair] = []
    for part in text.split(","):
        teacher, _, student = part.strip().partition(":")
        layers = []
        for name in (teacher, student or teacher):
            require(
                re.fullmatch(f"{OUT}|[0-9]{{1,3}}", name),
                f"{parameter} is {text!r}: give pairs TEACHER:STUDENT with commas, "
                f"each a stack's index or {OUT}, as in 3:2,{OUT}:{OUT}",
            )
            layers.append(OUT if name == OUT else int(name))
        pair = (layers[0], layers[1])
        if (pair[0] == OUT) != (pair[1] == OUT):
            raise KDError(
                f"{parameter} pairs {teacher} with {student}, and {OUT} has 25 frames "
                "a second where stacks have 50: pair stacks with stacks"
            )
        require(pair not in pairs, f"{parameter} has the pair {part} twice in {text!r}")
        pairs.append(pair)
    return pairs

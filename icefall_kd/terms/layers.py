"""Pairs of hidden layers, and what is trained between student and teacher.

A projector (a linear layer to the teacher's width) or a predictor of codebook indexes
learns beside the student. It lies outside the student's modules, so that it is in no
checkpoint of the student and DDP doesn't see it: :meth:`HiddenLayers.step` averages its
gradients over the processes and moves it by an Adam of its own.
"""

import re
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import OUT, Layer, hidden_rows, import_quantization
from icefall_kd.losses.hidden import DISTANCES, hidden_kd_loss
from icefall_kd.losses.kl import wide
from icefall_kd.types import EncoderOut, Targets

CODEBOOK_SIZE = 256  # of a byte
SEED = 20220813  # of the predictors: every process starts from the same


def parse_layers(text: str) -> List[Tuple[Layer, Layer]]:
    """Pairs of the teacher's and the student's layer, from ``3:2,out:out``.

    A layer is a stack's index or ``out``; one alone stands for both sides.

    Raises:
      KDError: another form, a pair that occurs twice, or a stack beside ``out``, whose
        frame rates differ.
    """

    def layer(name: str) -> Layer:
        if re.fullmatch(f"{OUT}|[0-9]{{1,3}}", name):
            return OUT if name == OUT else int(name)
        raise KDError(
            f"--kd-hidden-layers is {text!r}: give pairs TEACHER:STUDENT with commas, "
            f"each a stack's index or {OUT}, as in 3:2,{OUT}:{OUT}"
        )

    pairs = []
    for part in text.split(","):
        teacher, _, student = part.strip().partition(":")
        pair = (layer(teacher), layer(student or teacher))
        if (pair[0] == OUT) != (pair[1] == OUT):
            raise KDError(
                f"--kd-hidden-layers pairs {teacher} with {student}, and {OUT} has 25 "
                "frames a second where stacks have 50: pair stacks with stacks"
            )
        if pair in pairs:
            raise KDError(f"--kd-hidden-layers has the pair {part} twice in {text!r}")
        pairs.append(pair)
    return pairs


class _Projector(nn.Linear):
    """To the teacher's width; the first channels stay what they are at first."""

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


class _FromScale(torch.autograd.Function):
    """A term, behind which its gradient is that of the unweighted term.

    So neither the weight nor the scale of fp16 training reach a projector, whatever
    they are in each of several passes that add up. ``scale`` takes them for
    :class:`_ToScale`.
    """

    @staticmethod
    def forward(ctx, value: torch.Tensor, scale: List[torch.Tensor]) -> torch.Tensor:
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> Tuple[torch.Tensor, None]:
        ctx.scale[:] = [g]
        # Of a term that is off 0, of an overflow NaN.
        return torch.where(g == 0, g, g / g), None


class _ToScale(torch.autograd.Function):
    """What a projector gets, whose gradient is that of the weighted term again."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, scale: List[torch.Tensor]) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> Tuple[torch.Tensor, None]:
        return g * ctx.scale[0], None


class HiddenLayers:
    """The hidden-layer term: sum over pairs of the distance of their layers.

    Of a teacher's vectors :func:`icefall_kd.losses.hidden_kd_loss` behind a projector,
    where the widths differ; of a teacher's codes the cross-entropy of predicting them
    (MVQ-KD, arXiv:2211.00508), mean over codebooks and over the vectors of a frame,
    summed over frames.

    Args:
      pairs: The teacher's and the student's layer of each pair.
      kind: ``mse`` or ``cosine``, for vectors.
      lr: Of what is trained between.
    """

    def __init__(
        self, pairs: List[Tuple[Layer, Layer]], kind: str = "mse", lr: float = 1e-3
    ) -> None:
        if kind not in DISTANCES:
            raise KDError(
                f"the hidden loss is {kind!r}: give --kd-hidden-kind one of "
                f"{', '.join(DISTANCES)}"
            )
        self.pairs, self.kind, self.lr = pairs, kind, lr
        self.modules = nn.ModuleDict()
        self.optimizer: Optional[torch.optim.Optimizer] = None
        self.widths: Dict[Layer, Tuple[int, bool]] = {}  # of the teacher; codes or not
        self._loaded: Optional[Dict[str, Any]] = None

    def __str__(self) -> str:
        pairs = ",".join(f"{t}:{s}" for t, s in self.pairs)
        return f"{self.kind} of {pairs}"

    @property
    def student_layers(self) -> List[Layer]:
        return sorted({s for _, s in self.pairs}, key=str)

    @property
    def teacher_layers(self) -> List[Layer]:
        return sorted({t for t, _ in self.pairs}, key=str)

    def learn_widths(self, hidden: Dict[Layer, torch.Tensor]) -> None:
        """Take the teacher's widths from one batch or record of its layers.

        Raises:
          KDError: a layer that the teacher's targets lack.
        """
        for layer in self.teacher_layers:
            if layer not in hidden:
                raise KDError(
                    f"the targets keep layers {sorted(map(str, hidden))} of the "
                    f"teacher and not {layer}, which --kd-hidden-layers names: dump "
                    f"with --keep-hidden {layer}:half"
                )
            rows = hidden[layer]
            self.widths[layer] = (rows.size(-1), not rows.is_floating_point())

    def __call__(
        self, student: EncoderOut, targets: Targets, mask: torch.Tensor
    ) -> torch.Tensor:
        """The term, a sum over the frames of ``mask``, (N, T), behind :meth:`build`.

        Raises:
          KDError: layers that don't fit each other.
        """
        total, t = None, mask.size(1)
        for pair in self.pairs:
            rows = hidden_rows(student, pair[1])
            if not targets.parts.get("hidden"):
                value = rows[:0].sum()  # 0, whatever stands in padding
            else:
                module = self.modules["-".join(map(str, pair))]
                said = targets.parts["hidden"][pair[0]].to(rows.device)
                value = self._distance(module, rows[:, :t], said[:, :t], mask)
            total = value if total is None else total + value
        return total

    def _distance(self, module, rows, said, mask) -> torch.Tensor:
        lengths = torch.full((len(mask),), mask.size(1), device=mask.device)
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(wide(rows.dtype))
            if isinstance(module, nn.Identity):
                return hidden_kd_loss(
                    rows, said, lengths, distance=self.kind, mask=mask
                )
            scale: List[torch.Tensor] = []
            rows = _ToScale.apply(rows, scale)
            if said.is_floating_point():
                value = hidden_kd_loss(
                    module(rows), said, lengths, distance=self.kind, mask=mask
                )
                return _FromScale.apply(value, scale)
            x, codes = rows[mask], said[mask]
            if not len(x):
                return rows[:0].sum()
            value = module(x, codes) / (codes.size(-1) * codes.size(-2))
            return _FromScale.apply(value, scale)

    def build(self, student: EncoderOut, targets: Targets) -> None:
        """Make what is missing between the pairs, once both widths are known."""
        if len(self.modules) == len(self.pairs):
            return
        if targets.parts.get("hidden") and not self.widths:
            self.learn_widths(targets.parts["hidden"])
        if not self.widths:
            self._refuse_to_wait()
            return
        device = student.encoder_out.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            for pair in self.pairs:
                c = hidden_rows(student, pair[1]).size(-1)
                self.modules["-".join(map(str, pair))] = self._module(pair, c)
        dtype = wide(student.encoder_out.dtype)
        self.modules.to(device, dtype)
        parameters = list(self.modules.parameters())
        if parameters:
            self.optimizer = torch.optim.Adam(parameters, lr=self.lr)
        if self._loaded is not None:
            self._load()

    def _refuse_to_wait(self) -> None:
        """Among processes, one without projectors would keep the others waiting."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise KDError(
                "this process's first batch has no hidden layers of the teacher for "
                f"the pairs {self}, and another process may have some: call "
                "learn_widths() in all of them before the first batch"
            )

    def _module(self, pair: Tuple[Layer, Layer], c: int) -> nn.Module:
        width, codes = self.widths[pair[0]]
        if codes:
            predictor = import_quantization().JointCodebookLoss
            return predictor(c, width, is_joint=False, checkpoint=False)
        return nn.Identity() if c == width else _Projector(c, width)

    def reduce(self) -> bool:
        """Average the gradients over the processes; say whether they can be used."""
        parameters = list(self.modules.parameters())
        if not parameters:
            return False
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        begin = 0
        for p in parameters:
            p.grad = flat[begin : begin + p.numel()].view_as(p)
            begin += p.numel()
        return bool(torch.isfinite(flat).all() and flat.any())

    def step(self) -> None:
        """Learn from the last backward pass; every process calls it as often."""
        if self.reduce():
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Leave out the last backward pass, which was of no training batch."""
        for p in self.modules.parameters():
            p.grad = None

    def state_dict(self) -> Dict[str, Any]:
        if self.optimizer is None:
            return {}
        return {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, now or as soon as the widths are known."""
        self._loaded = state or None
        if self._loaded and self.modules:
            self._load()

    def _load(self) -> None:
        try:
            self.modules.load_state_dict(self._loaded["modules"])
            groups = self.optimizer.state_dict()["param_groups"]  # of this lr
            state = {"state": self._loaded["optimizer"], "param_groups": groups}
            self.optimizer.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as e:
            raise KDError(
                "the projectors of the training that goes on are of other layers than "
                f"{self} ({str(e).splitlines()[0]}): give the --kd-hidden-layers that "
                "it began with, or remove kd.pt from its --exp-dir"
            ) from None
        self._loaded = None

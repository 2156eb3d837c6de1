"""The modules between the student's hidden layers and the teacher's.

A projector (a linear map to the teacher's width) or a predictor of MVQ codes trains
beside the student. It lies outside the student's modules, so that it is in no
checkpoint of the student and not among the parameters of DistributedDataParallel:
:meth:`Projectors.step` averages its gradients over the processes and updates it with an
Adam of its own.
"""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import nn

from icefall_kd.errors import KDError, require
from icefall_kd.kinds.hidden import hidden_rows, import_quantization
from icefall_kd.losses.hidden import hidden_kd_loss
from icefall_kd.losses.kl import compute_dtype
from icefall_kd.types import EncoderOut
from icefall_kd.zipformer import Layer

Pair = Tuple[Layer, Layer]  # the teacher's layer and the student's
SEED = 20220813  # of the predictors: all processes start with the same parameters


class Projector(nn.Linear):
    """A linear map to the teacher's width, initialised to the identity."""

    def reset_parameters(self) -> None:
        """Set the weight to the identity and the bias to 0."""
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


class _FromScale(torch.autograd.Function):
    """The identity, whose backward pass replaces the gradient by 1 and stores it.

    So neither the weight of a term nor the scale of fp16 training reaches a projector,
    even if several backward passes with different scales add up. :class:`_ToScale`
    multiplies the gradient towards the projector's input by the stored one.
    """

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, scale: List[torch.Tensor]
    ) -> torch.Tensor:
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[torch.Tensor, None]:
        ctx.scale[:] = [g]
        # Of a term that is off 0, of an overflow NaN.
        return torch.where(g == 0, g, g / g), None


class _ToScale(torch.autograd.Function):
    """The identity, whose backward pass multiplies by the gradient in ``scale``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: List[torch.Tensor]) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[torch.Tensor, None]:
        return g * ctx.scale[0], None


class Projectors:
    """A module for each pair of layers, and their optimizer.

    A module is an identity where the widths are equal, a :class:`Projector` where they
    differ, and a predictor where the teacher's targets are MVQ codes. They are made in
    the first batch, once both widths are known.

    Args:
      pairs: The teacher's and the student's layer of each pair.
      lr: Adam's learning rate.

    Attributes:
      widths: For each layer of the teacher its width, and whether it holds codes.
    """

    def __init__(self, pairs: Sequence[Pair], lr: float = 1e-3) -> None:
        self.pairs, self.lr = pairs, lr
        self.modules = nn.ModuleDict()
        self.optimizer: Optional[torch.optim.Optimizer] = None
        self.widths: Dict[Layer, Tuple[int, bool]] = {}
        self._loaded: Optional[Dict[str, Any]] = None

    def __str__(self) -> str:
        return ",".join(f"{teacher}:{student}" for teacher, student in self.pairs)

    def between(self, pair: Pair) -> nn.Module:
        """Return the module of a pair.

        Args:
          pair: One of the pairs.
        """
        return self.modules["-".join(map(str, pair))]

    def read_widths(self, hidden: Mapping[Layer, torch.Tensor]) -> None:
        """Read the teacher's widths off one batch or one record.

        Args:
          hidden: (N, T, R, C) vectors or codes of each of the teacher's layers.

        Raises:
          KDError: a layer that the teacher's targets lack.
        """
        for layer, _ in self.pairs:
            require(
                layer in hidden,
                f"the targets keep layers {sorted(map(str, hidden))} of the teacher "
                f"and not {layer}, which `HiddenTerm.layers` names: dump "
                f"with --keep-hidden {layer}:half",
            )
            rows = hidden[layer]
            self.widths[layer] = (rows.size(-1), not rows.is_floating_point())

    def build(self, student: EncoderOut, hidden: Mapping[Layer, torch.Tensor]) -> None:
        """Make the modules, unless they are made or a width is not known yet.

        Args:
          student: The student's outputs, with the layers of the pairs.
          hidden: The teacher's layers of this batch; {} for none.

        Raises:
          KDError: a layer that the teacher's targets lack; or, among several processes,
            a first batch without targets, since the others would wait for this one.
        """
        if len(self.modules) == len(self.pairs):
            return
        if hidden and not self.widths:
            self.read_widths(hidden)
        if not self.widths:
            self._refuse_to_wait()
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            for pair in self.pairs:
                width = hidden_rows(student, pair[1]).size(-1)
                self.modules["-".join(map(str, pair))] = self._module(pair[0], width)
        self.modules.to(
            student.encoder_out.device, compute_dtype(student.encoder_out.dtype)
        )
        parameters = list(self.modules.parameters())
        if parameters:
            self.optimizer = torch.optim.Adam(parameters, lr=self.lr)
        if self._loaded is not None:
            self._load()

    def _refuse_to_wait(self) -> None:
        """Refuse to go on without projectors while other processes have theirs."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise KDError(
                "this process's first batch has no hidden layers of the teacher for "
                f"the pairs {self}, and another process may have some: call "
                "read_widths() in all of them before the first batch"
            )

    def _module(self, layer: Layer, width: int) -> nn.Module:
        """Make the module from a student's width to a layer of the teacher."""
        teacher_width, is_codes = self.widths[layer]
        if is_codes:
            predictor = import_quantization().JointCodebookLoss
            return predictor(width, teacher_width, is_joint=False, checkpoint=False)
        return (
            nn.Identity() if width == teacher_width else Projector(width, teacher_width)
        )

    def distance(
        self,
        pair: Pair,
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor,
        distance: str = "mse",
    ) -> torch.Tensor:
        """Compute the distance of one pair of layers, after its module.

        Args:
          pair: One of the pairs.
          student: (N, T, R, C), the student's vectors.
          teacher: (N, T, R, C'), the teacher's vectors, or its MVQ codes,
            (N, T, R, codebooks) in int64.
          mask: (N, T), bool, the frames that count.
          distance: "mse" or "cosine", of vectors.

        Returns:
          A scalar, summed over frames. The module's gradient is that of the scalar
          itself, and the student's that of the weighted scalar.
        """
        module = self.between(pair)
        options: Dict[str, Any] = {"distance": distance, "mask": mask}
        lengths = torch.full((len(mask),), mask.size(1), device=mask.device)
        with torch.autocast(student.device.type, enabled=False):
            student = student.to(compute_dtype(student.dtype))
            if isinstance(module, nn.Identity):
                return hidden_kd_loss(student, teacher, lengths, **options)
            scale: List[torch.Tensor] = []
            student = _ToScale.apply(student, scale)
            if teacher.is_floating_point():
                value = hidden_kd_loss(module(student), teacher, lengths, **options)
                return _FromScale.apply(value, scale)
            rows, codes = student[mask], teacher[mask]  # (M, R, C), (M, R, codebooks)
            if not len(rows):
                return student[:0].sum()
            value = module(rows, codes) / (codes.size(-1) * codes.size(-2))
            return _FromScale.apply(value, scale)

    def reduce(self) -> bool:
        """Average the gradients over the processes.

        Returns:
          Whether they are finite and not all 0, so that a step can be taken.
        """
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
        """Update the modules by the last backward pass; all processes call it alike."""
        if self.reduce():
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients, as the last batch was none of the training."""
        for p in self.modules.parameters():
            p.grad = None

    def state_dict(self) -> Dict[str, Any]:
        """Return the modules' and the optimizer's state; {} before the first batch."""
        if self.optimizer is None:
            return {}
        return {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore a state, now or as soon as the modules are made.

        Args:
          state: What :meth:`state_dict` returned.

        Raises:
          KDError: the state is of other layers.
        """
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
                f"{self} ({str(e).splitlines()[0]}): give the "
                "`HiddenTerm.layers` that it began with, or remove kd.pt from its "
                "experiment folder"
            ) from None
        self._loaded = None

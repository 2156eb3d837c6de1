"""Parts of a student that don't train, and when they thaw.

A frozen part computes with copies of its parameters that take no gradient, and the
parameters themselves wait outside the model. They stay in DDP's buckets and in the
optimizer's groups, so that a part can thaw, and because ScaledAdam needs them: it
batches parameters of one shape, so that a group with fewer of them can't take the
states of a checkpoint. ScaledAdam may move them there even without a gradient: by the
momentum of earlier steps, and where a tensor's rms is above 3 or a scalar beyond 10.
The copies are only the model's, so they keep every bit.
"""

import logging
import math
import re
from dataclasses import dataclass, field
from typing import Collection, Dict, List, Optional, Tuple

from torch import nn

from icefall_kd.errors import KDError, require

_STACK = re.compile(r"^encoder\.(\d+)")


@dataclass
class _Waiting:
    """A parameter of a frozen part, which waits outside the model."""

    parameter: nn.Parameter
    copy: nn.Parameter  # what the model computes with
    places: List[Tuple[nn.Module, str]]  # modules that have it, its name in each


@dataclass
class Part:
    """A submodule that is frozen."""

    name: str  # the submodule's, as in the model's named_modules()
    until: Optional[float]  # it thaws after so many epochs; None: never
    waiting: List[_Waiting] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name if self.until is None else f"{self.name}:{self.until:.12g}"


class Freezer:
    """Freezes a model's parts, and thaws them after so many epochs.

    Parameters that did not train before, such as those of the model under an adapter,
    are left as they are and never thawed. The optimizer must exist when the first part
    is frozen, which the first :meth:`update` does, and not the constructor.

    A part that thaws has no second moments in the optimizer yet: for about 50 steps it
    moves two to three times as far as one that trained all along.

    Args:
      model: The student, in DDP with ``find_unused_parameters=True`` or not in DDP.
      freeze: The parts, separated by spaces, such as ``"encoder_embed decoder:2
        encoder.0:1.5"``. A number is that of the epochs after which the part thaws;
        without one it stays frozen. ``encoder.0`` is the encoder's first stack,
        ``encoder.encoders.0``.
      epoch: How many epochs are done. Parts that thawed by then are not frozen.
      thawed: Parts that thawed before, each as ``str()`` of a :class:`Part`.

    Raises:
      KDError: A part does not exist, is named twice or lies inside another one; a time
        can't be used; DDP would wait for gradients; or no parameter would train.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze: str,
        epoch: float = 0.0,
        thawed: Collection[str] = (),
    ) -> None:
        require(
            getattr(model, "find_unused_parameters", True),
            "parts are to be frozen, and DDP would wait for their gradients: build it "
            "with find_unused_parameters=True, or leave out `freeze`",
        )
        self.model = getattr(model, "module", model)
        self.parts = [
            part
            for part in _parse(freeze, self.model)
            if part.until is None or (part.until > epoch and str(part) not in thawed)
        ]
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        for part in self.parts:
            module = self.model.get_submodule(part.name)
            trained -= {id(p) for p in module.parameters()}
        require(
            trained,
            f"`freeze` {freeze} leaves no parameter to train at the beginning: leave "
            "out one of its parts",
        )
        self._begun = False

    @property
    def pending(self) -> List[float]:
        """The epochs after which parts will thaw, in ascending order."""
        return sorted(part.until for part in self.parts if part.until is not None)

    def update(self, epoch: float) -> List[Part]:
        """Freeze the parts at the first call, and thaw those that are due.

        Call it before a forward pass, not between one and its backward pass.

        Args:
          epoch: How many epochs are done, the same number in all processes.

        Returns:
          The parts that thawed.
        """
        if not self._begun:
            self._begun = True
            self._freeze()
        due = [p for p in self.parts if p.until is not None and p.until <= epoch]
        for part in due:
            self._thaw(part)
            logging.info(f"Thawed after {epoch:g} epochs: {part.name} ({_size(part)})")
        return due

    def close(self) -> None:
        """Thaw all parts."""
        for part in self.parts[:]:
            self._thaw(part)

    def _freeze(self) -> None:
        places: Dict[int, List[Tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for name, p in module._parameters.items():
                places.setdefault(id(p), []).append((module, name))
        for part in self.parts:
            module = self.model.get_submodule(part.name)
            for p in [p for p in module.parameters() if p.requires_grad]:
                copy = nn.Parameter(p.detach().clone(), requires_grad=False)
                part.waiting.append(_Waiting(p, copy, places[id(p)]))
                _put(copy, places[id(p)])
                p.grad = None  # the optimizer would go on with it
        descriptions = []
        for part in self.parts:
            end = "to the end" if part.until is None else f"until epoch {part.until:g}"
            descriptions.append(f"{part.name} ({_size(part)}, {end} of this training)")
        if descriptions:
            logging.info(f"Frozen: {'; '.join(descriptions)}")

    def _thaw(self, part: Part) -> None:
        for waiting in part.waiting:
            waiting.parameter.data.copy_(waiting.copy.data)
            waiting.parameter.grad = None
            _put(waiting.parameter, waiting.places)
        self.parts.remove(part)


def _put(parameter: nn.Parameter, places: List[Tuple[nn.Module, str]]) -> None:
    for module, name in places:
        setattr(module, name, parameter)  # the order of the state dict stays


def _size(part: Part) -> str:
    number = sum(waiting.copy.numel() for waiting in part.waiting)
    return f"{number} parameters"


def _parse(freeze: str, model: nn.Module) -> List[Part]:
    parts: List[Part] = []
    for word in freeze.split():
        short_name, colon, time = word.partition(":")
        name = _full_name(short_name, model)
        part = Part(name, _time(word, time) if colon else None)
        for earlier in parts:
            require(
                name != earlier.name,
                f"`freeze` names {name} twice, as {earlier} and {part}: keep one",
            )
            outer, inner = sorted((name, earlier.name), key=len)
            require(
                not inner.startswith(f"{outer}."),
                f"`freeze` names {inner}, which lies inside {outer}, and that is to be "
                "frozen too: leave out one of them, or name the parts of "
                f"{outer} one by one",
            )
        parts.append(part)
    return parts


def _time(word: str, time: str) -> float:
    try:
        epochs = float(time)
    except ValueError:
        epochs = math.nan
    require(
        math.isfinite(epochs) and epochs >= 0,
        f"`freeze` has {word}, and the time after which a part thaws must be a number "
        "of epochs from 0 on, as in decoder:2: mend it, or leave it out to freeze the "
        "part to the end",
    )
    return epochs


def _full_name(short_name: str, model: nn.Module) -> str:
    """The name in ``named_modules()`` of a submodule with parameters, or a refusal."""
    names = [
        name
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters())
    ]
    for name in (short_name, _STACK.sub(r"encoder.encoders.\1", short_name, 1)):
        if name in names:
            return name
    parts = [name for name, _ in model.named_children() if name in names]
    prefix = "encoder.encoders."
    stacks = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    parts += [f"encoder.{stack}" for stack in stacks if stack.isdigit()]
    raise KDError(
        f"`freeze` names {short_name!r}, and the model has no such part: give one of "
        f"{', '.join(parts)}, or a submodule of them that holds parameters"
    )

"""Parts of a student that don't train, and when they thaw.

A frozen part computes with copies that take no gradient, and the parameters themselves
wait outside the model. They stay in DDP's buckets and in the optimizer's groups, where
a part that thaws finds them, and where ScaledAdam needs them: it batches parameters of
one shape, so that a group with fewer has no room for the states of a checkpoint. And
they may be moved there, as ScaledAdam does without any gradient: by the momentum of
earlier steps, and where a tensor's rms is above 3 or a scalar beyond 10. The copies
are nobody's but the model's: they keep every bit.
"""

import logging
import math
import re
from dataclasses import dataclass, field
from typing import Collection, Dict, List, Optional, Tuple

from torch import nn

from icefall_kd.errors import KDError

_STACK = re.compile(r"encoder\.(\d+)")


@dataclass
class _Waiting:
    """A parameter of a frozen part, outside the model."""

    parameter: nn.Parameter
    copy: nn.Parameter  # what the model computes with
    places: List[Tuple[nn.Module, str]]  # where it belongs: modules, and its name there


@dataclass
class Part:
    """A submodule that is frozen."""

    name: str  # the submodule's, as the model has it
    until: Optional[float]  # epochs, then it thaws; None: never
    waiting: List[_Waiting] = field(default_factory=list)

    def __str__(self) -> str:
        """As the option has it, with the submodule's own name."""
        return self.name if self.until is None else f"{self.name}:{self.until:.12g}"


class Freezer:
    """Freezes a model's parts, and thaws them after so many epochs.

    What did not train before, such as the model under an adapter, is left as it is and
    never thawed. The optimizer must have been built when the first part is frozen: by
    the first :meth:`update`, not by the constructor.

    A part that thaws has no second moments in the optimizer yet: for about 50 steps it
    moves two to three times as far as one that trained all along.

    Args:
      model: The student, bare or in DDP with ``find_unused_parameters=True``.
      spec: Parts, each with the number of epochs after which it thaws, or to the end:
        ``"encoder_embed decoder:2 encoder.0:1.5"``. ``encoder.0`` is the encoder's
        first stack, ``encoder.encoders.0``.
      epoch: How many epochs are done; what thawed by then stays thawed.
      thawed: Parts that thawed before, as :class:`Part` writes them.

    Raises:
      KDError: a part that there is not, that is named twice or lies inside another one,
        a time that is none, DDP that would wait for gradients, or no parameter left
        that trains.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: str,
        epoch: float = 0.0,
        thawed: Collection[str] = (),
    ) -> None:
        if not getattr(model, "find_unused_parameters", True):
            raise KDError(
                "parts are to be frozen, and DDP would wait for their gradients: build "
                "it with find_unused_parameters=True, or leave out --kd-freeze"
            )
        self.model = getattr(model, "module", model)
        self.parts = [
            part
            for part in _parse(spec, self.model)
            if part.until is None or (part.until > epoch and str(part) not in thawed)
        ]
        left = {id(p) for p in self.model.parameters() if p.requires_grad}
        for part in self.parts:
            module = self.model.get_submodule(part.name)
            left -= {id(p) for p in module.parameters()}
        if not left:
            raise KDError(
                f"--kd-freeze {spec} leaves no parameter to train at the beginning: "
                "leave out one of its parts"
            )
        self._begun = False

    @property
    def pending(self) -> List[float]:
        """When parts will thaw, in epochs."""
        return sorted(part.until for part in self.parts if part.until is not None)

    def update(self, epoch: float) -> List[Part]:
        """Freeze and thaw what is due after so many epochs; return what thawed.

        To be called before a forward pass, not between it and its backward pass. All
        processes of a training must give the same epoch.
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
        """Thaw all that is frozen."""
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
        said = [
            f"{part.name} ({_size(part)}, "
            + ("to the end" if part.until is None else f"until epoch {part.until:g}")
            + " of this training)"
            for part in self.parts
        ]
        if said:
            logging.info(f"Frozen: {'; '.join(said)}")

    def _thaw(self, part: Part) -> None:
        for waiting in part.waiting:
            waiting.parameter.data.copy_(waiting.copy.data)
            waiting.parameter.grad = None
            _put(waiting.parameter, waiting.places)
        self.parts.remove(part)


def _put(parameter: nn.Parameter, places: List[Tuple[nn.Module, str]]) -> None:
    for module, name in places:
        setattr(module, name, parameter)  # keeps its place in the state dict


def _size(part: Part) -> str:
    number = sum(waiting.copy.numel() for waiting in part.waiting)
    return f"{number} parameters"


def _parse(spec: str, model: nn.Module) -> List[Part]:
    parts: List[Part] = []
    for word in spec.split():
        given, colon, time = word.partition(":")
        name = _name_of(given, model)
        part = Part(name, _time(word, time) if colon else None)
        for other in parts:
            if name == other.name:
                raise KDError(
                    f"--kd-freeze names {name} twice, as {other} and {part}: keep one"
                )
            first, second = sorted((name, other.name), key=len)
            if second.startswith(first + "."):
                raise KDError(
                    f"--kd-freeze names {second}, which lies inside {first}, and that "
                    "is to be frozen too: leave out one of them, or name the parts of "
                    f"{first} one by one"
                )
        parts.append(part)
    return parts


def _time(word: str, time: str) -> float:
    try:
        epochs = float(time)
    except ValueError:
        epochs = math.nan
    if not (math.isfinite(epochs) and epochs >= 0):
        raise KDError(
            f"--kd-freeze has {word}, and the time after which a part thaws must be a "
            "number of epochs from 0 on, as in decoder:2: mend it, or leave it out to "
            "freeze the part to the end"
        )
    return epochs


def _name_of(given: str, model: nn.Module) -> str:
    """A submodule's own name.

    Raises:
      KDError: there is none with parameters of that name.
    """
    known = {
        n for n, m in model.named_modules() if n and any(True for _ in m.parameters())
    }
    stack = (
        _STACK.sub(r"encoder.encoders.\1", given, 1) if _STACK.match(given) else given
    )
    for name in (given, stack):
        if name in known:
            return name
    parts = [name for name, _ in model.named_children() if name in known]
    short = "encoder.encoders."
    parts += [
        f"encoder.{n[len(short):]}"
        for n, _ in model.named_modules()
        if n in known and n.startswith(short) and n[len(short) :].isdigit()
    ]
    raise KDError(
        f"--kd-freeze names {given!r}, and the model has no such part: give one of "
        f"{', '.join(parts)}, or a submodule of them that holds parameters"
    )

"""The teachers that a command asks, and what they say on a batch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
from lhotse.cut import Cut

from icefall_kd.cli.cuts import labels_of
from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import Layer, hidden_rows
from icefall_kd.targets.fingerprint import Fingerprint, name_of
from icefall_kd.teacher import OnlineTeacher
from icefall_kd.teacher.loader import load_recipe_model
from icefall_kd.types import NoPath, PrunedLattice


@dataclass
class Said:
    """What the teacher said on a batch, on the CPU and without gradient."""

    lens: List[int]
    ctc: Optional[torch.Tensor] = None  # (N, T, V)
    lattices: Optional[List[Union[PrunedLattice, NoPath]]] = None  # of each utterance
    hidden: Dict[Layer, torch.Tensor] = field(default_factory=dict)  # (N, T, R, C)

    def of(self, i: int) -> Dict[str, Any]:
        """What :meth:`TargetWriter.encode` takes of utterance ``i``."""
        n = self.lens[i]
        return {
            "ctc": None if self.ctc is None else self.ctc[i, :n],
            "lattice": self.lattices and self.lattices[i],
            "hidden": {layer: x[i, :n] for layer, x in self.hidden.items()},
        }


class Teacher:
    """The teacher or teachers of a dump, and what is to be taken of them."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        models: List[torch.nn.Module],
        weights: Optional[List[float]],
        choose: Optional[Callable[[Cut], int]],
        sp: Optional[Any],
    ) -> None:
        self.layers = [codec.layer for codec in fingerprint.hidden_codecs()]
        self.with_ctc = bool(fingerprint.ctc)
        self.with_lattice = bool(fingerprint.lattice)
        self.s_range = fingerprint.s_range
        self.sp = sp
        self.group = OnlineTeacher(models, weights, choose, self.layers, self.with_ctc)

    def __call__(self, x: torch.Tensor, x_lens: torch.Tensor, cuts: List[Cut]) -> Said:
        outs = self.group.encode(x, x_lens)
        said = Said(outs[0].encoder_out_lens.tolist())
        if self.with_ctc:
            said.ctc = self.group.ctc(outs, cuts).cpu()
        if self.with_lattice:
            y = labels_of(cuts, self.sp)
            fit = [len(labels) <= frames for labels, frames in zip(y, said.lens)]
            y = [labels if ok else labels[:1] for labels, ok in zip(y, fit)]
            found = _split(self.group.lattice(outs, y, self.s_range, cuts))
            if not self.s_range:  # the positions of the batch's longest transcript
                found = [_as_alone(lattice) for lattice in found]
            said.lattices = [
                x if ok else NoPath(n) for x, ok, n in zip(found, fit, said.lens)
            ]
        for layer in self.layers:
            said.hidden[layer] = hidden_rows(outs[0], layer).cpu()
        return said


def chooser(name: str) -> Callable[[Cut], int]:
    """Reads the number of a cut's teacher from its field, or its supervision's."""

    def choose(cut: Cut) -> int:
        for owner in (cut, *cut.supervisions):
            value = (owner.custom or {}).get(name)
            if value is not None:
                break
        if not isinstance(value, int) or isinstance(value, bool):
            raise KDError(
                f"the field {name!r} of cut {cut.id} is {value!r}, and must be the "
                "number of its teacher among --exp-dir, from 0 on: write it into the "
                "cut's custom fields"
            )
        return value

    return choose


def load_teachers(
    recipe: str, folders: List[str], *options: Any
) -> Tuple[List[torch.nn.Module], Dict[str, Any], List[str]]:
    """The teachers' models, the settings that they share, and each one's name."""
    models, settings, names = [], None, []
    for folder in folders:
        model, found = load_recipe_model(recipe, folder, *options)
        settings = settings or found
        for name in ("vocab_size", "blank_id", "feature_dim", "subsampling_factor"):
            if found.get(name) != settings.get(name):
                raise KDError(
                    f"the teacher in {folders[0]} has {name} {settings.get(name)} and "
                    f"that in {folder} has {found.get(name)}: teachers of one student "
                    "must agree"
                )
        models.append(model)
        names.append(name_of(model, found))
    return models, settings, names


def numbers(text: str) -> Optional[List[float]]:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise KDError(
            f"--weights is {text!r}: give a number for each teacher, with commas"
        ) from None


def joined(names: List[str], weights: Optional[List[float]], field: str) -> str:
    """What the fingerprint calls several teachers."""
    if len(names) == 1:
        return names[0]
    if field:
        return ",".join(names) + f" by {field}"
    return ",".join(f"{h}*{w:g}" for h, w in zip(names, weights or [1] * len(names)))


def _split(lattice: PrunedLattice) -> List[PrunedLattice]:
    """One lattice for each utterance."""
    return [
        PrunedLattice(
            *(
                getattr(lattice, f.name)[i : i + 1].cpu()
                for f in dataclasses.fields(lattice)
            )
        )
        for i in range(len(lattice.boundary))
    ]


def _as_alone(lattice: PrunedLattice) -> PrunedLattice:
    """A full lattice, N = 1, with the label positions of its own transcript alone."""
    size = int(lattice.boundary[0, 2]) + 1
    names = ("ranges", "logits", "occupancy")
    narrow = {name: getattr(lattice, name)[:, :, :size] for name in names}
    return dataclasses.replace(lattice, **narrow)

"""The student's checkpoints: before training, and after epochs without distillation."""

import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError, require
from icefall_kd.report.logs import read_training
from icefall_kd.teacher.checkpoints import load_checkpoint
from icefall_kd.teacher.loader import load_recipe_model
from icefall_kd.teacher.spec import SHARED

START = "epoch-1.pt"  # what `icefall-kd student` writes


def is_start(path: Path) -> bool:
    """Return whether a checkpoint is a student before training: it has no optimizer.

    Args:
      path: The checkpoint.
    """
    return "optimizer" not in load_checkpoint(path)


def load_start(
    recipe: str, folder: str, settings: Dict[str, Any], teacher: str
) -> nn.Module:
    """Load the student before training.

    Args:
      recipe: The folder of the recipe's ``train.py``.
      folder: The folder that `icefall-kd student` wrote.
      settings: The teacher's.
      teacher: The teacher's experiment folder, for errors.

    Raises:
      KDError: no such checkpoint, one that was trained, or one of another teacher.
    """
    path = Path(folder) / START
    require(
        path.is_file(),
        f"{folder} has no {START}: give `student_dir` the folder that `icefall-kd "
        "student` wrote",
    )
    require(
        is_start(path),
        f"{path} is of an epoch of training and no student before it: give "
        "`student_dir` the folder that `icefall-kd student` wrote, or leave it out",
    )
    model, of_student = load_recipe_model(recipe, folder, epoch=1)
    check_fits(of_student, settings, path, teacher)
    return model


def kept_epochs(folder: str) -> List[int]:
    """Return the numbers of an experiment folder's trained epochs, in their order.

    Args:
      folder: The experiment folder of a training without distillation.

    Raises:
      KDError: no checkpoint of a trained epoch, or a training with distillation.
    """
    names = (re.fullmatch(r"epoch-(\d{1,9})\.pt", p.name) for p in _files(folder))
    epochs = sorted(int(match[1]) for match in names if match)
    if epochs[:1] == [1] and is_start(Path(folder) / START):
        epochs = epochs[1:]
    require(
        epochs,
        f"the folder {folder} has no epoch-N.pt of a training: give `baseline_dir` "
        "the experiment folder of a training of the student without distillation",
    )
    training = read_training(Path(folder))
    require(
        training is None or not training.distils,
        f"by its logs the training in {folder} was distilled: give `baseline_dir` "
        "one without distillation",
    )
    return epochs


def _files(folder: str) -> List[Path]:
    path = Path(folder)
    require(
        path.is_dir(),
        f"the folder {folder} does not exist: give `baseline_dir` the experiment "
        "folder of a training of the student without distillation",
    )
    return list(path.iterdir())


def load_epoch(
    recipe: str, folder: str, epoch: int
) -> Tuple[nn.Module, Dict[str, Any], bool]:
    """Load a student after an epoch, averaged over the epoch's steps if that is kept.

    Args:
      recipe: The folder of the recipe's ``train.py``.
      folder: The experiment folder.
      epoch: N of ``epoch-N.pt``.

    Returns:
      The model, its settings, and whether it is averaged.

    Raises:
      KDError: a checkpoint that can't be used.
    """
    if (Path(folder) / f"epoch-{epoch - 1}.pt").is_file():
        try:
            model, settings = load_recipe_model(
                recipe, folder, epoch, use_averaged_model=True
            )
            return model, settings, True
        except KDError:  # too few steps, or without averages
            pass
    model, settings = load_recipe_model(recipe, folder, epoch)
    return model, settings, False


def check_fits(
    student: Dict[str, Any], teacher: Dict[str, Any], path: Path, teacher_dir: str
) -> None:
    """Refuse a student of other tokens, features or frames than its teacher's.

    Args:
      student: The student's settings.
      teacher: The teacher's.
      path: The student's checkpoint or folder, for the error.
      teacher_dir: The teacher's folder, for the error.
    """
    for name in SHARED:
        require(
            student.get(name) == teacher.get(name),
            f"the student in {path} has {name} {student.get(name)} and the teacher in "
            f"{teacher_dir} has {teacher.get(name)}: build the student from this "
            "teacher",
        )


def is_sliced(student: nn.Module, teacher: nn.Module) -> bool:
    """Return whether a student before training has numbers of its teacher's.

    That is whether more than half of the weights of its front end and its heads occur
    among the teacher's of the same name; of random parameters hardly any does.

    Args:
      student: The student before training.
      teacher: The teacher.
    """
    theirs = dict(teacher.named_parameters())
    shared = total = 0
    for name, p in student.named_parameters():
        # The encoder's layers may have other numbers than the teacher's.
        if p.ndim > 1 and name in theirs and not name.startswith("encoder."):
            total += p.numel()
            shared += int(torch.isin(p, theirs[name]).sum())
    return 2 * shared > total

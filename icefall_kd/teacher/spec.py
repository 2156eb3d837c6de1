"""Which teacher is meant: one record that commands and training options fill."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from icefall_kd.errors import require

if TYPE_CHECKING:  # a command that only describes a teacher doesn't load torch
    from torch import nn

# What the models of several teachers must have alike.
SHARED = ("vocab_size", "blank_id", "feature_dim", "subsampling_factor")


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher's model, in eval mode, and the recipe's params that it was built by."""

    folder: str
    model: "nn.Module"
    settings: Dict[str, Any]

    def name(self) -> str:
        """The teacher's name in fingerprints, for which all parameters are hashed."""
        from icefall_kd.targets.fingerprint import name_of

        return name_of(self.model, self.settings)


@dataclass(frozen=True)
class TeacherSpec:
    """The checkpoints of one or more teachers, named as icefall's ``decode.py`` does.

    Args:
      recipe: The folder of the recipe's ``train.py``.
      exp_dir: The experiment folder. Commas separate those of several teachers; a
        folder whose own name has a comma, such as ``exp,lr0.045``, is one teacher's.
      epoch: N of ``epoch-N.pt``.
      iteration: N of ``checkpoint-N.pt``, taken in place of the epoch; 0 for none.
      avg: The number of checkpoints to average.
      use_averaged_model: Whether to average all steps between the first and the last
        checkpoint (icefall's ``model_avg``), and not the checkpoints alone.
      model_flags: The model's options, words of the recipe's own command line.
      bpe_model: The ``bpe.model``, or the folder of ``tokens.txt``; "" for none.
    """

    recipe: str
    exp_dir: str
    epoch: int = 0
    iteration: int = 0
    avg: int = 1
    use_averaged_model: bool = True
    model_flags: Tuple[str, ...] = ()
    bpe_model: str = ""

    def folders(self) -> List[str]:
        """The experiment folder of each teacher.

        Raises:
          KDError: an empty name, or a text that names one folder and several.
        """
        parts = self.exp_dir.split(",")
        if len(parts) == 1:
            return parts
        if Path(self.exp_dir).is_dir():
            require(
                not all(Path(part).is_dir() for part in parts),
                f"`exp_dir` {self.exp_dir} is a folder, and so are "
                f"{' and '.join(parts)}: rename the first, as it is not clear "
                f"whether one teacher or {len(parts)} are meant",
            )
            return [self.exp_dir]
        require(
            all(parts),
            f"`exp_dir` is {self.exp_dir!r}, which is no folder and has an empty name "
            "between its commas: give the teachers' folders, such as A,B",
        )
        return parts

    def one_folder(self, command: str) -> str:
        """The experiment folder, for what takes one teacher alone.

        Args:
          command: What takes it, for the error.

        Raises:
          KDError: several teachers.
        """
        folders = self.folders()
        require(
            len(folders) == 1,
            f"`exp_dir` {self.exp_dir} names {len(folders)} teachers (there is no "
            f"folder of that name), and {command} takes one: give {folders[0]}",
        )
        return folders[0]

    def load(self) -> List[LoadedTeacher]:
        """Load all teachers.

        Raises:
          KDError: a checkpoint that can't be used, or teachers that don't fit together.
        """
        from icefall_kd.teacher import loader

        teachers: List[LoadedTeacher] = []
        for folder in self.folders():
            model, settings = loader.load_recipe_model(
                self.recipe,
                folder,
                self.epoch,
                self.iteration,
                self.avg,
                self.use_averaged_model,
                self.model_flags,
                self.bpe_model,
            )
            teachers.append(LoadedTeacher(folder, model, settings))
            first = teachers[0]
            for name in SHARED:
                require(
                    settings.get(name) == first.settings.get(name),
                    f"the teacher in {first.folder} has {name} "
                    f"{first.settings.get(name)} and that in {folder} has "
                    f"{settings.get(name)}: teachers of one student must agree",
                )
        return teachers

    def load_one(self, command: str) -> LoadedTeacher:
        """Load the teacher, for what takes one alone; see :meth:`one_folder`."""
        self.one_folder(command)
        return self.load()[0]

    def tokenizer(self, settings: Dict[str, Any]) -> Optional[Any]:
        """The tokenizer of ``bpe_model``; None where there is no such file.

        Args:
          settings: The teacher's, whose ``vocab_size`` the tokenizer must have.
        """
        from icefall_kd.tokens import load_tokenizer

        if not self.bpe_model:
            return None
        return load_tokenizer(self.bpe_model, settings["vocab_size"])


def joint_name(
    names: Sequence[str], weights: Optional[Sequence[float]] = None, field: str = ""
) -> str:
    """The name of several teachers in a fingerprint.

    Args:
      names: Each one's; see :func:`icefall_kd.targets.fingerprint.name_of`.
      weights: Each one's share; None for equal ones.
      field: The field of a cut that chooses its teacher; "" where they are averaged.
    """
    if len(names) == 1:
        return names[0]
    if field:
        return ",".join(names) + f" by {field}"
    shares = weights or [1] * len(names)
    return ",".join(f"{name}*{share:g}" for name, share in zip(names, shares))

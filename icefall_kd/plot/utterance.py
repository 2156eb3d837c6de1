"""What pictures are drawn of: a cut with its features, a teacher and its students."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from lhotse.cut import Cut
from torch import nn

from icefall_kd.errors import require
from icefall_kd.forecast.students import check_fits, load_epoch
from icefall_kd.targets.cuts import ManifestCuts
from icefall_kd.targets.model_input import collate_input, why_unusable
from icefall_kd.targets.transcript_checks import labels_of, why_long
from icefall_kd.zipformer import subsampling_factor

UNKNOWN = "<unk>"
Model = nn.Module


@dataclass(frozen=True)
class Utterance:
    """A cut, as a model hears it.

    Args:
      cut: The cut.
      features: (1, F, C), those of its F feature frames.
      lens: (1,), F.
      shift: Seconds between two feature frames.
      frame: Seconds between two frames of the encoder's output.
    """

    cut: Cut
    features: torch.Tensor
    lens: torch.Tensor
    shift: float
    frame: float


def read_utterance(path: str, cut_id: str, settings: Dict[str, Any]) -> Utterance:
    """Read a cut and its features.

    Args:
      path: The manifest.
      cut_id: The cut's; "" for the manifest's first.
      settings: The model's.

    Raises:
      KDError: no such cut, or one without features that the model takes.
    """
    cut = _find(path, cut_id)
    wanted = int(settings["feature_dim"])
    require(
        cut.has_features,
        f"the cut {cut.id} of {path} has no features: compute them first, as the "
        "recipe does",
    )
    require(
        cut.num_features == wanted,
        f"the cut {cut.id} of {path} has {cut.num_features} features a frame and the "
        f"model takes {wanted}: give the features that it was trained on",
    )
    reason = why_unusable(cut)
    require(not reason, f"the cut {cut.id} of {path} {reason}: give `cut_id` another")
    features, lens = collate_input([cut])
    shift = float(cut.frame_shift)
    return Utterance(cut, features, lens, shift, shift * subsampling_factor(settings))


def _find(path: str, cut_id: str) -> Cut:
    first = ""
    for cut in ManifestCuts(path):
        if cut_id in ("", cut.id):
            return cut
        first = first or cut.id
    require(
        False,
        f"the manifest {path} has no cut {cut_id}: give `cut_id` one of its own, such "
        f"as {first}",
    )


def labels_in(
    utterance: Utterance, tokenizer: Any, use: str = "a lattice"
) -> List[int]:
    """Return the token ids of an utterance's transcript.

    Args:
      utterance: The utterance.
      tokenizer: The model's.
      use: What needs them, for errors.

    Raises:
      KDError: no transcript, one that the tokens can't spell, or one with more tokens
        than frames.
    """
    cut = utterance.cut
    (labels,) = labels_of([cut], tokenizer, use, "give `cut_id` another")
    text = cut.supervisions[0].text
    require(
        UNKNOWN not in {tokenizer.id_to_piece(i) for i in labels},
        f"the tokens of `bpe_model` can't spell the transcript {text!r} of the cut "
        f"{cut.id}: give the tokens that the model was trained with, or give `cut_id` "
        "another",
    )
    reason = why_long(cut, labels, use)
    require(not reason, f"the cut {cut.id} {reason}: give `cut_id` another")
    return labels


def load_students(
    recipe: str,
    folders: Dict[str, List[Path]],
    epoch: int,
    settings: Dict[str, Any],
    teacher: str,
) -> Dict[str, Model]:
    """Load students that hear what their teacher hears, by their names.

    Each is averaged over its epoch, as decode.py's ``--avg 1`` does, if its epoch
    before is kept.

    Args:
      recipe: The folder of the recipe's ``train.py``.
      folders: By name, one folder each.
      epoch: N of ``epoch-N.pt``; 0 for each student's last.
      settings: The teacher's.
      teacher: The teacher's experiment folder, for errors.

    Raises:
      KDError: several folders of a student, none with checkpoints, or a student of
        other tokens, features or frames.
    """
    students = {}
    for name, of_name in folders.items():
        require(
            len(of_name) == 1,
            f"the student {name!r} has {len(of_name)} folders, and a picture shows one "
            "training of each: give each folder a name of its own",
        )
        folder = of_name[0]
        number = epoch or _last_epoch(folder)
        model, of_student, _ = load_epoch(recipe, str(folder), number)
        path = folder / f"epoch-{number}.pt"
        check_fits(of_student, settings, path, teacher)
        students[name] = model.eval()
    return students


def _last_epoch(folder: Path) -> int:
    names = folder.iterdir() if folder.is_dir() else ()
    matches = (re.fullmatch(r"epoch-(\d{1,9})\.pt", path.name) for path in names)
    epochs = [int(match[1]) for match in matches if match]
    require(
        epochs,
        f"the student's folder {folder} has no epoch-N.pt: give the experiment folder "
        "of its training",
    )
    return max(epochs)


def seconds_of(frames: Sequence[int], utterance: Utterance) -> List[float]:
    """Return where frames of the encoder's output begin, as icefall's timestamps say.

    Args:
      frames: Their numbers.
      utterance: Whose frames they are.
    """
    return [frame * utterance.frame for frame in frames]

"""The teacher in the training process, and the cache of what it said."""

import atexit
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from icefall_kd.errors import KDError


def process_of() -> Tuple[int, int]:
    """This process's rank, and how many there are."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def online_teacher(params: Dict[str, Any], hidden: Sequence = (), ctc: bool = True):
    """The teachers that ``--kd-teacher-exp-dir`` names, or None, and their name.

    Args:
      params: The student's.
      hidden: The layers that are asked for.
      ctc: Whether the CTC head is asked.
    """
    if not params["kd_teacher_exp_dir"]:
        return None, ""
    from icefall_kd.recipe.loader import load_recipe_model, teacher_folders
    from icefall_kd.targets.fingerprint import name_of
    from icefall_kd.teacher import OnlineTeacher

    models, names = [], []
    for folder in teacher_folders(params["kd_teacher_exp_dir"]):
        model, settings = load_recipe_model(
            params["kd_teacher_recipe"] or Path(sys.argv[0]).resolve().parent,
            folder,
            params["kd_teacher_epoch"],
            avg=params["kd_teacher_avg"],
            use_averaged_model=params.get("use_averaged_model", True),
        )
        for name in ("vocab_size", "blank_id"):
            mine, its = params.get(name, 0), settings.get(name, 0)
            if mine != its:
                raise KDError(
                    f"the student's {name} is {mine} and that of the teacher "
                    f"in {folder} is {its}: train the student with the "
                    "teacher's --bpe-model"
                )
        models.append(model)
        if params["kd_cache_dir"]:  # a hash of all parameters takes its time
            names.append(name_of(model, settings))
    return OnlineTeacher(models, hidden=hidden, ctc=ctc), ",".join(names)


def open_cache(
    teacher, name: str, settings: Dict[str, Any], cut, pieces: Optional[List[str]]
):
    """A caching teacher, whose store is finished when this process ends."""
    from icefall_kd.targets.fingerprint import Fingerprint, hash_tokens
    from icefall_kd.targets.writer import LogitWriter
    from icefall_kd.teacher import CachingTeacher
    from icefall_kd.teacher.online import speech_of

    fingerprint = Fingerprint.of(
        name,
        settings,
        speech_of(cut).features,
        pieces and hash_tokens(pieces),
        ctc=settings["kd_keep"],
    )
    rank, ranks = process_of()
    cache = Path(settings["kd_cache_dir"])
    writer = LogitWriter(
        cache / "cuts.jsonl.gz", cache, fingerprint, job=rank, num_jobs=ranks
    )
    atexit.register(_finish, writer)
    return CachingTeacher(teacher, writer)


def _finish(writer) -> None:
    """Leave a whole manifest of what the teacher was asked."""
    try:
        writer.finish()
        logging.info(
            f"{writer.manifest}: {len(writer)} cuts with the teacher's targets"
        )
    except KDError as e:
        logging.error(e.sentence)

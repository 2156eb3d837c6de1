"""The teacher in the training process, and the cache of what it said."""

import atexit
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.errors import KDError


def tokens_file(params: Dict[str, Any], root: Union[str, Path] = "") -> str:
    """The recipe's ``bpe.model``, or its folder of tokens; "" where there is none.

    Args:
      params: The recipe's.
      root: The folder that relative paths are of; "" for the working folder.
    """
    path = Path(root, params.get("bpe_model") or "")
    if path.is_file():
        return str(path)
    folder = Path(root, params.get("lang_dir") or "")
    files = (folder / "bpe.model", folder / "tokens.txt")
    there = bool(params.get("lang_dir")) and any(f.is_file() for f in files)
    return str(folder) if there else ""


def _tokens_file_of_teacher(settings: Dict[str, Any], folder: Union[str, Path]) -> str:
    """:func:`tokens_file` of the training that left its checkpoint in ``folder``.

    A relative path in a checkpoint is of the folder where the teacher was trained,
    which is taken for one of those above ``folder``: in this working folder another
    corpus may have a file of that name.
    """
    files = (tokens_file(settings, root) for root in Path(folder).resolve().parents)
    return next(filter(None, files), "")


def _check_tokens(
    params: Dict[str, Any], settings: Dict[str, Any], folder: Union[str, Path]
) -> None:
    """Refuse a teacher of other symbols, as far as the files tell.

    Args:
      params: The student's.
      settings: Those in the teacher's checkpoint.
      folder: Of that checkpoint.
    """
    from icefall_kd.tokens import load_tokenizer, token_names

    mine, its = tokens_file(params), _tokens_file_of_teacher(settings, folder)
    if not (mine and its) or Path(mine).resolve() == Path(its).resolve():
        return
    if token_names(load_tokenizer(mine)) != token_names(load_tokenizer(its)):
        raise KDError(
            f"the student's tokens are those of {mine} and the teacher in {folder} was "
            f"trained with {its}, whose symbols or their order differ: train the "
            "student with the teacher's --bpe-model, or store the targets with "
            "`icefall-kd dump`, which are reordered where they are read"
        )


def online_teacher(params: Dict[str, Any], hidden: Sequence = (), ctc: bool = True):
    """The teachers that ``--kd-teacher-exp-dir`` names, or None, and their name.

    Args:
      params: The student's.
      hidden: The layers that are asked for.
      ctc: Whether the CTC head is asked.
    """
    if not params["kd_teacher_exp_dir"]:
        return None, ""
    from icefall_kd.targets.fingerprint import name_of
    from icefall_kd.teacher import OnlineTeacher
    from icefall_kd.teacher.loader import load_recipe_model, teacher_folders

    models, names = [], []
    option = "--kd-teacher-exp-dir"
    for folder in teacher_folders(params["kd_teacher_exp_dir"], option):
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
        _check_tokens(params, settings, folder)
        models.append(model)
        if params["kd_teacher_cache_dir"]:  # a hash of all parameters takes its time
            names.append(name_of(model, settings))
    return OnlineTeacher(models, hidden=hidden, ctc=ctc), ",".join(names)


def open_cache(
    teacher, name: str, settings: Dict[str, Any], cut, pieces: Optional[List[str]]
):
    """A caching teacher, whose store is finished when this process ends."""
    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.targets.writer import LogitWriter
    from icefall_kd.teacher import CachingTeacher
    from icefall_kd.teacher.online import speech_of
    from icefall_kd.tokens import hash_tokens

    fingerprint = Fingerprint.of(
        name,
        settings,
        speech_of(cut).features,
        pieces and hash_tokens(pieces),
        ctc=settings["kd_teacher_keep"],
    )
    rank, ranks = rank_and_world_size()
    cache = Path(settings["kd_teacher_cache_dir"])
    writer = LogitWriter(
        cache / "cuts.jsonl.gz", cache, fingerprint, job=rank, num_jobs=ranks
    )
    atexit.register(_finish, writer)
    return CachingTeacher(teacher, writer, settings["kd_missing"])


def _finish(writer) -> None:
    """Leave a whole manifest of what the teacher was asked."""
    try:
        writer.finish()
        logging.info(
            f"{writer.manifest}: {len(writer)} cuts with the teacher's targets"
        )
    except KDError as e:
        logging.error(e.sentence)

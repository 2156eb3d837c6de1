"""The teacher in the training process, and the cache of its targets."""

import atexit
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

from icefall_kd.distributed import rank_and_world_size
from icefall_kd.errors import KDError, require
from icefall_kd.training.options import flags_in_errors
from icefall_kd.zipformer import subsampling_factor

if TYPE_CHECKING:
    import torch
    from lhotse.cut import Cut

    from icefall_kd.kinds.hidden import Layer
    from icefall_kd.targets.writer import TargetWriter
    from icefall_kd.teacher.cache import CachingTeacher
    from icefall_kd.teacher.spec import LoadedTeacher, TeacherSpec
    from icefall_kd.teacher.teacher import Teacher
    from icefall_kd.terms.joint import JointKDLoss
    from icefall_kd.training.tokenizer import StudentTokenizer
    from icefall_kd.types import EncoderOut, Targets


def tokens_file(params: Dict[str, Any], root: Union[str, Path] = "") -> str:
    """The recipe's ``bpe.model``, or its folder of tokens; "" where there is none.

    Args:
      params: The recipe's.
      root: The folder that relative paths are of; "" for the working folder.
    """
    path = Path(root, params.get("bpe_model") or "")
    if path.is_file():
        return str(path)
    if not params.get("lang_dir"):
        return ""
    folder = Path(root, params["lang_dir"])
    files = (folder / "bpe.model", folder / "tokens.txt")
    return str(folder) if any(file.is_file() for file in files) else ""


def _tokens_file_of_teacher(spec: "TeacherSpec", teacher: "LoadedTeacher") -> str:
    """The teacher's tokens: those that an option names, or its training's.

    A relative path in a checkpoint is of the folder where the teacher was trained,
    which is taken for one of those above the experiment folder: in this working folder
    another corpus may have a file of that name.
    """
    if spec.bpe_model:
        return spec.bpe_model
    folders = Path(teacher.folder).resolve().parents
    files = (tokens_file(teacher.settings, root) for root in folders)
    return next(filter(None, files), "")


def _check_tokens(
    params: Dict[str, Any], spec: "TeacherSpec", teacher: "LoadedTeacher"
) -> None:
    """Refuse a teacher of other tokens than the student's, as far as files show."""
    from icefall_kd.tokens import load_tokenizer, token_names

    files = [tokens_file(params), _tokens_file_of_teacher(spec, teacher)]
    if not all(files) or Path(files[0]).resolve() == Path(files[1]).resolve():
        return
    student_tokens, teacher_tokens = (token_names(load_tokenizer(f)) for f in files)
    require(
        student_tokens == teacher_tokens,
        f"the student's tokens are those of {files[0]} and the teacher in "
        f"{teacher.folder} was trained with {files[1]}, whose tokens or their order "
        "differ: train the student with the teacher's --bpe-model, or store the "
        "targets with `icefall-kd dump`, which are reordered where they are read",
    )


def teacher_spec(params: Dict[str, Any]) -> "TeacherSpec":
    """The teachers that the ``--kd-teacher-*`` options name.

    Args:
      params: The student's.
    """
    from icefall_kd.teacher.spec import TeacherSpec

    return TeacherSpec(
        recipe=params["kd_teacher_recipe"] or str(Path(sys.argv[0]).resolve().parent),
        exp_dir=params["kd_teacher_exp_dir"],
        epoch=params["kd_teacher_epoch"],
        iteration=params["kd_teacher_iter"],
        avg=params["kd_teacher_avg"],
        use_averaged_model=params["kd_teacher_use_averaged_model"],
        model_flags=_words(params["kd_teacher_model_flags"]),
        bpe_model=params["kd_teacher_bpe_model"],
    )


def _words(text: str) -> Tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as e:
        raise KDError(
            f"`model_flags` is {text!r}, which can't be split into words ({e}): close "
            "its quotation"
        ) from None


def online_teacher(
    params: Dict[str, Any],
    layers: Sequence["Layer"] = (),
    with_ctc: bool = True,
    with_simple: bool = False,
) -> Tuple[Optional["Teacher"], str]:
    """The teacher that ``--kd-teacher-exp-dir`` names, and its name.

    Args:
      params: The student's.
      layers: The hidden layers whose rows are taken.
      with_ctc: Whether CTC logits are taken.
      with_simple: Whether those of the simple joiner's acoustic half are.

    Returns:
      None and "" where the option is not given. The name is "" where no cache needs it.

    Raises:
      KDError: a teacher that can't be loaded, or whose tokens are not the student's.
    """
    if not params["kd_teacher_exp_dir"]:
        return None, ""
    from icefall_kd.teacher.teacher import Teacher

    with flags_in_errors():
        spec = teacher_spec(params)
        teachers = spec.load()
        spec.tokenizer(teachers[0].settings)  # which refuses other tokens
    for teacher in teachers:
        for name in ("vocab_size", "blank_id"):
            values = params.get(name, 0), teacher.settings.get(name, 0)
            require(
                values[0] == values[1],
                f"the student's {name} is {values[0]} and that of the teacher in "
                f"{teacher.folder} is {values[1]}: train the student with the "
                "teacher's --bpe-model",
            )
        _check_tokens(params, spec, teacher)
    # A hash of all parameters takes its time.
    names = [t.name() for t in teachers] if params["kd_teacher_cache_dir"] else []
    models = [teacher.model for teacher in teachers]
    teacher = Teacher(models, layers=layers, with_ctc=with_ctc, with_simple=with_simple)
    return teacher, ",".join(names)


class OnlineTargets:
    """Runs the teacher of ``--kd-teacher-exp-dir`` on training batches.

    Args:
      params: The recipe's params.
      joint: The joint loss.
      tokenizer: The student's.

    Attributes:
      cache: The cache of the teacher's targets, from the first batch on; or None.
      hears_clean: Whether the teacher hears a batch's features before the dataset's
        transforms; a caching one reads those of the cut itself.
    """

    def __init__(
        self,
        params: Dict[str, Any],
        joint: "JointKDLoss",
        tokenizer: "StudentTokenizer",
    ) -> None:
        self.params, self.joint, self.tokenizer = dict(params), joint, tokenizer
        self.teacher, self.teacher_name = online_teacher(
            params,
            joint.teacher_layers,
            with_ctc="ctc" in joint.kinds,
            with_simple="simple" in joint.kinds,
        )
        self.cache: Any = None
        cached = bool(params["kd_teacher_cache_dir"])
        self.hears_clean = bool(params["kd_teacher_clean"]) and not cached

    def targets(
        self, batch: Dict[str, Any], student: "EncoderOut", device: "torch.device"
    ) -> "Targets":
        """Run the teacher on a training batch, or read what a cache has of it.

        Args:
          batch: The recipe's.
          student: The student's outputs, for its labels.
          device: The student's.

        Raises:
          KDError: a batch without clean features, which the teacher is to hear.
        """
        from icefall_kd.targets.clean import WARPS
        from icefall_kd.targets.dataset import cuts_of_rows
        from icefall_kd.targets.stand_in import transcribed_rows
        from icefall_kd.targets.warp import move_frames

        cuts = cuts_of_rows(batch)
        self.teacher.to(device)
        if self.params["kd_teacher_cache_dir"]:
            if self.cache is None:
                self.cache = open_cache(
                    self.teacher,
                    self.teacher_name,
                    self.params,
                    cuts[0],
                    self.tokenizer.names(),
                )
            return self.cache.targets(cuts, device)
        x = self._features(batch).to(device)
        labels = None
        transcribed = transcribed_rows(batch)
        some = transcribed is None or bool(transcribed.any())
        if "lattice" in self.joint.kinds and some:
            # The recipe's own labels, whatever it makes them with.
            blank_id = self.params.get("blank_id", 0)
            rows = student.labels[: len(x), 1:].tolist()
            labels = [[token for token in row if token != blank_id] for row in rows]
        targets = self.teacher.targets(
            x,
            batch["supervisions"]["num_frames"].to(device),
            cuts,
            y=labels,
            s_range=self.params["kd_teacher_s_range"],
            path_only=bool(self.params["kd_teacher_path_only"]),
            missing=self.params["kd_missing"],
        )
        nodes = targets.parts.get("nodes")
        if nodes is not None and transcribed is not None:
            # A stand-in's lattice teaches nothing.
            kept = transcribed.to(nodes.row.device)[nodes.row]
            targets.parts["nodes"] = nodes.select(kept) if kept.any() else None
        factor = subsampling_factor(self.params)
        return move_frames(targets, batch.get(WARPS, []), factor)

    def _features(self, batch: Dict[str, Any]) -> "torch.Tensor":
        """(N, T, F), what the teacher hears of a batch."""
        from icefall_kd.targets.clean import CLEAN

        if not self.hears_clean:
            return batch["inputs"]
        require(
            CLEAN in batch,
            f"a training batch has no {CLEAN}, which --kd-teacher-clean needs: let the "
            "data module call wrap_dataset(train, cuts_train) after session.attach() "
            "ran",
        )
        return batch[CLEAN]


def open_cache(
    teacher: "Teacher",
    name: str,
    settings: Dict[str, Any],
    cut: "Cut",
    tokens: Optional[List[str]],
) -> "CachingTeacher":
    """A caching teacher, whose manifest is written when this process ends.

    Args:
      teacher: The teacher that runs.
      name: Its name in the store's fingerprint.
      settings: The student's params.
      cut: Any cut of the training, for the kind of its features.
      tokens: The student's tokens in their order; None where they are not known.
    """
    from icefall_kd.targets.fingerprint import Fingerprint
    from icefall_kd.targets.writer import TargetWriter
    from icefall_kd.teacher.cache import CachingTeacher, speech_of
    from icefall_kd.tokens import hash_tokens

    fingerprint = Fingerprint.of(
        name,
        settings,
        speech_of(cut).features,
        tokens and hash_tokens(tokens),
        ctc=settings["kd_teacher_keep"] if teacher.with_ctc else "",
        further_kinds=(
            {"simple": settings["kd_teacher_keep"]} if teacher.with_simple else {}
        ),
    )
    rank, ranks = rank_and_world_size()
    cache = Path(settings["kd_teacher_cache_dir"])
    writer = TargetWriter(
        cache / "cuts.jsonl.gz", cache, fingerprint, job=rank, num_jobs=ranks
    )
    atexit.register(_finish, writer)
    return CachingTeacher(teacher, writer, settings["kd_missing"])


def _finish(writer: "TargetWriter") -> None:
    """Leave a manifest of all cuts that have targets."""
    try:
        writer.finish()
        logging.info(
            f"{writer.manifest}: {len(writer)} cuts with the teacher's targets"
        )
    except KDError as e:
        logging.error(e.sentence)

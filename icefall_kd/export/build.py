"""Exports the parts of a model, form by form, into a folder."""

import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from torch import nn

from icefall_kd.errors import require
from icefall_kd.export.equalize import equalize
from icefall_kd.export.features import UTTERANCE, FeatureSettings
from icefall_kd.export.files import (
    CTC,
    DECODER,
    ENCODER,
    JOINER,
    inputs_and_outputs,
    weights_of,
    write_offline,
    write_torchscript,
)
from icefall_kd.export.folder import (
    FP16,
    FP32,
    INT8,
    TOKENS,
    ExportFolder,
    file_name,
    tokens_of,
    versions,
    write_tokens,
)
from icefall_kd.export.graph import OfflineEncoder, exportable
from icefall_kd.export.quantize import write_fp16, write_int8
from icefall_kd.export.streaming import (
    ChunkEncoder,
    chunks_of,
    script_encoder,
    write_streaming,
)
from icefall_kd.rounding import TENSOR
from icefall_kd.targets.fingerprint import STREAMING
from icefall_kd.teacher.spec import LoadedTeacher, TeacherSpec
from icefall_kd.zipformer import has_ctc, has_transducer, subsampling_factor

TORCHSCRIPT, ONNX, PLAIN = "torchscript", "onnx", "plain"
FORMS = (TORCHSCRIPT, ONNX, FP16, PLAIN)
TRANSDUCER_HEAD, CTC_HEAD = "transducer", "ctc"
PARTS = {TRANSDUCER_HEAD: (ENCODER, DECODER, JOINER), CTC_HEAD: (CTC,)}
WEIGHTS = "weights"  # in metadata.json: of a file of ONNX that is too large for one


@dataclass(frozen=True)
class Wanted:
    """What is exported.

    Args:
      forms: Of :data:`FORMS`.
      heads: transducer, ctc or both.
      int8: The parts that are written in int8 too.
      int8_scales: Of :data:`icefall_kd.rounding.SCALES`, those of weights in int8.
      equalize: Whether channels get like sizes first, in all forms.
      opset: The version of ONNX's operators.
      plain: Of the plain form, some fields of PlainForm.
    """

    forms: Tuple[str, ...]
    heads: Tuple[str, ...]
    int8: Tuple[str, ...] = ()
    int8_scales: str = TENSOR
    equalize: bool = False
    opset: int = 13
    plain: Dict[str, Any] = field(default_factory=dict)


def streaming_of(settings: Dict[str, Any]) -> Tuple[int, int]:
    """Chunk size and left context of a model; (-1, -1) for whole utterances.

    Args:
      settings: The recipe's params.

    Raises:
      KDError: A causal model with several of them, as in training.
    """
    return chunks_of(settings) if settings.get("causal") else (-1, -1)


def script_name(settings: Dict[str, Any]) -> str:
    """The name of the file of TorchScript, icefall's.

    Args:
      settings: The recipe's params.
    """
    chunk_size, left_context = streaming_of(settings)
    if chunk_size <= 0:
        return "jit_script.pt"
    return f"jit_script_chunk_{chunk_size}_left_{left_context}.pt"


def chunk_encoder(loaded: LoadedTeacher) -> Optional[ChunkEncoder]:
    """The recipe's own encoder, chunk by chunk; None for whole utterances.

    Args:
      loaded: The model.
    """
    if streaming_of(loaded.settings)[0] <= 0:
        return None
    return ChunkEncoder(loaded.model, nn.Identity()).eval()


def check_form(
    settings: Dict[str, Any], wanted: Wanted, features: FeatureSettings
) -> None:
    """Refuse what can't be streamed.

    Args:
      settings: The recipe's params.
      wanted: What is exported.
      features: Of the recipe.

    Raises:
      KDError: features that need the end of an utterance, a form for whole ones, or a
        length of the plain form that is missing or of no use.
    """
    streams, length = streaming_of(settings)[0] > 0, wanted.plain.get("num_frames")
    require(
        PLAIN not in wanted.forms or length or streams,
        "--forms has plain, which is for one length: give --num-frames, the feature "
        "frames of the longest utterance",
    )
    if not streams:
        return
    require(
        not length,
        f"--num-frames is {length}, and a stream's chunk has its own length: leave it "
        "out",
    )
    remedy = "give --chunk-size -1 to export it for whole utterances"
    require(
        features.mean != UTTERANCE,
        "the recipe takes the mean of each utterance off its features, which is known "
        f"at the end, so its model can't be streamed: {remedy}, or train it without",
    )


def heads_of(model: Any, asked: Sequence[str]) -> Tuple[str, ...]:
    """The heads that are exported.

    Args:
      model: A recipe's model.
      asked: Those that are asked for; none: all that the model has.

    Raises:
      KDError: One that the model lacks, or a model without heads.
    """
    there = [
        name
        for name, has in ((TRANSDUCER_HEAD, has_transducer), (CTC_HEAD, has_ctc))
        if has(model)
    ]
    require(
        there,
        f"the model {type(model).__name__} has neither a CTC head nor a transducer "
        "head: train it with one",
    )
    for name in asked:
        require(
            name in there,
            f"`heads` has {name}, and the model {type(model).__name__} has "
            f"{' and '.join(there)}: give {','.join(there)}",
        )
    return tuple(name for name in there if not asked or name in asked)


def checkpoint_name(teacher: TeacherSpec) -> str:
    """The part of file names that says which checkpoint, as icefall's export does.

    Args:
      teacher: Names the checkpoints.
    """
    number = f"epoch-{teacher.epoch}"
    if teacher.iteration:
        number = f"iter-{teacher.iteration}"
    return f"{number}-avg-{teacher.avg}"


def describe(
    teacher: TeacherSpec,
    loaded: LoadedTeacher,
    names: List[str],
    features: FeatureSettings,
) -> Dict[str, Any]:
    """What metadata.json says of a model, its tokens and its features.

    Args:
      teacher: Names the checkpoints.
      loaded: The model.
      names: Its tokens in the order of their ids.
      features: Of the recipe.
    """
    settings = loaded.settings
    shift = subsampling_factor(settings) * features.frame_shift
    return {
        "model": loaded.name(),
        "checkpoint": {
            "name": checkpoint_name(teacher),
            "use_averaged_model": teacher.use_averaged_model,
        },
        "tokens": tokens_of(names, settings),
        "features": features.as_dict(),
        "streaming": dict(zip(STREAMING, streaming_of(settings))),
        "frame_rate": round(1 / shift, 6),
        "feature_frame_rate": round(1 / features.frame_shift, 6),
        "versions": versions(),
    }


def _write_smaller(
    wanted: Wanted, part: str, source: Path, suffix: str, folder: ExportFolder
) -> None:
    """Write a part in fp16 and int8, where it is asked for."""
    if FP16 in wanted.forms:
        name = file_name(part, suffix, FP16)
        write_fp16(source, folder.path / name)
        folder.add(name, part, FP16, **inputs_and_outputs(folder.path / name))
    if part in wanted.int8:
        name = file_name(part, suffix, INT8)
        write_int8(source, folder.path / name, wanted.int8_scales)
        more = inputs_and_outputs(folder.path / name)
        folder.add(name, part, INT8, scales=wanted.int8_scales, **more)


def export(
    loaded: LoadedTeacher,
    wanted: Wanted,
    names: List[str],
    features: FeatureSettings,
    folder: ExportFolder,
) -> List[str]:
    """Write the files of a model and note them in its folder.

    Args:
      loaded: The model.
      wanted: What is exported.
      names: The tokens in the order of their ids.
      features: Of the recipe.
      folder: Begun.

    Returns:
      What a user is told of the plain form.

    Raises:
      KDError: a model that can't be exported, or a package that is not installed.
    """
    of_plain: List[str] = []  # sentences
    if wanted.equalize:
        loaded = replace(loaded, model=copy.deepcopy(loaded.model))
        folder.metadata["equalized_modules"] = equalize(loaded.model)
    takes_mean = features.mean == UTTERANCE
    suffix = folder.metadata["checkpoint"]["name"]
    chunk_size, left_context = streaming_of(loaded.settings)
    if chunk_size > 0:
        suffix += f"-chunk-{chunk_size}-left-{left_context}"
    model = exportable(loaded.model)
    if TORCHSCRIPT in wanted.forms:
        name = script_name(loaded.settings)
        if chunk_size > 0:
            encoder = partial(script_encoder, model, loaded.settings)
        else:
            encoder = partial(OfflineEncoder, model, nn.Identity(), takes_mean)
        write_torchscript(model, folder.path / name, encoder)
        folder.add(name, "all", TORCHSCRIPT)
    if ONNX in wanted.forms:
        for part in (part for head in wanted.heads for part in PARTS[head]):
            name = file_name(part, suffix)
            path = folder.path / name
            options = {"takes_mean": takes_mean, "opset": wanted.opset}
            if chunk_size > 0 and part in (ENCODER, CTC):
                write_streaming(model, loaded.settings, part, path, wanted.opset)
            else:
                write_offline(model, loaded.settings, part, path, **options)
            folder.add(name, part, FP32, **inputs_and_outputs(path))
            if weights_of(path).exists():
                folder.add(weights_of(path).name, part, WEIGHTS)
            _write_smaller(wanted, part, path, suffix, folder)
    if PLAIN in wanted.forms:
        from icefall_kd.export.plain import PlainForm
        from icefall_kd.export.plain_folder import add_plain, sentences

        form = PlainForm(
            feature_dim=features.num_mel_bins,
            chunk_size=max(chunk_size, 0),
            left_context=max(left_context, 0),
            heads=wanted.heads,
            takes_mean=takes_mean,
            opset=wanted.opset,
            **{"num_frames": 0, **wanted.plain},
        )
        of_plain = sentences(add_plain(loaded, form, names, folder))
    write_tokens(folder.path / TOKENS, names)
    folder.finish()
    return of_plain

"""The plain form: a model for chips that have no gather, and know one length alone.

For a stream the length is that of a chunk, and the states of a chunk are inputs and
outputs (``plain_stream``). Encoder, CTC head and joiner are ONNX graphs in which every
shape is a number. The token embedding is outside of the graphs: its table is a file,
and the decoder takes its rows; or the whole decoder is a table of what it says after
each context. ``plain_modules`` has the modules for one length, ``plain_graph`` makes
the graphs, ``plain_check`` compares each step with the last, ``plain_reader`` reads the
files.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple, Union

import numpy as np
import onnx
import torch
from torch import nn

from icefall_kd.errors import require
from icefall_kd.export.build import heads_of
from icefall_kd.export.plain_check import (
    Difference,
    compare_chunks,
    compare_decoder,
    compare_encoder,
    compare_joiner,
    require_close,
    some_contexts,
)
from icefall_kd.export.plain_graph import make_graph, operators, require_opset
from icefall_kd.export.plain_model import (
    TRANSDUCER,
    PlainDecoder,
    PlainEncoder,
    PlainJoiner,
    WholeModel,
)
from icefall_kd.export.plain_modules import require_zipformer
from icefall_kd.export.plain_stream import PlainChunkEncoder, chunks_of_recipe
from icefall_kd.export.streaming import num_frames_of
from icefall_kd.files import check_new_folder
from icefall_kd.zipformer import MIN_FRAMES, encoder_frames, stack_frames

DECODERS = ("embedding", "table")


@dataclass(frozen=True)
class PlainForm:
    """What is to be written.

    Attributes:
      num_frames: The length of the encoder's input, in feature frames (100 a second).
        It is not looked at for a stream.
      feature_dim: Numbers in a feature frame.
      heads: Of transducer and ctc; none: all that the model has.
      mask: Whether the encoder takes a mask, with which a shorter utterance has the
        same output as alone. Without it, the padding is heard. For a stream there is
        always one, of the left context.
      takes_mean: Whether the encoder takes the mean of the utterance off its features.
      decoder: ``embedding`` for the embedding's table and a graph of the rest, or
        ``table`` for one row for each context.
      table_mb: The largest table of contexts, in MB.
      opset: The version of ONNX's operators.
      chunk_size: Stack frames (50 a second) of a stream's chunk; 0 for whole
        utterances.
      left_context: Those before it that a chunk hears.
      bound: The largest difference of a step, for values between -1 and 1; for larger
        ones it grows as they do, as that of float32 does (see ``plain_check``).
    """

    num_frames: int
    feature_dim: int
    heads: Tuple[str, ...] = ()
    mask: bool = True
    takes_mean: bool = False
    decoder: str = "embedding"
    table_mb: float = 16.0
    opset: int = 13
    chunk_size: int = 0
    left_context: int = 0
    bound: float = 1e-5


@dataclass
class PlainReport:
    """What was written.

    Attributes:
      metadata: The description of the form, which is in ``metadata.json`` too.
      differences: What each step changed.
      operators: By file, the types of operators and their numbers.
      sizes: By file, its size in bytes.
    """

    metadata: Dict[str, Any]
    differences: List[Difference]
    operators: Dict[str, Dict[str, int]]
    sizes: Dict[str, int] = field(default_factory=dict)


def write_plain(
    model: nn.Module,
    form: PlainForm,
    folder: Union[str, Path],
    metadata: Mapping[str, Any] = {},
) -> PlainReport:
    """Write a model in the plain form, each step compared with the last.

    Args:
      model: A recipe's model with a Zipformer, and a CTC head or a transducer head with
        a stateless decoder. It stays as it is.
      form: What is to be written.
      folder: Where the files go. What it holds is replaced, if that is a plain form.
      metadata: What else ``metadata.json`` says.

    Returns:
      What was written.

    Raises:
      KDError: What can't be had, a folder with other files, or a step that changes more
        than the form's ``bound``. Nothing is written then.
    """
    folder = Path(folder)
    heads = heads_of(model, form.heads)
    _check(model, form, heads)
    _check_folder(folder)
    whole = WholeModel(model, heads, form.takes_mean)
    with torch.no_grad():
        graphs, differences = _make_encoder(whole, form, heads)
        tables: Dict[str, np.ndarray] = {}
        if TRANSDUCER in heads:
            more, tables = _add_transducer(whole, form, graphs)
            differences += more
    require_close(differences, form.bound)
    described = _described(model, form, heads)
    ops = {name: operators(graph) for name, graph in graphs.items()}
    report = PlainReport(described, differences, ops)
    checked = {"bound": form.bound, "differences": [asdict(d) for d in differences]}
    about = {**metadata, "form": "plain", "plain": described, "operators": ops}
    _write(folder, graphs, tables, {**about, "checked": checked})
    report.sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    return report


def _check(model: nn.Module, form: PlainForm, heads: Sequence[str]) -> None:
    """Refuse what can't be had, before anything is computed."""
    require_zipformer(model)
    require_opset(form.opset)
    require(
        form.num_frames >= MIN_FRAMES or form.chunk_size,
        f"`num_frames` is {form.num_frames}, and one frame of output needs "
        f"{MIN_FRAMES} feature frames: give {MIN_FRAMES} or more",
    )
    require(
        form.mask or not form.takes_mean,
        "`mask` is off, and the mean of an utterance is over its own frames: leave the "
        "mask on, or take features without the mean",
    )
    require(
        form.decoder in DECODERS,
        f"`decoder` is {form.decoder}: give one of {', '.join(DECODERS)}",
    )
    if TRANSDUCER not in heads:
        return
    decoder = model.decoder
    require(
        hasattr(decoder, "context_size"),
        f"the decoder {type(decoder).__name__} has no context_size, so it has a state, "
        "and the plain form is for stateless ones: export it in another form",
    )
    rows = (decoder.embedding.num_embeddings + 1) ** decoder.context_size
    size = rows * model.joiner.decoder_proj.out_features * 4 / 1e6
    require(
        form.decoder != "table" or size <= form.table_mb,
        f"the table of all {rows} contexts has {size:.1f} MB and `table_mb` is "
        f"{form.table_mb:g}: give `decoder` embedding, or a larger limit",
    )


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but a plain form."""
    check_new_folder(str(folder), "`folder`")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        form = json.loads((folder / "metadata.json").read_text("utf8"))["form"]
    except (OSError, ValueError, KeyError, TypeError):
        form = None
    require(
        form == "plain",
        f"`folder` {folder} holds files that are no plain form: give another one",
    )


def _make_encoder(
    whole: WholeModel, form: PlainForm, heads: Sequence[str]
) -> Tuple[Dict[str, onnx.ModelProto], List[Difference]]:
    """The graph of the encoder, and what the steps to it changed."""
    if form.chunk_size:
        return _make_chunks(whole, form, heads)
    encoder = PlainEncoder(whole.model, form.num_frames, heads, form.takes_mean).eval()
    inputs = {"features": torch.zeros(1, form.num_frames, form.feature_dim)}
    if form.mask:
        inputs["mask"] = torch.ones(1, form.num_frames)
    graph = make_graph(encoder, inputs, encoder.heads.names, form.opset)
    return {"encoder.onnx": graph}, compare_encoder(whole, encoder, graph, inputs)


def _make_chunks(
    whole: WholeModel, form: PlainForm, heads: Sequence[str]
) -> Tuple[Dict[str, onnx.ModelProto], List[Difference]]:
    """The graph of a stream's encoder, and what the steps to it changed."""
    sizes = form.chunk_size, form.left_context, heads
    encoder = PlainChunkEncoder(whole.model, *sizes).eval()
    states = encoder.states()
    inputs = {
        "features": torch.zeros(1, encoder.num_frames, form.feature_dim),
        "mask": torch.ones(1, form.left_context),
        **states,
    }
    outputs = [*encoder.heads.names, *(f"new_{name}" for name in states)]
    graph = make_graph(encoder, inputs, outputs, form.opset)
    recipe = chunks_of_recipe(whole.model, *sizes)
    return {"encoder.onnx": graph}, compare_chunks(recipe, encoder, graph, inputs)


def _add_transducer(
    whole: WholeModel, form: PlainForm, graphs: Dict[str, onnx.ModelProto]
) -> Tuple[List[Difference], Dict[str, np.ndarray]]:
    """Add decoder and joiner to ``graphs``; what the steps changed, and the tables."""
    joiner, decoder = PlainJoiner(whole.model).eval(), PlainDecoder(whole.model).eval()
    width = whole.model.joiner.output_linear.in_features
    rows = {name: torch.zeros(1, width) for name in ("encoder_out", "decoder_out")}
    graph = graphs["joiner.onnx"] = make_graph(joiner, rows, ["logits"], form.opset)
    differences = compare_joiner(whole, joiner, graph)
    if form.decoder == "table":
        table = whole.decode(some_contexts(whole.model, everything=True))
        return differences, {"decoder_table.npy": table.numpy()}
    embedding = whole.model.decoder.embedding.weight.detach()
    rows = {"embeddings": torch.zeros(1, decoder.context_size, embedding.size(1))}
    graph = make_graph(decoder, rows, ["decoder_out"], form.opset)
    graphs["decoder.onnx"] = graph
    differences += compare_decoder(whole, decoder, graph)
    return differences, {"token_embedding.npy": embedding.numpy()}


def _described(
    model: nn.Module, form: PlainForm, heads: Sequence[str]
) -> Dict[str, Any]:
    """What a reader must know of the form."""
    chunk = form.chunk_size
    length = num_frames_of(model, chunk) if chunk else form.num_frames
    described = {
        "num_frames": length,
        "feature_dim": form.feature_dim,
        "frames": chunk // 2 if chunk else encoder_frames(length),
        "stack_frames": chunk or stack_frames(length),
        "mask": form.mask,
        "takes_mean": form.takes_mean,
        "opset": form.opset,
        "heads": list(heads),
        "blank_id": 0,
    }
    if chunk:
        described.update(chunk_size=chunk, left_context=form.left_context)
    if TRANSDUCER in heads:
        blank = int(model.decoder.blank_id)
        described.update(
            decoder=form.decoder,
            blank_id=blank,
            silent=sorted({blank, int(getattr(model, "unk_id", blank))}),
            context_size=int(model.decoder.context_size),
            vocab_size=int(model.decoder.embedding.num_embeddings),
        )
    return described


def _write(
    folder: Path,
    graphs: Mapping[str, onnx.ModelProto],
    tables: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
) -> None:
    """Write all files, or none."""
    temporary = folder.with_name(f".tmp.{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, graph in graphs.items():
            onnx.save_model(graph, str(temporary / name))
        for name, table in tables.items():
            np.save(temporary / name, table)
        text = json.dumps(metadata, indent=1, ensure_ascii=False)
        (temporary / "metadata.json").write_text(text + "\n", "utf8")
        shutil.rmtree(folder, ignore_errors=True)  # an empty one or a plain form
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

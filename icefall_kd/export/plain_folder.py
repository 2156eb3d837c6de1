"""The plain form as a folder within that of a model's exported files."""

from typing import Dict, List, Sequence

import numpy as np

from icefall_kd.export.build import PLAIN
from icefall_kd.export.folder import TOKENS, ExportFolder, write_tokens
from icefall_kd.export.plain import PlainForm, PlainReport, write_plain
from icefall_kd.export.plain_model import CTC
from icefall_kd.export.plain_reader import PlainReader
from icefall_kd.export.sides import Side
from icefall_kd.teacher.spec import LoadedTeacher

# What both metadata.json say.
_SHARED = ("model", "checkpoint", "tokens", "features", "versions")


def add_plain(
    loaded: LoadedTeacher, form: PlainForm, names: Sequence[str], folder: ExportFolder
) -> PlainReport:
    """Write ``plain-N``, for N feature frames or a stream's sizes, and note its files.

    Args:
      loaded: The model.
      form: What is to be written.
      names: The tokens in the order of their ids.
      folder: Begun. Another plain form for N in it is replaced.

    Returns:
      What was written.

    Raises:
      KDError: As :func:`icefall_kd.export.plain.write_plain`.
    """
    length = str(form.num_frames)
    if form.chunk_size:
        length = f"chunk-{form.chunk_size}-left-{form.left_context}"
    place = f"{PLAIN}-{length}"
    shared = {name: folder.metadata[name] for name in _SHARED}
    report = write_plain(loaded.model, form, folder.path / place, shared)
    write_tokens(folder.path / place / TOKENS, names)
    known = folder.metadata["files"]
    for name in [name for name in known if name.startswith(f"{place}/")]:
        del known[name]
    for path in sorted((folder.path / place).iterdir()):
        operators = report.operators.get(path.name, {})
        more = {"operators": operators} if operators else {}
        folder.add(f"{place}/{path.name}", path.stem, PLAIN, **more)
    return report


def plain_sides(folder: ExportFolder, head: str) -> List[Side]:
    """Return the plain forms of a folder, to be compared with others.

    Args:
      folder: With its files.
      head: transducer or ctc.
    """
    sizes: Dict[str, int] = {}
    for name, values in folder.metadata["files"].items():
        if values.get("precision") == PLAIN:
            place = name.split("/")[0]
            sizes[place] = sizes.get(place, 0) + values["bytes"]
    sides = []
    for place, size in sizes.items():
        reader = PlainReader(folder.path / place)
        if head in reader.metadata["heads"]:
            sides.append(_side(place, reader, head, size))
    return sides


def _side(name: str, reader: PlainReader, head: str, size: int) -> Side:
    """A plain form of one head; its graphs take one context or frame at a time."""

    def encode(x: np.ndarray) -> np.ndarray:
        return reader.encode(x[0])["encoder_out"]

    def decode(contexts: np.ndarray) -> np.ndarray:
        return np.concatenate([reader.decoder_out(row.tolist()) for row in contexts])

    def join(encoder_out: np.ndarray, decoder_out: np.ndarray) -> np.ndarray:
        pairs = zip(encoder_out, decoder_out)
        return np.concatenate([reader.logits(a[None], b[None]) for a, b in pairs])

    def log_probs(x: np.ndarray) -> np.ndarray:
        return reader.encode(x[0])["ctc_log_probs"]

    if head == CTC:
        return Side(name, log_probs=log_probs, bytes=size)
    return Side(name, encode, decode, join, bytes=size)


def sentences(report: PlainReport) -> List[str]:
    """What a user is told of a plain form.

    Args:
      report: What was written.
    """
    lines = []
    for part in dict.fromkeys(d.part for d in report.differences):
        of_step = {"plain": 0.0, "onnx": 0.0, "float64": 0.0}
        for d in report.differences:
            if d.part == part:
                of_step[d.step] = max(of_step[d.step], d.largest)
        lines.append(
            f"{part}: largest difference {of_step['plain']:.1e} of the plain modules "
            f"from the recipe's, {of_step['onnx']:.1e} of onnxruntime from those"
        )
        if of_step["float64"]:
            lines[-1] += f"; the recipe's own are {of_step['float64']:.1e} from float64"
    for name, operators in report.operators.items():
        counts = ", ".join(f"{kind} {count}" for kind, count in operators.items())
        lines.append(f"{name}: {counts}")
    return lines

"""The plain form as a folder within that of a model's exported files."""

from typing import List, Sequence

from icefall_kd.export.build import PLAIN
from icefall_kd.export.folder import TOKENS, ExportFolder, write_tokens
from icefall_kd.export.plain import PlainForm, PlainReport, write_plain
from icefall_kd.teacher.spec import LoadedTeacher

# What both metadata.json say.
_SHARED = ("model", "checkpoint", "tokens", "features", "versions")


def add_plain(
    loaded: LoadedTeacher, form: PlainForm, names: Sequence[str], folder: ExportFolder
) -> PlainReport:
    """Write ``plain-N``, for N feature frames, and note its files.

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
    place = f"{PLAIN}-{form.num_frames}"
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


def sentences(report: PlainReport) -> List[str]:
    """What a user is told of a plain form.

    Args:
      report: What was written.
    """
    lines = []
    for part in dict.fromkeys(d.part for d in report.differences):
        of_step = {"plain": 0.0, "onnx": 0.0}
        for d in report.differences:
            if d.part == part:
                of_step[d.step] = max(of_step[d.step], d.largest)
        lines.append(
            f"{part}: largest difference {of_step['plain']:.1e} of the plain modules "
            f"from the recipe's, {of_step['onnx']:.1e} of onnxruntime from those"
        )
    for name, operators in report.operators.items():
        counts = ", ".join(f"{kind} {count}" for kind, count in operators.items())
        lines.append(f"{name}: {counts}")
    return lines

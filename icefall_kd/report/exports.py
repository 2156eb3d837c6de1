"""What `icefall-kd export --check` found of the exported files of a training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from icefall_kd.errors import KDError

FOLDER, PARITY = "export", "parity.json"


@dataclass(frozen=True)
class ExportedForm:
    """A form of a model, compared with torch.

    Args:
      form: Such as fp32, int8 or sherpa-onnx fp32; torch is the model itself.
      head: transducer or ctc.
      cuts: How many utterances both sides got.
      same: Of these, those with the same tokens.
      error_rate: In percent, or None without transcripts.
      bytes: Of its files, 0 for none.
      rtf: Seconds for a second of audio, on one thread.
      is_wrong: Whether a bound was broken.
    """

    form: str
    head: str
    cuts: int
    same: int
    error_rate: Optional[float]
    bytes: int
    rtf: float
    is_wrong: bool


def read_exports(exp: Path) -> List[ExportedForm]:
    """Read what was found of the files in the ``export`` folder of a training.

    Args:
      exp: The experiment folder.

    Returns:
      The forms; none where nothing was exported and checked.

    Raises:
      KDError: the file is not one that `icefall-kd export` wrote.
    """
    path = exp / FOLDER / PARITY
    if not path.exists():
        return []
    try:
        forms = [
            ExportedForm(
                str(row["form"]),
                str(row["head"]),
                int(row["cuts"]),
                int(row["same"]),
                None if row["wer"] is None else float(row["wer"]),
                int(row["bytes"]),
                float(row["rtf"]),
                bool(row["broken"]),
            )
            for row in json.loads(path.read_text("utf8"))["forms"]
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KDError(
            f"{path} is not what `icefall-kd export --check` writes "
            f"({type(error).__name__}: {error}): check the files again by "
            "--only-check, or remove it"
        ) from None
    return forms

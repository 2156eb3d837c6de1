"""The folder of one model's exported files, and its metadata.json."""

import hashlib
import json
import shutil
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

from icefall_kd import __version__
from icefall_kd.errors import KDError, require
from icefall_kd.files import check_new_folder, missing_folders, replacing
from icefall_kd.tokens import hash_tokens

METADATA = "metadata.json"
TOKENS = "tokens.txt"
FORMAT = 1  # of metadata.json
FP32, FP16, INT8 = "fp32", "fp16", "int8"
PRECISIONS = (FP32, FP16, INT8)
TABLE = "parity.md"
FAILED = ".failed"  # behind the name of a file that --check found to be wrong
# What says whether files belong together, beside the checkpoint.
_ALIKE = ("model", "tokens", "features")
_OURS = ("*.onnx", "jit_script*.pt", TOKENS)


def file_name(part: str, suffix: str, precision: str = FP32) -> str:
    """The name of a part's file, which is icefall's and sherpa-onnx's.

    Args:
      part: encoder, decoder, joiner, or model for encoder and CTC head.
      suffix: Which checkpoint, such as epoch-30-avg-9.
      precision: fp32, fp16 or int8.
    """
    return f"{part}-{suffix}{'' if precision == FP32 else '.' + precision}.onnx"


def write_tokens(path: Path, names: Sequence[str]) -> None:
    """Write tokens.txt, a token and its id on each line.

    Args:
      path: The file.
      names: The tokens in the order of their ids.
    """
    lines = "".join(f"{name} {i}\n" for i, name in enumerate(names))
    with replacing(path, shared=True) as temporary:
        temporary.write_text(lines, "utf8")


def read_tokens(path: Path) -> List[str]:
    """Read tokens.txt.

    Args:
      path: The file.

    Raises:
      KDError: It can't be read, or its ids don't run from 0 on.
    """
    try:
        # A token may be a space of any kind: only the last blank is the separator.
        lines = path.read_bytes().decode("utf8").split("\n")
        rows = [line.rpartition(" ") for line in lines if line]
        numbers = [int(number) for _, _, number in rows]
        if numbers != list(range(len(rows))):
            raise ValueError("its ids don't run from 0 on")
    except (OSError, ValueError) as e:
        raise KDError(f"{path} can't be read ({e}): export again") from None
    return [name for name, _, _ in rows]


def hash_of_file(path: Path) -> str:
    """The SHA-256 of a file.

    Args:
      path: The file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> Dict[str, str]:
    """The versions of all that takes part, as metadata.json has them."""
    known = {"icefall_kd": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "lhotse", "onnx", "onnxruntime", "sherpa_onnx"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass  # it is optional, and was not asked for
    return known


class ExportFolder:
    """The folder of one model's files.

    Args:
      path: The folder, which need not exist.

    Raises:
      KDError: It can't be made, or its metadata.json can't be read.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        check_new_folder(path, "`export_dir`")
        self.metadata: Dict[str, Any] = {}
        if (self.path / METADATA).exists():
            self.metadata = self._read()

    def _read(self) -> Dict[str, Any]:
        path = self.path / METADATA
        try:
            values = json.loads(path.read_text("utf8"))
            ours = values["export"] == FORMAT and isinstance(values["files"], dict)
            ours = ours and all(isinstance(values[name], dict) for name in _ALIKE[1:])
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        require(
            ours,
            f"{path} can't be read, or is not of `icefall-kd export` (format "
            f"{FORMAT}): give another `export_dir`, or remove the folder",
        )
        values.setdefault("failed", {})  # former versions had none
        return values

    def begin(self, values: Dict[str, Any]) -> None:
        """Take the folder for a model's files.

        Args:
          values: What metadata.json says of the model, its tokens and its features.

        Raises:
          KDError: It holds files of another model, or of nobody knows which.
        """
        if self.metadata:
            self.same_model(values)
        else:
            paths = [p for pattern in _OURS for p in self.path.glob(pattern)]
            first = min((p.name for p in paths), default="")
            require(
                not first,
                f"`export_dir` {self.path} holds {first}, "
                f"and no {METADATA} says of which model: give another folder",
            )
        former = {name: self.metadata.get(name, {}) for name in ("files", "failed")}
        self.metadata = {"export": FORMAT, **values, **former}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make the folder for a block; what the block began is gone if it fails.

        Of what is killed metadata.json says whose files these are, so that the same
        export takes their place.
        """
        made = missing_folders(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.finish()
        try:
            yield
        except BaseException:
            if made:
                shutil.rmtree(made[-1], ignore_errors=True)  # the outermost
            raise

    def same_model(self, values: Dict[str, Any]) -> None:
        """Refuse a model, tokens or features that are not those of the files.

        Args:
          values: What metadata.json would say of them.

        Raises:
          KDError: They differ.
        """
        for name in _ALIKE:
            was, now = self.metadata[name], values[name]
            if was == now:
                continue
            checkpoint = self.metadata.get("checkpoint", {})
            if name == "model":
                difference = (
                    f"another model ({checkpoint.get('name')}, parameters "
                    f"{str(was)[:8]}) and not of {values['checkpoint']['name']}, "
                    f"parameters {str(now)[:8]}"
                )
            else:
                field = next(k for k in {**was, **now} if was.get(k) != now.get(k))
                difference = (
                    f"other {name} ({field} {_short(was.get(field))} and not "
                    f"{_short(now.get(field))})"
                )
            raise KDError(
                f"`export_dir` {self.path} holds files of {difference}: give another "
                "folder, or export again into a new one"
            )

    def add(self, name: str, part: str, precision: str, **more: Any) -> None:
        """Note a file that has been written.

        Args:
          name: Its name.
          part: The part of the model in it.
          precision: fp32, fp16 or int8, or torchscript.
          more: What else there is to say of it.
        """
        path = self.path / name
        self.metadata["failed"].pop(name, None)
        (self.path / (name + FAILED)).unlink(missing_ok=True)
        self.metadata["files"][name] = {
            "part": part,
            "precision": precision,
            "bytes": path.stat().st_size,
            "sha256": hash_of_file(path),
            **more,
        }

    def fail(self, name: str, sentence: str) -> None:
        """Rename a wrong file, so that nobody deploys it.

        Args:
          name: A file of metadata.json; those of :meth:`files` have it no longer.
          sentence: What is wrong.
        """
        path = self.path / name
        path.replace(path.with_name(path.name + FAILED))
        values = self.metadata["files"].pop(name)
        self.metadata["failed"][name] = {**values, "broken": sentence}

    def finish(self) -> None:
        """Write metadata.json."""
        text = json.dumps(self.metadata, indent=1, ensure_ascii=False) + "\n"
        with replacing(self.path / METADATA, shared=True) as temporary:
            temporary.write_text(text, "utf8")

    def files(self, precision: str) -> Dict[str, Path]:
        """The files of a precision, by part.

        Args:
          precision: fp32, fp16, int8 or torchscript.
        """
        return {
            values["part"]: self.path / name
            for name, values in self.metadata["files"].items()
            if values.get("precision") == precision
        }


def tokens_of(names: Sequence[str], settings: Dict[str, Any]) -> Dict[str, Any]:
    """What metadata.json says of a model's tokens.

    Args:
      names: The tokens in the order of their ids.
      settings: The recipe's params.
    """
    return {
        "file": TOKENS,
        "number": len(names),
        "sha256": hash_tokens(list(names)),
        "blank_id": int(settings.get("blank_id", 0)),
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:8]

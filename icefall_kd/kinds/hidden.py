"""Hidden layers of the encoder: their rows, and the forms in which a store keeps them.

A row belongs to one frame of the encoder's output. A stack works at twice that rate, so
its row holds R = 2 vectors; where an utterance ends in the middle of a row its last
vector stands twice. The row of layer ``out``, the encoder's output, holds R = 1.

=================  ==================================================================
``3:half``         the output of stack 3 in float16
``out:half``       the encoder's output in float16
``3:mvq:8:HASH``   8 codes of one byte for each vector, by the quantizer of that hash
                   (multi-codebook vector quantization, arXiv:2211.00508)
=================  ==================================================================
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Tuple, Union

import numpy as np
import torch

from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.types import EncoderOut

OUT = "out"  # the encoder's output among the layers; the stacks go by their index
Layer = Union[int, str]
FORMS = "LAYER:half or LAYER:QUANTIZER.pt, where LAYER is a stack's index or out"


def hidden_rows(out: EncoderOut, layer: Layer) -> torch.Tensor:
    """The rows of a layer, (N, T, R, C), with their graph.

    Args:
      out: With the stack ``layer`` among its ``hidden``.
      layer: A stack's index, or ``OUT``.

    Raises:
      KDError: a stack of another rate than twice that of the encoder's output.
    """
    if layer == OUT:
        return out.encoder_out.unsqueeze(2)
    x = out.hidden[layer]
    n, t = out.encoder_out.shape[:2]
    if (x.size(1) + 1) // 2 != t:
        raise KDError(
            f"stack {layer} gives {x.size(1)} frames where the encoder's output has "
            f"{t}, and a row holds two of a stack: take {OUT}, the encoder's output, "
            "of an encoder that doesn't subsample by 4"
        )
    frames = torch.arange(2 * t, device=x.device).unsqueeze(0)
    last = out.hidden_lens.to(x.device).unsqueeze(1) - 1
    index = torch.minimum(frames, last).unsqueeze(-1).expand(-1, -1, x.size(2))
    return x.gather(1, index).view(n, t, 2, -1)


@dataclass(frozen=True)
class HiddenCodec:
    """How the rows of one layer are kept."""

    layer: Layer
    codes: int = 0  # for each vector; 0: float16
    quantizer: str = ""  # start of the quantizer file's SHA-256

    @staticmethod
    def parse(text: str) -> "HiddenCodec":
        """The codec that ``text`` names, in the form that a fingerprint has."""
        form = r"([0-9]{1,3}|out):(?:half|mvq:([1-9][0-9]{0,2}):([0-9a-f]+))"
        match = re.fullmatch(form, text)
        if not match:
            raise KDError(f"the hidden layer is {text!r}: give {FORMS}")
        layer, codes, quantizer = match.groups()
        return HiddenCodec(
            OUT if layer == OUT else int(layer), int(codes or 0), quantizer or ""
        )

    def __str__(self) -> str:
        form = f"mvq:{self.codes}:{self.quantizer}" if self.codes else "half"
        return f"{self.layer}:{form}"

    @property
    def vectors(self) -> int:
        """R, how many a row holds."""
        return 1 if self.layer == OUT else 2

    def check(self, rows: torch.Tensor, quantizer: Any, cut_id: str) -> None:
        """Refuse rows that :meth:`encode` can't keep."""
        shape = tuple(rows.shape)
        if len(shape) != 3 or shape[1] != self.vectors:
            raise KDError(
                f"layer {self.layer} on cut {cut_id} has shape {shape} and must be "
                f"(frames, {self.vectors}, C)"
            )
        if quantizer is not None and shape[2] != quantizer.dim:
            raise KDError(
                f"layer {self.layer} on cut {cut_id} has vectors of {shape[2]} and its "
                f"quantizer takes {quantizer.dim}: train one for this layer with "
                "`icefall-kd quantizer`"
            )
        largest = float(rows.abs().max()) if rows.numel() else 0.0
        if not math.isfinite(largest):
            raise KDError(
                f"the teacher's layer {self.layer} on cut {cut_id} has numbers that "
                "are not finite: check the teacher's checkpoint and the cut's features"
            )
        if largest > torch.finfo(torch.float16).max:
            raise KDError(
                f"the teacher's layer {self.layer} on cut {cut_id} reaches {largest}, "
                "and float16 holds 65504: check the teacher's checkpoint and the "
                "cut's features"
            )

    @property
    def part(self) -> str:
        """The name of its part of a record."""
        return f"hidden.{self.layer}"

    def quantizer_file(self, store: Union[str, Path]) -> Path:
        return Path(store) / f"quantizer.{self.layer}.pt"

    def stored_quantizer(self, store: Union[str, Path]) -> Any:
        """The quantizer that a store's codes were made with; None for float16.

        Raises:
          KDError: no such file, or another one.
        """
        if not self.codes:
            return None
        path = self.quantizer_file(store)
        found = hash_file(path) if path.is_file() else "missing"
        if found != self.quantizer:
            raise KDError(
                f"the quantizer {path} is {found} and the store's codes are of "
                f"{self.quantizer}: copy it there again, or make the targets again "
                "with `icefall-kd dump --overwrite`"
            )
        return load_quantizer(path)

    def encode(self, rows: torch.Tensor, quantizer: Any = None) -> bytes:
        """The bytes of one utterance's rows, (T, R, C)."""
        if self.codes:
            with torch.no_grad():
                rows = quantizer.encode(rows.float())
            return rows.cpu().numpy().astype(np.uint8).tobytes()
        return rows.to(torch.float16).cpu().numpy().tobytes()

    def decode(self, data: bytes, frames: int) -> torch.Tensor:
        """(T, R, C) in float32, or the codes, (T, R, codes) in int64.

        Raises:
          ValueError: bytes that :meth:`encode` did not make.
        """
        kind = np.uint8 if self.codes else np.float16
        values = np.frombuffer(data, kind)
        r = self.vectors
        if values.size % (frames * r) or not values.size:
            raise ValueError(f"{len(data)} bytes for {frames} rows of {r} vectors")
        values = values.reshape(frames, r, -1)
        if self.codes and values.shape[2] != self.codes:
            raise ValueError(f"{values.shape[2]} codes a vector, and not {self.codes}")
        return torch.from_numpy(values.astype(np.int64 if self.codes else np.float32))


def parse_hidden(text: str) -> Tuple[HiddenCodec, ...]:
    """The codecs of a list with commas; none of an empty one."""
    codecs = tuple(HiddenCodec.parse(part) for part in text.split(",") if text)
    layers = [codec.layer for codec in codecs]
    for layer in layers:
        if layers.count(layer) > 1:
            raise KDError(
                f"the hidden layer {layer} occurs twice in {text!r}: keep "
                "it in one form"
            )
    return codecs


def import_quantization():
    try:
        import multi_quantization
    except ImportError:
        raise KDError(
            "the package multi_quantization is not installed, and vector quantization "
            "needs it: run `pip install multi_quantization`"
        ) from None
    return multi_quantization


def save_quantizer(quantizer: Any, path: Path) -> None:
    values = {"dim": quantizer.dim, "codes": quantizer.num_codebooks}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save({**values, "state": quantizer.state_dict()}, temporary)


def load_quantizer(path: Union[str, Path]) -> Any:
    """The quantizer that ``icefall-kd quantizer`` wrote.

    Raises:
      KDError: no such file, or one that holds something else.
    """
    kind = import_quantization().Quantizer
    try:
        values: Dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        quantizer = kind(values["dim"], 256, values["codes"])
        quantizer.load_state_dict(values["state"])
    except Exception as e:  # torch raises many kinds for what is none
        raise KDError(
            f"the quantizer {path} can't be read ({type(e).__name__}): make it with "
            "`icefall-kd quantizer`"
        ) from None
    return quantizer.eval().requires_grad_(False)


def hash_file(path: Union[str, Path]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def from_command_line(text: str) -> Tuple[Tuple[HiddenCodec, ...], Dict[Layer, Path]]:
    """The codecs that ``--keep-hidden`` asks for, and the quantizer file of each."""
    forms, files = [], {}
    for part in text.split(",") if text else ():
        layer, _, form = part.partition(":")
        if form == "half" or not form:
            forms.append(str(HiddenCodec.parse(part)))
            continue
        quantizer = load_quantizer(form)
        forms.append(f"{layer}:mvq:{quantizer.num_codebooks}:{hash_file(form)}")
        files[HiddenCodec.parse(forms[-1]).layer] = Path(form)
    return parse_hidden(",".join(forms)), files

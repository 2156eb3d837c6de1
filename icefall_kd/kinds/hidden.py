"""Hidden layers of the encoder: their rows, and the forms in which a store has them.

A row belongs to one frame of the encoder's output. A stack works at twice that rate, so
its row holds R = 2 vectors; where an utterance ends in the middle of a row it holds the
last vector twice. The row of layer ``out``, the encoder's output, holds R = 1.

A store's form is a list with commas, of one layer each:

=================  ==================================================================
``3:half``         the output of stack 3 in float16
``out:half``       the encoder's output in float16
``3:mvq:8:HASH``   8 codes of one byte for each vector, by the quantizer of that hash
                   (multi-codebook vector quantization, arXiv:2211.00508)
=================  ==================================================================

The bytes of a layer of T frames are its numbers, row by row: T x R x C float16, or T x
R x codes uint8.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.kinds.base import FrameKind, Parts
from icefall_kd.types import EncoderOut
from icefall_kd.zipformer import OUT, Layer

FORMS = "LAYER:half or LAYER:QUANTIZER.pt, where LAYER is a stack's index or out"


def hidden_rows(out: EncoderOut, layer: Layer) -> torch.Tensor:
    """Return the rows of a layer, (N, T, R, C), with their graph.

    Args:
      out: A model's outputs, with the stack ``layer`` among its ``hidden``.
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
    """Turns the rows of one layer into bytes, and back.

    Args:
      layer: A stack's index, or ``OUT``.
      codes: The number of codes of a vector; 0 stores it in float16.
      quantizer: The start of the SHA-256 of the quantizer's file.
    """

    layer: Layer
    codes: int = 0
    quantizer: str = ""

    @staticmethod
    def parse(text: str) -> "HiddenCodec":
        """Return the codec of one layer's form.

        Args:
          text: The form, as a fingerprint has it.

        Raises:
          KDError: another text.
        """
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
        """R, the number of vectors in a row."""
        return 1 if self.layer == OUT else 2

    def check(self, rows: torch.Tensor, quantizer: Any, cut_id: str) -> None:
        """Refuse rows that :meth:`encode` can't turn into bytes.

        Args:
          rows: (T, R, C) of one cut.
          quantizer: What makes the codes; None for float16.
          cut_id: The cut, for messages.

        Raises:
          KDError: another shape, or numbers beyond float16.
        """
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
        """The name of the layer's part of a record."""
        return f"hidden.{self.layer}"

    def quantizer_file(self, store: Union[str, Path]) -> Path:
        """Return the path of the quantizer in a store.

        Args:
          store: The store's folder.
        """
        return Path(store) / f"quantizer.{self.layer}.pt"

    def stored_quantizer(self, store: Union[str, Path]) -> Any:
        """Load the quantizer that a store's codes were made with; None for float16.

        Args:
          store: The store's folder.

        Raises:
          KDError: no such file, or another one.
        """
        if not self.codes:
            return None
        path = self.quantizer_file(store)
        file_hash = hash_file(path) if path.is_file() else "missing"
        if file_hash != self.quantizer:
            raise KDError(
                f"the quantizer {path} is {file_hash} and the store's codes are of "
                f"{self.quantizer}: copy it there again, or make the targets again "
                "with `icefall-kd dump --overwrite`"
            )
        return load_quantizer(path)

    def encode(self, rows: torch.Tensor, quantizer: Any = None) -> bytes:
        """Turn one cut's rows into bytes.

        Args:
          rows: (T, R, C).
          quantizer: What makes the codes; None for float16.
        """
        if self.codes:
            with torch.no_grad():
                rows = quantizer.encode(rows.float())
            return rows.cpu().numpy().astype(np.uint8).tobytes()
        return rows.to(torch.float16).cpu().numpy().tobytes()

    def decode(self, data: bytes, frames: int) -> torch.Tensor:
        """Turn bytes into rows.

        Args:
          data: The bytes.
          frames: T, the number of frames.

        Returns:
          (T, R, C) in float32, or the codes, (T, R, codes) in int64.

        Raises:
          ValueError: bytes that :meth:`encode` did not make.
        """
        values = np.frombuffer(data, np.uint8 if self.codes else np.float16)
        r = self.vectors
        if values.size % (frames * r) or not values.size:
            raise ValueError(f"{len(data)} bytes for {frames} rows of {r} vectors")
        values = values.reshape(frames, r, -1)
        if self.codes and values.shape[2] != self.codes:
            raise ValueError(f"{values.shape[2]} codes a vector, and not {self.codes}")
        return torch.from_numpy(values.astype(np.int64 if self.codes else np.float32))


def parse_hidden(text: str) -> Tuple[HiddenCodec, ...]:
    """Return the codecs of a list of layers' forms, with commas; none of "".

    Args:
      text: The list.

    Raises:
      KDError: a form that is none, or a layer that occurs twice.
    """
    codecs = tuple(HiddenCodec.parse(part) for part in text.split(",") if text)
    layers = [codec.layer for codec in codecs]
    for layer in layers:
        if layers.count(layer) > 1:
            raise KDError(
                f"the hidden layer {layer} occurs twice in {text!r}: keep "
                "it in one form"
            )
    return codecs


class HiddenKind(FrameKind):
    """Hidden layers: for each layer of the form a cut's rows, (T, R, C)."""

    name = "hidden"
    title = "hidden layers"
    example = "--keep-hidden out:half"

    def __init__(self, form: str, vocab_size: int, blank_id: int) -> None:
        self.codecs = parse_hidden(form)
        self.layers = [codec.layer for codec in self.codecs]
        super().__init__(form, vocab_size, blank_id)
        self._quantizers: Dict[Layer, Any] = {}

    def take(self, out: EncoderOut) -> List[Dict[Layer, torch.Tensor]]:
        lens = out.encoder_out_lens.tolist()
        batch = {layer: hidden_rows(out, layer).cpu() for layer in self.layers}
        return [
            {layer: rows[i, :n] for layer, rows in batch.items()}
            for i, n in enumerate(lens)
        ]

    def check(self, value: Optional[Dict[Layer, torch.Tensor]], cut_id: str) -> None:
        for codec in self.codecs:
            rows = (value or {}).get(codec.layer)
            self.require_value(rows, cut_id, f"layer {codec.layer}", codec)
            codec.check(rows, self._quantizer(codec), cut_id)

    def frames(self, value: Dict[Layer, torch.Tensor]) -> List[int]:
        return [len(value[codec.layer]) for codec in self.codecs]

    def encode(self, value: Dict[Layer, torch.Tensor], cut_id: str) -> Parts:
        return {
            codec.part: codec.encode(
                value[codec.layer].detach(), self._quantizer(codec)
            )
            for codec in self.codecs
        }

    def decode(
        self, records: Sequence[Parts], frames: Sequence[int]
    ) -> Dict[Layer, torch.Tensor]:
        return {
            codec.layer: torch.cat(
                [codec.decode(r[codec.part], n) for r, n in zip(records, frames)]
            )
            for codec in self.codecs
        }

    def _quantizer(self, codec: HiddenCodec) -> Any:
        """The quantizer of a codec, loaded once; None for float16."""
        if codec.layer not in self._quantizers:
            self._quantizers[codec.layer] = self.quantizer_of(codec)
        return self._quantizers[codec.layer]


def import_quantization() -> Any:
    """Import the package multi_quantization, or name how to install it."""
    try:
        import multi_quantization
    except ImportError:
        raise KDError(
            "the package multi_quantization is not installed, and vector quantization "
            "needs it: run `pip install multi_quantization`"
        ) from None
    return multi_quantization


def save_quantizer(quantizer: Any, path: Path) -> None:
    """Write a quantizer's file.

    Args:
      quantizer: A ``multi_quantization.Quantizer`` of 256 entries a codebook.
      path: The file.
    """
    values = {"dim": quantizer.dim, "codes": quantizer.num_codebooks}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save({**values, "state": quantizer.state_dict()}, temporary)


def load_quantizer(path: Union[str, Path]) -> Any:
    """Load the quantizer that ``icefall-kd quantizer`` wrote.

    Args:
      path: The file.

    Raises:
      KDError: no such file, or one that holds something else.
    """
    quantizer_class = import_quantization().Quantizer
    try:
        values: Dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        quantizer = quantizer_class(values["dim"], 256, values["codes"])
        quantizer.load_state_dict(values["state"])
    except Exception as e:  # torch raises many kinds for what is none
        raise KDError(
            f"the quantizer {path} can't be read ({type(e).__name__}): make it with "
            "`icefall-kd quantizer`"
        ) from None
    return quantizer.eval().requires_grad_(False)


def hash_file(path: Union[str, Path]) -> str:
    """Return the start of the SHA-256 of a file.

    Args:
      path: The file.
    """
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def from_command_line(text: str) -> Tuple[Tuple[HiddenCodec, ...], Dict[Layer, Path]]:
    """Return the codecs that ``--keep-hidden`` names, and each layer's quantizer file.

    Args:
      text: Layers with commas: LAYER, LAYER:half or LAYER:QUANTIZER.pt.

    Raises:
      KDError: another text, or a file that is no quantizer.
    """
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

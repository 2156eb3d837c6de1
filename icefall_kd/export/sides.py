"""A model in each of its forms, by the same three parts: encoder, decoder, joiner.

All take and return numpy's arrays, of one utterance at a time, and are searched by the
same plain greedy search, so that whatever differs is the form's.
"""

from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.export.packages import need
from icefall_kd.export.streaming import ChunkEncoder, torch_step

Call = Callable[..., np.ndarray]


class Side:
    """A form of a model, for whole utterances.

    Args:
      name: Of the form.
      encode: Features (1, T, F) to what the joiner takes of the encoder, (T', J).
      decode: Contexts (N, context size) to (N, J).
      join: Two of (N, J) to logits (N, V).
      log_probs: Features (1, T, F) to the CTC head's log-probabilities, (T', V).
      bytes: Of the form's files; 0 where there are none.
    """

    def __init__(
        self,
        name: str,
        encode: Any = None,
        decode: Any = None,
        join: Any = None,
        log_probs: Any = None,
        bytes: int = 0,
    ) -> None:
        self.name, self.bytes = name, bytes
        self.encode, self.decode, self.join = encode, decode, join
        self.log_probs = log_probs


def torch_side(model: nn.Module) -> Side:
    """The recipe's own model.

    Args:
      model: In eval mode, on the CPU.
    """

    def encoded(x: np.ndarray) -> torch.Tensor:
        features = torch.from_numpy(x)
        with torch.no_grad():
            x, x_lens = model.encoder_embed(features, torch.tensor([features.size(1)]))
            return model.encoder(x.permute(1, 0, 2), x_lens)[0].permute(1, 0, 2)

    return Side("torch", **_heads(model, encoded))


def script_side(path: Path, chunks: Optional[ChunkEncoder] = None) -> Side:
    """A file of TorchScript.

    Args:
      path: The file.
      chunks: The encoder of torch where the file is for streaming, see
        :func:`onnx_side`.

    Raises:
      KDError: It can't be loaded.
    """
    try:
        model = torch.jit.load(str(path), map_location="cpu")
    except Exception as e:  # torch raises many kinds
        raise _unreadable(path, e) from None

    def of_chunk(x: torch.Tensor, states: List[torch.Tensor]) -> Tuple:
        return model.encoder(x, torch.tensor([x.size(1)]), states)[::2]  # no lengths

    def encoded(x: np.ndarray) -> torch.Tensor:
        if chunks is not None:
            return torch.from_numpy(chunks.encode(torch_step(of_chunk), x))[None]
        features = torch.from_numpy(x)
        with torch.no_grad():
            return model.encoder(features, torch.tensor([features.size(1)]))[0]

    heads = _heads(model, encoded)
    return Side("torchscript", bytes=path.stat().st_size, **heads)


def _heads(model: Any, encoded: Callable) -> Dict[str, Any]:
    """The parts of a model of torch, behind its encoder."""
    heads: Dict[str, Any] = {}

    def numpy(function: Callable) -> Call:
        def call(*arrays: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return function(*map(torch.from_numpy, arrays)).numpy()

        return call

    if getattr(model, "joiner", None) is not None:
        joiner, decoder = model.joiner, model.decoder
        heads["encode"] = lambda x: (
            joiner.encoder_proj(encoded(x)).squeeze(0).detach().numpy()
        )
        heads["decode"] = numpy(
            lambda y: joiner.decoder_proj(decoder(y, need_pad=False).squeeze(1))
        )
        heads["join"] = numpy(lambda a, b: joiner.output_linear(torch.tanh(a + b)))
    if getattr(model, "ctc_output", None) is not None:
        heads["log_probs"] = lambda x: (
            model.ctc_output(encoded(x)).squeeze(0).detach().numpy()
        )
    return heads


def onnx_side(
    name: str, files: Mapping[str, Path], chunks: Optional[ChunkEncoder] = None
) -> Side:
    """Files of ONNX, in onnxruntime with one thread.

    Args:
      name: Of the form.
      files: By part.
      chunks: The encoder of torch where the files are for streaming, for its sizes and
        first states; None for whole utterances.

    Raises:
      KDError: onnxruntime is missing, or a file that it can't load.
    """
    calls: Dict[str, Any] = {}
    for part, path in files.items():
        run = session(path, chunks is not None and part in ("encoder", "model"))
        if part in ("encoder", "model") and chunks is not None:
            role = "encode" if part == "encoder" else "log_probs"
            calls[role] = lambda x, run=run: chunks.encode(run, x)
        elif part in ("encoder", "model"):
            role = "encode" if part == "encoder" else "log_probs"
            calls[role] = lambda x, run=run: run(x, np.array([x.shape[1]]))[0]
        else:
            role = "decode" if part == "decoder" else "join"
            calls[role] = run
    size = sum(path.stat().st_size for path in files.values())
    return Side(name, bytes=size, **calls)


def session(path: Path, all_outputs: bool = False) -> Callable[..., Any]:
    """A function of a file of ONNX: its inputs in their order to its first output.

    Args:
      path: The file.
      all_outputs: Whether it gives all outputs, as a list.

    Raises:
      KDError: onnxruntime is missing, or can't load it.
    """
    ort = need("onnxruntime", "the check of files of ONNX")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        loaded = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as e:  # onnxruntime has a class for each kind
        raise _unreadable(path, e) from None
    inputs = [value.name for value in loaded.get_inputs()]
    first = loaded.get_outputs()[0].name

    def run(*arrays: np.ndarray) -> Any:
        if all_outputs:
            return loaded.run(None, dict(zip(inputs, arrays)))
        return loaded.run([first], dict(zip(inputs, arrays)))[0]

    return run


def _unreadable(path: Path, error: Exception) -> KDError:
    first = " ".join(str(error).split())[:160]
    return KDError(f"{path} can't be loaded ({first}): export again")


def greedy(
    side: Side, frames: np.ndarray, context_size: int, blank_id: int
) -> List[int]:
    """The tokens of an utterance: of each frame the best one.

    Args:
      side: Gives decoder and joiner.
      frames: (T, J), what its encoder gave.
      context_size: Tokens that the decoder sees.
      blank_id: The token id of blank.
    """
    start = (-1,) * (context_size - 1) + (blank_id,)
    rows: Dict[Tuple[int, ...], np.ndarray] = {}
    tokens: List[int] = []
    context = start
    for frame in frames:
        if context not in rows:
            rows[context] = side.decode(np.array([context], dtype=np.int64))
        logits = side.join(np.ascontiguousarray(frame[None]), rows[context])
        best = int(logits[0].argmax())
        if best != blank_id:
            tokens.append(best)
            context = (*context, best)[1:]
    return tokens


def ctc_tokens(log_probs: np.ndarray, blank_id: int) -> List[int]:
    """The tokens of an utterance by its CTC head: the best of each frame, collapsed.

    Args:
      log_probs: (T, V).
      blank_id: The token id of blank.
    """
    best = log_probs.argmax(-1).tolist()
    pairs = zip([None, *best], best)
    return [now for before, now in pairs if now != before and now != blank_id]


def contexts(vocab_size: int, context_size: int, blank_id: int) -> np.ndarray:
    """Contexts that show each token at each place: (N, context size).

    Args:
      vocab_size: V.
      context_size: Tokens that the decoder sees.
      blank_id: The token id of blank.
    """
    rows = [(-1,) * (context_size - 1) + (blank_id,)]
    for first in range(vocab_size):
        rows.append(tuple((first + 3 * i) % vocab_size for i in range(context_size)))
    return np.array(rows, dtype=np.int64)

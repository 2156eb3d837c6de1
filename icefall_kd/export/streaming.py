"""A causal model chunk by chunk, as sherpa-onnx streams it."""

from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from icefall_kd.errors import require
from icefall_kd.export.files import CTC, write_metadata, write_onnx

STATES = ("key", "nonlin_attn", "val1", "val2", "conv1", "conv2")  # of each layer
# The axis of utterances in each of a layer's states.
_UTTERANCES = {"conv1": 0, "conv2": 0}
_CPU = torch.device("cpu")
# Feature frames that a chunk takes beyond those from it to the next, in the recipes.
BEYOND = 13


def chunks_of(settings: Dict[str, Any]) -> Tuple[int, int]:
    """The chunk size and left context that a causal model is exported for.

    Args:
      settings: The recipe's params.

    Returns:
      Stack frames (50 Hz) of both; (-1, -1) for whole utterances.

    Raises:
      KDError: Several of them, as in training.
    """
    values = []
    for name in ("chunk_size", "left_context_frames"):
        value = str(settings.get(name))
        require(
            "," not in value,
            f"--{name.replace('_', '-')} is {value} in training, and a causal model is "
            "exported for one size: give --chunk-size and --left-context-frames, such "
            "as 32 and 128, or --chunk-size -1 for whole utterances",
        )
        values.append(int(value))
        if values[0] <= 0:
            return -1, -1
    require(
        values[1] > 0,
        f"--left-context-frames is {values[1]}, and a stream's is a number above 0: "
        "give one, such as 128",
    )
    return values[0], values[1]


def num_frames_of(model: nn.Module, chunk_size: int) -> int:
    """The feature frames that a chunk takes.

    The front end takes 7 more than two for a stack frame, and its ConvNeXt layer looks
    ahead.

    Args:
      model: A recipe's causal model.
      chunk_size: Stack frames of a chunk.
    """
    ahead = int(model.encoder_embed.convnext.padding[0])
    return 2 * chunk_size + 7 + 2 * ahead


class ChunkEncoder(nn.Module):
    """The features of a chunk to what a head takes of the encoder.

    Args:
      model: Of :func:`icefall_kd.export.graph.exportable`, with its one chunk size and
        left context set.
      head: What follows the encoder.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder_embed, self.encoder = model.encoder_embed, model.encoder
        self.head = head
        self.chunk_size = int(model.encoder.chunk_size[0])
        self.left_context = int(model.encoder.left_context_frames[0])
        self.num_frames = num_frames_of(model, self.chunk_size)

    def initial_states(self) -> List[Tensor]:
        """Those of layers, of the front end, and the number of frames before: 0."""
        states = self.encoder.get_init_states(1, torch.device("cpu"))
        states.append(self.encoder_embed.get_init_states(1, torch.device("cpu")))
        return [*states, torch.zeros(1, dtype=torch.int64)]

    def encode(self, step: Callable, x: np.ndarray) -> np.ndarray:
        """Encode (1, T, F) chunk by chunk by ``step``, of this module or its file."""
        states = [state.numpy() for state in self.initial_states()]
        shift = 2 * self.chunk_size
        return encode_chunks(step, states, x, self.num_frames, shift)

    def forward(self, x: Tensor, states: List[Tensor]) -> Tuple[Tensor, List[Tensor]]:
        """Encode (N, T, F): (N, T', C), and the states of the next chunk."""
        lens = torch.full((1,), self.num_frames).expand(x.size(0))
        x, lens, front = self.encoder_embed.streaming_forward(x, lens, states[-2])
        processed = states[-1]
        before = torch.arange(self.left_context - 1, -1, -1)
        # At the beginning there is nothing yet in the left context.
        padding = torch.cat(
            (
                processed.unsqueeze(1) <= before,
                torch.zeros(1, self.chunk_size, dtype=torch.bool).expand(x.size(0), -1),
            ),
            dim=1,
        )
        out, _, layers = self.encoder.streaming_forward(
            x.permute(1, 0, 2), lens, states[:-2], padding
        )
        out = self.head(out.permute(1, 0, 2))
        return out, [*layers, front, processed + self.chunk_size]


def write_streaming(
    model: nn.Module, settings: Dict[str, Any], part: str, path: Path, opset: int
) -> None:
    """Write the encoder of a causal model, for streaming, as ONNX in fp32.

    Args:
      model: Of :func:`icefall_kd.export.graph.exportable`.
      settings: The recipe's params, with one chunk size and left context.
      part: encoder, or model for encoder and CTC head.
      path: The file.
      opset: The version of ONNX's operators.

    Raises:
      KDError: onnx is not installed, or a model that can't be traced.
    """
    _set_chunks(model, settings)
    head = model.ctc_output if part == CTC else model.joiner.encoder_proj
    module = ChunkEncoder(model, head).eval()
    states = module.initial_states()
    names, axes = state_names(len(states) - 2)
    inputs = ["x", *names]
    outputs = ["log_probs" if part == CTC else "encoder_out"]
    axes.update({"x": {0: "N"}, outputs[0]: {0: "N"}})
    for name in names:
        axes[f"new_{name}"] = axes[name]
        outputs.append(f"new_{name}")
    x = torch.zeros(1, module.num_frames, int(settings["feature_dim"]))
    write_onnx(module, (x, states), path, inputs, outputs, axes, opset)
    write_metadata(path, streaming_metadata(module, part))


class ScriptEncoder(nn.Module):
    """A traced encoder with the names of icefall's ``StreamingEncoderModel``.

    Args:
      encoder: The encoder that is traced.
      traced: Its trace.
    """

    def __init__(self, encoder: ChunkEncoder, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced
        self.states: List[Tensor] = encoder.initial_states()
        names, axes = state_names(len(self.states) - 2)
        self.axes: List[int] = [list(axes[name])[0] for name in names]
        self.chunk_size = encoder.chunk_size
        self.left_context_len = encoder.left_context
        self.pad_length = encoder.num_frames - 2 * encoder.chunk_size

    def forward(
        self, features: Tensor, feature_lengths: Tensor, states: List[Tensor]
    ) -> Tuple[Tensor, Tensor, List[Tensor]]:
        """Encode chunks of features.

        Args:
          features: (N, T, F), of the one length that the file is for.
          feature_lengths: (N,), not read.
          states: Of the chunk before.

        Returns:
          (N, T', C), their lengths (N,), and the states of the next chunk.
        """
        out, new_states = self.traced(features, states)
        return out, torch.full([out.size(0)], out.size(1)), new_states

    @torch.jit.export
    def get_init_states(
        self, batch_size: int = 1, device: torch.device = _CPU
    ) -> List[Tensor]:
        """Return the states of the first chunk.

        Args:
          batch_size: N.
          device: Where they are to lie.
        """
        states: List[Tensor] = []
        for state, axis in zip(self.states, self.axes):
            states.append(torch.cat([state] * batch_size, axis).to(device))
        return states


def script_encoder(model: nn.Module, settings: Dict[str, Any]) -> ScriptEncoder:
    """Trace the encoder of a causal model, chunk by chunk, for TorchScript.

    Args:
      model: Of :func:`icefall_kd.export.graph.exportable`.
      settings: The recipe's params, with one chunk size and left context.
    """
    _set_chunks(model, settings)
    encoder = ChunkEncoder(model, nn.Identity()).eval()
    x = torch.zeros(1, encoder.num_frames, int(settings["feature_dim"]))
    example = (x, encoder.initial_states())
    return ScriptEncoder(encoder, torch.jit.trace(encoder, example, check_trace=False))


def _set_chunks(model: nn.Module, settings: Dict[str, Any]) -> None:
    chunk_size, left_context = chunks_of(settings)
    model.encoder.chunk_size = (chunk_size,)
    model.encoder.left_context_frames = (left_context,)


def state_names(count: int) -> Tuple[List[str], Dict[str, Dict[int, str]]]:
    """The names of states, and their axis of utterances.

    Args:
      count: How many states the layers have.

    Returns:
      The names, those of the front end and of the counter at the end; and by name the
      axis.
    """
    names, axes = [], {}
    for layer in range(count // len(STATES)):
        for state in STATES:
            name = f"cached_{state}_{layer}"
            names.append(name)
            axes[name] = {_UTTERANCES.get(state, 1): "N"}
    for name in ("embed_states", "processed_lens"):
        names.append(name)
        axes[name] = {0: "N"}
    return names, axes


def streaming_metadata(module: ChunkEncoder, part: str) -> Dict[str, str]:
    """What sherpa-onnx reads from the file of a streaming encoder.

    Args:
      module: The encoder.
      part: encoder, or model for encoder and CTC head.
    """
    encoder = module.encoder

    def listed(values: Any) -> str:
        return ",".join(str(int(value)) for value in values)

    contexts = [module.left_context // int(n) for n in encoder.downsampling_factor]
    return {
        "model_type": "zipformer2",
        "version": "1",
        "model_author": "k2-fsa",
        "comment": "streaming " + ("ctc zipformer2" if part == CTC else "zipformer2"),
        "decode_chunk_len": str(2 * module.chunk_size),
        "T": str(module.num_frames),
        "num_encoder_layers": listed(encoder.num_encoder_layers),
        "encoder_dims": listed(encoder.encoder_dim),
        "cnn_module_kernels": listed(encoder.cnn_module_kernel),
        "left_context_len": listed(contexts),
        "query_head_dims": listed(encoder.query_head_dim),
        "value_head_dims": listed(encoder.value_head_dim),
        "num_heads": listed(encoder.num_heads),
    }


def encode_chunks(
    step: Callable[..., Sequence[np.ndarray]],
    states: Sequence[np.ndarray],
    x: np.ndarray,
    num_frames: int,
    shift: int,
) -> np.ndarray:
    """Encode an utterance chunk by chunk, as many as are whole.

    Args:
      step: A chunk and states to its output and the next states.
      states: The first ones.
      x: (1, T, F).
      num_frames: Feature frames that a chunk takes.
      shift: Feature frames from a chunk to the next.

    Returns:
      (T', C).
    """
    rows = []
    for begin in range(0, x.shape[1] - num_frames + 1, shift):
        chunk = np.ascontiguousarray(x[:, begin : begin + num_frames])
        out, *states = step(chunk, *states)
        rows.append(out[0])
    return np.concatenate(rows)


def torch_step(encoder: Callable) -> Callable[..., List[np.ndarray]]:
    """An encoder of torch as a step of :func:`encode_chunks`.

    Args:
      encoder: Takes and gives what :class:`ChunkEncoder` does.
    """

    @torch.no_grad()
    def step(*arrays: np.ndarray) -> List[np.ndarray]:
        x, *states = map(torch.from_numpy, arrays)
        out, states = encoder(x, states)
        return [value.numpy() for value in (out, *states)]

    return step


def padded(audio: np.ndarray, sampling_rate: int, num_frames: int) -> np.ndarray:
    """Audio with silence behind it, so that all of it lies in whole chunks.

    Args:
      audio: (T,).
      sampling_rate: Samples a second.
      num_frames: Feature frames that a chunk takes.

    Returns:
      (T',), whose number of feature frames is between those of two numbers of chunks:
      one frame more or less, as readers count them, makes no difference.
    """
    shift = num_frames - BEYOND
    frames = len(audio) * 100 // sampling_rate
    chunks = max(0, -(-(frames - num_frames) // shift)) + 1
    length = (num_frames + chunks * shift + shift // 2) * sampling_rate // 100
    return np.concatenate((audio, np.zeros(length - len(audio), audio.dtype)))

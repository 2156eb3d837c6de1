"""How long parts of a model take: in onnxruntime and torch, in fp32 and int8.

A model for whole utterances encodes one of 10 s, and one for streaming as many chunks
as are in 10 s, each with the states of the last.

Weights are random. That changes no time of an encoder. A search with random weights
would find tokens at a rate of its own, so it runs at a given one: the joiner at each
frame, the decoder after each token.
"""

import gc
import statistics
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from icefall_kd.export.files import (
    DECODER,
    ENCODER,
    JOINER,
    OPSETS,
    offline_part,
    write_offline,
)
from icefall_kd.export.graph import exportable
from icefall_kd.export.quantize import write_int8
from icefall_kd.export.sides import session
from icefall_kd.export.streaming import (
    BEYOND,
    ChunkEncoder,
    chunks_of,
    encode_chunks,
    write_streaming,
)
from icefall_kd.student.count import FRAMES_PER_SECOND
from icefall_kd.student.times import PARTS, SIDES
from icefall_kd.zipformer import encoder_frames

UTTERANCE = 10.0  # seconds, as multiply-adds are counted
TOKENS_A_FRAME = 0.2  # of 25 frames a second: five tokens a second
ROUNDS = 3
_SHORT = 50  # feature frames of the pass that comes before those that are timed
_PASSES, _ENOUGH = 5, 0.3  # of one round: at most so many, and no more after 0.3 s

Run = Callable[..., Any]
Samples = Dict[str, Dict[str, Dict[str, List[float]]]]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, without gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def measure(
    names: Sequence[str],
    make: Callable[[str], Tuple[nn.Module, Dict[str, Any]]],
    advance: Callable[[], Any],
    clock: Callable[[], float] = perf_counter,
    rounds: int = ROUNDS,
) -> Dict[str, Dict[str, Dict[str, float]]]:
    """Time models in turn, round by round, so that a disturbance meets all alike.

    Args:
      names: Of the models.
      make: Makes the model of a name, with transducer head, and gives its settings.
      advance: Called after each model of each round.
      clock: Seconds.
      rounds: How often each model is timed.

    Returns:
      By name, side and part: the median RTF over all passes.

    Raises:
      KDError: onnx or onnxruntime is missing, or a model that can't be exported.
    """
    samples: Samples = {
        name: {side: {part: [] for part in PARTS} for side in SIDES} for name in names
    }
    with tempfile.TemporaryDirectory() as folder, one_thread():
        for _ in range(rounds):
            for name in names:
                model, settings = make(name)
                model = exportable(model)  # the other one may go
                files = Path(folder) / name
                for side in SIDES:
                    parts = _open(side, model, settings, files)
                    _time(parts, settings, samples[name][side], clock)
                    del parts
                    gc.collect()
                del model
                advance()
    return {
        name: {
            side: {part: statistics.median(samples[name][side][part]) for part in PARTS}
            for side in SIDES
        }
        for name in names
    }


def _streams(settings: Dict[str, Any]) -> bool:
    return bool(settings.get("causal")) and chunks_of(settings)[0] > 0


def _open(
    side: str, model: nn.Module, settings: Dict[str, Any], folder: Path
) -> Dict[str, Run]:
    """What runs encoder, decoder and joiner on one side, ready for inputs."""
    engine, form = side.split()
    parts = (DECODER, JOINER) if _streams(settings) else (ENCODER, DECODER, JOINER)
    chunks = None
    if _streams(settings):
        chunks = ChunkEncoder(model, model.joiner.encoder_proj).eval()
    if engine == "torch":
        modules = {part: offline_part(model, part, False) for part in parts}
        if chunks is not None:
            modules[ENCODER] = chunks
        if form == "int8":
            modules = {part: _int8(module) for part, module in modules.items()}
        if chunks is None:
            return dict(modules)
        return {**modules, ENCODER: _of_chunks(chunks, modules[ENCODER])}
    if not folder.exists():  # in the first round
        _write(model, settings, folder)
    runs = {
        part: session(folder / f"{part}.{form}.onnx", True)
        for part in (ENCODER, DECODER, JOINER)
    }
    of_tensors = {part: _of_tensors(run) for part, run in runs.items()}
    if chunks is not None:
        of_tensors[ENCODER] = lambda x, lens: [
            chunks.encode(runs[ENCODER], x.numpy())[None]
        ]
    return of_tensors


def _write(model: nn.Module, settings: Dict[str, Any], folder: Path) -> None:
    """Write the files of a model, in fp32 and int8."""
    folder.mkdir()
    opset = OPSETS.start
    for part in (ENCODER, DECODER, JOINER):
        path = folder / f"{part}.fp32.onnx"
        if part == ENCODER and _streams(settings):
            write_streaming(model, settings, part, path, opset)
        else:
            write_offline(model, settings, part, path, takes_mean=False, opset=opset)
        write_int8(path, folder / f"{part}.int8.onnx")


def _of_chunks(chunks: ChunkEncoder, module: nn.Module) -> Run:
    """A function of an utterance, of torch's module of a chunk and its states."""

    def step(chunk: np.ndarray, *states: torch.Tensor) -> Tuple:
        out, states = module(torch.from_numpy(chunk), list(states))
        return (out.numpy(), *states)

    def encode(x: torch.Tensor, lens: torch.Tensor) -> List[np.ndarray]:
        sizes = chunks.num_frames, 2 * chunks.chunk_size
        rows = encode_chunks(step, chunks.initial_states(), x.numpy(), *sizes)
        return [rows[None]]

    return encode


def _int8(module: nn.Module) -> nn.Module:
    """A module whose layers nn.Linear have weights of 8 bits, torch's own way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch advises other packages
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


def _of_tensors(run: Run) -> Run:
    """A function of tensors, of one of numpy's arrays that gives all outputs."""
    return lambda *tensors: run(*(x.numpy() for x in tensors))


def _time(
    parts: Dict[str, Run],
    settings: Dict[str, Any],
    samples: Dict[str, List[float]],
    clock: Callable[[], float],
) -> None:
    """Add the RTFs of a few passes of each part to ``samples``."""
    whole = round(UTTERANCE * FRAMES_PER_SECOND)
    frame = torch.zeros(1, int(settings["joiner_dim"]))
    context = torch.zeros(1, int(settings["context_size"]), dtype=torch.int64)

    def encode(num_frames: int) -> None:
        features = torch.zeros(1, num_frames, int(settings["feature_dim"]))
        parts[ENCODER](features, torch.tensor([num_frames]))

    def search(num_frames: int) -> None:
        due = 0.0
        for _ in range(encoder_frames(num_frames)):
            parts[JOINER](frame, frame)
            due += TOKENS_A_FRAME
            if due >= 1:
                parts[DECODER](context)
                due -= 1

    # Feature frames of the first pass and of the others, and how long these last.
    of_search = of_encoder = _SHORT, whole, UTTERANCE
    if _streams(settings):
        shift = 2 * chunks_of(settings)[0]
        in_chunks = whole // shift * shift
        seconds = in_chunks / FRAMES_PER_SECOND
        of_encoder = BEYOND + shift, BEYOND + in_chunks, seconds
    for part, run, (short, num_frames, seconds) in (
        (PARTS[0], encode, of_encoder),
        (PARTS[1], search, of_search),
    ):
        run(short)
        start = clock()
        for _ in range(_PASSES):
            before = clock()
            run(num_frames)
            now = clock()
            samples[part].append((now - before) / seconds)
            if now - start >= _ENOUGH:
                break

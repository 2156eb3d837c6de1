"""How long parts of a model take: in onnxruntime and torch, in fp32 and int8.

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
      By name, side and part: the median RTF over all passes, utterances of 10 s.

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
                files = Path(folder) / name
                for side in SIDES:
                    parts = _open(side, model, settings, files)
                    _time(parts, settings, samples[name][side], clock)
                    del parts
                    gc.collect()
                advance()
    return {
        name: {
            side: {part: statistics.median(samples[name][side][part]) for part in PARTS}
            for side in SIDES
        }
        for name in names
    }


def _open(
    side: str, model: nn.Module, settings: Dict[str, Any], folder: Path
) -> Dict[str, Run]:
    """What runs encoder, decoder and joiner on one side, ready for inputs."""
    engine, form = side.split()
    parts = (ENCODER, DECODER, JOINER)
    if engine == "torch":
        exported = exportable(model)
        modules = {part: offline_part(exported, part, False) for part in parts}
        if form == "int8":
            modules = {part: _int8(module) for part, module in modules.items()}
        return dict(modules)
    if not folder.exists():  # in the first round
        folder.mkdir()
        exported = exportable(model)
        for part in parts:
            path = folder / f"{part}.fp32.onnx"
            options = {"takes_mean": False, "opset": OPSETS.start}
            write_offline(exported, settings, part, path, **options)
            write_int8(path, folder / f"{part}.int8.onnx")
    files = {part: folder / f"{part}.{form}.onnx" for part in parts}
    return {part: _of_tensors(session(path, True)) for part, path in files.items()}


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

    def encode(num_frames: int) -> None:
        features = torch.zeros(1, num_frames, int(settings["feature_dim"]))
        parts[ENCODER](features, torch.tensor([num_frames]))

    num_frames = round(UTTERANCE * FRAMES_PER_SECOND)
    frame = torch.zeros(1, int(settings["joiner_dim"]))
    context = torch.zeros(1, int(settings["context_size"]), dtype=torch.int64)

    def search(num_frames: int) -> None:
        due = 0.0
        for _ in range(encoder_frames(num_frames)):
            parts[JOINER](frame, frame)
            due += TOKENS_A_FRAME
            if due >= 1:
                parts[DECODER](context)
                due -= 1

    for part, run in ((PARTS[0], encode), (PARTS[1], search)):
        run(_SHORT)
        start = clock()
        for _ in range(_PASSES):
            before = clock()
            run(num_frames)
            now = clock()
            samples[part].append((now - before) / UTTERANCE)
            if now - start >= _ENOUGH:
                break

"""sherpa-onnx on exported files, in a process of its own, which it ends in errors.

The module runs there, and loads numpy and sherpa_onnx alone.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np

from icefall_kd.errors import KDError


def recognize(
    files: Mapping[str, Path],
    tokens: Path,
    features: Mapping[str, Any],
    audio: Sequence[np.ndarray],
    scratch: Path,
    batch: int = 1,
    streams: bool = False,
) -> Dict[str, Any]:
    """What sherpa-onnx finds in utterances, by greedy search with one thread.

    Args:
      files: Of ONNX, by part: encoder, decoder and joiner, or model for a CTC head.
      tokens: tokens.txt.
      features: As metadata.json has them.
      audio: Samples of each utterance, (T,) in [-1, 1].
      scratch: A folder for temporary files.
      batch: Utterances that are decoded at once.
      streams: Whether the files are for streaming.

    Returns:
      "tokens" of each utterance, as texts, and "seconds" for all of them.

    Raises:
      KDError: sherpa-onnx is missing or fails.
    """
    path = scratch / "audio.npz"
    np.savez(path, *audio)
    work = {
        "files": {part: str(file) for part, file in files.items()},
        "tokens": str(tokens),
        "sampling_rate": features["sampling_rate"],
        "num_mel_bins": features["num_mel_bins"],
        "audio": str(path),
        "batch": batch,
        "streams": streams,
        "out": str(scratch / "found.json"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "icefall_kd.export.sherpa"],
        input=json.dumps(work),
        capture_output=True,
        encoding="utf8",
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise KDError(
            f"sherpa-onnx can't run {', '.join(p.name for p in files.values())} "
            f"({lines[-1][-200:] if lines else f'status {done.returncode}'}): see "
            "whether it is installed (`pip install sherpa-onnx`), and export again"
        )
    return json.loads((scratch / "found.json").read_text("utf8"))


def _recognizer(work: Dict[str, Any]) -> Any:
    import sherpa_onnx

    files = work["files"]
    shared = {
        "tokens": work["tokens"],
        "num_threads": 1,
        "sample_rate": work["sampling_rate"],
        "feature_dim": work["num_mel_bins"],
        "decoding_method": "greedy_search",
    }
    if work["streams"]:
        kind = sherpa_onnx.OnlineRecognizer
        if "model" in files:
            return kind.from_zipformer2_ctc(model=files["model"], **shared)
        parts = {part: files[part] for part in ("encoder", "decoder", "joiner")}
        return kind.from_transducer(**parts, **shared)
    if "model" in files:
        make = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc
        return make(model=files["model"], **shared)
    return sherpa_onnx.OfflineRecognizer.from_transducer(
        **{part: files[part] for part in ("encoder", "decoder", "joiner")}, **shared
    )


def _stream(recognizer: Any, samples: np.ndarray, sampling_rate: int) -> List[str]:
    """The tokens of an utterance that comes in pieces of a tenth of a second."""
    stream = recognizer.create_stream()
    for begin in range(0, len(samples), sampling_rate // 10):
        piece = samples[begin : begin + sampling_rate // 10]
        stream.accept_waveform(sampling_rate, piece)
        while recognizer.is_ready(stream):
            recognizer.decode_stream(stream)
    stream.input_finished()
    while recognizer.is_ready(stream):
        recognizer.decode_stream(stream)
    return list(recognizer.tokens(stream))


def _main() -> None:
    work = json.loads(sys.stdin.read())
    recognizer = _recognizer(work)
    with np.load(work["audio"]) as arrays:
        audio = [arrays[name] for name in arrays.files]
    found: List[List[str]] = []
    begin = time.perf_counter()
    for samples in audio if work["streams"] else ():
        found.append(_stream(recognizer, samples, work["sampling_rate"]))
    for i in () if work["streams"] else range(0, len(audio), work["batch"]):
        streams = []
        for samples in audio[i : i + work["batch"]]:
            streams.append(recognizer.create_stream())
            streams[-1].accept_waveform(work["sampling_rate"], samples)
        recognizer.decode_streams(streams)
        found += [list(stream.result.tokens) for stream in streams]
    answer = {"tokens": found, "seconds": time.perf_counter() - begin}
    Path(work["out"]).write_text(json.dumps(answer), "utf8")


if __name__ == "__main__":
    _main()

#!/usr/bin/env python3
"""
Join utterances to recordings with pauses, as long ones are.

A pause has noise with the spectrum of the utterance's quietest frames. All utterances
are used equally often, give or take one. So the error rate of the recordings can be
compared with that of the utterances one by one.

Usage, to train a model that has heard pauses, and to test it on long recordings:

  ./local/join_cuts.py --manifest data/manifests/cuts_train.jsonl.gz \\
    --output-dir data/long/manifests --audio-dir data/long/audio --seconds "2 16" \\
    --num-recordings 700
  ./local/join_cuts.py --manifest data/manifests/cuts_dev.jsonl.gz --name long \\
    --output-dir data/long/manifests --audio-dir data/long/audio --seconds "60 600"

It writes cuts_{name}.jsonl.gz in --output-dir and the audio in --audio-dir/{name}.
"""

import argparse
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
from audio_utils import read_wav, write_wav
from corpus_utils import Utterance, check_replaceable, make_cut, manifest_path
from script_utils import (
    check_range,
    read_manifest,
    replace_dir,
    run_script,
    staged_dir,
    write_manifest,
)
from tqdm.auto import tqdm

from icefall_kd.errors import require

WINDOW = 0.032  # seconds, of a spectrum
QUIET = 0.1  # share of frames that are an utterance's quietest

Cut = Dict[str, Any]  # a cut as it stands in a manifest


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--manifest", type=Path, required=True, help="Cuts of whole wav files.")
    add("--name", default="", help="Of the set. Default: that of the manifest.")
    add("--output-dir", type=Path, required=True, help="Where the manifest goes.")
    add("--audio-dir", type=Path, required=True, help="Where the audio goes.")
    add("--num-recordings", type=int, default=100, help="How many are made.")
    add("--seconds", default="60 600", help="The shortest and the longest recording.")
    add(
        "--skew",
        type=float,
        default=1.0,
        help="Of the lengths, which rise evenly with 1; with more, fewer are long.",
    )
    add("--pauses", default="0.3 2", help="Seconds, the shortest and the longest.")
    add("--seed", type=int, default=0, help="Seed of all randomness")
    return parser.parse_args()


def two_numbers(text: str, option: str) -> Tuple[float, float]:
    """Return the least and the most, the value ``text`` of ``option``."""
    try:
        least, most = map(float, text.split())
    except ValueError:
        least, most = 1.0, 0.0
    require(
        0 <= least <= most < 10**5,
        f"{option} is {text!r}, and must be two numbers, the least and the most, such "
        "as '1 10'",
    )
    return least, most


def pause_after(
    samples: np.ndarray, seconds: float, rng: np.random.Generator, rate: int
) -> np.ndarray:
    """Return ``seconds`` of noise as it is in the quietest frames of ``samples``."""
    size = int(WINDOW * rate) // 2 * 2
    if len(samples) < size:
        return np.zeros(round(seconds * rate))
    window = np.hanning(size + 1)[:size]  # two of them, half overlapping, add up to 1
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[:: size // 2]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    quiet = np.argsort(power.sum(axis=1))[: max(1, round(QUIET * len(power)))]
    amplitude = np.sqrt(power[quiet].mean(axis=0) / (window**2).sum())
    # White noise of that spectrum, put together of pieces that overlap by half; their
    # powers add up to 3/4 of a piece's.
    count = round(seconds * rate) // (size // 2) + 2
    white = np.fft.rfft(rng.standard_normal((count, size)))
    pieces = np.fft.irfft(white * amplitude, size) * window / np.sqrt(0.75)
    noise = np.zeros((count + 1) * (size // 2))
    for i, piece in enumerate(pieces):
        noise[i * (size // 2) :][:size] += piece
    return noise[size // 2 :][: round(seconds * rate)]


def dealt(cuts: List[Cut], rng: np.random.Generator) -> Iterator[Cut]:
    """Yield the ``cuts`` for ever, shuffled anew when all have been had."""
    while True:
        for i in rng.permutation(len(cuts)):
            yield cuts[i]


def join(
    deck: Iterator[Cut],
    seconds: float,
    pauses: Tuple[float, float],
    rng: np.random.Generator,
    rate: int,
) -> Utterance:
    """Return utterances of a ``deck`` with pauses, at least ``seconds`` of them."""
    parts: List[np.ndarray] = []
    texts, names, count = [], [], 0
    while count < seconds * rate:
        cut = next(deck)
        samples = read_wav(Path(cut["recording"]["sources"][0]["source"]), rate)
        pause = pause_after(samples, rng.uniform(*pauses), rng, rate)
        parts += [samples, pause]
        count += len(samples) + len(pause)
        texts.append(cut["supervisions"][0]["text"])
        names.append(cut["id"])
    return Utterance(np.concatenate(parts), "many", " ".join(texts), {"cuts": names})


def main() -> None:
    args = get_args()
    check_range(args.num_recordings, 1, "--num-recordings")
    check_range(args.seed, 0, "--seed", 2**32 - 1)
    shortest, longest = two_numbers(args.seconds, "--seconds")
    pauses = two_numbers(args.pauses, "--pauses")
    require(args.skew > 0, f"--skew is {args.skew:g}, give more than 0")
    cuts = read_manifest(args.manifest)
    for cut in cuts:
        supervisions = cut.get("supervisions", [])
        require(
            "recording" in cut and len(supervisions) == 1 and supervisions[0]["text"],
            f"the cut {cut['id']} in {args.manifest} has no recording or no text, name "
            "a manifest of transcribed audio",
        )
    name = args.name or args.manifest.name.split(".")[0].replace("cuts_", "", 1)
    output = manifest_path(args.output_dir, name)
    check_replaceable(args.audio_dir / name, output)
    rate = cuts[0]["recording"]["sampling_rate"]
    rng = np.random.default_rng(args.seed)
    deck, joined = dealt(cuts, rng), []
    with staged_dir(args.audio_dir) as audio, staged_dir(args.output_dir) as scratch:
        (audio / name).mkdir()
        for i in tqdm(range(args.num_recordings), f"joined {name}"):
            share = (i / max(args.num_recordings - 1, 1)) ** args.skew
            seconds = shortest + share * (longest - shortest)
            utterance = join(deck, seconds, pauses, rng, rate)
            cut_id = f"joined-{name}-{i:06d}"
            write_wav(audio / name / f"{cut_id}.wav", utterance.samples, rate)
            path = args.audio_dir / name / f"{cut_id}.wav"
            joined.append(make_cut(cut_id, utterance, path, rate))
        write_manifest(scratch / output.name, joined)
        if output.exists():
            output.unlink()
        replace_dir(audio / name, args.audio_dir / name)
        (scratch / output.name).rename(output)
    minutes = sum(cut["duration"] for cut in joined) / 60
    print(f"{output}: {len(joined)} recordings, {minutes:.0f} minutes")


if __name__ == "__main__":
    run_script(main)

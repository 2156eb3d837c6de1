#!/usr/bin/env python3
"""
Recordings of minutes, decoded in windows: their WER beside that of the utterances they
are made of, what the encoder costs, and the peak of memory by length.

A recording is a row of utterances, drawn from the cuts, with pauses of noise as faint
as the utterances' quietest frames. With --whole-minutes, recordings up to that length
are also encoded as a whole: what is then lost too is not the windows' fault.

Usage, on a work folder of the commands recipe:

  benchmarks/long_audio.py --work-dir egs/commands/ASR --epoch 21 --avg 3 \\
    --windows "8:0.8 16:1.6" --json long.json
"""

import argparse
import itertools
import json
import math
import random
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import kaldialign
import numpy as np
import torch
from lhotse import CutSet, Fbank, FbankConfig
from tqdm.auto import tqdm

from icefall_kd import (
    GreedySearch,
    ModelTap,
    WindowedEncoder,
    load_model,
    load_tokenizer,
    search_pieces,
)
from icefall_kd.decode.frames import FEATURE_FRAMES, Frames
from icefall_kd.decode.recording import feature_chunks
from icefall_kd.decode.windows import OVERLAP, WINDOW, mean_off

ROOT = Path(__file__).resolve().parents[1]
# Of --mean: whose mean is taken off before. The bounds of utterances are then known.
CONTROLS = ("utterance", "recording")


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--work-dir", type=Path, default=ROOT / "egs/commands/ASR")
    add("--recipe", type=Path, default=ROOT / "egs/digits/ASR/zipformer")
    add("--exp-dir", type=Path, help="[work-dir/exp/teacher].")
    add("--cuts", type=Path, help="[work-dir/data/fbank/cuts_dev.jsonl.gz].")
    add("--bpe-model", type=Path, help="[work-dir/data/lang_bpe_120/bpe.model].")
    add("--epoch", type=int, default=30)
    add("--avg", type=int, default=1)
    add("--recordings", type=int, default=100)
    add("--minutes", default="1 10", help="The shortest and the longest recording.")
    add("--pauses", default="0.3 2", help="Seconds, the shortest and the longest.")
    add("--same-speaker", type=int, default=0, help="1: a recording has one speaker.")
    add("--windows", default=f"{WINDOW:g}:{OVERLAP:g}", help="window:overlap, seconds.")
    add("--mean", default="4", help=f"Of so many seconds, or {' or '.join(CONTROLS)}.")
    add("--batch-size", type=int, default=1, help="Windows that are encoded at once.")
    add("--whole-minutes", type=float, default=0.0)
    add("--memory-minutes", default="1 10", help='Lengths to measure; "" for none.')
    add("--num-threads", type=int, default=1)
    add("--seed", type=int, default=1)
    add("--json", type=Path, help="Write the figures to this file.")
    add("--peak-of", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = args.work_dir / "data"
    args.exp_dir = args.exp_dir or args.work_dir / "exp/teacher"
    args.cuts = args.cuts or data / "fbank/cuts_dev.jsonl.gz"
    args.bpe_model = args.bpe_model or data / "lang_bpe_120/bpe.model"
    return args


class Recording(NamedTuple):
    """Utterances in a row, each with the seconds of the pause behind it."""

    cuts: List[Any]
    pauses: List[float]

    @property
    def seconds(self) -> float:
        return sum(cut.duration for cut in self.cuts) + sum(self.pauses)

    def parts(self) -> Iterator[List[np.ndarray]]:
        """Yield the samples of each utterance and of the pause behind it."""
        for cut, pause in zip(self.cuts, self.pauses):
            samples = cut.load_audio()[0]
            hop = samples[: len(samples) // 160 * 160].reshape(-1, 160)
            level = np.quantile(hop.std(axis=1), 0.1)
            rng = np.random.default_rng(len(samples))
            noise = rng.normal(scale=level, size=round(pause * cut.sampling_rate))
            yield [samples, noise.astype(np.float32)]


def make_recording(cuts: List[Any], seconds: float, pauses, rng) -> Recording:
    """Draw utterances until they and their pauses last ``seconds``."""
    recording = Recording([], [])
    while recording.seconds < seconds:
        recording.cuts.append(rng.choice(cuts))
        recording.pauses.append(rng.uniform(*pauses))
    return recording


class Cost:
    """Seconds and stack frames of a model's front end and encoder."""

    def __init__(self) -> None:
        self.seconds, self.frames, self._begin = 0.0, 0, 0.0

    @contextmanager
    def of(self, model: torch.nn.Module) -> Iterator["Cost"]:
        """Count what the model encodes meanwhile."""

        def begin(module, args):
            self._begin = time.perf_counter()

        def end(module, args, output):
            self.seconds += time.perf_counter() - self._begin
            self.frames += args[0].size(0) * args[0].size(1)

        handles = (
            model.encoder_embed.register_forward_pre_hook(begin),
            model.encoder.register_forward_hook(end),
        )
        yield self
        for handle in handles:
            handle.remove()


class Bench:
    """A model with its features, tokens and search."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.mean = 0.0 if args.mean in CONTROLS else float(args.mean)
        self.model, settings = load_model(
            args.recipe, args.exp_dir, args.epoch, 0, args.avg, True
        )
        self.frames = Frames(self.model)
        self.tokenizer = load_tokenizer(args.bpe_model)
        self.cuts = list(CutSet.from_file(args.cuts))
        self.rate = self.cuts[0].sampling_rate
        config = dict(dither=0.0, snip_edges=False, sampling_rate=self.rate)
        bins = settings["feature_dim"]
        self.extractor = Fbank(FbankConfig(num_mel_bins=bins, **config))
        self.search = GreedySearch(self.model)

    def features(self, audio: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
        return feature_chunks(audio, self.extractor, self.rate)

    def words(self, pieces) -> List[str]:
        """Return the words that are found in encoder output."""
        *_, result = search_pieces(self.search, pieces)
        return self.tokenizer.decode(result.hypotheses[0].tokens).split()

    def features_of(self, recording: Recording) -> Iterator[torch.Tensor]:
        """Yield the features of a recording, chunk by chunk."""
        if self.args.mean == "utterance":
            for cut, audio in zip(recording.cuts, recording.parts()):
                part = torch.cat(list(self.features(iter(audio))))
                yield part - part[: cut.num_frames].mean(dim=0)
        elif self.args.mean == "recording":
            parts = list(self.features(itertools.chain(*recording.parts())))
            yield mean_off(torch.cat(parts), math.inf)
        else:
            yield from self.features(itertools.chain(*recording.parts()))

    def encoded(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the encoder output of features (T, F) that are encoded as a whole."""
        with ModelTap(self.model, with_ctc=False) as tap:
            lens = torch.tensor([len(x)])
            return [tap.encode(x.unsqueeze(0), lens).encoder_out]

    def utterance(self, cut: Any) -> List[str]:
        """Return the words of an utterance."""
        x = torch.cat(list(self.features(iter([cut.load_audio()]))))
        return self.words(self.encoded(mean_off(x, math.inf)))

    def whole(self, recording: Recording) -> List[str]:
        """Return the words of a recording that is encoded as a whole."""
        x = torch.cat(list(self.features_of(recording)))
        return self.words(self.encoded(mean_off(x, self.mean)))

    def windowed(self, window: float, overlap: float, recording: Recording):
        """Return the words of a recording that is encoded in windows."""
        encoder = WindowedEncoder(
            self.model, window, overlap, self.args.batch_size,
            mean=self.mean,
        )  # fmt: skip
        return self.words(encoder(self.features_of(recording)))


def errors(reference: List[str], words: List[str]) -> np.ndarray:
    """Return insertions, deletions, substitutions and words of the reference."""
    counts = kaldialign.edit_distance(reference, words)
    return np.array([counts["ins"], counts["del"], counts["sub"], len(reference)])


def reference(recording: Recording) -> List[str]:
    return [w for cut in recording.cuts for w in cut.supervisions[0].text.split()]


def row(name: str, counts: np.ndarray, cost: Cost, seconds: float, frames: float):
    """Return the figures of one way of decoding."""
    ins, dels, subs, words = (int(n) for n in counts)
    return {
        "name": name,
        "WER": 100 * (ins + dels + subs) / words,
        "ins": ins, "del": dels, "sub": subs, "words": words,
        "frames": cost.frames / frames,
        "encoder_seconds": cost.seconds / seconds,
    }  # fmt: skip


def decode(bench: Bench, recordings: List[Recording]) -> Iterator[Dict[str, Any]]:
    """Yield the figures of utterances one by one, of windows, and of whole encoding."""
    args, cost, seconds = bench.args, Cost(), 0.0
    known: Dict[str, np.ndarray] = {}
    used = {cut.id: cut for recording in recordings for cut in recording.cuts}
    with cost.of(bench.model):
        for cut in tqdm(used.values(), "one by one", unit=" utterances"):
            words = bench.utterance(cut)
            known[cut.id] = errors(cut.supervisions[0].text.split(), words)
            seconds += cut.duration

    def one_by_one(name, recordings):
        counts = sum(known[cut.id] for r in recordings for cut in r.cuts)
        return row(name, counts, cost, seconds, cost.frames)

    def at_once(name, recordings, work):
        cost, counts = Cost(), np.zeros(4, int)
        with cost.of(bench.model):
            for recording in tqdm(recordings, name, unit=" recordings"):
                counts += errors(reference(recording), work(recording))
        seconds = sum(recording.seconds for recording in recordings)
        frames = seconds * FEATURE_FRAMES / bench.frames.front_stride
        return row(name, counts, cost, seconds, frames)

    ways = {
        f"{window:g} s + 2 x {overlap:g} s": partial(bench.windowed, window, overlap)
        for window, overlap in windows_of(args)
    }
    yield one_by_one("one by one", recordings)
    for name, work in ways.items():
        yield at_once(name, recordings, work)
    short = [r for r in recordings if r.seconds <= 60 * args.whole_minutes]
    if not short:
        return
    yield one_by_one(f"{len(short)} short ones: one by one", short)
    for name, work in ways.items():
        yield at_once(f"these, {name}", short, work)
    yield at_once("these, as a whole", short, bench.whole)


def windows_of(args: argparse.Namespace) -> List[Tuple[float, float]]:
    return [tuple(map(float, x.split(":"))) for x in args.windows.split()]


def peak_mb() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_peak(bench: Bench, minutes: float) -> Dict[str, float]:
    """Decode one recording; return the process's peak and that before."""
    pauses = tuple(map(float, bench.args.pauses.split()))
    rng = random.Random(bench.args.seed)
    recording = make_recording(bench.cuts, 60 * minutes, pauses, rng)
    before, begin = peak_mb(), time.perf_counter()
    bench.windowed(*windows_of(bench.args)[0], recording)
    seconds = time.perf_counter() - begin
    return {"minutes": minutes, "MB": peak_mb(), "before": before, "seconds": seconds}


def main() -> None:
    args = get_args()
    torch.set_num_threads(args.num_threads)
    bench = Bench(args)
    if args.peak_of is not None:
        print(json.dumps(measure_peak(bench, args.peak_of)))
        return
    rng = random.Random(args.seed)
    shortest, longest = (60 * float(x) for x in args.minutes.split())
    step = (longest - shortest) / max(args.recordings - 1, 1)
    pauses = tuple(map(float, args.pauses.split()))
    recordings = []
    for i in range(args.recordings):
        cuts = bench.cuts
        if args.same_speaker:
            speaker = rng.choice(cuts).supervisions[0].speaker
            cuts = [cut for cut in cuts if cut.supervisions[0].speaker == speaker]
        recordings.append(make_recording(cuts, shortest + i * step, pauses, rng))
    print("| decoded | WER % | ins, del, sub | frames encoded | encoder, s per s |")
    print("|---|---|---|---|---|")
    rows = []
    for r in decode(bench, recordings) if recordings else ():
        rows.append(r)
        print(
            f"| {r['name']} | {r['WER']:.2f} | {r['ins']}, {r['del']}, {r['sub']} of "
            f"{r['words']} | {r['frames']:.3f} | {r['encoder_seconds']:.4f} |",
            flush=True,
        )
    peaks = []
    for minutes in args.memory_minutes.split():
        command = [sys.executable, *sys.argv, "--peak-of", minutes]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, encoding="utf-8", check=True
        )
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            "{minutes:g} min: peak {MB:.0f} MB ({before:.0f} MB before), "
            "{seconds:.1f} s".format(**peaks[-1])
        )
    if args.json:
        figures = {"seed": args.seed, "recordings": rows, "memory": peaks}
        args.json.write_text(json.dumps(figures, indent=2), "utf8")


if __name__ == "__main__":
    main()

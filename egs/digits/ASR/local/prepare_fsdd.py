#!/usr/bin/env python3
"""
Make connected digits from the recordings of single digits of the Free Spoken
Digit Dataset (https://github.com/Jakobovski/free-spoken-digit-dataset).

An utterance is 2 to 6 digits of one speaker with pauses, in coloured noise. The
test speaker is in test alone. Of the other speakers, dev has the recordings with
indexes 0 to 4 and train those with indexes from 5 on, played at 0.9 to 1.1 times
their speed, pitch and all, so that few speakers stand for more.

Usage:
  ./local/prepare_fsdd.py --corpus-dir download/free-spoken-digit-dataset

It writes, in --output-dir,
  cuts_{train,dev,test}.jsonl.gz
and with --untranscribed-speakers also
  cuts_train-untranscribed.jsonl.gz
whose cuts have no transcript.
"""

import argparse
import re
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
from audio_utils import level, read_wav
from corpus_utils import (
    Take,
    add_corpus_args,
    check_corpus_args,
    check_untranscribed,
    digits_to_text,
    draw_digits,
    makers_of_words,
    write_corpus,
)
from script_utils import run_script
from tqdm.auto import tqdm

from icefall_kd import KDError

NUM_DEV_INDEXES = 5  # recordings 0 to 4 of a training speaker are for dev
NAME = re.compile(r"([0-9])_([A-Za-z0-9-]+)_([0-9]+)\.wav")

# Key: (digit, index). Value: samples.
Speaker = Dict[Tuple[int, int], np.ndarray]


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--corpus-dir",
        type=Path,
        required=True,
        help="The folder with {digit}_{speaker}_{index}.wav, or its parent with "
        "recordings/",
    )
    parser.add_argument(
        "--test-speaker", type=str, default="theo", help="The speaker of test"
    )
    parser.add_argument(
        "--untranscribed-speakers",
        type=str,
        default="",
        help="Comma-separated speakers who are neither in train nor in dev; their "
        "utterances go to train-untranscribed, without text",
    )
    add_corpus_args(parser)
    return parser.parse_args()


def find_recordings(corpus_dir: Path) -> Dict[str, Dict[Tuple[int, int], Path]]:
    """Return the paths of ``corpus_dir``'s wav files by speaker and (digit, index)."""
    if not corpus_dir.is_dir():
        raise KDError(
            f"--corpus-dir {corpus_dir} is not a folder, give the one that holds "
            "{digit}_{speaker}_{index}.wav"
        )
    if (corpus_dir / "recordings").is_dir():
        corpus_dir = corpus_dir / "recordings"
    recordings: Dict[str, Dict[Tuple[int, int], Path]] = {}
    for path in sorted(corpus_dir.glob("*.wav")):
        match = NAME.fullmatch(path.name)
        if match is None:
            raise KDError(
                f"{path} is not named {{digit}}_{{speaker}}_{{index}}.wav, such as "
                "7_theo_12.wav, rename or remove it"
            )
        digit, speaker, index = match.groups()
        recordings.setdefault(speaker, {})[int(digit), int(index)] = path
    if not recordings:
        raise KDError(
            f"--corpus-dir {corpus_dir} holds 0 wav files, give the folder that holds "
            "{digit}_{speaker}_{index}.wav"
        )
    return recordings


def choose_speakers(
    speakers: List[str], test_speaker: str, untranscribed: str
) -> Tuple[List[str], List[str]]:
    """Returns the speakers of train and those of train-untranscribed."""
    names = [name.strip() for name in untranscribed.split(",") if name.strip()]
    names = list(dict.fromkeys(names))
    for option, name in [("--test-speaker", test_speaker)] + [
        ("--untranscribed-speakers", name) for name in names
    ]:
        if name not in speakers:
            raise KDError(
                f"{option} {name!r} is not in the corpus, which has "
                f"{', '.join(speakers)}: name one of these"
            )
    if test_speaker in names:
        raise KDError(
            f"{test_speaker!r} is both --test-speaker and one of "
            f"--untranscribed-speakers {untranscribed!r}, name different speakers"
        )
    train = [s for s in speakers if s != test_speaker and s not in names]
    if not train:
        raise KDError(
            f"of {len(speakers)} speakers none is left for train beside "
            f"--test-speaker {test_speaker!r} and --untranscribed-speakers "
            f"{untranscribed!r}, name fewer"
        )
    return train, names


def load_speaker(paths: Dict[Tuple[int, int], Path]) -> Speaker:
    """Return the samples of each of ``paths``."""
    speaker = {}
    for key, path in paths.items():
        speaker[key] = read_wav(path)
        if level(speaker[key]) == 0:
            raise KDError(f"{path} is nothing but silence, replace or remove it")
    return speaker


def choose_recordings(name: str, speaker: Speaker, split: str) -> List[List[Take]]:
    """Returns, for each of the ten digits, the recordings that the split may use."""
    chosen: List[List[Take]] = [[] for _ in range(10)]
    for (digit, index), samples in speaker.items():
        if split == "test" or (split == "dev") == (index < NUM_DEV_INDEXES):
            chosen[digit].append((f"{digit}_{name}_{index}", samples))
    for digit, recordings in enumerate(chosen):
        if not recordings:
            raise KDError(
                f"speaker {name!r} has 0 recordings of digit {digit} for {split}, "
                f"which needs at least 1 (dev: indexes below {NUM_DEV_INDEXES}, train: "
                "the others), complete the corpus"
            )
    return chosen


def main() -> None:
    args = get_args()
    check_corpus_args(args)
    check_untranscribed(args)
    recordings = find_recordings(args.corpus_dir)
    train, untranscribed = choose_speakers(
        sorted(recordings), args.test_speaker, args.untranscribed_speakers
    )
    loaded = {
        name: load_speaker(recordings[name])
        for name in tqdm(
            train + untranscribed + [args.test_speaker],
            desc="read speakers",
            leave=False,
        )
    }

    speakers = {
        "train": train,
        "train-untranscribed": untranscribed,
        "dev": train,
        "test": [args.test_speaker],
    }
    pools = {
        (split, name): choose_recordings(name, loaded[name], split)
        for split, names in speakers.items()
        for name in names
    }

    def draw(rng: np.random.Generator, split: str, name: str) -> Tuple[List[Take], str]:
        digits = draw_digits(rng)
        chosen = [pools[split, name][digit] for digit in digits]
        takes = [recordings[rng.integers(len(recordings))] for recordings in chosen]
        return takes, digits_to_text(digits)

    makers = makers_of_words(args, speakers, draw)
    write_corpus("fsdd", makers, args.output_dir, args.audio_dir)


if __name__ == "__main__":
    run_script(main)

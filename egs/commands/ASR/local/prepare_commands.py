#!/usr/bin/env python3
"""
Make connected words from the recordings of single words of the Arabic Speech Commands
(https://github.com/abdulkaderghandoura/arabic-speech-commands-dataset).

An utterance is 2 to 5 words of one speaker with pauses, in coloured noise. The corpus's
own lists say which speakers are in train (18), dev (6) and test (6). The recordings of
train are played at 0.9 to 1.1 times their speed, pitch and all, so that few speakers
stand for more.

Usage:
  ./local/prepare_commands.py --corpus-dir download/arabic-speech-commands-dataset

It writes, in --output-dir,
  cuts_{train,dev,test}.jsonl.gz
and with --untranscribed-speakers also
  cuts_train-untranscribed.jsonl.gz
whose cuts have no transcript.
"""

import argparse
import csv
import re
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
from audio_utils import level, read_wav, trim
from corpus_utils import (
    Take,
    add_corpus_args,
    check_corpus_args,
    check_untranscribed,
    makers_of_words,
    write_corpus,
)
from script_utils import run_script
from tqdm.auto import tqdm

from icefall_kd import KDError

SAMPLING_RATE = 16000
NUM_WORDS = (2, 5)  # fewest and most words in an utterance
LISTS = {"train": "train.csv", "dev": "val.csv", "test": "test.csv"}
NAME = re.compile(r"([0-9]{8})_NO_[0-9]+\.wav")

# By speaker and word: the recordings, each with its name and its samples in 16 bits,
# as 12,000 of them would take 2 GB in 64.
Recordings = Dict[str, Dict[str, List[Take]]]


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--corpus-dir",
        type=Path,
        required=True,
        help="Your clone of the corpus, with dataset/, train.csv, val.csv and test.csv",
    )
    parser.add_argument(
        "--untranscribed-speakers",
        type=str,
        default="",
        help="Comma-separated speakers of train who are not in train; their utterances "
        "go to train-untranscribed, without text",
    )
    add_corpus_args(parser, num_train=2000, num_dev=500, num_test=800)
    return parser.parse_args()


def read_words() -> Dict[str, str]:
    """Return the Arabic spelling of each word by the name of its folder."""
    text = (Path(__file__).resolve().parent / "words.txt").read_text("utf8")
    return dict(line.rsplit(" ", 1) for line in text.splitlines())


def read_list(corpus_dir: Path, name: str, words: Dict[str, str]) -> Dict[str, List]:
    """Return the word and path of each recording in a list, by speaker.

    Args:
      corpus_dir: The corpus.
      name: The list's file, such as train.csv.
      words: The known words.

    Raises:
      KDError: a list that is missing, can't be read, or names something else.
    """
    path = corpus_dir / name
    if not path.is_file():
        raise KDError(
            f"--corpus-dir {corpus_dir} has no {name}, give the clone of the corpus, "
            "which has dataset/, train.csv, val.csv and test.csv"
        )
    try:
        with open(path, encoding="utf8", newline="") as f:
            rows = list(csv.DictReader(f))
    except (ValueError, csv.Error) as e:
        raise KDError(f"{path} can't be read ({e}), copy the list again") from None
    speakers: Dict[str, List] = {}
    for number, row in enumerate(rows, start=2):
        file, word = row.get("file") or "", row.get("class") or ""
        match = NAME.fullmatch(Path(file).name)
        if match is None or word not in words or Path(file).parent.name != word:
            raise KDError(
                f"line {number} of {path} has the file {file!r} and the class "
                f"{word!r}, and must have those of a known word, such as "
                "'dataset/up/00000001_NO_01.wav' and 'up', copy the list again"
            )
        speakers.setdefault(match.group(1), []).append((word, corpus_dir / file))
    if not speakers:
        raise KDError(f"{path} names 0 recordings, copy the list again")
    return speakers


def load_speaker(recordings: Sequence[Tuple[str, Path]]) -> Dict[str, List]:
    """Return the trimmed samples of a speaker's ``recordings``, by word.

    Raises:
      KDError: a recording that is missing, damaged, too short, or silent.
    """
    loaded: Dict[str, List] = {}
    for word, path in recordings:
        if not path.is_file():
            raise KDError(f"the recording {path} is listed but missing, copy it again")
        samples = read_wav(path, SAMPLING_RATE)
        if len(samples) < SAMPLING_RATE // 10:
            raise KDError(
                f"{path} has {len(samples)} samples and must have "
                f"{SAMPLING_RATE // 10} or more (0.1 s), copy it again"
            )
        if level(samples, SAMPLING_RATE) == 0:
            raise KDError(f"{path} is nothing but silence, copy it again")
        name = f"{path.parent.name}/{path.stem}"
        speech = np.round(trim(samples, SAMPLING_RATE) * 32768).astype(np.int16)
        loaded.setdefault(word, []).append((name, speech))
    return loaded


def choose_speakers(
    lists: Dict[str, Dict[str, List]], untranscribed: str
) -> Dict[str, List[str]]:
    """Return the speakers of each split, train-untranscribed among them.

    Args:
      lists: Recordings by split and speaker.
      untranscribed: Names of speakers, separated by commas.

    Raises:
      KDError: a speaker in two lists, one that train does not have, or none left.
    """
    speakers = {split: sorted(names) for split, names in lists.items()}
    seen: Dict[str, str] = {}
    for split, names in speakers.items():
        for name in names:
            if name in seen:
                raise KDError(
                    f"the speaker {name} is in both {LISTS[seen[name]]} and "
                    f"{LISTS[split]}, copy the lists again"
                )
            seen[name] = split
    without = [name.strip() for name in untranscribed.split(",") if name.strip()]
    without = list(dict.fromkeys(without))
    for name in without:
        if name not in speakers["train"]:
            raise KDError(
                f"--untranscribed-speakers {name!r} is not in train.csv, which has "
                f"{', '.join(speakers['train'])}: name some of these"
            )
    speakers["train"] = [s for s in speakers["train"] if s not in without]
    if not speakers["train"]:
        raise KDError(
            "--untranscribed-speakers names all speakers of train.csv and none is left "
            "for train, name fewer"
        )
    if without:
        speakers["train-untranscribed"] = without
    return speakers


def main() -> None:
    args = get_args()
    check_corpus_args(args)
    check_untranscribed(args)
    words = read_words()
    lists = {s: read_list(args.corpus_dir, name, words) for s, name in LISTS.items()}
    speakers = choose_speakers(lists, args.untranscribed_speakers)
    recordings: Recordings = {}
    for split, names in lists.items():
        for name in tqdm(sorted(names), f"read the speakers of {split}", leave=False):
            recordings[name] = load_speaker(names[name])

    def draw(rng: np.random.Generator, split: str, name: str) -> Tuple[List[Take], str]:
        vocabulary = sorted(recordings[name])
        drawn = rng.integers(
            len(vocabulary), size=rng.integers(NUM_WORDS[0], NUM_WORDS[1] + 1)
        )
        spoken = [vocabulary[n] for n in drawn]
        pools = [recordings[name][word] for word in spoken]
        takes = [pool[rng.integers(len(pool))] for pool in pools]
        takes = [(take, x.astype(np.float64) / 32768) for take, x in takes]
        return takes, " ".join(words[word] for word in spoken)

    makers = makers_of_words(args, speakers, draw, SAMPLING_RATE)
    write_corpus(
        "commands", makers, args.output_dir, args.audio_dir, SAMPLING_RATE, "Arabic"
    )


if __name__ == "__main__":
    run_script(main)

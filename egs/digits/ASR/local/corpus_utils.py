"""Write a corpus of words in a row: wav files and ordinary Lhotse manifests."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from audio_utils import (
    SAMPLING_RATE,
    change_speed,
    finish_utterance,
    join_words,
    write_wav,
)
from script_utils import (
    check_range,
    read_manifest,
    replace_dir,
    staged_dir,
    write_manifest,
)
from tqdm.auto import tqdm

from icefall_kd import KDError

WORDS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
NUM_DIGITS = (2, 6)  # fewest and most digits in an utterance
SPLITS = ("train", "train-untranscribed", "dev", "test")


@dataclass
class Utterance:
    samples: np.ndarray  # (num_samples,)
    speaker: str
    text: Optional[str]  # None: untranscribed
    custom: Dict[str, Any]  # goes into the supervision, JSON values only


# For each split: the number of utterances and what makes the i-th of them.
Makers = Dict[str, Tuple[int, Callable[[int], Utterance]]]
# A recording of one word: its name and its samples.
Take = Tuple[str, np.ndarray]


def add_corpus_args(
    parser: argparse.ArgumentParser,
    num_train: int = 1600,
    num_dev: int = 96,
    num_test: int = 300,
) -> None:
    """Add the options of a corpus to ``parser``, with the default numbers given."""
    parser.add_argument("--seed", type=int, default=0, help="Seed of all randomness")
    for option, split, default in [
        ("--num-train", "train", num_train),
        ("--num-untranscribed", "train-untranscribed", 0),
        ("--num-dev", "dev", num_dev),
        ("--num-test", "test", num_test),
    ]:
        parser.add_argument(
            option, type=int, default=default, help=f"Number of utterances in {split}"
        )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("data/manifests"),
        help="Where the manifests go",
    )
    parser.add_argument(
        "--audio-dir",
        type=Path,
        default=Path("data/audio"),
        help="Where the wav files go; the manifests name them by this path",
    )


def check_corpus_args(args: argparse.Namespace) -> None:
    """Refuse ``args`` that are out of bounds."""
    check_range(args.seed, 0, "--seed", 2**32 - 1)
    check_range(args.num_train, 1, "--num-train")
    check_range(args.num_untranscribed, 0, "--num-untranscribed")
    check_range(args.num_dev, 1, "--num-dev")
    check_range(args.num_test, 1, "--num-test")


def check_untranscribed(args: argparse.Namespace) -> None:
    """Refuse ``args`` with untranscribed speakers or utterances, and not both."""
    if (args.num_untranscribed > 0) != bool(args.untranscribed_speakers.strip(", ")):
        raise KDError(
            f"--num-untranscribed is {args.num_untranscribed} but "
            f"--untranscribed-speakers is {args.untranscribed_speakers!r}, give both "
            "or neither"
        )


def utterance_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the randomness of the utterance ``index`` of a ``split``.

    For one ``seed`` it does not depend on how many utterances there are.
    """
    return np.random.default_rng([seed, SPLITS.index(split), index])


def draw_digits(rng: np.random.Generator) -> Sequence[int]:
    """Return digits that ``rng`` draws, as many as it draws."""
    num_digits = rng.integers(NUM_DIGITS[0], NUM_DIGITS[1] + 1)
    return rng.integers(0, 10, size=num_digits).tolist()


def digits_to_text(digits: Sequence[int]) -> str:
    """Return the words of ``digits``."""
    return " ".join(WORDS[d] for d in digits)


def makers_of_words(
    args: argparse.Namespace,
    speakers: Dict[str, Sequence[str]],
    draw: Callable[[np.random.Generator, str, str], Tuple[List[Take], str]],
    rate: int = SAMPLING_RATE,
) -> Makers:
    """Return what makes utterances of recordings of single words.

    The words are joined with pauses, in noise; those of train are played at another
    speed.

    Args:
      args: The options of :func:`add_corpus_args`.
      speakers: Those of each split, who take turns. A split without any is not made.
      draw: Draws the words of an utterance: given the randomness, the split and the
        speaker, it returns a recording of each word, and the text.
      rate: Of the recordings, in Hz.
    """
    numbers = {
        "train": args.num_train,
        "train-untranscribed": args.num_untranscribed,
        "dev": args.num_dev,
        "test": args.num_test,
    }
    makers: Makers = {}
    for split, num_utterances in numbers.items():
        if not speakers.get(split):
            continue

        def make(i: int, split=split, names=speakers[split]) -> Utterance:
            rng = utterance_rng(args.seed, split, i)
            name = names[i % len(names)]
            takes, text = draw(rng, split, name)
            speech = join_words([samples for _, samples in takes], rng, rate)
            if split.startswith("train"):
                speech = change_speed(speech, rng)
            samples, snr = finish_utterance(speech, rng, rate)
            custom = {"snr": round(snr, 2)}
            if split == "train-untranscribed":
                return Utterance(samples, name, None, custom)
            # The names of the recordings tell the words.
            custom["recordings"] = [recording for recording, _ in takes]
            return Utterance(samples, name, text, custom)

        makers[split] = (num_utterances, make)
    return makers


def manifest_path(output_dir: Path, split: str) -> Path:
    """Return the path of the manifest of ``split`` in ``output_dir``."""
    return output_dir / f"cuts_{split}.jsonl.gz"


def make_cut(
    cut_id: str,
    utterance: Utterance,
    path: Path,
    rate: int = SAMPLING_RATE,
    language: str = "English",
) -> Dict[str, Any]:
    """Return the cut ``cut_id`` of an ``utterance`` with its audio in ``path``.

    The audio has ``rate`` Hz; the speech is of ``language``.
    """
    from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

    num_samples = utterance.samples.size
    duration = num_samples / rate
    recording = Recording(
        id=cut_id,
        sources=[AudioSource(type="file", channels=[0], source=str(path))],
        sampling_rate=rate,
        num_samples=num_samples,
        duration=duration,
    )
    supervision = SupervisionSegment(
        id=cut_id,
        recording_id=cut_id,
        start=0.0,
        duration=duration,
        channel=0,
        text=utterance.text,
        language=language,
        speaker=utterance.speaker,
        custom=utterance.custom,
    )
    return MonoCut(
        id=cut_id,
        start=0.0,
        duration=duration,
        channel=0,
        supervisions=[supervision],
        recording=recording,
    ).to_dict()


def check_replaceable(audio_dir: Path, manifest: Path) -> None:
    """Refuse to replace ``audio_dir`` unless the present ``manifest`` points to it."""
    if not audio_dir.exists():
        return
    if manifest.exists():
        recording = read_manifest(manifest)[0].get("recording", {})
        sources = [source["source"] for source in recording.get("sources", [])]
        if [Path(source).parent for source in sources] == [audio_dir]:
            return
    raise KDError(
        f"{audio_dir} exists but {manifest} does not describe it, name another "
        "--audio-dir or remove that folder"
    )


def write_corpus(
    name: str,
    makers: Makers,
    output_dir: Path,
    audio_dir: Path,
    rate: int = SAMPLING_RATE,
    language: str = "English",
) -> None:
    """Write `audio_dir/{name}-{split}/*.wav` and the manifests of all splits.

    The audio has ``rate`` Hz; the speech is of ``language``.

    All is made in scratch folders first. What an earlier run left is replaced, a
    split that is no longer wanted included.
    """
    for split in SPLITS:
        check_replaceable(
            audio_dir / f"{name}-{split}", manifest_path(output_dir, split)
        )
    with staged_dir(audio_dir) as audio, staged_dir(output_dir) as manifests:
        for split, (num_utterances, make) in makers.items():
            split_dir = f"{name}-{split}"
            (audio / split_dir).mkdir()
            cuts = []
            for i in tqdm(range(num_utterances), desc=f"{name} {split}"):
                utterance = make(i)
                cut_id = f"{name}-{utterance.speaker}-{split}-{i:06d}"
                write_wav(audio / split_dir / f"{cut_id}.wav", utterance.samples, rate)
                path = audio_dir / split_dir / f"{cut_id}.wav"
                cuts.append(make_cut(cut_id, utterance, path, rate, language))
            write_manifest(manifest_path(manifests, split), cuts)

        for split in SPLITS:
            if manifest_path(output_dir, split).exists():
                manifest_path(output_dir, split).unlink()
            if split in makers:
                replace_dir(audio / f"{name}-{split}", audio_dir / f"{name}-{split}")
            elif (audio_dir / f"{name}-{split}").exists():
                (audio_dir / f"{name}-{split}").rename(audio / f"{name}-{split}")
        for split in makers:
            manifest_path(manifests, split).rename(manifest_path(output_dir, split))
            num_utterances = makers[split][0]
            logging.info(f"{split}: {num_utterances} utterances in {output_dir}")

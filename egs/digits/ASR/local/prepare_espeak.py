#!/usr/bin/env python3
"""
Make connected digits with the speech synthesizer eSpeak NG, which the package
espeakng-loader brings along (pip install espeakng-loader).

An utterance is 2 to 6 digits in one voice, in coloured noise. A voice is an accent
of English and a variant of eSpeak NG; rate and pitch vary too. The variants of test
are in test alone.

Usage:
  ./local/prepare_espeak.py --output-dir data/manifests

It writes, in --output-dir,
  cuts_{train,dev,test}.jsonl.gz
and with --num-untranscribed also
  cuts_train-untranscribed.jsonl.gz
whose cuts have no transcript and whose variants are in no other split.
"""

import argparse
import ctypes
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
from _ctypes import dlclose
from audio_utils import SAMPLING_RATE, finish_utterance, resample
from corpus_utils import (
    Makers,
    Utterance,
    add_corpus_args,
    check_corpus_args,
    digits_to_text,
    draw_digits,
    utterance_rng,
    write_corpus,
)
from script_utils import run_script

from icefall_kd import KDError

ACCENTS = (
    "en en-029 en-gb-scotland en-gb-x-gbclan en-gb-x-gbcwmd en-gb-x-rp en-us "
    "en-us-nyc"
).split()

# Left out: whispers, croaks, robots, and all but one of those that sound alike.
FEMALE = "Andrea Annie anika aunty belinda f1 f2 f3 f4 f5 grandma linda steph".split()
MALE = (
    "Alex Andy Denis Gene Hugo Jacky Lee Marco Mario Michael Mike Nguyen Reed Storm "
    "adam antonio boris david ed edward grandpa gustave ian john kaukovalta klatt4 m1 "
    "m2 m3 m4 m5 m6 m7 m8 marcelo max norbert pablo paul pedro quincy rob robert "
    "travis victor"
).split()

RATE_RANGE = (120, 220)  # words per minute
PITCH_RANGE = (35, 65)  # of 0 to 99, 50 is the variant's own
INTONATION_RANGE = (30, 70)  # likewise
MIN_SECONDS = 0.3
MIN_PEAK = 0.01  # of 1; synthetic speech has more than 0.1


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_corpus_args(parser)
    return parser.parse_args()


class Espeak:
    """libespeak-ng through ctypes.

    The library keeps phases and random numbers from one utterance to the next. It
    is therefore loaded anew for each, which takes 1 ms, so that an utterance
    depends on nothing but its own arguments.
    """

    # From speak_lib.h.
    SYNCHRONOUS, DONT_EXIT, CHARS_UTF8 = 2, 0x8000, 1
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as e:
            raise KDError(
                f"eSpeak NG cannot be imported ({e}), run pip install espeakng-loader"
            ) from e
        self.library = espeakng_loader.get_library_path()
        self.data = espeakng_loader.get_data_path()

    def check_variants(self, variants: List[str]) -> None:
        """Refuse a variant that is not there: eSpeak NG would quietly do without."""
        for variant in variants:
            path = Path(self.data) / "voices" / "!v" / variant
            if not path.is_file():
                raise KDError(
                    f"eSpeak NG has no variant {variant!r} ({path} does not exist), "
                    "run pip install --force-reinstall espeakng-loader"
                )

    def synthesize(
        self, text: str, voice: str, rate: int, pitch: int, intonation: int, seed: int
    ) -> Tuple[np.ndarray, int]:
        """Returns samples of shape (num_samples,) and their sampling rate."""
        chunks: List[bytes] = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        def receive(samples, num_samples, events) -> int:
            if samples and num_samples > 0:
                chunks.append(ctypes.string_at(samples, 2 * num_samples))
            return 0

        def check(what: str, status: int) -> None:
            if status != 0:
                raise KDError(
                    f"eSpeak NG returned {status} instead of 0 for {what} of voice "
                    f"{voice!r} and text {text!r}, run pip install --force-reinstall "
                    "espeakng-loader"
                )

        lib = ctypes.CDLL(self.library)
        try:
            sampling_rate = lib.espeak_Initialize(
                self.SYNCHRONOUS, 0, self.data.encode(), self.DONT_EXIT
            )
            check("initialization", min(sampling_rate, 0))
            lib.espeak_SetSynthCallback(receive)
            ctypes.CDLL(None).srand(seed)
            lib.espeak_ng_SetRandSeed(ctypes.c_long(seed))
            check("selection", lib.espeak_SetVoiceByName(voice.encode()))
            for parameter, value in [
                (self.RATE, rate),
                (self.PITCH, pitch),
                (self.RANGE, intonation),
            ]:
                check("a parameter", lib.espeak_SetParameter(parameter, value, 0))
            utf8 = text.encode("utf-8") + b"\0"
            status = lib.espeak_Synth(
                utf8, ctypes.c_size_t(len(utf8)), 0, 1, 0, self.CHARS_UTF8, None, None
            )
            check("synthesis", status)
            check("synchronization", lib.espeak_Synchronize())
            lib.espeak_Terminate()
        finally:
            dlclose(lib._handle)
        samples = np.frombuffer(b"".join(chunks), dtype=np.int16) / 32768
        return samples, sampling_rate


def check_speech(samples: np.ndarray, what: str) -> None:
    seconds = samples.size / SAMPLING_RATE
    peak = float(np.max(np.abs(samples), initial=0.0))
    if seconds < MIN_SECONDS or peak < MIN_PEAK:
        raise KDError(
            f"{what} came out {seconds:.3f} s long with a peak of {peak:.4f} where "
            f"{MIN_SECONDS} s and {MIN_PEAK} are the least, run pip install "
            "--force-reinstall espeakng-loader"
        )


def split_variants(num_untranscribed: int) -> Dict[str, List[str]]:
    """A fifth of either sex is for test, another, if wanted, for untranscribed."""
    variants: Dict[str, List[str]] = {
        "train": [],
        "train-untranscribed": [],
        "test": [],
    }
    for sex in (FEMALE, MALE):
        for i, variant in enumerate(sex):
            if i % 5 == 2:
                variants["test"].append(variant)
            elif i % 5 == 4 and num_untranscribed > 0:
                variants["train-untranscribed"].append(variant)
            else:
                variants["train"].append(variant)
    variants["dev"] = variants["train"]
    return variants


def main() -> None:
    args = get_args()
    check_corpus_args(args)
    espeak = Espeak()
    espeak.check_variants(FEMALE + MALE)
    variants = split_variants(args.num_untranscribed)

    makers: Makers = {}
    for split, num_utterances in [
        ("train", args.num_train),
        ("train-untranscribed", args.num_untranscribed),
        ("dev", args.num_dev),
        ("test", args.num_test),
    ]:
        if num_utterances == 0:
            continue

        def make(i: int, split=split) -> Utterance:
            rng = utterance_rng(args.seed, split, i)
            accent = ACCENTS[rng.integers(len(ACCENTS))]
            variant = variants[split][rng.integers(len(variants[split]))]
            rate, pitch, intonation = (
                int(rng.integers(low, high + 1))
                for low, high in (RATE_RANGE, PITCH_RANGE, INTONATION_RANGE)
            )
            text = digits_to_text(draw_digits(rng))
            voice = f"{accent}+{variant}"
            speech, sampling_rate = espeak.synthesize(
                text.lower(), voice, rate, pitch, intonation, int(rng.integers(2**31))
            )
            speech = resample(speech, sampling_rate, SAMPLING_RATE)
            check_speech(speech, f"{text!r} by {voice!r} at {rate} words per minute")
            samples, snr = finish_utterance(speech, rng)
            return Utterance(
                samples,
                speaker=f"{accent}_{variant}",
                text=None if split == "train-untranscribed" else text,
                custom={"snr": round(snr, 2), "rate": rate, "pitch": pitch},
            )

        makers[split] = (num_utterances, make)

    write_corpus("espeak", makers, args.output_dir, args.audio_dir)


if __name__ == "__main__":
    run_script(main)

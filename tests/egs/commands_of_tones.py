"""A small clone of the Arabic Speech Commands, and a run of the recipe on it.

A tone tells who is heard.
"""

import importlib
import sys
from pathlib import Path

import numpy as np

EGS = Path(__file__).resolve().parents[2] / "egs"
RECIPE = EGS / "commands" / "ASR"
LOCAL = RECIPE / "local"
# Options of run.sh.
TINY = {
    "num-train": 40,
    "num-untranscribed": 24,
    "num-dev": 6,
    "num-test": 6,
    "vocab-size": 28,
    "teacher-epochs": 2,
    "student-epochs": 2,
    "patience": 1,
    "avg": 2,
    "num-threads": 1,
    "train-flags": "--max-duration 15 --num-buckets 2 --average-period 2",
    "teacher-set": "num-encoder-layers=1,1,1 embed-channels=4,8,16",
    "student-set": "encoder-dim=32,32,32 encoder-unmasked-dim=32,32,32 "
    "feedforward-dim=64,64,64 decoder-dim=64 joiner-dim=64",
}
RATE = 16000
# Hz. Played at 0.9 to 1.1 times the speed, they still differ.
TRAIN = {"00000001": 500, "00000002": 700, "00000004": 980, "00000009": 1372}
DEV = {"00000003": 1920, "00000007": 2690}
TEST = {"00000005": 3766, "00000006": 5270}
SPEAKERS = {"train": TRAIN, "val": DEV, "test": TEST}
WORDS = {"up": "أعلى", "zoom in": "تكبير", "one": "واحد", "undo": "تراجع"}


def audio_utils():
    """The module of the digits recipe's scripts."""
    sys.path.insert(0, str(LOCAL))
    return importlib.import_module("audio_utils")


def make_clone(folder, num_takes=2):
    """Write the lists and ``num_takes`` recordings of each speaker and word."""
    rng = np.random.default_rng(0)
    write_wav = audio_utils().write_wav
    for word in WORDS:
        (folder / "dataset" / word).mkdir(parents=True)
    for split, speakers in SPEAKERS.items():
        rows = ["file,class"]
        for speaker, frequency in speakers.items():
            for word in WORDS:
                for take in range(1, num_takes + 1):
                    name = f"dataset/{word}/{speaker}_NO_{take:02}.wav"
                    rows.append(f"{name},{word}")
                    time = np.arange(int(RATE * rng.uniform(0.2, 0.3))) / RATE
                    tone = np.sin(2 * np.pi * frequency * time)
                    silence = np.zeros(RATE // 4)
                    samples = np.concatenate([silence, 0.3 * tone, silence])
                    samples += 1e-4 * rng.standard_normal(samples.size)
                    write_wav(folder / name, samples, RATE)
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder

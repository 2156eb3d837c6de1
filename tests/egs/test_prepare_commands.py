"""egs/commands/ASR/local/prepare_commands.py, on tones that tell who is heard."""

import json
import os
import subprocess
import sys

import commands_of_tones
import numpy as np
import pytest
from commands_of_tones import DEV, LOCAL, RATE, TEST, TRAIN, WORDS, make_clone
from test_local import all_bytes, manifest, read_cuts, run, run_well

audio_utils = commands_of_tones.audio_utils()

SCRIPT = "prepare_commands.py"
SMALL = ["--num-train", 12, "--num-dev", 6, "--num-test", 8]
# One of the four speakers of train.
UNTRANSCRIBED = ["--untranscribed-speakers", "00000004", "--num-untranscribed", 5]
SPLITS = {
    "train": (12, set(TRAIN) - {"00000004"}),
    "train-untranscribed": (5, {"00000004"}),
    "dev": (6, set(DEV)),
    "test": (8, set(TEST)),
}
FREQUENCIES = {**TRAIN, **DEV, **TEST}


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(LOCAL))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, clone):
    """A working folder in which the script was run, in a process of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["--corpus-dir", clone, *SMALL, *UNTRANSCRIBED]
    command = [sys.executable, LOCAL / SCRIPT, *words]
    done = subprocess.run(
        [str(x) for x in command], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def cuts_of(folder, split):
    return read_cuts(manifest(folder / "data/manifests", split))


def samples_of(cut, folder):
    source = folder / cut["recording"]["sources"][0]["source"]
    return audio_utils.read_wav(source, RATE)


def refused(done, *words):
    """Exit status 1 and one sentence with all of ``words``."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if f"{SCRIPT}: error: " in x]
    for word in words:
        assert str(word) in line


def test_help_is_there_from_any_folder(tmp_path):
    done = subprocess.run(
        [LOCAL / SCRIPT, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert "--untranscribed-speakers" in done.stdout and "2000" in done.stdout


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_has_the_speakers_of_its_list_and_says_who(corpus, split):
    number, speakers = SPLITS[split]
    cuts = cuts_of(corpus, split)
    assert len({cut["id"] for cut in cuts}) == len(cuts) == number
    assert {cut["supervisions"][0]["speaker"] for cut in cuts} == speakers
    for cut in cuts:
        samples = samples_of(cut, corpus)
        energy = np.abs(np.fft.rfft(samples)) ** 2
        frequency = np.fft.rfftfreq(samples.size, 1 / RATE)
        heard = frequency[(energy * (frequency > 400)).argmax()]
        expected = FREQUENCIES[cut["supervisions"][0]["speaker"]]
        share = 0.12 if split.startswith("train") else 0.005  # as the speed changes
        assert heard == pytest.approx(expected, rel=share), cut["id"]


def test_texts_are_the_arabic_spellings_of_the_recordings(corpus):
    seen, lengths = set(), set()
    for split in ("train", "dev", "test"):
        for i, cut in enumerate(cuts_of(corpus, split)):
            (supervision,) = cut["supervisions"]
            speaker = supervision["speaker"]
            assert cut["id"] == f"commands-{speaker}-{split}-{i:06d}"
            assert supervision["language"] == "Arabic"
            assert 0 <= supervision["custom"]["snr"] <= 15
            takes = [x.split("/") for x in supervision["custom"]["recordings"]]
            assert supervision["text"] == " ".join(WORDS[word] for word, _ in takes)
            assert {name.split("_")[0] for _, name in takes} == {speaker}
            seen |= {word for word, _ in takes}
            lengths.add(len(takes))
            assert cut["recording"]["sampling_rate"] == RATE
            assert samples_of(cut, corpus).size == cut["recording"]["num_samples"]
    assert seen == set(WORDS) and lengths == {2, 3, 4, 5}


def test_the_list_of_words_has_forty_words_each_spelt_otherwise():
    lines = (LOCAL / "words.txt").read_text("utf8").splitlines()
    names, spellings = zip(*(line.rsplit(" ", 1) for line in lines))
    assert len(lines) == len(set(names)) == len(set(spellings)) == 40
    assert {name: text for name, text in zip(names, spellings)}.items() >= WORDS.items()
    for text in spellings:
        assert all("\u0620" <= letter <= "\u064a" for letter in text), text


def test_untranscribed_cuts_tell_nothing_of_the_transcript(corpus):
    for cut in cuts_of(corpus, "train-untranscribed"):
        (supervision,) = cut["supervisions"]
        assert supervision.get("text") is None
        assert set(supervision["custom"]) == {"snr"}
        written = json.dumps(cut, ensure_ascii=False)
        assert not any(word in written for word in WORDS.values())
        assert "_NO_" not in written


def test_the_seed_alone_decides_and_other_splits_do_not_matter(tmp_path, clone, corpus):
    words = ["--corpus-dir", clone, *UNTRANSCRIBED, "--num-dev", 6, "--num-test", 8]
    for name, seed, num_train in [("again", 0, 12), ("fewer", 0, 5), ("other", 1, 5)]:
        (tmp_path / name).mkdir()
        more = ["--seed", seed, "--num-train", num_train]
        run_well(SCRIPT, *words, *more, cwd=tmp_path / name)
    first = all_bytes(corpus / "data")
    assert all_bytes(tmp_path / "again/data") == first
    fewer = all_bytes(tmp_path / "fewer/data/audio")
    assert len(fewer) == len(all_bytes(corpus / "data/audio")) - 7
    assert all(first[f"audio/{name}"] == content for name, content in fewer.items())
    other = all_bytes(tmp_path / "other/data/audio")
    assert not set(other.values()) & set(first.values())


def test_speech_is_cut_out_of_the_silence_around_it():
    rng = np.random.default_rng(1)
    tone = np.sin(np.arange(4000) / 3)
    samples = np.concatenate([np.zeros(8000), tone, np.zeros(6000)])
    samples += 1e-4 * rng.standard_normal(samples.size)
    speech = audio_utils.trim(samples, RATE)
    (begin,) = np.flatnonzero(
        [np.array_equal(samples[i : i + 50], speech[:50]) for i in range(8000)]
    )
    margin = 0.07 * RATE  # 40 ms, and a window's width
    assert 8000 - margin <= begin <= 8000
    assert 12000 <= begin + speech.size <= 12000 + margin
    assert audio_utils.trim(tone, RATE).size == tone.size


def first_line(path, text):
    lines = path.read_text().splitlines()
    lines[1] = text
    path.write_text("\n".join(lines) + "\n")


def break_clone(clone, what):
    """Spoil a clone; return words of the refusal."""
    wav = clone / "dataset" / "zoom in" / "00000009_NO_02.wav"
    train = clone / "train.csv"
    if what == "no list":
        (clone / "val.csv").unlink()
        return clone, "has no val.csv"
    if what == "missing":
        wav.unlink()
        return wav, "is listed but missing"
    if what == "cut short":
        wav.write_bytes(wav.read_bytes()[:-301])
        return wav, "is cut short", "its header names"
    if what == "half a header":
        wav.write_bytes(wav.read_bytes()[:30])
        return wav, "is not a wav file"
    if what == "nothing":
        wav.write_bytes(b"")
        return wav, "is not a wav file"
    if what == "rate":
        audio_utils.write_wav(wav, np.sin(np.arange(3000)), 8000)
        return wav, "8000 Hz", "16000 Hz"
    if what == "a moment":
        audio_utils.write_wav(wav, np.sin(np.arange(1599)), RATE)
        return wav, "1599 samples", "1600"
    if what == "silence":
        audio_utils.write_wav(wav, np.zeros(3000), RATE)
        return wav, "silence"
    if what == "foreign file":
        first_line(train, "dataset/up/up_1.wav,up")
        return train, "line 2", "'dataset/up/up_1.wav'"
    if what == "foreign class":
        first_line(train, "dataset/cat/00000001_NO_01.wav,cat")
        return train, "line 2", "'cat'"
    if what == "other class":
        first_line(train, "dataset/up/00000001_NO_01.wav,one")
        return train, "line 2", "'one'"
    if what == "other columns":
        train.write_text("path,word\ndataset/up/00000001_NO_01.wav,up\n")
        return train, "line 2", "''"
    if what == "list cut short":
        text = train.read_text()
        train.write_text(text[: len(text) // 2 - 3])
        return train, "line ", "copy the list again"
    if what == "no rows":
        train.write_text("file,class\n")
        return train, "0 recordings"
    if what == "other encoding":
        train.write_bytes("file,class\ndataset/é,é\n".encode("latin1"))
        return train, "can't be read"
    assert what == "speaker twice"
    with open(clone / "test.csv", "a") as f:
        f.write("dataset/up/00000002_NO_01.wav,up\n")
    return "00000002", "both train.csv and test.csv"


@pytest.mark.parametrize(
    "what",
    ["no list", "missing", "cut short", "half a header", "nothing", "rate", "a moment"]
    + ["silence", "foreign file", "foreign class", "other class", "other columns"]
    + ["list cut short", "no rows", "other encoding", "speaker twice"],
)
def test_a_bad_clone_is_refused_and_nothing_is_written(tmp_path, what):
    clone, work = make_clone(tmp_path / "clone", num_takes=2), tmp_path / "work"
    said = break_clone(clone, what)
    work.mkdir()
    done = run(SCRIPT, "--corpus-dir", clone, *SMALL, *UNTRANSCRIBED, cwd=work)
    refused(done, *said)
    assert list(work.iterdir()) == []


def test_a_bad_clone_leaves_the_corpus_of_before(tmp_path, corpus):
    clone, work = make_clone(tmp_path / "clone"), tmp_path / "work"
    words = ["--corpus-dir", clone, *SMALL]
    work.mkdir()
    run_well(SCRIPT, *words, cwd=work)
    before = all_bytes(work)
    said = break_clone(clone, "cut short")
    refused(run(SCRIPT, *words, "--seed", 5, cwd=work), *said)
    assert all_bytes(work) == before


NUMBER = ["--num-untranscribed", 2]


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--untranscribed-speakers", "00000077", *NUMBER],
            ["'00000077'", ", ".join(TRAIN)],
        ),
        (
            ["--untranscribed-speakers", "00000003", *NUMBER],
            ["'00000003'", "train.csv"],
        ),
        (["--untranscribed-speakers", ",".join(TRAIN), *NUMBER], ["none is left"]),
        (["--untranscribed-speakers", "00000004"], ["--num-untranscribed is 0"]),
        (["--untranscribed-speakers", " ,", *NUMBER], ["--num-untranscribed is 2"]),
        (NUMBER, ["--num-untranscribed is 2", "''"]),
        (["--num-train", 0], ["--num-train is 0"]),
        (["--seed", -1], ["--seed is -1"]),
        (["--corpus-dir", "nowhere"], ["nowhere has no train.csv"]),
    ],
)
def test_bad_options_are_refused(tmp_path, clone, words, said):
    done = run(SCRIPT, "--corpus-dir", clone, *SMALL, *words, cwd=tmp_path)
    refused(done, *said)
    assert list(tmp_path.iterdir()) == []

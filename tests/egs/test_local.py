"""The scripts of egs/digits/ASR/local: corpora, features, tokens, checks.

Most tests use a corpus of tones in which the frequency tells who is heard; the few
on real speech need the Free Spoken Digit Dataset (environment variable FSDD_DIR)
and are skipped without.
"""

import gzip
import importlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from icefall_kd.errors import KDError

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "egs" / "digits" / "ASR" / "local"
WORDS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
SPLITS = ("train", "dev", "test")

sys.path.insert(0, str(LOCAL))
audio_utils = importlib.import_module("audio_utils")
prepare_fsdd = importlib.import_module("prepare_fsdd")
prepare_espeak = importlib.import_module("prepare_espeak")

# Hz by who is heard. Played at 0.8 to 1.25 times the speed, they still differ.
TONES = {
    "dev": (350, 420),  # anna and bert, indexes 0 to 4
    "train": (760, 900),  # anna and bert, other indexes
    "untranscribed": (1450, 1650),  # cleo
    "test": (2700, 3000),  # dora
}
HEARD = {
    "dev": (350, 420),
    "train": (608, 1125),
    "train-untranscribed": (1160, 2063),
    "test": (2700, 3000),
}


def run_apart(script, *words, cwd, **options):
    """In a process of its own, as a user would."""
    command = [sys.executable, str(LOCAL / script), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


def run(script, *words, cwd):
    """The same in this process, which has the heavy imports behind it."""
    import torch

    module = importlib.import_module(Path(script).stem)
    argv = [script, *map(str, words)]
    old_dir, num_threads = os.getcwd(), torch.get_num_threads()
    stderr, status = io.StringIO(), 0
    os.chdir(cwd)
    try:
        with redirect_stderr(stderr), mock.patch.object(sys, "argv", argv):
            module.run_script(module.main)
    except SystemExit as e:
        status = e.code
    finally:
        os.chdir(old_dir)
        torch.set_num_threads(num_threads)
    return subprocess.CompletedProcess(argv, status, "", stderr.getvalue())


def run_well(script, *words, cwd, apart=False, **options):
    done = (run_apart if apart else run)(script, *words, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr
    return done


def refused(done, script, *words):
    """Exit status 1 and one line with all of `words`, nothing else on stderr."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"{script}: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr


def refused_late(done, script, *words):
    """As `refused`, for an error that comes when work is under way."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    errors = [x for x in done.stderr.splitlines() if f"{script}: error: " in x]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert str(word) in errors[0]


def read_cuts(path):
    with gzip.open(path, "rt") as f:
        return [json.loads(line) for line in f]


def write_cuts(path, cuts):
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(cut) + "\n" for cut in cuts)


def manifest(folder, split):
    return Path(folder) / f"cuts_{split}.jsonl.gz"


def all_bytes(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def write_tone(path, frequency, seconds=0.25):
    time = np.arange(int(8000 * seconds)) / 8000
    audio_utils.write_wav(path, 0.3 * np.sin(2 * np.pi * frequency * time))


def make_tones(folder, num_indexes=7):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for speaker in ("anna", "bert", "cleo", "dora"):
        for digit in range(10):
            for index in range(num_indexes):
                who = {"cleo": "untranscribed", "dora": "test"}.get(
                    speaker, "dev" if index < 5 else "train"
                )
                path = folder / f"{digit}_{speaker}_{index}.wav"
                write_tone(path, rng.uniform(*TONES[who]))
    return folder


SMALL = ["--num-train", 24, "--num-dev", 10, "--num-test", 12]
TONE_ARGS = ["--test-speaker", "dora", *SMALL]
WITH_CLEO = ["--untranscribed-speakers", "cleo", "--num-untranscribed", 14]


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    return make_tones(tmp_path_factory.mktemp("tones") / "recordings")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tones):
    """A working folder in which prepare_fsdd.py was run on the tones."""
    folder = tmp_path_factory.mktemp("corpus")
    run_well(
        "prepare_fsdd.py",
        "--corpus-dir",
        tones.parent,
        *TONE_ARGS,
        *WITH_CLEO,
        cwd=folder,
        apart=True,
    )
    return folder


@pytest.fixture(scope="module")
def fbank(corpus):
    """The same folder with features."""
    run_well("compute_fbank.py", "--extractor", "lhotse", cwd=corpus)
    return corpus


@pytest.fixture(scope="module")
def bpe(corpus):
    words = ["--lang-dir", "data/lang", "--vocab-size", 30]
    run_well("train_bpe_model.py", *words, cwd=corpus)
    return corpus / "data/lang"


@pytest.fixture(scope="module")
def fsdd(tmp_path_factory):
    """The folder of real recordings."""
    if "FSDD_DIR" in os.environ:
        folder = Path(os.environ["FSDD_DIR"])
    else:
        archive = ROOT.parent / "shared" / "data" / "fsdd-5spk.tar.gz"
        if not archive.is_file():
            pytest.skip("the environment variable FSDD_DIR is not set")
        folder = tmp_path_factory.mktemp("fsdd")
        with tarfile.open(archive) as f:
            f.extractall(folder, filter="data")
    found = [p for p in (folder, folder / "recordings") if any(p.glob("*.wav"))]
    return found[0]


def samples_of(cut, folder):
    return audio_utils.read_wav(folder / cut["recording"]["sources"][0]["source"])


@pytest.mark.parametrize(
    "script",
    ["prepare_fsdd", "prepare_espeak", "compute_fbank", "train_bpe_model"]
    + ["validate_manifest"],
)
def test_help(script, tmp_path):
    done = subprocess.run(
        [LOCAL / f"{script}.py", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        cwd=LOCAL.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "default" in done.stdout


# Noise and levels.


def test_snr_is_what_is_said_and_within_0_and_15_db():
    said = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        speech = np.sin(np.arange(rng.integers(4000, 20000)) / 3)
        noisy, snr = audio_utils.add_noise(speech, rng)
        ratio = np.mean(speech**2) / np.mean((noisy - speech) ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(snr, abs=1e-6)
        said.append(snr)
    assert 0 <= min(said) < 2 and 13 < max(said) <= 15


def test_snr_counts_the_margins():
    rng = np.random.default_rng(1)
    speech = np.sin(np.arange(4000) / 3)
    samples, snr = audio_utils.finish_utterance(speech, rng)
    assert 0.1 + 0.1 <= (samples.size - 4000) / 8000 <= 0.2 + 0.2
    # The first 0.1 s hold noise alone; with it the power of the whole tells the SNR.
    whole = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        samples, snr = audio_utils.finish_utterance(np.sin(np.arange(40000) / 3), rng)
        noise = np.mean(np.r_[samples[:800], samples[-800:]] ** 2)
        whole.append(10 * np.log10(np.mean(samples**2) / noise - 1) - snr)
    assert abs(np.median(whole)) < 0.5


def test_noise_is_of_many_colours_with_hum_in_some():
    low_share, hum = [], []
    for seed in range(60):
        noise = audio_utils.coloured_noise(16000, np.random.default_rng(seed))
        assert np.mean(noise**2) == pytest.approx(1)
        energy = np.abs(np.fft.rfft(noise)) ** 2
        low_share.append(energy[700:2000].sum() / energy[700:].sum())
        hum.append(energy[95:125].max() / energy[80:150].sum())  # 40 to 75 Hz
    # Of the energy from 350 Hz on, white noise has 0.18 below 1 kHz, brown 0.71.
    assert min(low_share) < 0.3 and max(low_share) > 0.65
    assert 15 < np.sum(np.array(hum) > 0.2) < 45


def test_digits_of_unlike_level_come_out_alike():
    rng = np.random.default_rng(0)
    tone = np.sin(np.arange(2000) / 3)
    joined = audio_utils.join_words([tone, 0.001 * tone], rng)
    first, last = audio_utils.level(joined[:2000]), audio_utils.level(joined[-2000:])
    assert 0 < abs(20 * np.log10(first / last)) <= 6
    assert 0 <= joined.size - 4000 <= 0.25 * 8000


# prepare_fsdd.py


@pytest.mark.parametrize("split", HEARD)
def test_a_split_has_its_own_recordings_only(corpus, split):
    cuts = read_cuts(manifest(corpus / "data/manifests", split))
    for cut in cuts:
        samples = samples_of(cut, corpus)
        energy = np.abs(np.fft.rfft(samples)) ** 2
        frequency = np.fft.rfftfreq(samples.size, 1 / 8000)
        share = {}
        for name, (low, high) in HEARD.items():
            chosen = (frequency > low - 20) & (frequency < high + 20)
            share[name] = energy[chosen].sum()
        assert max(share, key=share.get) == split, (cut["id"], share)


def test_cuts_are_as_asked(corpus):
    numbers = {"train": 24, "train-untranscribed": 14, "dev": 10, "test": 12}
    speakers = {
        "train": {"anna", "bert"},
        "train-untranscribed": {"cleo"},
        "dev": {"anna", "bert"},
        "test": {"dora"},
    }
    for split, number in numbers.items():
        cuts = read_cuts(manifest(corpus / "data/manifests", split))
        assert len({cut["id"] for cut in cuts}) == len(cuts) == number
        assert {cut["supervisions"][0]["speaker"] for cut in cuts} == speakers[split]
        for i, cut in enumerate(cuts):
            (supervision,) = cut["supervisions"]
            assert cut["id"] == f"fsdd-{supervision['speaker']}-{split}-{i:06d}"
            assert supervision["language"] == "English"
            assert 0 <= supervision["custom"]["snr"] <= 15
            source = cut["recording"]["sources"][0]["source"]
            assert source == f"data/audio/fsdd-{split}/{cut['id']}.wav"
            assert samples_of(cut, corpus).size == cut["recording"]["num_samples"]
            assert np.abs(samples_of(cut, corpus)).max() < 0.9
            if split == "train-untranscribed":
                continue
            words = supervision["text"].split(" ")
            assert 2 <= len(words) <= 6 and set(words) <= set(WORDS)
            named = supervision["custom"]["recordings"]
            assert words == [WORDS[int(name[0])] for name in named]


def test_untranscribed_cuts_tell_nothing_of_the_transcript(corpus):
    cuts = read_cuts(manifest(corpus / "data/manifests", "train-untranscribed"))
    for cut in cuts:
        (supervision,) = cut["supervisions"]
        assert supervision.get("text") is None
        assert set(supervision["custom"]) == {"snr"}
        assert not any(word in json.dumps(cut) for word in WORDS)
        assert "cleo_" not in json.dumps(cut)


def test_lhotse_loads_the_cuts(corpus, monkeypatch):
    from lhotse import load_manifest_lazy

    monkeypatch.chdir(corpus)
    for split in HEARD:
        for cut in load_manifest_lazy(manifest("data/manifests", split)):
            assert cut.load_audio().shape == (1, cut.num_samples)
            assert cut.sampling_rate == 8000
            assert cut.supervisions[0].text is None or split != "train-untranscribed"


def test_the_seed_alone_decides_and_other_splits_do_not_matter(tmp_path, tones, corpus):
    words = ["--corpus-dir", tones, "--test-speaker", "dora", *WITH_CLEO]
    words += ["--num-dev", 10, "--num-test", 12]
    for name, seed, num_train in [("again", 0, 24), ("fewer", 0, 5), ("other", 1, 5)]:
        (tmp_path / name).mkdir()
        more = ["--seed", seed, "--num-train", num_train]
        run_well("prepare_fsdd.py", *words, *more, cwd=tmp_path / name)
    first = all_bytes(corpus / "data/audio")
    manifests = all_bytes(corpus / "data/manifests")
    assert all_bytes(tmp_path / "again/data/audio") == first
    assert all_bytes(tmp_path / "again/data/manifests") == manifests
    fewer = all_bytes(tmp_path / "fewer/data/audio")
    assert len(fewer) == len(first) - 19
    assert all(first[name] == content for name, content in fewer.items())
    other = all_bytes(tmp_path / "other/data/audio")
    assert not set(other.values()) & set(first.values())


def test_preparing_again_replaces_all_of_the_last_time(tmp_path, tones):
    args = ["--corpus-dir", tones, *TONE_ARGS]
    run_well("prepare_fsdd.py", *args, *WITH_CLEO, cwd=tmp_path)
    run_well("prepare_fsdd.py", *args, "--seed", 3, cwd=tmp_path)
    assert not manifest(tmp_path / "data/manifests", "train-untranscribed").exists()
    for split in SPLITS:
        cuts = read_cuts(manifest(tmp_path / "data/manifests", split))
        wavs = {p.stem for p in (tmp_path / f"data/audio/fsdd-{split}").iterdir()}
        assert wavs == {cut["id"] for cut in cuts}
    assert len(list((tmp_path / "data/audio").iterdir())) == 3


def broken_corpus(folder, what):
    """Returns --corpus-dir and a word of the refusal."""
    if what == "missing":
        return folder / "nowhere", "nowhere"
    corpus = make_tones(folder / "corpus") if what != "empty" else folder / "empty"
    bad = corpus / "3_anna_6.wav"
    if what == "empty":
        corpus.mkdir()
        return corpus, "0 wav files"
    if what == "rate":
        bad.write_bytes(bad.read_bytes().replace(b"\x40\x1f\0\0", b"\x80\x3e\0\0", 1))
        return corpus, "16000 Hz"
    if what == "name":
        bad.rename(corpus / "three_anna_6.wav")
        return corpus, "three_anna_6.wav"
    if what == "damaged":
        bad.write_bytes(b"RIFF and no more")
        return corpus, "3_anna_6.wav"
    if what == "short":
        bad.write_bytes(bad.read_bytes()[:-501])
        return corpus, "3_anna_6.wav is cut short"
    if what == "silent":
        audio_utils.write_wav(bad, np.zeros(2000))
        return corpus, "silence"
    assert what == "digit"
    for path in corpus.glob("3_bert_[56].wav"):
        path.unlink()
    return corpus, "digit 3"


@pytest.mark.parametrize(
    "what", ["missing", "empty", "rate", "name", "damaged", "short", "silent", "digit"]
)
def test_a_bad_corpus_is_refused(tmp_path, what):
    corpus_dir, word = broken_corpus(tmp_path, what)
    work = tmp_path / "work"
    work.mkdir()
    words = ["--corpus-dir", corpus_dir, *TONE_ARGS]
    done = run_apart("prepare_fsdd.py", *words, cwd=work)
    if what in ("rate", "damaged", "short", "silent", "digit"):
        refused_late(done, "prepare_fsdd.py", word)
    else:
        refused(done, "prepare_fsdd.py", word)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    "words, said",
    [
        (["--test-speaker", "zoe"], ["'zoe'", "anna, bert, cleo, dora"]),
        (["--untranscribed-speakers", "zoe", "--num-untranscribed", 2], ["'zoe'"]),
        (["--untranscribed-speakers", "dora", "--num-untranscribed", 2], ["'dora'"]),
        (["--untranscribed-speakers", "cleo"], ["--num-untranscribed", "'cleo'"]),
        (["--num-untranscribed", 3], ["--num-untranscribed", "3"]),
        (
            ["--untranscribed-speakers", "anna,bert,cleo", "--num-untranscribed", 2],
            ["none is left for train"],
        ),
        (["--num-train", 0], ["--num-train", "0", "1"]),
        (["--num-dev", -2], ["--num-dev", "-2", "1"]),
        (["--num-test", 0], ["--num-test", "0", "1"]),
    ],
)
def test_bad_options_are_refused(tmp_path, tones, words, said):
    args = ["--corpus-dir", tones, *TONE_ARGS, *words]
    done = run_apart("prepare_fsdd.py", *args, cwd=tmp_path)
    refused(done, "prepare_fsdd.py", *said)
    assert list(tmp_path.iterdir()) == []


def small_files_only():
    """Like a full disk: a file cannot grow beyond 8 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def test_a_full_disk_leaves_what_was_there(tmp_path, tones):
    args = ["--corpus-dir", tones, *TONE_ARGS]
    full = {"preexec_fn": small_files_only, "cwd": tmp_path}
    done = run_apart("prepare_fsdd.py", *args, **full)
    refused_late(done, "prepare_fsdd.py", "free space")
    assert list(tmp_path.iterdir()) == []

    run_well("prepare_fsdd.py", *args, cwd=tmp_path)
    before = all_bytes(tmp_path)
    args += ["--seed", 5]
    done = run_apart("prepare_fsdd.py", *args, **full)
    refused_late(done, "prepare_fsdd.py", "free space")
    assert all_bytes(tmp_path) == before


def test_an_output_that_cannot_be_is_refused(tmp_path, tones):
    (tmp_path / "file").write_text("")
    for option in ("--output-dir", "--audio-dir"):
        args = ["--corpus-dir", tones, *TONE_ARGS, option, "file/below"]
        done = run("prepare_fsdd.py", *args, cwd=tmp_path)
        refused_late(done, "prepare_fsdd.py", "file/below")
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_audio_of_other_manifests_is_not_replaced(corpus, tones):
    before = all_bytes(corpus / "data/audio")
    args = ["--corpus-dir", tones, *TONE_ARGS, "--seed", 9, "--output-dir", "elsewhere"]
    done = run("prepare_fsdd.py", *args, cwd=corpus)
    refused_late(done, "prepare_fsdd.py", "data/audio/fsdd-train", "elsewhere")
    assert all_bytes(corpus / "data/audio") == before
    assert not (corpus / "elsewhere").exists()


def test_real_digits_are_where_the_manifest_says(tmp_path, fsdd):
    args = ["--corpus-dir", fsdd, "--test-speaker", "theo", *SMALL]
    run_well("prepare_fsdd.py", *args, cwd=tmp_path)
    hits = []
    for split in ("dev", "test"):
        for cut in read_cuts(manifest(tmp_path / "data/manifests", split)):
            samples = samples_of(cut, tmp_path)
            for name in cut["supervisions"][0]["custom"]["recordings"]:
                digit, speaker, index = name.split("_")
                assert (speaker == "theo") == (split == "test")
                assert split == "test" or int(index) < 5
                matches = []
                for other in (int(index), *range(10, 15)):
                    wav = audio_utils.read_wav(fsdd / f"{digit}_{speaker}_{other}.wav")
                    if wav.size <= samples.size:
                        wav /= np.sqrt(np.sum(wav**2))
                        matches.append(np.abs(np.correlate(samples, wav)).max())
                hits.append(np.argmax(matches) == 0)
    assert len(hits) > 40 and np.mean(hits) > 0.9


# prepare_espeak.py


@pytest.fixture(scope="module")
def espeak(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("espeak")
    for name, num_train in [("long", 60), ("short", 12)]:
        words = ["--num-train", num_train, "--num-dev", 20, "--num-test", 30]
        (folder / name).mkdir()
        words += ["--num-untranscribed", 20]
        apart = name == "short"  # the voices' state must not matter
        run_well("prepare_espeak.py", *words, cwd=folder / name, apart=apart)
    return folder


def test_espeak_test_voices_are_not_in_training(espeak):
    variants = {}
    for split in HEARD:
        cuts = read_cuts(manifest(espeak / "long/data/manifests", split))
        speakers = [cut["supervisions"][0]["speaker"] for cut in cuts]
        variants[split] = {speaker.split("_")[1] for speaker in speakers}
    train, untranscribed = variants["train"], variants["train-untranscribed"]
    assert not variants["test"] & (train | variants["dev"] | untranscribed)
    assert not untranscribed & (train | variants["dev"])
    for split in ("train", "test"):
        assert variants[split] & set(prepare_espeak.FEMALE)
        assert variants[split] & set(prepare_espeak.MALE)


@pytest.mark.parametrize("num_untranscribed", [0, 1])
def test_espeak_variants_are_split_without_overlap(num_untranscribed):
    split = prepare_espeak.split_variants(num_untranscribed)
    everyone = set(prepare_espeak.FEMALE + prepare_espeak.MALE)
    parts = [split[k] for k in ("train", "train-untranscribed", "test")]
    assert sum(map(len, parts)) == len(everyone) == len(set(sum(parts, [])))
    for sex in (prepare_espeak.FEMALE, prepare_espeak.MALE):
        assert len(set(sex) & set(split["test"])) == pytest.approx(len(sex) / 5, abs=1)


def test_espeak_utterances_depend_on_seed_and_number_alone(espeak):
    long, short = (all_bytes(espeak / x / "data/audio") for x in ("long", "short"))
    assert len(long) - len(short) == 48
    assert all(long[name] == content for name, content in short.items())
    assert len(set(long.values())) == len(long)
    for split in ("dev", "test"):
        path = Path("data/manifests") / manifest("", split)
        assert (espeak / "long" / path).read_bytes() == (
            espeak / "short" / path
        ).read_bytes()


def test_espeak_voices_say_the_same_twice():
    pytest.importorskip("espeakng_loader")
    espeak = prepare_espeak.Espeak()
    for variant in prepare_espeak.FEMALE + prepare_espeak.MALE:
        words = ["seven six three", f"en-us+{variant}", 160, 50, 50]
        (one, _), (two, _) = (espeak.synthesize(*words, seed=3) for _ in range(2))
        assert np.array_equal(one, two), variant


def test_espeak_says_something_and_keeps_untranscribed_untranscribed(espeak):
    for split in HEARD:
        for cut in read_cuts(manifest(espeak / "long/data/manifests", split)):
            (supervision,) = cut["supervisions"]
            samples = samples_of(cut, espeak / "long")
            assert samples.size == cut["recording"]["num_samples"] > 0.3 * 8000
            assert 120 <= supervision["custom"]["rate"] <= 220
            if split == "train-untranscribed":
                assert not any(word in json.dumps(cut) for word in WORDS)
            else:
                assert 2 <= len(supervision["text"].split()) <= 6


def test_espeak_speaks_longer_for_more_words_and_lower_rates():
    pytest.importorskip("espeakng_loader")
    espeak = prepare_espeak.Espeak()

    def seconds(text, rate):
        samples, sampling_rate = espeak.synthesize(text, "en-us+f1", rate, 50, 50, 1)
        return samples.size / sampling_rate

    assert seconds("one two three", 160) > seconds("one", 160) + 0.3
    assert seconds("one two three", 120) > 1.2 * seconds("one two three", 220)


def test_espeak_refuses_silence(monkeypatch, tmp_path):
    pytest.importorskip("espeakng_loader")
    for samples, word in [
        (np.zeros(22050), "peak of 0.0000"),
        (np.ones(2205), "0.100"),
    ]:
        monkeypatch.setattr(
            prepare_espeak.Espeak, "synthesize", lambda *a, s=samples: (s, 22050)
        )
        done = run("prepare_espeak.py", cwd=tmp_path)
        refused_late(done, "prepare_espeak.py", word)
        assert list(tmp_path.iterdir()) == []


def test_espeak_refuses_voices_that_are_not_there(monkeypatch, tmp_path):
    pytest.importorskip("espeakng_loader")
    with pytest.raises(KDError, match="'xx-none\\+f1'"):
        prepare_espeak.Espeak().synthesize("one", "xx-none+f1", 160, 50, 50, 1)
    monkeypatch.setattr(prepare_espeak, "MALE", ["nobody"])
    done = run("prepare_espeak.py", cwd=tmp_path)
    refused(done, "prepare_espeak.py", "'nobody'")
    assert list(tmp_path.iterdir()) == []


def without(module, folder):
    """An environment in which `module` cannot be imported."""
    folder.mkdir()
    (folder / f"{module}.py").write_text("raise ImportError('left out')")
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_espeak_names_the_missing_package(tmp_path):
    env = without("espeakng_loader", tmp_path / "stub")
    done = run_apart("prepare_espeak.py", cwd=tmp_path, env=env)
    refused(done, "prepare_espeak.py", "pip install espeakng-loader")


# compute_fbank.py


def test_features_are_40_bins_of_each_10_ms(fbank, monkeypatch):
    from lhotse import load_manifest_lazy

    monkeypatch.chdir(fbank)
    for split in HEARD:
        sources = read_cuts(manifest("data/manifests", split))
        cuts = list(load_manifest_lazy(manifest("data/fbank", split)))
        assert [cut.id for cut in cuts] == [cut["id"] for cut in sources]
        for cut in cuts:
            features = cut.load_features()
            assert features.shape == (cut.num_frames, 40)
            assert features.dtype == np.float32 and np.isfinite(features).all()
            assert abs(cut.num_frames - cut.duration * 100) <= 1
            assert cut.features.storage_path == f"data/fbank/feats_{split}"
    assert not [p for p in Path("data/fbank").iterdir() if p.name.startswith(".")]


def test_features_of_a_tone_peak_at_its_filter(fbank, monkeypatch):
    from lhotse import load_manifest_lazy

    monkeypatch.chdir(fbank)
    peaks = {}
    for split in ("dev", "test"):  # 350 to 420 Hz, 2700 to 3000 Hz
        cuts = load_manifest_lazy(manifest("data/fbank", split))
        energies = [np.exp(cut.load_features()).mean(0) for cut in cuts]
        peaks[split] = [energy[8:].argmax() + 8 for energy in energies]  # no hum
    assert max(peaks["dev"]) < 16 and min(peaks["test"]) > 30


def test_two_processes_give_the_same_features(fbank):
    words = ["--extractor", "lhotse", "--num-jobs", 2, "--output-dir", "data/twice"]
    run_well("compute_fbank.py", *words, cwd=fbank, apart=True)
    one, two = all_bytes(fbank / "data/fbank"), all_bytes(fbank / "data/twice")
    for name, content in one.items():
        if name.endswith(".npy"):
            assert two[name] == content
    assert set(one) == set(two) and len(one) == 60 + 4


def test_kaldifeat_agrees_with_lhotse(fbank, monkeypatch):
    pytest.importorskip("kaldifeat")
    from lhotse import load_manifest_lazy

    words = ["--extractor", "kaldifeat", "--output-dir", "data/kaldifeat"]
    run_well("compute_fbank.py", *words, cwd=fbank)
    monkeypatch.chdir(fbank)
    ours = load_manifest_lazy(manifest("data/fbank", "dev"))
    theirs = load_manifest_lazy(manifest("data/kaldifeat", "dev"))
    for a, b in zip(ours, theirs, strict=True):
        assert b.features.type == "kaldifeat-fbank"
        np.testing.assert_allclose(a.load_features(), b.load_features(), atol=0.01)


def test_kaldifeat_that_is_not_there_is_refused_by_name_only(fbank, tmp_path):
    env = without("kaldifeat", tmp_path / "stub")
    words = ["--manifest-dir", fbank / "data/manifests", "--extractor"]
    done = run_apart("compute_fbank.py", *words, "kaldifeat", cwd=tmp_path, env=env)
    refused(done, "compute_fbank.py", "python tools/install_native.py kaldifeat")
    words = ["--extractor", "auto"]
    run_well("compute_fbank.py", *words, cwd=fbank, env=env, apart=True)


def test_features_are_skipped_only_if_they_are_of_these_cuts(fbank, tmp_path):
    before = all_bytes(fbank / "data/fbank")
    words = ["--extractor", "lhotse"]
    done = run_well("compute_fbank.py", *words, cwd=fbank, apart=True)
    assert done.stderr.count("skipping") == 4
    assert all_bytes(fbank / "data/fbank") == before

    done = run("compute_fbank.py", *words, "--num-mel-bins", 23, cwd=fbank)
    refused(done, "compute_fbank.py", "40 bins", "23 bins", "--overwrite true")

    cuts = read_cuts(manifest(fbank / "data/manifests", "dev"))
    cuts[0]["supervisions"][0]["text"] = "NINE NINE"
    write_cuts(manifest(tmp_path, "dev"), cuts)
    words += ["--manifest-dir", tmp_path]
    done = run("compute_fbank.py", *words, cwd=fbank)
    refused(done, "compute_fbank.py", cuts[0]["id"], "--overwrite true")
    assert all_bytes(fbank / "data/fbank") == before


def test_features_keep_their_mean_if_asked_and_are_not_taken_for_others(
    fbank, tmp_path
):
    words = ["--extractor", "lhotse", "--output-dir", tmp_path / "fbank"]
    run_well("compute_fbank.py", *words, "--mean", "none", cwd=fbank)

    def array(folder):
        (first, *_) = read_cuts(manifest(folder, "dev"))
        return np.load(folder / "feats_dev" / first["features"]["storage_key"])

    plain, less = array(tmp_path / "fbank"), array(fbank / "data/fbank")
    assert np.abs(plain.mean(axis=0)).max() > 0.1
    np.testing.assert_array_equal(plain - plain.mean(axis=0), less)
    run_well("compute_fbank.py", *words, "--mean", "none", cwd=fbank)
    done = run("compute_fbank.py", *words, cwd=fbank)
    said = ("features of --mean none where utterance is asked for", "--overwrite true")
    refused(done, "compute_fbank.py", *said)
    for path in (tmp_path / "fbank/feats_dev").rglob("*.npy"):
        path.unlink()
    done = run("compute_fbank.py", *words, "--mean", "none", cwd=fbank)
    refused(done, "compute_fbank.py", "does not exist", "--overwrite true")


def test_overwrite_makes_features_again(corpus, tmp_path):
    words = ["--extractor", "lhotse", "--output-dir", tmp_path / "fbank"]
    run_well("compute_fbank.py", *words, cwd=corpus)
    words += ["--num-mel-bins", 23, "--overwrite", "true"]
    run_well("compute_fbank.py", *words, cwd=corpus)
    (first, *_) = read_cuts(manifest(tmp_path / "fbank", "dev"))
    array = np.load(tmp_path / "fbank/feats_dev" / first["features"]["storage_key"])
    assert array.shape[1] == first["features"]["num_features"] == 23


@pytest.mark.parametrize("what", ["none", "missing", "damaged", "rate", "gzip", "disk"])
def test_features_of_bad_input_are_refused(corpus, tmp_path, what):
    (tmp_path / "in").mkdir()
    cuts = read_cuts(manifest(corpus / "data/manifests", "dev"))
    for cut in cuts:
        source = cut["recording"]["sources"][0]
        source["source"] = str(corpus / source["source"])
    words, runner, word = ["--manifest-dir", "in", "--output-dir", "out"], run, "again"
    if what == "missing":
        word = source["source"] = "gone.wav"
    if what == "damaged":
        source["source"] = str(tmp_path / "in/damaged.wav")
        Path(source["source"]).write_bytes(b"RIFF and no more")
        word = cuts[-1]["id"]
    if what == "rate":
        cuts[0]["recording"]["sampling_rate"] = 16000
        word = "16000 Hz"
    if what == "none":
        word = "0 files"
    else:
        write_cuts(manifest(tmp_path / "in", "dev"), cuts)
    if what == "gzip":
        content = bytearray(manifest(tmp_path / "in", "dev").read_bytes())
        content[len(content) // 2 :] = b""
        manifest(tmp_path / "in", "dev").write_bytes(content)
        word = "damaged"
    if what == "disk":
        runner, word = (
            partial(run_apart, preexec_fn=small_files_only),
            "free space",
        )
    done = runner("compute_fbank.py", *words, cwd=tmp_path)
    refused_late(done, "compute_fbank.py", word)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# train_bpe_model.py


def test_tokens_follow_icefall(bpe):
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor()
    sp.load(str(bpe / "bpe.model"))
    assert sp.get_piece_size() == 30
    assert [sp.id_to_piece(i) for i in range(3)] == ["<blk>", "<sos/eos>", "<unk>"]
    assert sp.unk_id() == 2 and sp.bos_id() == sp.eos_id() == -1
    text = " ".join(WORDS)
    assert 2 not in sp.encode(text) and sp.decode(sp.encode(text)) == text
    lines = (bpe / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{sp.id_to_piece(i)} {i}" for i in range(30)]


@pytest.mark.parametrize("size, would_do", [(10, 19), (18, 19), (93, 92), (500, 92)])
def test_a_vocabulary_that_cannot_be_names_one_that_can(
    corpus, tmp_path, size, would_do
):
    source = manifest(corpus / "data/manifests", "train")
    words = ["--manifest", source, "--lang-dir", "lang", "--vocab-size"]
    done = run_apart("train_bpe_model.py", *words, size, cwd=tmp_path)
    refused(done, "train_bpe_model.py", f"is {size} ", f"give {would_do}")
    assert list(tmp_path.iterdir()) == []
    run_well("train_bpe_model.py", *words, would_do, cwd=tmp_path)
    assert len((tmp_path / "lang/tokens.txt").read_text().splitlines()) == would_do


def test_the_default_vocabulary_is_that_of_its_folder(corpus, tmp_path):
    source = manifest(corpus / "data/manifests", "train")
    run_well("train_bpe_model.py", "--manifest", source, cwd=tmp_path)
    (folder,) = (tmp_path / "data").iterdir()
    lines = (folder / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert folder.name == f"lang_bpe_{len(lines)}"


def test_a_bpe_model_needs_transcripts_and_a_positive_size(corpus, tmp_path):
    source = manifest(corpus / "data/manifests", "train-untranscribed")
    done = run("train_bpe_model.py", "--manifest", source, cwd=tmp_path)
    refused(done, "train_bpe_model.py", "0 transcripts")
    done = run("train_bpe_model.py", "--manifest", "gone.jsonl.gz", cwd=tmp_path)
    refused(done, "train_bpe_model.py", "gone.jsonl.gz")
    done = run("train_bpe_model.py", "--vocab-size", 0, cwd=tmp_path)
    refused(done, "train_bpe_model.py", "--vocab-size is 0")
    assert list(tmp_path.iterdir()) == []


# validate_manifest.py


def test_good_manifests_are_valid(fbank, bpe):
    for split in SPLITS:
        source = manifest("data/fbank", split)
        words = [source, "--bpe-model", bpe / "bpe.model"]
        run_well("validate_manifest.py", *words, cwd=fbank)
    source = manifest("data/fbank", "train-untranscribed")
    done = run("validate_manifest.py", source, cwd=fbank)
    refused(done, "validate_manifest.py", "None", "--allow-untranscribed true")
    run_well("validate_manifest.py", source, "--allow-untranscribed", "true", cwd=fbank)


def no_supervision(cut):
    cut["supervisions"] = []
    return "0 supervisions"


def two_supervisions(cut):
    cut["supervisions"] *= 2
    return "2 supervisions"


def empty_text(cut):
    cut["supervisions"][0]["text"] = " "
    return "' '"


def no_text(cut):
    del cut["supervisions"][0]["text"]
    return "None"


def no_features(cut):
    del cut["features"]
    return "no features"


def other_rate(cut):
    recording = cut["recording"]
    recording["sampling_rate"] = cut["features"]["sampling_rate"] = 16000
    recording["num_samples"] *= 2
    return "16000 Hz"


def lower_case(cut):
    cut["supervisions"][0]["text"] = "one two"
    return "<unk>"


def no_cut(cut):
    cut["type"] = "SomethingElse"
    return "not a cut"


@pytest.mark.parametrize(
    "break_cut",
    [no_supervision, two_supervisions, empty_text, no_text, no_features, other_rate]
    + [lower_case, no_cut],
)
def test_a_bad_cut_is_refused(fbank, bpe, tmp_path, break_cut):
    cuts = read_cuts(manifest(fbank / "data/fbank", "dev"))
    said = break_cut(cuts[4])
    write_cuts(manifest(tmp_path, "dev"), cuts)
    words = [manifest(tmp_path, "dev"), "--bpe-model", bpe / "bpe.model"]
    done = run("validate_manifest.py", *words, cwd=fbank)
    where = "line 5 " if break_cut is no_cut else cuts[4]["id"]
    refused(done, "validate_manifest.py", where, said)


def test_an_id_that_is_there_twice_is_refused(fbank, tmp_path):
    cuts = read_cuts(manifest(fbank / "data/fbank", "dev"))
    write_cuts(manifest(tmp_path, "dev"), cuts + cuts[2:3])
    done = run("validate_manifest.py", manifest(tmp_path, "dev"), cwd=fbank)
    refused(done, "validate_manifest.py", cuts[2]["id"], "twice")


def test_frames_must_suffice_for_the_tokens(fbank, bpe, tmp_path):
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor()
    sp.load(str(bpe / "bpe.model"))
    cuts = read_cuts(manifest(fbank / "data/fbank", "dev"))
    frames = ((cuts[0]["features"]["num_frames"] - 7) // 2 + 1) // 2
    # One-token words fill the frames to the last that may be filled.
    word = next(w for w in WORDS if len(sp.encode(w)) == 1)
    words = [manifest(tmp_path, "dev"), "--bpe-model", bpe / "bpe.model"]
    for spare, status in [(2, 0), (1, 1)]:
        cuts[0]["supervisions"][0]["text"] = " ".join([word] * (frames - spare))
        write_cuts(manifest(tmp_path, "dev"), cuts)
        done = run("validate_manifest.py", *words, cwd=fbank)
        assert done.returncode == status, done.stderr
    refused(done, "validate_manifest.py", cuts[0]["id"], f"has {frames} frames")


def test_a_bpe_model_that_is_none_is_refused(fbank, bpe):
    source = manifest("data/fbank", "dev")
    for model in (bpe / "tokens.txt", bpe / "gone.model"):
        done = run("validate_manifest.py", source, "--bpe-model", model, cwd=fbank)
        refused(done, "validate_manifest.py", model)

"""egs/digits/ASR/local/join_cuts.py: utterances joined to recordings with pauses."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "digits" / "ASR" / "local"
sys.path.insert(0, str(LOCAL))
join_cuts = importlib.import_module("join_cuts")
audio_utils = importlib.import_module("audio_utils")
corpus_utils = importlib.import_module("corpus_utils")
script_utils = importlib.import_module("script_utils")

RATE = 8000


@pytest.fixture
def manifest(tmp_path):
    """Five utterances: 0.2 s of silence, then 0.5 to 0.9 s of another value each."""
    cuts = []
    for i in range(5):
        samples = np.full(RATE // 2 + i * RATE // 10, (i + 1) / 10)
        samples = np.concatenate([np.zeros(RATE // 5), samples])
        path = tmp_path / f"u{i}.wav"
        audio_utils.write_wav(path, samples)
        utterance = corpus_utils.Utterance(samples, "a", f"WORD{i} END", {})
        cuts.append(corpus_utils.make_cut(f"u{i}", utterance, path))
    script_utils.write_manifest(tmp_path / "cuts_dev.jsonl.gz", cuts)
    return tmp_path / "cuts_dev.jsonl.gz"


@pytest.fixture
def run(manifest, monkeypatch, tmp_path):
    def run(*words, where="out"):
        out = tmp_path / where
        words = ["--manifest", manifest, "--output-dir", out, *words]
        words += ["--audio-dir", out / "audio"]
        monkeypatch.setattr(sys, "argv", ["join_cuts.py", *map(str, words)])
        join_cuts.run_script(join_cuts.main)
        return script_utils.read_manifest(out / "cuts_dev.jsonl.gz")

    return run


def read(cut):
    return audio_utils.read_wav(Path(cut["recording"]["sources"][0]["source"]))


def test_recordings_have_the_utterances_in_a_row_with_pauses_of_their_length(run):
    cuts = run("--num-recordings", 6, "--seconds", "2 4", "--pauses", "0.3 0.5")
    assert [c["id"] for c in cuts] == [f"joined-dev-{i:06d}" for i in range(6)]
    for i, cut in enumerate(cuts):
        (supervision,) = cut["supervisions"]
        names = supervision["custom"]["cuts"]
        texts = [f"WORD{name[1]} END" for name in names]
        assert supervision["text"] == " ".join(texts)
        samples = read(cut)
        assert len(samples) == cut["recording"]["num_samples"]
        longest = (0.2 + 0.9 + 0.5) * RATE
        assert (2 + 0.4 * i) * RATE <= len(samples) < (2 + 0.4 * i) * RATE + longest
        # The quietest frames are silent, and so are the pauses.
        edges = np.flatnonzero(np.diff(np.r_[0, samples > 0, 0]))
        begins, ends = edges[::2], edges[1::2]
        values = [round(10 * samples[begin]) for begin in begins]
        assert values == [int(name[1]) + 1 for name in names]
        assert (ends - begins).tolist() == [RATE * (4 + v) // 10 for v in values]
        pauses = (begins[1:] - ends[:-1]) / RATE - 0.2
        assert ((pauses > 0.2999) & (pauses < 0.5001)).all()


def test_all_utterances_are_used_equally_often(run):
    cuts = run("--num-recordings", 9, "--seconds", "3 3", "--pauses", "0 0.1")
    names = [name for c in cuts for name in c["supervisions"][0]["custom"]["cuts"]]
    counts = Counter(names)
    assert len(counts) == 5 and max(counts.values()) - min(counts.values()) <= 1


def test_the_seed_decides(run):
    def samples(seed, where):
        words = ("--num-recordings", 2, "--seconds", "2 2", "--seed", seed)
        return np.concatenate([read(cut) for cut in run(*words, where=where)])

    first = samples(1, "a")
    np.testing.assert_array_equal(samples(1, "b"), first)
    other = samples(2, "c")
    assert len(other) != len(first) or (other != first).any()


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_a_pause_sounds_like_the_quietest_frames(tilt):
    """In level and in spectrum, whatever the loud part is."""
    rng = np.random.default_rng(1)
    spectrum = np.fft.rfft(rng.standard_normal(8 * RATE))
    frequency = np.maximum(np.fft.rfftfreq(8 * RATE, 1 / RATE), 50)
    noise = np.fft.irfft(spectrum * frequency**-tilt)
    noise *= 0.01 / noise.std()
    samples = noise.copy()
    samples[RATE:-RATE] += np.sin(np.arange(6 * RATE))
    pause = join_cuts.pause_after(samples, 4.0, rng, RATE)
    assert len(pause) == 4 * RATE
    # The quietest tenth is a little quieter than the mean.
    assert 0.7 < pause.std() / 0.01 < 1.1

    def bands(x):
        power = np.abs(np.fft.rfft(x[: 4 * RATE])) ** 2
        return np.log10([part.mean() for part in np.array_split(power[1:], 8)])

    # Of white and brown noise, the eight bands differ by 2 and more.
    np.testing.assert_allclose(bands(pause), bands(noise), atol=0.35)
    steps = pause.reshape(-1, RATE // 10).std(axis=1)
    assert steps.max() / steps.min() < 4


def test_what_can_not_be_joined_is_refused(run, manifest, capsys, tmp_path):
    def refused(*words):
        with pytest.raises(SystemExit) as e:
            run(*words)
        assert e.value.code == 1 and not (tmp_path / "out").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--seconds is '9 3'" in refused("--seconds", "9 3")
    assert "--pauses is 'much'" in refused("--pauses", "much")
    assert "--num-recordings is 0" in refused("--num-recordings", 0)
    assert "--skew is 0" in refused("--skew", 0)
    cuts = script_utils.read_manifest(manifest)
    cuts[3]["supervisions"][0]["text"] = None
    script_utils.write_manifest(manifest, cuts)
    assert "the cut u3 in" in refused()

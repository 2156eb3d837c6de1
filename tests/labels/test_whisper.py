"""labels/whisper.py and whisper_model.py: what a Whisper says, and how sure it is."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet
from tiny_whisper import multilingual_folder, save_whisper, whisper_folder  # noqa: F401

from icefall_kd.errors import KDError
from icefall_kd.labels.assistant import Assistant
from icefall_kd.labels.whisper import WhisperTeacher, compression, windows_of
from icefall_kd.labels.whisper_model import Parts, Whisper
from icefall_kd.targets.batches import DumpBatch

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture
def cuts(spoken):
    return list(CutSet.from_file(spoken))


@pytest.fixture
def audio():
    """Three windows of loud noise, which a random model tells apart."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.3, n).astype("f4") for n in (4000, 9000, 16000)]


@pytest.fixture
def english(whisper_folder):  # noqa: F811
    return Whisper(Parts(whisper_folder), CPU)


@pytest.mark.parametrize("language", [None, "de", ""])
def test_the_text_is_that_of_transformers_own_generation(
    whisper_folder, multilingual_folder, audio, language  # noqa: F811
):
    """A model of English (None), a language that is given, and one that is told."""
    parts = Parts(whisper_folder if language is None else multilingual_folder)
    whisper = Whisper(parts, CPU, language or "")
    features = parts.features(audio, sampling_rate=16000, return_tensors="pt")
    given = {} if language is None else {"task": "transcribe"}
    given.update({"language": language} if language else {})
    rows = parts.model.generate(features.input_features, max_new_tokens=12, **given)
    texts = [parts.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    heard = [whisper.text(said.tokens) for said in whisper.hear(audio)]
    assert heard == [" ".join(text.split()) for text in texts]
    assert len(set(heard)) > 1


@pytest.mark.parametrize("seed", [0, 7])
def test_an_assistant_changes_no_text_and_no_score(
    whisper_folder, english, audio, tmp_path, seed  # noqa: F811
):
    """Of seed 0 the teacher's encoder, which runs once, and of 7 another one."""
    other = Parts(save_whisper(tmp_path / "other", seed=seed))
    if seed == 0:
        with torch.no_grad():
            other.model.model.decoder.layers[1].fc1.weight.neg_()
    assistant = Assistant(other, english.parts, CPU)
    assert (assistant.encoder is None) == (seed == 0)
    assisted = Whisper(Parts(whisper_folder), CPU, "", assistant)
    passes = _count_passes(assisted.model)
    for one, alone in zip(assisted.hear(audio), english.hear(audio)):
        assert one.tokens == alone.tokens
        assert one.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
    assert assisted.settings() == english.settings()
    assert len(passes) > 3  # it was the teacher that decided


def test_a_good_assistant_saves_passes_of_the_teacher(
    whisper_folder, english, audio  # noqa: F811
):
    """The teacher itself drafts, so that all drafts are right."""
    assistant = Assistant(Parts(whisper_folder), english.parts, CPU)
    assisted = Whisper(Parts(whisper_folder), CPU, "", assistant)
    counts = []
    for whisper in (english, assisted):
        passes = _count_passes(whisper.model)
        whisper.hear(audio[:1])
        counts.append(len(passes))
    assert counts[1] < 0.7 * counts[0], counts


def _count_passes(model):
    """A list that grows with each pass of the decoder."""
    passes = []
    model.model.decoder.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_an_assistant_of_other_tokens_or_features_is_refused(
    english, multilingual_folder, tmp_path  # noqa: F811
):
    other = Parts(save_whisper(tmp_path / "other"))
    other.tokenizer.add_tokens(["new"])
    with pytest.raises(KDError, match="whose .* tokens are not the .* of `whisper`"):
        Assistant(other, english.parts, CPU)
    other = Parts(save_whisper(tmp_path / "other"))
    other.model.config.num_mel_bins = 80
    with pytest.raises(KDError, match="hears 80 mel bins, and `whisper` .* 8: give"):
        Assistant(other, english.parts, CPU)


def test_scores_are_the_decoders_log_probabilities(english, audio):
    """Each token is asked for by a pass of its own, over what stands before it."""
    model, parts = english.model, english.parts
    for window, said in zip(audio, english.hear(audio)):
        features = parts.features(window, sampling_rate=16000, return_tensors="pt")
        tokens = english._prompts(torch.zeros(1))[0].tolist()
        naive = []
        for token in (said.tokens + [english.end])[: len(said.log_probs)]:
            logits = model(
                features.input_features, decoder_input_ids=torch.tensor([tokens])
            ).logits[0]
            naive.append(logits[-1].log_softmax(-1)[token].item())
            tokens.append(token)
        assert said.log_probs == pytest.approx(naive, abs=1e-4)
        p = logits[0].softmax(-1)[parts.vocabulary["<|nospeech|>"]].item()
        assert said.speech == pytest.approx(np.log(1 - p), abs=1e-4)


def test_a_cut_has_the_same_label_in_any_batch_and_at_any_rate(english, cuts):
    (whole,) = WhisperTeacher(english, 200.0)([DumpBatch(cuts, cuts)])
    parts = list(WhisperTeacher(english, 0.01)([DumpBatch(cuts, cuts)]))
    assert [len(batch.cuts) for batch, _ in parts] == [1] * len(cuts)
    assert [batch.stretch for batch, _ in parts] == [None] * 3 + [cuts]
    labels = [label for _, (label,) in parts]
    assert [x.text for x in labels] == [x.text for x in whole[1]]
    names = ["token", "worst-token", "compression", "speech"]
    for one, other in zip(labels, whole[1]):
        assert list(one.scores) == names
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert one.scores["worst-token"] <= one.scores["token"] <= 0


def test_nothing_is_said_beside_the_labels(english, audio, capfd, recwarn):
    english.hear(audio)
    done = capfd.readouterr()
    assert (done.out, done.err, list(recwarn)) == ("", "", [])


def test_long_cuts_are_heard_in_windows_that_end_in_pauses(make_cut, monkeypatch):
    """Noise at 8 kHz with pauses: no sample is lost or heard twice."""
    rng = np.random.default_rng(1)
    audio = rng.normal(0, 0.1, (1, 80 * 8000)).astype("f4")
    pauses = [(8.0, 9.0), (22.0, 22.4), (27.0, 27.2), (50.0, 50.4), (51.1, 51.3)]
    for begin, end in pauses:
        audio[:, round(begin * 8000) : round(end * 8000)] = 0
    cut = _Audio(audio, 8000)
    windows = list(windows_of(cut))
    assert [w.begin for w in windows[:2]] == [0, pytest.approx(22.2, abs=0.1)]
    assert windows[2].begin == pytest.approx(50.2, abs=0.1)
    assert all(len(w.samples) <= 30 * 16000 for w in windows)
    heard = np.concatenate([w.samples for w in windows])
    assert np.array_equal(heard, audio[0].repeat(2))
    assert all(len(w.samples) <= 9 * 16000 for w in windows_of(cut, 9.0))
    begins = np.cumsum([0] + [len(w.samples) for w in windows[:-1]]) / 16000
    assert [w.begin for w in windows] == pytest.approx(begins.tolist())


class _Audio:
    """What windows_of asks of a cut."""

    id = "long"

    def __init__(self, audio, rate):
        self.audio, self.sampling_rate = audio, rate
        self.duration = audio.shape[1] / rate

    def resample(self, rate):
        return _Audio(self.audio.repeat(rate // self.sampling_rate, axis=1), rate)

    def truncate(self, offset, duration, preserve_id):
        begin, end = (
            round(x * self.sampling_rate) for x in (offset, offset + duration)
        )
        return _Audio(self.audio[:, begin:end], self.sampling_rate)

    def load_audio(self):
        return self.audio


def test_loops_compress_and_an_empty_text_does_not():
    assert compression("nine two " * 40) > 10 > 1 > compression("nine two")
    assert compression("") == 0


def test_the_name_is_a_hash_of_all_parameters(english, whisper_folder):  # noqa: F811
    again = Whisper(Parts(whisper_folder), CPU)
    assert again.name() == english.name() and again.settings() == english.settings()
    with torch.no_grad():
        again.model.model.encoder.layer_norm.bias[0] += 1e-3
    assert again.name() != english.name()


def test_what_is_no_whisper_is_refused(whisper_folder, tmp_path):  # noqa: F811
    copies = {name: tmp_path / name for name in ("type", "torn", "lacks", "old")}
    for copy in copies.values():
        shutil.copytree(whisper_folder, copy)
    _edit(copies["type"] / "config.json", model_type="wav2vec2")
    (copies["torn"] / "model.safetensors").write_bytes(b"x")
    _edit(copies["lacks"] / "config.json", encoder_layers=2)
    _edit(copies["old"] / "generation_config.json", is_multilingual=None)
    for place, sentence in (
        (str(tmp_path / "no"), "is no folder with a config.json"),
        (str(tmp_path), "is no folder with a config.json"),
        (str(copies["type"]), "of the type wav2vec2, and must be"),
        (str(copies["torn"]), "can't be loaded"),
        (str(copies["lacks"]), "lacks 15 parameters"),
        (str(copies["old"]), "has no is_multilingual"),
    ):
        with pytest.raises(KDError, match=sentence):
            Parts(place)


def _edit(path, **values):
    former = json.loads(Path(path).read_text("utf8"))
    Path(path).write_text(json.dumps({**former, **values}), "utf8")


def test_a_language_that_a_whisper_does_not_know_is_refused(
    whisper_folder, multilingual_folder  # noqa: F811
):
    for folder, sentence in (
        (whisper_folder, "`language` is fr, and the Whisper knows 1: en"),
        (multilingual_folder, "`language` is fr, and the Whisper knows 3: de, en, zh"),
    ):
        with pytest.raises(KDError, match=sentence):
            Whisper(Parts(folder), CPU, "fr")


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(KDError, match="run `pip install .*transformers"):
        Parts("openai/whisper-tiny")

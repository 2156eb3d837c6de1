"""icefall-kd decode: icefall's result files of a model, whenever it is stopped."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment

from icefall_kd.cli import cli
from icefall_kd.report.results import read_decodings
from icefall_kd.tap import ModelTap
from icefall_kd.teacher.loader import load_recipe_model
from icefall_kd.tokens import load_tokenizer
from icefall_kd.transcripts import recognizer
from icefall_kd.transcripts.cuts import name_of_set
from icefall_kd.zipformer import ctc_linear

pytest.importorskip("kaldialign")

CTC, GREEDY = "ctc-greedy-search", "greedy_search"
SUFFIX = {CTC: "epoch-2_avg-1", GREEDY: "epoch-2_avg-1_context-2_max-sym-per-frame-1"}


@pytest.fixture
def talking(talking_exp, teacher_exp):
    return load_recipe_model(teacher_exp.recipe, talking_exp, epoch=2)[0]


@pytest.fixture
def words(in_cuts, tmp_path, teacher_words, talking_exp, teacher_exp):
    """``decode`` of the small model; a word given twice counts the second time."""

    def make(*more, cuts=in_cuts, method=GREEDY):
        return [
            *("decode", *teacher_words, "--exp-dir", talking_exp),
            *("--bpe-model", teacher_exp.bpe_model),
            *("--cuts", cuts, "--decoding-method", method, "--test-set", "dev"),
            *("--res-dir", tmp_path / "exp" / method, "--num-threads", 1),
            *("--max-duration", 1.5, "--num-workers", 0, *more),
        ]

    return make


@pytest.fixture
def many(make_cut, tmp_path, monkeypatch):
    """24 cuts of odd lengths, in stretches of 3 s."""
    for name in ("targets.batches", "transcripts.decoding"):
        __import__(f"icefall_kd.{name}")
        monkeypatch.setattr(sys.modules[f"icefall_kd.{name}"], "STRETCH", 3.0)
    path = tmp_path / "many.jsonl"
    cuts = [make_cut(f"m{i}", 9 + (37 * i) % 83, text="z ein") for i in range(24)]
    CutSet.from_cuts(cuts).to_file(path)
    return path


def results(folder, kinds=("recogs", "errs", "wer-summary")):
    """The bytes of icefall's files."""
    names = [f"{kind}-*.txt" for kind in kinds]
    return {p.name: p.read_bytes() for n in names for p in folder.glob(n)}


@torch.no_grad()
def tokens_alone(model, features, method):
    """The tokens of an utterance, frame by frame."""
    x = torch.from_numpy(features)[None]
    with ModelTap(model, with_ctc=False) as tap:
        (rows,) = tap.encode(x, torch.tensor([x.size(1)])).encoder_out
    tokens, before = [], 0
    for row in rows:
        if method == CTC:
            best = int(ctc_linear(model)(row).argmax())
            tokens += [best] if best not in (0, before) else []
            before = best
            continue
        context = torch.tensor([([-1, 0] + tokens)[-2:]])
        decoded = model.decoder(context, need_pad=False)
        logits = model.joiner(row[None, None, None], decoded[None])
        best = int(logits.argmax())
        tokens += [best] if best else []
    return tokens


# What is written


@pytest.mark.parametrize("method", [CTC, GREEDY])
def test_the_files_have_what_the_naive_search_finds(
    invoke, words, in_cuts, talking, teacher_exp, tmp_path, method
):
    done = invoke(*words(method=method))
    assert done.code == 0, done
    folder, suffix = tmp_path / "exp" / method, SUFFIX[method]
    sp = load_tokenizer(teacher_exp.bpe_model)
    expected = ""
    for cut in sorted(CutSet.from_file(in_cuts), key=lambda c: c.id):
        found = sp.decode(tokens_alone(talking, cut.load_features(), method)).split()
        expected += f"{cut.id}:\tref=['ein']\n{cut.id}:\thyp={found}\n"
    assert "hyp=['" in expected
    assert (folder / f"recogs-dev-{suffix}.txt").read_text("utf8") == expected
    assert sorted(p.name for p in folder.iterdir()) == [
        f"decoding-dev-{suffix}.json",
        f"errs-dev-{suffix}.txt",
        f"recogs-dev-{suffix}.txt",
        f"utterances-dev-{suffix}.jsonl",
        f"wer-summary-dev-{suffix}.txt",
    ]
    summary = json.loads((folder / f"decoding-dev-{suffix}.json").read_text("utf8"))
    assert summary["cuts"] == 4 and summary["audio_seconds"] == pytest.approx(2.31)
    assert set(summary["percent"]) == {"WER", "CER"}
    for row in ("WER %", "CER %", "RTF encoder", "RTF search", "p99", "peak memory"):
        assert row in done.out


def test_the_report_reads_them(invoke, words, tmp_path):
    for method in (CTC, GREEDY):
        assert invoke(*words(method=method)).code == 0
    decodings = read_decodings(tmp_path / "exp")
    assert [d.method for d in decodings] == [CTC, GREEDY]
    for decoding in decodings:
        path = decoding.folder / f"decoding-dev-{SUFFIX[decoding.method]}.json"
        summary = json.loads(path.read_text("utf8"))
        rate = decoding.rates["dev"]
        assert rate.percent == pytest.approx(summary["percent"]["WER"], abs=0.005)
        assert decoding.checkpoint == "epoch 2, avg 1"
        assert decoding.transcripts("dev").name.startswith("recogs-dev-")
        took = summary["seconds"]["encoder"] + summary["seconds"]["search"]
        assert decoding.log.seconds == {"dev": pytest.approx(took)}
        assert decoding.log.device == summary["device"]
        assert decoding.log.max_duration == 1.5
        assert decoding.log.parameters == summary["parameters"]


def test_characters_are_scored_as_recipes_for_chinese_do(invoke, words, tmp_path):
    assert invoke(*words("--unit", "CER")).code == 0
    (path,) = (tmp_path / "exp" / GREEDY).glob("recogs-*")
    assert "ref=['e', 'i', 'n']" in path.read_text("utf8")
    (decoding,) = read_decodings(tmp_path / "exp")
    summary = json.loads(
        (path.with_name(f"decoding-dev-{SUFFIX[GREEDY]}.json")).read_text("utf8")
    )
    percent = decoding.rates["dev"].percent
    assert percent == pytest.approx(summary["percent"]["CER"], abs=0.005)


def test_a_set_has_the_name_that_its_manifest_has():
    for path, name in {
        "data/fbank/librispeech_cuts_test-clean.jsonl.gz": "test-clean",
        "cuts_dev.jsonl": "dev",
        "aishell_cuts_test.jsonl.gz": "test",
        "/a/some.jsonl.gz": "some",
        "/a/shar/": "shar",
    }.items():
        assert name_of_set(path) == name


# Batches, stops and changes


def test_the_size_of_batches_and_workers_do_not_matter(invoke, words, many, tmp_path):
    expected = None
    for more in ((), ("--max-duration", 0.01), ("--num-workers", 2)):
        assert invoke(*words("--overwrite", *more, cuts=many)).code == 0
        found = results(tmp_path / "exp" / GREEDY)
        assert found == (expected or found)
        expected = found


KILLS = [pytest.param(3), pytest.param(20, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
def test_a_decoding_that_is_killed_goes_on_to_the_same_result(
    invoke, words, many, tmp_path, in_child, kills
):
    """SIGKILL when a random share of the journal is there, and a random while on."""
    rng = random.Random(1)

    def kill_at(journal, size, pause):
        while not (journal.is_file() and journal.stat().st_size >= size):
            time.sleep(1e-4)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGKILL)

    def child(folder, *kill):
        def quietly():
            if kill:
                threading.Thread(target=kill_at, args=kill, daemon=True).start()
            try:
                cli([str(w) for w in words("--res-dir", folder, cuts=many)])
            except SystemExit as e:
                os._exit(e.code or 0)

        return in_child(quietly)

    assert child(tmp_path / "whole") == 0
    expected = results(tmp_path / "whole")
    assert len(expected) == 3
    name = f"utterances-dev-{SUFFIX[GREEDY]}.jsonl"
    size = (tmp_path / "whole" / name).stat().st_size
    killed = []
    for share in sorted(rng.random() for _ in range(kills)):
        pause = rng.uniform(0, 0.02)
        status = child(
            tmp_path / "killed", tmp_path / "killed" / name, share * size, pause
        )
        killed.append(status == -signal.SIGKILL)
    assert any(killed)  # the others were done already
    done = invoke(*words("--res-dir", tmp_path / "killed", cuts=many))
    assert done.code == 0
    assert results(tmp_path / "killed") == expected
    lines = (tmp_path / "killed" / name).read_text("utf8").splitlines()
    ids = [u["id"] for line in lines[1:] for u in json.loads(line)["utterances"]]
    assert sorted(ids) == sorted(c.id for c in CutSet.from_file(many))


def test_a_full_disk_is_one_sentence_and_loses_no_batch(
    loaded_once, invoke, words, tmp_path, in_child
):
    """A limit on the size of files stands for the disk, at ever more bytes."""
    assert invoke(*words("--res-dir", tmp_path / "whole")).code == 0
    expected = results(tmp_path / "whole")
    folder = tmp_path / "full"
    journal = folder / f"utterances-dev-{SUFFIX[GREEDY]}.jsonl"

    def said(limit):
        def run():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            done = invoke(*words("--res-dir", folder))
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert done.code == 1
            (tmp_path / "said").write_text(done.err[-1])

        assert in_child(run) == 0
        sentence = (tmp_path / "said").read_text()
        assert sentence.startswith("icefall_kd: error: File too large (")
        assert sentence.endswith(": free space, then retry")
        return sentence

    assert f"({journal}):" in said(100)  # no place for the header
    assert f"({journal}) after 1 cut, which is kept:" in said(1500)
    assert f"({journal}) after 3 cuts, which are kept:" in said(2300)
    shutil.copy(tmp_path / "whole" / journal.name, journal)
    for limit in (0, 600):  # of recogs-, which is the first, and errs-
        assert f"({folder}) after 4 cuts, which are kept:" in said(limit)
    sentence = said(1000)
    assert f"{folder}/decoding-" in sentence and "after 4 cuts" in sentence
    assert not list(folder.glob("decoding-*")) and not list(folder.glob(".tmp*"))
    done = invoke(*words("--res-dir", folder))
    assert done.code == 0 and results(folder) == expected


def test_what_is_decoded_is_decoded_anew_only_if_it_is_asked_or_the_model_is_another(
    invoke, words, tmp_path, caplog, another_exp
):
    assert invoke(*words()).code == 0
    (path,) = (tmp_path / "exp" / GREEDY).glob("utterances-*")
    marked = path.read_bytes().replace(b'"utterances":', b'"mark": 1, "utterances":')
    path.write_bytes(marked)
    assert invoke(*words()).code == 0 and path.read_bytes() == marked
    assert invoke(*words("--overwrite")).code == 0
    assert b'"mark"' in marked and b'"mark"' not in path.read_bytes()
    folder, _ = another_exp(seed=4)
    with caplog.at_level(logging.WARNING):
        assert invoke(*words("--exp-dir", folder)).code == 0
    assert "begun anew" in caplog.text


# Cuts that are odd


def test_cuts_without_text_are_decoded_and_not_scored(
    invoke, words, make_cut, tmp_path, caplog
):
    cuts = [make_cut(f"c{i}", 40 + i) for i in range(5)]
    cuts[1].supervisions = []
    cuts[3].supervisions[0].text = None
    path = tmp_path / "some.jsonl"
    CutSet.from_cuts(cuts).to_file(path)
    done = invoke(*words(cuts=path))
    assert done.code == 0
    assert "5, 2 of them without text, not scored" in done.out
    folder, suffix = tmp_path / "exp" / GREEDY, SUFFIX[GREEDY]
    scored = (folder / f"recogs-dev-{suffix}.txt").read_text("utf8")
    assert [line[:2] for line in scored.splitlines()[::2]] == ["c0", "c2", "c4"]
    others = (folder / f"recogs-dev-without-text-{suffix}.txt").read_text("utf8")
    assert [line[:2] for line in others.splitlines()[::2]] == ["c1", "c3"]
    assert "ref=[]" in others


def test_a_set_without_any_text_has_no_error_rate(invoke, words, make_cut, tmp_path):
    cut = make_cut("c0", 40)
    cut.supervisions = []
    path = tmp_path / "some.jsonl"
    CutSet.from_cuts([cut]).to_file(path)
    done = invoke(*words(cuts=path))
    assert done.code == 0 and "WER" not in done.out
    assert list(results(tmp_path / "exp" / GREEDY)) == [
        f"recogs-dev-without-text-{SUFFIX[GREEDY]}.txt"
    ]
    assert read_decodings(tmp_path / "exp") == []


def test_nothing_is_found_in_a_cut_that_is_too_short_and_it_is_scored(
    invoke, words, make_cut, tmp_path
):
    path = tmp_path / "some.jsonl"
    CutSet.from_cuts([make_cut("c0", 40), make_cut("c1", 5)]).to_file(path)
    for more in ((), ("--max-duration", 0.01)):  # beside another cut, and alone
        done = invoke(*words(*more, "--overwrite", cuts=path))
        assert done.code == 0 and "1 too short for the model" in done.out
        (recogs,) = (tmp_path / "exp" / GREEDY).glob("recogs-*")
        assert "c1:\tref=['ein']\nc1:\thyp=[]\n" in recogs.read_text("utf8")


def test_cuts_that_can_not_be_decoded_are_refused(refused, words, make_cut, tmp_path):
    def of(*cuts):
        path = tmp_path / "some.jsonl"
        CutSet.from_cuts(cuts).to_file(path)
        return refused(*words(cuts=path))

    assert "has 21 features a frame and the model takes 20" in of(
        make_cut("a", 40, num_features=21)
    )
    assert "has no features" in of(make_cut("a", 40).drop_features())
    two = make_cut("a", 40)
    two.supervisions = [two.supervisions[0]] * 2
    assert "has 2 supervisions" in of(two)
    path = tmp_path / "twice.jsonl"
    line = make_cut("a", 40)
    CutSet.from_cuts([line]).to_file(path)
    path.write_text(path.read_text() * 2)
    assert "occurs twice" in refused(*words(cuts=path))


# Frames that are left out


@pytest.mark.parametrize("method", [GREEDY, "modified_beam_search"])
def test_frames_that_the_ctc_head_calls_blank_are_left_out(
    invoke, words, tmp_path, talking, method
):
    def found(p):
        folder = tmp_path / str(p)
        more = ("--skip-blanks", p, "--res-dir", folder) if p else ()
        more = more or ("--res-dir", folder)
        done = invoke(*words(*more, method=method))
        assert done.code == 0, done
        (path,) = folder.glob("utterances-*")
        assert ("_skip-blanks-" in path.name) == bool(p)
        lines = path.read_text("utf8").splitlines()[1:]
        return [u for x in lines for u in json.loads(x)["utterances"]], done.out

    everything, _ = found(0)
    assert found(1)[0] == everything  # no probability is above 1
    for threshold in (0.03, 0.001):  # an untrained head's are of 1/25; of all frames
        some, out = found(threshold)
        assert any(u["tokens"] != v["tokens"] for u, v in zip(some, everything))
        assert all(t < u["num_frames"] for u in some for t in u["frames"])
        assert "% of the frames" in out
    assert not any(u["tokens"] for u in some)


def test_a_draft_that_costs_time_is_said_to(invoke, words, tmp_path):
    def said(draft):
        more = ("--draft", draft, "--res-dir", tmp_path / draft, "--overwrite")
        done = invoke(*words(*more))
        assert done.code == 0
        return done.out

    out = said("ctc")
    assert "drafted tokens accepted" in out
    slower = "(on a CPU --draft none is faster)" in out
    assert slower != torch.cuda.is_available()
    assert "drafted" not in said("none")


# Long recordings


def test_long_cuts_are_encoded_in_windows_and_short_ones_as_they_are(
    invoke, words, make_cut, tmp_path
):
    path = tmp_path / "some.jsonl"
    CutSet.from_cuts([make_cut("long", 900), make_cut("short", 150)]).to_file(path)

    def found(*more):
        folder = tmp_path / "-".join(map(str, ("res", *more)))
        words_ = words("--res-dir", folder, "--max-duration", 0.01, *more, cuts=path)
        assert invoke(*words_).code == 0
        (journal,) = folder.glob("utterances-*")
        lines = journal.read_text("utf8").splitlines()[1:]
        return {u["id"]: u for x in lines for u in json.loads(x)["utterances"]}

    whole, windows = found(), found("--window", 2)
    assert windows["short"] == whole["short"]
    assert windows["long"]["num_frames"] == whole["long"]["num_frames"]
    assert windows["long"]["tokens"] and windows["long"] != whole["long"]
    assert found("--window", 20) == whole


def test_seconds_without_a_token_become_frames_of_the_search(
    invoke, words, tmp_path, monkeypatch
):
    frames = []

    class Search(recognizer.GreedySearch):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            frames.append(self.reset_after)

    def header_of(*more):
        folder = tmp_path / "-".join(map(str, ("res", *more)))
        assert invoke(*words("--res-dir", folder, *more)).code == 0
        (path,) = folder.glob("utterances-*")
        assert ("_reset-context-after-" in path.name) == bool(more)
        return json.loads(path.read_text("utf8").splitlines()[0])

    monkeypatch.setattr(recognizer, "GreedySearch", Search)
    assert "reset_context_after" not in header_of()["method"]
    header = header_of("--reset-context-after", 0.59)
    assert header["method"]["reset_context_after"] == 0.59
    header_of("--reset-context-after", 0.001)
    assert frames == [None, 15, 1]


# Causal models


def test_the_silence_behind_an_utterance_is_as_long_as_asked_for(
    invoke, words, another_exp, tmp_path
):
    folder, _ = another_exp(causal=True)
    more = ("--exp-dir", folder, "--chunk-size", 16, "--left-context-frames", 64)

    def frames(name, *padding):
        where = tmp_path / name
        assert invoke(*words(*more, *padding, "--res-dir", where)).code == 0
        (journal,) = where.glob("utterances-*")
        assert ("_causal-padding-" in journal.name) == (name == "none")
        lines = journal.read_text("utf8").splitlines()[1:]
        utterances = [u for x in lines for u in json.loads(x)["utterances"]]
        return [u["num_frames"] for u in utterances]

    silent = frames("default")
    assert frames("same", "--causal-padding", 30) == silent
    shorter = frames("none", "--causal-padding", 0)
    assert {a - b for a, b in zip(silent, shorter)} <= {7, 8}  # 30 / 4
    # The header names another padding alone: journals without the option go on.
    (journal,) = (tmp_path / "same").glob("utterances-*")
    assert "causal_padding" not in journal.read_text("utf8")
    (journal,) = (tmp_path / "none").glob("utterances-*")
    header = json.loads(journal.read_text("utf8").splitlines()[0])
    assert header["method"]["causal_padding"] == 0


# Models that don't fit


@pytest.mark.parametrize(
    "lacks, method", [("use_ctc", CTC), ("use_transducer", GREEDY)]
)
def test_a_model_without_the_head_is_refused(
    refused, words, another_exp, lacks, method
):
    folder, _ = another_exp(**{lacks: False})
    sentence = refused(*words("--exp-dir", folder, method=method))
    assert f"--decoding-method is {method} and the model" in sentence
    assert "has no" in sentence


def test_tokens_of_another_model_are_refused(refused, words, tmp_path):
    (tmp_path / "lang").mkdir()
    (tmp_path / "lang" / "tokens.txt").write_text("<blk> 0\n<unk> 1\n一 2\n")
    sentence = refused(*words("--bpe-model", tmp_path / "lang"))
    assert "has 3 tokens and the teacher 25" in sentence


def test_a_causal_model_needs_one_size_of_chunks(
    refused, invoke, words, another_exp, tmp_path
):
    chunks = {"chunk_size": "16,32,-1", "left_context_frames": "64,-1"}
    folder, _ = another_exp(causal=True, **chunks)
    sentence = refused(*words("--exp-dir", folder))
    assert "--chunk-size is 16,32,-1" in sentence
    flags = ("--chunk-size", 16, "--left-context-frames", 64)
    assert invoke(*words("--exp-dir", folder, *flags)).code == 0
    (path,) = (tmp_path / "exp" / GREEDY).glob("recogs-*")
    assert "_chunk-16_left-context-64_context-2" in path.name


# Audio


@pytest.fixture
def audio_cut(tmp_path):
    """A cut of a wav with a tone; ``samples`` a channel."""
    import soundfile

    def make(cut_id, samples=16000, rate=16000, channels=1, text="ein"):
        path = tmp_path / f"{cut_id}.wav"
        tone = np.sin(np.arange(samples) * 0.1)[:, None].repeat(channels, 1)
        soundfile.write(path, 0.3 * tone, rate)
        recording = Recording.from_file(path, recording_id=cut_id)
        supervision = SupervisionSegment(
            cut_id, cut_id, 0, recording.duration, text=text
        )
        kind = MonoCut if channels == 1 else MultiCut
        return kind(
            cut_id,
            start=0,
            duration=recording.duration,
            channel=0 if channels == 1 else [0, 1],
            recording=recording,
            supervisions=[supervision],
        )

    return make


def test_features_are_computed_from_the_audio_as_icefall_does_on_the_fly(
    invoke, words, audio_cut, tmp_path, talking
):
    from lhotse import Fbank, FbankConfig

    cuts = [audio_cut("a", 16000), audio_cut("b", 9000), audio_cut("c", 300)]
    path = tmp_path / "some.jsonl"
    CutSet.from_cuts(cuts).to_file(path)
    done = invoke(*words("--on-the-fly-feats", 1, cuts=path))
    assert done.code == 0 and "1 too short" in done.out, done
    (journal,) = (tmp_path / "exp" / GREEDY).glob("utterances-*")
    lines = journal.read_text("utf8").splitlines()[1:]
    found = {u["id"]: u["tokens"] for x in lines for u in json.loads(x)["utterances"]}
    extractor = Fbank(FbankConfig(num_mel_bins=20))
    for cut in cuts[:2]:
        features = extractor.extract(cut.load_audio(), 16000)
        tokens = tokens_alone(talking, features, GREEDY)
        assert tokens and found[cut.id] == tokens
    assert found["c"] == []


def test_audio_that_can_not_be_heard_is_refused(refused, words, audio_cut, tmp_path):
    def of(cut):
        path = tmp_path / "some.jsonl"
        CutSet.from_cuts([cut]).to_file(path)
        return refused(*words("--on-the-fly-feats", 1, cuts=path))

    other_rate = of(audio_cut("a", rate=8000))
    assert "8000 Hz" in other_rate and "16000 Hz" in other_rate
    assert "has 2 channels" in of(audio_cut("b", channels=2))
    gone = audio_cut("c")
    (tmp_path / "c.wav").write_bytes(b"")
    assert "audio of cut c can't be read" in of(gone)
    no_recording = audio_cut("d")
    no_recording.recording = None
    assert "has no recording" in of(no_recording)

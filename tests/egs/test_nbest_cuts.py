"""egs/digits/ASR/local/nbest_cuts.py: its search, and the manifest that it writes."""

import importlib
import math
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import sentencepiece as spm
import torch
from lhotse import CutSet
from zipformer.decode.search import modified_beam_search

from icefall_kd.kinds.nbest import FIELD, read_nbest
from icefall_kd.tap import ModelTap

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "digits" / "ASR" / "local"
sys.path.insert(0, str(LOCAL))
nbest_cuts = importlib.import_module("nbest_cuts")
teacher_utils = importlib.import_module("teacher_utils")


@pytest.fixture
def teacher(make_model):
    model = make_model(seed=3).eval()
    with torch.no_grad():
        # So that beams differ and blanks are common, as after training.
        model.joiner.output_linear.weight.mul_(4)
        model.joiner.output_linear.bias[0] += 2
    return model


@pytest.fixture
def heard(teacher, features):
    with ModelTap(teacher, with_ctc=False) as hook:
        out = hook.encode(*features)
    return out.encoder_out, out.encoder_out_lens.tolist()


@pytest.mark.parametrize("beam_size", [1, 4, 7])
def test_the_best_hypothesis_is_that_of_zipformers_search(teacher, heard, beam_size):
    encoder_out, lens = heard
    found = nbest_cuts.nbest_search(teacher, *heard, beam_size)
    size = teacher.decoder.context_size
    best = [max(hyps, key=lambda h: h[1] / (len(h[0]) + size))[0] for hyps in found]
    with torch.no_grad():
        expected = modified_beam_search(
            teacher, encoder_out, torch.tensor(lens), beam=beam_size
        )
    assert best == expected and any(best)


def test_hypotheses_differ_and_come_best_first(teacher, heard):
    for hyps in nbest_cuts.nbest_search(teacher, *heard, 5):
        scores = [score for _, score in hyps]
        assert 1 < len(hyps) <= 5 and scores == sorted(scores, reverse=True)
        assert len({tuple(tokens) for tokens, _ in hyps}) == len(hyps)
        assert all(0 not in tokens and -1 not in tokens for tokens, _ in hyps)


def test_a_beam_that_holds_everything_gives_a_distribution(teacher, heard):
    """A frame emits one symbol, blank or not: the probabilities sum to 1."""
    encoder_out, _ = heard
    found = nbest_cuts.nbest_search(teacher, encoder_out, [1, 2, 2], 2000)
    assert [len(hyps) for hyps in found] == [11, 111, 111]
    for hyps in found:
        assert sum(math.exp(x) for _, x in hyps) == pytest.approx(1, abs=1e-5)


def test_an_utterance_alone_gets_the_same_list(teacher, features):
    x, lens = features
    with ModelTap(teacher, with_ctc=False) as hook:
        together = hook.encode(x, lens)
        alone = hook.encode(x[1:2, : lens[1]], lens[1:2])
    a, b = (
        nbest_cuts.nbest_search(
            teacher, out.encoder_out, out.encoder_out_lens.tolist(), 4
        )
        for out in (together, alone)
    )
    assert [y for y, _ in a[1]] == [y for y, _ in b[0]]
    assert [s for _, s in a[1]] == pytest.approx([s for _, s in b[0]], abs=1e-4)


def test_token_sequences_of_one_text_add_up(bpe_models):
    sp = spm.SentencePieceProcessor()
    sp.load(str(bpe_models.ab))
    whole = sp.encode("ab")
    letters = [sp.piece_to_id(x) for x in ("▁", "a", "b")]
    assert whole != letters and sp.decode(letters) == "ab"
    hyps = [([], -0.5), (whole, -1.0), (letters, -2.0)]
    both = math.log(math.exp(-1) + math.exp(-2))
    found = nbest_cuts.texts_of(sp, hyps, 3)
    assert [text for text, _ in found] == ["", "ab"]
    assert [score for _, score in found] == pytest.approx([-0.5, both])
    assert nbest_cuts.texts_of(sp, hyps, 1) == found[:1]


# The script


@pytest.fixture
def run(teacher, bpe_models, tmp_path, capsys):
    """The script, with a small model in the place of a checkpoint's."""

    def run(cuts, *words):
        CutSet.from_cuts(cuts).to_file(tmp_path / "in.jsonl.gz")
        argv = ["nbest_cuts.py", "--exp-dir", "exp", "--epoch", "1", "--num-threads"]
        argv += ["1", "--bpe-model", str(bpe_models.ab), *words]
        argv += [str(tmp_path / "in.jsonl.gz"), str(tmp_path / "out" / "o.jsonl.gz")]
        threads = torch.get_num_threads()
        model = mock.patch.object(
            teacher_utils,
            "load_model",
            lambda *_, **__: (teacher, {"feature_dim": 20, "vocab_size": 12}),
        )
        try:
            with mock.patch.object(sys, "argv", argv), model:
                nbest_cuts.run_script(nbest_cuts.main)
        finally:
            torch.set_num_threads(threads)
        out = CutSet.from_file(tmp_path / "out" / "o.jsonl.gz").to_eager()
        return out, capsys.readouterr()

    return run


@pytest.fixture
def refused(run, capsys, tmp_path):
    """One sentence, and no output."""

    def refused(cuts, *words):
        with pytest.raises(SystemExit) as e:
            run(cuts, *words)
        err = capsys.readouterr().err
        *bars, error = err.splitlines()
        assert e.value.code == 1 and error.startswith("nbest_cuts.py: error: ")
        assert all("Decoding" in bar for bar in filter(None, bars))
        assert not (tmp_path / "out").exists()
        return error

    return refused


def test_cuts_come_out_in_order_with_their_lists(run, make_cut):
    lengths = {"a": 61, "b": 120, "short": 8, "c": 33}
    cuts = [make_cut(name, n) for name, n in lengths.items()]
    out, said = run(cuts, "--num-paths", "3")
    assert [cut.id for cut in out] == list(lengths)
    for before, cut in zip(cuts, out):
        found = read_nbest(cut)
        assert (len(found) == 3) == (cut.id != "short")
        assert len({text for text, _ in found}) == len(found)
        assert found == sorted(found, key=lambda h: -h[1])
        assert cut.supervisions == before.supervisions
    assert out["short"].custom is None and FIELD in out["a"].custom
    assert "3 cuts with n-best lists, 1 without" in said.out
    assert "Decoding: 100%" in said.err


@pytest.mark.parametrize(
    "words, said",
    [
        (("--num-paths", "0"), "--num-paths is 0 but must be at least 1"),
        (("--num-paths", "4", "--beam-size", "3"), "--beam-size is 3"),
    ],
)
def test_bad_numbers_are_refused(run, make_cut, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit):
        run([make_cut("a", 61)], *words)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_manifest_or_checkpoint_that_is_missing_is_refused(
    tmp_path, capsys, make_cut
):
    words = ["--exp-dir", "none", "--epoch", "1", "--bpe-model", "x"]
    words += ["--num-threads", "1"]
    cuts = tmp_path / "in.jsonl"
    for said in ("does not exist, make the features", "none"):
        argv = ["nbest_cuts.py", *words, str(cuts), str(tmp_path / "out.jsonl")]
        with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as e:
            nbest_cuts.run_script(nbest_cuts.main)
        err = capsys.readouterr().err
        assert e.value.code == 1 and said in err and err.count("\n") == 1
        CutSet.from_cuts([make_cut("a", 61)]).to_file(cuts)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda cut: cut.drop_supervisions(), "cut b has 0 supervisions"),
        (
            lambda cut: setattr(cut, "supervisions", 2 * cut.supervisions) or cut,
            "cut b has 2 supervisions",
        ),
        (lambda cut: cut.drop_features(), "cut b of .* has no features"),
    ],
    ids="none two features".split(),
)
def test_a_cut_that_no_recipe_trains_on_is_refused(refused, make_cut, change, said):
    cuts = [make_cut("a", 61), change(make_cut("b", 61))]
    assert re.search(said, refused(cuts))


def test_a_cut_of_several_channels_gets_no_list(run, make_cut, multi_cut):
    out, said = run([make_cut("a", 61), multi_cut("m", 61), make_cut("c", 33)])
    assert [cut.id for cut in out] == ["a", "m", "c"]
    assert [FIELD in (cut.custom or {}) for cut in out] == [True, False, True]
    assert "2 cuts with n-best lists, 1 without" in said.out


@pytest.mark.parametrize("threads", ["-1", "2147483648"])
def test_numbers_of_threads_that_cannot_be_are_refused(refused, make_cut, threads):
    error = refused([make_cut("a", 61)], "--num-threads", threads)
    assert f"--num-threads is {threads} but must be at " in error


@pytest.mark.parametrize("name", ["", ".", "o.json", "o.yaml", "o", "in.jsonl.gz"])
def test_an_output_that_cannot_be_is_refused(
    teacher, make_cut, tmp_path, bpe_models, capsys, tree_of, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    CutSet.from_cuts([make_cut("a", 61)]).to_file(tmp_path / "in.jsonl.gz")
    before = tree_of(tmp_path)
    argv = ["nbest_cuts.py", "--exp-dir", "exp", "--epoch", "1", "--num-threads", "1"]
    argv += ["--bpe-model", str(bpe_models.ab), "in.jsonl.gz", name]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        nbest_cuts.run_script(nbest_cuts.main)
    err = capsys.readouterr().err
    assert "OUT_CUTS" in err and err.count("\n") == 1
    assert tree_of(tmp_path) == before


def test_where_memory_runs_out_the_batch_is_named(
    refused, make_cut, teacher, monkeypatch
):
    def full(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: no")

    monkeypatch.setattr(ModelTap, "encode", full)
    error = refused([make_cut("a", 61), make_cut("b", 100)])
    assert "pass over 2 cuts, 2.0 s with padding: free memory, or leave b" in error

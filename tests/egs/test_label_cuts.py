"""egs/digits/ASR/local/label_cuts.py: transcripts for cuts that have none."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lhotse import CutSet

from icefall_kd import Hypothesis
from icefall_kd.tokens import load_tokenizer

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "digits" / "ASR" / "local"
sys.path.insert(0, str(LOCAL))
label_cuts = importlib.import_module("label_cuts")
teacher_utils = importlib.import_module("teacher_utils")


@pytest.fixture
def run(make_model, bpe_models, tmp_path, capsys, monkeypatch):
    """The script, with a small model in the place of a checkpoint's, which hears "ab"
    in each utterance, or what it is told."""
    model = make_model(seed=3).eval()
    monkeypatch.setattr(
        teacher_utils,
        "load_model",
        lambda *_, **__: (model, {"feature_dim": 20, "vocab_size": 12}),
    )

    sp = load_tokenizer(bpe_models.ab)

    def run(cuts, text="ab"):
        def search(encoder_out, lens):
            found = Hypothesis(sp.encode(text, out_type=int))
            return SimpleNamespace(hypotheses=[found] * len(lens))

        monkeypatch.setattr(label_cuts, "GreedySearch", lambda model: search)
        CutSet.from_cuts(cuts).to_file(tmp_path / "in.jsonl.gz")
        words = ["--exp-dir", "exp", "--epoch", "1", "--num-threads", "1"]
        words += ["--bpe-model", str(bpe_models.ab)]
        words += [str(tmp_path / "in.jsonl.gz"), str(tmp_path / "out" / "o.jsonl.gz")]
        monkeypatch.setattr(sys, "argv", ["label_cuts.py", *words])
        threads = torch.get_num_threads()
        try:
            label_cuts.run_script(label_cuts.main)
        finally:
            torch.set_num_threads(threads)
        out = CutSet.from_file(tmp_path / "out" / "o.jsonl.gz").to_eager()
        return out, capsys.readouterr().out

    return run


def test_what_can_not_be_heard_is_left_out_and_counted(run, make_cut, multi_cut):
    cuts = [make_cut(f"c{i}", 61 + i, text=None) for i in range(4)]
    out, said = run([cuts[0], make_cut("short", 5), multi_cut("m", 61), *cuts[1:]])
    assert sorted(cut.id for cut in out) == ["c0", "c1", "c2", "c3"]
    assert {cut.supervisions[0].text for cut in out} == {"ab"}
    assert "4 cuts labelled, 2 left out" in said


@pytest.mark.parametrize("text", ["", "ab " * 30])
def test_no_transcript_at_all_is_refused(run, make_cut, tmp_path, capsys, text):
    """Nothing heard, or more than the frames hold."""
    with pytest.raises(SystemExit) as e:
        run([make_cut("a", 61), make_cut("b", 47)], text)
    assert e.value.code == 1 and not (tmp_path / "out").exists()
    assert "has a transcript for 0 of the 2 cuts" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 2])
def test_a_cut_of_no_supervision_or_two_is_refused(run, make_cut, capsys, count):
    bad = make_cut("bad", 61)
    bad.supervisions = count * bad.supervisions
    with pytest.raises(SystemExit) as e:
        run([make_cut("a", 61), bad])
    (error,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 1
    assert f"label_cuts.py: error: the cut bad has {count} supervisions" in error

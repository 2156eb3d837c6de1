"""icefall-kd export --forms plain: the files, what is said of them, and refusals."""

import json

import numpy as np
import pytest
import torch
from lhotse import CutSet

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def words(teacher_exp, tmp_path_factory, speak):
    """``export`` of the small model's plain form for 61 feature frames."""
    cuts = tmp_path_factory.mktemp("plain") / "cuts.jsonl.gz"
    CutSet.from_cuts(
        [speak(f"plain-{i}", n, "utterance") for i, n in enumerate((43, 61))]
    ).to_file(cuts)

    def of(folder, *more):
        return [
            *("export", "--recipe", teacher_exp.recipe, "--exp-dir"),
            *(teacher_exp.folder, "--epoch", 2, "--use-averaged-model", 0),
            *("--bpe-model", teacher_exp.bpe_model, "--export-dir", folder),
            *("--cuts", cuts, "--forms", "plain", "--num-frames", 61, *more),
        ]

    return of


def test_the_files_decode_as_the_model(invoke, words, teacher_exp, tmp_path):
    from icefall_kd.decode.greedy import GreedySearch
    from icefall_kd.export.plain_reader import PlainReader

    done = invoke(*words(tmp_path / "a"))
    assert done.code == 0, done
    assert "encoder_out: largest difference" in done.out
    assert "joiner.onnx: Add 1, Gemm 1, Tanh 1" in done.out
    plain = tmp_path / "a" / "plain-61"
    model, reader = teacher_exp.models["epoch-2"].eval(), PlainReader(plain)
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) + 3
    with torch.no_grad():
        out, lengths = model.forward_encoder((x - x.mean(0))[None], torch.tensor([50]))
        projected = model.joiner.encoder_proj(out[0])
        tokens = GreedySearch(model)(out, lengths).hypotheses[0].tokens
    values = reader.encode(x.numpy())["encoder_out"]
    assert np.abs(values - projected.numpy()).max() <= 1e-5
    assert reader.greedy(x.numpy()) == tokens

    paths = (plain.parent / "metadata.json", plain / "metadata.json")
    outer, inner = (json.loads(path.read_text("utf8")) for path in paths)
    assert outer["features"] == inner["features"]
    assert inner["plain"]["takes_mean"] is True
    assert set(outer["files"]) >= {f"plain-61/{p.name}" for p in plain.iterdir()}
    assert "Conv" in outer["files"]["plain-61/encoder.onnx"]["operators"]


@pytest.mark.slow
def test_a_second_form_of_the_same_length_replaces_the_first(invoke, words, tmp_path):
    for decoder, table in (("embedding", False), ("table", True)):
        done = invoke(*words(tmp_path / "a", "--plain-decoder", decoder))
        assert done.code == 0, done
        values = json.loads((tmp_path / "a" / "metadata.json").read_text("utf8"))
        assert ("plain-61/decoder_table.npy" in values["files"]) is table
        assert ("plain-61/decoder.onnx" in values["files"]) is not table
        there = (tmp_path / "a" / "plain-61").iterdir()
        of_plain = {name for name in values["files"] if name.startswith("plain-61/")}
        assert of_plain == {f"plain-61/{path.name}" for path in there}


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--num-frames", 8], "--num-frames is 8, and must be a whole number from 9"),
        (["--plain-mask", 0], "--plain-mask is off, and the mean of an utterance"),
        (
            ["--plain-decoder", "table", "--plain-table-mb", 0.001],
            "MB and --plain-table-mb is 0.001: give --plain-decoder embedding",
        ),
        (["--forms", "onnx"], "--num-frames is 61, and only the form plain has a"),
    ],
    ids=lambda value: value[-2][2:] if isinstance(value, list) else "",
)
def test_what_can_not_be_had_is_refused_and_leaves_nothing(
    refused, words, tmp_path, more, sentence
):
    assert sentence in refused(*words(tmp_path / "a", *more))
    assert not (tmp_path / "a").exists()


def test_the_length_is_asked_for(refused, words, tmp_path):
    without = words(tmp_path / "a")[:-2]
    assert "for one length: give --num-frames" in refused(*without)


def test_check_compares_the_plain_form_too(invoke, words, tmp_path):
    given = words(tmp_path / "a", "--heads", "ctc", "--sherpa", 0)
    cuts = given[given.index("--cuts") + 1]
    done = invoke(*given, "--check", cuts)
    assert done.code == 0, done
    (row,) = [line for line in done.out.splitlines() if line.startswith("plain-61  ")]
    assert "ctc" in row
    encoder = tmp_path / "a" / "plain-61" / "encoder.onnx"
    encoder.write_bytes(encoder.read_bytes() + b"\0")
    done = invoke(*given, "--check", cuts, "--only-check")
    assert done.code == 1 and "plain-61/encoder.onnx" in done.err[-1]


def test_cuts_that_are_longer_than_the_form_are_refused(refused, words, tmp_path):
    given = words(tmp_path / "a", "--sherpa", 0, "--num-frames", 50)
    sentence = refused(*given, "--check", given[given.index("--cuts") + 1])
    assert "--num-frames is 50, and the cut plain-1 to check with has 61" in sentence


def test_a_stream_is_checked_chunk_by_chunk(
    invoke, refused, words, another_exp, speak, tmp_path
):
    sizes = {"chunk_size": "8", "left_context_frames": "16"}
    exp, _ = another_exp(causal=True, **sizes)
    cuts = tmp_path / "cuts.jsonl.gz"
    CutSet.from_cuts([speak("stream", 90)]).to_file(cuts)
    given = words(tmp_path / "a")[:-2]  # without a length
    given += ["--exp-dir", exp, "--cuts", "", "--check", cuts, "--sherpa", 0]
    sentence = refused(*given, "--num-frames", 61)
    assert "--num-frames is 61, and a stream's chunk has its own length" in sentence
    done = invoke(*given)
    assert done.code == 0, done
    rows = json.loads((tmp_path / "a" / "parity.json").read_text("utf8"))["forms"]
    rows = [row for row in rows if row["form"] == "plain-chunk-8-left-16"]
    assert {row["head"] for row in rows} == {"transducer", "ctc"}
    for row in rows:
        assert row["same"] == row["cuts"] == 1 and row["encoder"] <= 1e-5

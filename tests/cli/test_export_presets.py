"""Each preset as a user builds and exports it: the files say what the student says."""

import json

import numpy as np
import pytest
import torch
from exporting import encoded
from lhotse import CutSet

from icefall_kd.teacher.loader import load_recipe_model

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
SUFFIX = "epoch-1-avg-1"
STREAM = ("--chunk-size", 16, "--left-context-frames", 64)
WHOLE = ("--chunk-size", -1)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, speak):
    """A manifest of two cuts, whose features have their mean."""
    path = tmp_path_factory.mktemp("spoken") / "cuts.jsonl.gz"
    CutSet.from_cuts(speak(f"preset-{n}", n) for n in (43, 108)).to_file(path)
    return path


@pytest.fixture
def built(invoke, teacher_words, tmp_path):
    """The folder of a student of a preset, with random parameters."""

    def build(name):
        folder = tmp_path / "student"
        words = ["student", *teacher_words, "--student-dir", folder, "--preset", name]
        done = invoke(*words, "--init", "random")
        assert done.code == 0, done
        return folder

    return build


@pytest.fixture
def exported(invoke, teacher_exp, spoken, tmp_path):
    """Export a student, checked; what parity.json says, by form and head."""

    def export(student, folder, *more):
        words = ["export", "--recipe", teacher_exp.recipe, "--exp-dir", student]
        words += ["--epoch", 1, "--use-averaged-model", 0, "--export-dir", folder]
        words += ["--bpe-model", teacher_exp.bpe_model, "--check", spoken]
        done = invoke(*words, "--sherpa", 0, *more)
        assert done.code == 0, done
        rows = json.loads((folder / "parity.json").read_text("utf8"))["forms"]
        return {(row["form"], row["head"]): row for row in rows}

    return export


def largest_differences(rows):
    """Of encoder, decoder and joiner, over the heads of each form but torch."""
    found = {}
    for (form, _), row in rows.items():
        if form != "torch":
            values = [row[part] or 0.0 for part in ("encoder", "decoder", "joiner")]
            found.setdefault(form, []).append(values)
            assert row["same"] == row["cuts"] == 2
    return {form: np.max(values, axis=0).max() for form, values in found.items()}


def report(name, found):
    """Shown by ``pytest -s``."""
    print(f"\n{name}: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))


def load(teacher_exp, student, *flags):
    words = (1, 0, 1, False, tuple(map(str, flags)))
    return load_recipe_model(teacher_exp.recipe, student, *words)[0].eval()


def session_of(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["1m", "kws", "s"])
def test_a_preset_for_whole_utterances(built, exported, teacher_exp, tmp_path, preset):
    student, folder = built(preset), tmp_path / "export"
    rows = exported(student, folder, "--forms", "torchscript,onnx")
    found = largest_differences(rows)
    assert set(found) == {"torchscript", "fp32"}
    report(preset, found)
    assert max(found.values()) <= 1e-4
    # Once more, without what the check uses.
    model = load(teacher_exp, student)
    x, x_lens = torch.randn(1, 77, 20), torch.tensor([77])
    with torch.no_grad():
        expected, _ = encoded(model, x, x_lens)
        script = torch.jit.load(str(folder / "jit_script.pt"))
        found, _ = script.encoder(features=x, feature_lengths=x_lens)
        assert (found - expected).abs().max() <= 1e-4
        expected = model.joiner.encoder_proj(expected).numpy()
    session = session_of(folder / f"encoder-{SUFFIX}.onnx")
    found, _ = session.run(None, {"x": x.numpy(), "x_lens": x_lens.numpy()})
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["1m-streaming", "s-streaming"])
def test_a_preset_for_streams(built, exported, teacher_exp, tmp_path, preset):
    """Both forms chunk by chunk, and for whole utterances."""
    student, folder = built(preset), tmp_path / "export"
    forms = ("--forms", "torchscript,onnx")
    found = largest_differences(exported(student, folder, *forms, *STREAM))
    assert set(found) == {"torchscript", "fp32"}
    whole = exported(student, tmp_path / "whole", *forms, *WHOLE)
    of_whole = largest_differences(whole)
    assert set(of_whole) == {"torchscript", "fp32"}
    report(preset, {**{f"chunks {k}": v for k, v in found.items()}, **of_whole})
    assert max(*found.values(), *of_whole.values()) <= 1e-4
    # Once more, without what the check uses: chunks are the recipe's under its mask.
    model = load(teacher_exp, student, *STREAM)
    x, x_lens = torch.randn(1, 45 + 32 * 3, 20), torch.tensor([45 + 32 * 3])
    with torch.no_grad():
        expected = model.joiner.encoder_proj(encoded(model, x, x_lens)[0]).numpy()
    session = session_of(folder / f"encoder-{SUFFIX}-chunk-16-left-64.onnx")
    inputs, rows = session.get_inputs(), []
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    states = [
        np.zeros([1 if isinstance(n, str) else n for n in i.shape], kinds[i.type])
        for i in inputs[1:]
    ]
    script = torch.jit.load(str(folder / "jit_script_chunk_16_left_64.pt"))
    encoder, of_script = script.encoder, []
    assert (encoder.chunk_size, encoder.left_context_len) == (16, 64)
    assert encoder.pad_length == 13
    # Two streams at once, by the names that icefall's jit_pretrained_streaming.py uses.
    script_states = encoder.get_init_states(2, device=torch.device("cpu"))
    for begin in range(0, x.size(1) - 44, 32):
        chunk = x[:, begin : begin + 45]
        values = {i.name: value for i, value in zip(inputs, [chunk.numpy(), *states])}
        out, *states = session.run(None, values)
        rows.append(out[0])
        with torch.no_grad():
            out, lens, script_states = encoder(
                features=torch.cat((torch.randn_like(chunk), chunk)),
                feature_lengths=torch.tensor([45, 45]),
                states=script_states,
            )
            of_script.append(script.joiner.encoder_proj(out)[1].numpy())
        assert lens.tolist() == [8, 8]
    for found in (rows, of_script):
        found = np.concatenate(found)[: 3 * 8]  # the mask's last chunk is shorter
        assert np.abs(found - expected[0, : len(found)]).max() <= 1e-4
